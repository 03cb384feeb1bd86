"""Image files of every format that is read, damaged at random, and a process that reads them.

As a program: ``damage.py FOLDER FIRST LAST`` reads the damaged files of these numbers, in FOLDER, and prints for each
its number and "read", "refused", or what else happened.
"""

from __future__ import annotations

import functools
import io
import random
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ddst.data import DataError, load_images

Damage = Callable[[bytearray, random.Random], bytearray]


@functools.cache
def whole_files() -> list[tuple[str, bytes]]:
    """``(ending, contents)``: every format that is read, its compressions and depths."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(48), np.arange(40)) * 2
    colours = np.stack([smooth, 255 - smooth, rng.integers(0, 255, smooth.shape)], axis=2).astype(np.uint8)
    rgb = Image.fromarray(colours)
    rgba = Image.fromarray(np.dstack([colours, smooth.astype(np.uint8)]))
    grey, deep = rgb.convert("L"), Image.fromarray((smooth * 257).astype(np.uint16))
    wide, real = Image.fromarray((smooth * 257).astype(np.int32)), Image.fromarray((smooth / 255).astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    found: list[tuple[str, bytes]] = []

    def add(ending: str, image: Image.Image, kind: str, **options: object) -> None:
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        found.append((ending, buffer.getvalue()))

    for image in (rgb, rgba, grey, deep, rgb.convert("P"), rgb.convert("1"), grey.convert("LA")):
        add(".png", image, "PNG")
    add(".png", rgb, "PNG", transparency=(0, 255, 0), exif=exif)
    add(".png", grey, "PNG", save_all=True, append_images=[grey.transpose(Image.Transpose.ROTATE_180)])
    for options in ({}, {"progressive": True}, {"exif": exif, "quality": 30}, {"restart_marker_blocks": 4}):
        add(".jpg", rgb, "JPEG", **options)
    add(".jfif", grey, "JPEG")
    add(".jpeg", rgb.convert("CMYK"), "JPEG")
    for image in (rgb, rgba, grey, rgb.convert("P"), rgb.convert("1")):
        add(".bmp", image, "BMP")
    add(".gif", rgb.convert("P"), "GIF")
    add(".gif", rgb.convert("P"), "GIF", interlace=1, transparency=3, save_all=True, append_images=[grey.convert("P")])
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        add(".tif", rgb, "TIFF", compression=compression)
    for image in (rgba, grey, deep, wide, real, rgb.convert("P"), rgb.convert("CMYK"), rgb.convert("YCbCr")):
        add(".tiff", image, "TIFF")
    for compression in ("group3", "group4"):
        add(".tif", rgb.convert("1"), "TIFF", compression=compression)
    add(".tif", rgb, "TIFF", tiffinfo={322: 16, 323: 16}, compression="tiff_lzw")
    for options in ({}, {"lossless": True}, {"save_all": True, "append_images": [rgb]}):
        add(".webp", rgba, "WEBP", **options)
    add(".avif", rgb, "AVIF")
    add(".avif", rgba, "AVIF", quality=30)
    for ending, image in ((".ppm", rgb), (".pgm", grey), (".pgm", deep), (".pbm", rgb.convert("1")), (".pnm", real)):
        add(ending, image, "PPM")
    found.append((".ppm", b"P3 2 2 255\n" + b"7 8 9 " * 4))
    return found


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def flip_bits(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flip_in_head(data: bytearray, rng: random.Random) -> bytearray:
    """Sizes, depths, offsets stand at the front."""
    for _ in range(rng.choice((1, 2, 4))):
        data[rng.randrange(min(len(data), 160))] ^= 1 << rng.randrange(8)
    return data


def overwrite(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice((1, 4, 64, 1024)))
    data[start:end] = rng.choice((bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start)))
    return data


def repeat(data: bytearray, rng: random.Random) -> bytearray:
    """A piece stands twice, so that all that follows is moved."""
    start = rng.randrange(len(data))
    piece = data[start : start + rng.choice((1, 16, 256))]
    return data[:start] + piece + data[start:]


DAMAGES: tuple[Damage, ...] = (truncate, flip_bits, flip_in_head, overwrite, repeat)


def damaged(number: int) -> tuple[str, bytes]:
    """``(ending, contents)`` of a damaged file; the files take turns, the rest is drawn with the number as seed."""
    files, rng = whole_files(), random.Random(number)
    ending, data = files[number % len(files)]
    return ending, bytes(rng.choice(DAMAGES)(bytearray(data), rng))


def read_all(folder: Path, first: int, last: int) -> Iterator[tuple[int, str]]:
    """Numbers and what became of them."""
    for number in range(first, last):
        ending, data = damaged(number)
        file = folder / f"{number}{ending}"
        file.write_bytes(data)
        try:
            images = load_images(str(folder), 16)
            right = tuple(images.stored.shape) == (1, 3, 16, 16)
            yield number, "read" if right else f"wrong shape {tuple(images.stored.shape)}"
        except DataError as error:
            named = file.name in str(error) and "\n" not in str(error)
            yield number, "refused" if named else f"refused by {str(error)!r}"
        except BaseException as error:
            yield number, f"{type(error).__name__}: {error}"
        file.unlink()


def in_a_process(folder: Path, first: int, last: int) -> Counter[str]:
    """How many were "read" and "refused" by a process of its own.

    Raises:
        AssertionError: anything else happened; the message names the file's number.
    """
    done = subprocess.run(
        [sys.executable, "-P", __file__, str(folder), str(first), str(last)],
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} at file {first + len(said)}: {done.stderr[-2000:]}"
    assert [int(number) for number, _ in said] == list(range(first, last))
    strange = [f"{number}: {what}" for number, what in said if what not in ("read", "refused")]
    assert not strange, strange
    return Counter(what for _, what in said)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Pillow's, of damage it got over
    for number, what in read_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
        print(number, " ".join(what.split()), flush=True)
