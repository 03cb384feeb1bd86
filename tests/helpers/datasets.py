"""Small files of the forms in which data sets are published."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CIFAR_10 = [f"data_batch_{i}" for i in range(1, 6)]


def images(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """`[count, 3, side, side]` of noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def by_python_2(batch: Mapping[str, Any]) -> bytes:
    """A batch as Python 2 and its numpy pickled it (protocol 2): texts and contents are its byte strings."""
    out = io.BytesIO()

    def text(value: bytes) -> None:
        out.write(
            b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
        )

    def whole(value: int) -> None:
        out.write(b"J" + struct.pack("<i", value))

    out.write(b"\x80\x02}(")
    for name, value in batch.items():
        text(name.encode())
        if isinstance(value, np.ndarray):
            out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01")
            for side in value.shape:
                whole(side)
            out.write(
                b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            by_columns = value.flags.f_contiguous and not value.flags.c_contiguous
            out.write(b"\x88" if by_columns else b"\x89")
            text(value.tobytes("A"))
            out.write(b"tb")
        elif isinstance(value, list):
            out.write(b"](")
            for entry in value:
                whole(entry)
            out.write(b"e")
        else:
            text(value)
    out.write(b"u.")
    return out.getvalue()


def by_python_3(batch: Mapping[str, Any]) -> bytes:
    """The same as Python 3 writes it for Python 2: bytes go through `_codecs.encode`."""
    encoded = pickle.dumps({name.encode(): value for name, value in batch.items()}, protocol=2)
    return encoded.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def python_batch(planes: np.ndarray, labels: Sequence[int], key: str = "labels", order: str = "C") -> dict[str, Any]:
    data = np.array(planes.reshape(len(planes), -1), order=order)
    return {"batch_label": b"a batch", key: list(labels), "data": data}


def binary_batch(planes: np.ndarray, *labels: Sequence[int]) -> bytes:
    """Records: a byte of each of `labels`, then the image."""
    heads = np.array(labels, dtype=np.uint8).T
    return np.concatenate([heads, planes.reshape(len(planes), -1)], axis=1).tobytes()


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    """Of `[H, W]` or `[H, W, 3]`."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=kind)
    return buffer.getvalue()


def write(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, contents in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return root


def zipped(file: Path, files: Mapping[str, bytes], labels: Any = ...) -> Path:
    """As StyleGAN's tool writes it, with `labels` in ``dataset.json``."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, contents in files.items():
            archive.writestr(name, contents)
        if labels is not ...:
            archive.writestr("dataset.json", labels if isinstance(labels, str) else json.dumps({"labels": labels}))
    return file
