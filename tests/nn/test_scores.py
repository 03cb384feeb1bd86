"""Requested block scores equal the block norms of a dense twin's gradient, however the gradient came about."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ddst
from ddst.nn import SparseLayer
from helpers.dense import block_norms, pack_blocks, unpack_blocks
from helpers.kinds import dense_of, input_of, make_sparse
from helpers.layers import weight_of
from helpers.tolerances import assert_close

BACKENDS = ["cpu", "reference"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CONVS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2), "bias": False},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
]


#: Of the other convolutions, one of each kind, with and without groups, and a transposed one that is a linear layer.
KINDS: list[tuple[str, int, int]] = [
    ("ConvTranspose2d", 2, 1), ("ConvTranspose2d", 4, 1), ("Conv1d", 1, 1), ("Conv1d", 7, 1), ("ConvTranspose1d", 1, 1),
    ("Conv2d", 1, 2), ("ConvTranspose2d", 2, 2), ("Conv1d", 2, 3), ("ConvTranspose1d", 2, 2),
]  # fmt: skip


def make_twins(kind: Any, backend: str, dtype: torch.dtype = torch.float64) -> tuple[SparseLayer, Any, Tensor]:
    """(sparse layer, dense twin, input). The twin's whole weight is trained: nothing masks its gradient."""
    layer: SparseLayer
    twin: Any
    if isinstance(kind, tuple):
        layer = make_sparse(kind, density=0.4)
        twin, x = dense_of(layer), input_of(layer, 3, 6, dtype)
    elif kind in ("pixels", "grouped pixels"):
        groups = 2 if kind == "grouped pixels" else 1
        layer = ddst.SparseConvTranspose2d(8, 10 + groups % 2, (4, 3), 2, density=0.4, block=(4, 5), groups=groups)
        twin, x = dense_of(layer), torch.randn(3, 8, 1, 1, dtype=dtype)
    elif kind == "linear":
        layer, twin = ddst.SparseLinear(19, 21, density=0.4, block=(8, 4)), nn.Linear(19, 21)
        x = torch.randn(6, 19, dtype=dtype)
    else:
        assert isinstance(kind, int)
        layer = ddst.SparseConv2d(9, 21, **CONVS[kind], density=0.4, block=(8, 4))
        twin = nn.Conv2d(9, 21, **CONVS[kind])
        x = torch.randn(3, 9, 6, 7, dtype=dtype)
    layer, twin = layer.to(dtype), twin.to(dtype)
    with torch.no_grad():
        twin.weight.copy_(weight_of(layer))
        if twin.bias is not None:
            twin.bias.copy_(layer.bias)
    layer.backend = backend
    return layer, twin, x


def norms(twin: Any, layer: SparseLayer) -> Tensor:
    """Block norms of the gradient that the twin has gathered."""
    return block_norms(twin.weight.grad, layer.block)


Way = Callable[[nn.Module, Tensor], None]


def one_backward(module: nn.Module, x: Tensor) -> None:
    module(x).pow(3).sum().backward()


def two_forwards_in_one_graph(module: nn.Module, x: Tensor) -> None:
    (module(x).square().sum() + module(-0.5 * x + 1).pow(3).sum()).backward()


def accumulated(module: nn.Module, x: Tensor) -> None:
    for scale in (1.0, -2.0, 0.3):
        module(scale * x).pow(3).mean().backward()


