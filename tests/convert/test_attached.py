"""Which weights of other people's modules ``sparsify`` packs in place, and what it says of the others."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddst
from ddst import topology as tp
from ddst.convert.attached import LOOKED_UP, UNSEEN, UNUSED
from ddst.convert.watch import multiply_adds
from ddst.convert.weights import find_weights
from helpers.own_modules import EqualConv, EqualLinear, EqualNet, Holding, packed_of


def images() -> Tensor:
    return torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(1))


def reasons(report: ddst.SparsifyReport) -> dict[str, str | None]:
    return {row.name: row.reason for row in report.layers}


def notes(report: ddst.SparsifyReport) -> dict[str, str]:
    return {row.name: row.note for row in report.layers}


def packed_all(model: nn.Module, sample: Tensor | None = None, **arguments: Any) -> ddst.SparsifyReport:
    """With every block active, so that outputs stay what they were."""
    return ddst.sparsify(model, 1.0, distribution="uniform", sample=sample, **arguments)


class Halved(nn.Conv2d):
    """A layer with a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight * 0.5, self.bias, padding=1)


class Several(nn.Module):
    """Parameters of several names, of which one is looked up and one is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(32, 32, 3, 3))
        self.first = nn.Parameter(torch.randn(64, 32))
        self.weight = nn.Parameter(torch.randn(32, 64))
        self.table = nn.Parameter(torch.randn(64, 32))
        self.unused = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.filters * 0.1, padding=1).mean((2, 3))
        x = F.linear(F.relu(F.linear(x, self.first)), self.weight)
        return x + F.embedding(torch.tensor([1, 2]), self.table)


def patched_with_a_method() -> nn.Module:
    layer = nn.Conv2d(32, 32, 3, padding=1)
    layer.forward = types.MethodType(lambda self, x: F.conv2d(x, self.weight * 2, self.bias, padding=1), layer)  # type: ignore[method-assign]
    return layer


def patched_with_a_closure() -> nn.Module:
    layer = nn.Conv2d(32, 32, 3, padding=1)
    original = layer.forward
    layer.forward = lambda x: original(x) * 2  # type: ignore[method-assign]
    return layer


MODULES: dict[str, Callable[[], nn.Module]] = {
    "scaled": lambda: EqualConv(32, 32),
    "subclass": lambda: Halved(32, 32, 3),
    "method": patched_with_a_method,
    "closure": patched_with_a_closure,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("seen", [False, True])
def test_the_weight_is_packed_in_a_module_that_stays(name: str, seen: bool) -> None:
    model, x = Holding(MODULES[name]()), images()
    kept, kind, expected = model.inner, type(model.inner), model(x)
    report = packed_all(model, x if seen else None)
    assert [row.reason for row in report.layers] == [None] and report.density == 1.0
    assert model.inner is kept and isinstance(kept, kind) and packed_of(kept).nnz == 36
    torch.testing.assert_close(model(x), expected)
    assert packed_of(kept).weight_uses.packed == {"conv"} and not packed_of(kept).weight_uses.dense
    ddst.densify(model)
    assert model.inner is kept and type(kept) is kind
    torch.testing.assert_close(model(x), expected)


def test_a_weight_at_the_root_and_a_module_in_two_places() -> None:
    x, root = images(), EqualConv(32, 32)
    expected = root(x)
    assert reasons(packed_all(root)) == {"weight": None}
    torch.testing.assert_close(root(x), expected)
    assert type(ddst.densify(root)) is EqualConv

    shared = nn.Sequential(root, nn.ReLU(), root)
    expected = shared(x)
    assert reasons(packed_all(shared, x)) == {"0.weight": None}
    assert shared[0] is shared[2]
    torch.testing.assert_close(shared(x), expected)


def test_parameters_of_other_names_are_packed_if_a_sample_shows_their_use() -> None:
    model, x = Holding(Several()), images()
    assert reasons(packed_all(copy.deepcopy(model))) == {
        "inner.filters": UNSEEN,
        "inner.first": UNSEEN,
        "inner.weight": None,
        "inner.table": UNSEEN,
        "inner.unused": UNSEEN,
    }
    expected = model(x)
    report = packed_all(model, x)
    assert reasons(report) == {
        "inner.filters": None,
        "inner.first": None,
        "inner.weight": None,
        "inner.table": LOOKED_UP,
        "inner.unused": UNUSED,
    }
    work = {row.name: row.multiply_adds for row in report.layers}
    assert work["inner.table"] == work["inner.unused"] == 0
    assert sum(filter(None, work.values())) == 2 * (6 * 6 * 32 * 32 * 9 + 2 * 64 * 32)
    assert [row.name for row in report.layers if row.counted] == ["inner.filters", "inner.first", "inner.weight"]
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    ddst.densify(model)
    assert type(model.inner) is Several
    torch.testing.assert_close(model(x), expected)


def test_parameters_in_torchs_containers_are_packed_if_seen() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList([torch.randn(32, 32), torch.randn(32, 32), torch.randn(32)])
            self.heads = nn.ParameterDict({"weight": torch.randn(32, 32)})

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.layers[:2]:
                x = F.linear(x, weight) / 6
            return F.linear(x, self.heads["weight"], self.layers[2])

    model, x = Stacked(), torch.randn(4, 32)
    assert reasons(packed_all(copy.deepcopy(model))) == {"layers.0": UNSEEN, "layers.1": UNSEEN, "heads.weight": None}
    expected, state = model(x), model.state_dict()
    assert reasons(packed_all(model, x)) == {"layers.0": None, "layers.1": None, "heads.weight": None}
    torch.testing.assert_close(model(x), expected)
    model.load_state_dict(state)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    ddst.densify(model)
    assert type(model.layers) is nn.ParameterList and type(model.heads) is nn.ParameterDict
    assert torch.equal(model(x), expected) and len(model.layers) == 3 and "weight" in model.heads


def test_one_class_with_other_attributes_packed_in_each_module() -> None:
    class Gated(nn.Module):
        def __init__(self, gate: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))
            self.gate = nn.Parameter(torch.randn(32, 32)) if gate else None

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return y if self.gate is None else y * F.linear(x, self.gate)

    model, x = nn.Sequential(Gated(True), Gated(False), Gated(True)), torch.randn(4, 32)
    expected = model(x)
    packed_all(model, x)
    assert [m.packed_attributes for m in model] == [("weight", "gate"), ("weight",), ("weight", "gate")]
    assert type(model[0]) is type(model[2]) and type(model[0]) is not type(model[1])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3)
    ddst.densify(model)
    assert [type(m) for m in model] == [Gated] * 3


def test_shared_parameters_embeddings_and_norms_stay() -> None:
    class OwnNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.mean()

    class OwnEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 32))

        def forward(self, x: Tensor) -> Tensor:
            return x + F.embedding(torch.tensor([1]), self.weight).view(1, 32, 1, 1)

    class Codes(OwnEmbedding):  # by its name it could be anything
        pass

    first, second = EqualConv(32, 32), EqualConv(32, 32)
    second.weight = first.weight
    model = nn.Sequential(first, OwnNorm2d(), OwnEmbedding(), Codes(), second, nn.Conv2d(32, 32, 3))
    report = packed_all(model, images())
    assert reasons(report) == {
        "0.weight": "weight is shared: 0.weight, 4.weight",
        "3.weight": LOOKED_UP,
        "5": None,
    }
    assert [type(m) for m in model[:5]] == [EqualConv, OwnNorm2d, OwnEmbedding, Codes, EqualConv]


# --- code that takes nothing but a tensor -----------------------------------------------------------------------------


class Checked(EqualConv):
    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor)
        return super().forward(x)


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return (
            nn.grad.conv2d_input(x.shape, weight, gradient, padding=1),
            nn.grad.conv2d_weight(x, weight.shape, gradient, padding=1),
        )


class Remembering(Convolution):
    """Keeps what it gets outside of autograd, which would ask for no gradient of what is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.saved = x, weight
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved
        wanted = ctx.needs_input_grad
        return (
            nn.grad.conv2d_input(x.shape, weight, gradient, padding=1) if wanted[0] else None,
            nn.grad.conv2d_weight(x, weight.shape, gradient, padding=1) if wanted[1] else None,
        )


