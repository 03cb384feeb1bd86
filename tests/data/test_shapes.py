"""Drawn shapes: the same bytes everywhere, a tenth of each class, shapes that stand out of their ground."""

import pytest
import torch

from ddst.data import DataError, load_images
from ddst.data.shapes import SHAPES, shapes


@pytest.mark.parametrize(
    "resolution, digest",
    [
        (8, "f76ce6f724c49b5b4b52df9380fd123176ae4f7ab2d1c7bc18b586760a4e82c1"),
        (32, "15b98bd514765e3152e7c095a58a634488098f3e779bca7045c4366ee61c5def"),
    ],
)
def test_the_bytes_are_the_same_everywhere(resolution, digest):
    images = load_images("shapes", resolution)
    assert images.fingerprint() == digest
    assert images.stored.shape == (2000, 3, resolution, resolution) and images.resolution == resolution
    assert torch.bincount(images.labels).tolist() == [200] * len(SHAPES)


def test_more_pictures_and_other_seeds():
    few = shapes(8, count=20)
    assert len(few) == 20 and not torch.equal(few.stored, shapes(8, count=20, seed=1).stored)
    assert torch.equal(few.stored, shapes(8, count=20).stored)


def test_shapes_stand_out_of_their_ground_and_rings_have_a_hole():
    images = shapes(32)
    squares = images.stored[images.labels == 2].int()
    middle, corner = squares[:, :, 16, 16], squares[:, :, 0, 0]
    # The ground differs from the shape by 64 in each channel before the light makes it up to 40 brighter or darker.
    assert (middle - corner).abs().min() >= 24
    rings = images.stored[images.labels == 1].int()
    assert ((rings[:, :, 16, 16] - rings[:, :, 0, 0]).abs().max(1).values <= 40).float().mean() > 0.8


def test_no_images_are_set_aside():
    with pytest.raises(DataError, match="shapes sets no images aside"):
        load_images("shapes", 32, held_out=True)
