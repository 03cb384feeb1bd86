"""CIFAR's python batches, read without running anything that they name."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


@dataclass
class Array:
    """What stands in a batch in place of an array: the state that numpy would have been handed."""

    state: Any = field(default=None)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def bytes_array(self) -> NDArray[np.uint8]:
        """The array, if it is one of bytes.

        Raises:
            ValueError: it is none, or its shape and its bytes do not fit.
        """
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("an array without contents")
        _, shape, kind, by_columns, raw = self.state
        whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not isinstance(kind, Kind) or kind.name not in ("u1", b"u1") or not isinstance(raw, bytes) or not whole:
            raise ValueError("an array that is not one of bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_columns else "C")


@dataclass
class Kind:
    """What stands in place of a numpy dtype: its name."""

    name: Any

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, of which bytes have none."""


def read_batch(data: bytes) -> Any:
    """What a python batch holds, by :class:`BatchReader`.

    Before, its instructions are gone through: pickle makes room for as many objects as one of them says there are.

    Raises:
        pickle.UnpicklingError, ValueError, and what else pickle raises on damaged files.
    """
    for number, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        if instruction.name.endswith("PUT") and (argument or 0) > number:
            raise pickle.UnpicklingError(f"it counts {argument:,} objects after {number:,} instructions")
    return BatchReader(io.BytesIO(data)).load()


class BatchReader(pickle.Unpickler):
    """Reads the dicts, lists, numbers, texts and arrays of bytes of which CIFAR's python batches are made.

    A pickle is a program: what it names is imported and called. Here the only names it may use are the four that
    the published files do, ``numpy.core.multiarray._reconstruct`` (NumPy 2's ``numpy._core``, too),
    ``numpy.ndarray``, ``numpy.dtype`` and ``_codecs.encode``; and not even they are what is called, as numpy believes
    the states that it is handed: each is replaced by a stand-in that keeps what it was given (:class:`Array`,
    :class:`Kind`). Any other name ends the reading before it is imported.

    Raises:
        pickle.UnpicklingError: the file names anything else. Damaged files make it raise many types.

    Example:
        >>> import io
        >>> BatchReader(io.BytesIO(pickle.dumps(print))).load()
        Traceback (most recent call last):
        _pickle.UnpicklingError: it names builtins.print, which no CIFAR batch does
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")  # They were written by Python 2.
        self._admitted: dict[tuple[str, str], Callable[..., Any] | str] = {
            ("numpy.core.multiarray", "_reconstruct"): self._array,
            ("numpy._core.multiarray", "_reconstruct"): self._array,
            ("numpy", "ndarray"): "numpy.ndarray",
            ("numpy", "dtype"): self._kind,
            ("_codecs", "encode"): self._encoded,
        }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for one of the four names."""
        if (module, name) not in self._admitted:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no CIFAR batch does")
        return self._admitted[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """No batch refers to anything outside."""
        raise pickle.UnpicklingError("it refers to something outside the file")

    def _array(self, *_: Any) -> Array:
        return Array()

    def _kind(self, name: Any, *_: Any) -> Kind:
        return Kind(name)

    def _encoded(self, text: Any, encoding: Any) -> bytes:
        """How Python 3 writes bytes for Python 2."""
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("a text in another encoding than latin1")
        return text.encode("latin1")
