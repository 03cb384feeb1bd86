"""The fused half block in Triton's interpreter against its formula in float64: forward, moments, every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddst import backends, kernels
from ddst.kernels import weight_grad, weight_grad_norm
from ddst.kernels.configs import GatherConfig, WeightGradConfig
from ddst.ops import Norm, channel_moments, norm_act_conv2d
from ddst.ops.cuda import half_block
from helpers.half_blocks import Built, HalfBlock
from helpers.tolerances import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:Warning only once for all operators"),
    pytest.mark.usefixtures("poison_outputs"),
]

CONV = HalfBlock().conv
BLOCKS = [
    HalfBlock(),
    HalfBlock(norm="none", slope=1.0),  # a convolution
    HalfBlock(norm="none", pool=2, residual=1),
    HalfBlock(norm="sample", upsample=2, slope=0.2, residual=2),
    HalfBlock(norm="sample", conv=replace(CONV, size=(8, 8), layout="channels_last")),  # a tile is of one sample
    HalfBlock(norm="sample", batch_stats=False, conv=replace(CONV, stride=2, padding=(2, 1))),  # phases
    HalfBlock(upsample=2, pool=2, affine=False),
    HalfBlock(batch_stats=False, slope=1.0, pool=2, conv=replace(CONV, size=(7, 8), dilation=(1, 2), padding=0)),
    HalfBlock(upsample=2, slope=0.1, conv=replace(CONV, stride=(2, 1), layout="strided", grad_layout="transposed")),
    HalfBlock(norm="sample", upsample=2, conv=replace(CONV, stride=2, kernel=(4, 4), mask="empty_lines", bias=False)),
    HalfBlock(batch_stats=False, residual=1, conv=replace(CONV, block=(32, 16), mask="none")),
    HalfBlock(residual=1, conv=replace(CONV, kernel=(1, 1), padding=0, block=(16, 64), channels=(72, 20))),
]


def results(built: Built, config: GatherConfig | None = None, by: WeightGradConfig | None = None) -> dict[str, Tensor]:
    y, moments = kernels.norm_act_conv2d(*built.forward_arguments(), config=config)
    gradients = kernels.norm_act_conv2d_input_grad(*built.input_grad_arguments(), config=config)
    found = dict(zip(("input", "gamma", "beta"), gradients, strict=True))
    gradients = kernels.norm_act_conv2d_weight_grad(*built.weight_grad_arguments(), config=by)
    found |= dict(zip(("values", "bias"), gradients, strict=True))
    return {"output": y, "moments": moments} | found


def judge(built: Built, found: dict[str, Tensor], names: tuple[str, ...] = ()) -> None:
    for name, right in built.expected.items():
        if names and name not in names:
            continue
        result = found[name]
        if name == "values":
            assert result[~built.case.active].count_nonzero() == 0, "free slots"
            result, right = result[built.case.active], right[built.case.active]
        if name == "moments":
            assert_close(result[0], right[0], "mean")
            assert_close(result[1], right[1], "variance")
        else:
            assert_close(result, right, name)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_half_blocks(block: HalfBlock) -> None:
    built = block.build()
    judge(built, results(built))
    y, none = kernels.norm_act_conv2d(*built.forward_arguments(moments=False, channels_last=False))
    assert none.numel() == 0 and y.is_contiguous()
    assert_close(y, built.expected["output"])


CONFIGS = [
    (GatherConfig(pixels=128), WeightGradConfig("col", 4)),
    (GatherConfig(fuse=2), WeightGradConfig("row", 1, pixels=32)),
    (GatherConfig(fuse=4, pixels=128), WeightGradConfig("row", 4, pixels=128)),
]


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_configurations(number: int) -> None:
    """Tiles that end within an image, hold several, and hold one each."""
    block = (BLOCKS[3], BLOCKS[4], replace(BLOCKS[2], norm="sample", residual=0))[number]
    built = block.build()
    judge(built, results(built, *CONFIGS[number]))


@pytest.mark.parametrize("block", [BLOCKS[0], BLOCKS[2], BLOCKS[3]], ids=str)
def test_16_bits(block: HalfBlock) -> None:
    """Statistics in float32. Between norm and product the operand is rounded, once more than the reference is."""
    built = block.build(torch.float16)
    found = results(built)
    assert found["output"].dtype == found["input"].dtype == found["values"].dtype == torch.float16
    assert all(
        found[name].dtype == torch.float32
        for name in ("moments", *(["gamma", "beta"] if built.norm[2] is not None else []))
    )
    for name, right in built.expected.items():
        active = built.case.active if name == "values" else slice(None)
        error = (found[name][active].double() - right[active]).abs().max() / right[active].abs().max()
        assert error < 2e-3, (name, error)


@pytest.mark.parametrize("norm", ["channel", "sample"])
def test_nothing_cancels_at_mean_1000_and_spread_1(norm: str) -> None:
    """Of float32 the input's own rounding, 3e-5 of the spread, is all that is left."""
    built = HalfBlock(norm=norm).build(mean=1000.0)
    found = results(built)
    for name in ("output", "input", "gamma", "beta"):
        right = built.expected[name]
        assert (found[name].double() - right).abs().max() < 2e-4 * right.abs().max(), name
    moments = kernels.channel_moments(built.case.x)
    var, mean = torch.var_mean(built.case.x.double(), (0, 2, 3), correction=0)
    assert_close(moments[0], mean)
    assert (moments[1].double() / var - 1).abs().max() < 1e-5


