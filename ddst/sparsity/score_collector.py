"""When the dense gradient's block scores are asked for and which backward pass they come from."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ddst._arguments import check_state_keys
from ddst.distributed import average, gather_numbers, ranks, sums
from ddst.nn import SparseLayer
from ddst.ops.gradient_record import GradientRecord, backward_reaches, gradient_norm
from ddst.ops.reference import block_norms_of
from ddst.sparsity.dense_moments import DenseMoments
from ddst.sparsity.step_watch import StepWatch, found_inf, unscaled_by
from ddst.sparsity.wrapped import optimizers_of

#: The collector whose request a layer serves: a layer records for one.
_owners: weakref.WeakKeyDictionary[SparseLayer, ScoreCollector] = weakref.WeakKeyDictionary()


class _Pending:
    """One layer's scores of one step: what they are computed from, or the scores."""

    def __init__(
        self,
        layer: SparseLayer,
        record: GradientRecord | None,
        scores: Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._layer, self._record, self._scores = layer, record, scores
        self._process_group = process_group
        self._stepped: Tensor | None = None
        # The layer scores the weight it computes with, W / σ or g · v / ‖v‖; the optimizer steps W or v. σ and ‖v‖ are
        # those of the step.
        norm, lengths = layer.spectral_norm, layer.weight_norm
        self._sigma = None if norm is None or record is None else norm.sigma(layer)
        self._scale = None if lengths is None or record is None else lengths.scale(layer).detach()
        # Which blocks the gradient has entries for.
        self._slots = layer.slot_blocks.clone()

    def stepped_with(self, norm: Tensor) -> None:
        """L2 norm of ``values.grad`` as the optimizer's step sees it."""
        self._stepped = norm

    @property
    def scores(self) -> Tensor:
        """Computed when first asked for; what they are computed from is freed then."""
        if self._scores is None:
            assert self._record is not None
            scores = _averaged_scores(self._layer, self._record, self._scale, self._process_group)
            if self._sigma is not None:
                scores = scores / torch.where(self._sigma > 0, self._sigma, 1)
            self._scores, self._record = scores * self._factor(scores).to(scores), None
        return self._scores

    @property
    def gradient(self) -> Tensor:
        """The dense gradient that the step saw, of the weight's shape, the mean over ranks; asked for before scores."""
        layer, record = self._layer, self._record
        assert record is not None
        gradient = average(layer.dense_gradient_of(record, self._scale), self._process_group)
        if self._sigma is not None:
            gradient = gradient / torch.where(self._sigma > 0, self._sigma, 1)
        return gradient * self._factor(block_norms_of(gradient, layer.block)).to(gradient)

    def _factor(self, scores: Tensor) -> Tensor:
        """What unscaling and clipping have made of the recorded gradient by the time of the step.

        By the norms of ``values.grad`` then and at the end of the backward pass. A gradient that no backward pass put
        there (``autograd.grad``), or one whose step was made inside of it, is compared with its blocks' scores.
        """
        stepped, recorded = self._norms()
        if stepped is None:
            return scores.new_ones((), dtype=torch.float64)
        if recorded is None:
            active = self._slots[self._slots >= 0].long().to(scores.device)
            recorded = gradient_norm(scores.reshape(-1)[active])
        # Where the active blocks got no gradient at all there is nothing to compare.
        return torch.where((recorded > 0) & (stepped > 0), stepped / recorded, 1.0)

    def _norms(self) -> tuple[Tensor | None, Tensor | None]:
        """L2 norms of ``values.grad`` in the step and at the end of the backward pass: those of the mean over ranks.

        At the end of the backward pass it may be the mean (DistributedDataParallel) or each rank's own, which is
        averaged later. Ranks that no gradient reached have none.
        """
        record, group = self._record, self._process_group
        assert record is not None
        if ranks(group) == 1:
            return self._stepped, record.norm
        both = gather_numbers([None if n is None else float(n) for n in (self._stepped, record.norm)], group)
        of_step, of_record = ([n for n in column if n is not None] for column in zip(*both, strict=True))
        like = self._layer.values.new_ones((), dtype=torch.float64)
        stepped = like * of_step[0] if of_step else None
        if len(set(of_record)) <= 1:
            return stepped, like * of_record[0] if of_record else None
        mine = self._layer.values.new_zeros(self._slots.numel(), *self._layer.block)
        return stepped, gradient_norm(average(mine if record.gradient is None else record.gradient, group))


def _averaged_scores(
    layer: SparseLayer, record: GradientRecord, scale: Tensor | None, process_group: ProcessGroup | None
) -> Tensor:
    """``‖mean over ranks of ∂L/∂W[block]‖₂``: the dense gradient of one layer is formed for it, and let go."""
    if ranks(process_group) == 1:
        return layer.scores_of(record, scale)
    return block_norms_of(average(layer.dense_gradient_of(record, scale), process_group), layer.block)


class ScoreCollector:
    """Block scores of the gradient that an optimizer's last step consumed.

    While a request is open, a pre-hook of ``optimizer.step()`` takes what each layer's scores are computed from (its
    inputs and output gradients of that step), in place of the former step's: with several steps between two topology
    updates (the discriminator's), the last one counts. The scores are computed when :attr:`latest` is asked for, one
    layer at a time, so a decision that needs none costs none. Without a request nothing is recorded and the hook does
    nothing. Every backward pass into a layer's values since the former step counts, as it does in ``.grad``, unless
    ``zero_grad()`` came after it.

    Scores are those of the gradient that the step saw: unscaled (:class:`torch.amp.GradScaler`), clipped, averaged. The
    recorded ones are multiplied by what became of the layer's ``values.grad`` between the end of the backward pass and
    the step. A step that a scaler skipped, or whose gradient is not finite, gives none.

    Memory: while a request is open, the layers' inputs and output gradients of one step (with several ranks the packed
    gradient, too), which are let go when the
    backward pass of the next one begins to record. A backward pass that also reaches the parameters of another
    network's optimizer (:meth:`set_aside_at`) may be that network's: what it records is held in addition until one of
    the two optimizers steps. Freezing the network in the other's backward pass (``requires_grad_(False)``) avoids it.
    The inputs are not copied: one that is changed in place before the scores are computed is an error then.

    Args:
        layers: by name; empty for methods that need no gradient.
        optimizer: the optimizer that steps these layers.
        process_group: of torch.distributed: with several ranks the scores are norms of the gradient averaged over
            them, a layer at a time, and every rank must ask for them.
        moments: running means of the dense gradient, which every step is recorded for then.

    Attributes:
        latest: per layer ``[R, C, kH, kW]`` (linear ``[R, C]``), the L2 norm of each block of the dense gradient with
            respect to the weight; layers that no backward pass reached are missing. With spectral norm, of the raw
            weight without σ's own dependence on it (a rank-one term); with weight norm, of v without its norm's, which
            is the gradient of v at blocks that are zero.
        requested: whether a request is open. closed: whether :meth:`close` has been called.

    >>> import ddst
    >>> layer = ddst.SparseLinear(32, 32, density=0.5)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> collector = ScoreCollector({"layer": layer}, sgd)
    >>> collector.request()
    >>> layer(torch.randn(4, 32)).sum().backward()
    >>> sgd.step()
    >>> collector.latest["layer"].shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        layers: Mapping[str, SparseLayer],
        optimizer: Optimizer,
        process_group: ProcessGroup | None = None,
        moments: DenseMoments | None = None,
    ) -> None:
        optimizer = optimizers_of(optimizer)[-1]
        self.moments = moments
        self.layers = dict(layers)
        self.process_group = process_group
        self._taken: dict[str, _Pending] = {}
        self._aside: dict[str, _Pending] = {}
        self._others: list[Optimizer] = []
        self.requested = False
        self.closed = False
        self._fresh = False  # whether the step under way has given scores
        self.steps = StepWatch(optimizer)
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(lambda stepping, *_: self._collect(stepping)),
            optimizer.register_step_post_hook(lambda stepping, *_: self._collect_after(stepping)),
        ]
        if moments is not None:
            self._record()

    def set_aside_at(self, other: Optimizer) -> None:
        """Keeps apart what is recorded before a step of *another* network's optimizer.

        The backward pass of the generator's loss runs through the discriminator too, and one of the discriminator's
        loss through the generator if its images are not detached. What that recorded counts only if this optimizer's
        next step finds nothing newer (a loop that runs both backward passes before both optimizer steps), and never
        replaces scores taken at this optimizer's own step.
        """
        other = optimizers_of(other)[-1]
        self._others.append(other)
        self._hooks.append(other.register_step_pre_hook(lambda *_: self._set_aside()))

    def request(self) -> None:
        """Makes the following backward passes record what scores need; forgets former scores.

        A layer records for one collector: another one's open request for it ends, and that one is closed.

        Raises:
            RuntimeError: this collector is closed.
        """
        self.check_open()
        self.cancel()
        self.requested = bool(self.layers)
        self._record()

    def _record(self) -> None:
        for layer in self.layers.values():
            other = _owners.get(layer)
            if other is not None and other is not self:
                other.close()
            _owners[layer] = self
            layer.request_scores(self._begin, keep_gradient=ranks(self.process_group) > 1)

    def check_open(self) -> None:
        """Raises RuntimeError after :meth:`close`."""
        if self.closed:
            raise RuntimeError(
                "this scheduler is closed: by close(), or because another SparseTraining or DDST was made for the same "
                "layers and has taken over. Go on with that one, or make a new one"
            )

    def cancel(self) -> None:
        """Ends the request and drops the scores."""
        self._taken, self._aside, self.requested = {}, {}, False
        for layer in self.layers.values() if self.moments is None or self.closed else ():
            # Another collector's request is not this one's to end.
            if layer.scores_requested and _owners.get(layer, self) is self:
                layer.cancel_scores()
                _owners.pop(layer, None)

    @property
    def arrived(self) -> bool:
        """Whether the gradient asked for has come."""
        if self.requested:
            self._taken = self._of_all_ranks(self._taken)
        return bool(self._taken)

    @property
    def latest(self) -> dict[str, Tensor]:
        """The scores by layer, computed when first asked for."""
        if self._taken:
            self._taken = self._of_all_ranks(self._taken)
        return {name: pending.scores for name, pending in self._taken.items()}

    def _of_all_ranks(self, pending: dict[str, _Pending]) -> dict[str, _Pending]:
        """The same layers on every rank: those that a gradient reached on one of them."""
        if ranks(self.process_group) == 1:
            return pending
        reached = sums([int(name in pending) for name in self.layers], self.process_group)
        return {
            name: pending.get(name) or _Pending(layer, GradientRecord(), process_group=self.process_group)
            for (name, layer), count in zip(self.layers.items(), reached, strict=True)
            if count
        }

    def _begin(self) -> None:
        """A backward pass is about to record something: if it is one of this network's loss, former records go."""
        if not (self._taken or self._aside):
            return
        parameters = [p for other in self._others for group in other.param_groups for p in group["params"]]
        if not any(p.requires_grad and backward_reaches(p) for p in parameters):
            self._taken, self._aside = {}, {}

    def _collect_after(self, optimizer: Optimizer) -> None:
        before = self._taken
        self._collect(optimizer)  # an optimizer that runs a closure computes the gradient after its pre-hook
        if self._fresh and before is self._taken and ranks(self.process_group) > 1:
            # One that averages over ranks by itself does so after its pre-hook.
            scale = unscaled_by(optimizer)
            for name, pending in self._taken.items():
                gradient = self.layers[name].values.grad
                if gradient is not None:
                    pending.stepped_with(gradient_norm(gradient) / scale)
        if self._fresh and self.moments is not None:
            self._taken = self._of_all_ranks(self._taken)
            self.moments.update({name: pending.gradient for name, pending in self._taken.items()})
        self._fresh = False

    def _collect(self, optimizer: Optimizer) -> None:
        if not self.requested and self.moments is None:
            return
        found, scale = found_inf(optimizer), unscaled_by(optimizer)
        taken = self._take() or self._aside
        self._aside = {}
        if not taken or (found is not None and bool(found > 0)):
            return
        norms = {}
        for name in taken:
            gradient = self.layers[name].values.grad
            if gradient is not None:  # else the step leaves the layer alone
                norms[name] = gradient_norm(gradient)
        if all(bool(norm.isfinite()) for norm in norms.values()):
            for name, norm in norms.items():
                taken[name].stepped_with(norm / scale)
            self._taken = {name: taken[name] for name in norms} or self._taken
            self._fresh = True

    def _set_aside(self) -> None:
        if self.requested or self.moments is not None:
            taken = self._take()
            # With a step's own scores at hand, what another loss sent through is of no use.
            self._aside = {} if self._taken else taken or self._aside

    def _take(self) -> dict[str, _Pending]:
        layers = {name: layer for name, layer in self.layers.items() if layer.scores_recorded}
        return {
            name: _Pending(layer, layer.take_record(), process_group=self.process_group)
            for name, layer in layers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Whether a request is open, a step was made, and scores taken and not yet used, which are computed for it.

        With several ranks each must call it (and one write), as such scores are averaged.
        """
        if self._aside:
            self._aside = self._of_all_ranks(self._aside)
        return {
            "stepped": self.steps.any,
            "requested": self.requested,
            "latest": {name: score.clone() for name, score in self.latest.items()},
            "aside": {name: pending.scores.clone() for name, pending in self._aside.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`: reopens a request that was open. Load the model first."""
        check_state_keys(state, ("stepped", "requested", "latest", "aside"))
        for name, score in [*state["latest"].items(), *state["aside"].items()]:
            if name not in self.layers or score.shape != self.layers[name].mask_shape:
                raise ValueError(f"state holds scores of a layer {name!r} of shape {tuple(score.shape)}, unknown here")
        self.cancel()
        if state["requested"]:
            self.request()
        self.steps.forget(state["stepped"])
        self._taken, self._aside = (
            {name: _Pending(self.layers[name], None, score.clone()) for name, score in state[key].items()}
            for key in ("latest", "aside")
        )

    def close(self) -> None:
        """Ends the request and removes the hooks from the optimizers, for good."""
        self.closed = True
        self.cancel()
        self.steps.close()
        for hook in self._hooks:
            hook.remove()
