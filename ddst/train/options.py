"""How a setting of a run is declared: its default, the words it is given in, its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any

from ddst.gan.augment import KINDS
from ddst.train.terminal import OneLineError

Known = Mapping[str, Any]
LARGEST = 2**31 - 1  # Of counts: sizes and windows of more do not exist, and C code behind them overflows.


class ConfigError(OneLineError, ValueError):
    """A setting that is not possible; the message is one line that names the option, what came and what is expected."""


@dataclass(frozen=True)
class Range:
    """A predicate on a value, and the words that say what it expects."""

    holds: Callable[[Any], bool]
    expected: str


SHARE = Range(lambda v: 0 <= v <= 1, "from 0 to 1")
DENSITY = Range(lambda v: 0 < v <= 1, "above 0 and at most 1")
COUNT = Range(lambda v: 1 <= v <= LARGEST, f"at least 1 and at most {LARGEST}")
NATURAL = Range(lambda v: 0 <= v <= LARGEST, f"at least 0 and at most {LARGEST}")
THREADS = Range(lambda v: 0 <= v <= 1024, "at least 0 and at most 1024")
SEED = Range(lambda v: 0 <= v < 2**63, "at least 0 and below 2**63")
SAMPLES = Range(lambda v: 2 <= v <= 10**6, f"at least 2 and at most {10**6}")
NOT_NEGATIVE = Range(lambda v: v >= 0 and math.isfinite(v), "at least 0 and finite")
# Adam divides it by 1 - beta1, and the quotient must be a float32.
RATE = Range(lambda v: 0 < v <= 1e20, "above 0 and at most 1e20")
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
        methods: the methods that have it; None: all.
    """

    default: Any
    kind: Callable[[str], Any]
    help: str
    shown: str | None = None
    range: Range | None = None
    choices: tuple[str, ...] | None = None
    words: int = 1
    metavar: str | tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None

    def resolve(self, known: Known) -> Any:
        """The default, given the settings declared before."""
        return self.default(known) if callable(self.default) else self.default

    def plain(self, name: str, value: Any) -> Any:
        """The value as an int, float, str, bool, None or tuple of them, which a checkpoint can hold.

        Raises:
            ConfigError: a value of another type (None where a default that depends on others is never None included),
                outside the choices or outside the range.
        """
        if value is None and self.default is None:
            return None
        plain, expected = self._converted(value)
        if plain is not None and self.kind is parse_augment:
            try:
                plain = parse_augment(plain)
            except ValueError as error:
                raise ConfigError(f"{flag(name)}: {error}") from None
        if plain is None:
            raise ConfigError(f"{flag(name)} must be {expected}, got {value!r}")
        if plain == "":
            raise ConfigError(f"{flag(name)} must not be empty")
        if self.choices and plain not in self.choices:
            raise ConfigError(f"{flag(name)} must be one of {', '.join(self.choices)}, got {plain}")
        if self.range and not self.range.holds(plain):
            raise ConfigError(f"{flag(name)} must be {self.range.expected}, got {shown_value(plain)}")
        return plain

    def _converted(self, value: Any) -> tuple[Any, str]:
        """The plain value, None where it has another type; and the words that say which type it must have."""
        kind, words = (int, 2) if self.kind is parse_block else (self.kind, self.words)
        kind = str if kind is parse_augment else kind
        if words > 1:
            expected = f"{words} {_KINDS[kind][1]}s"
            values = [_scalar(kind, v) for v in value] if isinstance(value, tuple | list) else []
            if len(values) != words or None in values:
                return None, expected
            if self.kind is parse_block and not all(1 <= v <= 64 for v in values):
                return None, "two sides from 1 to 64"
            return tuple(values), expected
        return _scalar(kind, value), f"a {_KINDS[kind][1]}"


# Types as which a value of a kind is taken, and the kind's name.
_KINDS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "whole number"),
    float: (Real, "number"),
    str: (str | PathLike, "text"),
    bool: (bool, "bool"),
}


def _scalar(kind: Any, value: Any) -> Any:
    if not isinstance(value, _KINDS[kind][0]) or (kind is not bool and isinstance(value, bool)):
        return None
    if kind is str:
        text = fspath(value)
        return text if isinstance(text, str) and "\0" not in text else None
    try:
        return kind(value)
    except OverflowError:  # An int beyond all floats.
        return None


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


def parse_augment(text: str) -> str:
    """'cutout,color' -> 'color,cutout': kinds of DiffAugment, each once, in their order; 'none'.

    Example:
        >>> parse_augment("cutout,color"), parse_augment("none")
        ('color,cutout', 'none')
    """
    words = text.split(",")
    if text != "none" and (not set(words) <= set(KINDS) or len(set(words)) < len(words)):
        raise ValueError(f"expected none, or some of {', '.join(KINDS)} joined by commas, got {text!r}")
    return text if text == "none" else ",".join(kind for kind in KINDS if kind in words)


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
