"""`digits` (scikit-learn's 1,797 real images) or a folder of image files, as one tensor at the model's resolution."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


class DataError(ValueError):
    """The images asked for cannot be had; the message is one line that says which and why."""


@dataclass(frozen=True)
class ImageSet:
    """x = 2 · stored / top − 1: N images of one size, kept as they were stored (a byte a channel for files).

    Attributes:
        name: "digits" or the folder's path.
        stored: `[N, channels, resolution, resolution]`, uint8 for files, float32 for digits.
        top: the stored value that stands for white (255, or 16 for digits).
        labels: `[N]` int64 class of every image, or None where there are no classes.
    """

    name: str
    stored: Tensor
    top: float
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.stored.shape[0]

    @property
    def channels(self) -> int:
        return self.stored.shape[1]

    @property
    def resolution(self) -> int:
        return self.stored.shape[2]

    def batch(self, indices: Tensor | slice) -> Tensor:
        """Images at `indices` in torch's default dtype (float32), in [-1, 1], laid out channels_last."""
        images = self.stored[indices].to(torch.get_default_dtype()) * (2.0 / self.top) - 1.0
        return images.contiguous(memory_format=torch.channels_last)

    def fingerprint(self) -> str:
        """SHA-256 over shape and contents: tells a resumed run whether it sees the same images."""
        digest = hashlib.sha256(repr((tuple(self.stored.shape), str(self.stored.dtype), self.top)).encode())
        digest.update(self.stored.numpy().data)
        return digest.hexdigest()


def load_images(data: str, resolution: int) -> ImageSet:
    """The images named by `data`, at `resolution` x `resolution`.

    Args:
        data: "digits", or the path of a folder; the folder is searched for image files at every depth.
        resolution: side in pixels. Digits (8x8) are enlarged bilinearly; files are cropped to their central square and
            resized with antialiasing.

    Returns:
        An `ImageSet` with one channel and labels for digits, three channels and no labels for a folder.

    Raises:
        DataError: the folder is missing, is no folder, holds no image, or holds a file that cannot be read as an image.

    Example:
        >>> images = load_images("digits", 16)
        >>> len(images), images.channels, float(images.batch(slice(None)).min())
        (1797, 1, -1.0)
    """
    return digits(resolution) if data == "digits" else folder(Path(data), resolution)


def digits(resolution: int) -> ImageSet:
    """scikit-learn's handwritten digits (part of that package, no download), resized bilinearly."""
    from sklearn.datasets import load_digits  # Imported here: it takes a second and only this data set needs it.

    raw = load_digits()
    images = torch.from_numpy(np.asarray(raw.images, dtype=np.float32)).unsqueeze(1)
    if resolution != images.shape[-1]:
        images = F.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)
    return ImageSet("digits", images.contiguous(), 16.0, torch.from_numpy(np.asarray(raw.target, dtype=np.int64)))


def folder(path: Path, resolution: int) -> ImageSet:
    """Every image file under `path`, in the order of their relative paths."""
    if not path.exists():
        raise DataError(f"data folder {path} does not exist (give a folder of image files, or 'digits')")
    if not path.is_dir():
        raise DataError(f"data {path} is not a folder (give a folder of image files, or 'digits')")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"data folder {path} holds no image file ({', '.join(sorted(IMAGE_SUFFIXES))})")
    stored = torch.empty(len(files), 3, resolution, resolution, dtype=torch.uint8)
    for i, file in enumerate(files):
        stored[i] = _read(file, resolution)
    return ImageSet(str(path), stored, 255.0)


def _read(file: Path, resolution: int) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow's decoders raise many types on damaged files; each means the same to the user.
        raise DataError(f"cannot read image {file}: {' '.join(str(error).split())}") from error
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = (left, upper, left + side, upper + side)
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=square)
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
