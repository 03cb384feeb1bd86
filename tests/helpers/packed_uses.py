"""Modules of other people's kind, with their weight packed and dense: equal in every derivative, compiled or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddst import topology as tp
from ddst.nn.packed.callers import WeightUses
from ddst.nn.packed.parameter import PackedParameter, attach, detach, split_shape


class Own(nn.Module):
    """Somebody's module: a weight, and what it does with it."""

    def __init__(self, shape: tuple[int, ...], use: Callable[..., Tensor], **parameters: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value.double()))
        self.use = use

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.use(self, *inputs)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    use: Callable[..., Tensor]
    kinds: tuple[str, ...]  # what it ran in as blocks
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    block: tuple[int, int] = (8, 4)


def pair_of(case: Case, density: float = 0.4) -> tuple[Own, Own]:
    """A module with its weight packed, and its twin with the same weight, dense."""
    torch.manual_seed(0)
    parameters = {name: torch.rand(shape) + 0.5 for name, shape in case.parameters}
    module = Own(case.shape, case.use, **parameters)
    pack(module, "weight", density, case.block)
    dense = copy.deepcopy(module)
    detach(dense)
    return module, dense


def pack(module: nn.Module, name: str, density: float = 0.4, block: tuple[int, int] = (8, 4)) -> PackedParameter:
    parameter = module._parameters[name]
    assert parameter is not None
    shape = split_shape(parameter.shape)[1]
    mask = tp.random_mask(shape, block, tp.block_count(density, tp.check_block_total(shape, block)))
    packed = PackedParameter.of(parameter, mask, block, None)
    attach(module, name, packed)
    return packed


def packed_in(module: nn.Module) -> PackedParameter:
    child = module.get_submodule("packed_weight")
    assert isinstance(child, PackedParameter)
    return child


def gradients(module: Own, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output, its gradients, and gradients of a penalty on those of the inputs."""
    xs = [x.clone().requires_grad_() for x in inputs]
    y = module(*xs)
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [*xs, *module.parameters()]
    first = torch.autograd.grad(y, wanted, direction, create_graph=True, allow_unused=True)
    penalty = sum((g.square().sum() for g in first[: len(xs)] if g is not None), torch.zeros((), dtype=y.dtype))
    second = torch.autograd.grad(penalty, wanted, allow_unused=True, materialize_grads=True) if penalty.grad_fn else ()
    return y, [torch.zeros_like(w) if g is None else g for g, w in zip(first, wanted, strict=True)], list(second)


def check_equal(case: Case, density: float = 0.4) -> WeightUses:
    """Output, gradients and those of a penalty on gradients are those of the masked dense weight."""
    module, dense = pair_of(case, density)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in case.inputs)
    packed = packed_in(module)
    found, expected = gradients(module, inputs), gradients(dense, inputs)
    torch.testing.assert_close(found[0], expected[0])
    names = ["input"] * len(inputs) + [name for name, _ in module.named_parameters()]
    dense_names = ["input"] * len(inputs) + [name for name, _ in dense.named_parameters()]
    for order in (1, 2):
        for i, what in enumerate(names if found[order] else []):
            key = what.replace("packed_weight.values", "weight")
            j = i if what == "input" else dense_names.index(key)
            wanted = expected[order][j]  # type: ignore[index]
            if key == "weight":
                wanted = tp.pack_slots(wanted.reshape(packed.weight_shape), packed.slot_blocks, packed.block)
            torch.testing.assert_close(found[order][i], wanted, msg=lambda text, w=what, o=order: f"{w}, {o}: {text}")  # type: ignore[index]
    assert packed.weight_uses.packed == set(case.kinds)
    return packed.weight_uses


def check_compiled(case: Case) -> None:
    """Compiled whole, output and gradients are the same."""
    module, _ = pair_of(case)
    inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in case.inputs)
    expected = gradients(module, inputs)
    torch._dynamo.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = compiled(*inputs)
    torch.testing.assert_close(y, expected[0])
    direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    grads = torch.autograd.grad(y, list(module.parameters()), direction, allow_unused=True, materialize_grads=True)
    for found, wanted in zip(grads, expected[1][len(inputs) :], strict=True):
        torch.testing.assert_close(found, wanted)
