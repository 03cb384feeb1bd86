"""Where a module keeps the parameters that are not packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class OtherParameters(dict[str, nn.Parameter | None]):
    """``module._parameters`` beside packed weights, which says so where one of these is looked for.

    torch's hooks for spectral and weight norm, and its pruning, take a parameter out of here.

    Attributes:
        packed: name of a packed weight -> what to do instead of taking it away.
    """

    packed: Mapping[str, str]

    @staticmethod
    def beside(packed: Mapping[str, str], others: Mapping[str, nn.Parameter | None]) -> OtherParameters:
        """Those of ``others`` that are not packed."""
        found = OtherParameters((name, value) for name, value in others.items() if name not in packed)
        found.packed = packed
        return found

    def __missing__(self, name: str) -> Any:
        if name in self.packed:
            raise RuntimeError(self.packed[name])
        raise KeyError(name)

    def __delitem__(self, name: str) -> None:
        if name in self.packed:
            raise RuntimeError(self.packed[name])
        super().__delitem__(name)
