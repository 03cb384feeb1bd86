"""Which modules compute what a layer of :mod:`torch.nn` does, and what else hangs on an instance of one."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

#: The layers that have a sparse twin.
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)

#: What the body of a class may hold without a change of what its instances do once they are made.
_SILENT = {
    "__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__annotate__", "__annotate_func__",
    "__annotations_cache__", "__firstlineno__", "__static_attributes__", "__dict__", "__weakref__",
}  # fmt: skip


def plain_kind(cls: type) -> type[nn.Module] | None:
    """The layer of torch whose methods a class has, all of them and no others; None if there is none.

    A subclass that adds an ``__init__`` only is such a class, and one whose own ``sparsify_as`` names the layer that it
    equals.

    >>> class Orthogonal(nn.Conv2d):
    ...     def __init__(self, *sizes):
    ...         super().__init__(*sizes)
    ...         nn.init.orthogonal_(self.weight)
    >>> plain_kind(Orthogonal).__name__
    'Conv2d'
    """
    named = vars(cls).get("sparsify_as")
    if named is not None:
        return named if named in PLAIN else None
    kind = next((base for base in cls.__mro__ if base in PLAIN), None)
    if kind is None or any(vars(base).keys() - _SILENT for base in cls.__mro__ if base not in kind.__mro__):
        return None
    return kind


def own_attributes(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """What an instance holds that a new layer of this kind does not: set by its ``__init__``, or from outside.

    >>> layer = nn.Linear(2, 2)
    >>> layer.gain = 2
    >>> own_attributes(layer, nn.Linear)
    {'gain': 2}
    """
    # torch's norms by hooks keep the weight that they compute in a plain attribute.
    made: Any = kind
    return {name: value for name, value in vars(module).items() if name not in _attributes(made) and name != "weight"}


def overridden(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What an instance has in the place of an attribute of its class: the name, ``forward`` first, or None.

    >>> layer = nn.Linear(2, 2)
    >>> layer.forward = lambda x: x
    >>> overridden(layer, nn.Linear)
    'forward'
    """
    names = [name for name in own_attributes(module, kind) if hasattr(kind, name)]
    return "forward" if "forward" in names else next(iter(names), None)


@functools.cache
def _attributes(kind: Any) -> frozenset[str]:
    return frozenset(vars(kind(*[1] * (2 if kind is nn.Linear else 3), device="meta")))
