"""Loading of the compiled library, what it says about itself, and the host module beside its Python twin."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ddst
from ddst import _extension, _host
from helpers.dense import topology_of

ROOT = Path(ddst.__file__).resolve().parents[1]


def test_build_info_describes_the_loaded_library() -> None:
    facts = ddst.build_info()
    assert Path(facts["library"]) == Path(ddst.__file__).parent / "_lib" / "libddst.so"
    assert facts["compiler"].startswith(("gcc ", "clang "))
    assert facts["build_type"] == "Release"
    assert facts["torch_abi_target"] == "0x020a000000000000"
    assert tuple(map(int, facts["torch_headers"].split(".")[:2])) >= (2, 11)
    assert facts["cpu_capability"] in ("portable", "avx2", "avx512", "neon")
    assert facts["cuda"] == ("yes" if _extension.CUDA_LIBRARY.is_file() else "no")
    assert (facts["cuda"] == "no") == (facts["cuda_architectures"] == "none")
    assert facts["cuda_loaded"] == ("yes" if facts["cuda"] == "yes" and torch.version.cuda else "no")
    assert facts["torch"] == torch.__version__
    assert facts["host"] == _host.IMPLEMENTATION == _host.build_info()["implementation"]


@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source tree")
def test_sources_compile_against_the_headers_of_the_oldest_torch() -> None:
    """As far as macros tell, of which newer headers have more: ``make gpu`` builds against whatever torch is there."""
    in_2_11 = "AOTI_TORCH_SUCCESS STABLE_TORCH_LIBRARY STABLE_TORCH_LIBRARY_FRAGMENT STABLE_TORCH_LIBRARY_IMPL"
    in_2_11 += " STD_TORCH_CHECK TORCH_BOX TORCH_VERSION"
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.[chp]*"))
    used = set(re.findall(r"\b(?:AOTI|STABLE|STD_TORCH|TORCH)_[A-Z_]+\b", sources))
    assert "TORCH_BOX" in used and used <= set(in_2_11.split())


@pytest.mark.parametrize("library", sorted(_extension.LIBRARY.parent.glob("*.so")), ids=lambda path: path.name)
def test_libraries_name_no_file_of_the_machine_that_built_them(library: Path) -> None:
    """Torch's headers put their own place into messages."""
    sources = re.findall(rb"[\x20-\x7e]+\.(?:c|h|cu)(?:c|h|pp|uh)?\x00", library.read_bytes())
    assert sources or library != _extension.LIBRARY
    assert not [name for name in sources if b"/" in name and name.lstrip().startswith(b"/")]


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1", "2.13.0+cpu", "3.0.1"])
def test_new_enough_torch(version: str) -> None:
    _extension.check_torch(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.9.0", "2.10.2+cu130"])
def test_too_old_torch(version: str) -> None:
    with pytest.raises(ImportError, match="torch >= 2.11, found " + version.replace("+", r"\+")):
        _extension.check_torch(version)


def test_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"no .*libddst\.so.*pip install --no-build-isolation -e") as caught:
        _extension.load(tmp_path / "libddst.so")
    assert "make demo" not in str(caught.value)  # It trains, too.


def test_broken_library_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "libddst.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"libddst\.so does not load into torch"):
        _extension.load(broken)