class Custom(EqualConv):
    function: type[torch.autograd.Function] = Convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.weight)


class Remembered(Custom):
    function = Remembering


class Strict(EqualConv):
    """As einops: asks the type of what it gets."""

    def forward(this, x: Tensor) -> Tensor:
        flat = rearranged(this.weight)
        return F.conv2d(x, flat.reshape(32, 32, 3, 3) * this.scale, this.bias, padding=1)


def rearranged(tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise RuntimeError(f"Tensor type unknown to einops {type(tensor)}")
    return tensor.flatten(1)


STRICT = [Checked, Custom, Remembered, Strict]


@pytest.mark.parametrize("kind", STRICT)
def test_with_a_sample_it_gets_a_tensor_and_the_report_says_so(kind: type[EqualConv]) -> None:
    model, x = nn.Sequential(EqualConv(32, 32), kind(32, 32), EqualConv(32, 32)), images()
    report = ddst.sparsify(model, 0.5, distribution="uniform", sample=x)
    assert notes(report) == {
        "0.weight": "",
        "1.weight": "unpacked: its code takes a tensor only",
        "2.weight": "",
    }
    dense = copy.deepcopy(model)
    ddst.densify(dense)
    y, z = model(x), dense(x)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    z.sum().backward()
    packed = packed_of(model[1])
    assert packed.values.numel() == 18 * 256 and packed.values.grad is not None
    expected = tp.pack_slots(dense[1].weight.grad, packed.slot_blocks, packed.block)
    torch.testing.assert_close(packed.values.grad, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(copy.deepcopy(model)(x), y)
    model[1].weight.requires_grad_(False)
    assert not packed.values.requires_grad
    model[1].weight.requires_grad = True
    assert packed.values.requires_grad


@pytest.mark.parametrize("kind", [Checked, Custom, Strict])
def test_a_module_that_gets_a_tensor_is_compiled_whole(kind: type[EqualConv]) -> None:
    model, x = nn.Sequential(kind(32, 32)), images()
    ddst.sparsify(model, 0.5, distribution="uniform", sample=x)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for each in (model, compiled):
        each(x).square().sum().backward()
    for parameter, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", STRICT)
def test_without_one_the_first_error_names_it(kind: type[EqualConv]) -> None:
    model = nn.Sequential(kind(32, 32))
    ddst.sparsify(model, 0.5, distribution="uniform")
    with pytest.raises((AssertionError, TypeError, RuntimeError)) as caught:
        model(images())
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "sample=" in text and "exclude=" in text


def test_an_error_of_another_kind_is_no_matter_of_packing() -> None:
    model = nn.Sequential(EqualConv(32, 32))
    ddst.sparsify(model, 0.5, distribution="uniform")
    with pytest.raises(ValueError, match="32 channels") as wrong:
        model(torch.randn(2, 31, 6, 6))
    model(images())
    model[0].scale = "2"  # type: ignore[assignment]
    with pytest.raises(TypeError) as late:
        model(images())
    assert not hasattr(wrong.value, "__notes__") and not hasattr(late.value, "__notes__")


def test_a_weight_given_to_a_function_within_a_checkpoint_is_fine() -> None:
    """The reentrant one is a Function too, and runs the module inside of it."""
    model, x = nn.Sequential(EqualConv(32, 32)), images().requires_grad_()
    ddst.sparsify(model, 0.5, distribution="uniform")
    weight = model[0].weight
    y = torch.utils.checkpoint.checkpoint(lambda t: F.conv2d(t, weight), x, use_reentrant=True)
    y.sum().backward()
    assert packed_of(model[0]).values.grad is not None


def test_the_module_that_reads_anothers_weight_is_to_blame() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = EqualConv(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, rearranged(self.read.weight).view(32, 32, 3, 3), padding=1)

    report = packed_all(nn.Sequential(EqualConv(32, 32), Reads(), EqualConv(32, 32)), images())
    assert [row.name for row in report.layers if row.note] == ["1.read.weight"]


def test_what_takes_no_tensor_of_a_kind_of_its_own_either_stays_dense() -> None:
    class Exact(EqualConv):
        def forward(self, x: Tensor) -> Tensor:
            if type(self.weight) is not nn.Parameter:
                raise TypeError("weight must be a Parameter")
            return super().forward(x)

    report = packed_all(nn.Sequential(EqualConv(32, 32), Exact(32, 32)), images())
    assert reasons(report) == {"0.weight": None, "1.weight": "cannot be packed: TypeError: weight must be a Parameter"}


# --- the run on the sample --------------------------------------------------------------------------------------------


class Failing(nn.Module):
    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.convolution, self.norm, self.error = EqualConv(32, 32), nn.BatchNorm2d(32), error
        self.last = Several()

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        self.last_input = x
        y = self.norm(self.convolution(x))
        if self.error is not None:
            raise self.error
        return self.last(y)


@pytest.mark.parametrize("error", [KeyError("its own"), None])
def test_the_model_is_as_it_was_after_the_run(error: Exception | None) -> None:
    model = Failing(error)
    model.convolution.weight.grad = torch.ones_like(model.convolution.weight)
    hook = model.convolution.register_forward_hook(lambda *_: None)
    before = [(m, type(m), dict(vars(m)), dict(m._parameters), dict(m._modules)) for m in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    if error is None:
        with pytest.raises(ValueError, match="distribution names"):  # found after the run
            ddst.sparsify(model, 0.5, distribution={"none": 0.5}, sample=images())
    else:
        with pytest.raises(KeyError) as caught:
            ddst.sparsify(model, 0.5, sample=images())
        assert caught.value is error and not hasattr(error, "__notes__")
    for module, kind, attributes, parameters, children in before:
        assert type(module) is kind and list(vars(module)) == list(attributes)
        assert all(vars(module)[name] is value for name, value in attributes.items())
        assert list(module._parameters) == list(parameters) and list(module._modules) == list(children)
        assert all(module._parameters[name] is value for name, value in parameters.items())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.convolution.weight.grad is not None and bool((model.convolution.weight.grad == 1).all())
    hook.remove()


# --- settings of sparsify ---------------------------------------------------------------------------------------------


def test_densities_by_name_exclusions_and_reserves() -> None:
    report = ddst.sparsify(EqualNet(), 0.5, distribution={"second.weight": 0.25, "first.weight": 0.5})
    density = {row.name: row.density for row in report.layers}
    assert density["second.weight"] == 0.25 and density["first.weight"] == 0.5
    with pytest.raises(ValueError, match="distribution names 'second'"):
        ddst.sparsify(EqualNet(), 0.5, distribution={"second": 0.25})

    for exclude, left in ((["second"], ["second.weight"]), ([EqualLinear], ["mapping.weight"])):
        report = ddst.sparsify(EqualNet(), 0.5, distribution="uniform", exclude=exclude)
        assert [name for name, reason in reasons(report).items() if reason == "excluded"] == left

    net = EqualNet()
    ddst.sparsify(net, 0.25, distribution="uniform", reserve=0.5)
    assert packed_of(net.second).slots == 18 and packed_of(net.second).nnz == 9


def test_magnitude_keeps_the_largest_blocks_with_their_values() -> None:
    model = Holding(EqualConv(32, 32))
    weight = model.inner.weight.detach().clone()
    ddst.sparsify(model, 0.25, distribution="uniform", mask="magnitude")
    norms = torch.linalg.vector_norm(tp.as_blocks(weight, (16, 16)), dim=(-2, -1))
    kept = packed_of(model.inner).block_mask
    assert norms[kept].min() > norms[~kept].max()
    torch.testing.assert_close(packed_of(model.inner).block_norms()[kept], norms[kept])


def test_a_share_of_multiply_adds_counts_them() -> None:
    report = ddst.sparsify(EqualNet(), 0.4, distribution="work", sample=torch.randn(2, 3, 8, 8))
    work = {row.name: row.multiply_adds for row in report.layers}
    assert work["second.weight"] == 2 * 8 * 8 * 32 * 32 * 9 and work["mapping.weight"] == 2 * 32 * 64
    left = sum(row.density * row.multiply_adds for row in report.layers if row.multiply_adds is not None)
    assert left / sum(w for w in work.values() if w is not None) == pytest.approx(0.4, abs=0.01)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_multiply_adds_count_where_a_weight_is_read() -> None:
    """By a module around its own, out of a list, or through a norm: all take the same here."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = EqualConv(32, 32)
            self.listed = nn.ParameterList([torch.randn(32, 32, 3, 3)])
            self.blocks = nn.ModuleList([EqualConv(32, 32)])

        def forward(self, x: Tensor) -> Tensor:
            for weight in (self.read.weight, self.listed[0], self.blocks[0].weight):
                x = F.conv2d(x, weight, padding=1)
            return x

    norms = (nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm, nn.utils.weight_norm)
    model = nn.Sequential(Reads(), *(norm(EqualConv(32, 32)) for norm in norms), EqualConv(32, 32))
    report = ddst.sparsify(model, 0.5, distribution="uniform", sample=images())
    each = 2 * 6 * 6 * 32 * 32 * 9
    assert [row.multiply_adds for row in report.layers] == [each] * 7
    model.eval()  # without the power iteration, which runs on blocks, too, and is counted then
    again = multiply_adds(model, lambda: model(images()), find_weights(model))
    assert list(again.values()) == [pytest.approx(each, rel=0.05)] * 7


def test_what_cannot_be_measured_is_said() -> None:
    model, x = nn.Sequential(EqualConv(32, 32)), images()
    with pytest.raises(ValueError, match="packed in modules which compute in their own way cannot be measured"):
        ddst.sparsify(model, 0.5, sample=x, only_if_faster=True)
    with pytest.raises(ValueError, match="packed in modules which compute in their own way cannot be measured"):
        ddst.sparsify(model, time_budget=0.5, sample=x)
    assert type(model[0]) is EqualConv
