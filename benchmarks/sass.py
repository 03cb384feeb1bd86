"""Machine code of compiled kernels, as cuobjdump prints it, and how often each part of it is issued.

What is expected of a loop follows from its control flow and from the odds of its branches, which the caller states:
:meth:`Code.visits` gives the expected executions of every basic block for one pass of a loop, and with them the number
of instructions that a warp issues. Predicated instructions count: they take a slot whether they do anything or not.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .gpu.objects import cuobjdump


class Instruction(NamedTuple):
    """One instruction; ``guard``: its predicate, such as "@!P0", or nothing."""

    address: int
    guard: str
    name: str
    operands: str

    def is_product(self) -> bool:
        """Whether tensor cores execute it."""
        return self.name.startswith(("HMMA", "HGMMA"))

    def is_wait(self) -> bool:
        """Whether it waits at an mbarrier."""
        return self.name.startswith("SYNCS.PHASECHK")

    def is_tensor_copy(self) -> bool:
        """Whether it copies a box of a tensor map."""
        return self.name.startswith("UTMALDG")


class Branch(NamedTuple):
    """The end of a block that has two ways on.

    Attributes:
        at: its instruction.
        there, on: instructions that only the way taken meets, and only the other one, before they meet again or a loop
            begins anew.
        back: whether the way taken leads to the start of a loop around it.
        leaves: whether the way taken leads out of the innermost loop around it.
        depth: loops around it within the one that is looked at.
    """

    at: Instruction
    there: tuple[Instruction, ...]
    on: tuple[Instruction, ...]
    back: bool
    leaves: bool
    depth: int

    def counts(self, *names: str) -> tuple[int, int]:
        """How many instructions of such names the way taken meets, and the other one."""
        there, on = (sum(i.name.startswith(names) for i in side) for side in (self.there, self.on))
        return there, on


Odds = Callable[[Branch], float]
LINE = re.compile(r"^ +/\*([0-9a-f]{4,})\*/ +(?:(@!?U?P\w+) +)?([A-Z][A-Za-z0-9_.]*) *([^;\n]*);", re.MULTILINE)


class Code:
    """The instructions of one kernel, cut into basic blocks."""

    def __init__(self, instructions: Sequence[Instruction]):
        self.instructions = list(instructions)

    @cached_property
    def starts(self) -> list[int]:
        """Where blocks begin, as places in ``instructions``; the end is the last entry."""
        places = {i.address: n for n, i in enumerate(self.instructions)}
        found = {0, len(self.instructions)}
        for n, instruction in enumerate(self.instructions):
            target = target_of(instruction)
            if target is not None and target in places:
                found.add(places[target])
            if target is not None or instruction.name in ("EXIT", "RET", "BRX"):
                found.add(n + 1)
        return sorted(found)

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        """The basic blocks in the order of their addresses."""
        return [self.instructions[a:b] for a, b in zip(self.starts, self.starts[1:], strict=False)]

    @cached_property
    def ways(self) -> list[tuple[int, ...]]:
        """For each block the blocks that may follow: where its branch leads first, then the next one."""
        number = {block[0].address: n for n, block in enumerate(self.blocks)}
        found = []
        for n, block in enumerate(self.blocks):
            last, after = block[-1], (n + 1,) if n + 1 < len(self.blocks) else ()
            target = target_of(last)
            if target is not None and last.name != "BRA.DIV":  # taken where a warp has diverged: never here
                found.append((number[target], *(after if is_conditional(last) else ())))
            elif last.name.split(".")[0] in ("EXIT", "RET") and not last.guard:
                found.append(())
            else:
                found.append(after)
        return found

    @cached_property
    def loops(self) -> list[tuple[int, frozenset[int]]]:
        """``(first block, all blocks)`` of each loop, the innermost ones first."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for n, ways in enumerate(self.ways):
            for way in ways:
                before[way].append(n)
        # Blocks on every way from the kernel's start to a block, as bits.
        above, changed = [1] + [(1 << len(self.blocks)) - 1] * (len(self.blocks) - 1), True
        while changed:
            changed = False
            for n in range(1, len(self.blocks)):
                new = (1 << len(self.blocks)) - 1 if before[n] else 0
                for b in before[n]:
                    new &= above[b]
                new |= 1 << n
                if new != above[n]:
                    above[n], changed = new, True
        found: dict[int, set[int]] = {}
        for n, ways in enumerate(self.ways):
            for head in ways:
                if above[n] >> head & 1:
                    body, left = found.setdefault(head, {head}), [n]
                    while left:
                        block = left.pop()
                        if block not in body:
                            body.add(block)
                            left += before[block]
        return sorted(((h, frozenset(b)) for h, b in found.items()), key=lambda loop: len(loop[1]))

    def loop_around(self, wanted: Callable[[Instruction], bool]) -> tuple[int, frozenset[int]]:
        """The outermost loop that holds a wanted instruction."""
        holds = self.loops_around(wanted)
        if not holds:
            raise ValueError("no loop holds such an instruction")
        return holds[-1]

    def loops_around(
        self, *wanted: Callable[[Instruction], bool], innermost: bool = False
    ) -> list[tuple[int, frozenset[int]]]:
        """The loops that hold an instruction of each kind, from the inside; ``innermost``: none that holds another."""
        holds = [
            (head, body)
            for head, body in self.loops
            if all(any(kind(i) for block in body for i in self.blocks[block]) for kind in wanted)
        ]
        return [a for a in holds if not innermost or not any(b[1] < a[1] for b in holds)]

    def _reach(self, start: int, head: int, body: frozenset[int]) -> set[int]:
        """Blocks that a block leads to, itself included, without going back to the start of any loop."""
        heads = dict(self.loops)
        found, left = set(), [start] if start in body else []
        while left:
            block = left.pop()
            if block in found:
                continue
            found.add(block)
            for way in self.ways[block]:
                if way in body and way != head and not (way in heads and block in heads[way]):
                    left.append(way)
        return found

    def visits(self, loop: tuple[int, frozenset[int]], odds: Odds) -> dict[int, float]:
        """``{block: expected executions}`` for one pass of the loop, by the odds that each branch is taken.

        Branches are asked about in the order of their addresses.
        """
        head, body = loop
        members = sorted(body)
        place = {block: n for n, block in enumerate(members)}
        matrix = np.eye(len(members))
        for block in members:
            ways = self.ways[block]
            shares: tuple[float, ...] = (1.0,) * len(ways)
            if len(ways) == 2:
                there, on = (self._reach(way, head, body) for way in ways)
                around = [(h, b) for h, b in self.loops if block in b and b <= body]
                sides = (self._flat(there - on), self._flat(on - there))
                back, leaves = ways[0] in dict(around), ways[0] not in around[0][1]
                taken = odds(Branch(self.blocks[block][-1], *sides, back, leaves, len(around) - 1))
                shares = (taken, 1 - taken)
            for way, share in zip(ways, shares, strict=True):
                if way in place and way != head:
                    matrix[place[way], place[block]] -= share
        start = np.zeros(len(members))
        start[place[head]] = 1
        return dict(zip(members, np.linalg.solve(matrix, start), strict=True))

    def issued(
        self, loop: tuple[int, frozenset[int]], odds: Odds, wanted: Callable[[Instruction], bool] = lambda _: True
    ) -> float:
        """Expected instructions that a warp issues in one pass of the loop, of all or of the wanted ones."""
        return sum(n * sum(map(wanted, self.blocks[block])) for block, n in self.visits(loop, odds).items())

    def _flat(self, blocks: set[int]) -> tuple[Instruction, ...]:
        return tuple(i for block in sorted(blocks) for i in self.blocks[block])


