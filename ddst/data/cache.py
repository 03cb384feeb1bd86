"""Images kept on disk as the bytes that training takes, so that files are decoded and resized once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddst.data.image_set import DataError
from ddst.data.source import Pixels, Source

_VERSION = 1  # of the file's layout, and of what decides on pixels in ddst.data


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/ddst/images``, by default ``~/.cache/ddst/images``.

    Raises:
        DataError: there is no home.
    """
    stated = Path(os.environ.get("XDG_CACHE_HOME", ""))  # "An absolute path", by that rule, or it does not count.
    try:
        return (stated if stated.is_absolute() else Path.home() / ".cache") / "ddst" / "images"
    except RuntimeError as error:
        raise DataError("there is no home folder to keep images in: name another folder, or 'none'") from error


def cache_folder(stated: str | None) -> Path | None:
    """The folder that resized images are kept in: the one that `stated` names, None the default one, "none" none."""
    if stated == "none":
        return None
    return default_folder() if stated is None else Path(stated)


def kept_file(folder: Path, source: Source, root: Path, resolution: int) -> Path:
    """Where the pixels of a source are kept: named by a digest of what they are made from.

    That is: the form of the data set and what is read of it, the path, size, node and times of each of its files (of
    change, too, which nobody can set back), the resolution, and Pillow's version.

    Raises:
        OSError: a file is gone.
    """
    made_from = hashlib.sha256(repr((_VERSION, PIL.__version__, resolution, source.took)).encode())
    for file in source.files:
        about = file.stat()
        state = (about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)
        made_from.update(repr((os.path.abspath(root), str(file.relative_to(root)), state)).encode())
    return folder / f"{made_from.hexdigest()[:40]}.safetensors"


def read(file: Path) -> Pixels | None:
    """What :func:`write` wrote, mapped into memory (several processes share it); None where it is missing or damaged.

    Cost: one pass over the file, for its checksum.
    """
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 it is no dict
        pixels = Pixels(tensors["stored"], tensors.get("labels"), int(about["over_white"]))
        return pixels if about["sha256"] == _digest(pixels) else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def write(file: Path, pixels: Pixels) -> None:
    """Keeps pixels in a file, whole or not at all.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{secrets.token_hex(8)}.part")
    tensors = {"stored": pixels.stored} | ({} if pixels.labels is None else {"labels": pixels.labels})
    try:
        save_file(tensors, part, {"over_white": str(pixels.over_white), "sha256": _digest(pixels)})
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.replace(file)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _digest(pixels: Pixels) -> str:
    digest = hashlib.sha256(repr((tuple(pixels.stored.shape), pixels.over_white, pixels.labels is None)).encode())
    for tensor in (pixels.stored, pixels.labels):
        if tensor is not None:
            digest.update(_contents(tensor))
    return digest.hexdigest()


def _contents(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
