"""Laws of the Fréchet distance, and what the shipped classifiers make of real, damaged and missing digits."""

import itertools
import math

import pytest
import torch

from ddst.data import load_images
from ddst.metrics import evaluate_embedded, frechet_distance, load_classifier, nearest_resolution, real_floor
from ddst.metrics.classifier import TRAINED, weights_path
from ddst.metrics.train_classifier import held_out

CLASSIFIERS = [(data, side) for data, (_, sides) in TRAINED.items() for side in sides]


def gaussian(n: int, features: int, seed: int) -> torch.Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_zero_for_identical_and_symmetric():
    a, b = gaussian(500, 6, 0), gaussian(400, 6, 1) * 1.3 + 0.2
    assert frechet_distance(a, a.flip(0)) < 1e-9
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 0.1


def test_closed_form_of_scaled_and_shifted_gaussian():
    """For b = s·a + t, the distance is |(s−1)μ + t|² + (s−1)²·tr Σ."""
    a = gaussian(300, 5, 2)
    s, t = 1.7, torch.arange(5.0)
    expected = ((s - 1) * a.mean(0) + t).square().sum() + (s - 1) ** 2 * torch.cov(a.T).trace()
    assert frechet_distance(a, s * a + t) == pytest.approx(float(expected), rel=1e-9)


def test_singular_covariances_are_finite():
    a = gaussian(50, 1, 3).expand(50, 4)  # Rank one: roots of eigenvalues that round below zero.
    b = torch.zeros(50, 4)
    assert frechet_distance(a, b) == pytest.approx(float(a.mean(0).square().sum() + torch.cov(a.T).trace()), rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(5), torch.zeros(5, 2), r"a must be \[N, F\]"),
        (torch.zeros(5, 2), torch.zeros(1, 2), "b must be .* N at least 2"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "same number of features, got 2 and 3"),
        (torch.full((5, 2), math.nan), torch.zeros(5, 2), "a must be finite"),
    ],
)
def test_bad_features_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize("data, resolution", CLASSIFIERS)
def test_shipped_classifier_is_accurate_on_held_out_images(data, resolution):
    images = load_images(data, resolution)
    test = held_out(len(images))
    predicted = load_classifier(resolution, data)(images.batch(test.nonzero().squeeze(1))).argmax(1)
    assert (predicted == images.labels[test]).float().mean() > 0.97


@pytest.mark.parametrize("data, resolution", CLASSIFIERS)
def test_distance_grows_with_missing_classes_from_the_floor(data, resolution):
    images = load_images(data, resolution)
    features = load_classifier(resolution, data).features(images.batch(slice(None)))
    floor = real_floor(features)
    without = [frechet_distance(features, features[images.labels >= k]) for k in range(5)]
    assert without[0] < 1e-6
    assert 1 < floor < 5
    assert all(b > a for a, b in itertools.pairwise(without))
    one = [frechet_distance(features, features[images.labels != k]) for k in range(10)]
    assert sum(one) / 10 == pytest.approx(20, rel=0.02)
    assert min(one) > 2 * floor


def test_shipped_weights_stay_small():
    assert sum(weights_path(side, data).stat().st_size for data, side in CLASSIFIERS) < 300_000


def test_evaluate_reports_shares_and_resized_resolutions():
    images = load_images("digits", 12)
    real = images.batch(slice(None))
    ones = real[images.labels == 1]
    same, single = evaluate_embedded(real, real), evaluate_embedded(real, ones)
    assert same.distance < 1e-6 < same.floor
    assert same.resolution == 16
    assert sum(same.shares) == pytest.approx(1)
    assert min(same.shares) > 0.08
    assert single.distance > 100
    assert single.shares[1] > 0.9
    assert evaluate_embedded(real, ones) == single  # Deterministic.


def test_evaluate_refuses_other_shapes():
    grey, colour = torch.zeros(4, 1, 8, 8), torch.zeros(4, 3, 8, 8)
    with pytest.raises(ValueError, match="real must be"):
        evaluate_embedded(colour, colour)
    with pytest.raises(ValueError, match="fake must be"):
        evaluate_embedded(grey, torch.zeros(4, 1, 16, 16))
    with pytest.raises(ValueError, match="images must be"):
        load_classifier(8).features(torch.zeros(4, 1, 16, 16))
    with pytest.raises(ValueError, match=r"real must be \[N, 3, H, H\]"):
        evaluate_embedded(grey, grey, "shapes")
    with pytest.raises(ValueError, match=r"data must be .*digits.*shapes"):
        evaluate_embedded(grey, grey, "faces")
    with pytest.raises(ValueError, match=r"resolution must be one of \(32,\), got 8"):
        load_classifier(8, "shapes")


def test_nearest_resolution_is_by_octaves():
    assert [nearest_resolution(r) for r in (8, 11, 12, 22, 23, 48, 512)] == [8, 8, 16, 16, 32, 32, 32]
    assert nearest_resolution(8, "shapes") == 32


def test_generated_digits_may_come_in_parts():
    real = load_images("digits", 8).batch(slice(0, 300))
    fake = load_images("digits", 8).batch(slice(300, 600))
    assert evaluate_embedded(real, (part for part in fake.split(128))) == evaluate_embedded(real, fake)
    with pytest.raises(ValueError, match="fake must be"):
        evaluate_embedded(real, [fake, fake[..., :4]])
