"""What the kernels for sm_90a issue and move, counted in machine code, beside today's kernels and the targets.

    python -m ddst.benchmarks hopper-counts [--code FILE ...]

The layer is 256→256 3×3 at 32², batch 64, bf16, blocks of 16×16 at random places, on an H200. *Slots* are instructions
that one of a multiprocessor's four schedulers issues. Paths through the loops are weighted by the odds of their
branches (``hopper_odds.py``); a wait counts once, as what is waited for. *Bytes* come from the kernels' own plans.

Needs cuobjdump, and a library that was built by nvcc with 90-real (or 90a-real) among DDST_CUDA_ARCHS; ``--code`` reads
kernels from other files, such as cubins.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ddst import _extension
from ddst.ops.cuda import hopper, hopper_weight_grad, weight_grad
from ddst.ops.cuda.gather import Device, Window

from . import hopper_odds as odds
from .sass import Code, Instruction, instructions, listings

H200 = Device(132, 227 * 1024, (9, 0))
SHAPE, BLOCK, IMAGES, SIZE, DENSITIES = (256, 256, 3, 3), (16, 16), 64, 32, (0.1, 0.3)
TODAY = "conv2d_gather<GatherTraits<bf16, false, true, PlainSource> >"
GATHER = (
    "hopper_gather<HopperGatherTraits<bf16, {direction}, {form.granules}, {form.cluster}, HopperPlain, {form.depth}, "
    "{im2col}> >"
)
GRADIENTS = "weight_grad<bf16, Unit<16, 16> >", "hopper_weight_grad<bf16, Unit<16, 16> >"
SCHEDULERS, WARPS = 4, 8
PATCH_SLOTS = 340  # of today's tile of 8 x 32 pixels
#: Slots of a warp that docs/notes/cuda-gather.md went by: active and inactive granule, tap with and without, slice.
NOTED = (14, 2, 35, 10, 190)
#: Goals, as shares: of today's slots (gather, by density; weight gradient), of the floor of bytes.
GATHER_GOALS, WEIGHT_GRAD_GOAL, BYTES_GOAL = {0.1: 0.5, 0.3: 0.7}, 0.5, 1.15


class Slots(NamedTuple):
    """Of a scheduler, for a slice of a tile: in the mean, and of the one that a copying warp is on."""

    mean: float
    busiest: float


def noted_slots(density: float) -> float:
    """Today's slots of a slice by the costs in the notes.

    >>> round(noted_slots(0.1)), round(noted_slots(0.3))
    (1153, 1774)
    """
    mask = odds.Mask(density)
    active, inactive, tap, empty, copies = NOTED
    taps = mask.active_taps
    products = active * mask.active + inactive * (taps * mask.blocks - mask.active)
    return WARPS / SCHEDULERS * (products + tap * taps + empty * (mask.taps - taps) + copies)


def code_of(files: Sequence[Path]) -> dict[str, Code]:
    """The kernels of some files, by name; of a library for several architectures those for 9.0."""
    found: dict[str, Code] = {}
    for file in files:
        parts = listings(file) if file.suffix == ".cubin" else listings(file, "sm_90") | listings(file, "sm_90a")
        found |= {name: Code(instructions(listing)) for name, listing in parts.items() if "bf16" in name}
    return found


def today_slots(code: Code, density: float) -> float:
    """Today's slots of a slice, counted."""
    loop = code.loop_around(Instruction.is_product)
    return WARPS / SCHEDULERS * code.issued(loop, odds.of_today(odds.Mask(density), PATCH_SLOTS))


