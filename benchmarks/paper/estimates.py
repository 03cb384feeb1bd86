"""What kept runs say: means and intervals over seeds, distances at equal seconds, goals, and the paper's order."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ddst.benchmarks.paper.plan import Cell
from ddst.benchmarks.paper.published import settled
from ddst.benchmarks.quality_of_distributions import interval

Record = dict[str, Any]


def cell_of(record: Record) -> Cell:
    """Which run a record is of."""
    fields = dict(record["cell"])
    fields["block"] = None if fields["block"] is None else tuple(fields["block"])
    return Cell(**{**fields, "changes": tuple(fields["changes"].items())})


class Runs:
    """Finished runs by what they have in common; runs that broke off stand beside them.

    Args:
        records: of `ddst.benchmarks.paper.one_run.record`, or with an "error" in place of its numbers.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.groups: dict[tuple[Any, ...], dict[int, Record]] = {}
        self.broken: dict[tuple[Any, ...], dict[int, str]] = {}
        for record in records:
            cell = cell_of(record)
            if "error" in record:
                self.broken.setdefault(cell.group, {})[cell.seed] = record["error"]
            else:
                self.groups.setdefault(cell.group, {})[cell.seed] = record

    def of(
        self,
        data: str,
        method: str,
        density: float | None,
        block: tuple[int, int] | None,
        steps: int,
        changes: tuple[tuple[str, str], ...] = (),
    ) -> dict[int, Record]:
        """Seed -> record; a dense run has neither density nor block."""
        place = (None, None) if method == "dense" else (density, block)
        return self.groups.get((data, method, *place, steps, changes), {})

    def densities(self, steps: int, data: str | None = None, block: tuple[int, int] | None = None) -> set[float]:
        """Of G, in finished runs of so many steps with the defaults' settings; of one data set and block, or of any."""
        found = set()
        for of_data, _, density, of_block, of_steps, changes in self.groups:
            fits = data in (None, of_data) and block in (None, of_block) and of_steps == steps and not changes
            if fits and density is not None:
                found.add(density)
        return found

    @property
    def all(self) -> list[Record]:
        return [record for seeds in self.groups.values() for record in seeds.values()]


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % interval by Student's t; one seed has none."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least one number.

        >>> Estimate.of([3.0])
        Estimate(mean=3.0, low=None, high=None, count=1)
        """
        if len(values) == 1:
            return cls(float(values[0]), None, None, 1)
        return cls(*interval(values), len(values))


def paired(
    first: Mapping[int, Record], second: Mapping[int, Record], of: Callable[[Record, Record], float]
) -> Estimate | None:
    """An estimate of something of two runs with equal seeds; None where no seed has both."""
    values = [of(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return Estimate.of(values) if values else None


def difference(a: Record, b: Record) -> float:
    """Of the final distances."""
    return a["distance"] - b["distance"]


def ratio(a: Record, b: Record) -> float:
    """Of the final distances."""
    return a["distance"] / b["distance"]


@dataclass(frozen=True)
class Clock:
    """Seconds of training steps: of the quiet machine where a row was timed there, else what the run itself took.

    Attributes:
        timed: seconds of a step by `Cell.group` without changes.
    """

    timed: Mapping[tuple[Any, ...], float]

    def seconds(self, record: Record, step: int) -> float:
        """That the first steps of a run take."""
        return step * self.timed.get(cell_of(record).group, record["seconds_per_step"])

    def both_timed(self, *records: Record) -> bool:
        """Whether all of them were timed on a quiet machine."""
        return all(cell_of(record).group in self.timed for record in records)


def at_equal_seconds(ours: Record, dense: Record, clock: Clock) -> float:
    """Final distance of a run / that of the dense one in the same seconds.

    The dense distance lies on the line between the two measurements around that time; after its last one it stays as it
    is, before its first one it is the first.
    """
    now = clock.seconds(ours, ours["cell"]["steps"])
    points = [(clock.seconds(dense, step), value) for step, _, _, value in dense["series"]]
    before = [point for point in points if point[0] <= now]
    after = [point for point in points if point[0] > now]
    if not before or not after:
        return ours["distance"] / (before or after)[-1 if before else 0][1]
    (t0, y0), (t1, y1) = before[-1], after[0]
    return ours["distance"] / (y0 + (y1 - y0) * (now - t0) / (t1 - t0))


class Verdict(NamedTuple):
    """What our runs say of a pair that the paper's columns all put in one order."""

    better: str
    worse: str
    difference: Estimate
    said: str


