"""The training loop: any model by any method, logged line by line, stopped and continued without a trace."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from tqdm import tqdm

from ddst.data import ImageSet, Sampler
from ddst.distributed import average_numbers
from ddst.gan import EMA, StepReport
from ddst.gan.unperturbed import unperturbed
from ddst.models.families import FAMILIES
from ddst.nn import sparse_layers
from ddst.sparsity.stats import FlopCounter, TrainingFlops
from ddst.train.checkpoint import CheckpointError, save_checkpoint
from ddst.train.collapse import Signs
from ddst.train.config import TrainConfig, fitting, out_of_memory, setting_errors
from ddst.train.folder import CHECKPOINT, LOG, SAMPLES, clear_folder, versions
from ddst.train.game import Inputs
from ddst.train.judging import Best, Judging
from ddst.train.live import live, require
from ddst.train.log import Kept, RunLog, cut_log
from ddst.train.options import ConfigError, flag
from ddst.train.players import (
    build_networks,
    check_memory,
    discriminator_backward,
    fuse_networks,
    gan_iteration,
    generator_backward,
    learning_rates,
    make_sparse,
    with_optimizers,
)
from ddst.train.processes import first, share, together
from ddst.train.rules import Misfit
from ddst.train.samples import generate, save_grid
from ddst.train.scheduler import make_scheduler, rules_in_force
from ddst.train.state_schema import check_state
from ddst.train.stop_flag import StopFlag
from ddst.train.terminal import OneLineError

GRID = 100  # Images in a sample grid.


class TrainingError(OneLineError, RuntimeError):
    """Training cannot go on; the message is one line that says why and what is left."""


class Trainer:
    """A run's whole state, one step of it, and its checkpoints.

    Args:
        config: all settings.
        images: what it trains on, at the config's resolution.
        sparse: makes the two networks of a config sparse, in place; another one for studies of other distributions.

    Attributes:
        step: generator iterations done. seconds: time they took. best: the smallest distance found so far, by what.
        changed: name of a setting -> its value before and now, of those that a resumed run was given anew.
        flops: counted operations of the steps done. forward_flops: of them, sums of the two networks' single forward
            passes per image.

    Raises:
        ConfigError: settings that these networks and images cannot have.
    """

    def __init__(self, config: TrainConfig, images: ImageSet, sparse: Callable[..., None] = make_sparse) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no CUDA device here")
        if config.batch_norm == "synced" and config.device == "cpu":
            raise ConfigError(
                "--batch-norm synced: torch's SyncBatchNorm trains on CUDA devices only, with --device cuda"
            )
        require(config.live)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = torch.device(config.device)
        self.config, self.images = config, images
        self.classes = self._count_classes()
        self._share = share(config.batch)
        self.out = Path(config.out)
        with setting_errors(), fitting("networks of these --width-g, --width-d and --latent"):
            check_memory(config, images.channels, self.classes)
            generator, discriminator = build_networks(config, images.channels, self.classes)
            sparse(config, generator, discriminator)
            fuse_networks(config, generator, discriminator)
            self.players = with_optimizers(config, generator.to(self.device), discriminator.to(self.device))
            self.ema = EMA(generator, decay=config.ema, start=config.ema_start, ramp=config.ema_ramp)
            self.scheduler, self.warnings = make_scheduler(config, self.players, self.ema)
        self.sampler = Sampler(len(images) * (2 if config.flips else 1), config.batch, config.seed)
        self._noise = torch.Generator().manual_seed(config.seed + 1)
        self.grid_noise = torch.randn(GRID, config.latent, generator=torch.Generator().manual_seed(config.seed + 2))
        self.flops = TrainingFlops(*self._flop_counters(), d_steps=config.d_steps)
        self.forward_flops = (0.0, 0.0)
        self.step, self.seconds = 0, 0.0
        self.saved_step: int | None = None  # of the checkpoint in the folder
        self.best: Best | None = None
        self.changed: dict[str, tuple[Any, Any]] = {}

    def _count_classes(self) -> int:
        if not FAMILIES[self.config.model].conditional:
            return 1
        labels = self.images.labels
        if labels is None:
            raise ConfigError(
                f"--model {self.config.model} needs images with classes: {flag('data')} {self.images.name} has none "
                "(two class folders or more, dataset.json, CIFAR, STL-10, TinyImageNet, digits and shapes have)"
            )
        return int(labels.max()) + 1

    def _flop_counters(self) -> tuple[FlopCounter, FlopCounter]:
        c, players = self.config, self.players
        label = [torch.zeros(1, dtype=torch.int64, device=self.device)] if FAMILIES[c.model].conditional else []
        noise = torch.zeros(1, c.latent, device=self.device)
        image = torch.zeros(1, self.images.channels, c.resolution, c.resolution, device=self.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return (
                FlopCounter(players.generator, (noise, *label), lambda inputs: players.generator(*inputs)),
                FlopCounter(players.discriminator, (image, *label), lambda inputs: players.discriminator(*inputs)),
            )

    def noise_of(self, generator: torch.Generator) -> Inputs:
        """A batch's noise, this process's share, with classes where the networks have some."""
        # Drawn on the CPU, so that a run meets the same noise on every device.
        c = self.config
        noise = torch.randn(c.batch, c.latent, generator=generator)[self._share].to(self.device)
        if not FAMILIES[c.model].conditional:
            return noise
        return noise, torch.randint(self.classes, (c.batch,), generator=generator)[self._share].to(self.device)

    def real_of(self, indices: Tensor) -> Inputs:
        """The images at some indices, with classes where the networks have some."""
        images = self.images.batch(indices).to(self.device)
        if not FAMILIES[self.config.model].conditional:
            return images
        assert self.images.labels is not None
        return images, self.images.labels[indices % len(self.images)].to(self.device)

    def train_step(self) -> tuple[float, float, StepReport]:
        """One GAN iteration and what the scheduler does after it: loss of D, loss of G, report.

        Raises:
            TrainingError: a loss is not finite; names the last good checkpoint.
        """
        started = time.perf_counter()
        self.flops.update()
        g, d = self.forward_flops
        self.forward_flops = g + self.flops.generator.forward, d + self.flops.discriminator.forward
        players, count = self.players, self.config.d_steps * self.config.accumulate
        densities = self.scheduler.density_g, self.scheduler.density_d
        rates = learning_rates(self.config, self.step, densities)
        for optimizer, rate in zip((players.optimizer_g, players.optimizer_d), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        reals = [self.real_of(self.sampler.next()[self._share]) for _ in range(count)]
        mean_d, mean_g, noise, scores = gan_iteration(players, reals, lambda: self.noise_of(self._noise))
        loss_d, loss_g = average_numbers([mean_d.item(), mean_g.item()])
        if not (math.isfinite(loss_d) and math.isfinite(loss_g)):
            raise TrainingError(f"loss is not finite at step {self.step + 1} (D {loss_d}, G {loss_g}){self.left()}")
        real: Any = reals[-1]
        report = self.scheduler.step(real=real, noise=noise, fake_scores=scores)
        self.step += 1
        self.seconds += time.perf_counter() - started
        return loss_d, loss_g, report

    def try_step(self) -> None:
        """The passes of one iteration on empty images, of which nothing is left: does it fit into the memory?

        Raises:
            ConfigError: it does not.
        """
        c, players = self.config, self.players
        with (
            fitting("iterations of these --batch, --resolution, --width-g and --width-d"),
            unperturbed(players.generator, players.discriminator),
        ):
            batch = self._share.stop - self._share.start
            latent = torch.zeros(batch, c.latent, device=self.device)  # first, as it is the larger one
            zeros = torch.zeros(batch, dtype=torch.int64, device=self.device)
            noise: Inputs = (latent, zeros) if FAMILIES[c.model].conditional else latent
            real, random = self.real_of(zeros.cpu()), players.game.random.get_state()
            discriminator_backward(players, real, noise)
            generator_backward(players, noise, real)
            players.game.random.set_state(random)
            for optimizer in (players.optimizer_g, players.optimizer_d):
                optimizer.zero_grad(set_to_none=True)

    def save_samples(self) -> tuple[Path, Tensor]:
        """The fixed-noise grid of the averaged generator as `samples/step_NNNNNN.png`, and its images."""
        path = self.out / SAMPLES / f"step_{self.step:06d}.png"
        images = generate(self.ema.module, self.grid_noise)
        save_grid(path, images)
        return path, images

    def state_dict(self) -> dict[str, Any]:
        """Everything a continuation needs, as tensors and plain values."""
        players = self.players
        return {
            "config": self.config.saved(),
            "versions": versions(),
            "images": self._fingerprint(),
            "channels": self.images.channels,
            "classes": self.classes,
            "step": self.step,
            "seconds": self.seconds,
            "best": None if self.best is None else asdict(self.best),
            "flops": {**self.flops.state_dict(), "forward": self.forward_flops},
            "generator": players.generator.state_dict(),
            "discriminator": players.discriminator.state_dict(),
            "optimizer_g": players.optimizer_g.state_dict()["state"],  # The settings beside it follow from the run's.
            "optimizer_d": players.optimizer_d.state_dict()["state"],
            "ema": self.ema.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sampler": self.sampler.state_dict(),
            "noise": self._noise.get_state(),
            "augment": players.game.random.get_state(),
            "scalers": None if players.game.scaler_g is None else [s.state_dict() for s in self._scalers()],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _fingerprint(self) -> str:
        """What the run sees of its images, by contents: pixels, and classes where they count."""
        pixels, labels = self.images.fingerprint(), self.images.labels
        if labels is None or not FAMILIES[self.config.model].conditional:
            return pixels
        return hashlib.sha256(pixels.encode() + labels.numpy().tobytes()).hexdigest()

    def _scalers(self) -> list[GradScaler]:
        game = self.players.game
        return [scaler for scaler in (game.scaler_g, game.scaler_d) if scaler is not None]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, or from there at another length: see `ddst.DDST`.

        Raises:
            CheckpointError: the state does not fit this run; nothing has been changed then.
        """
        if isinstance(state.get("images"), str) and state["images"] != self._fingerprint():
            raise CheckpointError(
                f"cannot resume: the images of {flag('data')} {self.images.name} have changed, or are others"
            )
        try:
            check_state(state, self)
        except Misfit as error:
            raise CheckpointError(f"checkpoint {self.out / CHECKPOINT} does not fit its run: {error}") from None
        players = self.players
        players.generator.load_state_dict(state["generator"])
        players.discriminator.load_state_dict(state["discriminator"])
        for optimizer, saved in ((players.optimizer_g, "optimizer_g"), (players.optimizer_d, "optimizer_d")):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state[saved], "param_groups": groups})
        self.ema.load_state_dict(state["ema"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.sampler.load_state_dict(state["sampler"])
        self._noise.set_state(state["noise"])
        players.game.random.set_state(state["augment"])
        for scaler, saved in zip(self._scalers(), state["scalers"] or (), strict=True):
            scaler.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.best = None if state["best"] is None else Best(**state["best"])
        self.saved_step = self.step
        players.game.steps_of_d = self.step * self.config.d_steps
        now = self.config.saved()
        self.changed = {name: (before, now[name]) for name, before in state["config"].items() if before != now[name]}
        self.flops.load_state_dict(state["flops"])
        self.forward_flops = state["flops"]["forward"]
        # Last: building and loading networks may draw random numbers.
        torch.set_rng_state(state["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def checkpoint(self, log: RunLog | None) -> None:
        """Write the checkpoint, whole or not at all, together with the length of the log it belongs to.

        With several processes all call it, and the one with a log writes.

        Raises:
            TrainingError: something in it is not finite; the last checkpoint stays.
        """
        state = self.state_dict()
        if (where := _not_finite(state)) is not None:
            raise TrainingError(f"{where} is not finite after step {self.step}{self.left()}")
        if log is not None:
            save_checkpoint(self.out / CHECKPOINT, {**state, "log": log.sync()})
        self.saved_step = self.step

    def left(self) -> str:
        """What is left of the run when training cannot go on."""
        if self.saved_step is None:
            return "; there is no checkpoint yet"
        return f"; the last good checkpoint is that of step {self.saved_step}, {self.out / CHECKPOINT}"


def _not_finite(state: Any, where: str = "") -> str | None:
    """The place of the first tensor in a nested state that holds NaN or infinity."""
    if isinstance(state, Tensor):
        return where if state.is_floating_point() and not bool(state.isfinite().all()) else None
    if isinstance(state, dict):
        pairs = [(f"{where}.{key}" if where else str(key), entry) for key, entry in state.items()]
    elif isinstance(state, list | tuple):
        pairs = [(f"{where}[{i}]", entry) for i, entry in enumerate(state)]
    else:
        return None
    return next((found for place, entry in pairs if (found := _not_finite(entry, place)) is not None), None)


def train(trainer: Trainer, kept: Kept | None = None, judge: Judging | None = None) -> int | None:
    """Train to the last step, to --stop-after, or to a signal, with a checkpoint at the end.

    Args:
        trainer: a new one, or one whose state has been loaded.
        kept: what it keeps of its log; None begins a new run in the trainer's folder. Of several processes the first
            one's counts. judge: of the averaged generator; None: one that the settings describe.

    Returns:
        The signal that ended it, or None.

    Raises:
        ConfigError: what --live names cannot begin; nothing is written then.
        TrainingError: a loss is not finite, or memory ran out; the last checkpoint stays.
        OSError: a file cannot be written; likewise.
        ProcessError: another process of the run is gone; likewise.
    """
    config, stop = trainer.config, StopFlag()
    last = config.steps if config.stop_after is None else min(config.steps, config.stop_after)
    log = None
    with ExitStack() as held:
        if first():
            judge = judge or Judging(trainer)
            judge.stopped = lambda: stop.agreed(busy=True) is not None
            watcher = held.enter_context(live(config, trainer.step))
            _clear(trainer.out, kept)
            log = held.enter_context(RunLog(trainer.out / LOG))
            log.watcher = watcher
            signs = Signs(log, config, trainer.images)
        held.enter_context(stop.listening())
        held.enter_context(_others_alive(trainer))
        held.enter_context(_last_checkpoint_named(trainer))
        if log is not None and (kept is None or kept.bytes == 0):
            log.write(
                event="start",
                settings=config.saved(),
                rules=rules_in_force(trainer.scheduler),
                images=len(trainer.images),
                left_out=dict(trainer.images.left_out),
                warnings=trainer.warnings,
                versions=versions(),
            )
        elif log is not None and trainer.changed:
            before, now = ({name: pair[i] for name, pair in trainer.changed.items()} for i in range(2))
            log.write(event="settings", step=trainer.step, before=before, now=now)
        if kept is None and log is not None:
            log.sync()
            trainer.save_samples()
        if kept is None or trainer.changed:
            # So that even a run killed in its first steps can be continued, with the settings that it was given.
            trainer.checkpoint(log)
        with _progress(config.steps, trainer.step) as bar, enough_memory(trainer):
            if judge is not None and log is not None:
                judge.catch_up(log)
                signs.write()
            while trainer.step < last and stop.agreed() is None:
                loss_d, loss_g, report = trainer.train_step()
                if log is not None:
                    _log_step(log, trainer, loss_d, loss_g, report)
                    _show(bar, trainer, loss_d, loss_g, report)
                    if trainer.step % config.sample_every == 0 or trainer.step == config.steps:
                        signs.samples(trainer.step, trainer.save_samples()[1])
                    signs.write()  # Of all but the figure, which a stop may leave to the resumed run.
                if judge is not None and log is not None:
                    judge(log)
                    signs.write()
                if trainer.step % config.checkpoint_every == 0 and trainer.step < last:
                    trainer.checkpoint(log)
            ended_by = stop.agreed()
        trainer.checkpoint(log)
    return ended_by


def _clear(out: Path, kept: Kept | None) -> None:
    if kept is None:
        clear_folder(out)
    else:
        cut_log(out / LOG, kept)
    (out / SAMPLES).mkdir(parents=True, exist_ok=True)


@contextmanager
def _others_alive(trainer: Trainer) -> Iterator[None]:
    with together(lambda: f"after step {trainer.step}; the last checkpoint stays"):
        yield


@contextmanager
def _last_checkpoint_named(trainer: Trainer) -> Iterator[None]:
    """A second Ctrl-C ends at once, whatever is being done, and says what is left."""
    try:
        yield
    except KeyboardInterrupt:
        raise TrainingError(f"ended at once after step {trainer.step}{trainer.left()}") from None


@contextmanager
def enough_memory(trainer: Trainer) -> Iterator[None]:
    """Turns running out of memory into a `TrainingError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (message := out_of_memory(error)) is None:
            raise
        raise TrainingError(f"memory ran out after step {trainer.step}: {message}") from error


def _progress(steps: int, done: int) -> Any:
    # Where nobody watches (a file, a pipe), a line every half minute instead of ten a second.
    every = 0.1 if sys.stderr is not None and sys.stderr.isatty() else 30.0
    return tqdm(
        total=steps,
        initial=done,
        unit=" steps",
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=every,
        disable=sys.stderr is None or not first(),
    )


def _log_step(log: RunLog, trainer: Trainer, loss_d: float, loss_g: float, report: StepReport) -> None:
    window = trainer.scheduler.balance.summary()
    log.write(
        step=report.step,
        loss_d=loss_d,
        loss_g=loss_g,
        balance_ratio=window.balance_ratio,
        mean_sign=window.mean_sign,
        sample=None if report.sample is None else report.sample.as_dict(),
        density_g=report.density_g,
        density_d=report.density_d,
        seconds=round(trainer.seconds, 4),
    )
    if report.decision is not None:
        log.write(event="decision", **report.decision.as_dict())
    for network, update in (("generator", report.generator_update), ("discriminator", report.discriminator_update)):
        if update is not None:
            log.write(event="update", network=network, **update.as_dict())
    if report.step == 1 or report.generator_update is not None or report.discriminator_update is not None:
        players = trainer.players
        networks = {"generator": players.generator, "discriminator": players.discriminator}
        densities = {name: {k: v.density for k, v in sparse_layers(net).items()} for name, net in networks.items()}
        log.write(event="densities", step=report.step, **densities)


def _show(bar: Any, trainer: Trainer, loss_d: float, loss_g: float, report: StepReport) -> None:
    ratio = trainer.scheduler.balance.value
    bar.set_postfix_str(
        f"D {loss_d:.3f} G {loss_g:+.3f} BR {'-' if ratio is None else f'{ratio:.2f}'} "
        f"d_G {report.density_g:.3f} d_D {report.density_d:.3f}",
        refresh=False,
    )
    bar.update()
