"""Rows of `--memory` as text, and as the README's table, with the strongest dense row named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ddst.benchmarks.runner import Row

MARKERS = ("<!-- memory: begin -->", "<!-- memory: end -->")
HEAD = f"{'row':<22} state MiB  peak MiB  of dense   iteration  time of dense [10 %, 90 %]"
MIB = 2**20


def text_of(row: Row) -> str:
    """A row as a line."""
    if row["wrong"]:
        return f"{row['row']:<22} WRONG, not measured: {', '.join(row['wrong'])}"
    ratio = row["time"]
    return (
        f"{row['row']:<22} {row['state'] / MIB:9.1f} {row['peak'] / MIB:9.1f} {row['memory']:9.2f} "
        f"{row['seconds']:9.3f} s {ratio['median']:10.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    )


def right(rows: Sequence[Row], start: str) -> list[Row]:
    """The rows of a kind ("dense" or "sparse") that gave the right results."""
    return [row for row in rows if row["row"].startswith(start) and not row["wrong"]]


def opponents(rows: Sequence[Row]) -> Iterator[str]:
    """Of the dense rows the smallest and the fastest, and each sparse row beside both: lines of text.

    >>> rows = [
    ...     {"row": "dense", "wrong": [], "memory": 1.0, "time": {"median": 1.0}},
    ...     {"row": "dense-budget-0.5", "wrong": [], "memory": 0.7, "time": {"median": 1.1}},
    ...     {"row": "sparse", "wrong": [], "memory": 0.56, "time": {"median": 0.125}},
    ... ]
    >>> print(*opponents(rows), sep="\\n")
    strongest dense row: dense-budget-0.5 in memory (0.70 of dense), dense in time (1.00 of dense)
    sparse: 0.80 of its memory, 8.00x as fast
    """
    dense = right(rows, "dense")
    if not dense:
        return
    smallest = min(dense, key=lambda row: row["memory"])
    fastest = min(dense, key=lambda row: row["time"]["median"])
    yield (
        f"strongest dense row: {smallest['row']} in memory ({smallest['memory']:.2f} of dense), {fastest['row']} in "
        f"time ({fastest['time']['median']:.2f} of dense)"
    )
    for row in right(rows, "sparse"):
        faster = fastest["time"]["median"] / row["time"]["median"]
        yield f"{row['row']}: {row['memory'] / smallest['memory']:.2f} of its memory, {faster:.2f}x as fast"


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """The README's table of some runs: a line a row, of every batch the memory and the time.

    Where two runs hold the same row of the same batch, the later one counts.
    """
    rows: dict[tuple[int, str], Row] = {}
    for run in runs:
        rows.update({(row["batch"], row["row"]): row for row in run["rows"]})
    batches = sorted({batch for batch, _ in rows})
    threads = {row["batch"]: row["threads"] for row in rows.values()}
    heads = [f"batch {b}, {threads[b]} thread(s): {what}" for b in batches for what in ("peak", "time")]
    lines = [f"| GAN iteration | {' | '.join(heads)} |", "| --- " * (1 + len(heads)) + "|"]
    strongest = {b: _strongest([row for (batch, _), row in rows.items() if batch == b]) for b in batches}
    for name in dict.fromkeys(name for _, name in rows):
        cells = [cell for b in batches for cell in _cells(rows.get((b, name)), strongest[b])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first, row = runs[0], next(iter(rows.values()))
    commits = " and ".join(dict.fromkeys(run["commit"] for run in runs))
    lines += [
        "",
        f"{row['layer']} at {100 * row['density']:g} %, blocks of {row['block'][0]}x{row['block'][1]}: peak of the "
        "bytes that torch holds during an iteration (weights, gradients, Adam's state, average, saved tensors, "
        "workspaces), and its time; in brackets relative to dense eager torch, times as medians of paired ratios. "
        f"**Bold**: the strongest dense row of a column. {first['machine']['cpu']}, {first['machine']['capability']}; "
        f"torch {first['versions']['torch']}, commit {commits}, {first['date']}.",
    ]
    return "\n".join(lines)


def _strongest(rows: Sequence[Row]) -> tuple[str, str]:
    dense = right(rows, "dense")
    smallest = min(dense, key=lambda row: row["memory"], default={"row": ""})
    fastest = min(dense, key=lambda row: row["time"]["median"], default={"row": ""})
    return smallest["row"], fastest["row"]


def _cells(row: Row | None, strongest: tuple[str, str]) -> list[str]:
    if row is None:
        return ["", ""]
    if row["wrong"]:
        return ["wrong", "wrong"]
    texts = (
        f"{row['peak'] / MIB:.0f} MiB ({row['memory']:.2f})",
        f"{row['seconds']:.2f} s ({row['time']['median']:.2f})",
    )
    return [f"**{t}**" if row["row"] == best else t for t, best in zip(texts, strongest, strict=True)]
