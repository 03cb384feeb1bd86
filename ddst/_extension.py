"""Loads the compiled operators: `load` is the first thing that importing ddst does.

``ddst/_lib/libddst.so`` registers the operators ``torch.ops.ddst.*`` and holds their CPU kernels; without it there is
nothing to run, so its absence is an ImportError that says what to do, and never a silent fallback.
``ddst/_lib/libddst_cuda.so``, built where there is a CUDA compiler, holds CUDA C++ kernels, ``torch.ops.ddst_cuda.*``,
and is loaded where torch was built with CUDA. Both are built against torch's stable ABI: they know no Python and run on
torch 2.11 and later.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from ddst import _host

LIBRARY = Path(__file__).resolve().parent / "_lib" / "libddst.so"
CUDA_LIBRARY = LIBRARY.with_name("libddst_cuda.so")
OLDEST_TORCH = (2, 11)
#: By the code that the library gives them (``csrc/cpu/kernels.hpp``).
CPU_CAPABILITIES = ("portable", "avx2", "avx512", "neon")


def check_torch(version: str) -> None:
    """Raises ImportError for a torch whose stable ABI lacks what the library calls."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if release < OLDEST_TORCH:
        raise ImportError(f"ddst needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, found {version}")


def load(library: Path = LIBRARY, cuda_library: Path = CUDA_LIBRARY) -> None:
    """Loads the operator library into this process, once, and the CUDA kernels if they are there and torch has CUDA.

    Raises:
        ImportError: torch is too old, the library was not built, or one of the two cannot be loaded.
    """
    check_torch(torch.__version__)
    if not library.is_file():
        raise ImportError(
            f"ddst's compiled library is missing: no {library}. In a source checkout, build it: with torch, "
            "setuptools, pybind11, cmake and ninja installed, `pip install --no-build-isolation -e .`; "
            "if ddst is installed as a wheel, a checkout in the working directory hides it: run from another directory."
        )
    _load_library(library)
    if torch.version.cuda is not None and cuda_library.is_file():
        _load_library(cuda_library)


def _load_library(library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"ddst's compiled library {library} does not load into torch {torch.__version__}: {error}"
        ) from error


def cuda_kernels_loaded() -> bool:
    """Whether the CUDA C++ kernels, ``torch.ops.ddst_cuda.*``, are in this process."""
    return any(Path(library) == CUDA_LIBRARY for library in torch.ops.loaded_libraries)


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use on this machine: "avx512", "avx2", "neon" or "portable".

    Raises:
        ValueError: the environment variable ``DDST_CPU_CAPABILITY`` asks for another.

    >>> cpu_capability() in CPU_CAPABILITIES
    True
    """
    return CPU_CAPABILITIES[torch.ops.ddst.cpu_capability()]


def build_info() -> dict[str, str]:
    """What the loaded library was built with, where it lies, and what it uses here.

    Returns:
        ``library`` (its path), ``compiler``, ``build_type``, ``torch_headers`` (the torch it was compiled against),
        ``torch_abi_target`` (the stable ABI it asks for, ``0x020a…`` is 2.10), ``cuda`` (``yes``: the library of CUDA
        C++ kernels was built and lies beside it, else ``no``), ``cuda_architectures`` (what that library holds code
        for and which compiler made it, or ``none``), ``cuda_loaded`` (``yes`` or ``no``), ``cpu_capability`` (the
        instruction set its CPU kernels use on this machine: ``avx512``, ``avx2``, ``neon`` or ``portable``), ``torch``
        (the version that runs) and ``host`` (``pybind11`` or ``python``: which implementation of the host-side helpers
        runs).

    >>> build_info()["cuda"] in ("yes", "no")
    True
    """
    describe = ctypes.CDLL(str(LIBRARY)).ddst_build_info
    describe.restype = ctypes.c_char_p
    facts = dict(line.split("=", 1) for line in describe().decode().splitlines())
    return {
        "library": str(LIBRARY),
        **facts,
        "cuda": "yes" if CUDA_LIBRARY.is_file() else "no",
        "cuda_loaded": "yes" if cuda_kernels_loaded() else "no",
        "cpu_capability": cpu_capability(),
        "torch": torch.__version__,
        "host": _host.IMPLEMENTATION,
    }