def verdicts(runs: Runs, methods: Sequence[str], where: tuple[str, float, tuple[int, int], int]) -> list[Verdict]:
    """For each settled pair of which we have paired seeds: "agrees", "does not", or "undecided".

    The difference, worse minus better, is of equal seeds; its 95 % interval is clear of 0 or it is not. One seed
    decides nothing.
    """
    data, density, block, steps = where
    found = []
    for better, worse in settled(methods, density):
        estimate = paired(*(runs.of(data, m, density, block, steps) for m in (worse, better)), difference)
        if estimate is None:
            continue
        said = "undecided"
        if estimate.low is not None and estimate.high is not None:
            said = "agrees" if estimate.low > 0 else "does not" if estimate.high < 0 else said
        found.append(Verdict(better, worse, estimate, said))
    return found


class Goal(NamedTuple):
    """One goal: what, what was found, and whether it is reached (None: not enough runs)."""

    what: str
    found: str
    reached: bool | None


def goals(runs: Runs, steps: int, clock: Clock) -> list[Goal]:
    """The goal row, of digits with 16×16 blocks: each by paired seeds."""

    def of(method: str, density: float = 0.1) -> dict[int, Record]:
        return runs.of("digits", method, density, (16, 16), steps)

    dense, ours = of("dense"), of("ddst-relaxed")
    below = paired(ours, of("static"), difference)
    equal = paired(ours, dense, ratio)
    seconds = paired(ours, dense, lambda a, b: at_equal_seconds(a, b, clock))
    quiet = bool(ours and dense) and clock.both_timed(next(iter(ours.values())), next(iter(dense.values())))
    by = "by the quiet timing" if quiet else "by the runs' own seconds, other programs running"
    thirty = paired(of("ddst-relaxed", 0.3), dense, ratio)
    moved = of("sdst-rigl")
    collapsed = [seed for seed, record in sorted(moved.items()) if record["collapsed"]]
    return [
        Goal(
            "DDST below static at 10 %, the interval clear of 0, 5 seeds",
            shown(below, "{:+.1f}"),
            None if below is None or below.count < 5 or below.high is None else below.high < 0,
        ),
        _at_most("DDST at most 1.5 times the dense distance at equal iterations, 10 %", equal, 1.5),
        _at_most(f"DDST at most 0.5 times the dense distance at equal seconds, 10 % ({by})", seconds, 0.5),
        _at_most("DDST at most 1.2 times the dense distance at equal iterations, 30 %", thirty, 1.2, 3),
        Goal(
            "no collapse in 20 seeds of SDST-RigL, 10 %",
            f"{len(collapsed)} of {len(moved)} seeds collapsed"
            + (f" ({', '.join(map(str, collapsed))})" if collapsed else ""),
            False if collapsed else None if len(moved) < 20 else True,
        ),
    ]


def _at_most(what: str, estimate: Estimate | None, most: float, seeds: int = 5) -> Goal:
    reached = None if estimate is None or estimate.count < seeds else estimate.mean <= most
    return Goal(what, shown(estimate, "{:.2f}"), reached)


def shown(estimate: Estimate | None, form: str = "{:.1f}") -> str:
    """An estimate as words.

    >>> shown(Estimate(2.0, -0.48, 4.48, 3)), shown(Estimate(2.0, None, None, 1)), shown(None)
    ('2.0 (-0.5 to 4.5; 3 seeds)', '2.0 (1 seed)', 'no pair of runs is finished')
    """
    if estimate is None:
        return "no pair of runs is finished"
    mean = form.format(estimate.mean)
    if estimate.low is None or estimate.high is None:
        return f"{mean} (1 seed)"
    return f"{mean} ({form.format(estimate.low)} to {form.format(estimate.high)}; {estimate.count} seeds)"


def median_of(seeds: Mapping[int, Record], key: str) -> float:
    """Over seeds."""
    return statistics.median(record[key] for record in seeds.values())
