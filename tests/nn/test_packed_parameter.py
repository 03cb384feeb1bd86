"""A module of somebody else whose weight is packed in place: it stays the module that its users know."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ddst
from ddst import topology as tp
from ddst.nn import set_backend
from helpers.dense import active_entries
from helpers.own_modules import EqualConv, EqualLinear, EqualNet, Holding, packed_of


def network(seed: int = 0) -> EqualNet:
    torch.manual_seed(seed)
    net = EqualNet()
    ddst.sparsify(net, 0.4, distribution="uniform")
    return net


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def active(module: nn.Module) -> Tensor:
    """bool, of the weight's shape."""
    packed = packed_of(module)
    return active_entries(packed.slot_blocks, packed.weight_shape, packed.block)


def move_blocks(net: nn.Module) -> None:
    """Other blocks, as many as before."""
    for layer in ddst.nn.sparse_layers(net).values():
        order = torch.randperm(layer.num_blocks)
        layer.set_block_mask((order < layer.nnz).view(layer.mask_shape))


def by_pickle(net: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(net))


def by_torch_save(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
def test_a_copy_is_of_the_same_class_and_has_blocks_of_its_own(copied: Callable[[nn.Module], Any]) -> None:
    net, x = network(), images()
    expected = net(x)
    other = copied(net)
    assert type(other.second) is type(net.second) and isinstance(other.second, EqualConv)
    assert type(other.second).__name__ == "EqualConv" and other.second.scale == net.second.scale
    assert torch.equal(other(x), expected)
    other.second.weight = nn.Parameter(torch.zeros(32, 32, 3, 3))
    move_blocks(other)
    assert torch.equal(net(x), expected)


def test_state_dicts_go_both_ways_strictly() -> None:
    net, x = network(), images()
    other = network(1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert torch.equal(packed_of(other.second).block_mask, packed_of(net.second).block_mask)

    dense = EqualNet()
    dense.load_state_dict(ddst.dense_state_dict(net))
    torch.testing.assert_close(dense(x), net(x))

    masks = packed_of(net.second).block_mask
    net.load_state_dict(EqualNet().state_dict() | {"second.weight": torch.ones(32, 32, 3, 3)})
    assert torch.equal(packed_of(net.second).block_mask, masks)
    assert torch.equal(net.second.weight.unpacked(), active(net.second).float())
    with pytest.raises(RuntimeError, match=r"Unexpected.*second\.weight"):
        net.load_state_dict(EqualNet().state_dict() | {"second.weight": torch.ones(32, 31, 3, 3)})


def test_densify_gives_the_module_back() -> None:
    net, x = network(), images()
    packed_of(net.third).values.requires_grad_(False)
    expected, others = net(x), [net.second.bias, net.mapping.bias]
    weight = net.second.weight.unpacked().detach()
    ddst.densify(net)
    assert [type(m) for m in net.children()] == [EqualConv] * 3 + [EqualLinear, nn.Linear]
    assert [net.second.bias, net.mapping.bias] == others
    assert [m.weight.requires_grad for m in (net.first, net.second, net.third)] == [True, True, False]
    assert {n for n, _ in net.named_parameters()} == {n for n, _ in EqualNet().named_parameters()}
    assert vars(net.second).keys() == vars(EqualConv(3, 3)).keys() and type(net.second._parameters) is dict
    assert torch.equal(net.second.weight, weight) and isinstance(net.second.weight, nn.Parameter)
    torch.testing.assert_close(net(x), expected)


def test_a_weight_with_a_leading_one_loads_and_comes_back() -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 32, 32, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight[0] * 0.1, padding=1)

    model, dense, x = Holding(Modulated()), Holding(Modulated()), torch.randn(2, 32, 4, 4)
    ddst.sparsify(model, 0.5, distribution="uniform")
    model.load_state_dict(dense.state_dict())
    dense.load_state_dict(ddst.dense_state_dict(model))
    torch.testing.assert_close(model(x), dense(x))
    assert ddst.densify(model).inner.weight.shape == (1, 32, 32, 3, 3)


# --- what people do to a weight ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["parameter", "data", "packed", "tensor"])
def test_assigning_a_weight_sets_active_blocks(how: str) -> None:
    net = network()
    packed, new = packed_of(net.second), torch.randn(32, 32, 3, 3)
    kept = packed.values
    if how == "data":
        net.second.weight.data = new
    elif how == "packed":
        other = network(1)
        other.load_state_dict(net.state_dict())
        other.second.weight.data = new
        net.second.weight = other.second.weight
    else:
        net.second.weight = nn.Parameter(new, requires_grad=False) if how == "parameter" else new
    expected = torch.where(active(net.second), new, 0)
    assert torch.equal(net.second.weight.unpacked(), expected)
    assert packed.values is kept and packed.values.requires_grad == (how != "parameter")


def test_what_cannot_be_assigned_or_deleted_says_so_and_changes_nothing() -> None:
    net = network()
    before = net.second.weight.unpacked()
    for value in (nn.Parameter(torch.ones(1)), torch.ones(32, 32, 1, 1), torch.ones(3, 32, 32, 3, 3)):
        with pytest.raises(ValueError, match=r"shape \(32, 32, 3, 3\) cannot take one of"):
            net.second.weight = value
        with pytest.raises(ValueError, match="cannot take one of"):
            net.second.weight.data = value
    for wrong in (None, 1.0):
        with pytest.raises(TypeError, match="weight is packed: it can be assigned a tensor"):
            net.second.weight = wrong
    with pytest.raises(AttributeError, match=r"weight is packed.*ddst\.densify"):
        del net.second.weight
    with pytest.raises(RuntimeError, match="weight is packed"):
        net.second.register_parameter("weight", nn.Parameter(before))
    assert torch.equal(net.second.weight.unpacked(), before)


def test_weights_init_by_class_and_by_name() -> None:
    """As DCGAN's, with numbers that a dense module draws."""

    def initialise(module: nn.Module) -> None:
        if isinstance(module, EqualConv | EqualLinear):
            nn.init.orthogonal_(module.weight, 2.0)
        if "Equal" in type(module).__name__ and hasattr(module, "weight"):
            module.weight.data.mul_(3.0)
            nn.init.zeros_(module.bias)

    net, dense = network(), EqualNet()
    for model in (net, dense):
        torch.manual_seed(3)
        model.apply(initialise)
    for name in ("second", "third", "mapping"):
        module, expected = getattr(net, name), getattr(dense, name).weight.detach()
        assert torch.equal(module.weight.unpacked(), torch.where(active(module), expected, 0))
        assert not module.bias.any()


def test_what_the_module_says_of_its_parameters() -> None:
    net = network()
    assert hasattr(net.second, "weight") and not hasattr(net.second, "weights")
    assert [n for n, _ in net.second.named_parameters()] == ["bias", "packed_weight.values"]
    assert "(packed_weight): PackedParameter((32, 32, 3, 3), density=0.389" in repr(net)
    assert net.second.weight.requires_grad and net.second.weight.grad is None
    net.requires_grad_(False)
    assert not net.second.weight.requires_grad
    net.second.weight.requires_grad = True
    assert packed_of(net.second).values.requires_grad
    net.second.weight.requires_grad_(False)
    assert not packed_of(net.second).values.requires_grad
    net.eval()
    assert not packed_of(net.second).training


def test_dtypes_and_the_meta_device() -> None:
    net, x = network(), images()
    expected = net(x)
    for dtype in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(net).to(dtype)
        assert other.second.weight.dtype == dtype
        torch.testing.assert_close(other(x.to(dtype)).float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(copy.deepcopy(net).double()(x.double()).float(), expected)
    meta = copy.deepcopy(net).to("meta")
    assert meta(x.to("meta")).shape == expected.shape and meta.second.weight.is_meta


def test_a_module_that_makes_another_of_its_class_makes_a_plain_one() -> None:
    net = network()
    other = type(net.second)(16, 16)
    assert type(other) is EqualConv and isinstance(other.weight, nn.Parameter)


def test_a_register_of_subclasses_keeps_the_class() -> None:
    register: dict[str, type] = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            register[cls.__name__] = cls

    class Convolution(Registered, EqualConv):
        pass

    model = Holding(Convolution(32, 32))
    ddst.sparsify(model, 0.5, distribution="uniform")
    assert packed_of(model.inner).nnz and register == {"Convolution": Convolution}


def test_hooks_stay_and_can_be_removed() -> None:
    model, seen, x = Holding(EqualConv(32, 32)), [], torch.randn(1, 32, 4, 4, requires_grad=True)
    handles = [
        model.inner.register_forward_pre_hook(lambda *_: seen.append("before")),
        model.inner.register_forward_hook(lambda *_: seen.append("after")),
        model.inner.register_full_backward_hook(lambda *_: seen.append("gradient")),
    ]
    ddst.sparsify(model, 0.5, distribution="uniform")
    model(x).sum().backward()
    assert seen == ["before", "after", "gradient"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert len(seen) == 3


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_accumulated_gradients(reentrant: bool) -> None:
    net, x = network(), images(4)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    net.zero_grad()
    for half in x.clone().requires_grad_().split(2):
        checkpoint(net, half, use_reentrant=reentrant).square().sum().backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scores_are_the_dense_ones_but_for_the_factor(backend: str) -> None:
    """Of the weight that the operator sees, accumulated as ``.grad`` is."""
    net = network()
    set_backend(net, backend)
    dense = ddst.densify(copy.deepcopy(net))
    modules = [(getattr(net, name), getattr(dense, name)) for name in ("second", "third", "mapping")]
    for module, _ in modules:
        packed_of(module).request_scores()
    for x in images(4).split(2):
        net(x).square().sum().backward()
        dense(x).square().sum().backward()
    for module, plain in modules:
        expected = torch.linalg.vector_norm(tp.as_blocks(plain.weight.grad, (16, 16)), dim=(-2, -1))
        torch.testing.assert_close(packed_of(module).take_scores() * module.scale, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_blocks_move_and_averages_follow(method: str) -> None:
    net, x = network(), images(4)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    training = ddst.SparseTraining(net, optimizer, method=method, total_steps=30, interval=3)
    average = ddst.EMA(net, 0.9)
    theirs = torch.optim.swa_utils.AveragedModel(net, avg_fn=lambda old, new, _: 0.9 * old + 0.1 * new)
    theirs.update_parameters(net)  # the first one copies
    ddst.follow(theirs, net)
    before = packed_of(net.third).block_mask
    for _ in range(12):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()
        training.step()
        average.update()
        theirs.update_parameters(net)
    assert not torch.equal(packed_of(net.third).block_mask, before)
    torch.testing.assert_close(ddst.densify(copy.deepcopy(net))(x), net(x))
    for other in (average.module, theirs.module):
        assert torch.equal(packed_of(other.third).slot_blocks, packed_of(net.third).slot_blocks)
    torch.testing.assert_close(theirs(x), average.module(x))


def test_ddst_moves_blocks_and_changes_the_discriminators_density() -> None:
    torch.manual_seed(0)
    g = nn.Sequential(EqualLinear(16, 64), nn.ReLU(), EqualLinear(64, 64))
    d = nn.Sequential(EqualLinear(64, 128), nn.ReLU(), EqualLinear(128, 64), nn.ReLU(), nn.Linear(64, 1))
    for net in (g, d):
        ddst.sparsify(net, 0.3, block=4, distribution="uniform")
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 1e-3) for net in (g, d))
    scheduler = ddst.DDST(
        g, d, opt_g, opt_d, total_steps=40, interval_g=4, interval_d=4, br_every=1, br_window=4, bounds=(0.9, 0.95)
    )
    mask, density = packed_of(g[2]).block_mask, packed_of(d[2]).density
    for _ in range(10):
        real, noise = torch.randn(8, 64), torch.randn(8, 16)
        opt_d.zero_grad()
        (F.relu(1 - d(real)).mean() + F.relu(1 + d(g(noise).detach())).mean()).backward()
        opt_d.step()
        opt_g.zero_grad()
        fake = d(g(noise))
        (-fake.mean()).backward()
        opt_g.step()
        scheduler.step(real=real, noise=noise, fake_scores=fake)
    assert not torch.equal(packed_of(g[2]).block_mask, mask) and packed_of(d[2]).density != density
    for net, x in ((g, torch.randn(3, 16)), (d, torch.randn(3, 64))):
        torch.testing.assert_close(ddst.densify(copy.deepcopy(net))(x), net(x))


# --- tools of torch ---------------------------------------------------------------------------------------------------


def test_operations_are_counted_as_active_ones() -> None:
    def operations(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 32, 8, 8)).sum().backward()
        return counter.get_total_flops()

    model = Holding(EqualConv(32, 32))
    dense = operations(model)
    ddst.sparsify(model, 0.25, distribution="uniform")
    assert operations(model) == dense / 4


def test_compiled_whole_it_is_not_compiled_anew_when_blocks_move() -> None:
    net, x, seen = network(), images(), []

    def compiler(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=compiler, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), net(x))
        move_blocks(net)
    assert len(seen) == 1
    torch._dynamo.reset()


