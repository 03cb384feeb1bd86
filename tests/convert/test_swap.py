"""Dense models to sparse ones and back: what is swapped, what it keeps, what the report says, what is refused."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as hooked_spectral_norm

from ddst.convert import densify, sparsify
from ddst.convert.initial_masks import initial_masks
from ddst.models import Discriminator, Generator
from ddst.nn import SparseConv2d, SparseLayer, SparseLinear, sparse_layers
from helpers.dense import active_entries, block_norms


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(48, 40, 1, stride=2),
        nn.Flatten(),
        nn.Linear(40 * 16, 64),
        nn.Linear(64, 10),
    )


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=dtype)


def masked(dense: nn.Module, model: nn.Module) -> nn.Module:
    """The dense model with the weights of the sparse model's inactive blocks set to zero."""
    for name, layer in sparse_layers(model).items():
        weight = dense.get_submodule(name).weight
        weight.data *= active_entries(layer.block_mask, layer.weight_shape, layer.block)
    return dense


def counted_by_hand(model: nn.Module, skip: tuple[str, ...] = ()) -> tuple[int, int]:
    """(active, all) weights of the convolution and linear layers, the active ones of sparse layers entry by entry."""
    active = total = 0
    for name, module in model.named_modules():
        if name in skip or not isinstance(module, SparseLayer | nn.Conv2d | nn.Linear):
            continue
        if isinstance(module, SparseLayer):
            active += int(active_entries(module.block_mask, module.weight_shape, module.block).sum())
            total += math.prod(module.weight_shape)
        else:
            active += module.weight.numel()
            total += module.weight.numel()
    return active, total


# --- density ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["random", "magnitude"])
@pytest.mark.parametrize("block", [(16, 16), (8, 8), (16, 4), 1])
@pytest.mark.parametrize("density", [0.2, 0.35, 0.9])
def test_erk_meets_the_overall_density_within_one_block(
    density: float, block: int | tuple[int, int], mask: str
) -> None:
    model = small_net()
    report = sparsify(model, density, block=block, mask=mask)
    active, total = counted_by_hand(model)
    area = 1 if block == 1 else math.prod(block)
    assert abs(active - density * total) <= area
    assert report.density == active / total == report.model_density
    for name, layer in sparse_layers(model).items():
        entry = next(e for e in report.layers if e.name == name)
        assert (entry.blocks, entry.num_blocks, entry.density) == (layer.nnz, layer.num_blocks, layer.density)


def test_erk_densities_equal_a_count_by_hand_and_full_layers_stay_dense() -> None:
    model = small_net()
    report = {e.name: e for e in sparsify(model, 0.2, block=(8, 8)).layers}
    # Sizes: 864, 13824, 1920, 40960, 640 = 58208; 20 % = 11641.6. Layer 0 has 3 channels: dense, numerator not counted.
    # ε = (11641.6 - 864) / (86 + 90 + 704 + 74) = 11.297: 7 passes 1 (74 ε = 836 > 640). ε = 10137.6 / 880 = 11.52.
    assert report["0"].reason == "3 to 32 channels, fewer than a block of 8x8"
    assert report["7"].reason == "its ERK density is 1"
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[7], nn.Linear)
    for name, numerator, size in (("2", 86, 13824), ("4", 90, 1920), ("6", 704, 40960)):
        assert abs(report[name].active - 11.52 * numerator) <= 64, name
        assert report[name].size == size


def test_uniform_gives_every_swapped_layer_the_density() -> None:
    model = small_net()
    report = sparsify(model, 0.25, distribution="uniform", exclude=["7"])
    for layer in sparse_layers(model).values():
        assert abs(layer.active_weights - 0.25 * math.prod(layer.weight_shape)) <= 256
    active, total = counted_by_hand(model, skip=("0", "7"))
    assert abs(active - 0.25 * total) <= 256
    assert report.density == active / total
    everything = counted_by_hand(model)
    assert report.model_density == everything[0] / everything[1] > report.density


