"""Odds of the branches in the gather kernels' loops, for masks whose blocks are active independently of each other.

They follow from what a branch passes over: products of one granule, of several, of a tap, copies of weights. A branch
that looks like none of those is an error: the kernel has changed, and the counts would be of something else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from .sass import Branch, Odds

PRODUCTS = ("HMMA", "HGMMA")


class Mask(NamedTuple):
    """What a CTA meets in a slice of input channels: ``taps`` times ``blocks`` places, each active with ``density``."""

    density: float
    taps: int = 9
    blocks: int = 8

    def any_of(self, places: int) -> float:
        """The odds that at least one of some places is active."""
        return 1 - (1 - self.density) ** places

    @property
    def active(self) -> float:
        """Expected active blocks."""
        return self.density * self.taps * self.blocks

    @property
    def active_taps(self) -> float:
        return self.taps * self.any_of(self.blocks)

    def count_odds(self, united: int = 1) -> list[float]:
        """``[odds that so many blocks are listed]``, where ``united`` of them are listed together."""
        units, p = self.taps * self.blocks // united, self.any_of(united)
        found = [0.0] * (units * united + 1)
        for n in range(units + 1):
            found[n * united] = math.comb(units, n) * p**n * (1 - p) ** (units - n)
        return found


class UnknownBranchError(ValueError):
    """A branch that the odds say nothing about."""


def _unknown(branch: Branch) -> UnknownBranchError:
    return UnknownBranchError(
        f"the branch at {branch.at.address:#x} passes over {len(branch.on)} instructions, of them "
        f"{branch.counts(*PRODUCTS)[1]} products: not one of those whose odds are known"
    )


def of_today(mask: Mask, patch_slots: int) -> Odds:
    """Of ``conv2d_gather``'s loop over slices, large tile, 16-bit: 128 rows of 32 bytes are copied at once."""

    def leaving(rows: float) -> Iterator[float]:
        """The odds that a warp has no row left before its first, second … copy, if it had one before."""
        reached = 1.0
        for i in range(4):
            share = min(1.0, max(0.0, (rows - 128 * i) / 128))
            yield 1 - share / reached if reached else 1.0
            reached = share

    weights = list(leaving(mask.active * 16))
    # In the order of the addresses: last slices, the patch's four copies, its loop; the weights' (of which an odd
    # number of fours comes first, and there is no second); records, which one warp of eight copies.
    copies = [0.0, 0.0, *leaving(patch_slots), 0.0, weights[0], 0.0, *weights[1:], 1.0]
    unreached, records = [0.5] * 8, [0.0, 0.0, 7 / 8]
    left = iter([*copies, *unreached, *records])

    def odds(branch: Branch) -> float:
        there, on = branch.counts(*PRODUCTS)
        if branch.back:
            return 1 - 1 / mask.taps if there and branch.depth else 0.0 if there else next(left)
        if there:  # both of the warp's tiles of pixels meet the tap: always, but at the edge of an image
            return 1.0
        if on:
            if not branch.depth:
                return 0.0  # there are taps
            return 1 - mask.any_of(mask.blocks) if on > 32 else 1 - mask.density / mask.any_of(mask.blocks)
        try:
            return next(left)
        except StopIteration:
            raise _unknown(branch) from None

    return odds


