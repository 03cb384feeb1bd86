"""The command line: `ddst train --out DIR ...`, `ddst replay LOG`, what is done with runs, and `ddst info`."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ddst import __version__, build_info, keep_freed_memory
from ddst.commands import add_commands
from ddst.gan.controller import MODES, SIGNALS
from ddst.train.config import OPTIONS, REPLAYED
from ddst.train.methods import CALLED
from ddst.train.options import flag, shown_value
from ddst.train.terminal import lenient_streams, one_line


class _Parser(argparse.ArgumentParser):
    """Errors are one line with exit code 2, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def _converter(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """`kind` as argparse wants it: its error says what came and what was expected."""
    names: dict[Any, str] = {int: "a whole number", float: "a number"}

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            expected = f"expected {names[kind]}, got {text!r}" if kind in names else str(error)
            raise argparse.ArgumentTypeError(expected) from None

    return convert


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, Callable[[argparse.Namespace], int]]]:
    """The parser, and what the commands run that need a run. `train` puts only given options into its namespace."""
    parser = _Parser(
        prog="ddst",
        description="Sparse GAN training on packed block-sparse layers.",
        epilog="Exit code 0: done; 2: what was asked for cannot be, and nothing was written; 1: it broke off; "
        "130, 143: ended by Ctrl-C or SIGTERM.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ddst {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train a GAN",
        description="Train a GAN, dense or sparse. Exit code 0: done (or ended by --stop-after); 2: a setting, a "
        "folder or a checkpoint is wrong, nothing was written; 130, 143: ended by Ctrl-C or SIGTERM after the current "
        "step, with a checkpoint; 1: training broke off.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name in OPTIONS:
        _add_option(train, name)
    replay = commands.add_parser(
        "replay",
        help="the controller of D's density again over a run's log",
        description="Decide again from the measurements in a run's log, with other settings: a table beside the run's "
        "own decisions, and a picture. Settings that are not given are the run's; with another --signal the bounds, "
        "and with another --mode D's highest density, are the usual ones of that.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    replay.add_argument("log", metavar="LOG", type=Path, help="log.jsonl of a run, or the run's folder")
    replay.add_argument("--mode", choices=MODES, help="range and what is done at its end (default: the run's)")
    replay.add_argument("--signal", choices=SIGNALS, help="what is held within the bounds (default: the run's)")
    replay.add_argument(
        "--out", metavar="FILE", type=Path, help="the picture, FILE.png (default: replay.png beside the log)"
    )
    for name in REPLAYED:
        _add_option(replay, name, "the run's")
    after = add_commands(commands)
    commands.add_parser("info", help="show version, libraries and instruction sets", allow_abbrev=False)
    return parser, after


def _add_option(parser: argparse.ArgumentParser, name: str, default: str | None = None) -> None:
    """The option of a setting of a run, with how its default reads if that is another one."""
    declared = OPTIONS[name]
    switch = declared.kind is bool
    default = default or declared.shown
    default = default or (None if switch or declared.default is None else shown_value(declared.default))
    more: dict[str, Any] = {}
    if declared.words > 1:
        more["nargs"] = declared.words
    if declared.choices:
        more["choices"] = declared.choices
    elif declared.metavar:
        more["metavar"] = declared.metavar
    text = declared.help + (f" (default: {default})" if default else "")
    if declared.methods:
        text += f" (with {CALLED.get(declared.methods, ', '.join(declared.methods))})"
    text = text.replace("%", "%%")
    if switch:
        action: Any = "store_true" if declared.default is False else argparse.BooleanOptionalAction
        parser.add_argument(flag(name), action=action, help=text)
    else:
        parser.add_argument(flag(name), type=_converter(declared.kind), help=text, **more)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (argparse exits by itself for --help and wrong options)."""
    parser, after = build_parser()
    namespace, unknown = parser.parse_known_args(arguments)
    command = namespace.command
    if unknown:
        _refuse(parser, command, unknown)
    if command == "info":
        return _info()
    with lenient_streams():
        if command in after:
            return _guarded(command, lambda: after[command](namespace))
        given = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(namespace).items()
            if name != "command"
        }
        return _guarded(command, lambda: _replay(given) if command == "replay" else _train(given))


def _refuse(parser: argparse.ArgumentParser, command: str, unknown: Sequence[str]) -> NoReturn:
    """The command's error for arguments that it does not have, with its option that is spelled nearly so."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    of: argparse.ArgumentParser = commands.choices[command]
    near = difflib.get_close_matches(unknown[0].partition("=")[0], of._option_string_actions, 1)
    more = f"did you mean {near[0]}?" if near else f"ddst {command} --help lists what there is"
    of.error(f"unrecognized arguments: {' '.join(unknown)} ({more})")


def _replay(given: dict[str, Any]) -> int:
    from ddst.train.replay import run_replay

    rest = (given.pop("log"), given, given.pop("mode", None), given.pop("signal", None), given.pop("out", None))
    return run_replay(*rest)


def _info() -> int:
    print(json.dumps({"ddst": __version__, **build_info()}, indent=2, default=str))
    return 0


def _train(given: dict[str, Any]) -> int:
    from ddst.train.job import run

    return run({name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _guarded(command: str, do: Callable[[], int]) -> int:
    """The exit code of a command; what can go wrong in one is one line.

    2: what was asked for cannot be, which is said before anything is written. 1: it broke off in the midst.
    """
    try:
        from ddst.data import DataError
        from ddst.train.checkpoint import CheckpointError
        from ddst.train.loop import TrainingError
        from ddst.train.options import ConfigError
        from ddst.train.processes import ProcessError

        keep_freed_memory()  # The process is this command's alone.
        try:
            return do()
        except (ConfigError, DataError, CheckpointError) as error:
            return _ended(command, 2, f"error: {error}")
        except (TrainingError, ProcessError) as error:
            return _ended(command, 1, f"error: {error}")
        except OSError as error:  # A full disk, a folder that is gone: the last whole checkpoint stays.
            why = f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}"
            return _ended(command, 1, why)
    except ModuleNotFoundError as error:
        return _ended(command, 2, f"error: {error.name} is missing: pip install {_package(error.name)}")
    except KeyboardInterrupt:  # Outside the training loop, which ends in order.
        return _ended(command, 130, "interrupted")


def _package(module: str | None) -> str:
    """What to ask pip for: the extra that brings a module; without torchvision, which nothing uses."""
    name = (module or "").partition(".")[0]
    if name == "torch_fidelity":
        return "--no-deps torch-fidelity"
    extra = {"onnx": "onnx", "onnxscript": "onnx", "tensorboard": "live", "wandb": "live"}.get(name, "train")
    return f"'ddst[{extra}]'"


def _ended(command: str, code: int, why: str) -> int:
    print(f"ddst {command}: {one_line(why)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