def test_moments_of_an_output_about_1000() -> None:
    built = HalfBlock().build()
    assert built.case.bias is not None
    built.case.bias.add_(1000)
    y, moments = kernels.norm_act_conv2d(*built.forward_arguments())
    var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    assert_close(moments[0], mean)
    assert (moments[1].double() / var - 1).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(3, 20, 9, 11), (1, 70, 1, 1), (40, 16, 16, 16)], ids=str)
def test_channel_moments(shape: tuple[int, ...]) -> None:
    """Fewer pixels than a tile, more tiles than are merged at once (of 16 bits: in float32)."""
    for dtype in (torch.float32, torch.float16):
        x = (torch.randn(shape) * 3 + 5).to(dtype)
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        for layout in (x, x.contiguous(memory_format=torch.channels_last)):
            moments = kernels.channel_moments(layout)
            assert moments.dtype == torch.float32
            assert_close(moments[0], mean)
            assert (moments[1].double() - var).abs().max() <= 4e-6 * float(var.max())
    assert kernels.channel_moments(torch.empty(0, 3, 2, 2)).isnan().all()


@pytest.mark.parametrize("norm", ["channel", "sample"])
def test_images_of_several_launches_keep_their_samples(monkeypatch: pytest.MonkeyPatch, norm: str) -> None:
    built = HalfBlock(norm=norm, conv=replace(CONV, batch=5, size=(4, 4))).build(seed=1)
    monkeypatch.setattr(weight_grad, "PIXEL_LIMIT", 2 * 16)
    weight_grad_norm.plan.cache_clear()
    values, _ = kernels.norm_act_conv2d_weight_grad(*built.weight_grad_arguments())
    weight_grad_norm.plan.cache_clear()
    judge(built, {"values": values}, ("values",))


def test_no_images() -> None:
    built = HalfBlock(norm="channel", conv=replace(CONV, batch=0)).build()
    found = results(built)
    assert found["output"].shape[0] == 0 and found["moments"].isnan().all()
    assert kernels.norm_act_conv2d(*built.forward_arguments(moments=False))[1].shape == (0,)
    assert all(found[name].count_nonzero() == 0 for name in ("values", "bias", "gamma", "beta"))


