"""Moves blocks of a model's sparse layers: exchange at a constant count, or a change of the density.

:class:`TopologyUpdater` does one update when it is told to. *When*, and with which drop fraction, is the business of
:class:`ddst.SparseTraining` and :class:`ddst.DDST`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ddst._arguments import (
    check_bool,
    check_generator,
    check_int,
    check_module,
    check_number,
    check_one_of,
    check_optimizer,
    check_state_keys,
)
from ddst.convert import find_candidates
from ddst.distributed import check_movable, check_same_slots, follow_first_rank
from ddst.nn import SparseLayer
from ddst.nn.data_parallel import searched_once
from ddst.nn.storage import RESIZED
from ddst.slot_change import SlotChange
from ddst.sparsity.criterion import check_share, choose_drop, choose_grow, exchange_count, random_scores, relative_keys
from ddst.sparsity.dense_moments import DenseMoments
from ddst.sparsity.density import NetworkDensity, flat_mask
from ddst.sparsity.layer_change import LayerChange, commit_together
from ddst.sparsity.optimizer import Start, check_state
from ddst.sparsity.score_collector import ScoreCollector
from ddst.sparsity.wrapped import optimizers_of
from ddst.topology import grid

SCOPES = ("layer", "global")
RANKINGS = ("relative", "raw")
GROWTHS = ("gradient", "random")
START = -1
SECOND_MOMENTS = ("score", "mean", "zero", "dense")


@dataclass(frozen=True)
class UpdateReport:
    """What one topology update did.

    Attributes:
        step: the step it belongs to.
        kind: "exchange" (drop and grow at a constant count), "grow" or "drop".
        fraction: the drop fraction asked for ("exchange"), or the asked change of density.
        dropped, grown: blocks that left and entered, by layer; layers without a change are not listed. A block that
            was dropped and grown back in one update stayed, and counts as neither.
        density_before, density_after: active share of all weights.
    """

    step: int
    kind: str
    fraction: float
    dropped: dict[str, int]
    grown: dict[str, int]
    density_before: float
    density_after: float

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return asdict(self)


class TopologyUpdater:
    """One topology update at a time for all sparse layers of a model, with the optimizer's state carried along.

    Args:
        model: the model; its :class:`~ddst.nn.SparseLayer` modules take part.
        optimizer: holds the layers' values.
        growth: "gradient" (RigL: the largest block norms of the dense gradient) or "random" (SET).
        scope: "layer" ranks blocks within their layer in :meth:`exchange`, "global" over the network. None: "layer"
            for blocks larger than 1×1, "global" (the paper's) for 1×1. :meth:`change_density` is always global.
        ranking: "raw" ranks norms (the paper's), "relative" a block's RMS over its layer's RMS (see
            :func:`~ddst.sparsity.relative_keys`). None: "relative" for blocks larger than 1×1.
        max_norm_share: cap on the share of squared norm that may be dropped at once, of each layer or, in a global
            ranking, of the network; None for no cap.
        exempt: names of layers that never change, or "ends": the first and the last weight layer of the model (sparse
            or dense, in module order; when no sparse layer is left between them, none is exempt). None: no layer,
            except "ends" with ``scope="global"`` and blocks larger than 1×1.
        grown_second_moment: what the running mean of squared gradients of a grown block starts from: "score" (its
            squared score per weight), "mean" (the layer's mean over kept blocks), "zero" or "dense" (the paper's: both
            of Adam's moments as they are when it sees the dense gradient in every step, see
            :class:`~ddst.sparsity.dense_moments.DenseMoments`). None: "mean" for 1×1 blocks, else "score" where there
            are scores and "mean" where there are none. See :func:`~ddst.carry_state`.
        random_share: share of the grown blocks that is drawn at random, the rest by gradient; 0 … 1, with
            ``growth="gradient"``.
        connected: whether no block row and no block column loses all its blocks, so that no channels are cut off:
            :func:`ddst.sparsify` starts with such masks. An exchange leaves each its largest block (of those past their
            grace), a fall of the density its last one. None: for blocks larger than 1×1. Where few blocks are more
            than that, few or none are exchanged.
        grace: steps for which no exchange drops a block that has entered (a fall of the density may). A block enters
            with zeros, so that its norm says how long it has been there before it says anything else. What else sets a
            mask (``set_block_mask``) begins no grace.
        generator: source of random growth, on the CPU; a new one with seed 0 when None.
        process_group: of torch.distributed. With several ranks every one of them must make the same updates: scores
            are those of the gradient averaged over ranks, random growth is that of rank 0's generator, and ranks
            that hold other blocks or decide otherwise stop with an error before anything is changed. None: the default
            group.

    Raises:
        TypeError, ValueError: an argument is not as described; a layer's values are not in the optimizer; the
            optimizer's state cannot follow a change of topology.

    An update that raises leaves masks, values and the optimizer's state as they were, in all layers.

    Numerics: deterministic. What an update drops it may grow back (as in RigL's published algorithm): such a block
        stays as it is, with its values and its optimizer state.
    Cost: an exchange or a growth costs the block scores (the operations of a dense weight gradient, one layer at a
        time) and a sort of the blocks' keys, a drop the sort only. Steps without a request cost nothing; with one, what
        the scores are made of is kept, see :class:`~ddst.sparsity.score_collector.ScoreCollector`. Scores take one
        number per block: with 1×1 blocks as many as the dense weights have. With a grace eight bytes are kept, on the
        CPU, for each block that there could be.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        growth: str = "gradient",
        scope: str | None = None,
        ranking: str | None = None,
        max_norm_share: float | None = None,
        exempt: Sequence[str] | str | None = None,
        grown_second_moment: str | None = None,
        random_share: float = 0.0,
        connected: bool | None = None,
        grace: int = 0,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_module("model", model)
        check_optimizer("optimizer", optimizer)
        self.random_share = check_number("random_share", random_share, 0, 1, note="(a share of the grown blocks)")
        check_share("max_norm_share", max_norm_share)
        self.grace = check_int("grace", grace)
        if connected is not None:
            check_bool("connected", connected)
        check_generator("generator", generator)
        self.network = NetworkDensity(model)
        self.all_layers = self.network.layers
        self.single_weights = has_single_weight_blocks(self.all_layers)
        single = self.single_weights
        self.connected = not single if connected is None else connected
        self.growth = check_one_of("growth", growth, GROWTHS)
        self.scope = check_one_of("scope", ("global" if single else "layer") if scope is None else scope, SCOPES)
        ranking = ("raw" if single else "relative") if ranking is None else ranking
        self.ranking = check_one_of("ranking", ranking, RANKINGS)
        if exempt is None:
            exempt = "ends" if self.scope == "global" and not single else ()
        self.exempt = resolve_exempt(model, self.all_layers, exempt)
        self.layers = {name: layer for name, layer in self.all_layers.items() if name not in self.exempt}
        # The paper's code masks weights after a dense step, so that its new weights have warm moments: their first step
        # under Adam with betas (0, 0.9) is 0.68 lr; 0.72 from the mean, 0.39 from the score, 3.12 from zero.
        start = "score" if growth == "gradient" and not single else "mean"
        start = start if grown_second_moment is None else grown_second_moment
        self.grown_second_moment = check_one_of("grown_second_moment", start, SECOND_MOMENTS)
        if self.grown_second_moment == "score" and growth == "random":
            raise ValueError('grown_second_moment="score" needs growth="gradient": random growth has no scores')
        if random_share and growth == "random":
            raise ValueError(f'random_share={random_share} needs growth="gradient": with "random" all growth is random')
        self.max_norm_share = max_norm_share
        self.generator = generator or torch.Generator().manual_seed(0)
        self.optimizer, self.process_group = optimizer, process_group
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if id(layer.values) not in held:
                raise ValueError(
                    f"optimizer does not hold {name}.values. Call sparsify(model, ...) before making the optimizer, "
                    "and give it model.parameters(); or name the layer in exempt"
                )
        self.check_state()
        self._state_checked = False
        self._sizes = self.network.sizes
        # The step at which each block entered last, where it must be known; START: it was there at the start.
        self.entered = {n: torch.full(s.shape, START) for n, s in self._sizes.items() if grace and n in self.layers}
        check_same_slots(self.all_layers, {}, process_group)
        stepping = optimizers_of(optimizer, [layer.values for layer in self.layers.values()])[-1]
        dense = self.grown_second_moment == "dense"
        moments = DenseMoments(self.layers, optimizer) if dense else None
        scored = self.layers if growth == "gradient" or dense else {}
        self.scores = ScoreCollector(scored, stepping, process_group, moments)

    def check_state(self) -> None:
        """Raises ValueError, by the optimizer's name, where the state that it keeps by now cannot follow a change."""
        for layer in self.layers.values():
            check_state(self.optimizer, layer.values)

    def check_first_state(self) -> None:
        """:meth:`check_state` once, after the optimizer's first step: most have no state before."""
        if not self._state_checked and self.scores.steps.any:
            self.check_state()
            self._state_checked = True

    # -- density -------------------------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Share of active weights, see :class:`~ddst.sparsity.density.NetworkDensity`."""
        return self.network.density

    @property
    def attainable_density(self) -> tuple[float, float]:
        """Lowest and highest density in reach: what every layer that may change must keep, or all of them full.

        Where ``connected``, the lowest is where dropping the smallest block that may leave, again and again, ends with
        the present norms: it changes a little as the model trains, and other masks of fewer blocks may cover all rows
        and columns.
        """
        network = self.network
        if not network.total_weights:
            return (1.0, 1.0)
        fixed = network.dense_weights + sum(network.layer_weights(name) for name in self.exempt)
        if self.connected:
            masks = {name: flat_mask(layer) for name, layer in self.layers.items()}
            kept = self._drop(masks, network.active_weights, by_block=False, share=None)
            low = fixed + sum(int(self._sizes[name][mask].sum()) for name, mask in kept.items())
        else:
            low = fixed + sum(int(self._sizes[name].min()) for name in self.layers)
        high = fixed + sum(int(self._sizes[name].sum()) for name in self.layers)
        return (low / network.total_weights, high / network.total_weights)

    @property
    def resolution(self) -> float:
        """Half the largest block's share of all weights: smaller changes of density cannot be made."""
        largest = max((int(self._sizes[name].max()) for name in self.layers), default=0)
        return largest / self.network.total_weights / 2 if largest else 0.0

    @property
    def held(self) -> list[Tensor]:
        """What it keeps for the weights between steps, beside model and optimizer: moments of dense gradients."""
        return [] if self.scores.moments is None else self.scores.moments.tensors

    # -- updates -------------------------------------------------------------------------------------------------

    def exchange(self, fraction: float, step: int | None = None) -> UpdateReport:
        """``nnz`` stays: drops the share ``fraction`` of the active blocks and grows as many.

        By layer: ``⌊ζ · nnz⌋`` blocks each, at most ``nnz − 1``. Globally: blocks that hold the share ``ζ`` of the
        active weights, and growth of as many weights anywhere, no layer losing its last block. Blocks within their
        grace count as if they were not there. Fewer, perhaps none, are exchanged where the others are the largest of a
        row or a column (``connected``) or ``max_norm_share`` is reached. Layers that recorded no gradient, or one that
        is not finite, are left alone.

        Args:
            fraction: ``ζ``, 0 … 1. step: of training; may be left out where there is no grace to count.
        """
        fraction = check_number("fraction", fraction, 0, 1, note="(a share of the active blocks)")
        step = self._step(step)
        by_block = self.scope == "layer"
        masks: dict[str, Tensor] = {}
        for group in self._groups(self._ready()):
            old = {name: flat_mask(self.layers[name]) for name in group}
            kept = self._kept_of(old, fraction, step)
            weights = {n: torch.ones_like(s) if by_block else s for n, s in self._sizes.items()}
            lost = sum(float(weights[n][old[n] & ~kept[n]].sum()) for n in group)
            masks.update(self._grow(old, kept, lost, by_block))
        return self._apply(masks, "exchange", fraction, step)

    def exchangeable(self, fraction: float) -> int:
        """Blocks that an exchange of this share would drop now, grace aside; without a sort where nothing limits it."""
        groups = self._groups(list(self.layers))
        if not self.connected and self.max_norm_share is None:
            return sum(exchange_count(sum(self.layers[name].nnz for name in group), fraction) for group in groups)
        masks = [{name: flat_mask(self.layers[name]) for name in group} for group in groups]
        kept = [self._kept_of(old, fraction, None) for old in masks]
        return sum(int((o[n] & ~k[n]).sum()) for o, k in zip(masks, kept, strict=True) for n in o)

    def _step(self, step: int | None) -> int:
        if step is None and self.grace:
            raise ValueError(f"step must be given: grace={self.grace} counts steps since a block entered")
        return check_int("step", 0 if step is None else step)

    def _groups(self, names: list[str]) -> list[list[str]]:
        """The layers that an exchange ranks together."""
        return [[name] for name in names] if self.scope == "layer" else [names]

    def _kept_of(self, old: Mapping[str, Tensor], fraction: float, step: int | None) -> dict[str, Tensor]:
        """What an exchange leaves of one group's blocks before it lets others in."""
        young = {name: torch.zeros_like(m) if step is None else self._young(name, step) & m for name, m in old.items()}
        by_block = self.scope == "layer"
        amount: float
        if by_block:
            ((name, mask),) = old.items()
            amount = exchange_count(int((mask & ~young[name]).sum()), fraction)
        else:
            amount = fraction * sum(int(self._sizes[n][mask & ~young[n]].sum()) for n, mask in old.items())
        return self._drop(old, amount, by_block, self.max_norm_share, young)

    def change_density(self, target: float, step: int | None = None) -> UpdateReport:
        """``d → target`` to within one block: global growth by gradient score, or global drop by magnitude.

        Full layers cannot grow, layers with one block cannot drop, nor can rows and columns where ``connected``; exempt
        layers do neither: where that leaves too few blocks, the density comes as near as it can
        (:attr:`attainable_density`). ``step`` as for :meth:`exchange`.
        """
        target = check_number("target", target, 0, 1, note="(a density)")
        step = self._step(step)
        amount = target * self.network.total_weights - self.network.active_weights
        names = self._ready() if amount > 0 else list(self.layers)
        old = {name: flat_mask(self.layers[name]) for name in names}
        change = amount / max(self.network.total_weights, 1)
        if amount > 0:
            return self._apply(self._grow(old, old, amount, by_block=False), "grow", change, step)
        return self._apply(self._drop(old, -amount, by_block=False, share=self.max_norm_share), "drop", change, step)

    def _ready(self) -> list[str]:
        """Layers that may grow now: all for random growth, else those whose scores are there and finite."""
        if self.growth == "random":
            return list(self.layers)
        if not self.scores.arrived and self.layers:
            raise RuntimeError("no gradient scores: call scores.request() before the backward pass of the update")
        return [name for name, score in self.scores.latest.items() if bool(score.isfinite().all())]

    def _young(self, name: str, step: int) -> Tensor:
        """The blocks within their grace."""
        if not self.grace:
            return torch.zeros_like(self._sizes[name], dtype=torch.bool)
        entered = self.entered[name]
        return (entered != START) & (step - entered < self.grace)

    def _lines(self, name: str, mask: Tensor) -> tuple[Tensor, ...]:
        """Block row of the weight and block column of the group that each active block is in, where they are kept."""
        if not self.connected:
            return ()
        layer = self.layers[name]
        rows, cols, taps = grid(layer.weight_shape, layer.block)
        block = mask.nonzero()[:, 0]
        row = block // (cols * taps)
        return row, row // (rows // layer.groups) * cols + block // taps % cols

    def _drop(
        self,
        masks: Mapping[str, Tensor],
        amount: float,
        by_block: bool,
        share: float | None,
        stay: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What is left of masks: in an exchange (with `stay`, the blocks that do), or in a fall of the density."""
        norms, keys, sizes = [], [], []
        for name, mask in masks.items():
            size = self._sizes[name][mask]
            norms.append(self.layers[name].block_norms().reshape(-1).cpu()[mask])
            keys.append(relative_keys(norms[-1], size) if self.ranking == "relative" else norms[-1])
            sizes.append(size)
        dropped = choose_drop(
            norms,
            amount,
            keys=keys,
            sizes=None if by_block else sizes,
            max_norm_share=share,
            stay=None if stay is None else [stay[name][mask] for name, mask in masks.items()],
            lines=list(zip(*(self._lines(name, mask) for name, mask in masks.items()), strict=True)),
            to_the_last=stay is None,
        )
        return {n: _without(mask, gone) for (n, mask), gone in zip(masks.items(), dropped, strict=True)}

    def _grow(
        self, old: Mapping[str, Tensor], kept: Mapping[str, Tensor], amount: float, by_block: bool
    ) -> dict[str, Tensor]:
        free = {name: ~mask for name, mask in kept.items()}
        if self.growth == "random":
            follow_first_rank(self.generator, self.process_group)
            scores = random_scores([int(f.sum()) for f in free.values()], self.generator)
        else:
            scores = []
            for name, where in free.items():
                score = self.scores.latest[name].reshape(-1).cpu()
                if self.ranking == "relative":
                    score = relative_keys(score, self._sizes[name], old[name])
                scores.append(score[where])
        rooms = [layer.slots - int(kept[name].sum()) if layer.reserve else None for name, layer in self._named(free)]
        scores = _within(scores, rooms)
        sizes = None if by_block else [self._sizes[n][f] for n, f in free.items()]
        if self.random_share:
            first = choose_grow(scores, amount * (1 - self.random_share), sizes=sizes)
            follow_first_rank(self.generator, self.process_group)
            drawn = random_scores([score.numel() for score in scores], self.generator)
            # Random scores are below 1: those that the gradient has chosen stay ahead of all.
            scores = _within([torch.where(f, 2.0, d) for f, d in zip(first, drawn, strict=True)], rooms)
        grown = choose_grow(scores, amount, sizes=sizes)
        return {n: ~_without(f, new) for (n, f), new in zip(free.items(), grown, strict=True)}

    def _named(self, names: Iterable[str]) -> list[tuple[str, SparseLayer]]:
        return [(name, self.layers[name]) for name in names]

    def _apply(self, masks: Mapping[str, Tensor], kind: str, fraction: float, step: int) -> UpdateReport:
        before = self.density
        old = {name: flat_mask(self.layers[name]) for name in masks}
        changes = {
            name: LayerChange(self.layers[name], flat.view(self.layers[name].mask_shape))
            for name, flat in masks.items()
            if not torch.equal(flat, old[name])
        }
        with searched_once():
            self._check_ranks(masks, changes)
            for name, layer_change in changes.items():
                start = self._second_moment(name, layer_change.change) if layer_change.change.grown else None
                layer_change.prepare_state(self.optimizer, start)
            commit_together(list(changes.values()))
        for name in changes.keys() & self.entered.keys():
            self.entered[name][masks[name] & ~old[name]] = step
        dropped = {name: c.change.dropped for name, c in changes.items() if c.change.dropped}
        grown = {name: c.change.grown for name, c in changes.items() if c.change.grown}
        return UpdateReport(step, kind, fraction, dropped, grown, before, self.density)

    def _check_ranks(self, masks: Mapping[str, Tensor], changes: Mapping[str, LayerChange]) -> None:
        """Raises on every rank unless all are about to do the same, and may."""
        check_same_slots(self.all_layers, masks, self.process_group)
        resized = {name: self.layers[name] for name, c in changes.items() if c.change.source is not None}
        check_movable(self.layers)
        if resized:
            check_movable(resized, RESIZED)

    def _second_moment(self, name: str, change: SlotChange) -> Start:
        if self.scores.moments is not None:
            return self.scores.moments.of_blocks(name, change.slot_blocks[change.entered])
        if self.grown_second_moment != "score":
            return "mean" if self.grown_second_moment == "mean" else None
        if name not in self.scores.latest:
            return None
        score = self.scores.latest[name].reshape(-1).cpu().to(torch.float64)
        return (score.square() / self._sizes[name])[change.slot_blocks[change.entered].long()]

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Scores asked for or taken and not yet used, generator, and when blocks entered; the model has the rest."""
        moments = None if self.scores.moments is None else self.scores.moments.state_dict()
        return {
            "scores": self.scores.state_dict(),
            "moments": moments,
            "generator": self.generator.get_state(),
            "entered": {name: steps.clone() for name, steps in self.entered.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`. Load the model first."""
        check_state_keys(state, ("scores", "moments", "generator", "entered"))
        for name, steps in self.entered.items():
            held = state["entered"].get(name, steps)
            if held.shape != steps.shape or held.dtype != steps.dtype:
                raise ValueError(
                    f"state['entered'] must hold {steps.dtype} of shape {tuple(steps.shape)} for layer {name!r}, got "
                    f"{held.dtype} of shape {tuple(held.shape)}"
                )
        self.scores.load_state_dict(state["scores"])
        if self.scores.moments is not None:
            self.scores.moments.load_state_dict(state["moments"])
        self.generator.set_state(state["generator"].cpu())
        for name, steps in self.entered.items():
            # Of a run without a grace: nothing is known of its blocks.
            steps.copy_(state["entered"].get(name, torch.full_like(steps, START)))


def has_single_weight_blocks(layers: Mapping[str, SparseLayer]) -> bool:
    """Whether every layer's blocks are single weights, for which the paper's own settings are the defaults."""
    return bool(layers) and all(tuple(layer.block) == (1, 1) for layer in layers.values())


def grace_of(grace: int | None, single: bool, interval: int) -> int:
    """The steps of grace that are given, else none for single weights and five intervals for larger blocks."""
    usual = 0 if single else min(5 * interval, 2**31 - 1)  # The longest there is.
    return usual if grace is None else grace


def resolve_exempt(model: nn.Module, layers: Mapping[str, SparseLayer], exempt: Sequence[str] | str) -> tuple[str, ...]:
    """Names of the layers that never change, in module order."""
    if isinstance(exempt, str):
        if exempt != "ends":
            raise ValueError(f'exempt must be a list of layer names or "ends", got {exempt!r}')
        weights = [candidate.module for candidate in find_candidates(model)]
        names = tuple(n for n, layer in layers.items() if weights and (layer is weights[0] or layer is weights[-1]))
        return names if len(names) < len(layers) else ()
    if isinstance(exempt, Tensor) or not isinstance(exempt, Sequence | Set):
        raise TypeError(f'exempt must be a list of layer names or "ends", got {type(exempt).__name__}')
    unknown = [name for name in exempt if name not in layers]
    if unknown:
        raise ValueError(f"exempt names no sparse layer of the model: {unknown[0]!r}; there are {', '.join(layers)}")
    return tuple(name for name in layers if name in set(exempt))


def _within(scores: Sequence[Tensor], rooms: Sequence[int | None]) -> list[Tensor]:
    """Scores of layers' candidates, of which all beyond the best for which a layer has room (None: any number) rank
    last, as they have no slot yet.
    """
    beyond = [None if room is None else s.argsort(descending=True, stable=True)[room:] for s, room in
              zip(scores, rooms, strict=True)]  # fmt: skip
    return [s if late is None else s.index_fill(0, late, -float("inf")) for s, late in zip(scores, beyond, strict=True)]


def _without(mask: Tensor, gone: Tensor) -> Tensor:
    """``mask`` with those of its True entries cleared that ``gone`` (one entry per True) marks."""
    left = mask.clone()
    left[mask] = ~gone
    return left
