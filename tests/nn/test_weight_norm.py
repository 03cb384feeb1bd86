"""Weight norm on packed values, against torch's on the masked dense weight, and over changes of the mask."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import remove_weight_norm as torch_remove_weight_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

import ddst
from ddst.nn import (
    SparseConv2d,
    SparseLayer,
    SparseLinear,
    remove_weight_norm,
    sparse_layers,
    spectral_norm,
    weight_norm,
)
from ddst.sparsity import SparseTraining
from ddst.sparsity.layer_change import LayerChange
from ddst.sparsity.score_collector import ScoreCollector
from helpers.dense import active_entries, block_norms, pack_blocks, unpack_blocks
from helpers.layers import block_map
from helpers.training import classifier, train_step

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

BACKENDS = ["cpu", "reference"]
STYLES = ["hook", "parametrization"]
KINDS = ["conv", "uneven conv", "linear", "uneven linear"]
DIMS = [0, None]
TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-6)]


class Formula(nn.Module):
    """``g · v / ‖v‖`` by plain operations. (In second derivatives torch's own takes the norms for constants.)"""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def norms(self, v: Tensor) -> Tensor:
        return v.norm() if self.dim is None else v.square().sum(tuple(range(1, v.dim())), keepdim=True).sqrt()

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / self.norms(v))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.norms(weight), weight


def by_formula(module: nn.Module, dim: int | None) -> nn.Module:
    return parametrize.register_parametrization(module, "weight", Formula(dim), unsafe=True)


ATTACH = {"hook": hooked_weight_norm, "parametrization": parametrizations.weight_norm, "formula": by_formula}

dims = pytest.mark.parametrize("dim", DIMS)
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, dim: int | None = 0, dtype: torch.dtype = torch.float64, **options: Any) -> SparseLayer:
    """Layers with weight norm, g unlike the norms of v; channels that are multiples of the block, and not."""
    torch.manual_seed(0)
    layer: SparseLayer
    if kind == "conv":
        layer = SparseConv2d(16, 24, 3, padding=1, dtype=dtype, density=0.3, block=(8, 8), reserve=0.5)
    elif kind == "uneven conv":
        layer = SparseConv2d(11, 21, (2, 3), stride=2, dtype=dtype, density=0.4, block=(8, 4))
    elif kind == "linear":
        layer = SparseLinear(32, 16, dtype=dtype, density=0.5, block=(4, 8))
    else:
        layer = SparseLinear(19, 21, dtype=dtype, density=0.5, block=(8, 8), reserve=0.8)
    weight_norm(layer, dim, **options)
    with torch.no_grad():
        g = layer.weight_norm.g
        g.mul_((torch.rand_like(g) + 0.5) * torch.where(torch.rand_like(g) < 0.3, -1, 1))
    return layer


def input_of(layer: SparseLayer) -> Tensor:
    shape = (3, layer.weight_shape[1]) if isinstance(layer, SparseLinear) else (3, layer.weight_shape[1], 6, 7)
    return torch.randn(shape, dtype=layer.values.dtype)


def effective(layer: SparseLayer) -> Tensor:
    """The dense weight that the layer computes with, unpacked by the oracle."""
    return unpack_blocks(layer.effective_values().detach(), layer.slot_blocks, layer.weight_shape)


def dense_twin(layer: SparseLayer, style: str) -> nn.Module:
    """torch's own weight norm, or the formula, on the masked dense v, with the same g."""
    norm, layer.weight_norm = layer.weight_norm, None
    dense = ATTACH[style](layer.to_dense(), dim=norm.dim)
    layer.weight_norm = norm
    parts(dense)[0].data.copy_(norm.g.data)
    return dense