def test_a_nan_stays_where_it_is() -> None:
    """Not hidden by the activation, nor carried into other pixels' padding."""
    built = HalfBlock(norm="channel", batch_stats=False, conv=replace(CONV, mask="full", size=(6, 6))).build()
    built.case.x[1, 3, 5, 5] = float("nan")
    y, _ = kernels.norm_act_conv2d(*built.forward_arguments())
    assert y[1, :, 4:, 4:].isnan().all() and not y[1, :, :4].isnan().any() and not y[[0, 2]].isnan().any()


OPERATORS = ("channel_moments", "norm_act_conv2d", "norm_act_conv2d_input_grad", "norm_act_conv2d_weight_grad")


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the operators that ran on Triton kernels so far, on CPU tensors."""
    ran: list[str] = []
    library = torch.library.Library("ddst", "IMPL")

    def serve(name: str) -> None:
        kernel = getattr(half_block, name)

        def counted(*arguments: object) -> object:
            ran.append(name)
            return kernel(*arguments)

        library.impl(name, counted, "CPU", allow_override=True)

    for name in OPERATORS:
        serve(name)
    monkeypatch.setitem(backends._supports, "cpu", lambda problem: (True, "stands in for a CUDA device"))
    yield ran
    library._destroy()


@pytest.mark.parametrize("block", [BLOCKS[3], BLOCKS[2]], ids=str)
def test_the_operator_and_its_derivatives(on_triton: list[str], block: HalfBlock) -> None:
    built = block.build()
    case = built.case
    mean, var, *affine = built.norm
    leaves = [t.clone().requires_grad_() for t in (case.x, case.values, case.bias, *affine) if t is not None]
    x, values, bias, *affine = leaves
    norm = None if mean is None or var is None else Norm(mean, var, *affine, eps=1e-5, batch_stats=True)
    y, moments = norm_act_conv2d(
        x, values, bias, case.topology, case.weight_shape, *built.window, norm=norm, negative_slope=block.slope,
        upsample=block.upsample, pool=block.pool, residual=built.residual, residual_upsample=max(1, block.residual),
        moments=True,
    )  # fmt: skip
    grads = torch.autograd.grad(y, leaves, case.grad)
    assert moments is not None
    names = ["input", "values", "bias", "gamma", "beta"][: len(leaves)]
    judge(built, {"output": y.detach(), "moments": moments} | dict(zip(names, grads, strict=True)))
    assert set(on_triton) == set(OPERATORS[1:])
    channel_moments(x)
    assert on_triton[-1] == "channel_moments"


def test_bad_arguments_are_refused_before_anything_runs(on_triton: list[str]) -> None:
    built = HalfBlock().build()
    good = [*built.forward_arguments()[:18], True, *built.forward_arguments()[18:]]
    operator = torch.ops.ddst.norm_act_conv2d
    operator(*good)
    wrong = {
        "mean is torch.float64": (4, built.norm[0].double()),
        r"var has the shape \[3\]": (5, torch.ones(3)),
        "gamma and beta must both": (7, None),
        "mean and var": (4, None),
        r"gamma has the shape \[3, 3\]": (6, torch.ones(3, 3)),
        "residual has the shape": (3, torch.ones(3, 24, 2, 2)),
        "residual is torch.float64": (3, torch.ones(3, 24, 4, 5).double()),
        "upsample is 3": (15, 3),
        "pool is 0": (16, 0),
        "residual_upsample is 4": (17, 4),
        "backend cuda: (libddst_cuda.so is not loaded|norm_act_conv2d is not written in CUDA)": (
            21,
            backends.code("cuda"),
        ),
    }
    for text, (position, value) in wrong.items():
        with pytest.raises(ValueError, match=text):
            operator(*good[:position], value, *good[position + 1 :])
    for op, arguments in (
        ("norm_act_conv2d_input_grad", [*built.input_grad_arguments(), True]),
        ("norm_act_conv2d_weight_grad", [*built.weight_grad_arguments()]),
    ):
        with pytest.raises(ValueError, match=r"grad_output has the shape \[3, 24, 2, 2\], expected \[3, 24, 4, 5\]"):
            getattr(torch.ops.ddst, op)(torch.ones(3, 24, 2, 2), *arguments[1:])
