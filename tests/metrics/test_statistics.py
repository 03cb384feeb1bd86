"""Shared .npz files of statistics, and Fréchet distances of what they hold."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddst.data import DataError
from ddst.metrics import Moments, Origin, frechet_distance, frechet_of_moments, read_reference, write_statistics


def features(seed: int, n: int = 40) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_statistics_written_are_read_back(tmp_path: Path) -> None:
    a, b = features(0), features(1) + 1
    write_statistics(tmp_path / "a.npz", Moments.of(a))
    held = read_reference(tmp_path / "a.npz", 3)
    assert held.images is None and held.moments is not None and held.origin is None
    assert frechet_of_moments(held.moments, Moments.of(b)) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(file["sigma"], np.cov(a.numpy(), rowvar=False))


def test_what_statistics_are_of_is_read_back(tmp_path: Path) -> None:
    origin = Origin(40, "Fotos in /ä, training", "bicubic")
    write_statistics(tmp_path / "a.npz", Moments.of(features(0)), origin)
    assert read_reference(tmp_path / "a.npz", 3).origin == origin
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        held = dict(file)
    assert list(held) == ["mu", "sigma", "real", "split", "resizer"]
    for name, value, message in (
        ("real", np.array(0), "real must be a whole number from 1 on, got int64"),
        ("real", np.array([3]), r"real must be a whole number from 1 on, got int64 \[1\]"),
        ("split", np.array(3), "split must be a text, got int64"),
    ):
        np.savez(tmp_path / "b.npz", **{**held, name: value})
        with pytest.raises(DataError, match=message):
            read_reference(tmp_path / "b.npz", 3)
    # Somebody's own array of one of these names says nothing.
    np.savez(tmp_path / "b.npz", mu=held["mu"], sigma=held["sigma"], real=np.zeros(2))
    assert read_reference(tmp_path / "b.npz", 3).origin is None


def test_adms_names(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    spatial = {"mu_s": np.zeros(7), "sigma_s": np.zeros((7, 7))}
    held_moments = {"mu": np.ones(3, dtype=np.float32), "sigma": np.eye(3, dtype=np.float32)}
    np.savez(tmp_path / "batch.npz", arr_0=images, **held_moments, **spatial)
    held = read_reference(tmp_path / "batch.npz", 3)
    assert held.images is not None and held.moments is not None
    assert held.images.shape == (4, 3, 8, 8) and held.images[1, 2, 3, 4] == images[1, 3, 4, 2]
    assert held.moments.mean.dtype == torch.float64 and held.moments.covariance.trace() == 3


@pytest.mark.filterwarnings("error")
def test_far_from_zero_the_distance_stays() -> None:
    """float32 features that are exact, beside 0 and beside 2**12: a covariance by E[xy] − E[x]E[y] would lose them."""
    a, b = (torch.round(features(seed, 500) * 256).float() / 256 for seed in (2, 3))
    near = frechet_distance(a, b * 2)
    assert frechet_distance(a + 4096, b * 2 + 4096) == pytest.approx(near, rel=1e-9)


def test_a_covariance_of_few_images_is_none_the_worse_for_its_rounding(tmp_path: Path) -> None:
    sigma = np.cov(torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).numpy(), rowvar=False)
    assert np.linalg.eigvalsh(sigma.astype(np.float32))[0] < 0
    np.savez(tmp_path / "few.npz", mu=np.zeros(64, np.float32), sigma=sigma.astype(np.float32))
    assert read_reference(tmp_path / "few.npz", 64).moments is not None


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


@pytest.mark.parametrize(
    "held, message",
    [
        ({}, "holds nothing; expected mu and sigma, or arr_0"),
        ({"m": np.zeros(3)}, "holds m; expected"),
        ({"mu": np.zeros(3)}, "holds mu; expected"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, r"mu must be floats \[3\], got float64 \[4\]"),
        ({"mu": np.zeros(3), "sigma": np.eye(3, dtype=np.int64)}, r"sigma must be floats \[3, 3\], got int64"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu must be finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "sigma must be symmetric"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "must be a covariance, .* the smallest is -1, the largest -1"),
        ({"mu": np.zeros(3), "sigma": np.diag([4.0, 1.0, -0.1])}, "the smallest is -0.1, the largest 4"),
        ({"arr_0": np.zeros((2, 8, 8, 3))}, r"arr_0 must be bytes \[N, H, W, 3\], got float64"),
        ({"mu": np.array([Evil()]), "sigma": np.eye(3)}, "cannot be read"),
    ],
)
def test_what_a_file_may_not_hold(held: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", **held)
    with pytest.raises(DataError, match=message) as raised:
        read_reference(tmp_path / "x.npz", 3)
    assert "\n" not in str(raised.value) and capsys.readouterr().out == ""


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("mu")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and so on")
    for name in ("text", "one.npy", "cut.npz", "none.npz"):
        with pytest.raises(DataError, match=name) as raised:
            read_reference(tmp_path / name, 3)
        assert "pickle" not in str(raised.value)


def test_statistics_are_written_where_they_were_asked_for(tmp_path: Path) -> None:
    write_statistics(tmp_path / "plain", Moments.of(features(0)))
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
