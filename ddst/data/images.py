"""`digits` (scikit-learn's 1,797 real images), drawn `shapes`, or a data set on disk, at the model's resolution."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from ddst.data import cache as kept
from ddst.data.cifar import cifar
from ddst.data.files import shown
from ddst.data.folders import image_folder, image_zip, tiny_imagenet
from ddst.data.image_set import DataError, ImageSet
from ddst.data.shapes import shapes
from ddst.data.source import Pixels, Source
from ddst.data.stl10 import stl10

_EXPECTED = (
    "give a folder of image files, a .zip of them, a folder of CIFAR, STL-10 or TinyImageNet, 'digits' or 'shapes'"
)


def load_images(data: str, resolution: int, *, held_out: bool = False, cache: Path | None = None) -> ImageSet:
    """The images named by `data`, at `resolution` x `resolution`.

    Args:
        data: "digits", "shapes" (:func:`ddst.data.shapes.shapes`), or a path, by what lies there:

            * CIFAR-10 or CIFAR-100, python batches or binary (:func:`ddst.data.cifar.cifar`);
            * STL-10, binary (:func:`ddst.data.stl10.stl10`);
            * TinyImageNet, in a folder or in its zip (:func:`ddst.data.folders.tiny_imagenet`);
            * a zip of image files, with StyleGAN's ``dataset.json`` or not (:func:`ddst.data.folders.image_zip`);
            * a folder of image files, which is searched at every depth and through links; class folders, or
              ``dataset.json``, give labels (:func:`ddst.data.folders.image_folder`,
              :func:`ddst.data.files.find_images`).
        resolution: side in pixels. Digits (8x8) are enlarged bilinearly, shapes are drawn; everything else is cropped
            to its central square and resized by :func:`ddst.data.pixels.resized`, the values of image files read as
            :func:`ddst.data.pixels.read_pixels` says.
        held_out: the images that the data set sets aside for tests (TinyImageNet's ``val``), not those to train on.
        cache: folder in which the resized images are kept and found again (:mod:`ddst.data.cache`); None keeps none.

    Returns:
        An `ImageSet` with one channel for digits, three channels for others; its `left_out` counts what was not read.

    Raises:
        DataError: the data is missing, damaged, of no form above, or has no images set aside.

    Example:
        >>> images = load_images("digits", 16)
        >>> len(images), images.channels, float(images.batch(slice(None)).min())
        (1797, 1, -1.0)
    """
    if data in EMBEDDED:
        if held_out:
            raise DataError(f"{data} sets no images aside, only CIFAR, STL-10 and TinyImageNet do")
        return EMBEDDED[data](resolution)
    if not data:  # As a path it would be the present folder.
        raise DataError(f"data must not be empty ({_EXPECTED})")
    path = Path(data)
    source = _recognised(path, held_out)
    pixels, where = _read(source, path, resolution, cache)
    notes = [f"left out: {source.left_out}"] if source.left_out.left_out else []
    notes += [f"{pixels.over_white} with transparent pixels laid over white"] if pixels.over_white else []
    note = f"images of {shown(path)}: {'; '.join(notes)}" if notes else ""
    left_out = dict(source.left_out.left_out)
    return ImageSet(str(path), pixels.stored, 255.0, pixels.labels, left_out, note, source.took + where)


def digits(resolution: int) -> ImageSet:
    """scikit-learn's handwritten digits (part of that package, no download), resized bilinearly."""
    from sklearn.datasets import load_digits  # Imported here: it takes a second and only this data set needs it.

    raw = load_digits()
    images = torch.from_numpy(np.asarray(raw.images, dtype=np.float32)).unsqueeze(1)
    if resolution != images.shape[-1]:
        images = F.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)
    labels = torch.from_numpy(np.asarray(raw.target, dtype=np.int64))
    return ImageSet("digits", images.contiguous(), 16.0, labels, took="scikit-learn's digits, 10 classes")


#: Data sets that need no file, by the name that stands for a path.
EMBEDDED: Mapping[str, Callable[[int], ImageSet]] = {"digits": digits, "shapes": shapes}


def advice_if_gone(data: str) -> str:
    """What is said beside an error of a run's own images, where nothing lies at their path any more; else ""."""
    return "" if data in EMBEDDED or os.path.exists(data) else "; --data PATH says where they lie now"


def _recognised(path: Path, held_out: bool) -> Source:
    try:
        if not path.exists():
            raise DataError(f"data folder {shown(path)} does not exist ({_EXPECTED})")
        if path.is_dir():
            for form in (cifar, stl10, tiny_imagenet):
                if (source := form(path, held_out)) is not None:
                    return source
            return image_folder(path, held_out)
    except OSError as error:
        raise DataError(f"data {shown(path)} cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() == ".zip":
        return image_zip(path, held_out)
    raise DataError(f"data {shown(path)} is not a folder ({_EXPECTED})")


def _read(source: Source, path: Path, resolution: int, cache: Path | None) -> tuple[Pixels, str]:
    """The pixels, from where they are kept or else from the data set itself; and what is said of that."""
    if cache is None:
        return source.read(resolution), ""
    try:
        file = kept.kept_file(cache, source, path, resolution)
    except OSError as error:
        raise DataError(f"cannot read {shown(error.filename)}: {error.strerror}") from error
    if (pixels := kept.read(file)) is not None:
        return pixels, f"; resized before, in {shown(file)}"
    pixels = source.read(resolution)
    try:
        kept.write(file, pixels)
    except (OSError, SafetensorError) as error:
        # Not the whole of an OSError, which names a temporary file.
        why = (error.strerror if isinstance(error, OSError) else None) or error
        return pixels, f"; resized images not kept in {shown(cache)}: {shown(why)}"
    # Mapped from the first time on, so that what was made in memory can go.
    return kept.read(file) or pixels, f"; resized images kept in {shown(file)}"