built_with_cuda = pytest.mark.skipif(not _extension.CUDA_LIBRARY.is_file(), reason="built without libddst_cuda.so")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The libraries that are asked for, none of which is loaded."""
    asked: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", asked.append)
    return asked


@pytest.mark.parametrize("cuda", [None, "13.0"])
@pytest.mark.parametrize("built", [False, True])
def test_cuda_kernels_are_loaded_where_torch_has_cuda(
    loads: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: bool, cuda: str | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    kernels = tmp_path / "libddst_cuda.so"
    if built:
        kernels.touch()
    _extension.load(cuda_library=kernels)
    assert loads == [_extension.LIBRARY, *([kernels] if built and cuda else [])]


def test_broken_cuda_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    broken = tmp_path / "libddst_cuda.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"libddst_cuda\.so does not load into torch"):
        _extension.load(cuda_library=broken)


@built_with_cuda
def test_cuda_library_loads_into_any_torch() -> None:
    """Nothing of libtorch_cuda is linked; without CUDA tensors its operators find no kernel."""
    code = """if True:
        import torch, ddst
        from ddst import _extension
        torch.ops.load_library(_extension.CUDA_LIBRARY)
        assert _extension.cuda_kernels_loaded() and ddst.build_info()["cuda_loaded"] == "yes"
        torch.ops.ddst_cuda.conv2d_gather.default
        x, index = torch.zeros(1, 16, 4, 4), torch.zeros(1, dtype=torch.int32)
        geometry = [16, 16, 1, 1], [16, 16], [1, 1], [0, 0], [1, 1], [1, 1], [1, 4, 4], 1, True
        try:
            torch.ops.ddst_cuda.conv2d_weight_grad(
                x, x, index, index, index, index, *geometry, False, None, None, None, 0.0, 1, 1
            )
        except NotImplementedError as error:
            assert "'ddst_cuda::conv2d_weight_grad' with arguments from the 'CPU' backend" in str(error)
        else:
            raise AssertionError
    """
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_import_without_the_library_fails(tmp_path: Path) -> None:
    """Never a silent fallback: unbuilt sources cannot be imported."""
    sources = Path(ddst.__file__).parent
    shutil.copytree(sources, tmp_path / "ddst", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ddst"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1
    assert "ImportError: ddst's compiled library is missing" in run.stderr


IMPLEMENTATIONS = {_host.topology_of_slots, _host.topology_of_slots_python}
if _host.IMPLEMENTATION == "pybind11":
    IMPLEMENTATIONS.add(_host._HOST.topology_of_slots)  # type: ignore[union-attr]
each_implementation = pytest.mark.parametrize("build", sorted(IMPLEMENTATIONS, key=str))


@st.composite
def placed(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int, int]]:
    """(slot_blocks, grid): any blocks of the grid in any order, free slots anywhere among them."""
    grid = draw(st.tuples(st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 1, 2, 9])))
    ranks = draw(st.lists(st.integers(0, math.prod(grid) - 1), unique=True, max_size=40))
    free = draw(st.integers(0, 5))
    return np.array(draw(st.permutations(ranks + [-1] * free)), np.int32), grid


@each_implementation
@given(problem=placed())
def test_topology_of_slots_is_the_documented_vector(build, problem: tuple[np.ndarray, tuple[int, int, int]]) -> None:
    slot_blocks, grid = problem
    built = build(slot_blocks, *grid)
    assert built.dtype == np.int32 and built.flags.c_contiguous
    assert built.tolist() == topology_of(torch.from_numpy(slot_blocks), grid).tolist()


@each_implementation
def test_slots_of_any_stride(build) -> None:
    slot_blocks = np.random.default_rng(0).permutation(60).astype(np.int32)
    turned = slot_blocks[::-2]
    assert build(turned, 5, 4, 3).tolist() == build(turned.copy(), 5, 4, 3).tolist()


@each_implementation
@pytest.mark.parametrize(
    ("slot_blocks", "grid", "error", "message"),
    [
        ([0], (2, 2, 1), TypeError, "slot_blocks must be an int32 array, got list"),
        (np.zeros(1), (2, 2, 1), TypeError, "slot_blocks must be an int32 array, got dtype float64"),
        (np.zeros(1, np.int64), (2, 2, 1), TypeError, "slot_blocks must be an int32 array, got dtype int64"),
        (np.zeros(1, ">i4"), (2, 2, 1), TypeError, "slot_blocks must be an int32 array, got dtype >i4"),
        (np.zeros((1, 1), np.int32), (2, 2, 1), ValueError, r"slot_blocks must have the shape \[slots\], got \(1, 1\)"),
        (
            np.array([0, 4], np.int32),
            (2, 2, 1),
            ValueError,
            "slot_blocks must hold ranks below 4, or -1, got 4 in slot 1",
        ),
        (np.array([-2], np.int32), (2, 2, 1), ValueError, "slot_blocks must hold ranks .* got -2 in slot 0"),
        (
            np.array([-(2**31)], np.int32),
            (2, 2, 1),
            ValueError,
            "slot_blocks must hold ranks .* got -2147483648 in slot 0",
        ),
        (
            np.array([5, 3, -1, -1, 5], np.int32),
            (2, 2, 2),
            ValueError,
            "slot_blocks must hold each block once, got 5 in the slots 0 and 4",
        ),
        (np.zeros(0, np.int32), (0, 2, 1), ValueError, r"rows, cols and taps must be at least 1, got \(0, 2, 1\)"),
        (np.zeros(0, np.int32), (2, 2, -1), ValueError, r"rows, cols and taps must be at least 1, got \(2, 2, -1\)"),
        (np.zeros(0, np.int32), (2**16, 2**16, 1), ValueError, "more blocks than int32 can index"),
        (np.zeros(0, np.int32), (2**16, 2**14, 9), ValueError, "more blocks than int32 can index"),
    ],
)
def test_bad_slots(build, slot_blocks: object, grid: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(slot_blocks, *grid)
