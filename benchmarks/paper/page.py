"""docs/results.md, of the runs that are kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddst.benchmarks.paper.estimates import (
    Clock,
    Estimate,
    Record,
    Runs,
    cell_of,
    difference,
    goals,
    median_of,
    paired,
    shown,
    verdicts,
)
from ddst.benchmarks.paper.one_run import QUIET
from ddst.benchmarks.paper.plan import BLOCKS, DATA, METHODS, MOVES, PARTS, STEPS, Cell, plan
from ddst.benchmarks.paper.published import DENSITIES, DISTANCES, rank
from ddst.train.options import shown_value

HEAD = """\
# The paper's table on data that is at hand

Made by `make paper` from the JSON files of `benchmarks/results/paper/`, one for each run; nothing here is written by
hand. Networks and lengths are those of `ddst train`'s demo, far below the paper's: digits are 1,797 grey images at
16×16, shapes 2,000 drawn ones in colour at 32×32 (`ddst.data.shapes`). Distances are embedded Fréchet distances of the
averaged generator (64 features of a small classifier; one class missing costs 20), smaller is better. They compare
with each other, on one data set and after equally many steps, and with nothing else.

- **distance**: mean over seeds, in brackets its 95 % interval by Student's t. One seed has no interval.
- **ms a step**: a whole iteration with what the scheduler does. "timed" figures are of a quiet machine, in pairs with
  the dense run (`make paper ARGS=--time`); others are medians of the runs' own, *slanted where other programs kept the
  machine busy: not to be quoted*.
- **memory**: the most that torch holds during an iteration at the end of the run, of the dense twin's.
- **FLOPs**: counted, of the whole run, of the dense run's. **d_D**: D's density at the end. **BR**: mean(α) / mean(β)
  over the run.
- **signs**: seeds that had collapsed at their end (C), or whose D was too weak (W); `ddst.train.collapse`
  states the limits.
- **paper's place**: of the paper's eight sparse methods at this density, 1 the best, mean over its four columns.
"""


def page(records: Sequence[Record], timing: Mapping[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        records: as of `Runs`. timing: of `ddst.benchmarks.paper.timing`.
    """
    runs = Runs(records)
    rows = (timing or {}).get("rows", [])
    timed = {cell_of(row).group: row for row in rows}
    clock = Clock({group: row["seconds"] for group, row in timed.items()})
    lines = [HEAD, *_provenance(runs, timing)]
    known = [cell_of(record).steps for record in runs.all]
    for steps in sorted({STEPS, *known}, reverse=True):
        lines += [f"## {steps:,} steps", ""]
        if steps != STEPS:
            lines += [f"**Not the planned {STEPS:,} steps**: a row of its own, not mixed with those.", ""]
        if steps == STEPS or runs.densities(steps):
            lines += _goals(runs, steps, clock)
        for data in DATA:
            for block in BLOCKS:
                lines += _section(runs, timed, data, block, steps)
        lines += _changes(runs, steps)
    lines += ["## What is not finished", "", *_unfinished(runs)]
    return "\n".join(lines).rstrip() + "\n"


def _provenance(runs: Runs, timing: Mapping[str, Any] | None) -> list[str]:
    records = runs.all
    if not records:
        return ["No run is finished.", ""]
    commits = sorted({commit for record in records for commit in record["commit"]})
    torches = sorted({record["versions"]["torch"] for record in records})
    machines = sorted({record["machine"]["cpu"] for record in records})
    text = (
        f"{len(records)} runs, one thread each, on {'; '.join(machines)}; torch {', '.join(torches)}; commits "
        f"{', '.join(commits)} (+: with changes)."
    )
    if timing is not None:
        text += f" Timed on {timing['machine']['cpu']}, commit {timing['commit']}, {timing['date']}."
    return [text, ""]


def _goals(runs: Runs, steps: int, clock: Clock) -> list[str]:
    lines = ["Goals (16×16 blocks, digits):", "", "| goal | found | reached |", "| --- | --- | --- |"]
    for goal in goals(runs, steps, clock):
        said = {True: "yes", False: "**no**", None: "too few runs"}[goal.reached]
        lines.append(f"| {goal.what} | {goal.found} | {said} |")
    return [*lines, ""]


