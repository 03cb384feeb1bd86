"""Optimizers that hold another one: which of them step a layer's values, and which keep state for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# What torch's own class and its subclasses keep beside state.
_OWN = ("state", "param_groups", "defaults")


def optimizers_of(optimizer: Optimizer, params: Iterable[Tensor] | None = None) -> list[Optimizer]:
    """The optimizer and those inside it, outermost first: all of them may keep state; the last one makes the steps.

    SAM, Lookahead, ``ZeroRedundancyOptimizer``, accelerate's ``AcceleratedOptimizer`` and others hold the optimizer
    that steps in an attribute, alone or in a list or dict. Followed is the one that holds ``params``.

    Args:
        optimizer: any torch optimizer. params: the parameters in question; all of ``optimizer`` when None.

    Raises:
        ValueError: several optimizers inside hold them; one inside holds other tensors than the outer one (master
            copies); the innermost never ran ``Optimizer.__init__``.

    >>> import torch
    >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    >>> optimizers_of(adam) == [adam]
    True
    """
    wanted = _held(optimizer) if params is None else {id(p) for p in params}
    chain = [optimizer]
    while True:
        outer = chain[-1]
        inside = {id(o): (name, o) for name, o in _inside(outer) if all(o is not known for known in chain)}
        own = _held(outer)
        for name, inner in inside.values():
            if _held(inner) and not _held(inner) & own:
                raise ValueError(
                    f"optimizer {_name(outer)} holds {_name(inner)} in .{name}, which steps other tensors than the "
                    f"parameters that {_name(outer)} was given: what becomes of the layers' values there is not known. "
                    "Give an optimizer that holds the values themselves"
                )
        following = [(name, o) for name, o in inside.values() if _held(o) & wanted]
        if len(following) > 1:
            names = ", ".join(f".{name} ({_name(o)})" for name, o in following)
            raise ValueError(
                f"optimizer {_name(outer)} holds several optimizers that step the model's parameters: {names}. Give "
                "the one that steps the sparse layers' values"
            )
        if not following:
            break
        chain.append(following[0][1])
    if not hasattr(chain[-1], "_optimizer_step_pre_hooks"):
        raise ValueError(
            f"optimizer {_name(chain[-1])} never ran Optimizer.__init__ and holds no other optimizer that steps the "
            "parameters: its steps cannot be seen. Give the optimizer that it stands for"
        )
    return chain


def check_nothing_hidden(optimizer: Optimizer, param: Tensor) -> None:
    """Raises ValueError where an optimizer keeps something of ``param`` outside its ``state``.

    Looked into are its attributes, its groups' entries and what ``state`` holds under other keys than parameters, with
    the lists and dicts in them: a tensor of the shape of ``param``, a dict with ``param`` as a key, an object that has
    such a ``state``.
    """
    kind = _name(optimizer)
    places = [("." + name, value) for name, value in vars(optimizer).items() if name not in _OWN]
    places += [(f".state[{key!r}]", value) for key, value in optimizer.state.items() if not isinstance(key, Tensor)]
    for group in optimizer.param_groups:
        if any(p is param for p in group["params"]):
            places += [(f"param_groups[…][{name!r}]", value) for name, value in group.items() if name != "params"]
    for place, value in places:
        if _keeps(value, param, 3):
            raise ValueError(
                f"optimizer {kind} keeps something of a parameter of shape {tuple(param.shape)} in {place}, outside of "
                "its state: that cannot follow a change of topology. Use an optimizer with its state in .state, such "
                "as Adam, RMSprop or SGD"
            )


def _keeps(value: Any, param: Tensor, depth: int) -> bool:
    if isinstance(value, Optimizer):
        return False
    if isinstance(value, Tensor):
        return value.shape == param.shape and not value.requires_grad and value is not param.grad
    if isinstance(value, Mapping):
        keyed = [held for key, held in value.items() if key is param]
        return any(isinstance(held, Tensor | Mapping | list) and len(held) for held in keyed) or (
            depth > 0 and any(_keeps(held, param, depth - 1) for held in value.values())
        )
    if isinstance(value, list | tuple):
        return depth > 0 and any(_keeps(held, param, depth - 1) for held in value)
    state = vars(value).get("state") if hasattr(value, "__dict__") and not isinstance(value, type) else None
    return isinstance(state, Mapping) and any(key is param for key in state)


def _inside(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """Optimizers in the attributes of one, by the attribute's name."""
    for name, value in vars(optimizer).items():
        if name in _OWN:
            continue
        several = (
            value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        )
        for one in several:
            if isinstance(one, Optimizer):
                yield name, one


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _name(optimizer: Optimizer) -> str:
    return type(optimizer).__name__
