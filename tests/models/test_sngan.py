"""SNGAN: the published sizes, shapes at every resolution, spectral norm everywhere."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import ddst
from ddst.models import Discriminator, Generator, generator_plan
from ddst.models.sngan import ImageConv2d


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_32x32_configuration_has_its_parameter_counts():
    # Counted by hand from the published description: linear 128 -> 4096; three blocks of two 3x3 and one 1x1
    # convolution of 256 channels with two batch norms; batch norm; 3x3 to RGB.
    block = 2 * (9 * 256 * 256 + 256) + (256 * 256 + 256) + 2 * 2 * 256
    assert count(Generator()) == (128 * 4096 + 4096) + 3 * block + 2 * 256 + (9 * 256 * 3 + 3) == 4276739
    conv, short = 9 * 128 * 128 + 128, 128 * 128 + 128
    first = (9 * 3 * 128 + 128) + conv + (3 * 128 + 128)
    assert count(Discriminator()) == first + (2 * conv + short) + 4 * conv + 129 == 1053825


def test_published_48x48_generator():
    assert generator_plan(48, 512) == (6, [512, 256, 128, 64])
    assert Generator(48, width=64)(torch.zeros(2, 128)).shape == (2, 3, 48, 48)


@pytest.mark.parametrize("resolution", [8, 12, 16, 32])
def test_shapes_range_and_layout(resolution):
    torch.manual_seed(0)
    g, d = Generator(resolution, width=16, channels=1, latent=8), Discriminator(resolution, width=8, channels=1)
    images = g(torch.randn(3, 8))
    assert images.shape == (3, 1, resolution, resolution)
    assert images.abs().max() <= 1
    assert d(images).shape == (3,)
    up = g.blocks(torch.randn(2, 16, g.bottom, g.bottom).contiguous(memory_format=torch.channels_last))
    assert up.is_contiguous(memory_format=torch.channels_last)


def test_every_layer_of_the_discriminator_is_spectrally_normalised():
    d = Discriminator(8, width=8, channels=1)
    layers = [m for m in d.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 11  # 4 blocks x 2, two shortcuts, one linear
    assert all(is_parametrized(m, "weight") for m in layers)
    assert not any(is_parametrized(m) for m in Generator(8, width=8, channels=1).modules())


def test_cheap_shortcut_order_equals_the_published_one():
    """conv1x1 then upsample equals upsample then conv1x1; pool then conv1x1 equals conv1x1 then pool."""
    torch.manual_seed(0)
    g, d = Generator(8, width=8, channels=1).eval().double(), Discriminator(8, width=8, channels=1).eval().double()
    up, down = g.blocks[0], d.blocks[1]
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    h = up.conv1(nn.functional.interpolate(torch.relu(up.bn1(x)), scale_factor=2.0))
    published = up.conv2(torch.relu(up.bn2(h))) + up.shortcut(nn.functional.interpolate(x, scale_factor=2.0))
    torch.testing.assert_close(up(x), published)
    h = down.conv2(torch.relu(down.conv1(torch.relu(x))))
    published = nn.functional.avg_pool2d(h + down.shortcut(x), 2)
    torch.testing.assert_close(down(x), published)


@pytest.mark.parametrize(("channels", "side", "size"), [(3, 3, (6, 6)), (1, 5, (4, 7)), (2, 1, (3, 2)), (3, 3, (1, 1))])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_image_convolution_is_the_convolution_it_stands_for(channels, side, size, layout):
    torch.manual_seed(0)
    layer = ImageConv2d(8, channels, side).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    wanted = nn.functional.conv2d(x, layer.weight, layer.bias, padding=side // 2)
    y = layer(x)
    torch.testing.assert_close(y, wanted)
    assert y.is_contiguous(memory_format=layout)
    into = (x, layer.weight, layer.bias)
    grad = torch.randn_like(wanted)
    for ours, theirs in zip(torch.autograd.grad(y, into, grad), torch.autograd.grad(wanted, into, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_image_convolution_becomes_sparse_like_any_other():
    torch.manual_seed(0)
    model = nn.Sequential(ImageConv2d(8, 3, 3)).double()
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    wanted = model(x)
    ddst.sparsify(model, 1.0, block=(1, 4), distribution="uniform")
    assert isinstance(model[0], ddst.SparseConv2d)
    torch.testing.assert_close(model(x), wanted)
    ddst.densify(model)
    torch.testing.assert_close(model(x), wanted)


def test_image_convolution_refuses_even_kernels():
    with pytest.raises(ValueError, match="odd, got 2"):
        ImageConv2d(8, 3, 2)


@pytest.mark.parametrize("resolution", [4, 10, 20, 7, 0])
def test_bad_resolution_is_refused(resolution):
    with pytest.raises(ValueError, match=f"resolution must be .* got {resolution}"):
        Generator(resolution)


def test_width_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="width must be divisible by 8"):
        Generator(48, width=20)