def test_densities_by_name_and_the_rest_at_the_density() -> None:
    model = small_net()
    sparsify(model, 0.25, distribution={"0": 0.5, "6": 0.1})
    layers = sparse_layers(model)
    # Layer 0 has 3 channels: swapped because it is named. Layer 7 has 10 outputs and is not.
    assert list(layers) == ["0", "2", "4", "6"]
    for name, density in (("0", 0.5), ("2", 0.25), ("4", 0.25), ("6", 0.1)):
        layer = layers[name]
        assert abs(layer.active_weights - density * math.prod(layer.weight_shape)) <= 256


@settings(max_examples=25)
@given(
    st.lists(st.integers(16, 70), min_size=2, max_size=5), st.floats(0.15, 1.0), st.sampled_from([(16, 16), (8, 16)])
)
def test_law_density_within_one_block_for_any_channels(
    widths: list[int], density: float, block: tuple[int, int]
) -> None:
    model = nn.Sequential(*(nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(widths)))
    sparsify(model, density, block=block)
    active, total = counted_by_hand(model)
    assert abs(active - density * total) <= math.prod(block)


def test_generator_and_discriminator_at_ten_percent() -> None:
    for net in (Generator(16, 64, 1), Discriminator(16, 64, 1)):
        report = sparsify(net, 0.1)
        assert (
            abs(report.density * sum(e.size for e in report.layers) - 0.1 * sum(e.size for e in report.layers)) <= 256
        )


def test_random_masks_cover_rows_and_columns_and_follow_the_generator() -> None:
    masks = []
    for seed in (1, 1, 2):
        model = nn.Sequential(nn.Conv2d(64, 96, 3), nn.Conv2d(96, 64, 3))
        sparsify(model, 0.1, generator=torch.Generator().manual_seed(seed))
        masks.append([layer.block_mask for layer in sparse_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(masks[0], masks[2], strict=True))
    for mask in masks[0]:
        assert mask.flatten(1).any(1).all()
        assert mask.transpose(0, 1).flatten(1).any(1).all()


def test_magnitude_masks_keep_the_largest_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(32, 64, 3))
    norms = block_norms(model[0].weight.detach(), (16, 16))
    sparsify(model, 0.25, mask="magnitude")
    mask = model[0].block_mask
    assert norms[mask].min() > norms[~mask].max()


def test_edge_blocks_are_settled_to_the_exact_weight() -> None:
    """33 channels: the last block row and column hold one channel of 16, so counts alone may miss by many weights."""
    weights = {str(i): torch.randn(33, 33, 3, 3) for i in range(3)}
    densities = dict.fromkeys(weights, 0.3)
    for kind, count in itertools.product(("random", "magnitude"), (5, 24, 60)):
        masks = initial_masks(weights, dict.fromkeys(weights, count), densities, (16, 16), kind)
        active = sum(int(active_entries(m, (33, 33, 3, 3), (16, 16)).sum()) for m in masks.values())
        assert abs(active - 0.3 * 3 * 33 * 33 * 9) <= 128


