"""torch.onnx.export of models with sparse layers, called as for any model, and read by onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ddst
from ddst.models.registry import MODELS

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 40)), (5, 3, 64)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(32, 40, 3, 2), nn.ReLU(), nn.Conv2d(40, 32, 3, padding=1)), (5, 32, 9, 8)),
    # One pixel in: the product with a matrix whose index is made of the layer's.
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(32, 64, 4), nn.ReLU(), nn.ConvTranspose2d(64, 32, 3, 2, 1, output_padding=1, groups=2)
        ),
        (5, 32, 1, 1),
    ),
    "signals": (
        lambda: nn.Sequential(nn.ConvTranspose1d(32, 48, 4, 2), nn.ReLU(), nn.Conv1d(48, 32, 3, padding="same")),
        (5, 32, 7),
    ),
}
WEIGHT_NORM, SPECTRAL_NORM = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
NORMED = [
    *((name, None) for name in NETS),
    ("conv", WEIGHT_NORM),
    ("linear", SPECTRAL_NORM),
    ("transposed", SPECTRAL_NORM),
]


def run_exported(net: nn.Module, inputs: tuple[Tensor, ...], path: Path, **options: object) -> Tensor:
    """What onnxruntime makes of the inputs with the file of `net`, exported with two of the batch's entries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its own code
        torch.onnx.export(net, tuple(x[:2] for x in inputs), path, external_data=False, verbose=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {put.name: x.numpy() for put, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])


@pytest.mark.parametrize("name, norm", NORMED)
def test_the_file_computes_what_the_net_computes(name: str, norm: Callable | None, tmp_path: Path) -> None:
    make, shape = NETS[name]
    net = make()
    if norm:
        norm(net[0])
    ddst.sparsify(net, 0.4, distribution="uniform")
    assert len(ddst.nn.sparse_layers(net)) == 2
    net.eval()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = net(x)
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    torch.testing.assert_close(run_exported(net, (x,), tmp_path / "x.onnx", dynamic_shapes=sizes), expected)


def test_images_of_other_sizes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1))
    ddst.sparsify(net, 0.5, distribution="uniform")
    net.eval()
    dynamic = torch.export.Dim.DYNAMIC
    options = {"dynamic_shapes": ({2: dynamic, 3: dynamic},), "input_names": ["x"]}
    run_exported(net, (torch.randn(2, 16, 8, 8),), tmp_path / "x.onnx", **options)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(2, 16, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), net(x))


@pytest.mark.parametrize("name", ["biggan-g", "stylegan2-g"])
def test_models_that_compute_in_their_own_way(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]
    net = model.make("tiny")
    inputs = model.sample(net, 2)
    ddst.sparsify(net, 0.3, block=8, sample=inputs)
    net.eval()
    with torch.no_grad():
        expected = net(*inputs)
    torch.testing.assert_close(run_exported(net, tuple(inputs), tmp_path / "x.onnx"), expected, rtol=1e-4, atol=1e-5)


def test_a_file_is_as_small_as_its_blocks(tmp_path: Path) -> None:
    def size(net: nn.Module) -> int:
        run_exported(net.eval(), (torch.randn(2, 256, 4, 4),), tmp_path / "x.onnx")
        return (tmp_path / "x.onnx").stat().st_size

    net = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1))
    dense = size(net)
    ddst.sparsify(net, 0.1)
    assert 0.1 < size(net) / dense < 0.11


class Half(nn.Module):
    """The fused operator called as a function, with all that it can have in front of and behind the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ddst.SparseConv2d(32, 32, 3, padding=1, density=0.4)
        self.norm = nn.BatchNorm2d(32)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        layer, norm = self.layer, self.norm
        settled = ddst.ops.Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias)
        geometry = (layer.topology, layer.op_shape, 1, 1)
        y, moments = ddst.ops.norm_act_conv2d(
            x, layer.values, layer.bias, *geometry, norm=settled, negative_slope=0.2, upsample=2, pool=2,
            residual=residual, residual_upsample=2, moments=True,
        )  # fmt: skip
        return y - moments[0][:, None, None]


def test_the_fused_half_of_a_block(tmp_path: Path) -> None:
    net = Half()
    for number in (net.norm.running_mean, net.norm.running_var, *net.norm.parameters()):
        nn.init.uniform_(number, 0.5, 2)
    inputs = (torch.randn(2, 32, 6, 6), torch.randn(2, 32, 3, 3))
    with torch.no_grad():
        expected = net.eval()(*inputs)
    torch.testing.assert_close(run_exported(net, inputs, tmp_path / "x.onnx"), expected)


def test_a_fused_model(tmp_path: Path) -> None:
    net = nn.Sequential(nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
    ddst.sparsify(net, 0.4, distribution="uniform")
    assert ddst.fuse(net).fused == 1
    x = torch.randn(2, 32, 6, 6)
    with torch.no_grad():
        expected = net.eval()(x)
    torch.testing.assert_close(run_exported(net, (x,), tmp_path / "x.onnx"), expected)


@pytest.mark.filterwarnings("ignore")  # of a way that torch itself warns of
def test_the_old_exporter_does_not_know_the_operators(tmp_path: Path) -> None:
    """As the guide says (docs/layers.md)."""
    layer, x = ddst.SparseConv2d(16, 16, 3, density=1.0).eval(), torch.zeros(1, 16, 4, 4)
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match=r"ddst::conv2d"):
        torch.onnx.export(layer, (x,), str(tmp_path / "old.onnx"), dynamo=False)
