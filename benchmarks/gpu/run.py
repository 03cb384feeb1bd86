"""`make gpu`: builds the working tree's libraries and runs `ddst.benchmarks.gpu` from it, installing nothing.

    python3 -P benchmarks/gpu/run.py [OPTIONS]

Needs an interpreter of Python 3.11 or later that has torch, numpy, setuptools, pybind11, cmake and ninja (for the part
that trains also scikit-learn, pillow, tqdm and safetensors), a C++ compiler and a GPU; no network, no installed ddst.
Imports nothing of ddst before the libraries are built, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: The packages whose folders are not where their names say, as in setup.py; those below them are found by these.
PACKAGES = {"ddst": ROOT / "ddst", "ddst.benchmarks": ROOT / "benchmarks", "ddst.kernels": ROOT / "kernels"}
#: What there is to run, in this order.
PHASES = ("primitives", "correctness", "tune", "kernels", "host", "iteration", "train", "candidates")
BUDGET = 420.0
CANNOT_BUILD, NO_GPU = 2, 3


class WorkingTree(MetaPathFinder):
    """Finds ddst in the working tree, before any that is installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The package of that name, or None for what the ordinary way finds."""
        folder = PACKAGES.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def parser() -> argparse.ArgumentParser:
    """The command line; also that of ``python -m ddst.benchmarks.gpu``."""
    command = argparse.ArgumentParser(
        prog="make gpu ARGS='…'",
        description="Proves the library on a GPU: every operator is checked against float64, then measured against "
        "cuDNN and cuBLAS. Exit code 0: all results right; 1: one was wrong or could not be checked; 2: a wrong option "
        "or a failed build; 3: no GPU. Slowness is no error.",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: benchmarks/results/<device>)"
    )
    command.add_argument(
        "--only", nargs="+", choices=PHASES, default=list(PHASES), metavar="PART", help=" ".join(PHASES)
    )
    command.add_argument(
        "--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for build and parts; default {BUDGET:g}"
    )
    return command


def no_gpu() -> str | None:
    """Why nothing can be run here, in one line, or None."""
    try:
        import torch
    except ImportError as error:
        return f"needs torch, which {sys.executable} has not ({error})"
    if not torch.cuda.is_available():
        return f"no GPU is visible to torch {torch.__version__} of {sys.executable}: nothing was built or measured"
    return None


def architecture() -> str:
    """CMake's name of the device's architecture, such as 90-real."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}-real"


def build() -> str | None:
    """Builds the libraries into ``ddst/_lib`` by setup.py; the end of the compiler's output where that fails."""
    log = ROOT / "build" / "gpu-build.log"
    log.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    print(f"building the libraries in {ROOT} (output: {log}) …", flush=True)
    environment = {"DDST_CUDA_ARCHS": architecture(), **os.environ}  # the CUDA kernels for this device alone
    with log.open("w") as output:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        return f"the build failed with exit code {code}:\n" + "\n".join(log.read_text().splitlines()[-30:])
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)
    return None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    started = time.monotonic()
    parser().parse_args(argv)  # before minutes are spent on a wrong option
    for step, code in ((no_gpu, NO_GPU), (build, CANNOT_BUILD)):
        trouble = step()
        if trouble is not None:
            print(f"make gpu: {trouble}", file=sys.stderr)
            return code
    from ddst.benchmarks.gpu.__main__ import main as measure

    return measure(argv, time.monotonic() - started)


if __name__ in ("__main__", "__mp_main__"):  # the second: a worker process, which imports the main program again
    sys.meta_path.insert(0, WorkingTree())

if __name__ == "__main__":
    sys.exit(main())
