"""Double dynamic sparse training: G's blocks move, D's density follows the balance ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from ddst._arguments import (
    check_bool,
    check_int,
    check_module,
    check_number,
    check_one_of,
    check_state_keys,
    check_tensor,
    check_type,
)
from ddst.distributed import average_numbers
from ddst.gan.balance import AVERAGES, BalanceRatio, BalanceSample
from ddst.gan.controller import SIGNALS, Decision, DecisionRule, DensityController, check_range
from ddst.gan.density_steering import DensitySteering
from ddst.gan.earlier_weights import EarlierWeights
from ddst.gan.ema import EMA
from ddst.gan.fixed_rules import ConstantDensity, DensityRamp
from ddst.gan.loop_checks import StepOrder, check_optimizers
from ddst.gan.step_report import StepReport
from ddst.gan.unperturbed import random_states, unperturbed
from ddst.nn import sparse_layers
from ddst.nn.repeated_calls import never_repeated
from ddst.sparsity.algorithm import SparseTraining
from ddst.sparsity.density import NetworkDensity
from ddst.sparsity.schedule import FINAL_FRACTION, falling_steps, make_schedule
from ddst.sparsity.updater import TopologyUpdater, grace_of, has_single_weight_blocks, resolve_exempt
from ddst.user_warning import warn_user

MODES = ("relaxed", "strict", "ramp", "sdst")
CONTROLLED = ("relaxed", "strict")
METHODS_D = ("rigl", "set", "static")


class DDST:
    """``d_D ← d_D ± Δ`` by the balance ratio every ``ΔT_D`` iterations, and G's blocks exchanged every ``ΔT_G``.

    One object for every sparse method: DDST relaxed and strict; SDST (``mode="sdst"``: D's density is never changed)
    with ``method`` "rigl" or "set"; static (``mode="sdst", method="static"``), which measures only; and what can be
    made of these parts (:data:`ddst.gan.PRESETS` names the published ones). Sparsify both networks first (DDST starts
    at ``d_D = d_G``), make the optimizers, then call :meth:`step` once per generator iteration::

        d_loss.backward(); opt_d.step()          # once or several times
        fake_scores = discriminator(generator(noise))
        (-fake_scores.mean()).backward(); opt_g.step()
        ddst.step(real=real, noise=noise, fake_scores=fake_scores)

    Args:
        generator, discriminator: the networks.
        opt_g, opt_d: their optimizers.
        total_steps: generator iterations of the whole run.
        mode: of D's density: "relaxed" (up to 1), "strict" (up to ``d_max``, there DST at constant density), "ramp" (a
            line to the upper end of ``density_range``, :class:`~ddst.gan.fixed_rules.DensityRamp`), "sdst" (constant).
        method: G's: "rigl", "set", "static" or "prune" (dense, then pruned; see :class:`ddst.SparseTraining`).
        method_d: how D's blocks grow: "rigl" or "set"; "static" with ``mode="sdst"``, where the others exchange blocks
            every ``interval_d``. None: "static" with "sdst", else "rigl".
        interval_g: ``ΔT_G``, iterations between updates of G's topology.
        interval_d: ``ΔT_D``, iterations between decisions about D; None: 1,000 relaxed, 2,000 strict.
        bounds: ``(B−, B+)``; None: (0.45, 0.55). delta: ``Δ``, a density.
        signal: what is held within them: "balance_ratio", or "real_sign", ADA's (:class:`DensityController`).
        density_range: of D; None: (0.05, 1) relaxed, (0.05, 0.5) strict.
        br_every: iterations between two measurements of the balance ratio.
        br_window: iterations the ratio is averaged over: ``br_window / br_every`` samples.
        br_average: of the window: "mean_of_ratios" (the paper's) or "ratio_of_means"; None: the first for 1×1 blocks in
            D, else the second. br_eps: ``ε``. See :class:`BalanceRatio`.
        warmup: iterations without a decision; None: 0 for 1×1 blocks in D (the window does it), else an eighth of the
            run, at most 1,000.
        drop_fraction, drop_fraction_d: ``ζ0`` of G, and of D's exchanges at ``d_max``; None: 0.5 for 1×1 blocks, else
            0.3. drop_fraction_end, schedule: of both.
        drop_fraction_steps: over how many iterations both fall; None: all, but for G's with blocks larger than 1×1 a
            third of the run (``docs/notes/collapse.md``).
        scope, ranking, max_norm_share, grown_second_moment, random_share, connected, grace: of both, see
            :class:`ddst.SparseTraining`; None of ``grace`` are five intervals of each for blocks larger than 1×1.
            Changes of D's density, and pruning of G, are ranked over the whole network whatever ``scope``.
        prune_to, prune_at: of ``method="prune"``.
        exempt_g, exempt_d: names of layers that never change, or "ends" (first and last); None: the ends where blocks
            are larger than 1×1. (A block of G's first layer is what a piece of the noise means to all that follows:
            moving these collapsed runs, ``docs/notes/collapse.md``.)
        published: the authors' code in everything that is not given, whatever the blocks: the settings of 1×1 blocks
            above, moments of the dense gradient for what enters (``grown_second_moment="dense"``), decisions on the
            bounds, and nothing above ``d_max`` (:class:`DensityController`). What stays ours: α/β with β ≤ ``br_eps``
            is left out of the mean (theirs has no guard against it), the spectral norm's gradient at inactive weights
            lacks σ's own part, and there is no update at step 1 with intervals of 1.
        ema: averaged generator, updated by every :meth:`step` after the topology.
        seed: of random growth.
        generate, score: ``noise → images`` and ``images → scores`` for the measurement, where that is more than
            ``generator(noise)`` and ``discriminator(images)`` (labels, several outputs).
        process_group: of torch.distributed, None for the default group: where there are several ranks, all must call
            :meth:`step` alike, each with an equal share of the batch: α and β are averaged before their ratio is
            taken, so that all decide alike, and updates are those of :class:`ddst.SparseTraining`.

    Raises:
        TypeError, ValueError: an argument is not as described; no sparse layers where the method would move them; a D
            in a DistributedDataParallel that :func:`ddst.watch` was not told of, unless ``mode="sdst"`` (or in every
            layer ``reserve=`` set slots aside for the density's upper end).

    Warns:
        UserWarning: an interval or the window leaves no update in ``total_steps``.

    Numerics: deterministic; resume from :meth:`state_dict` is bit-exact. Measuring changes nothing: buffers (batch
        norm, spectral norm) and the random state are put back. Where G or D draws numbers of its own (StyleGAN2's
        noise, dropout) from torch's default generators, G from before its step is scored anew with the draws of G
        from after it, in place of ``fake_scores``, so that chance is no part of α. The gradient that scores D's blocks
        is that of the last step of ``opt_d``; what G's loss sends through D is kept apart, whether D is frozen then or
        not.
    Cost: a measurement is one forward pass of G and two of D, every ``br_every`` iterations (where they draw numbers
        of their own one more of each, and from G's step until then a copy of its weights is kept). Before an update of
        G and a decision about D, the activations and gradients of one step of theirs stay in memory until :meth:`step`;
        the block scores are computed from them only if blocks are to grow. See :class:`ddst.SparseTraining` for
        updates.
    Source: Wang et al., *Balanced Training for Sparse GANs* (2023), both settings; the defaults for blocks larger than
        1×1 are this library's, see :class:`ddst.SparseTraining`, :class:`BalanceRatio`, :class:`DensityController`.

    >>> import ddst
    >>> G = nn.Sequential(ddst.SparseLinear(64, 64, density=0.5), nn.ReLU(), ddst.SparseLinear(64, 64, density=0.5))
    >>> D = nn.Sequential(ddst.SparseLinear(64, 64, density=0.5), nn.ReLU(), nn.Linear(64, 1))
    >>> opt_g, opt_d = torch.optim.Adam(G.parameters()), torch.optim.Adam(D.parameters())
    >>> scheduler = DDST(G, D, opt_g, opt_d, total_steps=40, interval_g=4, interval_d=20, br_every=1, br_window=5)
    >>> for _ in range(40):
    ...     real, noise = torch.randn(8, 64), torch.randn(8, 64)
    ...     opt_d.zero_grad()
    ...     (D(G(noise).detach()).mean() - D(real).mean()).backward()
    ...     opt_d.step()
    ...     opt_g.zero_grad()
    ...     fake_scores = D(G(noise))
    ...     (-fake_scores.mean()).backward()
    ...     opt_g.step()
    ...     report = scheduler.step(real=real, noise=noise, fake_scores=fake_scores)
    ...     if report.decision is not None:
    ...         print(report.step, report.decision.action in ("keep", "grow", "drop"))
    20 True
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        opt_g: Optimizer,
        opt_d: Optimizer,
        *,
        total_steps: int,
        mode: str = "relaxed",
        method: str = "rigl",
        method_d: str | None = None,
        interval_g: int = 500,
        interval_d: int | None = None,
        bounds: tuple[float, float] | None = None,
        delta: float = 0.05,
        density_range: tuple[float, float] | None = None,
        signal: str = "balance_ratio",
        br_every: int = 10,
        br_window: int = 1000,
        br_average: str | None = None,
        br_eps: float = 1e-3,
        warmup: int | None = None,
        drop_fraction: float | None = None,
        drop_fraction_d: float | None = None,
        drop_fraction_end: float = FINAL_FRACTION,
        drop_fraction_steps: int | None = None,
        schedule: str | Callable[[int], float] = "cosine",
        scope: str | None = None,
        ranking: str | None = None,
        max_norm_share: float | None = None,
        grown_second_moment: str | None = None,
        random_share: float = 0.0,
        connected: bool | None = None,
        grace: int | None = None,
        prune_to: float | None = None,
        prune_at: int | None = None,
        exempt_g: Sequence[str] | str | None = None,
        exempt_d: Sequence[str] | str | None = None,
        published: bool = False,
        ema: EMA | None = None,
        seed: int = 0,
        generate: Callable[[Any], Any] | None = None,
        score: Callable[[Any], Tensor] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_one_of("mode", mode, MODES)
        check_one_of("signal", signal, SIGNALS)
        check_bool("published", published)
        method_d = ("static" if mode == "sdst" else "rigl") if method_d is None else method_d
        check_one_of("method_d", method_d, METHODS_D)
        if method_d == "static" and mode != "sdst":
            raise ValueError(f'method_d="static" does not go with mode="{mode}", which changes D')
        if signal != SIGNALS[0] and mode not in CONTROLLED:
            raise ValueError(
                f'signal="{signal}" needs mode "relaxed" or "strict", got mode="{mode}", which measures only'
            )
        check_module("generator", generator)
        check_module("discriminator", discriminator)
        check_optimizers(generator, discriminator, opt_g, opt_d)
        if ema is not None and check_type("ema", ema, EMA, "a ddst.EMA or None").model is not generator:
            raise ValueError("ema must average the generator that is given")
        for name, function in (("generate", generate), ("score", score)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function or None, got {type(function).__name__}")
        check_int("seed", seed, -(2**63), 2**64 - 1)
        self.generator, self.discriminator = generator, discriminator
        self.mode, self.ema = mode, ema
        self.total_steps = check_int("total_steps", total_steps, 1)
        self.interval_g = check_int("interval_g", interval_g, 1)
        default = 2000 if mode == "strict" else 1000
        self.interval_d = check_int("interval_d", default if interval_d is None else interval_d, 1)
        self.br_every = check_int("br_every", br_every, 1)
        self.br_window = check_int("br_window", br_window, 1)
        if self.br_window < self.br_every:
            raise ValueError(f"br_window must be at least br_every ({br_every} iterations), got {br_window}")
        self.network_d = NetworkDensity(discriminator)
        single = published or has_single_weight_blocks(self.network_d.layers)
        if br_average is None:
            br_average = "mean_of_ratios" if single else "ratio_of_means"
        check_one_of("br_average", br_average, AVERAGES)
        check_number("br_eps", br_eps, 0)
        self.balance = BalanceRatio(self.br_window // self.br_every, br_average, br_eps)
        self._generate, self._score = generate or generator, score or discriminator

        if published:
            scope, ranking = scope or "global", ranking or "raw"
            grown_second_moment = grown_second_moment or "dense"
            drop_fraction = 0.5 if drop_fraction is None else drop_fraction
            exempt_g = () if exempt_g is None else exempt_g
            connected = False if connected is None else connected
            grace = 0 if grace is None else grace
        single_g = published or has_single_weight_blocks(sparse_layers(generator))
        if exempt_g is None and method in ("rigl", "set"):
            exempt_g = () if single_g else "ends"
        shared: dict[str, Any] = {
            "scope": scope,
            "ranking": ranking,
            "max_norm_share": max_norm_share,
            "grown_second_moment": grown_second_moment,
            "random_share": random_share,
            "connected": connected,
            "process_group": process_group,
        }
        self._process_group = process_group
        if warmup is None:
            warmup = 0 if single else min(total_steps // 8, 1000)
        by_mode = mode if mode in CONTROLLED else CONTROLLED[0]
        # Made whatever the mode, as they check the arguments.
        controller = DensityController(by_mode, bounds, delta, density_range, warmup, signal, published)
        initial = (0.5 if single else 0.3) if drop_fraction_d is None else drop_fraction_d
        steps_d = falling_steps(drop_fraction_steps, total_steps)
        fraction = make_schedule(schedule, initial, steps_d, "drop_fraction_d", drop_fraction_end)
        exempt_d = (() if single else "ends") if exempt_d is None else exempt_d
        kept_d = resolve_exempt(discriminator, self.network_d.layers, exempt_d)
        rule: DecisionRule | None = None
        if mode in CONTROLLED:
            rule = controller
        elif mode == "ramp":
            end = check_range("density_range", (0.0, 1.0) if density_range is None else density_range)[1]
            rule = DensityRamp(end, total_steps, self.interval_d)
        elif method_d != "static":
            rule = ConstantDensity()
        self._steering: DensitySteering | None = None
        if rule is not None:
            if not self.network_d.layers:
                raise ValueError(f'discriminator has no sparse layers, which mode="{mode}" changes: sparsify it first')
            updater = TopologyUpdater(
                discriminator,
                opt_d,
                growth="random" if method_d == "set" else "gradient",
                exempt=kept_d,
                grace=grace_of(grace, single, self.interval_d),
                generator=torch.Generator().manual_seed(seed ^ 1),
                **shared,
            )
            self._steering = DensitySteering(updater, rule, self.interval_d, total_steps, fraction)
        falling = total_steps if single_g else max(1, total_steps // 3)
        self.training_g = SparseTraining(
            generator,
            opt_g,
            method=method,
            total_steps=total_steps,
            interval=interval_g,
            drop_fraction=drop_fraction,
            drop_fraction_end=drop_fraction_end,
            drop_fraction_steps=falling_steps(drop_fraction_steps, falling),
            schedule=schedule,
            exempt=exempt_g,
            grace=grace,
            prune_to=prune_to,
            prune_at=prune_at,
            seed=seed,
            **{**shared, "scope": None if method == "prune" else scope},
        )
        if opt_d is not opt_g:
            # Each loss runs backward through the other network too.
            self.training_g.updater.scores.set_aside_at(opt_d)
            if self.updater_d is not None:
                self.updater_d.scores.set_aside_at(opt_g)
        self.steps = 0
        self._order = StepOrder(opt_g)
        self._draws = True  # whether G or D drew numbers when it was measured last; unknown: as if it did
        self._earlier = EarlierWeights(generator, opt_g, lambda: self._draws and (self.steps + 1) % self.br_every == 0)
        self._warn_if_idle()

    @property
    def updater_d(self) -> TopologyUpdater | None:
        """What moves D's blocks; None where D is never changed."""
        return None if self._steering is None else self._steering.updater

    @property
    def controller(self) -> DecisionRule | None:
        """What decides about D, a :class:`DensityController` with mode "relaxed" and "strict"; None: nothing does."""
        return None if self._steering is None else self._steering.rule

    @property
    def waiting(self) -> Decision | None:
        """A decision about D that is not carried out yet: D has made no step since, or one without a gradient."""
        return None if self._steering is None else self._steering.waiting

    @property
    def density_g(self) -> float:
        """Active share of all the generator's weights, see :class:`~ddst.sparsity.density.NetworkDensity`."""
        return self.training_g.density

    @property
    def density_d(self) -> float:
        """Active share of all the discriminator's weights: what the controller steers."""
        return self.network_d.density

    @property
    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        """What it keeps for the weights of G and of D between steps, beside networks, optimizers and ``ema``."""
        return self.training_g.updater.held, [] if self.updater_d is None else self.updater_d.held

    def is_decision_step(self, step: int) -> bool:
        """Whether the controller decides at this iteration (counted from 1; never at the first and the last)."""
        return self._steering is not None and self._steering.decides_at(step)

    def step(self, *, real: Tensor, noise: Any, fake_scores: Tensor) -> StepReport:
        """Counts one generator iteration: measures, moves G's blocks, steers D's density, updates the average.

        Args:
            real: the iteration's batch of data, as D takes it.
            noise: what ``fake_scores`` was made from, as G takes it.
            fake_scores: ``D(G(noise))`` as computed for G's loss, before ``opt_g.step()``; one score for each that D
                gives to ``G(noise)``, in any shape.

        Raises:
            TypeError: ``fake_scores`` or what D returns is no tensor.
            ValueError: ``real``, ``noise`` and ``fake_scores`` do not fit together (seen where the ratio is measured).
            RuntimeError: ``fake_scores`` were computed after the last ``opt_g.step()``, twice in a row: G has not moved
                since, and α would be 0 for ever. (In a step that a gradient scaler skipped it is, rightly.) Or the
                gradient an update needs did not come in a whole interval; or the scheduler is closed.
        """
        check_tensor("fake_scores", fake_scores)
        self.training_g.updater.scores.check_open()
        self._order.check(fake_scores)
        step = self.steps + 1
        sample = self._measure(real, noise, fake_scores) if step % self.br_every == 0 else None
        self.steps = step
        generator_update = self.training_g.step()
        decision, discriminator_update = None, None
        if self._steering is not None:
            decision, discriminator_update = self._steering.step(step, self.balance.summary())
        if self.ema is not None:
            self.ema.update()
        return StepReport(
            step, sample, decision, generator_update, discriminator_update, self.density_g, self.density_d
        )

    @torch.no_grad()
    def _measure(self, real: Tensor, noise: Any, fake_scores: Tensor) -> BalanceSample:
        networks = self.generator, self.discriminator
        with unperturbed(*networks), never_repeated():
            states = random_states(*networks)
            images = self._generate(noise)
            fake = self._scores_of(images)
            drawn = not all(map(torch.equal, states, random_states(*networks)))
            if fake.numel() != fake_scores.numel() or not fake.numel():
                raise ValueError(
                    "fake_scores must be D(G(noise)) as computed for G's loss, not its mean and not of other noise: D "
                    f"gives {tuple(fake.shape)} to G(noise), fake_scores have the shape {tuple(fake_scores.shape)}"
                )
            plain = self._generate is self.generator and self._score is self.discriminator
            if plain and isinstance(real, Tensor) and isinstance(images, Tensor) and real.shape[1:] != images.shape[1:]:
                raise ValueError(
                    f"real must be a batch of data of the size of G's {tuple(images.shape)}, got {tuple(real.shape)}"
                )
            data = self._scores_of(real)
            if not data.numel():
                raise ValueError("real must hold data, got none")
        if drawn and self._earlier.kept:  # fake_scores are of other draws
            with unperturbed(*networks), never_repeated(), self._earlier.in_place():
                fake_scores = self._scores_of(self._generate(noise))
        elif drawn and self._draws:
            fake_scores = fake  # G has made no step
        self._draws = drawn
        self._earlier.forget()
        means = [scores.to(torch.float64).mean().item() for scores in (fake, fake_scores, data, data.sign())]
        after, before, rated, sign = average_numbers(means, self._process_group)
        return self.balance.add(after - before, rated - before, sign if math.isfinite(sign) else None)

    def _scores_of(self, images: Any) -> Tensor:
        scores = self._score(images)
        if not isinstance(scores, Tensor):
            raise TypeError(f"score must return a tensor of scores, got {type(scores).__name__}; give score=...")
        return scores

    def _warn_if_idle(self) -> None:
        if self.training_g.method in ("rigl", "set") and self.interval_g >= self.total_steps:
            self._warn(f"interval_g={self.interval_g}", "G's topology is never updated")
        if self.controller is not None:
            last = (self.total_steps - 1) // self.interval_d * self.interval_d
            measured = isinstance(self.controller, DensityController)
            ready = max(self.balance.window * self.br_every, self.controller.warmup + 1) if measured else 2
            if last < max(ready, 2):
                window = f", br_window={self.br_window}, warmup={self.controller.warmup}" if measured else ""
                self._warn(f"interval_d={self.interval_d}{window}", "D's density is never changed")

    def _warn(self, settings: str, effect: str) -> None:
        warn_user(f"with {settings} and total_steps={self.total_steps} {effect}")

    def state_dict(self) -> dict[str, Any]:
        """Step, balance window, open requests and random growth; networks, optimizers and ``ema`` have their own."""
        return {
            "mode": self.mode,
            "steps": self.steps,
            "balance": self.balance.state_dict(),
            "generator": self.training_g.state_dict(),
            "discriminator": None if self.updater_d is None else self.updater_d.state_dict(),
            "waiting": None if self.waiting is None else self.waiting.as_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`. Load the networks first.

        The state may be of a run of another length: from there on ``total_steps``, and what follows from it (the drop
        fractions, ``warmup=None``, the line of ``mode="ramp"``, which iteration is the last), are this one's.

        Raises:
            ValueError: it is the state of another mode.
        """
        check_state_keys(state, ("mode", "steps", "balance", "generator", "discriminator", "waiting"))
        if state["mode"] != self.mode:
            raise ValueError(f'state is of mode="{state["mode"]}", this is mode="{self.mode}"')
        self.balance.load_state_dict(state["balance"])
        self.training_g.load_state_dict(state["generator"])
        if self._steering is not None:
            self._steering.load(state["discriminator"], state["waiting"], state["steps"])
        self.steps = state["steps"]

    def close(self) -> None:
        """Ends open requests and removes the hooks from the optimizers; :meth:`step` is not to be called any more.

        Not needed before another one is made for the same networks, which takes over.
        """
        self._order.close()
        self._earlier.close()
        self.training_g.close()
        if self.updater_d is not None:
            self.updater_d.scores.close()
