"""What a model does with a sample, watched without changing it: which layers it calls, with what, and how much work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.flop_counter import FlopCounterMode

from ..nn import PackedParameter, SparseLayer
from .candidates import Candidate


@dataclass(frozen=True)
class Seen:
    """What a layer was called with when the model ran: its first input, how often, whether that needs a gradient."""

    input: Tensor
    calls: int
    input_grad: bool

    @property
    def key(self) -> tuple[Any, ...]:
        x = self.input
        return (tuple(x.shape), x.stride(), x.dtype, str(x.device), self.input_grad)


def arguments_of(sample: Tensor | Sequence[Any]) -> tuple[Any, ...]:
    """What to call the model with: ``sample`` itself, or where it is a tuple or a list, its items."""
    if not isinstance(sample, Tensor | tuple | list):
        raise TypeError(f"sample must be a tensor or a sequence of arguments, got {type(sample).__name__}")
    return (sample,) if isinstance(sample, Tensor) else tuple(sample)


def run_of(model: nn.Module, sample: Tensor | Sequence[Any]) -> Callable[[], object]:
    """Calls the model with a sample."""
    arguments = arguments_of(sample)
    return lambda: model(*arguments)


def check_not_lazy(model: nn.Module) -> None:
    """Raises for what running a model would give a shape: that cannot be undone."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ValueError(f"sample cannot be run: {name} is lazy, run the model once on a batch before")


def multiply_adds(model: nn.Module, run: Callable[[], object], weights: Sequence[Candidate]) -> dict[str, float]:
    """``f_l = weights × output positions × calls``: what each weight takes in a forward pass when all of it is active.

    Counted by :mod:`torch.utils.flop_counter` while the module that holds the weight runs, without what other modules
    with weights do inside of it; where a module holds several weights, they share its work by their sizes. A module
    that is not called itself counts in the one around it, which reads its weight. What the pass does not reach has 0.

    Args:
        model: nothing of it is changed. run: calls it once, forward.
        weights: of :func:`~ddst.convert.find_weights`.

    Raises:
        ValueError: the model is lazy.
    """
    check_not_lazy(model)
    around = {id(child): module for module in model.modules() for child in module.children()}

    def outside(module: nn.Module) -> nn.Module:
        # What keeps blocks or makes a weight: the module around it computes with them.
        while isinstance(module, PackedParameter | ParametrizationList | nn.ModuleDict) and id(module) in around:
            module = around[id(module)]
        return module

    at = {c.name: outside(c.module) for c in weights}
    done = _operations_in(model, run, {id(module): module for module in at.values()})
    # What was not called has a weight that a module around it reads, the innermost that was called.
    uncalled = [name for name, module in at.items() if id(module) not in done]
    if uncalled:
        called = _operations_in(model, run, {id(module): module for module in model.modules()})
        for name in uncalled:
            while id(at[name]) not in called and id(at[name]) in around:
                at[name] = around[id(at[name])]
        done = _operations_in(model, run, {id(module): module for module in at.values()})
    held: dict[int, int] = {}
    for c in (c for c in weights if c.multiplies):
        held[id(at[c.name])] = held.get(id(at[c.name]), 0) + c.size
    found = {}
    for c in weights:
        operations = done.get(id(at[c.name]), 0.0) / 2
        if isinstance(c.module, SparseLayer):  # its active blocks were counted, whole
            operations *= c.size / max(1, c.module.nnz * c.module.block[0] * c.module.block[1])
        found[c.name] = operations * c.size / max(1, held[id(at[c.name])]) if c.multiplies else 0.0
    return found


def _operations_in(model: nn.Module, run: Callable[[], object], modules: Mapping[int, nn.Module]) -> dict[int, float]:
    """``id -> operations`` of every module that was called, without those in others of them inside of it."""
    counter = FlopCounterMode(display=False)
    done: dict[int, float] = {}
    running: list[list[float]] = []  # of every module on the way down: the count at its start, and that of those inside

    def enter(module: nn.Module, *_: Any) -> None:
        running.append([counter.get_total_flops(), 0.0])

    def leave(module: nn.Module, *_: Any) -> None:
        start, inside = running.pop()
        all_of_it = counter.get_total_flops() - start
        done[id(module)] = done.get(id(module), 0.0) + all_of_it - inside
        if running:
            running[-1][1] += all_of_it

    handles = []
    for module in modules.values():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    fused = torch.backends.mha.get_fastpath_enabled()  # one operator for all of a layer, which nothing counts
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # With gradients: without, the counter fails at modules that are called with a parameter.
        with undisturbed(model), torch.enable_grad(), counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    return done


def watch(
    model: nn.Module, arguments: tuple[Any, ...], candidates: list[Candidate]
) -> tuple[Callable[[], object], dict[str, Seen]]:
    """The model's training step (forward and all gradients), and what each layer was called with in one."""
    check_not_lazy(model)
    seen: dict[str, Seen] = {}
    handles = []
    for candidate in (c for c in candidates if c.slots):

        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], name: str = candidate.name) -> None:
            input, before = inputs[0] if inputs else named.get("input"), seen.get(name)
            if not isinstance(input, Tensor):  # the layer itself says what is wrong with it
                return
            first = before.input if before else input.detach()
            needed = input.requires_grad or (before is not None and before.input_grad)
            seen[name] = Seen(first, (before.calls if before else 0) + 1, needed)

        handles.append(candidate.module.register_forward_pre_hook(note, with_kwargs=True))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        outputs = [t for t in tensors_in(model(*arguments)) if t.requires_grad]
        if outputs and parameters:
            torch.autograd.grad(outputs, parameters, [torch.ones_like(t) for t in outputs], allow_unused=True)

    try:
        with undisturbed(model), torch.enable_grad():
            step()
    finally:
        for handle in handles:
            handle.remove()
    return step, seen


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Puts back what running a model changes: buffers (batch norm, spectral norm), attributes, random numbers.

    torch's spectral norm leaves its last weight in an attribute, with the graph that made it: a module that holds such
    a tensor cannot be copied.
    """
    held = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    contents = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for module, attributes, buffers in held:
                vars(module).clear()
                vars(module).update(attributes)
                module._buffers.clear()
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, copy in contents:
                    buffer.copy_(copy)


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a nested output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]