# --- what a swapped layer keeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_those_of_the_masked_dense_model_and_densify_keeps_them(training: bool) -> None:
    model = small_net().double().train(training)
    dense = copy.deepcopy(model)
    sparsify(model, 0.3)
    x = images(torch.float64)
    y = model(x)
    torch.testing.assert_close(y, masked(dense, model)(x))
    assert densify(model) is model
    assert not sparse_layers(model)
    assert [type(m) for m in model] == [type(m) for m in dense]
    torch.testing.assert_close(model(x), y)
    assert all(m.training == training for m in model.modules())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_geometry_padding_modes_and_missing_bias_are_kept() -> None:
    convs = [
        nn.Conv2d(16, 16, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        nn.Conv2d(16, 24, 3, padding="same", padding_mode="reflect", bias=False),
        nn.Conv2d(24, 16, 4, padding="same", padding_mode="circular"),
        nn.Conv2d(16, 16, 2, padding="same"),
    ]
    model = nn.Sequential(*convs).double()
    dense = copy.deepcopy(model)
    sparsify(model, 0.5, block=(8, 8), distribution="uniform")
    assert len(sparse_layers(model)) == 4
    x = torch.randn(2, 16, 12, 14, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(y, masked(dense, model)(x))
    torch.testing.assert_close(densify(model)(x), y)
    assert model[1].bias is None
    assert model[1].padding_mode == "reflect"


def test_dtype_flags_and_the_bias_object_are_kept() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[1].eval()
    biases = [m.bias for m in model]
    for swap in (lambda: sparsify(model, 0.5), lambda: densify(model)):
        swap()
        weights = [m.values if isinstance(m, SparseLinear) else m.weight for m in model]
        assert [w.requires_grad for w in weights] == [False, True]
        assert [w.dtype for w in weights] == [torch.bfloat16] * 2
        assert all(m.bias is bias for m, bias in zip(model, biases, strict=True))
        assert [m.training for m in model] == [True, False]
    assert isinstance(model[0], nn.Linear)


def test_backend_is_set() -> None:
    model = small_net()
    sparsify(model, 0.3, backend="reference")
    assert {layer.backend for layer in sparse_layers(model).values()} == {"reference"}


def test_hooks_of_the_user_move_with_the_layer_and_can_be_removed() -> None:
    model = nn.Sequential(hooked_spectral_norm(nn.Linear(32, 32)), nn.Linear(32, 32))
    calls: list[tuple[str, str]] = []

    def note(event: str):  # type: ignore[no-untyped-def]
        return lambda module, *rest: calls.append((event, type(module).__name__))

    for layer in model:
        handles = [
            layer.register_forward_pre_hook(note("pre")),
            layer.register_forward_hook(note("post")),
            layer.register_full_backward_hook(note("backward")),
        ]
    x = torch.randn(2, 32, requires_grad=True)
    sparsify(model, 0.5)
    model(x).sum().backward()
    expected = [("pre", "SparseLinear"), ("post", "SparseLinear")] * 2 + [("backward", "SparseLinear")] * 2
    assert calls == expected
    densify(model)
    calls.clear()
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert calls == [("pre", "Linear"), ("post", "Linear"), ("backward", "Linear")]


def test_a_module_used_twice_is_swapped_once_and_stays_shared() -> None:
    shared = nn.Conv2d(32, 32, 3, padding=1)
    block = nn.Sequential(nn.Conv2d(32, 32, 1), shared)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU()), "c": block, "d": block})
    report = sparsify(model, 0.5)
    assert [e.name for e in report.layers] == ["a", "c.0"]
    assert isinstance(model["a"], SparseConv2d)
    assert model["a"] is model["b"][0] is model["c"][1]
    assert model["c"] is model["d"]
    assert len(list(model.parameters())) == 4
    densify(model)
    assert isinstance(model["a"], nn.Conv2d)
    assert model["a"] is model["b"][0] is model["c"][1]


@pytest.mark.parametrize("block, given, noise", [(1, None, 0.0), (16, None, 0.05), ((1, 2), None, 0.05), (1, 0.1, 0.1)])
def test_noise_of_spectral_norm_is_zero_for_single_weights_unless_given(
    block: tuple[int, int] | int, given: float | None, noise: float
) -> None:
    model = nn.Sequential(hooked_spectral_norm(nn.Linear(32, 32)), parametrizations.spectral_norm(nn.Linear(32, 32)))
    sparsify(model, 0.5, block=block, spectral_norm_noise=given)
    assert [layer.spectral_norm.noise for layer in sparse_layers(model).values()] == [noise, noise]


def test_negative_noise_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="spectral_norm_noise"):
        sparsify(model, 0.5, spectral_norm_noise=-1.0)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("style", ["hook", "parametrization"])