def test_compiled_and_exported_it_has_the_same_gradients_and_outputs() -> None:
    net, x = network(), images()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    for model in (net, compiled):
        model(x).square().sum().backward()
    for parameter, other in zip(net.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    torch.testing.assert_close(exported.module()(images(5)), net(images(5)))
    torch._dynamo.reset()


def test_torch_fx_takes_it_for_a_leaf() -> None:
    net, x = network(), images()
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        *("second", "third", "mapping", "last")
    ]
    move_blocks(net)
    assert torch.equal(traced(x), net(x))
    with pytest.raises(TypeError, match=r"cannot hold a packed weight.*is a leaf where it is called"):
        torch.fx.symbolic_trace(net.second)


def test_explain_refuses_what_has_no_forward_pass() -> None:
    net, x = network(), torch.randn(1, 32, 8, 8)
    with pytest.raises(TypeError, match="with a forward pass, got a PackedParameter"):
        ddst.explain(packed_of(net.second), x)
    with pytest.raises(TypeError, match="must be a block-sparse layer, got EqualConv"):
        ddst.explain(net.second, x)  # type: ignore[arg-type]


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "norm", [nn.utils.spectral_norm, nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_hooks_that_take_a_parameter_away_are_refused_afterwards(norm: Callable[[nn.Module], Any]) -> None:
    net, x = network(), images()
    expected, attributes = net(x), vars(net.second).keys()
    with pytest.raises(RuntimeError, match=r"weight is packed by ddst\.sparsify.*apply or remove norms.*before"):
        norm(net.second)
    assert torch.equal(net(x), expected)
    assert vars(net.second).keys() == attributes and not net.second._forward_pre_hooks


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrizations_are_refused_by_torch_afterwards(norm: Callable[[nn.Module], Any]) -> None:
    net, x = network(), images()
    expected = net(x)
    with pytest.raises(ValueError, match="with name 'weight'"):
        norm(net.second)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("norm", [ddst.nn.spectral_norm, ddst.nn.weight_norm])
def test_ddsts_own_norms_are_refused_where_they_would_be_ignored(norm: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="got PackedParameter"):
        norm(packed_of(network().second))


NORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "spectral hook": (nn.utils.spectral_norm, "weight_orig"),
    "weight hook": (nn.utils.weight_norm, "weight_v"),
    "spectral parametrization": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "weight parametrization": (parametrizations.weight_norm, "parametrizations.weight.original1"),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_norms_that_were_there_before_compute_on_blocks(name: str) -> None:
    """What the dense module with the masked weight does, iteration by iteration."""
    norm, attribute = NORMS[name]
    torch.manual_seed(0)
    model, x = Holding(norm(EqualConv(32, 32))), torch.randn(2, 32, 6, 6)
    model(x)
    report = ddst.sparsify(model, 0.5, distribution="uniform", sample=x)
    (row,) = report.layers
    assert (row.name, row.reason, row.note) == (f"inner.{attribute}", None, "")
    above, _, last = attribute.rpartition(".")
    packed = packed_of(model.inner.get_submodule(above), last)
    dense = Holding(norm(EqualConv(32, 32)))
    dense.load_state_dict(ddst.dense_state_dict(model))
    dense.inner.load_state_dict(model.inner.state_dict(), strict=False)  # vectors of the power iteration
    for _ in range(3):
        y, z = model(x), dense(x)
        torch.testing.assert_close(y, z)
        y.square().sum().backward()
        z.square().sum().backward()
    assert "conv" in packed.weight_uses.packed and not packed.weight_uses.dense
    gradient = dense.inner.get_parameter(attribute).grad
    assert packed.values.grad is not None and gradient is not None
    expected = tp.pack_slots(gradient, packed.slot_blocks, packed.block)
    torch.testing.assert_close(packed.values.grad, expected, rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.eval()(x), model.eval()(x))
    torch.testing.assert_close(ddst.densify(copied)(x), model(x))
    assert set(copied.state_dict()) == set(dense.state_dict())


@pytest.mark.parametrize("name", ["weight hook", "weight parametrization"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_rows_without_blocks_under_weight_norm_come_back_as_zeros(name: str) -> None:
    """Where torch would divide by their length 0."""
    norm, _ = NORMS[name]
    model, x = Holding(norm(EqualConv(32, 32))), torch.randn(2, 32, 6, 6)
    ddst.sparsify(model, 0.02, distribution="uniform", sample=x)
    expected, dense = model(x), Holding(norm(EqualConv(32, 32)))
    dense.load_state_dict(ddst.dense_state_dict(model))
    torch.testing.assert_close(dense(x), expected)
    torch.testing.assert_close(ddst.densify(model)(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_norms_are_removed_after_densify_only() -> None:
    for norm, remove in (
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    ):
        model, x = Holding(norm(EqualConv(32, 32))).eval(), torch.randn(2, 32, 6, 6)
        ddst.sparsify(model, 0.5, distribution="uniform", sample=x)
        expected = model(x)
        with pytest.raises(AttributeError, match=r"weight is packed.*call ddst\.densify first"):
            remove(model.inner)
        assert torch.equal(model(x), expected)
        ddst.densify(model)
        remove(model.inner)
        assert type(model.inner) is EqualConv and set(dict(model.inner.named_parameters())) == {"bias", "weight"}
        torch.testing.assert_close(model(x), expected)


def test_parametrizing_another_parameter_before_works_and_after_must_be_undone() -> None:
    model, x = Holding(EqualConv(32, 32)), torch.randn(2, 32, 6, 6)
    parametrizations.weight_norm(model.inner, "bias", dim=None)
    kind = type(model.inner)
    ddst.sparsify(model, 0.5, distribution="uniform", sample=x)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    ddst.densify(model)
    assert type(model.inner) is kind
    torch.testing.assert_close(model(x), expected)

    net = network()
    parametrizations.weight_norm(net.second, "bias", dim=None)
    expected = net(images())
    with pytest.raises(ValueError, match=r"ParametrizedEqualConv was made of a EqualConv after.*remove_param"):
        ddst.densify(net)
    assert torch.equal(net(images()), expected)
    parametrize.remove_parametrizations(net.second, "bias")
    assert type(ddst.densify(net).second) is EqualConv


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_sparse_layers_name_their_own_norms(norm: Callable[[nn.Module], Any]) -> None:
    layer = ddst.SparseLinear(32, 32)
    with pytest.raises(RuntimeError, match=r"weight is packed.*ddst\.nn\.spectral_norm"):
        norm(layer)
    with pytest.raises(KeyError, match="weights"):
        layer._parameters["weights"]
    assert set(layer._parameters) == {"values", "bias"} and not layer._forward_pre_hooks
