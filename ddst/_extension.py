"""Loads the compiled operators, ``ddst/_lib/libddst.so``: `load` is the first thing that importing ddst does.

The library is built against torch's stable ABI: it knows no Python and runs on torch 2.11 and later. It registers the
operators ``torch.ops.ddst.*``; without it there is nothing to run, so its absence is an ImportError that says what to
do, and never a silent fallback.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ddst import _host

LIBRARY = Path(__file__).resolve().parent / "_lib" / "libddst.so"
OLDEST_TORCH = (2, 11)


def check_torch(version: str) -> None:
    """Raises ImportError for a torch whose stable ABI lacks what the library calls."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if release < OLDEST_TORCH:
        raise ImportError(f"ddst needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, found {version}")


def load(library: Path = LIBRARY) -> None:
    """Loads the operator library into this process, once.

    Raises:
        ImportError: torch is too old, the library was not built, or it cannot be loaded.
    """
    check_torch(torch.__version__)
    if not library.is_file():
        raise ImportError(
            f"ddst's compiled library is missing: no {library}. In a source checkout, build it: with torch, "
            "setuptools, pybind11, cmake and ninja installed, `pip install --no-build-isolation -e .`; "
            "if ddst is installed as a wheel, a checkout in the working directory hides it: run from another directory."
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"ddst's compiled library {library} does not load into torch {torch.__version__}: {error}"
        ) from error


def build_info() -> dict[str, str]:
    """What the loaded library was built with, where it lies, and what it uses here.

    Returns:
        ``library`` (its path), ``compiler``, ``build_type``, ``torch_headers`` (the torch it was compiled against),
        ``torch_abi_target`` (the stable ABI it asks for, ``0x020a…`` is 2.10), ``cuda`` (``yes`` or ``no``),
        ``cpu_capability`` (the instruction set its CPU kernels use on this machine: ``avx512``, ``avx2`` or
        ``portable``), ``torch`` (the version that runs) and ``host`` (``pybind11`` or ``python``: which implementation
        of the host-side helpers runs).

    >>> build_info()["cuda"]
    'no'
    """
    facts = dict(line.split("=", 1) for line in torch.ops.ddst.build_info().splitlines())
    return {
        "library": str(LIBRARY),
        **facts,
        "cpu_capability": torch.ops.ddst.cpu_capability(),
        "torch": torch.__version__,
        "host": _host.IMPLEMENTATION,
    }
