"""Gradients with respect to packed weights, asked for by ``torch.autograd.grad`` and ``backward(inputs=…)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .functions import known
from .weight import PackedWeight

Inputs = Tensor | PackedWeight | Sequence[Tensor | PackedWeight]


def _leaf(weight: Any) -> Any:
    """The tensor that a graph holds for a weight."""
    if not isinstance(weight, PackedWeight):
        return weight
    if not weight.bound or not weight.canonical or weight.values is not weight.layer.values:
        raise RuntimeError(
            "a gradient with respect to a product or view of a packed weight: ask for that of the layer's weight, or "
            "use weight.unpacked() in the forward pass"
        )
    return weight.values


def _listed(inputs: Inputs) -> list[Any]:
    return [inputs] if isinstance(inputs, Tensor | PackedWeight) else list(inputs)


@known("grad")
def _grad(outputs: Any, inputs: Inputs, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...] | None:
    """As with a dense weight of which only the active blocks are trained: zero at the others."""
    weights = _listed(inputs)
    if any(isinstance(output, PackedWeight) for output in _listed(outputs)):
        return None
    found = torch.autograd.grad(outputs, [_leaf(w) for w in weights], *args, **kwargs)
    return tuple(
        w.with_values(g).unpacked() if isinstance(w, PackedWeight) and g is not None else g
        for w, g in zip(weights, found, strict=True)
    )


@known("backward")
def _backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
    grad_variables: Any = None, inputs: Inputs | None = None,
) -> bool | None:  # fmt: skip
    if inputs is None or any(isinstance(tensor, PackedWeight) for tensor in _listed(tensors)):
        return None
    leaves = [_leaf(weight) for weight in _listed(inputs)]
    torch.autograd.backward(tensors, grad_tensors, retain_graph, create_graph, grad_variables, leaves)
    return True
