"""`make gpu`: builds the working tree's libraries and runs `ddst.benchmarks.gpu` from it, installing nothing.

    python3 -P benchmarks/gpu/run.py [OPTIONS]

A first call builds, proves and measures in at most 7 minutes, and leaves what it compiled in one archive. A call that
finds an archive of these sources builds nothing and takes at most 5. What an earlier call has proven of the same
sources, on the same device and with the same versions, is taken over from the results folder and not done again.

Needs an interpreter of Python 3.11 or later that has torch, numpy, setuptools, pybind11, cmake and ninja (for the part
that trains also scikit-learn, pillow, tqdm and safetensors), a C++ compiler and a GPU; no network, no installed ddst.
Imports nothing of ddst before the libraries are built, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
#: The packages whose folders are not where their names say, as in setup.py; those below them are found by these.
PACKAGES = {"ddst": ROOT / "ddst", "ddst.benchmarks": ROOT / "benchmarks", "ddst.kernels": ROOT / "kernels"}
LIBRARIES, ARCHIVE = ROOT / "ddst" / "_lib", ROOT / "build" / "gpu-objects.tar.xz"
TRITON = ROOT / "build" / "gpu-triton"  # Triton's cache of this program, so that it can be carried
#: What there is to run, in this order.
PHASES = ("primitives", "correctness", "kernels", "iteration", "tune", "host", "train", "candidates")
#: Seconds after which no work is begun: of a call that builds, and of one that finds its objects compiled.
BUDGET, PREBUILT_BUDGET = 392.0, 276.0
#: Seconds more in which what is under way may end. The whole call then takes less than 7 and 5 minutes.
GRACE = 12.0
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
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"for build and parts (default: {BUDGET:g}, with compiled objects {PREBUILT_BUDGET:g}); the program ends "
        f"{GRACE:g} later at the latest",
    )
    command.add_argument(
        "--objects", type=Path, default=ARCHIVE, metavar="FILE",
        help="compiled objects, used where they fit and written anew where not (default: build/gpu-objects.tar.xz)",
    )  # fmt: skip
    command.add_argument("--anew", action="store_true", help="build, and prove what is proven, once more")
    command.add_argument(
        "--prebuild", metavar="ARCH", help="only build the libraries into --objects, without a GPU, for sm_90a, say"
    )
    return command


def sibling(name: str) -> ModuleType:
    """A module beside this one that imports nothing of ddst."""
    spec = spec_from_file_location(f"make_gpu_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


objects = sibling("objects")


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
    """nvcc's name of the device's architecture, such as sm_90a."""
    import torch

    return objects.architecture_of(torch.cuda.get_device_capability())


def prebuilt(archive: Path, facts: dict[str, str]) -> bool:
    """Takes the compiled objects out of an archive; says how many, or why none."""
    try:
        found = objects.unpack(archive, LIBRARIES, TRITON, facts)
    except objects.UnfitError as why:
        print(f"compiled objects in {archive}: not used, {why}", flush=True)
        return False
    print(f"{found['libraries']} libraries and {found['kernels']} kernels of {archive} are used", flush=True)
    return True


def keep(archive: Path, facts: dict[str, str]) -> None:
    """Writes what is compiled now into an archive."""
    print(
        f"compiled objects: {objects.pack(archive, LIBRARIES, TRITON, facts) / 2**20:.1f} MiB in {archive}", flush=True
    )


def build(architecture: str) -> str | None:
    """Builds the libraries into ``ddst/_lib`` by setup.py; the end of the compiler's output where that fails."""
    log = ROOT / "build" / "gpu-build.log"
    log.parent.mkdir(exist_ok=True)
    started = time.monotonic()
    print(f"building the libraries in {ROOT} (output: {log}) …", flush=True)
    # The CUDA kernels for this architecture alone.
    environment = {"DDST_CUDA_ARCHS": f"{architecture.removeprefix('sm_')}-real", **os.environ}
    with log.open("w") as output:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        return f"the build failed with exit code {code}:\n" + "\n".join(log.read_text().splitlines()[-30:])
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)
    return None


def said(trouble: str, code: int) -> int:
    """Says what the trouble is; returns the exit code."""
    print(f"make gpu: {trouble}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    started = time.monotonic()
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(argv)  # before minutes are spent on a wrong option
    if arguments.prebuild is None:
        trouble = no_gpu()
        if trouble is not None:
            return said(trouble, NO_GPU)
    facts = objects.facts_of(ROOT, arguments.prebuild or architecture())
    if arguments.anew or arguments.prebuild is not None:
        shutil.rmtree(TRITON, ignore_errors=True)
    compiled = not arguments.anew and arguments.prebuild is None and prebuilt(arguments.objects, facts)
    if not compiled:
        trouble = build(facts["architecture"])
        if trouble is not None:
            return said(trouble, CANNOT_BUILD)
        keep(arguments.objects, facts)  # at once: the rest of the call may be cut off
    if arguments.prebuild is not None:
        return 0
    os.environ["TRITON_CACHE_DIR"] = str(TRITON)
    budget = arguments.budget or (PREBUILT_BUDGET if compiled else BUDGET)
    from ddst.benchmarks.gpu.__main__ import main as measure

    code = measure([*argv, "--budget", str(budget)], time.monotonic() - started)
    keep(arguments.objects, facts)
    return code


if __name__ in ("__main__", "__mp_main__"):  # the second: a worker process, which imports the main program again
    sys.meta_path.insert(0, WorkingTree())

if __name__ == "__main__":
    sys.exit(main())