def parts(dense: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """g and v of torch's weight norm."""
    if hasattr(dense, "weight_g"):
        return dense.weight_g, dense.weight_v
    return dense.parametrizations.weight.original0, dense.parametrizations.weight.original1


def flipped(layer: SparseLayer, count: int, grow: int = 0) -> Tensor:
    """Another mask: ``count`` blocks leave, ``count + grow`` come."""
    flat = layer.block_mask.flatten().clone()
    on, off = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
    flat[on[torch.randperm(on.numel())[:count]]] = False
    flat[off[torch.randperm(off.numel())[: count + grow]]] = True
    return flat.view(layer.mask_shape)


# --- the formula and its derivatives ---------------------------------------------------------------------------------


def derivatives(
    module: nn.Module, g: Tensor, v: Tensor, active: Tensor, x: Tensor, all_penalised: bool
) -> dict[str, Tensor]:
    """Output, gradients, and those of a penalty on the input's gradient, or on all; of v where it is active."""
    x = x.clone().requires_grad_()
    y = module(x)
    of_g, of_v, of_x, of_bias = torch.autograd.grad(y.square().sum() / 4, [g, v, x, module.bias], create_graph=True)
    penalty = of_x.square().sum()
    if all_penalised:
        penalty = penalty + of_g.square().sum() + (of_v * active).square().sum()
    second = dict(zip(("g twice", "v twice", "x twice"), torch.autograd.grad(penalty, [g, v, x]), strict=True))
    found = {"y": y, "g": of_g, "v": of_v * active, "x": of_x, "bias": of_bias, **second}
    found["v twice"] = found["v twice"] * active
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("style", ATTACH)
@dims
@kinds
def test_equals_torch_on_the_masked_weight_twice_differentiated(
    kind: str, dim: int | None, style: str, backend: str
) -> None:
    for dtype, tolerance in TOLERANCES:
        layer = make(kind, dim, dtype)
        layer.backend = backend
        dense, x, everything = dense_twin(layer, style), input_of(layer), style == "formula"
        active = active_entries(layer.slot_blocks, layer.weight_shape, layer.block)
        assert layer.weight_norm.g.shape == parts(dense)[0].shape
        mine = derivatives(layer, layer.weight_norm.g, layer.values, torch.ones(()), x, everything)
        theirs = derivatives(dense, *parts(dense), active, x, everything)
        for name in ("v", "v twice"):
            mine[name] = unpack_blocks(mine[name], layer.slot_blocks, layer.weight_shape)
        for name, want in theirs.items():
            largest, error = float(want.abs().max()), float((mine[name] - want).abs().max())
            assert largest > 1e-3
            assert error <= tolerance * max(1.0, largest), (name, error, largest)


@dims
@kinds
def test_gradcheck_twice(kind: str, dim: int | None) -> None:
    layer = make(kind, dim)

    def computed(values: Tensor, g: Tensor) -> Tensor:
        parameters = {"values": values, "weight_norm.g": g}
        return torch.func.functional_call(layer, parameters, (torch.eye(layer.weight_shape[1], dtype=torch.float64),))

    if isinstance(layer, SparseConv2d):
        x = input_of(layer)[:1]

        def computed(values: Tensor, g: Tensor) -> Tensor:
            return torch.func.functional_call(layer, {"values": values, "weight_norm.g": g}, (x,))

    inputs = [t.detach().clone().requires_grad_() for t in (layer.values, layer.weight_norm.g)]
    with torch.no_grad():
        inputs[0][layer.slot_blocks < 0] = 0
    assert torch.autograd.gradcheck(computed, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(computed, inputs, fast_mode=True)


@dims
@kinds
def test_parts_of_edge_blocks_outside_the_weight_count_for_nothing(kind: str, dim: int | None) -> None:
    layer = make(kind, dim)
    want, x = effective(layer), input_of(layer)
    inside = pack_blocks(torch.ones(layer.weight_shape, dtype=torch.float64), layer.slot_blocks, layer.block) > 0
    y = layer(x)
    with torch.no_grad():
        layer.values[~inside & (layer.slot_blocks >= 0)[:, None, None]] = 3.0
    torch.testing.assert_close(effective(layer), want, rtol=1e-14, atol=0)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@dims
def test_16_bit_values_are_normed_in_float32(dim: int | None, dtype: torch.dtype) -> None:
    layer = make("uneven conv", dim, torch.float32).to(dtype)
    wide = copy.deepcopy(layer).float()
    assert layer.effective_values().dtype == dtype
    torch.testing.assert_close(layer.effective_values(), wide.effective_values().to(dtype), rtol=0, atol=0)
    before = effective(layer)
    layer.set_block_mask(flipped(layer, 2))
    kept = (effective(layer) != 0).to(dtype)
    torch.testing.assert_close(effective(layer), before * kept, rtol=2e-2, atol=1e-3)
    layer = make("uneven conv", dim, torch.float32).to(dtype)
    layer.values.data.mul_(300)  # whose squares leave float16's range
    torch.testing.assert_close(layer.effective_values(), wide.effective_values().to(dtype), rtol=2e-2, atol=1e-3)


def test_forward_mode_derivatives() -> None:
    layer = make("uneven linear")
    tangent = torch.randn_like(layer.values)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(layer.values.detach(), tangent)
        out = torch.func.functional_call(layer.weight_norm, {}, (_Like(layer, dual),))
        moved = torch.autograd.forward_ad.unpack_dual(out).tangent
    upstream = torch.randn_like(moved)
    (back,) = torch.autograd.grad(layer.effective_values(), layer.values, upstream)
    torch.testing.assert_close((moved * upstream).sum(), (back * tangent).sum())


class _Like:
    """A layer with other values."""

    def __init__(self, layer: SparseLayer, values: Tensor) -> None:
        self._layer, self.values = layer, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


# --- rows of zeros ---------------------------------------------------------------------------------------------------


def without_first_row(layer: SparseLayer) -> Tensor:
    mask = layer.block_mask.clone()
    mask[0] = False
    return mask


@pytest.mark.parametrize("backend", BACKENDS)
@dims
@kinds
def test_rows_of_zeros_and_free_slots_are_finite_everywhere(kind: str, dim: int | None, backend: str) -> None:
    layer = make(kind, dim)
    layer.backend = backend
    layer.set_block_mask(without_first_row(layer))
    with torch.no_grad():
        layer.values[layer.slot_blocks == layer.slot_blocks.max()] = 0.0  # active, and zero
        if dim is None:
            layer.values.zero_()
    x = input_of(layer).requires_grad_()
    layer.weight_norm.g.data.fill_(0.7)
    y = layer(x)
    assert torch.equal(y[:, 0], layer.bias[0].expand_as(y[:, 0]))
    first = torch.autograd.grad(y.square().mean(), [*layer.parameters(), x], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [*layer.parameters(), x])
    for found in (*first, *second):
        assert found.isfinite().all()
    free = layer.slot_blocks < 0
    if layer.reserve:
        assert free.any()
    for found in (layer.effective_values(), first[0], second[0]):
        assert not found[free].any()
    if dim is None:  # nothing left: v gets the gradient of the weight, g none
        assert first[0].any()
        assert not first[-2].any()


@dims
def test_a_row_that_lost_its_blocks_learns_again(dim: int | None) -> None:
    layer = make("linear", dim)
    x, target = torch.randn(40, 32, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    full = layer.block_mask
    mask = torch.zeros_like(full) if dim is None else without_first_row(layer)
    layer.set_block_mask(mask)
    lost = ... if dim is None else slice(0, 4)
    assert not layer.weight_norm.g[lost].any()
    before = layer(x)
    layer.set_block_mask(full)
    assert torch.equal(layer(x), before)
    assert not layer.weight_norm.g[lost].any()

    def loss() -> Tensor:
        return (layer(x)[:, :4] - target[:, :4]).square().mean()

    start = loss()
    sgd = torch.optim.SGD([layer.values, layer.weight_norm.g], 0.1)
    for _ in range(60):
        sgd.zero_grad()
        loss().backward()
        sgd.step()
    assert effective(layer)[:4].norm(dim=1).min() > 0.01
    assert loss() < start - 0.05
    assert effective(layer).isfinite().all()


# --- changes of the mask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, grow", [(0, 2), (2, -2), (3, 0), (1, 6), (6, -6)])
@dims
@kinds
def test_what_stays_keeps_its_weight_when_blocks_leave_and_come(
    kind: str, dim: int | None, count: int, grow: int
) -> None:
    layer = make(kind, dim)
    g, before, slots = layer.weight_norm.g, effective(layer), layer.slot_blocks.clone()
    held, address, x = g.detach().clone(), g.data_ptr(), input_of(layer)
    y, old = layer(x), layer.block_mask
    layer.set_block_mask(flipped(layer, min(count, layer.nnz - 1), grow if count else min(grow, 2)))
    kept = set(block_map(layer)) & {int(rank) for rank in slots}
    still = torch.tensor([rank in kept for rank in range(layer.num_blocks)]).nonzero()[:, 0].int()
    after = effective(layer)
    want = before * active_entries(still, layer.weight_shape, layer.block)
    torch.testing.assert_close(after, want, rtol=1e-12, atol=1e-14)
    if not (old & ~layer.block_mask).any():
        assert torch.equal(layer(x), y)
    assert layer.weight_norm.g is g
    assert g.data_ptr() == address
    # Where no block was dropped g has every bit.
    if dim == 0:
        dropped = (old & ~layer.block_mask).flatten(1).any(1).repeat_interleave(layer.block[0])[: g.shape[0]]
        assert torch.equal(g.flatten()[~dropped], held.flatten()[~dropped])
        assert dropped.any() == (count > 0)
        assert (g.flatten()[dropped] != held.flatten()[dropped]).all()


@dims
def test_an_exchange_of_sparse_training_keeps_what_stays(dim: int | None) -> None:
    model = classifier()
    for layer in sparse_layers(model).values():
        weight_norm(layer, dim)
    adam = torch.optim.Adam(model.parameters(), 0.01)
    training = SparseTraining(model, adam, method="rigl", total_steps=20, interval=4)
    moved = 0
    for step in range(12):
        train_step(model, adam, step)
        before = {name: (effective(layer), layer.slot_blocks.clone()) for name, layer in sparse_layers(model).items()}
        moments = {name: adam.state[x.weight_norm.g]["exp_avg"].clone() for name, x in sparse_layers(model).items()}
        report = training.step()
        moved += report is not None and sum(report.dropped.values())
        for name, layer in sparse_layers(model).items():
            kept = torch.tensor([r for r in layer.slot_blocks.tolist() if r in before[name][1].tolist()])
            want = before[name][0] * active_entries(kept.int(), layer.weight_shape, layer.block)
            torch.testing.assert_close(effective(layer), want, rtol=1e-5, atol=1e-6)
            assert torch.equal(adam.state[layer.weight_norm.g]["exp_avg"], moments[name])
    assert moved > 5


def test_what_is_dropped_is_smallest_in_the_weight_computed_with() -> None:
    layer = make("conv")
    assert torch.allclose(layer.block_norms(), block_norms(effective(layer), layer.block))
    with torch.no_grad():
        layer.values.mul_(100)
    assert torch.allclose(layer.block_norms(), block_norms(effective(layer), layer.block))


def test_a_change_that_is_undone_gives_g_back() -> None:
    layer = make("uneven conv")
    average = copy.deepcopy(layer)
    ddst.follow(average, layer)
    before = [(x.weight_norm.g.clone(), x.values.clone(), x.slot_blocks.clone()) for x in (layer, average)]
    change = LayerChange(layer, flipped(layer, 4))
    change.commit()
    assert not torch.equal(layer.weight_norm.g, before[0][0])
    change.undo()
    after = [(x.weight_norm.g, x.values, x.slot_blocks) for x in (layer, average)]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# --- averages, copies and states -------------------------------------------------------------------------------------


@dims
def test_a_follower_keeps_its_own_weights_that_stay(dim: int | None) -> None:
    layer = make("uneven conv", dim)
    average = copy.deepcopy(layer)
    ddst.follow(average, layer)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    before = effective(average)
    layer.set_block_mask(flipped(layer, 5))
    assert torch.equal(average.slot_blocks, layer.slot_blocks)
    want = before * (effective(layer) != 0)
    torch.testing.assert_close(effective(average), want, rtol=1e-12, atol=1e-14)
    assert not torch.equal(average.weight_norm.g, layer.weight_norm.g)


def test_an_average_of_the_model_is_kept_over_exchanges() -> None:
    model = nn.Sequential(make("conv"), make("conv", None))
    model[1] = weight_norm(SparseConv2d(24, 16, 1, block=8, density=0.5, dtype=torch.float64))
    ema = ddst.EMA(model, decay=0.5)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("g")}
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        ema.update()
        for name, parameter in model.named_parameters():
            if name in wanted:
                wanted[name].lerp_(parameter.detach(), 0.5)
                torch.testing.assert_close(dict(ema.module.named_parameters())[name].data, wanted[name])
        wanted = {name: value.clone() for name, value in wanted.items()}
    before = [effective(layer) for layer in ema.module]
    for layer in model:
        layer.set_block_mask(flipped(layer, 2))
    for layer, old, source in zip(ema.module, before, model, strict=True):
        torch.testing.assert_close(effective(layer), old * (effective(source) != 0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("style", STYLES)
@dims
def test_copies_pickles_and_states_hold_it(style: str, dim: int | None) -> None:
    layer = make("uneven conv", dim, style=style)
    x = input_of(layer)
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = make("uneven conv", dim, style=style)
    other.set_block_mask(flipped(other, 3, 2))
    other.weight_norm.g.data.fill_(9.0)
    other.load_state_dict(layer.state_dict(), strict=True)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), other]
    for twin in twins:
        assert torch.equal(twin(x), y)
        assert (twin.weight_norm.dim, twin.weight_norm.style) == (dim, style)
        twin.weight_norm.g.data.mul_(2)
    assert torch.equal(layer(x), y)
    assert list(layer.state_dict()) == ["values", "bias", "slot_blocks", "weight_norm.g"]
    if style == "hook":
        for twin in twins:
            assert torch_remove_weight_norm(twin).weight_norm is None


@torch._dynamo.config.patch(error_on_recompile=False)
@pytest.mark.parametrize("style", STYLES)
@dims
def test_compiles_whole_and_once(style: str, dim: int | None) -> None:
    layer = make("uneven conv", dim, style=style)
    x = input_of(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for turn in range(3):
        torch._dynamo.config.error_on_recompile = turn > 0
        want = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        y = compiled(x)
        found = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        torch.testing.assert_close((y, *found), (layer(x), *want), rtol=1e-12, atol=1e-12)
        layer.set_block_mask(flipped(layer, 3))


def test_moves_with_its_layer() -> None:
    layer = make("conv").to("meta")
    assert layer.weight_norm.g.is_meta
    assert layer(torch.empty(1, 16, 5, 5, device="meta", dtype=torch.float64)).shape == (1, 24, 5, 5)
    assert make("conv").float().weight_norm.g.dtype == torch.float32
    empty = weight_norm(SparseLinear(32, 32, device="meta")).to_empty(device="cpu")
    empty.reset_parameters()
    torch.testing.assert_close(effective(empty), empty.dense_weight().detach())


# --- growth scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@dims
@kinds
def test_scores_are_of_the_weight_computed_with(kind: str, dim: int | None, backend: str) -> None:
    layer = make(kind, dim)
    layer.backend = backend
    dense = layer._plain_dense()
    dense.weight.data.copy_(effective(layer))
    x = input_of(layer)
    layer.request_scores()
    for module in (layer, dense):
        module(x).square().mean().backward()
    torch.testing.assert_close(layer.take_scores(), block_norms(dense.weight.grad, layer.block))


@pytest.mark.parametrize("backend", BACKENDS)
@dims
def test_a_step_is_scored_by_the_gradient_of_v(dim: int | None, backend: str) -> None:
    """At inactive blocks; the optimizer moves v, and clipping and second moments speak of its gradient."""
    for kind in KINDS:
        layer = make(kind, dim)
        layer.backend = backend
        dense, x = dense_twin(layer, "parametrization"), input_of(layer)
        dense(x).square().mean().backward()
        sgd = torch.optim.SGD(layer.parameters(), 0.1)
        collector = ScoreCollector({"layer": layer}, sgd)
        collector.request()
        layer(x).square().mean().backward()
        sgd.step()
        off = ~layer.block_mask
        want = block_norms(parts(dense)[1].grad, layer.block)
        torch.testing.assert_close(collector.latest["layer"][off], want[off])


def test_scores_of_a_lost_row_are_those_of_the_weight() -> None:
    layer = make("linear")
    layer.set_block_mask(without_first_row(layer))
    sgd = torch.optim.SGD(layer.parameters(), 0.1)
    collector = ScoreCollector({"layer": layer}, sgd)
    collector.request()
    x = input_of(layer)
    layer(x).sum().backward()
    sgd.step()
    assert (collector.latest["layer"][0] > 0).all()


# --- attaching and removing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@dims
@kinds
def test_attaching_and_removing_leave_the_weight(kind: str, dim: int | None, style: str) -> None:
    layer = make(kind, dim, style=style)
    x, names = input_of(layer), {"values", "bias"}
    y, values = layer(x).detach(), layer.values
    layer(x).sum().backward()
    assert remove_weight_norm(layer) is layer
    torch.testing.assert_close(layer(x).detach(), y, rtol=1e-14, atol=1e-14)
    assert layer.values is values
    assert values.grad is None
    assert {name for name, _ in layer.named_parameters()} == names
    assert not layer._forward_pre_hooks
    plain = layer(x)
    torch.testing.assert_close(weight_norm(layer, dim, style)(x), plain, rtol=1e-14, atol=1e-14)
    assert {name for name, _ in layer.named_parameters()} == {*names, "weight_norm.g"}
    with pytest.raises(ValueError, match="has a weight norm already"):
        weight_norm(layer)
    with pytest.raises(ValueError, match="has a weight norm already"):
        spectral_norm(layer)


def test_torchs_own_function_removes_it_from_a_layer_of_style_hook() -> None:
    model = nn.Sequential(make("conv", style="hook"), make("conv", None, style="hook"))[:1]
    calls = []
    model[0].register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 16, 5, 5, dtype=torch.float64)
    y = model(x)
    assert torch_remove_weight_norm(model[0]) is model[0]
    torch.testing.assert_close(model(x), y, rtol=1e-14, atol=1e-14)
    assert model[0].norm is None
    assert len(calls) == 2
    with pytest.raises(ValueError, match="not found"):
        torch_remove_weight_norm(model[0])


def test_a_snapshot_can_lose_its_norm_after_blocks_of_the_model_have_moved() -> None:
    layer = make("conv")
    snapshot, x = copy.deepcopy(layer), input_of(layer)
    y = snapshot(x)
    layer.set_block_mask(flipped(layer, 4))
    remove_weight_norm(snapshot)
    torch.testing.assert_close(snapshot(x), y, rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    layer = SparseLinear(32, 32)
    with pytest.raises(ValueError, match="no weight norm"):
        remove_weight_norm(layer)
    for dim in (1, 2, "0", 0.0, True):
        with pytest.raises(ValueError, match="dim must be 0"):
            weight_norm(layer, dim)  # type: ignore[arg-type]
    assert weight_norm(SparseLinear(32, 32), -1).weight_norm.dim is None  # torch's other name
    with pytest.raises(ValueError, match="style"):
        weight_norm(layer, style="old")
    for function in (weight_norm, remove_weight_norm):
        with pytest.raises(TypeError, match="layer must be"):
            function(nn.Linear(4, 4))
    assert layer.norm is None
    with pytest.raises(ValueError, match="has a spectral norm already"):
        weight_norm(spectral_norm(layer))


@dims
def test_the_weight_reads_and_is_initialised_as_that_of_the_layer(dim: int | None) -> None:
    layer = make("uneven conv", dim)
    torch.testing.assert_close(layer.weight.detach().as_subclass(Tensor), effective(layer))
    (of_g,) = torch.autograd.grad(layer.weight.sum(), layer.weight_norm.g)
    assert of_g.any()
    nn.init.constant_(layer.weight, 0.3)
    torch.testing.assert_close(effective(layer), 0.3 * (effective(layer) != 0).double())
    layer.weight_norm.g.data.fill_(5.0)
    layer.reset_parameters()
    torch.testing.assert_close(effective(layer), layer.dense_weight().detach())


def test_trains_like_torch_under_a_static_mask() -> None:
    layer = make("uneven linear")
    dense = dense_twin(layer, "hook")
    active = active_entries(layer.slot_blocks, layer.weight_shape, layer.block)
    optimizers = [torch.optim.Adam(module.parameters(), 0.01) for module in (layer, dense)]
    for _ in range(10):
        x = input_of(layer)
        for module, optimizer in zip((layer, dense), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            if module is dense:
                dense.weight_v.grad.mul_(active)
            optimizer.step()
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-10, atol=1e-11)
