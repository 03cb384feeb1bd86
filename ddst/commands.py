"""The commands on a run that has been trained: which options `ddst export` and the others take, and what they call."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = "folder of a run, its checkpoint, or a file of `ddst export --safetensors` or `--dense`"


def add_commands(commands: Any) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add a parser for each; returns what each runs."""
    _add_sample(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_report(commands)
    return {"sample": _sample, "evaluate": _evaluate, "export": _export, "report": _report}


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number from `low` to `high`, as argparse wants it."""

    def convert(text: str) -> int:
        if not (text.removeprefix("-").isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return convert


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="draw images of a run's generator",
        description="Draw images of the averaged generator of a run: a grid, files, or both.",
        allow_abbrev=False,
    )
    sample.add_argument("run", metavar="RUN", type=Path, help=RUN)
    sample.add_argument("--out", metavar="FILE", type=Path, help="the grid, FILE.png; it is replaced")
    sample.add_argument("--folder", metavar="DIR", type=Path, help="one PNG an image; a new or empty folder")
    sample.add_argument("--count", metavar="N", type=_whole(1, 10**6), default=64, help="images (default: 64)")
    sample.add_argument("--seed", metavar="S", type=_whole(0, 2**63 - 1), default=0, help="of the noise (default: 0)")
    sample.add_argument(
        "--class", metavar="K", dest="label", type=_whole(0, 10**6), help="all of one class, by its place from 0 on"
    )
    sample.add_argument("--interpolate", action="store_true", help="each row is a walk from one noise to another")


def _sample(given: argparse.Namespace) -> int:
    from ddst.runs.sample import sample
    from ddst.train.options import ConfigError
    from ddst.train.terminal import one_line

    if given.out is None and given.folder is None:
        raise ConfigError("--out FILE or --folder DIR is required: where the images go")
    about = sample(
        given.run,
        given.count,
        given.seed,
        grid=given.out,
        folder=given.folder,
        label=given.label,
        interpolate=given.interpolate,
    )
    for path in (given.out, given.folder):
        if path is not None:
            print(one_line(f"{path}  {given.count} images of the averaged generator of step {about.step}"))
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="judge a run's generator",
        description="Judge the averaged generator of a run. If RUN is its folder, evaluation.json in it keeps the "
        "figures.",
        allow_abbrev=False,
    )
    evaluate.add_argument("run", metavar="RUN", type=Path, help=RUN)
    evaluate.add_argument(
        "--metrics",
        metavar="NAME,...",
        type=_names,
        help="fid, is, prdc (precision, recall, density, coverage) by Inception-v3; digits or shapes, the embedded "
        "distances (default: that of the run's data, fid for other data)",
    )
    evaluate.add_argument("--weights", metavar="FILE", type=Path, help="weights of Inception-v3, see docs/metrics.md")
    evaluate.add_argument(
        "--reference", metavar="FILE.npz", type=Path, help="shared statistics or images, for the data"
    )
    evaluate.add_argument("--data", metavar="PATH", help="real images, where the run's own have moved")
    evaluate.add_argument("--held-out", action="store_true", help="compare with the images set aside for tests")
    evaluate.add_argument(
        "--samples", metavar="N", type=_whole(11, 10**6), help="default: as many as real, 50,000 at most"
    )
    evaluate.add_argument("--seed", metavar="S", type=_whole(0, 2**63 - 1), default=0, help="of the noise (default: 0)")
    evaluate.add_argument("--statistics", metavar="FILE.npz", type=Path, help="write mu and sigma of the real images")


def _evaluate(given: argparse.Namespace) -> int:
    from ddst.runs.evaluate import evaluate
    from ddst.train.terminal import one_line

    evaluate(
        given.run,
        given.metrics,
        samples=given.samples,
        seed=given.seed,
        weights=given.weights,
        reference=given.reference,
        data=given.data,
        held_out=given.held_out,
        statistics=given.statistics,
        tell=lambda figure: print(one_line(str(figure))),
    )
    return 0


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a run's generator for other programs",
        description="Write the averaged generator of a run, in eval mode, as one file.",
        allow_abbrev=False,
    )
    export.add_argument("run", metavar="RUN", type=Path, help=RUN)
    form = export.add_mutually_exclusive_group(required=True)
    for name, what in (
        ("onnx", "ONNX: noise in, images out; packed weights stay packed in the file (needs ddst[onnx])"),
        ("dense", "safetensors of torch's own layers, zeros where no block is"),
        ("safetensors", "safetensors of the packed weights, read by ddst.load_generator"),
    ):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=what)
    export.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file; it must not exist")


def _export(given: argparse.Namespace) -> int:
    from ddst.runs.export import export
    from ddst.train.terminal import one_line

    said = export(given.run, given.form, given.out)
    print(one_line(f"{given.out}  {said}"))
    return 0


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="one page of a run, or of several beside each other",
        description="Write one self-contained HTML page of runs, finished or not; it needs no network.",
        allow_abbrev=False,
    )
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="folders of runs")
    report.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="default: report.html")


def _report(given: argparse.Namespace) -> int:
    from ddst.runs.page import report
    from ddst.train.terminal import one_line

    report(given.runs, given.out)
    print(one_line(f"{given.out}  {len(given.runs)} run{'s' if len(given.runs) > 1 else ''} on one page"))
    return 0
