"""Layers go past the dispatcher where nothing listens to it: the same bits, and nobody who listens is passed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ddst
from ddst.ops import conv2d
from ddst.ops.autograd import nothing_listens


class Listen(TorchFunctionMode):
    """Hears of functions, operators called in Python among them."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.add(str(func))
        return func(*args, **(kwargs or {}))


def makers() -> dict[str, tuple[nn.Module, Tensor]]:
    fused = nn.Sequential(
        nn.BatchNorm2d(16), nn.ReLU(), ddst.SparseConv2d(16, 32, 3, density=0.5), nn.ReLU(),
        ddst.SparseConv2d(32, 16, 1, density=0.5),
    )  # fmt: skip
    ddst.fuse(fused)
    image = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)
    return {
        "conv2d": (ddst.SparseConv2d(16, 32, 3, density=0.5, padding=1), image),
        "linear": (ddst.SparseLinear(16, 32, density=0.5), torch.randn(3, 16)),
        "fused": (fused, image),
    }


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("name", list(makers()))
def test_the_short_way_gives_the_same_bits_as_the_long_one(name: str) -> None:
    layer, x = makers()[name]
    short = results(layer, x)
    with Listen() as listening:
        long = results(layer, x)
    assert any("ddst" in heard for heard in listening.heard), "the long way was taken"
    assert all(torch.equal(*pair) for pair in zip(short, long, strict=True))
    assert short[0].grad_fn is not None
    with torch.no_grad():
        assert torch.equal(layer(x), short[0]) and not layer(x).requires_grad


@pytest.mark.parametrize("name", [*makers(), "transposed"])
def test_a_checkpoint_may_end_in_a_sparse_layer(name: str) -> None:
    """Its saved tensors are computed anew, with a graph, while its derivative is."""
    made = makers() | {"transposed": (ddst.SparseConvTranspose2d(16, 32, 3, density=0.5), torch.randn(2, 16, 5, 5))}
    layer, x = made[name]
    net = nn.Sequential(nn.Linear(x.shape[-1], x.shape[-1]), nn.ReLU(), layer)
    plain, kept = net(x), checkpoint(net, x, use_reentrant=False)
    for ours, theirs in zip(
        *(torch.autograd.grad(y.sum(), list(net.parameters())) for y in (kept, plain)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_what_does_not_export_goes_on_beside_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer, x in makers().values():
        expected = results(layer, x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
            found = results(layer, x)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_modes_of_dispatch_see_every_operator() -> None:
    seen: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    layer, x = makers()["conv2d"]
    with Record():
        results(layer, x)
    ours = [name.split(".")[1] for name in seen if name.startswith("ddst.")]
    assert ours == ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"]


def test_what_listens_is_noticed() -> None:
    x = torch.randn(2)
    assert nothing_listens([x, nn.Parameter(x), None, [1], (1,), 1, 0.5, True])

    class Own(Tensor):
        pass

    assert not nothing_listens([x.as_subclass(Own)])
    with Listen():
        assert not nothing_listens([x])
    assert torch.func.vmap(lambda t: t * nothing_listens([x]))(x).tolist() == [0.0, 0.0]
    with torch.autograd.forward_ad.dual_level():
        assert not nothing_listens([x])


@pytest.mark.parametrize("odd", [(True, 1), (1.0, 1), [1.0, 1]])
def test_what_is_equal_to_a_checked_argument_is_checked_as_well(odd: Any) -> None:
    layer, x = makers()["conv2d"]
    arguments = (x, layer.values, None, layer.topology, layer.op_shape)
    conv2d(*arguments, (1, 1), (1, 1), (1, 1))
    for position in range(3):
        window: list[Any] = [(1, 1)] * 3
        window[position] = odd
        with pytest.raises(TypeError, match="must be an int or a pair of ints"):
            conv2d(*arguments, *window)
