"""One image file as pixels: what black and white are in every kind of image that Pillow reads."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

#: Pillow's readers that may open a file, whatever its name. No others: some of those start programs (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_NOTHING_SEEN = "every pixel is wholly transparent"
_SIGNED, _WHITE_IS_ZERO = 2, 0


def read_pixels(file: Path | IO[bytes], resolution: int) -> tuple[NDArray[np.uint8], bool]:
    """The central square of an image, turned upright, resized: `[resolution, resolution, 3]` and whether it was
    transparent anywhere.

    What its values stand for, by Pillow's mode:

    * ``1``, ``L``, ``RGB``, ``P``, ``CMYK``, ``YCbCr``, ``LAB``: colours, as Pillow converts them to RGB. Of colours of
      16 bits Pillow reads the upper eight.
    * ``LA``, ``La``, ``PA``, ``RGBA``, ``RGBa``, and any with a transparent colour: laid over white before the resize.
      Refused where every pixel is wholly transparent.
    * ``I;16``: grey, white is 65535 (in a TIFF of 12 bits 4095).
    * ``I``, integers of 32 bits: grey, white is 65535. No format says so for files of 32 bits, so one that has values
      below 0 or above 65535, or none above 255, which would be black, is refused.
    * ``F``: grey from 0 to 1. One that has other values, or NaN, is refused.

    Signed samples of 8 or 16 bits are refused. A TIFF whose white is 0 is inverted. Of several frames or pages the
    first counts. AVIF needs Pillow 11.3 or later.

    Raises:
        ValueError: refused, as above, or more pixels than Pillow takes for an attack. OSError, SyntaxError, and what
            else Pillow's decoders raise: the file is damaged, or of no format that is read.

    Numerics: :func:`resized`, in float32 whatever the file holds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_formats()) as opened:
            tags: Any = getattr(opened, "tag_v2", {})
            bits, kinds = (tags.get(tag) or (0,) for tag in (_BITS, _SAMPLE_FORMAT))
            if _SIGNED in kinds and bits[0] < 32:
                raise ValueError(f"signed samples of {bits[0]} bits, expected unsigned ones")
            upright = ImageOps.exif_transpose(opened)
            if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
                white = 1.0 if upright.mode == "F" else 4095.0 if bits[0] == 12 else 65535.0
                inverted = opened.format == "TIFF" and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
                grey, transparent = _grey(upright, white, inverted, stated=bits[0] < 32)
                return np.repeat(resized(grey, resolution), 3, axis=2), transparent
            image, transparent = _over_white(upright)
    return resized(image, resolution), transparent


@functools.cache
def _formats() -> list[str]:
    """Those of :data:`FORMATS` that this Pillow has."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _grey(image: Image.Image, white: float, inverted: bool, stated: bool) -> tuple[Image.Image, bool]:
    """An image of floats, 255 at white, and whether it has a transparent colour. ``stated``: the format says the range.

    A transparent colour (PNG's) becomes white.
    """
    values: NDArray[Any] = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):  # NaN is neither
        raise ValueError(f"values from {low:g} to {high:g}, expected 0 (black) to {white:g} (white)")
    if image.mode == "I" and not stated and 0 < high <= 255:
        raise ValueError(f"integers of 32 bits up to {high:g} only, black where white is 65535: save 8 or 16 bits")
    levels = values.astype(np.float32) * np.float32(255.0 / white)
    if inverted:
        levels = 255 - levels
    transparent = values == image.info.get("transparency", -1)
    if transparent.all():
        raise ValueError(_NOTHING_SEEN)
    levels[transparent] = 255
    return Image.fromarray(levels), bool(transparent.any())


def _over_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """An image in RGB, what is transparent laid over white, and whether anything is."""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB"), False
    layered = image.convert("RGBA")
    opacity = np.asarray(layered.getchannel("A"))
    if not opacity.any():
        raise ValueError(_NOTHING_SEEN)
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB"), bool((opacity < 255).any())


def resized(image: Image.Image, resolution: int) -> NDArray[np.uint8]:
    """The central square, resized, `[resolution, resolution, bands]`: what every data set but digits goes through.

    Pillow's bicubic (a = −0.5) in float32, its support widened by the scale when it shrinks (antialiasing); clipped to
    0 ... 255 and rounded once, at the end. Pillow's own resize of bytes would clip and round between its two directions
    as well, which moves pixels beside hard edges by up to 22 of 255 (docs/metrics.md). At the square's own size the
    pixels stay what they are.

    Args:
        image: of bytes (`L`, `RGB`) or of floats (`F`) with white at 255.
        resolution: side in pixels.
    """
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square, size = (left, upper, left + side, upper + side), (resolution, resolution)
    bands = [band.convert("F").resize(size, Image.Resampling.BICUBIC, box=square) for band in image.split()]
    return np.rint(np.stack([np.asarray(band) for band in bands], axis=2).clip(0, 255)).astype(np.uint8)
