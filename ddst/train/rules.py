"""Rules that values read from a file must fit: the words of which `state_schema` describes a checkpoint.

A rule is a function of a value and of the place it stands at; it raises `Misfit` unless the value is as described.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Any, str], None]


class Misfit(ValueError):
    """A value that is not as described; the message names its place."""


def anything(value: Any, where: str) -> None:
    """Fits: it is described at another place."""


def nothing(value: Any, where: str) -> None:
    """None."""
    if value is not None:
        raise Misfit(f"{where} must be None, got {_shown(value)}")


def text(value: Any, where: str) -> None:
    """A string."""
    if type(value) is not str:
        raise Misfit(f"{where} must be a text, got {_shown(value)}")


def one_of(*expected: Any) -> Rule:
    """One of some values, of their type."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(e) and value == e for e in expected):
            raise Misfit(f"{where} must be {' or '.join(map(repr, expected))}, got {_shown(value)}")

    return check


def whole(low: int, high: int | None = None) -> Rule:
    """An int in a range."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or value < low or (high is not None and value > high):
            limits = f"{low}" if low == high else f"at least {low}" + ("" if high is None else f" and at most {high}")
            raise Misfit(f"{where} must be a whole number, {limits}, got {_shown(value)}")

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Rule:
    """A finite float in a range."""

    def check(value: Any, where: str) -> None:
        if type(value) is not float or not math.isfinite(value) or not low <= value <= high:
            limits = "" if low == -math.inf else f" of at least {low:g}"
            limits += "" if high == math.inf else f" and at most {high:g}"
            raise Misfit(f"{where} must be a finite number{limits}, got {_shown(value)}")

    return check


def optional(rule: Rule) -> Rule:
    """None, or what fits the rule."""
    return lambda value, where: None if value is None else rule(value, where)


def tensor(dtype: torch.dtype | None, shape: Sequence[int] | None = None, low: float = -math.inf,
           high: float = math.inf) -> Rule:  # fmt: skip
    """A dense tensor of a dtype (None: any float), of a shape, with finite entries in a range."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise Misfit(f"{where} must be a tensor, got {_shown(value)}")
        if value.dtype != dtype if dtype is not None else not value.is_floating_point():
            raise Misfit(f"{where} must be of {dtype or 'a float type'}, got {value.dtype}")
        if shape is not None and tuple(value.shape) != tuple(shape):
            raise Misfit(f"{where} must have the shape {tuple(shape)}, got {tuple(value.shape)}")
        if not value.isfinite().all():
            raise Misfit(f"{where} must be finite")
        if (low != -math.inf and (value < low).any()) or (high != math.inf and (value > high).any()):
            limits = (
                f"{low:g}" if low == high else f"at least {low:g}" + ("" if high == math.inf else f", at most {high:g}")
            )
            raise Misfit(f"{where} must be {limits}, got entries from {value.min().item():g} to {value.max().item():g}")

    return check


def pair(rule: Rule) -> Rule:
    """A tuple of two."""

    def check(value: Any, where: str) -> None:
        if type(value) is not tuple or len(value) != 2:
            raise Misfit(f"{where} must be two values, got {_shown(value)}")
        for i, entry in enumerate(value):
            rule(entry, f"{where}[{i}]")

    return check


def list_of(rule: Rule) -> Rule:
    """A list whose entries fit."""

    def check(value: Any, where: str) -> None:
        if type(value) is not list:
            raise Misfit(f"{where} must be a list, got {_shown(value)}")
        for i, entry in enumerate(value):
            rule(entry, f"{where}[{i}]")

    return check


def mapping_of(rule: Rule) -> Rule:
    """A dict of any texts, whose values fit."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise Misfit(f"{where} must be a dict, got {_shown(value)}")
        for key, entry in value.items():
            text(key, f"{where}: each key")
            rule(entry, _joined(where, key))

    return check


def some_of(rules: Mapping[str, Rule]) -> Rule:
    """A dict with some of some keys."""

    def check(value: Any, where: str) -> None:
        mapping_of(anything)(value, where)
        record({key: rule for key, rule in rules.items() if key in value})(value, where)

    return check


def record(rules: Mapping[Any, Rule]) -> Rule:
    """A dict with exactly these keys."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise Misfit(f"{where} must be a dict, got {_shown(value)}")
        for key in value:
            if key not in rules or type(key) is bool:
                raise Misfit(f"{_joined(where, key)} is unknown")
        for key in rules:
            part(key, rules[key])(value, where)

    return check


def part(key: Any, rule: Rule) -> Rule:
    def check(value: Any, where: str) -> None:
        if key not in value:
            raise Misfit(f"{_joined(where, key)} is missing")
        rule(value[key], _joined(where, key))

    return check


def _joined(where: str, key: Any) -> str:
    name = key if isinstance(key, str) else repr(key)
    name = name if len(name) <= 80 else name[:77] + "..."
    return f"{where}.{name}" if where else name


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    plain = isinstance(value, int | float | str | None)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"