def sizes_that_differ(module: nn.Module, x: Tensor) -> None:
    other = torch.cat([x, 2 * x]) if x.dim() == 2 else torch.cat([x, x[:, :, x.shape[2] // 2 :]], dim=2)
    for each in (x, other, x[:1]):
        module(each).pow(3).mean().backward()


def graph_kept_and_used_twice(module: nn.Module, x: Tensor) -> None:
    loss = module(x).pow(3).sum()
    loss.backward(retain_graph=True)
    loss.backward()


def gradient_penalty(module: nn.Module, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(module(x).pow(3).sum(), x, create_graph=True)
    (module(x.detach()).mean() + slope.square().sum().sqrt()).backward()


def penalty_alone(module: nn.Module, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(module(x).pow(2).sum(), x, create_graph=True)
    slope.pow(4).sum().backward()


def input_gradient_is_not_counted(module: nn.Module, x: Tensor) -> None:
    x = x.detach().requires_grad_()
    torch.autograd.grad(module(x).pow(3).sum(), x)
    module(x).pow(3).sum().backward(inputs=[x])
    module(x).square().sum().backward()


def unbatched(module: nn.Module, x: Tensor) -> None:
    module(x[0]).pow(3).sum().backward()
    module(x[1]).pow(3).sum().backward()


def checkpointed(module: nn.Module, x: Tensor) -> None:
    checkpoint(lambda t: module(t).pow(3), x.detach().requires_grad_(), use_reentrant=False).sum().backward()


def strided_input_and_expanded_gradient(module: nn.Module, x: Tensor) -> None:
    module(x.transpose(-1, -2).contiguous().transpose(-1, -2)).sum().backward()


def channels_last_input(module: nn.Module, x: Tensor) -> None:
    module(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x).pow(3).sum().backward()


WAYS: list[Way] = [
    one_backward,
    two_forwards_in_one_graph,
    accumulated,
    sizes_that_differ,
    graph_kept_and_used_twice,
    gradient_penalty,
    penalty_alone,
    input_gradient_is_not_counted,
    unbatched,
    checkpointed,
    strided_input_and_expanded_gradient,
    channels_last_input,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [*range(len(CONVS)), "linear", *KINDS, "pixels", "grouped pixels"], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_scores_are_the_norms_of_the_dense_gradient(way: Way, kind: Any, backend: str) -> None:
    layer, twin, x = make_twins(kind, backend)
    layer.request_scores()
    assert layer.scores_requested
    way(layer, x)
    way(twin, x)
    scores = layer.take_scores()
    assert scores.shape == layer.block_mask.shape
    assert scores.dtype == x.dtype
    assert not scores.requires_grad
    # Two to four products deep, so a little more than one product's rounding.
    want = norms(twin, layer)
    assert (scores - want).norm() <= 1e-13 * want.norm()
    # The packed gradient itself is what it was without a request.
    got = block_norms(unpack_blocks(layer.values.grad, layer.slot_blocks, layer.weight_shape), layer.block)
    assert (got - want * layer.block_mask).norm() <= 1e-13 * want.norm()
    assert layer.scores_requested


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [0, "linear"])
def test_each_take_covers_what_came_since_the_last(kind: int | str, backend: str) -> None:
    layer, twin, x = make_twins(kind, backend)
    one_backward(layer, x)  # before the request: not counted
    layer.request_scores()
    with pytest.raises(RuntimeError, match="backward"):
        layer.take_scores()
    for scale in (1.0, 0.5):
        twin.zero_grad()
        one_backward(layer, scale * x)
        one_backward(twin, scale * x)
        assert_close(layer.take_scores(), norms(twin, layer), "scores", dtype=torch.float64)
        with pytest.raises(RuntimeError, match="backward"):
            layer.take_scores()
    # Clearing gradients is not clearing the record: what counts is the backward passes since the last take.
    twin.zero_grad()
    one_backward(layer, x)
    layer.zero_grad()
    one_backward(twin, x)
    layer.request_scores()  # a second request changes nothing
    assert_close(layer.take_scores(), norms(twin, layer), "scores", dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [0, "linear"])
def test_cancel_ends_the_request(kind: int | str, backend: str) -> None:
    layer, _, x = make_twins(kind, backend)
    with pytest.raises(RuntimeError, match="request_scores"):
        layer.take_scores()
    layer.cancel_scores()  # nothing open: nothing happens
    layer.request_scores()
    one_backward(layer, x)
    layer.cancel_scores()
    assert not layer.scores_requested
    with pytest.raises(RuntimeError, match="request_scores"):
        layer.take_scores()
    layer.request_scores()
    with pytest.raises(RuntimeError, match="backward"):
        layer.take_scores()


@pytest.mark.parametrize("ended_by", ["take", "cancel", "no request"])
def test_the_record_does_not_keep_inputs_alive(ended_by: str) -> None:
    layer, _, _ = make_twins(0, "cpu")
    if ended_by != "no request":
        layer.request_scores()
    x = torch.randn(2, 9, 6, 7, dtype=torch.float64)

    def held() -> int:
        """Other tensors over the memory of the input."""
        tensors = [t for t in gc.get_objects() if type(t) is Tensor and t is not x]
        return sum(t.layout == torch.strided and t.data_ptr() == x.data_ptr() for t in tensors)

    one_backward(layer, x)
    assert (held() > 0) == (ended_by != "no request")
    if ended_by == "take":
        layer.take_scores()
    elif ended_by == "cancel":
        layer.cancel_scores()
    assert held() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_change_of_mask_drops_the_record_and_keeps_the_request(backend: str) -> None:
    layer, twin, x = make_twins(0, backend)
    layer.request_scores()
    one_backward(layer, x)
    layer.set_block_mask(~layer.block_mask)
    assert layer.scores_requested
    with pytest.raises(RuntimeError, match="backward"):
        layer.take_scores()
    with torch.no_grad():
        weight = torch.randn(layer.weight_shape, dtype=torch.float64)
        layer.values.copy_(pack_blocks(weight, layer.slot_blocks, layer.block))
        twin.weight.copy_(weight_of(layer))
    one_backward(layer, x)
    one_backward(twin, x)
    assert_close(layer.take_scores(), norms(twin, layer), "after a change of mask", dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_do_not_mix_their_records(backend: str) -> None:
    torch.manual_seed(2)
    sparse = nn.Sequential(
        ddst.SparseConv2d(5, 12, 3, density=0.5, block=4),
        nn.Tanh(),
        ddst.SparseConv2d(12, 12, 3, padding=1, density=0.5, block=4),
        nn.Flatten(),
        ddst.SparseLinear(12 * 9, 7, density=0.5, block=(4, 8)),
    ).double()
    dense = nn.Sequential(*(copy.deepcopy(m.to_dense() if isinstance(m, SparseLayer) else m) for m in sparse))
    x = torch.randn(3, 5, 5, 5, dtype=torch.float64)
    asked = [0, 4]
    for i in asked:
        sparse[i].request_scores()
    for i in (0, 2, 4):
        sparse[i].backend = backend
    one_backward(sparse, x)
    one_backward(dense, x)
    for i in asked:
        want = norms(dense[i], sparse[i])
        assert (sparse[i].take_scores() - want).norm() <= 1e-13 * want.norm()
    assert not sparse[2].scores_requested


def test_a_layer_used_by_two_modules_sums_both_uses() -> None:
    x = torch.randn(6, 19, dtype=torch.float64)
    square = ddst.SparseLinear(19, 19, density=0.5, block=4).double()
    dense = copy.deepcopy(square.to_dense())
    model, reference = nn.Sequential(square, nn.Tanh(), square), nn.Sequential(dense, nn.Tanh(), dense)
    square.request_scores()
    one_backward(model, x)
    one_backward(reference, x)
    want = norms(dense, square)
    assert (square.take_scores() - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [0, "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, kind: int | str, backend: str) -> None:
    layer, _, x = make_twins(kind, backend, dtype)
    twin = copy.deepcopy(layer.to_dense()).double()
    layer.request_scores()
    layer(x).sum().backward()
    twin(x.double()).sum().backward()
    scores = layer.take_scores()
    assert scores.shape == layer.block_mask.shape
    tolerance = dtype if backend == "reference" else torch.float32
    assert_close(scores, norms(twin, layer), "scores", dtype=tolerance)


@pytest.mark.parametrize("kind", [0, "linear"])
def test_autocast(kind: int | str) -> None:
    layer, twin, x = make_twins(kind, "cpu", torch.float32)
    layer.request_scores()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    twin(x).sum().backward()
    want = norms(twin, layer)
    assert (layer.take_scores() - want).norm() <= 1e-2 * want.norm()


def test_values_divided_by_something_score_the_weight_computed_with() -> None:
    # As under spectral norm: the weight the layer computes with is values / sigma; its gradient is what is scored.
    layer, twin, x = make_twins(0, "cpu")

    class Halved(nn.Module):
        def forward(self, owner: SparseLayer) -> Tensor:
            return owner.values / 2

    layer.spectral_norm = Halved()
    with torch.no_grad():
        twin.weight.div_(2)
    layer.request_scores()
    one_backward(layer, x)
    one_backward(twin, x)
    want = norms(twin, layer)
    assert (layer.take_scores() - want).norm() <= 1e-13 * want.norm()


def test_frozen_values_record_nothing() -> None:
    layer, _, x = make_twins(0, "cpu")
    layer.values.requires_grad_(False)
    layer.request_scores()
    layer(x.requires_grad_()).sum().backward()
    with pytest.raises(RuntimeError, match="backward"):
        layer.take_scores()


def test_compiled_layer_still_records() -> None:
    layer, twin, x = make_twins(0, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    one_backward(compiled, x)
    layer.zero_grad()
    layer.request_scores()
    one_backward(compiled, x)
    one_backward(twin, x)
    want = norms(twin, layer)
    assert (layer.take_scores() - want).norm() <= 1e-13 * want.norm()
    layer.cancel_scores()
    one_backward(compiled, x)


def test_gradients_are_the_same_bits_with_and_without_a_request() -> None:
    layer, _, x = make_twins(0, "cpu", torch.float32)
    one_backward(layer, x)
    without = layer.values.grad.clone()
    layer.zero_grad()
    layer.request_scores()
    one_backward(layer, x)
    assert torch.equal(layer.values.grad, without)
