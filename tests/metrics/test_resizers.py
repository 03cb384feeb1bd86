"""The table of docs/metrics.md: what the same digits cost when they go through another resizer."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddst.data import load_images
from ddst.metrics.frechet import evaluate_embedded

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def enlarged(images, how):
    """By Pillow, in the type they have."""
    made = [np.asarray(Image.fromarray(image).resize((32, 32), how)) for image in images]
    return torch.from_numpy(np.stack(made)).float()[:, None].clamp(0, 255)


@pytest.fixture(scope="module")
def paths():
    levels = load_digits().images * (255 / 16)
    rounded = np.rint(levels).astype(np.uint8)
    return {
        "bilinear of floats": load_images("digits", 32).stored * (255 / 16),
        "bilinear of bytes": enlarged(rounded, BILINEAR),
        "bicubic of bytes": enlarged(rounded, BICUBIC),
        "bicubic of floats": enlarged(rounded.astype(np.float32), BICUBIC),
    }


@pytest.mark.parametrize(
    "a, b, levels, distance",
    [
        ("bicubic of bytes", "bicubic of floats", 21.9, 0.01),
        ("bilinear of bytes", "bilinear of floats", 1.2, 0.0006),
        ("bicubic of floats", "bilinear of floats", 53.5, 5.3),
    ],
)
def test_paths_differ_as_the_table_says(paths, a, b, levels, distance):
    assert (paths[a] - paths[b]).abs().max() == pytest.approx(levels, abs=0.05)
    quality = evaluate_embedded(paths[b] / 127.5 - 1, paths[a] / 127.5 - 1)
    assert quality.distance == pytest.approx(distance, rel=0.08)
    assert 3.4 < quality.floor < 4.2
