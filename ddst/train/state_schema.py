"""What a run's checkpoint holds: keys, types, shapes, ranges, and what must agree with what. Nothing else checks it.

The description hangs on the run that is to be continued: a freshly built `Trainer` of the saved settings says which
networks, layers and counts there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ddst import topology
from ddst.gan import DDST
from ddst.gan.controller import DROP, EXCHANGE, GROW
from ddst.nn import SparseLayer, sparse_layers
from ddst.nn.storage import slots_fault
from ddst.sparsity.updater import START, TopologyUpdater
from ddst.train.rules import (
    Misfit,
    Rule,
    anything,
    list_of,
    mapping_of,
    nothing,
    number,
    one_of,
    optional,
    pair,
    part,
    record,
    some_of,
    tensor,
    text,
    whole,
)

if TYPE_CHECKING:
    from ddst.train.loop import Trainer

_LARGEST_STEP = 2**24  # Adam counts in float32, whose whole numbers end there.
_PLACES = "slot_blocks"  # What says in a sparse layer's state where its values lie.


def check_state(state: Mapping[str, Any], trainer: Trainer) -> None:
    """Compare a checkpoint's state with the description, before anything of it is used.

    Raises:
        Misfit: the first part that does not fit.
    """
    part("step", whole(0, trainer.config.steps))(state, "")
    record(_description(state, trainer))(state, "")


def _description(state: Mapping[str, Any], trainer: Trainer) -> dict[str, Rule]:
    step, players = state["step"], trainer.players
    taken = step * trainer.config.d_steps
    scaled = players.game.scaler_g is not None  # A scaler skips steps whose gradients are not finite.
    return {
        "config": anything,  # The trainer was built of it.
        "versions": mapping_of(text),
        "images": text,
        "channels": whole(trainer.images.channels, trainer.images.channels),
        "classes": whole(trainer.classes, trainer.classes),
        "step": whole(step, step),
        "seconds": number(0),
        "best": optional(record({"value": number(0), "measure": text})),
        "log": record({"bytes": whole(1), "sha256": text}),
        "flops": record({"counted": number(0), "counted_dense": number(0), "forward": pair(number(0))}),
        "generator": network(players.generator),
        "discriminator": network(players.discriminator),
        "optimizer_g": adam(players.generator, state.get("generator"), step, scaled),
        "optimizer_d": adam(players.discriminator, state.get("discriminator"), taken, scaled),
        "ema": record({"module": average(trainer.ema.module, state.get("generator")), "updates": whole(step, step)}),
        "scheduler": scheduler(trainer.scheduler, step, _length(state)),
        "sampler": sampler(trainer.sampler.size, taken * trainer.config.accumulate * trainer.config.batch),
        "noise": random_state,
        "augment": random_state,
        "scalers": scalers if scaled else nothing,
        "torch": random_state,
        "cuda": nothing if trainer.device.type == "cpu" else tensor(torch.uint8, torch.cuda.get_rng_state().shape),
    }


def network(net: nn.Module) -> Rule:
    """A network's state dict: that of `net`, where sparse layers may have other blocks and as many values as those."""
    plain = {name: _like(name, entry) for name, entry in net.state_dict().items()}
    layers = sparse_layers(net)

    def check(state: Any, where: str) -> None:
        rules = dict(plain)
        if isinstance(state, dict):
            for name, layer in layers.items():
                rules.update({f"{name}.{key}": rule for key, rule in packed_weight(layer, state, name).items()})
        record(rules)(state, where)

    return check


