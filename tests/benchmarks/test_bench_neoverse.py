"""Which loop of a function the model of Neoverse V2 is asked about, and what it says of the kernels."""

from __future__ import annotations

import shutil

import pytest

from ddst.benchmarks import neoverse
from helpers import scale

ASSEMBLY = """\
_ZN4ddst3cpu12_GLOBAL__N_111gather_tileIfLi4ELi2ELi12ELi8EEEvPKPKc:
.LFB1:
\t.cfi_startproc
\tmov\tx1, 0
.L2:
\tldr\tx0, [x10], 16
.L3:
\tldr q0, [x0, 0]
\tfmla\tv1.4s, v2.4s, v0.s[0]
\tfmla\tv3.4s, v2.4s, v0.s[1]
\tsubs\tw3, w3, #1
\tbne\t.L3
\tcmp\tx10, x11
\tbne\t.L2
.L4:
\tfmla\tv1.4s, v2.4s, v0.s[0]
\tcbnz\tx5, .L4
\tret
\t.size\t_ZN4ddst3cpu12_GLOBAL__N_111gather_tileIfLi4ELi2ELi12ELi8EEEvPKPKc, .-_ZN4ddst
"""


def test_the_hot_loop_of_a_function() -> None:
    functions = neoverse.tile_functions(ASSEMBLY)
    assert list(functions) == ["gather_tile<float, 4, 2, 12, 8>"]
    (lines,) = functions.values()
    inner, entries = neoverse.hot_loop(lines), neoverse.hot_loop(lines, entries=True)
    assert [line.split()[0] for line in inner] == ["ldr", "fmla", "fmla", "subs", "bne"]
    assert entries[1:-2] == inner and neoverse.multiply_adds(entries) == 2


def test_missing_programs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no some-compiler: apt-get install g\\+\\+-aarch64-linux-gnu llvm-19"):
        neoverse.main(["--cxx", "some-compiler"])


def test_neon_loops_issue_nine_tenths_of_what_the_processor_can() -> None:
    """A figure of the model, not of a clock."""
    if not scale.everything():
        pytest.skip("compiles for a minute: make test-arm or make test-all")
    cxx, mca = "aarch64-linux-gnu-g++", "llvm-mca-19"
    if shutil.which(cxx) is None or shutil.which(mca) is None:
        pytest.skip(f"needs {cxx} and {mca}: apt-get install g++-aarch64-linux-gnu llvm-19")
    found = {loop.name: (portable, neon) for loop, portable, neon in neoverse.rates(cxx, mca)}
    # Each multiply-add of the first needs a load of its own, and there are three a cycle.
    load_bound = {name for name in found if "1 channel, few pixels" in name}
    assert len(load_bound) == 1
    for name, (portable, neon) in found.items():
        assert neon >= (2.7 if name in load_bound else 3.6), name
        assert portable is None or portable < neon