@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_is_carried_over_and_given_back(style: str, training: bool) -> None:
    attach = hooked_spectral_norm if style == "hook" else parametrizations.spectral_norm
    model = nn.Sequential(
        attach(nn.Conv2d(16, 32, 3, padding=1), n_power_iterations=2, eps=1e-10),
        nn.ReLU(),
        attach(nn.Conv2d(32, 16, 1)),
    ).double()
    model.train(training)
    keys = set(model.state_dict())
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    model(x)
    sparsify(model, 0.5, distribution="uniform")
    norm = model[0].spectral_norm
    assert (norm.style, norm.n_power_iterations, norm.eps, norm.training) == (style, 2, 1e-10, training)
    assert model[2].spectral_norm.n_power_iterations == 1
    for layer in sparse_layers(model).values():
        layer.spectral_norm.noise = 0.0
        exact = torch.linalg.matrix_norm(layer.dense_weight().flatten(1), 2)
        assert exact / layer.spectral_norm.sigma(layer) < 1.2  # settled on what is left of the weight
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    densify(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(model.state_dict()) == keys
    assert all(m.training == training for m in model.modules())
    for _ in range(3):
        torch.testing.assert_close(model(x), twin(x))
    assert parametrize.is_parametrized(model[0]) == (style == "parametrization")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"density": 0.0}, ValueError, "density"),
        ({"density": 1.5}, ValueError, "density"),
        ({"density": "0.1"}, TypeError, "density"),
        ({"block": (0, 16)}, ValueError, "block"),
        ({"block": (16, 16, 1)}, TypeError, "block"),
        ({"distribution": "erdos"}, ValueError, "erdos"),
        ({"distribution": {"9": 0.5}}, ValueError, "'9'"),
        ({"distribution": {"1": 0.5}}, ValueError, "'1'"),
        ({"distribution": {"2": 1.5}}, ValueError, r"distribution\['2'\]"),
        ({"distribution": {"2": 0.5}, "exclude": ["2"]}, ValueError, "'2'.*excluded"),
        ({"exclude": ["conv"]}, ValueError, "'conv'"),
        ({"exclude": "2"}, TypeError, "exclude"),
        ({"exclude": [3]}, TypeError, "exclude"),
        ({"exclude": [int]}, TypeError, "exclude"),
        ({"exclude": [nn.Linear(2, 2)]}, ValueError, "Linear"),
        ({"backend": "gpu"}, ValueError, "gpu"),
        ({"mask": "largest"}, ValueError, "largest"),
        ({"exclude": [nn.Module]}, ValueError, "no layer to swap"),
        ({"density": 0.01}, ValueError, "smallest"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, error: type[Exception], message: str) -> None:
    model = small_net()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        sparsify(model, **{"density": 0.3, **arguments})
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_model_that_would_stay_dense_is_refused_however_small() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))  # less than a block of 16x16 together
    with pytest.raises(ValueError, match=r"density 0\.05 cannot be met .* smallest that can is 1\.0 .* 8 to 8"):
        sparsify(model, 0.05)
    assert type(model[0]) is nn.Linear
    assert not any(layer.blocks for layer in sparsify(model, 1.0).layers)


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_the_smallest_density_that_an_error_names_can_be_had(distribution: str) -> None:
    with pytest.raises(ValueError, match="smallest") as caught:
        sparsify(small_net(), 0.001, distribution=distribution)
    smallest = float(str(caught.value).split("smallest that can is ")[1].split()[0])
    model = small_net()
    report = sparsify(model, smallest, distribution=distribution)
    assert all(layer.nnz >= 1 for layer in sparse_layers(model).values())
    assert report.density == pytest.approx(smallest, abs=256 / sum(e.size for e in report.layers if e.counted))


def test_a_model_that_is_itself_a_layer_is_sent_to_from_dense_or_to_dense() -> None:
    with pytest.raises(ValueError, match=r"SparseConv2d\.from_dense"):
        sparsify(nn.Conv2d(32, 32, 3), 0.5)
    with pytest.raises(ValueError, match=r"SparseLinear\.from_dense"):
        sparsify(nn.Linear(32, 32), 0.5)
    with pytest.raises(ValueError, match="to_dense"):
        densify(SparseLinear(32, 32))


def test_two_densities_for_one_shared_layer() -> None:
    shared = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="a, b"):
        sparsify(nn.ModuleDict({"a": shared, "b": shared}), 0.5, distribution={"a": 0.5, "b": 0.25})