def _section(runs: Runs, timed: Mapping[Any, Record], data: str, block: tuple[int, int], steps: int) -> Iterator[str]:
    """One table, and what agrees with the paper; one line where the plan has runs and none is finished.

    Densities that are not the plan's stand behind its own, with what was trained and no word of what was not.
    """
    title = f"{data}, {'single weights' if block == (1, 1) else f'{block[0]}×{block[1]} blocks'}, {steps:,} steps"
    found = runs.densities(steps, data, block)
    if not found:
        yield from (f"### {title}", "", "No run is finished.", "") if steps == STEPS else ()
        return
    yield from (
        f"### {title}",
        "",
        "| method | d_G | seeds | distance | ms a step | memory | FLOPs | d_D | BR | signs | paper's place |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    )
    dense = runs.of(data, "dense", None, None, steps)
    yield _row("dense", None, dense, timed)
    for density in (*DENSITIES, *sorted(found - {*DENSITIES})):
        done = [m for m in METHODS[1:] if runs.of(data, m, density, block, steps)]
        for method in done:
            yield _row(method, density, runs.of(data, method, density, block, steps), timed)
        missing = [m for m in METHODS[1:] if m not in done]
        if missing and density in DENSITIES:
            yield f"| {', '.join(missing)} | {100 * density:g} % | 0 | *not finished* |  |  |  |  |  |  |  |"
    yield ""
    for density in DENSITIES:
        yield from _beside_the_paper(runs, data, density, block, steps)


def _row(method: str, density: float | None, seeds: Mapping[int, Record], timed: Mapping[Any, Record]) -> str:
    share = "-" if density is None else f"{100 * density:g} %"
    if not seeds:
        return f"| {method} | {share} | 0 | *not finished* |  |  |  |  |  |  |  |"
    records = list(seeds.values())
    estimate = Estimate.of([record["distance"] for record in records])
    distance = f"{estimate.mean:.1f}"
    if estimate.low is not None:
        distance += f" ({estimate.low:.1f} to {estimate.high:.1f})"
    ratios = [record["balance_ratio"] for record in records if record["balance_ratio"] is not None]
    known = density in DENSITIES and method in DISTANCES
    cells = [
        method,
        share,
        str(len(records)),
        distance,
        _time(seeds, timed),
        f"{statistics.median(r['peak_bytes'] / r['dense_peak_bytes'] for r in records):.2f}",
        f"{median_of(seeds, 'flops_ratio'):.2f}",
        f"{statistics.fmean(record['density_d'] for record in records):.2f}",
        f"{statistics.fmean(ratios):.2f}" if ratios else "-",
        _signs(records),
        f"{rank(method, density):.1f}" if known and density is not None else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _time(seeds: Mapping[int, Record], timed: Mapping[Any, Record]) -> str:
    records = list(seeds.values())
    row = timed.get(cell_of(records[0]).group)
    if row is not None:
        speedup = row["speedup"]
        return f"timed: {1e3 * row['seconds']:.0f}, {speedup['median']:.2f}× as fast as dense"
    own = f"{1e3 * median_of(seeds, 'seconds_per_step'):.0f}"
    return own if all(is_quiet(record) for record in records) else f"*{own}*"


def is_quiet(record: Record) -> bool:
    """Whether nothing else kept the machine busy while a run trained, as far as its load says."""
    return record["load"] is not None and record["load"]["mean"] <= record["settings"]["threads"] + QUIET


def _signs(records: Sequence[Record]) -> str:
    collapsed = sum(record["collapsed"] for record in records)
    weak = sum(any(sign["sign"] == "weak discriminator" for sign in record["signs"]) for record in records)
    return " ".join([f"C {collapsed}"] * bool(collapsed) + [f"W {weak}"] * bool(weak)) or "-"


def _beside_the_paper(runs: Runs, data: str, density: float, block: tuple[int, int], steps: int) -> list[str]:
    found = verdicts(runs, METHODS, (data, density, block, steps))
    if not found:
        return []
    lines = [f"At {100 * density:g} %, of the pairs that all four columns of the paper put in one order:", ""]
    for said, words in (("agrees", "agree"), ("does not", "do **not** agree"), ("undecided", "are undecided here")):
        pairs = [
            f"{v.better} before {v.worse} ({v.difference.mean:+.1f}"
            + (
                f", {v.difference.low:+.1f} to {v.difference.high:+.1f})"
                if v.difference.low is not None
                else ", 1 seed)"
            )
            for v in found
            if v.said == said
        ]
        lines.append(f"- {len(pairs)} {words}{': ' if pairs else ''}{'; '.join(pairs)}.")
    return [*lines, ""]


def _changes(runs: Runs, steps: int) -> Iterator[str]:
    """Runs with other settings, beside those without by equal seeds."""
    groups = [group for group in runs.groups if group[-1] and group[-2] == steps]
    if not groups:
        return
    yield from (
        f"### Other settings, {steps:,} steps",
        "",
        "| run | settings | seeds | distance | minus the defaults' | collapsed |",
        "| --- | --- | --- | --- | --- | --- |",
    )
    order = {changes: i for i, changes in enumerate(MOVES)}
    for group in sorted(groups, key=lambda g: (str(g[:4]), order.get(g[-1], len(order)), g[-1])):
        seeds, usual = runs.groups[group], runs.groups.get((*group[:-1], ()), {})
        data, method, density, block = group[:4]
        what = f"{data} {method}" if density is None else f"{data} {method} {100 * density:g} % {shown_value(block)}"
        changes = ", ".join(f"{name} {value}" for name, value in group[-1])
        estimate = Estimate.of([record["distance"] for record in seeds.values()])
        beside = paired(seeds, usual, difference)
        collapsed = sum(record["collapsed"] for record in seeds.values())
        minus = "-" if beside is None else shown(beside, "{:+.1f}")
        yield f"| {what} | {changes} | {len(seeds)} | {shown(estimate)} | {minus} | {collapsed} of {len(seeds)} |"
    yield ""


def _unfinished(runs: Runs) -> Iterator[str]:
    """Per part of the plan, how much of it is done; and runs that broke off."""
    done = {cell_of(record) for record in runs.all}
    for part in PARTS:
        cells = plan([part])
        missing = [cell for cell in cells if cell not in done]
        text = f"- `{part}`: {len(cells) - len(missing)} of {len(cells)} runs of {STEPS:,} steps"
        yield f"{text} are finished." if not missing else f"{text} are finished; the next is `{missing[0].name}`."
    for group, seeds in runs.broken.items():
        for seed, why in sorted(seeds.items()):
            yield f"- `{Cell(*group[:4], seed, *group[4:]).name}` broke off: {why}"


def write(page_file: Path, text: str) -> None:
    """Puts the page where it belongs."""
    page_file.parent.mkdir(parents=True, exist_ok=True)
    page_file.write_text(text)
