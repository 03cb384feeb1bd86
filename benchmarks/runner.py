"""Measures one case: correctness first, then all programs in turn, as a row of plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ddst.benchmarks import peers
from ddst.benchmarks.problem import LAYOUTS, PASSES, Problem, Work
from ddst.benchmarks.registry import PEERS, Case
from ddst.measure import CLOCKS, Peak, Spread, clock_of, fastest, interleaved, peak

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        repeats: rounds; every program is measured once in each. clock: "wall", or "cpu" for a busy machine.
        layout: of the packed side's activations. "nchw" costs it two layout changes, and adds to convolutions the
            baseline "converted": the packed pass on channels_last, with these changes made by torch.
    """

    threads: int = 1
    repeats: int = 15
    clock: str = "wall"
    layout: str = "channels_last"


def measure(case: Case, settings: Settings) -> Row:
    """A row: the case, the threads, ``wrong`` (reasons), and where right the figures of every pass and of the step.

    Every pass has ``seconds`` (median), ``floor`` (seconds), ``peak_share``, ``bandwidth_share`` and ``baselines``:
    name -> seconds, layout and the spread of the ratio baseline / packed, or the reason why it has none.
    """
    torch.set_num_threads(settings.threads)
    row: Row = {**asdict(case), "threads": settings.threads, "layout": settings.layout, "wrong": []}
    row["block"] = list(case.block)
    row["baselines"] = list(case.baselines)
    if case.op == "conv2d" and settings.layout == "nchw":
        row["baselines"].append("converted")
    if case.op == "gan":
        from ddst.benchmarks.gan_iteration import measure_gan

        return {**row, **measure_gan(case, settings)}
    with torch.no_grad():
        problem = Problem.make(case, settings.layout == "channels_last")
        row["actual_density"] = problem.density
        expected = problem.expected()
        packed = problem.packed()
        row["wrong"] = [
            why for i, work in enumerate(packed) if (why := problem.wrong(i, work(), expected[i])) is not None
        ]
        if row["wrong"]:
            return row
        clock = CLOCKS[settings.clock] if case.device == "cpu" else clock_of(case.device)
        best = peak(case.device, getattr(torch, case.dtype))
        others = [name for name in row["baselines"] if name in PEERS[case.op]]
        row["baselines"] = [name for name in row["baselines"] if name not in others]
        rivals = _rivals(row["baselines"], problem, expected, clock)
        row["passes"], samples = {}, []
        for i, name in enumerate(PASSES):
            running = {b: work for b, (work, _) in rivals[i].items() if not isinstance(work, str)}
            times = interleaved([packed[i], *running.values()], settings.repeats, clock)
            samples.append(dict(zip(("packed", *running), times, strict=True)))
            row["passes"][name] = _pass_figures(problem, best, samples[-1], rivals[i])
        row["step"] = _step_figures(row, samples, problem, best)
        row["dense_flops"] = problem.flops(dense=True)
        for name in others:
            dense = peers.dense_passes(rivals)
            figures = {"missing": "needs the baseline dense"}
            if dense is not None:
                figures = peers.measure(name, problem, expected, dense, settings.repeats, clock)
            row["step"]["baselines"][name] = figures
        row["baselines"] += others
    return row


Rivals = dict[str, tuple[Work | str, str]]


def _rivals(
    names: list[str], problem: Problem, expected: list[torch.Tensor], clock: Callable[[], float]
) -> list[Rivals]:
    """For every pass, baseline -> (program or why there is none, layout)."""
    makers: dict[str, list[tuple[str, Callable[[], list[Work]]]]] = {
        "dense": [(LAYOUTS[i], partial(problem.dense, bool(i))) for i in range(2)],
        "masked": [(LAYOUTS[i], partial(problem.masked, bool(i))) for i in range(2)],
        "converted": [("nchw", problem.converted)],
        "bsr": [("", partial(problem.torch_sparse, "bsr"))],
        "csr": [("", partial(problem.torch_sparse, "csr"))],
    }
    found: list[Rivals] = [{} for _ in PASSES]
    for name in names:
        options = makers[name][:1] if problem.layer.op == "linear" else makers[name]
        made = [(layout, make()) for layout, make in options]
        for i in range(len(PASSES)):
            works = [works[i] for _, works in made]
            try:
                wrong = [problem.wrong(i, work(), expected[i]) for work in works]
                # A dense weight gradient has entries outside the active blocks, which are not compared.
                if any(wrong):
                    found[i][name] = (f"wrong: {wrong}", "")
                    continue
                choice = fastest(works, clock) if len(works) > 1 else 0
                found[i][name] = (works[choice], made[choice][0])
            except (RuntimeError, NotImplementedError) as error:
                found[i][name] = (f"torch has none: {str(error).splitlines()[0]}", "")
    return found


def _pass_figures(problem: Problem, best: Peak, times: dict[str, list[float]], rivals: Rivals) -> Row:
    seconds = Spread.of(times["packed"]).median
    baselines: Row = {}
    for name, (work, layout) in rivals.items():
        if isinstance(work, str):
            baselines[name] = {"missing": work}
            continue
        median = Spread.of(times[name]).median
        ratio = asdict(Spread.of_ratios(times[name], times["packed"]))
        baselines[name] = {"seconds": median, "layout": layout, "speedup": ratio}
        if name == "dense":
            baselines[name]["peak_share"] = problem.flops(dense=True) / median / best.flops
    return {
        "seconds": seconds,
        "floor": best.floor(problem.flops(), problem.bytes()),
        "peak_share": problem.flops() / seconds / best.flops,
        "bandwidth_share": problem.bytes() / seconds / best.bandwidth,
        "baselines": baselines,
    }


def _step_figures(row: Row, samples: list[dict[str, list[float]]], problem: Problem, best: Peak) -> Row:
    """The sum of the three passes: a ratio is taken of the sums of one round."""
    totals = {
        name: [sum(parts) for parts in zip(*(s[name] for s in samples), strict=True)]
        for name in ("packed", *row["baselines"])
        if all(name in s for s in samples)
    }
    seconds = Spread.of(totals["packed"]).median
    baselines = {
        name: {"seconds": Spread.of(total).median, "speedup": asdict(Spread.of_ratios(total, totals["packed"]))}
        for name, total in totals.items()
        if name != "packed"
    }
    floor = sum(row["passes"][name]["floor"] for name in PASSES)
    step: Row = {
        "seconds": seconds,
        "floor": floor,
        "peak_share": 3 * problem.flops() / seconds / best.flops,
        "bandwidth_share": 3 * problem.bytes() / seconds / best.bandwidth,
        "baselines": baselines,
    }
    if "dense" in baselines:
        step["ceiling"] = baselines["dense"]["seconds"] / floor
    return step