def packed_weight(layer: SparseLayer, state: dict[str, Any], name: str) -> dict[str, Rule]:
    """Rules for what a sparse layer keeps instead of a dense weight: blocks in slots, and which block lies in which."""

    def slots(value: Any, where: str) -> None:
        held = state.get(f"{name}.values")
        fault = slots_fault(
            value, held.shape[0] if isinstance(held, torch.Tensor) and held.dim() else 0, layer.num_blocks
        )
        if fault or not (value >= 0).any():
            raise Misfit(f"{where} does not say where blocks lie: {fault or 'no block is active'}")

    def values(value: Any, where: str) -> None:
        slot_blocks: Any = state.get(f"{name}.{_PLACES}")
        slots(slot_blocks, where.removesuffix("values") + _PLACES)
        tensor(layer.values.dtype, (slot_blocks.numel(), *layer.block))(value, where)
        if value[~topology.inside_slots(slot_blocks, layer.weight_shape, layer.block)].any():
            raise Misfit(f"{where} must be zero outside the weight and where there is no block")

    return {_PLACES: slots, "values": values}


def average(net: nn.Module, model: Any) -> Rule:
    """The averaged generator: a network with the slots of the generator, where the dict `model` holds that."""

    def check(state: Any, where: str) -> None:
        network(net)(state, where)
        for name in sparse_layers(net):
            key = f"{name}.{_PLACES}"
            if isinstance(model, dict) and not torch.equal(state[key], model[key]):
                raise Misfit(f"{where}.{key} must be that of the generator")

    return check


def adam(net: nn.Module, state: Any, steps: int, may_skip: bool = False) -> Rule:
    """Adam's state by the number of the parameter: none before the first step, then moments of the saved weights."""
    names = [name for name, _ in net.named_parameters()]
    count = float(min(steps, _LARGEST_STEP))
    least = 1.0 if may_skip else count

    def check(value: Any, where: str) -> None:
        rules: dict[Any, Rule] = {}
        none_made = not steps or (may_skip and value == {})
        for i, name in enumerate([] if none_made else names):
            weight = state[name]  # Checked before, as it stands before in the description.
            moment = tensor(weight.dtype, weight.shape)
            square = tensor(weight.dtype, weight.shape, low=0)
            rules[i] = record({"step": tensor(None, (), least, count), "exp_avg": moment, "exp_avg_sq": square})
        record(rules)(value, where)

    return check


def _length(state: Mapping[str, Any]) -> Any:
    config = state.get("config")
    return config.get("steps") if isinstance(config, dict) else None


