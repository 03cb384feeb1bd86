"""The wheel: its tag, what it holds, what its library needs, and a layer run from it in an empty environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import ddst
from ddst import _extension

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# What `pip install ddst` brings besides torch and numpy: nothing. The layers must do without these.
TRAIN_ONLY = ["sklearn", "matplotlib", "PIL", "tqdm", "safetensors"]

LAYER = f"""
import sys
sys.modules.update(dict.fromkeys({TRAIN_ONLY!r}))  # None: as if not installed
import importlib.util
import torch
import ddst, ddst.benchmarks
layer = ddst.SparseConv2d(32, 32, 3, padding=1, density=0.5, block=(16, 16))
image = torch.randn(2, 32, 8, 8, requires_grad=True)
output = layer(image)
dense = torch.nn.functional.conv2d(image, layer.dense_weight(), layer.bias, padding=1)
torch.testing.assert_close(output, dense)
output.square().sum().backward()
assert layer.values.grad.shape == layer.values.shape and image.grad.shape == image.shape
assert importlib.util.find_spec("benchmarks") is None  # installed as ddst.benchmarks only
print(ddst.__version__, ddst.__file__, ddst.benchmarks.__file__, ddst.build_info()["library"], sep="\\n")
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Output of a command that must succeed, run without this process's Python settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout, with its build folder and for its architectures: only what changed is compiled."""
    architectures = ddst.build_info()["cuda_architectures"].partition(" by ")[0].split()
    variables = {} if architectures == ["none"] else {"DDST_CUDA_ARCHS": ";".join(architectures)}
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    run(*command, cwd=folder, **variables)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and nothing else; torch and numpy are reached through a path file."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=home).strip())
    # A folder named in a .pth file is searched, but its own .pth files, such as an editable ddst's, do not run.
    (packages / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    return home


def test_one_file_for_every_python(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"ddst-{VERSION}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        facts = archive.read(f"ddst-{VERSION}.dist-info/WHEEL").decode()
    assert f"Tag: py3-none-{platform}\n" in facts
    assert "Root-Is-Purelib: false\n" in facts


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "ddst").rglob("*.py")}
    sources = {name.replace("ddst/_command/", "run_ddst/") for name in sources}  # what the program `ddst` starts with
    for folder in ("benchmarks", "kernels"):
        sources |= {f"ddst/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    data = {
        str(path.relative_to(ROOT))
        for kind in ("safetensors", "json", "j2")
        for path in (ROOT / "ddst").rglob(f"*.{kind}")
    }
    data |= {f"ddst/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.json")}
    compiled = {"ddst/_lib/libddst.so"}
    if Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        compiled.add(f"ddst/_lib/_host{sysconfig.get_config_var('EXT_SUFFIX')}")
    if _extension.CUDA_LIBRARY.is_file():  # this build's DDST_BUILD_CUDA and nvcc are those of the wheel's
        compiled.add("ddst/_lib/libddst_cuda.so")
    expected = sources | data | compiled | {"ddst/py.typed"}
    shipped = {name for name in names if not name.startswith(f"ddst-{VERSION}.dist-info/")}
    others = shipped - expected
    assert expected <= shipped
    # No headers of torch, tests or C++ sources: beyond the package there may only be _host of further Pythons.
    assert all(re.fullmatch(r"ddst/_lib/_host\.cpython-.*\.so", name) for name in others), others


@pytest.fixture(params=["libddst.so", "libddst_cuda.so"])
def library(request: pytest.FixtureRequest, wheel: Path, tmp_path: Path) -> str:
    """A library taken from the wheel."""
    if not (_extension.LIBRARY.parent / request.param).is_file():
        pytest.skip(f"built without {request.param}")
    with zipfile.ZipFile(wheel) as archive:
        return archive.extract(f"ddst/_lib/{request.param}", tmp_path)


def test_library_needs_torch_by_name_and_no_python(library: str, tmp_path: Path) -> None:
    dynamic = run("readelf", "--dynamic", "--wide", library, cwd=tmp_path)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name or "libc10" in name or "cud" in name]
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)


def test_library_asks_for_the_stable_abi_only(library: str, tmp_path: Path) -> None:
    undefined = run("nm", "--dynamic", "--undefined-only", library, cwd=tmp_path).split()
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not [name for name in undefined if re.search(r"N?K?(2at|3c10|5torch)\d", name)]


def test_layer_runs_from_the_wheel(environment: Path) -> None:
    printed = run(environment / "bin" / "python", "-c", LAYER, cwd=environment)
    version, *files = printed.splitlines()
    assert version == VERSION
    assert len(files) == 3
    assert all(Path(file).is_relative_to(environment) for file in files), files


def test_command_is_installed(environment: Path) -> None:
    assert "train" in run(environment / "bin" / "ddst", "--help", cwd=environment)


def test_source_distribution_holds_what_a_build_reads(tmp_path: Path) -> None:
    run(sys.executable, "-P", "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    with tarfile.open(tmp_path / f"ddst-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = [
        ("csrc", "*.[ch]*"),
        ("ddst", "*.py"),
        ("ddst", "*.safetensors"),
        ("ddst", "*.j2"),
        ("benchmarks", "*.py"),
        ("kernels", "*.py"),
        ("tests", "*.py"),
        ("cmake", "*.cmake"),
        ("docs", "*.md"),
        ("docs", "*.png"),
        ("tests/cpu", "*.[ch]*"),
        ("tests/cuda", "*.[ch]*"),
    ]
    expected = {str(path.relative_to(ROOT)) for folder, files in folders for path in (ROOT / folder).rglob(files)}
    expected |= {"setup.py", "CMakeLists.txt", "pyproject.toml", "Makefile", "README.md", "LICENSE", "ddst/py.typed"}
    assert expected <= names, expected - names
    assert not [name for name in names if name.endswith(".so")]
