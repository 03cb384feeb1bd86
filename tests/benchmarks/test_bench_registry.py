"""What the benchmarks measure: layers as the networks have them, and the combinations of settings."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from ddst.benchmarks import registry
from ddst.benchmarks.registry import LAYERS, NETWORKS, Case, Layer


def layers_seen(model: nn.Module, sample: torch.Tensor) -> set[Layer]:
    seen = set()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.Linear):
            seen.add(Layer(module.in_features, module.out_features))
        elif isinstance(module, nn.Conv2d):
            side, kernel, stride = inputs[0].shape[2], module.kernel_size[0], module.stride[0]
            seen.add(Layer(module.in_channels, module.out_channels, kernel, side, stride))
            assert module.padding == (seen_padding(kernel),) * 2

    for module in model.modules():
        module.register_forward_pre_hook(note)
    model(sample)
    return seen


def seen_padding(kernel: int) -> int:
    return (kernel - 1) // 2


@pytest.mark.skipif(importlib.util.find_spec("ddst.models") is None, reason="this build holds no models")
@pytest.mark.parametrize("size, width", [(32, 256), (48, 512)])
def test_sngan_layers_are_those_of_the_models(size: int, width: int) -> None:
    from ddst.models import Discriminator, Generator

    with torch.no_grad():
        generator = layers_seen(Generator(size, width), torch.zeros(1, 128))
        discriminator = layers_seen(Discriminator(size, 128), torch.zeros(1, 3, size, size))
    assert set(NETWORKS[f"sngan{size}-g"]) == generator
    assert set(NETWORKS[f"sngan{size}-d"]) == discriminator


def test_networks_hold_what_was_asked_for() -> None:
    for network in ("sngan32", "sngan48", "biggan32", "dcgan32"):
        for player in "gd":
            kinds = {layer.op for layer in NETWORKS[f"{network}-{player}"]}
            assert kinds == {"conv2d", "linear"}, network
            assert len(set(NETWORKS[f"{network}-{player}"])) == len(NETWORKS[f"{network}-{player}"])
    assert {(layer.kernel, layer.stride) for layer in NETWORKS["dcgan32-d"] if layer.size} == {(3, 1), (4, 2)}
    targets = {layer.name for layer in NETWORKS["targets"]}
    assert {"conv3x3-256-256-32", "conv1x1-256-256-32", "linear-1024-1024", "linear-128-4096"} <= targets


def test_channels_and_sizes_chain_through_dcgans_discriminator() -> None:
    convs = [layer for layer in NETWORKS["dcgan32-d"] if layer.size]
    channels, size = 3, 32
    while True:
        step = [layer for layer in convs if (layer.in_channels, layer.size) == (channels, size)]
        # At 64, 128 and 256 channels a stride-2 layer keeps the channels, then a 3x3 one doubles them.
        if not step:
            break
        convs.remove(step[0])
        channels, size = step[0].out_channels, step[0].out_size
    assert convs == []
    assert channels * size * size == 8192


def test_names_say_the_layer_and_are_unique() -> None:
    assert LAYERS["conv4x4s2-64-64-32"] == Layer(64, 64, 4, 32, 2)
    assert LAYERS["conv4x4s2-64-64-32"].out_size == 16
    assert LAYERS["linear-128-4096"].weight_shape == [4096, 128]
    assert all(name == layer.name for name, layer in LAYERS.items())
    assert len(set(LAYERS.values())) == len(LAYERS)


def test_a_name_describes_its_layer_and_only_one_name_does() -> None:
    for layer in LAYERS.values():
        assert registry.layer_of(layer.name) == layer
    assert registry.layer_of("conv4x4s2-48-24-10") == Layer(48, 24, 4, 10, 2)
    assert registry.layer_of("linear-512-2048") == Layer(512, 2048)
    assert registry.layers_of(["conv3x3s1-16-016-8", "conv3x3-16-16-8"]) == ["conv3x3-16-16-8"]
    assert [case.op for case in registry.cases(["linear-64-48"], batches=[1], densities=[0.5], blocks=[(8, 8)])] == (
        ["linear"] * 2
    )
    for layer, name in (
        (Layer(256, 128, 4, 16, 2, transposed=True), "convt4x4s2-256-128-16"),
        (Layer(256, 256, 7, 512, dilation=3, dims=1), "conv1d7d3-256-256-512"),
        (Layer(64, 32, 16, 20, 8, dims=1, transposed=True), "convt1d16s8-64-32-20"),
    ):
        assert (layer.name, registry.layer_of(name)) == (name, layer)
    assert registry.layer_of("convt4x4s2-256-128-16").out_size == 32
    assert registry.layer_of("convt4x4s2-256-128-16").weight_shape == [256, 128, 4, 4]
    assert registry.layer_of("conv1d7d3-256-256-512").out_size == 512
    assert registry.layer_of("conv1d7d3-256-256-512").weight_shape == [256, 256, 1, 7]
    for name in (
        "conv1d3x3-16-16-8",
        "convt4-16-16-8",
        "conv3x3",
        "conv3x3-16-16",
        "linear-16-",
        "linear-1-2-3",
        "conv3x3-16-16-8 ",
        "Linear-16-16",
        "conv²x²-1-1-1",
    ):
        with pytest.raises(ValueError, match="layer must be named as in"):
            registry.layer_of(name)
    for name, why in (("conv5x3-1-1-9", "square"), ("linear-0-4", "at least 1"), ("conv4x4-1-1-1", "does not fit")):
        with pytest.raises(ValueError, match=rf"{name}.*{why}"):
            registry.layer_of(name)


def test_cases_are_the_product_without_the_impossible() -> None:
    found = registry.cases()
    assert len(set(found)) == len(found)
    assert {case.density for case in found} == {0.05, 0.1, 0.2, 0.3, 0.5, 1.0}
    assert {case.batch for case in found} == {16, 64}
    assert {case.block for case in found} == {(8, 8), (16, 16), (32, 32), (64, 64), (16, 4), (16, 1)}
    assert {case.mask for case in found} == {"random", "skewed"}
    assert not [case for case in found if case.mask == "skewed" and case.density == 1.0]
    assert not [case for case in found if case.layer == "conv3x3-256-3-32"]  # 3 channels hold no block
    assert {case.block for case in found if case.layer == "conv3x3-3-128-32"} == {(16, 1)}
    assert {case.baselines for case in found if case.op == "linear"} == {("dense", "masked", "bsr", "csr")}


def test_cases_are_filtered_by_operator_and_name() -> None:
    assert {case.op for case in registry.cases(ops=["linear"])} == {"linear"}
    only = registry.cases(["linear-128-4096"], batches=[4], densities=[0.1], blocks=[(16, 16)], masks=["random"])
    assert only == [Case("linear", "linear-128-4096", 4, 0.1, baselines=("dense", "masked", "bsr", "csr"))]
    gan = registry.cases(["sngan32"], batches=[16], densities=[0.1], blocks=[(16, 16)])
    assert [(case.op, case.mask, case.baselines) for case in gan] == [("gan", "random", ("dense",))]
    assert registry.cases(["linear-128-1"], blocks=[(16, 16)]) == []
    with pytest.raises(ValueError, match=r"'conv9'.*sngan32-g"):
        registry.layers_of(["conv9"])


def test_the_quick_selection_is_small_and_covers_both_operators() -> None:
    assert {case.op for case in registry.QUICK} == {"conv2d", "linear"}
    assert len(registry.QUICK) <= 10
