"""How a setting of a run is declared: its default, the words it is given in, its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field
from typing import Any

Known = Mapping[str, Any]
LARGEST = 2**31 - 1  # Of counts: sizes and windows of more do not exist, and C code behind them overflows.


class ConfigError(ValueError):
    """A setting that is not possible; the message is one line that names the option, what came and what is expected."""


@dataclass(frozen=True)
class Range:
    """A predicate on a value, and the words that say what it expects."""

    holds: Callable[[Any], bool]
    expected: str


SHARE = Range(lambda v: 0 <= v <= 1, "from 0 to 1")
DENSITY = Range(lambda v: 0 < v <= 1, "above 0 and at most 1")
COUNT = Range(lambda v: 1 <= v <= LARGEST, f"at least 1 and at most {LARGEST}")
TWO = Range(lambda v: 2 <= v <= LARGEST, f"at least 2 and at most {LARGEST}")
NATURAL = Range(lambda v: 0 <= v <= LARGEST, f"at least 0 and at most {LARGEST}")
THREADS = Range(lambda v: 0 <= v <= 1024, "at least 0 and at most 1024")
SEED = Range(lambda v: 0 <= v < 2**63, "at least 0 and below 2**63")
NOT_NEGATIVE = Range(lambda v: v >= 0 and math.isfinite(v), "at least 0 and finite")
POSITIVE = Range(lambda v: v > 0 and math.isfinite(v), "above 0 and finite")
BELOW_ONE = Range(lambda v: 0 <= v < 1, "at least 0 and below 1")
PAIR_BELOW_ONE = Range(lambda v: all(0 <= x < 1 for x in v), "two numbers of at least 0 and below 1")
BOUNDS = Range(lambda v: all(map(math.isfinite, v)) and v[0] <= v[1], "LO not above HI")


@dataclass(frozen=True)
class Option:
    """One setting as it is given on the command line.

    Attributes:
        default: its value, or a function of the settings declared before it.
        kind: converts one word of the command line; `bool` makes a flag without words.
        help: what it means.
        shown: how the default reads in `--help` where it is a function.
        range: what the value must satisfy, None values excepted.
        choices: the allowed words.
        words: how many words it takes; more than one gives a tuple.
        metavar: how its words are called in `--help`.
    """

    default: Any
    kind: Callable[[str], Any]
    help: str
    shown: str | None = None
    range: Range | None = None
    choices: tuple[str, ...] | None = None
    words: int = 1
    metavar: str | tuple[str, ...] | None = None

    def resolve(self, known: Known) -> Any:
        """The default, given the settings declared before."""
        return self.default(known) if callable(self.default) else self.default

    def check(self, name: str, value: Any) -> None:
        """Raises `ConfigError` when a value is outside the choices or the range."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise ConfigError(f"{flag(name)} must be one of {', '.join(self.choices)}, got {value}")
        if self.range and not self.range.holds(value):
            raise ConfigError(f"{flag(name)} must be {self.range.expected}, got {shown_value(value)}")


def option(default: Any, kind: Callable[[str], Any], help: str, **more: Any) -> Any:
    """A dataclass field that carries an `Option`."""
    return field(metadata={"option": Option(default, kind, help, **more)})


def option_of(declared: Field[Any]) -> Option:
    """The `Option` of a field made by `option`."""
    found: Option = declared.metadata["option"]
    return found


def flag(name: str) -> str:
    """'drop_fraction' -> '--drop-fraction'."""
    return "--" + name.replace("_", "-")


def shown_value(value: Any) -> str:
    """A value as it would be typed: (16, 16) of a block as 16x16, other tuples with a blank between.

    Example:
        >>> shown_value((0.45, 0.55)), shown_value((16, 16)), shown_value(None)
        ('0.45 0.55', '16x16', 'none')
    """
    if isinstance(value, tuple):
        return ("x" if all(isinstance(v, int) for v in value) else " ").join(map(str, value))
    return "none" if value is None else str(value)


def parse_block(text: str) -> tuple[int, int]:
    """'32x8' -> (32, 8): output channels by input channels of a block.

    Example:
        >>> parse_block("16x16")
        (16, 16)
    """
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and 1 <= int(side) <= 64 for side in sides):
        raise ValueError(f"expected ROWSxCOLUMNS such as 16x16, each from 1 to 64, got {text!r}")
    return int(sides[0]), int(sides[1])
