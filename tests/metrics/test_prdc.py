"""Precision, recall, density and coverage: their definitions, torch-fidelity's numbers, features far from zero."""

import pytest
import torch

from ddst.metrics import prdc
from helpers.fidelity import import_fidelity


def gaussian(n: int, features: int, seed: int) -> torch.Tensor:
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed))


def by_definition(real: torch.Tensor, fake: torch.Tensor, k: int) -> tuple[float, ...]:
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[:, None].double() - b[None].double()).square().sum(-1).sqrt()

    def radius(x: torch.Tensor) -> torch.Tensor:
        return distance(x, x).sort(1).values[:, k]

    inside = distance(fake, real) <= radius(real)
    precision, density = inside.any(1).double().mean(), inside.double().sum(1).mean() / k
    recall = (distance(real, fake) <= radius(fake)).any(1).double().mean()
    return tuple(map(float, (precision, recall, density, inside.any(0).double().mean())))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_definitions(k: int) -> None:
    real, fake = gaussian(1100, 8, 0), gaussian(60, 8, 1) * 0.8  # more than a chunk
    found = prdc(real, fake, k)
    expected = by_definition(real, fake, k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, abs=1e-12)
    assert found.precision > found.recall  # fewer and narrower
    back = prdc(fake, real, k)
    assert (back.precision, back.recall) == (found.recall, found.precision)


def test_torch_fidelitys_precision_and_recall() -> None:
    import_fidelity()
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = gaussian(200, 6, 2), gaussian(150, 6, 3) + 0.7
    theirs = fidelity.calculate_precision_recall_full(fake, real, neighborhood=3)  # generated first
    found = prdc(real, fake, k=3)
    assert (found.precision, found.recall) == pytest.approx(theirs, abs=1e-6)
    assert abs(found.precision - found.recall) > 0.01  # exchanged they would not pass


def test_features_far_from_zero() -> None:
    real, fake = gaussian(200, 6, 4).round(decimals=2), gaussian(200, 6, 5).round(decimals=2) * 1.2
    near = prdc(real, fake)
    assert prdc(real.double() + 1e6, fake.double() + 1e6) == near


def test_a_set_covers_itself() -> None:
    x = gaussian(50, 4, 6)
    found = prdc(x, x)
    assert found.precision == found.recall == found.coverage == 1


@pytest.mark.parametrize(
    "real, fake, k, message",
    [
        (torch.zeros(5, 2), torch.zeros(9, 2), 5, "real must be"),
        (torch.zeros(9, 2), torch.zeros(9), 5, "fake must be"),
        (torch.zeros(9, 2), torch.zeros(9, 3), 5, "equally wide"),
        (torch.zeros(9, 2), torch.full((9, 2), torch.nan), 5, "fake must be finite"),
        (torch.zeros(9, 2), torch.zeros(9, 2), 0, "k must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(real: torch.Tensor, fake: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prdc(real, fake, k)
