"""The commands on a run that has been trained: which options `ddst export` and the others take, and what they call."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = "folder of a run, its checkpoint, or a file of `ddst export --safetensors` or `--dense`"


def add_commands(commands: Any) -> dict[str, Callable[[argparse.Namespace], int]]:
    """Add a parser for each; returns what each runs."""
    _add_export(commands)
    return {"export": _export}


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
