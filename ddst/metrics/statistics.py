"""Means and covariances of features, and the .npz files in which people share them."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddst.data import DataError
from ddst.data.files import shown

_ORIGIN = ("real", "split", "resizer")
_ROUNDING = 1e-3  # of a covariance's largest eigenvalue: what its smallest ones may lie below 0


@dataclass(frozen=True)
class Moments:
    """A Gaussian fitted to features: `mean` `[F]` and `covariance` `[F, F]`, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features `[N, F]`, N ≥ 2; the covariance divides by N − 1.

        Example:
            >>> Moments.of(torch.tensor([[0.0], [2.0]]))
            Moments(mean=tensor([1.], dtype=torch.float64), covariance=tensor([[2.]], dtype=torch.float64))
        """
        features = features.double()
        return cls(features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1))


@dataclass(frozen=True)
class Origin:
    """What moments are of: `real` images (0: not known), which ones (`split`), how they got their size (`resizer`)."""

    real: int
    split: str
    resizer: str


@dataclass(frozen=True)
class Reference:
    """What a reference file holds: moments, images `[N, 3, H, W]` uint8, or both; what moments are of if it says."""

    moments: Moments | None
    images: Tensor | None
    origin: Origin | None = None


def read_reference(path: Path, features: int) -> Reference:
    """The moments "mu" and "sigma", and the images "arr_0" `[N, H, W, 3]` where the file has them.

    These are the names of TTUR, pytorch-fid, EDM ("mu", "sigma") and of ADM's reference batches (with "arr_0", and
    "mu_s", "sigma_s" of spatial features, which are left alone). "real", "split" and "resizer", where all three stand
    beside the moments, are their :class:`Origin`. Nothing is unpickled.

    Args:
        features: expected width of "mu".

    Raises:
        DataError: the file is missing, damaged, or holds neither; one line.
    """
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise DataError(f"reference {path} is no .npz file")
        with opened as file:
            origin = _ORIGIN if set(_ORIGIN) <= set(file.files) else ()
            held = {name: file[name] for name in ("mu", "sigma", "arr_0", *origin) if name in file.files}
            names = list(file.files)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"reference {path} cannot be read: {error.strerror or 'it is damaged'}") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError):
        # What numpy says of it is advice on how to unpickle it all the same.
        why = "it is no .npz file, damaged, or holds more than arrays of numbers"
        raise DataError(f"reference {path} cannot be read: {why}") from None
    if "arr_0" not in held and not {"mu", "sigma"} <= held.keys():
        raise DataError(f"reference {path} holds {', '.join(names) or 'nothing'}; expected mu and sigma, or arr_0")
    moments = _moments(path, held["mu"], held["sigma"], features) if {"mu", "sigma"} <= held.keys() else None
    images = _images(path, held["arr_0"]) if "arr_0" in held else None
    return Reference(moments, images, _origin(path, held) if origin and moments is not None else None)


def write_statistics(path: Path, moments: Moments, origin: Origin | None = None) -> None:
    """Write "mu" and "sigma" as `read_reference` and the usual programs read them, and beside them the `origin`.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:  # Of a name alone numpy would make one that ends in .npz.
        said: dict[str, Any] = {} if origin is None else asdict(origin)
        np.savez(file, mu=moments.mean.numpy(), sigma=moments.covariance.numpy(), **said)


def _moments(path: Path, mu: np.ndarray, sigma: np.ndarray, features: int) -> Moments:
    for name, array, shape in (("mu", mu, (features,)), ("sigma", sigma, (features, features))):
        if array.dtype.kind != "f" or array.shape != shape:
            raise DataError(
                f"reference {path}: {name} must be floats {list(shape)}, got {array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise DataError(f"reference {path}: {name} must be finite")
    if not np.allclose(sigma, sigma.T, atol=1e-6 * float(np.abs(sigma).max(initial=1e-300))):
        raise DataError(f"reference {path}: sigma must be symmetric")
    values = np.linalg.eigvalsh(sigma.astype(np.float64))
    # Rounding, of float32 features too, makes small ones negative.
    if values[0] < -_ROUNDING * np.abs(values).max():
        raise DataError(
            f"reference {path}: sigma must be a covariance, without negative eigenvalues: the smallest is "
            f"{values[0]:.3g}, the largest {values[-1]:.3g}"
        )
    return Moments(*(torch.from_numpy(a.astype(np.float64)) for a in (mu, sigma)))


def _origin(path: Path, held: Mapping[str, np.ndarray]) -> Origin:
    for name, kinds, expected in (
        ("real", "iu", "a whole number from 1 on"),
        *((n, "U", "a text") for n in _ORIGIN[1:]),
    ):
        array = held[name]
        if array.dtype.kind not in kinds or array.shape or (name == "real" and array < 1):
            raise DataError(f"reference {path}: {name} must be {expected}, got {array.dtype} {list(array.shape)}")
    return Origin(int(held["real"]), shown(held["split"]), shown(held["resizer"]))


def _images(path: Path, array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise DataError(f"reference {path}: arr_0 must be bytes [N, H, W, 3], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array).permute(0, 3, 1, 2)