def scheduler(ddst: DDST, step: int, length: int) -> Rule:
    """The state of `DDST`: its counters are the step, open requests those that this step leaves open.

    Where the run that saved it had another `length`, it may have left others open.
    """
    training, updater = ddst.training_g, ddst.updater_d
    moves = training.method != "static"
    oldest_g, oldest_d = max(1, step - ddst.interval_g + 1), max(1, step - ddst.interval_d + 1)
    warmup = 0 if ddst.controller is None else ddst.controller.warmup

    def check(value: Any, where: str) -> None:
        mapping_of(anything)(value, where)
        generator, waiting = value.get("generator"), value.get("waiting")
        due = generator.get("due") if isinstance(generator, dict) else None
        asks_g = training.is_update_step(step + 1) or (due is not None and step + 1 < training.end)
        asks_d = waiting is not None or (ddst.is_decision_step(step + 1) and step + 1 > warmup)
        same = ddst.total_steps == length
        g = {
            "steps": whole(step, step),
            "due": optional(whole(oldest_g, step)) if moves else nothing,
            "updater": requests(training.updater, asks_g, step, same),
        }
        rules = {
            "mode": one_of(ddst.mode),
            "steps": whole(step, step),
            "balance": balance(ddst.balance.window, step // ddst.br_every),
            "generator": record(g),
            "discriminator": nothing if updater is None else requests(updater, asks_d, step, same),
            "waiting": nothing if updater is None else optional(decision(oldest_d, step)),
        }
        record(rules)(value, where)

    return check


def requests(updater: TopologyUpdater, wanted: bool, step: int, certain: bool = True) -> Rule:
    """A `TopologyUpdater`: whether scores are asked for, scores that came and were not used, its random numbers, and at
    which steps up to `step` blocks entered.
    """
    masks = {name: layer.mask_shape for name, layer in updater.scores.layers.items()}
    one = {name: tensor(None, shape, low=0) for name, shape in masks.items()}
    moments: Rule = nothing
    if updater.scores.moments is not None:
        shapes = {name: tuple(layer.weight_shape) for name, layer in updater.layers.items()}
        moments = record(
            {
                name: record({"exp_avg": tensor(None, shape), "exp_avg_sq": tensor(None, shape, low=0)})
                for name, shape in shapes.items()
            }
        )
    scores = record(
        {
            "stepped": one_of(False),  # an iteration's end forgets it
            "requested": one_of(*{wanted and bool(masks), *(() if certain else (bool(masks), False))}),
            "latest": some_of(one),
            "aside": some_of(one),
        }
    )
    entered = {name: tensor(torch.int64, steps.shape, START, step) for name, steps in updater.entered.items()}
    return record({"scores": scores, "moments": moments, "generator": random_state, "entered": record(entered)})


def sample(value: Any, where: str) -> None:
    """One measurement: alpha, beta, the sign."""
    if type(value) is not tuple or len(value) != 3:
        raise Misfit(f"{where} must be three values")
    for i, rule in enumerate((number(), number(), optional(number(-1, 1)))):
        rule(value[i], f"{where}[{i}]")


def scalers(value: Any, where: str) -> None:
    """The two gradient scalers' states."""
    positive = number(0)
    one = record(
        {
            "scale": positive,
            "growth_factor": positive,
            "backoff_factor": positive,
            "growth_interval": whole(1),
            "_growth_tracker": whole(0),
        }
    )
    list_of(one)(value, where)
    if len(value) != 2:
        raise Misfit(f"{where} must be two states, got {len(value)}")


def balance(window: int, measured: int) -> Rule:
    """The balance ratio's window: all measurements that were finite, or the newest that it holds."""

    def check(value: Any, where: str) -> None:
        record({"samples": list_of(sample), "rejected": whole(0, measured)})(value, where)
        expected = min(window, measured - value["rejected"])
        if len(value["samples"]) != expected:
            raise Misfit(f"{where}.samples must hold {expected} measurements, got {len(value['samples'])}")

    return check


def decision(oldest: int, step: int) -> Rule:
    """A decision on D's density that waits for a step of D or its gradient."""
    density = number(0, 1)
    window = {
        "samples": whole(0),
        "capacity": whole(1),
        "mean_alpha": number(),
        "mean_beta": number(),
        "balance_ratio": optional(number()),
        "reason": text,
        "mean_sign": optional(number(-1, 1)),
    }
    return record(
        {
            "step": whole(oldest, step),
            "action": one_of(GROW, DROP, EXCHANGE),
            "density": density,
            "new_density": density,
            "reason": text,
            "window": record(window),
            "lowest": density,
            "highest": density,
            "resolution": density,
        }
    )


def sampler(size: int, taken: int) -> Rule:
    """The sampler of `size` images after `taken` were taken: a permutation, and the position in it that follows."""
    used = (taken - 1) % size + 1 if taken else 0

    def check(value: Any, where: str) -> None:
        rules = {"generator": random_state, "order": tensor(torch.int64, (size,)), "used": whole(used, used)}
        record(rules)(value, where)
        if not torch.equal(value["order"].sort().values, torch.arange(size)):
            raise Misfit(f"{where}.order must be a permutation of {size} images")

    return check


def random_state(value: Any, where: str) -> None:
    """The state of one of torch's generators on the CPU."""
    tensor(torch.uint8, torch.Generator().get_state().shape)(value, where)
    try:
        torch.Generator().set_state(value)
    except (RuntimeError, TypeError):
        raise Misfit(f"{where} is no state of a random generator") from None


def _like(name: str, entry: Tensor) -> Rule:
    """A tensor like one of a new network; variances and counters are not negative."""
    counts = name.endswith(("running_var", "num_batches_tracked"))
    return tensor(entry.dtype, entry.shape, low=0 if counts else -math.inf)
