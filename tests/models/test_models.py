"""Every network of the registry: it builds, trains, copies, and becomes sparse and dense again."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ddst
import ddst.models
from ddst.models.families import FAMILIES, Sizes
from ddst.models.registry import MODELS, outputs_of, train_step
from ddst.nn import sparse_layers

SOURCES = sorted(Path(ddst.models.__file__).parent.glob("*.py"))
NAMES = sorted(MODELS)


def awake(network: nn.Module) -> nn.Module:
    """Random numbers where parameters start at zero, behind which others would have no effect."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return network


def double(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    network = awake(MODELS[name].make("tiny").double())
    return network, MODELS[name].sample(network, 2)


def outputs(network: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        return outputs_of(network(*inputs))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_finite_gradient_and_every_weight_counts(name: str) -> None:
    network, inputs = double(name)
    assert torch.isfinite(train_step(network, inputs))
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.dim() < 2 or parameter.grad.any(), f"{key} has no effect"


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_weights_inputs_and_gradients(name: str) -> None:
    runs = []
    for _ in range(2):
        network, inputs = double(name)
        loss = train_step(network, inputs)
        runs.append((loss, *(p.grad for p in network.parameters())))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_made_after_a_step_computes_the_same_and_shares_nothing(name: str) -> None:
    network, inputs = double(name)
    train_step(network, inputs)
    twin = copy.deepcopy(network)
    wanted = outputs(network.eval(), inputs)
    for got, expected in zip(outputs(twin.eval(), inputs), wanted, strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    for got, expected in zip(outputs(network, inputs), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_measured_size_sets_arguments_that_exist(name: str) -> None:
    inspect.signature(MODELS[name].network).bind(**MODELS[name].full)


@pytest.mark.parametrize("name", NAMES)
def test_two_lines_make_it_sparse_it_trains_and_densify_gives_it_back(name: str) -> None:
    network, inputs = double(name)
    dense_size = sum(p.numel() for p in network.parameters())
    report = ddst.sparsify(network, 0.3, block=8, distribution="uniform", sample=inputs)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    packed = [layer.values for layer in sparse_layers(network).values()]
    assert len(packed) == sum(layer.reason is None for layer in report.layers) > 0
    assert sum(p.numel() for p in network.parameters()) < dense_size
    before = [values.detach().clone() for values in packed]
    assert torch.isfinite(train_step(network, inputs))
    optimizer.step()
    assert all(values.grad is not None and torch.isfinite(values.grad).all() for values in packed)
    assert any(not torch.equal(old, new) for old, new in zip(before, packed, strict=True))
    network.eval()
    dense = ddst.densify(copy.deepcopy(network))
    assert not sparse_layers(dense)
    for got, expected in zip(outputs(network, inputs), outputs(dense, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_sizes_have_two_names() -> None:
    with pytest.raises(ValueError, match="size must be 'full' or 'tiny', got 'huge'"):
        MODELS["dcgan-g"].make("huge")


def test_own_spectral_norm_is_that_of_torch() -> None:
    from ddst.models.biggan_layers import NormalisedLinear

    torch.manual_seed(0)
    layer, x = NormalisedLinear(6, 8).double(), torch.randn(3, 6, dtype=torch.float64)
    for _ in range(200):
        layer(x)
    wanted = x @ (layer.weight / torch.linalg.matrix_norm(layer.weight, 2)).t() + layer.bias
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_both_forms_of_a_modulated_convolution_are_the_formula(up: bool, demodulate: bool) -> None:
    from ddst.models.stylegan2_layers import ModulatedConv2d
    from ddst.models.stylegan3_layers import modulated_conv2d

    torch.manual_seed(0)
    layer = ModulatedConv2d(4, 8, 3, 6, demodulate, up).double()
    x, w = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    grouped = layer(x, w)
    layer.fused = False
    torch.testing.assert_close(layer(x, w), grouped)
    if not up:
        style, weight = layer.modulation(w), layer.weight[0] * layer.scale
        for n in range(2):
            of_sample = weight * style[n, None, :, None, None]
            if demodulate:
                of_sample = of_sample / (of_sample.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
            torch.testing.assert_close(nn.functional.conv2d(x[n : n + 1], of_sample, padding=1), grouped[n : n + 1])
            if not demodulate:
                again = modulated_conv2d(x, weight, style, demodulate=False, padding=1)
                torch.testing.assert_close(again, grouped)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_noise_and_classes_that_do_not_fit_are_named(name: str) -> None:
    family, sizes = FAMILIES[name], Sizes(16, 64, 64, 24, classes=3)
    generator, discriminator = family.generator(sizes), family.discriminator(sizes)
    classes = [torch.tensor([0, 2])] if family.conditional else []
    for shape in ([2, 23], [24], [2, 24, 1]):
        with pytest.raises(ValueError, match=re.escape(f"z must be noise [N, 24], got {shape}")):
            generator(torch.zeros(shape), *classes)
    if family.conditional:
        for network, x in ((generator, torch.zeros(2, 24)), (discriminator, torch.zeros(2, 3, 16, 16))):
            with pytest.raises(ValueError, match="y must be classes from 0 to 2, got 0 to 3"):
                network(x, torch.tensor([0, 3]))


def test_what_traces_a_model_is_not_in_the_way_of_its_checks() -> None:
    model = MODELS["biggan-g"]
    generator = model.make("tiny").eval()
    inputs, more = (model.sample(generator, n) for n in (2, 5))
    expected = generator(*inputs)
    assert torch.equal(torch.compile(generator, fullgraph=True, backend="eager")(*inputs), expected)
    assert torch.equal(torch.jit.trace(generator, inputs, check_trace=False)(*more), generator(*more))


def test_models_know_torch_only() -> None:
    """Imports run train -> gan -> sparsity -> convert -> nn -> ops, and models stand beside all of them."""
    allowed = ("torch", "collections", "typing", "math", "itertools", "dataclasses", "__future__", "ddst.models")
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.startswith(allowed), f"{source.name} imports {name}"


def test_every_family_is_one_short_file() -> None:
    for source in SOURCES:
        if source.name not in ("sngan.py", "registry.py", "families.py"):
            assert len(source.read_text().splitlines()) < 150, source.name