def of_consumers(mask: Mask, united: int, depth: int = 1) -> Odds:
    """Of ``hopper_gather``'s loop over stages of ``depth`` slices, in a warp that multiplies; ``united``: blocks in one
    product."""
    tap, half, unit = (mask.any_of(n) for n in (mask.blocks, mask.blocks // 2, united))
    taps = mask.active_taps / mask.any_of(mask.blocks * mask.taps)  # of a slice that has any

    def odds(branch: Branch) -> float:
        there, on = branch.counts(*PRODUCTS)
        if branch.counts("SYNCS.PHASECHK") != (0, 0) and not (branch.depth == 0 and branch.back):
            return 0.0  # what is waited for is there: waiting is no work
        if branch.back:
            return 1 - 1 / depth if branch.depth else 1.0
        if branch.depth == depth - 1 and on and not there:
            return 1 - mask.any_of(mask.blocks * mask.taps)
        if branch.leaves:
            return 1 / taps
        if on == 8 and not there:
            return 1 - half / tap
        if on == 2 and not there:
            return 1 - unit / (tap if united * 2 >= mask.blocks else half)
        raise _unknown(branch)

    return odds


def of_copiers(mask: Mask, united: int, stages: int, parts: float, cluster: int, depth: int = 1) -> Odds:
    """Of ``hopper_gather``'s loops over stages of ``depth`` slices in the warps that copy: pixels in ``parts`` copies,
    where a stage has blocks; blocks by fours, of which CTAs take turns. ``stages``: of an item."""
    fours, none, copies = 0.0, 0.0, [0.0] * 5  # expected ones; odds of none; fours with at least so many blocks
    for count, p in enumerate(mask.count_odds(united)):
        for rank in range(cluster):
            mine = [min(4, count - first) for first in range(4 * rank, count, 4 * cluster)]
            fours += p * len(mine) / cluster
            none += p * (not mine) / cluster
            for size in mine:
                for n in range(1, size + 1):
                    copies[n] += p / cluster
    new_item = iter([1 - 1 / stages, 0.0])  # a record of the next item; there is a next one

    def odds(branch: Branch) -> float:
        there, on = branch.counts("UTMALDG")
        if branch.counts("SYNCS.PHASECHK") != (0, 0) and not (branch.depth == 0 and branch.back):
            return 0.0
        if branch.counts("UBLKCP")[1]:
            return 0.0  # the last records
        if branch.back:
            return 1 - 1 / parts if there == 1 else 1 - (1 - none) / fours
        if branch.counts("LDG")[1]:
            return next(new_item)
        if on == 1 and branch.depth == 0:
            return 1 - mask.any_of(mask.blocks * mask.taps * depth)
        if on == 4:
            return 0.0 if branch.depth else none
        if 1 <= on <= 3:
            return 1 - copies[5 - on] / copies[4 - on]
        raise _unknown(branch)

    return odds


def _lacking(units: float, at: int) -> float:
    """The odds that a warp that has unit number ``at - 1`` lacks unit ``at``, of ``units`` each, dealt evenly."""
    before, share = (min(1.0, max(0.0, units - n)) for n in (at - 1, at))
    return 1 - share / before if before else 1.0


def of_weight_grad(units: float, trips: tuple[float, float], steps: int) -> Odds:
    """Of ``weight_grad``'s loop over tiles: ``units`` of a warp, passes of the loops that copy gy and x, steps of 16
    pixels."""
    copies = iter([1 - 1 / n for n in trips])

    def odds(branch: Branch) -> float:
        there, on = branch.counts(*PRODUCTS)
        if branch.back:
            return (1 - 1 / steps if branch.depth else 1.0) if there else next(copies)
        if branch.counts("LDGSTS")[0]:
            return 1.0  # channels in whole 16 bytes
        if not on:
            return 0.0  # there is another tile, and pixels to copy
        if not branch.depth:
            return 0.0
        at = 8 - on // 2
        return _lacking(units, at)

    return odds


def of_hopper_weight_grad(units: float, rows: float) -> Odds:
    """Of ``hopper_weight_grad``'s loop over tiles in a warp that multiplies: ``units`` of a warp, in as many rows."""
    fresh = (rows - 1) / (units - 1) if units > 1 else 1.0  # the odds that a unit after the first has another row
    seen = 0

    def odds(branch: Branch) -> float:
        nonlocal seen
        there, on = branch.counts(*PRODUCTS)
        if branch.counts("SYNCS.PHASECHK") != (0, 0) and not (branch.depth == 0 and branch.back):
            return 0.0
        if branch.back:
            return 1.0
        if on and not there:
            at = 8 - on // 8
            return _lacking(units, at)
        if branch.counts("LDSM")[1] == 4:
            seen += 1
            return 0.0 if seen == 1 else 1 - fresh
        raise _unknown(branch)

    return odds


def of_weight_grad_copier(grad_boxes: int, input_boxes: int) -> Odds:
    """Of its loop over tiles in the warp that copies: boxes of gy by fours, then two, then one; those of x singly, in
    loops over the parities of rows and columns (of which there is one without strides) and over slices of channels."""
    last = iter([float(grad_boxes % 2 == 0), 0.0, 0.0, 0.0])

    def odds(branch: Branch) -> float:
        there, on = branch.counts("UTMALDG")
        if branch.counts("SYNCS.PHASECHK") != (0, 0) and not (branch.depth == 0 and branch.back):
            return 0.0
        if branch.back:
            if there == 4:
                return 1 - 1 / max(1, grad_boxes // 4)
            if there == 1:
                return 1 - 1 / input_boxes if branch.depth == 3 else 0.0
            return 1.0
        if on == 7:
            return 0.0
        if on == 4:
            return float(grad_boxes < 4)
        if on == 2:
            return float(grad_boxes % 4 < 2)
        if on == 1:
            return next(last)
        raise _unknown(branch)

    return odds
