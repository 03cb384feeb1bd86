"""Where the time of a training iteration goes: which layers of both networks take it, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._C._profiler import RecordScope, _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from ddst.nn import PackedParameter, sparse_layers
from ddst.peak_memory import quiet_profiler

_WHOLE, _LAYER = "ddst.layer_time: iteration", "ddst.layer_time: "
_BACKWARD = "autograd::engine::evaluate_function"

Owner = tuple[str, str]  # A network and the name of a layer in it.


@dataclass(frozen=True)
class LayerTime:
    """What one layer takes of an iteration.

    Attributes:
        network: "generator" or "discriminator". layer: its name there.
        forward, backward: its share of the iteration's time, from 0 to 1, in all passes; backward are those that the
            autograd engine runs.
    """

    network: str
    layer: str
    forward: float
    backward: float


def layer_times(iteration: Callable[[], object], networks: Mapping[str, nn.Module]) -> list[LayerTime]:
    """The share of an iteration's time of each layer that takes some, the largest first.

    The rest to 1 is of no layer: activations, pooling, upsampling and sums that are no part of a fused one, losses,
    penalties, optimizers, the scheduler, and what Python does in between.

    An operator's time is that of the innermost module with parameters of its own that is running, of a sparse one's
    operator that of the layer whose blocks it walks, wherever it runs (in fused half blocks behind its forward pass); a
    backward pass's is that of the layer whose forward pass it is of. The passes of a penalty's second derivative are
    nobody's.

    Args:
        iteration: is called twice, and the second time counts.
        networks: by name, on the CPU; while an iteration is recorded their modules have a `forward` of their own.

    Numerics: of one recorded iteration. Recording costs each operator some microseconds, so small ones look larger.
    """
    iteration()
    owners: dict[int, Owner] = {}
    marked: list[tuple[nn.Module, Any]] = []
    try:
        for network, model in networks.items():
            for name, layer in sparse_layers(model).items():
                owners.update({lists.data_ptr(): (network, _layer(name)) for lists in layer.topologies})
            for name, module in model.named_modules():
                if module._parameters or any(isinstance(child, PackedParameter) for child in module.children()):
                    marked.append((module, vars(module).get("forward")))
                    _mark(module, f"{_LAYER}{network} {_layer(name)}")
        with (
            quiet_profiler(),
            profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded,
            record_function(_WHOLE),
        ):
            iteration()
    finally:
        for module, own in marked:
            del module.forward
            if own is not None:
                module.forward = own
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    return _shares(recorded.profiler.kineto_results.experimental_event_tree(), owners)


def _layer(name: str) -> str:
    """The layer that a module is a part of: what makes its weight, or keeps it packed."""
    return name.partition(".parametrizations.")[0].removesuffix(".packed_weight")


def _mark(module: nn.Module, name: str) -> None:
    """Gives a module's forward pass a name in the recording. A hook would keep half blocks from being fused."""
    forward = module.forward

    @functools.wraps(forward)
    def marked(*inputs: Any, **named: Any) -> Any:
        with record_function(name):
            return forward(*inputs, **named)

    module.forward = marked


def _shares(events: Sequence[Any], owners: Mapping[int, Owner]) -> list[LayerTime]:
    found = [(event, owner) for event, owner, _ in _walk(events, owners, {})]
    # Of operators with one number the last one is what the backward pass is of: others had nothing to record.
    found.sort(key=lambda pair: pair[0].start_time_ns)
    by_number = {number: owner for event, owner in found if (number := _number(event)) is not None}
    whole = next(event.duration_time_ns for event, _ in found if event.name == _WHOLE)
    spent: dict[Owner, list[int]] = {}
    for event, owner, backward in _walk(events, owners, by_number):
        if owner is not None:
            inside = sum(child.duration_time_ns for child in event.children)
            spent.setdefault(owner, [0, 0])[backward] += max(event.duration_time_ns - inside, 0)
    times = [LayerTime(*owner, *(ns / whole for ns in both)) for owner, both in spent.items()]
    return sorted(times, key=lambda time: -time.forward - time.backward)


def _walk(
    events: Sequence[Any], owners: Mapping[int, Owner], by_number: Mapping[int, Owner | None]
) -> Iterator[tuple[Any, Owner | None, bool]]:
    """Every event with the layer that it is of, and whether it is one of a backward pass."""
    waiting: list[tuple[Any, Owner | None, bool]] = [(event, None, False) for event in events]
    while waiting:
        event, owner, backward = waiting.pop()
        if event.name.startswith(_LAYER) and event.name != _WHOLE:
            network, _, layer = event.name.removeprefix(_LAYER).partition(" ")
            owner = (network, layer)
        elif event.name.startswith(_BACKWARD):
            owner, backward = by_number.get(event.extra_fields.sequence_number), True
        owner = _walked(event, owners) or owner
        yield event, owner, backward
        waiting += [(child, owner, backward) for child in event.children]


def _walked(event: Any, owners: Mapping[int, Owner]) -> Owner | None:
    """The sparse layer whose lists one of our operators reads, or the operator right inside of a function."""
    if event.tag != _EventType.TorchOp or event.name.startswith(_LAYER):
        return None
    if event.name.startswith("ddst::"):
        for given in event.extra_fields.inputs:
            if (owner := owners.get(getattr(given, "storage_data_ptr", None) or 0)) is not None:
                return owner
        return None
    called = [child for child in event.children if child.name.startswith("ddst::")]
    return _walked(called[0], owners) if called else None


def _number(event: Any) -> int | None:
    """What autograd calls the node that an operator of a forward pass made."""
    if event.tag != _EventType.TorchOp or event.name.startswith((_BACKWARD, _LAYER)):
        return None
    if event.extra_fields.scope != RecordScope.FUNCTION:  # The node itself, called.
        return None
    number = int(event.extra_fields.sequence_number)
    return number if number >= 0 else None
