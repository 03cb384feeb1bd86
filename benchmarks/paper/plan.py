"""Which runs the table is made of, and in which order they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ddst.benchmarks.paper.published import DENSITIES, DISTANCES
from ddst.gan import PRESETS
from ddst.train.config import OPTIONS
from ddst.train.options import flag, shown_value

STEPS = 3000
DATA = ("digits", "shapes")
BLOCKS = ((16, 16), (1, 1))
GOAL = ("dense", "static", "ddst-relaxed")
PARTS = ("goal", "digits", "collapse", "rest", "moves")


def _methods() -> tuple[str, ...]:
    """Every preset once (some have two names): dense, then the paper's rows, then the others."""
    different: list[str] = []
    for name, preset in PRESETS.items():
        if all(preset != PRESETS[other] for other in different):
            different.append(name)
    return ("dense", *DISTANCES, *(name for name in different if name not in ("dense", *DISTANCES)))


METHODS = _methods()


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data, method, seed, steps: settings of `ddst train`. density, block: likewise, None of a dense run.
        changes: further settings by name, as words of a command line; of a switch "yes" or "no".
    """

    data: str
    method: str
    density: float | None
    block: tuple[int, int] | None
    seed: int
    steps: int
    changes: tuple[tuple[str, str], ...] = ()

    @property
    def group(self) -> tuple[Any, ...]:
        """What its seeds have in common."""
        return self.data, self.method, self.density, self.block, self.steps, self.changes

    def with_changes(self, changes: Sequence[tuple[str, str]]) -> Cell:
        """The same with further settings."""
        return replace(self, changes=(*self.changes, *changes))

    @property
    def name(self) -> str:
        """Of its folder and its file.

        >>> Cell("digits", "static", 0.1, (16, 16), 2, 3000, (("interval_g", "100"),)).name
        'digits-static-0.1-16x16-3000-interval_g-100-seed2'
        """
        sparse = [] if self.density is None or self.block is None else [f"{self.density:g}", shown_value(self.block)]
        changed = [word.replace(" ", "_") for pair in self.changes for word in pair]
        return "-".join([self.data, self.method, *sparse, str(self.steps), *changed, f"seed{self.seed}"])

    @property
    def arguments(self) -> list[str]:
        """Of ``ddst train``, without the folder. One thread: numbers are the same bit for bit only with one number.

        >>> " ".join(Cell("digits", "static", 0.1, (1, 1), 0, 800).arguments)
        '--method static --data digits --steps 800 --seed 0 --threads 1 --density 0.1 --block 1x1 --backend reference'
        """
        words = ["--method", self.method, "--data", self.data, "--steps", str(self.steps), "--seed", str(self.seed)]
        words += ["--threads", "1"]
        words += ["--resolution", "32"] if self.data == "shapes" else []
        if self.density is not None and self.block is not None:
            words += ["--density", f"{self.density:g}", "--block", shown_value(self.block)]
            words += ["--backend", "reference"] if self.block == (1, 1) else []
        for name, value in self.changes:
            if name in OPTIONS and OPTIONS[name].kind is bool:
                words.append(flag(name) if value == "yes" else f"--no-{flag(name)[2:]}")
            else:
                words += [flag(name), *value.split()]
        return words


#: Settings of SDST-RigL's moves that are compared with the defaults (100 steps, 0.3 of the blocks) by equal seeds:
#: layers that keep their blocks, the share, the interval, rows and columns that may be cut off, blocks that may leave
#: at once, where second moments of what enters start, the average.
MOVES: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("exempt_g", "none"),),
    (("drop_fraction", "0.1"),),
    (("interval_g", "25"),),
    (("connected", "no"),),
    (("grace", "0"),),
    (("grown_second_moment", "zero"),),
    (("ema", "0.999"),),
)


def plan(parts: Sequence[str], steps: int = STEPS, seeds: int = 3) -> list[Cell]:
    """The runs of some parts in the order in which they are made, each once.

    Args:
        parts: of `PARTS`: "goal" (5 seeds at least), "digits" at 10 and 30 %, "collapse" (20 seeds of SDST-RigL),
            "rest", and "moves", a study of its own that belongs to no table's row.
        steps: of every run. seeds: of each row of the table.
    """
    found: dict[Cell, None] = {}
    for part in parts:
        found.update(dict.fromkeys(_part(part, steps, seeds)))
    return list(found)


def _part(part: str, steps: int, seeds: int) -> Iterator[Cell]:
    rigl = ("digits", "sdst-rigl", 0.1, (16, 16))
    if part == "goal":
        for seed in range(max(5, seeds)):
            for method in GOAL:
                yield _cell("digits", method, 0.1, (16, 16), seed, steps)
    elif part == "digits":
        yield from _rows("digits", (0.1, 0.3), seeds, steps)
    elif part == "collapse":
        for seed in range(20):
            yield Cell(*rigl, seed, steps)
    elif part == "moves":
        for changes in MOVES:
            for seed in range(seeds):
                yield Cell(*rigl, seed, steps, changes)
    else:
        yield from _rows("digits", (0.2, 0.5), seeds, steps)
        yield from _rows("shapes", (0.1, 0.3, 0.2, 0.5), seeds, steps)


def _rows(data: str, densities: Sequence[float], seeds: int, steps: int) -> Iterator[Cell]:
    for density in densities:
        for seed in range(seeds):
            for block in BLOCKS:
                for method in METHODS:
                    yield _cell(data, method, density, block, seed, steps)


def _cell(data: str, method: str, density: float, block: tuple[int, int], seed: int, steps: int) -> Cell:
    return Cell(data, method, *((None, None) if method == "dense" else (density, block)), seed, steps)


__all__ = ["BLOCKS", "DATA", "DENSITIES", "GOAL", "METHODS", "MOVES", "PARTS", "STEPS", "Cell", "plan"]
