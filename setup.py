"""Builds ddst's compiled libraries with CMake and ninja, and says which folder is which package.

Metadata and the version stand in pyproject.toml. Environment variables:

* ``MAX_JOBS``: compilers at once (default: one per core).
* ``DDST_BUILD_TYPE``: CMake's build type (default: Release).
* ``DDST_BUILD_CUDA``: 1 builds ``libddst_cuda.so`` and fails without a CUDA compiler (nvcc 12.8 or later on PATH, or
  ``CUDACXX``), 0 leaves it out; unset: it is built where nvcc is found.
* ``DDST_CUDA_ARCHS``: what it holds code for (default: ``80-real;90-real;100-real;100-virtual``).
* ``DDST_EXTRA_PYTHONS``: further interpreters, separated like PATH, to build the pybind11 module for.
* ``DDST_PLAT``: the wheel's platform tag (default: this machine's).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# A fixed place: setuptools gives each editable install a new temporary folder, and would compile everything again.
BUILD = ROOT / "build" / f"cmake-{sysconfig.get_platform()}"


def torch_include() -> Path:
    """Header folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("ddst: torch is needed to build (its headers): install it first, for example torch==2.13.0")
    return Path(spec.submodule_search_locations[0]) / "include"


def tool(name: str) -> str:
    """The program from its Python package, as that may lie outside PATH in a virtual environment, else from PATH."""
    path = os.environ.get("PATH", "")
    if importlib.util.find_spec(name) is not None:
        module = importlib.import_module(name)
        path = os.pathsep.join([getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR, path])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"ddst: {name} is needed to build: pip install {name}")
    return found


def host_pythons() -> list[str]:
    """``<header folder>|<EXT_SUFFIX>`` of every CPython to build the pybind11 module for.

    The running one is left out, with a message, where its headers are not installed (ddst._host then runs in Python);
    one that was asked for by name must have them.
    """
    query = "import sysconfig as s; print(s.get_paths()['include'] + '|' + s.get_config_var('EXT_SUFFIX'))"
    extra = [p for p in os.environ.get("DDST_EXTRA_PYTHONS", "").split(os.pathsep) if p]
    specs: list[str] = []
    for python in [sys.executable, *extra]:
        spec = subprocess.check_output([python, "-c", query], text=True).strip()
        include = spec.split("|")[0]
        if not Path(include, "Python.h").is_file():
            if python in extra:
                sys.exit(f"ddst: DDST_EXTRA_PYTHONS names {python}, but {include} holds no Python.h")
            print(f"ddst: {include} holds no Python.h: ddst._host will run in Python, without its compiled module")
        elif spec not in specs:
            specs.append(spec)
    return specs


def build_cuda() -> str:
    """CMake's ``DDST_BUILD_CUDA``."""
    asked = os.environ.get("DDST_BUILD_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"ddst: DDST_BUILD_CUDA must be 0, 1 or unset, got {asked!r}")
    return {"": "AUTO", "0": "OFF", "1": "ON"}[asked]


class CMakeBuild(build_ext):
    """Runs CMake, and puts what it installs into ``ddst/_lib``."""

    _outputs: list[str]

    def compile(self) -> list[Path]:
        import pybind11

        cache = BUILD / "CMakeCache.txt"
        if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(BUILD)  # a copied or moved tree: CMake refuses the old cache
        cmake, installed = tool("cmake"), BUILD / "install"
        arguments = {
            # Passed every time: an isolated build's paths are gone at the next one, and CMake's cache keeps them.
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_INSTALL_PREFIX": installed,
            "CMAKE_BUILD_TYPE": os.environ.get("DDST_BUILD_TYPE", "Release"),
            "DDST_TORCH_INCLUDE": torch_include(),
            "DDST_PYBIND11_INCLUDE": pybind11.get_include(),
            "DDST_PYTHONS": ";".join(host_pythons()),
            "DDST_BUILD_CUDA": build_cuda(),
            "DDST_CUDA_ARCHS": os.environ.get("DDST_CUDA_ARCHS") or "80-real;90-real;100-real;100-virtual",
        }
        definitions = [f"-D{name}={value}" for name, value in arguments.items()]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call([cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *definitions])
        subprocess.check_call([cmake, "--build", str(BUILD), "-j", jobs])
        shutil.rmtree(installed, ignore_errors=True)  # a module of a Python no longer asked for must not stay
        subprocess.check_call([cmake, "--install", str(BUILD)])
        return sorted(installed.glob("*.so"))

    def run(self) -> None:
        libraries = self.compile()
        package = ROOT / "ddst" if self.inplace else Path(self.build_lib).resolve() / "ddst"
        target = package / "_lib"
        target.mkdir(parents=True, exist_ok=True)
        for old in target.glob("*.so"):
            old.unlink()
        for library in libraries:
            # A new file each time: a running process keeps the one it has mapped.
            shutil.copy2(library, target / library.name)
        self._outputs = [str(target / library.name) for library in libraries]

    # The extension has no file of its own name, which is what setuptools would look for.
    def get_outputs(self) -> list[str]:
        return [] if self.inplace else getattr(self, "_outputs", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    """Starts from an empty ``build/lib…``: setuptools keeps files there whose sources are gone, and packs them."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """Tag py3-none: the libraries know no Python, and _host, one file per CPython, has a twin in Python."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", os.environ.get("DDST_PLAT") or super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["ddst", "ddst.*"], exclude=["ddst._command"]),
        "run_ddst",
        "ddst.benchmarks",
        *(f"ddst.benchmarks.{name}" for name in find_packages("benchmarks")),
        "ddst.kernels",
        *(f"ddst.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"run_ddst": "ddst/_command", "ddst.benchmarks": "benchmarks", "ddst.kernels": "kernels"},
    ext_modules=[Extension("ddst._lib._native", sources=[])],
    cmdclass={"build": Build, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
    zip_safe=False,
)