def hopper_slots(code: Code, density: float, form: hopper.Form, slices: int = 16) -> Slots:
    """Slots of a slice of the gather kernel for sm_90a."""
    mask, depth = odds.Mask(density), form.depth
    consumer = code.issued(
        code.loops_around(Instruction.is_product, Instruction.is_wait)[0],
        odds.of_consumers(mask, form.granules, depth),
    )
    copies = mask.active_taps / mask.any_of(mask.blocks * mask.taps) if form.im2col else 1  # of a stage's pixels
    copiers = [
        code.issued(loop, odds.of_copiers(mask, form.granules, slices // depth, copies, form.cluster, depth))
        for loop in code.loops_around(Instruction.is_tensor_copy, Instruction.is_wait, innermost=True)
    ]
    mean = (WARPS * consumer + sum(copiers)) / SCHEDULERS
    return Slots(mean / depth, (WARPS / SCHEDULERS * consumer + max(copiers)) / depth)


def patch_pixels(rows: int, columns: int, halo: int = 1) -> int:
    """Pixels inside of the image that the patches of all its tiles hold."""

    def along(tile: int) -> int:
        return sum(min(SIZE, first + tile + halo) - max(0, first - halo) for first in range(0, SIZE, tile))

    return along(rows) * along(columns)


def gather_bytes(plan: hopper.Plan, density: float, form: hopper.Form) -> tuple[float, float]:
    """``(bytes from L2, their floor)`` of the whole layer: patches once a tile, active weights once a cluster."""
    patches = patch_pixels(plan.tile_rows, plan.tile_columns) * IMAGES * SHAPE[1] * 2 * plan.groups
    clusters = plan.tiles // form.cluster * plan.groups
    mask = odds.Mask(density)
    weights = clusters * plan.slices * mask.active * BLOCK[0] * BLOCK[1] * 2  # what is listed besides lies outside
    lists = plan.tiles * plan.groups * plan.slices * plan.record_ints * 4
    return patches + weights + lists, patches + weights


def weight_grad_slots(code: dict[str, Code], density: float) -> tuple[float, float]:
    """Slots of a scheduler for the whole layer: today's, and those of the kernel for sm_90a."""
    geometry = weight_grad.Geometry(IMAGES, (SIZE, SIZE), (SIZE, SIZE), SHAPE, BLOCK, (1, 1), (1, 1), (1, 1))
    slots = round(density * 16 * 16 * 9)
    device = weight_grad.Device(H200.multiprocessors, H200.shared_bytes)
    old = weight_grad.plan(geometry, slots, 2, device)
    new = hopper_weight_grad.plan(geometry, slots, 2, H200.multiprocessors, H200.shared_bytes)
    assert new is not None
    tiles = IMAGES * SIZE * SIZE / 64

    groups = weight_grad._expected_groups(geometry, density, old.band)
    threads = 256
    grad, patch = old.tile[1] * old.tile[2], weight_grad.patch_pixels(geometry, old.tile)
    trips = [
        pixels * (1 << (band * 2 - 1).bit_length()) / threads
        for pixels, band in ((grad, old.band[0]), (patch, old.band[1]))
    ]
    loop = code[GRADIENTS[0]].loop_around(Instruction.is_product)
    warp = code[GRADIENTS[0]].issued(
        loop, odds.of_weight_grad(slots / groups / 8, (max(1, trips[0]), max(1, trips[1])), grad // 16)
    )
    today = tiles * groups * 8 * warp

    groups = hopper_weight_grad.expected_groups(geometry, density, new.band)
    units = slots / groups / hopper_weight_grad.WARPS
    in_row = slots / groups / new.band[0]
    kernel = code[GRADIENTS[1]]
    consumer = kernel.issued(
        kernel.loop_around(Instruction.is_product), odds.of_hopper_weight_grad(units, 1 + (units - 1) / in_row)
    )
    boxes = [-(-band * 16 // 64) for band in new.band]
    copier = kernel.issued(
        kernel.loops_around(Instruction.is_tensor_copy, Instruction.is_wait, innermost=True)[0],
        odds.of_weight_grad_copier(boxes[0], boxes[1]),
    )
    mine = tiles * groups * (hopper_weight_grad.WARPS * consumer + copier)
    return today / H200.multiprocessors / SCHEDULERS, mine / H200.multiprocessors / SCHEDULERS


def reached(value: float, goal: float) -> str:
    """Yes or no."""
    return "yes" if value <= goal else "no"


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in cells]


def gather_rows(code: dict[str, Code]) -> list[list[object]]:
    """Direction, density and form; slots today, noted and counted; the goal; slots now."""
    rows: list[list[object]] = []
    for direction, name in (("false", "forward"), ("true", "input gradient")):
        for density in DENSITIES:
            noted, today = noted_slots(density), today_slots(code[TODAY], density)
            goal = GATHER_GOALS[density] * noted
            for form in hopper.FORMS:
                kernel = code[GATHER.format(direction=direction, form=form, im2col=str(form.im2col).lower())]
                mean, busiest = hopper_slots(kernel, density, form)
                pixels = "im2col" if form.im2col else f"patches of {16 * form.depth}"
                what = [name, f"{density:.0%}", 16 * form.granules, form.cluster, pixels]
                numbers = [round(n) for n in (noted, today, goal, mean, busiest)]
                rows.append([*what, *numbers, f"{reached(mean, goal)} / {reached(busiest, goal)}"])
    return rows


def bytes_rows() -> list[list[object]]:
    """Density and CTAs; megabytes and their floor, of the forward pass."""
    rows: list[list[object]] = []
    for density in DENSITIES:
        for form in hopper.FORMS[:2]:
            window = Window((SIZE, SIZE), (1, 1), (1, 1))
            options = {"input_gradient": False, "device": H200}
            plan, why = hopper.plan(torch.bfloat16, SHAPE, BLOCK, window, IMAGES, form, **options)  # type: ignore[arg-type]
            if plan is None:
                raise ValueError(why)
            moved, floor = gather_bytes(plan, density, form)
            numbers = [round(moved / 1e6), round(floor / 1e6), f"{moved / floor:.3f}", BYTES_GOAL]
            rows.append([f"{density:.0%}", form.cluster, *numbers, reached(moved / floor, BYTES_GOAL)])
    return rows


def weight_grad_rows(code: dict[str, Code]) -> list[list[object]]:
    """Density; slots of a scheduler for the whole layer, and their share of today's."""
    rows: list[list[object]] = []
    for density in DENSITIES:
        today, now = weight_grad_slots(code, density)
        numbers = [round(today), round(WEIGHT_GRAD_GOAL * today), round(now), f"{now / today:.2f}"]
        rows.append([f"{density:.0%}", *numbers, reached(now / today, WEIGHT_GRAD_GOAL)])
    return rows


def report(code: dict[str, Code]) -> str:
    """The tables."""
    titles = ("today, noted", "today, counted", "goal", "mean", "busiest", "reached by mean / busiest")
    return "\n".join(
        [
            "Slots of a scheduler for a slice of 16 channels of a tile:",
            *_table(("gather", "density", "N", "CTAs", "pixels", *titles), gather_rows(code)),
            "\nBytes from L2, forward:",
            *_table(("density", "CTAs", "MB", "floor", "share", "goal", "reached"), bytes_rows()),
            "\nSlots of a scheduler for the whole weight gradient:",
            *_table(("density", "today", "goal", "now", "share", "reached"), weight_grad_rows(code)),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks hopper-counts",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    command.add_argument("--code", type=Path, nargs="+", default=[_extension.CUDA_LIBRARY], metavar="FILE")
    files = command.parse_args(arguments).code
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        sys.exit(f"hopper-counts: no {', '.join(missing)}")
    try:
        print(report(code_of(files)))
    except KeyError as error:
        sys.exit(f"hopper-counts: no kernel {error} in {', '.join(map(str, files))}: build with 90-real")
    except ValueError as error:
        sys.exit(f"hopper-counts: {error}")
    return 0