def target_of(instruction: Instruction) -> int | None:
    """The address that a branch leads to, None for other instructions."""
    if instruction.name.split(".")[0] != "BRA":
        return None
    return int(instruction.operands.split(",")[-1].split()[-1].removeprefix("`(").rstrip(")"), 16)


def is_conditional(branch: Instruction) -> bool:
    """Whether a branch has another way: by its guard or by a predicate among its operands."""
    return bool(branch.guard) or re.match(r"!?U?P\d", branch.operands) is not None


def instructions(listing: str) -> list[Instruction]:
    """Those of the printed code of one kernel.

    >>> instructions("        /*0050*/              @!P1 BRA 0x70 ;")
    [Instruction(address=80, guard='@!P1', name='BRA', operands='0x70')]
    """
    found = [
        Instruction(int(address, 16), guard, name, operands.strip())
        for address, guard, name, operands in LINE.findall(listing)
    ]
    while len(found) > 1 and found[-1].name == "NOP":  # padding, and the loop that keeps a fetch from running on
        found.pop()
    return found


def listings(file: Path, architecture: str | None = None) -> dict[str, str]:
    """``{kernel: what cuobjdump prints of it}``, names as C++ writes them without namespaces.

    Raises:
        ValueError: no cuobjdump is at hand, or it cannot read the file.
    """
    program = cuobjdump()
    if program is None:
        raise ValueError("no cuobjdump is on PATH or in triton's package")
    command = [program, *(["-arch", architecture] if architecture else []), "-sass", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"cuobjdump cannot read {file}: {done.stderr.strip()[:300]}")
    parts = re.split(r"^\s*Function : (.*)$", done.stdout, flags=re.MULTILINE)
    names = subprocess.run(["c++filt"], input="\n".join(parts[1::2]), capture_output=True, text=True, check=True)
    return dict(zip(map(short, names.stdout.splitlines()), parts[2::2], strict=True))


def short(name: str) -> str:
    """A kernel's name without namespaces, result and arguments.

    >>> short("void ddst::cuda::weight_grad<ddst::dev::bf16, ddst::cuda::Unit<16, 16> >(ddst::cuda::Params)")
    'weight_grad<bf16, Unit<16, 16> >'
    """
    return re.sub(r"ddst::(cuda|dev)::|^void ", "", name).partition("(")[0]
