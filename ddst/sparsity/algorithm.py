"""Static, SET and RigL sparse training of any model, and pruning after dense training: one call after each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ddst._arguments import check_generator, check_int, check_number, check_one_of, check_state_keys
from ddst.distributed import check_movable
from ddst.nn import sparse_layers
from ddst.nn.storage import RESIZED
from ddst.sparsity.schedule import FINAL_FRACTION, falling_steps, make_schedule
from ddst.sparsity.updater import SCOPES, TopologyUpdater, UpdateReport, grace_of, has_single_weight_blocks
from ddst.user_warning import warn_user

METHODS = ("rigl", "set", "static", "prune")


class SparseTraining:
    """Every ``ΔT`` steps the share ``ζ(t)`` of the active blocks leaves (smallest norm) and as many enter (value 0).

    RigL lets the blocks in whose dense gradient has the largest norm, SET draws them at random, "static" changes
    nothing. The dense gradient is computed at an update only, as block norms, one layer at a time, and never stored;
    for it the layers' inputs and output gradients are kept from the backward pass before the update until then.
    "prune" drops once, at step ``prune_at``, the blocks of smallest norm over the network down to the density
    ``prune_to``; a model that starts full of blocks has been trained dense until then, and is fine-tuned after.
    Defaults in the table below hold where every block is a single weight (the paper's settings) or where blocks are
    larger.

    ===================  ========  ===================  ===============================================================
    default of           1×1       larger blocks        why
    ===================  ========  ===================  ===============================================================
    drop_fraction        0.5       0.3                  the smaller half of 16×16 blocks holds half of the squared norm
    scope                "global"  "layer"              norms of large blocks differ by layer much more than within one
    ranking              "raw"     "relative"           the same, and edge blocks have fewer weights
    grown_second_moment  "mean"    "score", SET "mean"  see :func:`~ddst.carry_state`
    connected            no        yes                  as :func:`ddst.sparsify`'s masks are
    grace                0         5 intervals          a block enters with zeros and would be the smallest for long
    ===================  ========  ===================  ===============================================================

    Args:
        model: has been through :func:`ddst.sparsify`, or is built of sparse layers.
        optimizer: holds the model's parameters. Any torch optimizer whose state has the parameter's shape, or one that
            holds such a one and its state (SAM, Lookahead, ``ZeroRedundancyOptimizer``, accelerate's); see
            ``docs/optimizers.md``.
        method: "rigl", "set", "static" or "prune".
        total_steps: ``T``, the number of calls of :meth:`step` of the whole run.
        interval: ``ΔT``, steps between updates: updates are made at multiples of it.
        drop_fraction: ``ζ0``, 0 … 1.
        drop_fraction_end: the fraction at the end, for "cosine" and "linear".
        drop_fraction_steps: over how many steps it falls there, where it stays; None: ``T``.
        schedule: "cosine", "linear", "constant", or a function from step to fraction.
        begin, end: updates are made at steps ``begin ≤ t < end`` (``end=None``: ``T``). The first and the last step of
            the run never make one.
        seed: of random growth. generator: or the source of it, on the CPU.
        prune_to, prune_at: with "prune", a density above 0 and the step at which it is reached; None: two thirds of
            ``total_steps``, so that half as many steps follow as were dense (the paper's).
        grace: steps for which no exchange drops a block that entered (``docs/notes/grace.md``); None: see the table.
        random_share, scope, ranking, max_norm_share, exempt, connected, grown_second_moment: see
            :class:`~ddst.sparsity.updater.TopologyUpdater`. ``exempt=None``: none, except with ``scope="global"`` and
            blocks larger than 1×1: "ends", the first and the last weight layer. Pruning always ranks over the network,
            and its ``exempt=None`` is none: layers that keep all their weights would leave no room for the others'; its
            ``connected=None`` is no.
        process_group: of torch.distributed, None for the default group: where there are several ranks, all must call
            :meth:`step` alike, and train the same masks (see :class:`~ddst.sparsity.updater.TopologyUpdater`).

    Raises:
        TypeError, ValueError: an argument is not as described; a ``prune_to`` below what dense and exempt layers and
            one block of each other one hold; a model without sparse layers (unless "static"); an
            optimizer whose state cannot follow (where it has none yet, :meth:`step` raises after its first step); a
            model sharded by fully_shard (unless "static"); ``scope="global"``, which changes the number of slots, in a
            DistributedDataParallel that :func:`ddst.watch` was not told of.

    Warns:
        UserWarning: the first exchange would have no block to move, few as they are, or needed by rows and columns;
            pruning ended above ``prune_to`` for the latter reason.

    Numerics: deterministic. Resumed from :meth:`state_dict` (with the model's and the optimizer's) at any step, the
        run is the same bit for bit.
    Source: Evci et al., *Rigging the Lottery* (2020), algorithm 1; Mocanu et al., *Scalable training of artificial
        neural networks with adaptive sparse connectivity* (2018) for SET.

    >>> import torch, ddst
    >>> model = torch.nn.Sequential(ddst.SparseLinear(64, 64, density=0.5), torch.nn.Linear(64, 2))
    >>> adam = torch.optim.Adam(model.parameters())
    >>> training = SparseTraining(model, adam, total_steps=30, interval=10)
    >>> for _ in range(30):
    ...     adam.zero_grad()
    ...     model(torch.randn(8, 64)).square().sum().backward()
    ...     adam.step()
    ...     report = training.step()
    ...     if report is not None:
    ...         print(report.step, report.kind, round(report.density_after, 3))
    10 exchange 0.515
    20 exchange 0.515
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        method: str = "rigl",
        total_steps: int,
        interval: int = 100,
        drop_fraction: float | None = None,
        drop_fraction_end: float = FINAL_FRACTION,
        drop_fraction_steps: int | None = None,
        schedule: str | Callable[[int], float] = "cosine",
        scope: str | None = None,
        ranking: str | None = None,
        max_norm_share: float | None = None,
        exempt: Sequence[str] | str | None = None,
        grown_second_moment: str | None = None,
        random_share: float = 0.0,
        connected: bool | None = None,
        grace: int | None = None,
        prune_to: float | None = None,
        prune_at: int | None = None,
        begin: int = 0,
        end: int | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.method = check_one_of("method", method, METHODS)
        self.total_steps = check_int("total_steps", total_steps, 1)
        self.interval = check_int("interval", interval, 1)
        self.begin = check_int("begin", begin)
        self.end = self.total_steps if end is None else check_int("end", end)
        check_int("seed", seed, -(2**63), 2**64 - 1)
        check_generator("generator", generator)
        self.prune_to, self.prune_at = self._pruning(prune_to, prune_at)
        if method == "prune" and scope is not None and check_one_of("scope", scope, SCOPES) != "global":
            raise ValueError(f'scope="{scope}" does not go with method="prune", which ranks over the network')
        self.updater = TopologyUpdater(
            model,
            optimizer,
            growth="random" if method in ("set", "prune") else "gradient",
            scope=None if method == "prune" else scope,
            ranking=ranking,
            max_norm_share=max_norm_share,
            exempt=exempt,
            grown_second_moment=grown_second_moment,
            random_share=random_share,
            connected=False if method == "prune" and connected is None else connected,
            grace=grace_of(grace, has_single_weight_blocks(sparse_layers(model)), self.interval),
            generator=generator or torch.Generator().manual_seed(seed),
            process_group=process_group,
        )
        if method != "static" and not self.updater.all_layers:
            raise ValueError("model has no sparse layers: call ddst.sparsify(model, density) first")
        if method != "static":
            check_movable(self.updater.layers, RESIZED if self.updater.scope == "global" or method == "prune" else "")
        if self.prune_to is not None:
            self._check_prune_to(self.prune_to)
        if drop_fraction is None:
            drop_fraction = 0.5 if self.updater.single_weights else 0.3
        falling = falling_steps(drop_fraction_steps, self.total_steps)
        self._fraction = make_schedule(schedule, drop_fraction, falling, final=drop_fraction_end)
        self.steps = 0
        self._due: int | None = None
        if not callable(schedule):  # One of the user's own is asked at the steps of its updates only.
            self._warn_if_still(type(model).__name__)

    def _warn_if_still(self, name: str) -> None:
        """Warns where the first exchange would have no block of the model of that name to move."""
        first = next(filter(self.is_update_step, range(self.interval, self.total_steps, self.interval)), None)
        if self.method not in ("rigl", "set") or first is None:
            return
        updater, share = self.updater, self.drop_fraction(first)
        if updater.exchangeable(share):
            return
        blocks = max((layer.nnz for layer in updater.layers.values()), default=0)
        limits = ["connected"] if updater.connected else []
        limits += [] if updater.max_norm_share is None else [f"max_norm_share={updater.max_norm_share}"]
        warn_user(
            f"with drop_fraction={share:.3g} at the first update, of {blocks} blocks in the largest layer, "
            f"{''.join(f'{limit}, ' for limit in limits)}and total_steps={self.total_steps} no block of {name} is "
            "exchanged"
        )

    def _warn_if_too_dense(self, density: float) -> None:
        if self.density > density + self.updater.resolution:
            warn_user(f"pruned to {self.density:.4g}, not to prune_to={density}: rows and columns need the rest")

    def _check_prune_to(self, density: float) -> None:
        low = self.updater.attainable_density[0]
        if density < low - self.updater.resolution:
            least = "what keeps the other ones connected" if self.updater.connected else "one block of each other one"
            raise ValueError(
                f"prune_to must be at least {low:.4g} for this model, got {density}: that much is in dense and exempt "
                f"layers and {least}"
            )

    def _pruning(self, prune_to: float | None, prune_at: int | None) -> tuple[float | None, int]:
        if self.method != "prune":
            for name, value in (("prune_to", prune_to), ("prune_at", prune_at)):
                if value is not None:
                    raise ValueError(f'{name} needs method="prune", got method="{self.method}"')
            return None, 0
        if prune_to is None:
            raise ValueError('prune_to must be given with method="prune": the density that is left')
        at = max(2, 2 * self.total_steps // 3) if prune_at is None else check_int("prune_at", prune_at, 2)
        if at >= self.total_steps:
            raise ValueError(f"prune_at must be below total_steps, {self.total_steps}, got {at}")
        return check_number("prune_to", prune_to, most=1, above=0, note="(a density)"), at

    @property
    def density(self) -> float:
        """Active share of the weights, see :attr:`ddst.sparsity.TopologyUpdater.density`."""
        return self.updater.density

    def drop_fraction(self, step: int) -> float:
        """``ζ(t)``, 0 … 1."""
        return min(max(float(self._fraction(step)), 0.0), 1.0)

    def is_update_step(self, step: int) -> bool:
        """Whether the topology changes at this step (counted from 1)."""
        inside = max(self.begin, 2) <= step < min(self.end, self.total_steps)
        due = step == self.prune_at if self.method == "prune" else step % self.interval == 0
        return self.method != "static" and inside and due

    def step(self) -> UpdateReport | None:
        """Counts one step and updates the topology when it is due. Call it after ``optimizer.step()``.

        Returns:
            What the update did, or None when there was none.

        Raises:
            RuntimeError: closed; or the optimizer made no step, or RigL got no gradient, in a whole interval. (An
                update whose step brought none, because a gradient scaler skipped it for instance, is made up for at the
                next step that does.)
            ValueError: after the optimizer's first step: its state cannot follow a change of topology.
        """
        scores = self.updater.scores
        scores.check_open()
        if self.method != "static":
            self.updater.check_first_state()
        self.steps += 1
        step, report = self.steps, None
        if self.is_update_step(step) and self._due is None:
            self._due = step
        if self._due is not None and step < min(self.end, self.total_steps):
            if scores.steps.any and (self.updater.growth == "random" or scores.arrived):
                if self.prune_to is not None:
                    report = self.updater.change_density(self.prune_to, step)
                    self._warn_if_too_dense(self.prune_to)
                else:
                    report = self.updater.exchange(self.drop_fraction(step), step)
                self._due = None
            elif step - self._due >= self.interval:
                raise RuntimeError(
                    f"no gradient reached a sparse layer from step {self._due} to {step}, or none that is finite, or "
                    "the optimizer made no step. Call step() after optimizer.step() of the optimizer that was given, "
                    "once per step, with the model in training"
                )
        scores.steps.forget()
        self._ask(anew=report is not None)
        return report

    def _ask(self, anew: bool = False) -> None:
        """Asks for scores of the next step if an update may follow it."""
        scores, following = self.updater.scores, self.steps + 1
        if self.is_update_step(following) or (self._due is not None and following < self.end):
            if anew or not scores.requested:
                scores.request()
        else:
            scores.cancel()

    def state_dict(self) -> dict[str, Any]:
        """Step counter, scores asked for and taken, generator; with the model's and the optimizer's the whole state.

        Gradients of a backward pass whose ``optimizer.step()`` has not run yet are not part of it.
        """
        return {"steps": self.steps, "due": self._due, "updater": self.updater.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`. Load the model first.

        The state may be of a run of another length: from there on ``total_steps``, and what follows from it (the drop
        fraction, which step is the last), are this one's.
        """
        check_state_keys(state, ("steps", "due", "updater"))
        self.updater.load_state_dict(state["updater"])
        self.steps = state["steps"]
        self._due = state["due"]
        self._ask()

    def close(self) -> None:
        """Ends an open request and removes the hook from the optimizer; :meth:`step` is not to be called any more.

        Not needed before another one is made for the same model, which takes over.
        """
        self.updater.scores.close()
