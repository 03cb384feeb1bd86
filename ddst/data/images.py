"""`digits` (scikit-learn's 1,797 real images) or a folder of image files, as one tensor at the model's resolution."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ddst.data.files import IMAGE_SUFFIXES, find_images, shown
from ddst.data.pixels import read_pixels


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
        left_out: reason -> number of files and folders that were not read (:func:`ddst.data.files.find_images`).
        note: one line on what was left out and what was laid over white; empty where there is nothing to say.
    """

    name: str
    stored: Tensor
    top: float
    labels: Tensor | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

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
        data: "digits", or the path of a folder, which is searched for image files at every depth and through links:
            :func:`ddst.data.files.find_images` says which files count.
        resolution: side in pixels. Digits (8x8) are enlarged bilinearly; files are cropped to their central square and
            resized with antialiasing, their values read as :func:`ddst.data.pixels.read_pixels` says.

    Returns:
        An `ImageSet` with one channel and labels for digits, three channels and no labels for a folder; its `left_out`
        counts what was not read.

    Raises:
        DataError: the folder is missing, is no folder, cannot be read, holds no image, or holds an image file that
            cannot be read.

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
    """Every image file under `path`, in the order of their paths."""
    named = shown(path)
    if not path.exists():
        raise DataError(f"data folder {named} does not exist (give a folder of image files, or 'digits')")
    if not path.is_dir():
        raise DataError(f"data {named} is not a folder (give a folder of image files, or 'digits')")
    try:
        found = find_images(path)
    except OSError as error:
        raise DataError(f"data folder {named} cannot be read: {error.strerror or error}") from error
    if not found.files:
        there = f"; there is: {found}" if found.left_out else ""
        raise DataError(f"data folder {named} holds no image file ({', '.join(sorted(IMAGE_SUFFIXES))}){there}")
    stored = torch.empty(len(found.files), 3, resolution, resolution, dtype=torch.uint8)
    over_white = 0
    for i, file in enumerate(found.files):
        try:
            pixels, transparent = read_pixels(file, resolution)
        except Exception as error:  # Pillow's decoders raise many types on damaged files, the same to the user.
            raise DataError(f"cannot read image {shown(file)}: {shown(' '.join(str(error).split()))}") from error
        stored[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        over_white += transparent
    notes = [f"left out: {found}"] if found.left_out else []
    notes += [f"{over_white} with transparent pixels laid over white"] if over_white else []
    note = f"images of {named}: {'; '.join(notes)}" if notes else ""
    return ImageSet(str(path), stored, 255.0, None, dict(found.left_out), note)
