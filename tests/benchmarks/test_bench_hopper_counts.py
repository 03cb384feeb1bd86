"""What loops of machine code are expected to issue, and the counts of the kernels for sm_90a beside their goals."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest

from ddst import _extension
from ddst.benchmarks import hopper_counts, hopper_odds, sass
from ddst.benchmarks.sass import Branch, Code
from ddst.ops.cuda import hopper, hopper_weight_grad, weight_grad, weight_grad_units
from helpers import cuda_resources, recorded

#: A loop over slices that waits, and an inner one over taps, of which some have a product.
LISTING = """
        Function : example
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
                                                                          /* 0x003fde0000000f00 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R6 ;
        /*0020*/              @!P0 BRA 0xb0 ;
        /*0030*/                   LDS R2, [R3] ;
        /*0040*/               @P1 BRA 0x70 ;
        /*0050*/                   UIADD3 UR4, UR4, 0x20, URZ ;
        /*0060*/                   HGMMA.64x16x16.F32.BF16 R24, R156, gdesc[UR16], R24, gsb0 ;
        /*0070*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0080*/              @!P2 BRA 0x30 ;
        /*0090*/               @P3 BRA.U UP0, 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R6 ;
        /*00c0*/              @!P0 BRA 0xb0 ;
        /*00d0*/                   BRA 0x30 ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


@pytest.fixture
def example() -> Code:
    return Code(sass.instructions(LISTING))


def test_instructions_are_read(example: Code) -> None:
    assert len(example.instructions) == 15, "padding is left out"
    assert example.instructions[2] == (0x20, "@!P0", "BRA", "0xb0")
    assert [hex(block[0].address) for block in example.blocks] == [
        "0x0", "0x10", "0x30", "0x50", "0x70", "0x90", "0xa0", "0xb0", "0xd0", "0xe0",
    ]  # fmt: skip
    assert sass.target_of(example.instructions[9]) == 0x10 and sass.is_conditional(example.instructions[9])


def test_loops_are_found_from_the_inside(example: Code) -> None:
    heads = [(example.blocks[head][0].address, len(body)) for head, body in example.loops]
    assert heads == [(0xB0, 1), (0xE0, 1), (0x30, 3), (0x10, 7)]
    assert example.loop_around(sass.Instruction.is_product)[0] == 1
    waits = example.loops_around(sass.Instruction.is_wait, innermost=True)
    assert [example.blocks[head][0].address for head, _ in waits] == [0xB0]
    with pytest.raises(ValueError, match="no loop holds"):
        example.loop_around(sass.Instruction.is_tensor_copy)


def test_expected_executions_follow_from_the_odds(example: Code) -> None:
    seen: list[Branch] = []

    def odds(branch: Branch) -> float:
        seen.append(branch)
        return {0x20: 0.0, 0x40: 0.75, 0x80: 0.9, 0x90: 1.0, 0xC0: 0.5}[branch.at.address]

    loop = example.loop_around(sass.Instruction.is_product)
    visits = example.visits(loop, odds)
    assert {example.blocks[n][0].address: round(v, 6) for n, v in visits.items()} == {
        0x10: 1, 0x30: 10, 0x50: 2.5, 0x70: 10, 0x90: 1, 0xB0: 0, 0xD0: 0,
    }  # fmt: skip
    assert example.issued(loop, odds) == pytest.approx(2 + 10 * 2 + 2.5 * 2 + 10 * 2 + 1)
    assert example.issued(loop, odds, sass.Instruction.is_product) == pytest.approx(2.5)
    product, wait, last = seen[1], seen[0], seen[2]
    assert product.counts("HGMMA") == (0, 1) and (product.depth, product.back) == (1, False)
    assert wait.counts("SYNCS") == (1, 0)
    assert (last.back, last.leaves, last.depth) == (True, False, 1)


def test_odds_refuse_what_they_do_not_know(example: Code) -> None:
    loop = example.loop_around(sass.Instruction.is_product)
    with pytest.raises(
        hopper_odds.UnknownBranchError, match="the branch at 0x40 passes over 2 instructions, of them 1"
    ):
        example.visits(loop, hopper_odds.of_consumers(hopper_odds.Mask(0.1), 1))


def test_masks() -> None:
    mask = hopper_odds.Mask(0.1)
    assert mask.active == pytest.approx(7.2) and mask.active_taps == pytest.approx(9 * (1 - 0.9**8))
    for united in (1, 4):
        odds = mask.count_odds(united)
        assert sum(odds) == pytest.approx(1)
        expected = 72 * mask.any_of(united)
        assert sum(n * p for n, p in enumerate(odds)) == pytest.approx(expected)


def test_bytes_are_patches_once_a_tile_and_weights_once_a_cluster() -> None:
    assert hopper_counts.patch_pixels(32, 32) == 32 * 32
    assert hopper_counts.patch_pixels(16, 16) == 34 * 34
    plan = hopper.Plan(1, 16, 16, 18, 18, tiles=256, groups=2, slices=16, stages=4, record_ints=88, shared_bytes=0)
    bytes_, floor = hopper_counts.gather_bytes(plan, 0.1, hopper.Form(1, 2))
    assert floor == pytest.approx(34 * 34 * 64 * 512 * 2 + 256 * 16 * 7.2 * 512)
    assert bytes_ - floor == pytest.approx(512 * 16 * 88 * 4)


def _kernels() -> dict[str, Code]:
    if not _extension.CUDA_LIBRARY.is_file():
        pytest.skip("built without libddst_cuda.so")
    try:
        return hopper_counts.code_of([_extension.CUDA_LIBRARY])
    except ValueError as error:
        pytest.skip(str(error))


def test_counts_reach_their_goals_and_are_what_the_model_goes_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = (hopper_counts, hopper_odds, sass, hopper, hopper_weight_grad, weight_grad, weight_grad_units)
    files = [Path(__file__), *(Path(str(module.__file__)) for module in counted)]
    kernels = (cuda_resources.key(arch) for arch in ("sm_90", "sm_90a"))
    with recorded.outcome("sass: counts of the kernels for sm_90a", recorded.digest(*files, *kernels)):
        code = _kernels()
        if not any(name.startswith("hopper_") for name in code):
            pytest.skip("libddst_cuda.so holds no code for sm_90a")
        forms = cycle(hopper.FORMS)
        for row in hopper_counts.gather_rows(code):
            name, density, form, goal, mean, busiest = *row[:2], next(forms), *row[7:10]
            assert mean <= goal, row
            if name == "forward":
                assert abs(hopper.slice_slots(form, float(str(density).rstrip("%")) / 100, 16, 9) - busiest) <= 15, row
        assert all(row[-1] == "yes" for row in [*hopper_counts.bytes_rows(), *hopper_counts.weight_grad_rows(code)])
        monkeypatch.setattr(hopper_counts, "code_of", lambda files: code)  # which takes half a minute
        assert hopper_counts.main([]) == 0
        assert "Bytes from L2" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"hopper-counts: no .*nothing.so"):
        hopper_counts.main(["--code", str(tmp_path / "nothing.so")])
    (tmp_path / "empty.cubin").touch()
    monkeypatch.setattr(hopper_counts, "listings", lambda *_: {})
    with pytest.raises(SystemExit, match=r"no kernel .*conv2d_gather.* build with 90-real"):
        hopper_counts.main(["--code", str(tmp_path / "empty.cubin")])
