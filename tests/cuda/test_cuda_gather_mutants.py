"""Small slips planted in the gather kernels, one at a time: the emulator's checks and a float64 reference find each."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import emulation, recorded

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
OPTIONS = ("-std=c++20", "-O0", "-w")
FLAGS = (*OPTIONS, f"-I{emulation.KERNELS}", f"-I{emulation.TESTS}")
MUTATIONS = {
    "conv2d_gather.cuh": [
        ("wait too weak", "cp_async_wait<kStages - 2>", "cp_async_wait<kStages - 1>"),
        ("no barrier", "dev::sync_threads();  // slice", "// slice"),
        ("copies too far ahead", "copy_slice(i + kStages - 1);", "copy_slice(i + kStages);"),
        ("records too late", "kAhead = 2 * kStages - 2", "kAhead = 2 * kStages - 3"),
    ],
    "gather_stage.cuh": [
        ("channels beyond the last", "inside = channel < p.g.in_channels", "inside = true"),
        ("right edge", "x < g.in_width", "x <= g.in_width"),
        ("columns not sorted", "column % g.patch_half * g.step_x + column / g.patch_half", "column"),
        ("origin of a phase", "(phase + padding) / phases - reach", "phase + padding / phases - reach"),
        ("phase of the taps", "(place.phase_y + g.padding_y) % g.phases_y", "place.phase_y"),
        ("slice of a block", "(slice & ((1 << p.g.log_slices_per_block) - 1)) * kSlice", "0"),
        ("granule of a block", " + line / kSlice * kSlice", ""),
        ("no swizzle", "(chunk ^ (row / (8 / kChunks) % kChunks))", "chunk"),
    ],
    "gather_multiply.cuh": [
        ("halves of a granule", "lane / 16 * 8 + lane % 8, lane / 8 % 2", "lane / 8 % 2 * 8 + lane % 8, lane / 16"),
        ("tf32 transposed", "k * 8 + i % 2 * 4 + lane % 4", "k * 8 + i / 2 * 4 + lane % 4"),
        ("next granule", "granule + (mask >> o > 1 ?", "granule + (mask >> o > 0 ?"),
        ("granules of a skipped tap", "granule = granule + dev::pop", "if (first) granule = granule + dev::pop"),
        ("second tile alone", "multiply_tap<Traits, 1, 1>", "multiply_tap<Traits, 0, 1>"),
    ],
    "tf32x3.cuh": [
        ("a product left out", "dev::mma_m16n8k8_tf32(c, a.finite, b.low);", ""),
        ("rest of nothing", "value - dev::float_of(high[i])", "value"),
    ],
    "gather_epilogue.cuh": [
        ("taps of a tile", "lanes < 16; lanes *= 2", "lanes < 8; lanes *= 2"),
        ("output phase", "(place.first_row + pixel.row) * g.phases_y + place.phase_y", "place.first_row + pixel.row"),
        ("channels beyond the last", "mine >= 0 && first < channels", "mine >= 0"),
    ],
}  # fmt: skip
HOPPER = {
    "hopper_gather.cuh": [
        ("rows of ldmatrix", "lane / 16 * 16;", "lane / 8 % 2 * 16;"),
        ("part of a tap", "dy % g.step_y * g.parts_x + dx % g.step_x", "dx % g.step_x"),
        ("the other CTA is not told", "dev::cluster_rank() ^ 1", "dev::cluster_rank()"),
        ("consumers of this CTA alone", "kHopperConsumers / 32 * Traits::kCluster", "kHopperConsumers / 32"),
    ],
    "hopper_gather_copy.cuh": [
        ("stages are not waited for", "s.empty + stage.index, stage.parity ^ 1", "s.empty + stage.index, 1"),
        ("parity of records", "s.listed + record.index, record.parity", "s.listed + record.index, 0"),
        ("ring of records", "at.next(p.g.stages + kRecordsAhead)", "at.next(p.g.stages)"),
        ("bytes of a patch", "any ? p.g.copied_bytes : 0", "p.g.copied_bytes"),
        ("begin of a patch", "left + x, top + y", "left + y, top + x"),
        ("slices of a block", "chunk = Traits::kTransposed ? 0 : within", "chunk = 0"),
        ("bytes of columns", "taps * p.g.copied_bytes", "p.g.copied_bytes"),
        ("first pixel of columns", "item.place.first_col = int(pixel % g.out_width)", "item.place.first_col = 0"),
        ("height and width of an offset", "{both & 0xffff, both >> 16}", "{both >> 16, both & 0xffff}"),
        ("record of the second slice", "(slice + i) >> p.g.log_slices_per_block", "slice >> p.g.log_slices_per_block"),
        ("blocks of the second slice", "(p, slice + i, blocks", "(p, slice, blocks"),
        ("a CTA ends before the last arrivals", "drain_stages<Traits>(p, s, after);", ";"),
        ("turns of the CTAs", "first += 4 * Traits::kCluster", "first += 4"),
    ],
    "hopper_gather_multiply.cuh": [
        ("no swizzle", "place ^ (place >> 3 & (Traits::kSlotBytes - 16))", "place"),
        ("swizzle of 32 channels", "Traits::kSlotBytes - 16", "16"),
        ("channels of the second slice", "lane_place + i * kSlice * 2", "lane_place"),
        ("pixels of the next tap", "lane_place += kHopperPixels * Traits::kSlotBytes;", ""),
        ("8 rows of a granule", "kGranuleBytes, kGranuleBytes / 2)", "kGranuleBytes, kGranuleBytes)"),
        ("granules of four", "granule + Traits::kWidth * kGranuleBytes", "granule + kGranuleBytes"),
        ("wait too weak", "dev::wgmma_wait<0>();\n    return true", "dev::wgmma_wait<1>();\n    return true"),
        ("registers of one tap", "step(even, odd) && step(odd, even)", "step(even, even) && step(even, even)"),
    ],
    "hopper_gather_geometry.hpp": [
        ("stride of the columns", "map.steps[1] = g.step_x", "map.steps[1] = 1"),
        ("records of two items", "kRecordsAhead) * g.depth", "kRecordsAhead - 1) * g.depth"),
        ("last column of an image", "(out - 1) * step + origin - (in - 1)", "out * step + origin - (in - 1)"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("program", "mutations"), [("mutant_gather.cpp", MUTATIONS), ("mutant_hopper_gather.cpp", HOPPER)]
)
def test_slips_are_found(tmp_path: Path, program: str, mutations: dict[str, list[tuple[str, str, str]]]) -> None:
    with recorded.outcome(f"emulator: slips, {program}", emulation.key(Path(__file__), *OPTIONS)):
        plant(tmp_path, program, mutations)


def plant(tmp_path: Path, source: str, mutations: dict[str, list[tuple[str, str, str]]]) -> None:
    common = tmp_path / "common.hpp"  # precompiled: what no mutation changes
    includes = ("<random>", "<vector>", '"check.hpp"', '"device/hopper.cuh"')
    common.write_text("".join(f"#include {name}\n" for name in includes))
    cxx = emulation.compiler()
    subprocess.run([cxx, *FLAGS, "-x", "c++-header", common, "-o", f"{common}.gch"], check=True)

    def outcome(file: str, old: str, new: str) -> str:
        """The first thing that is found, empty if nothing is."""
        folder = tmp_path / f"{file}-{abs(hash((old, new)))}"
        folder.mkdir()
        for header in (
            *emulation.KERNELS.glob("*gather*"),
            *(emulation.KERNELS / n for n in ("ddst_cuda.h", "tf32x3.cuh")),
        ):
            shutil.copy(header, folder)
        for helper in emulation.TESTS.glob("*gather*"):
            shutil.copy(helper, folder)
        text = (folder / file).read_text()
        assert old in text, f"{file} has no {old!r}"
        (folder / file).write_text(text.replace(old, new, 1))
        program = folder / "program"
        command = [cxx, f"-I{folder}", *FLAGS, "-include", common, folder / source, "-o", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:2000]
        ran = subprocess.run([program], capture_output=True, text=True, check=False)
        lines = [line for line in (ran.stdout + ran.stderr).splitlines() if "FAIL" in line or "what()" in line]
        return (lines[0] if lines else f"exit status {ran.returncode}") if ran.returncode else ""

    slips = [("ddst_cuda.h", "#pragma once", "#pragma once")]  # no slip: nothing may be found
    slips += [(file, old, new) for file, changes in mutations.items() for _, old, new in changes]
    names = ["unchanged", *(f"{file}: {name}" for file, changes in mutations.items() for name, _, _ in changes)]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(names, pool.map(lambda slip: outcome(*slip), slips), strict=True))
    print("\n".join(f"{name:50s} {what}" for name, what in found.items()))
    assert found.pop("unchanged") == ""
    assert [name for name, what in found.items() if not what] == []
