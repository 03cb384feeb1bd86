"""The averaged generator judged every so often while it trains: figures in the log, the best generator kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ddst.metrics.classifier import TRAINED
from ddst.metrics.judge import Judge
from ddst.train.folder import BEST, versions
from ddst.train.generator import About, write_generator
from ddst.train.log import RunLog, read_log
from ddst.train.samples import generate

if TYPE_CHECKING:
    from ddst.train.loop import Trainer


@dataclass(frozen=True)
class Best:
    """The smallest distance found so far, and what measured it: others are not smaller or larger."""

    value: float
    measure: str


class _Stopped(Exception):
    """Ends a measurement."""


class Judging:
    """Calls for a log line after each step; does something every `metric_every` steps and after the last.

    The metric is the embedded distance for digits and shapes, FID with `inception` given, else none. Nothing of the
    run is changed but `Trainer.best`, random states included. The best by another measure (a resumed run may be given
    `inception` and `fd_samples` anew) is no longer the best: the first figure by this one takes its place.

    Attributes:
        stopped: is asked before each batch; a measurement that it ends has changed and written nothing.

    Raises:
        DataError: the weights cannot be read.
    """

    def __init__(self, trainer: Trainer) -> None:
        config = trainer.config
        metric = "fid" if config.inception else config.data if config.data in TRAINED else None
        self._trainer, self._judge = trainer, None
        self.stopped: Callable[[], bool] = lambda: False
        if metric and config.metric_every:
            weights = Path(config.inception) if config.inception else None
            split = f"{config.data}, training"
            self._judge = Judge(
                [metric],
                trainer.images,
                split,
                weights=weights,
                device=trainer.device,
                before_batch=self._end_if_stopped,
            )
            by = "" if self._judge.network is None else f" by weights {self._judge.network}"
            self._measure = f"{metric} of {config.fd_samples} samples{by}"

    def __call__(self, log: RunLog) -> None:
        trainer, config = self._trainer, self._trainer.config
        if self._judge is None or not self._due():
            return
        noise = torch.Generator().manual_seed(config.seed + 3)
        z = torch.randn(config.fd_samples, config.latent, generator=noise)
        turns = torch.arange(len(z)) % trainer.classes  # Of all parts together, as of `ddst evaluate`.
        parts = zip(z.split(4096), turns.split(4096), strict=True)
        made = (
            generate(trainer.ema.module, part, labels=labels, before_batch=self._end_if_stopped)
            for part, labels in parts
        )
        try:
            (figure,) = self._judge(made)
        except _Stopped:
            return
        before = trainer.best
        best = before is None or before.measure != self._measure or figure.value < before.value
        if best:
            trainer.best = Best(figure.value, self._measure)
            about = About(config.saved(), trainer.images.channels, trainer.classes, {}, trainer.step, versions())
            write_generator(trainer.out / BEST, trainer.ema.module, about)
        seconds, flops = round(trainer.seconds, 4), trainer.flops.counted
        log.write(event="metric", step=trainer.step, seconds=seconds, flops=flops, best=best, **figure.as_dict())

    def catch_up(self, log: RunLog) -> None:
        """What a resumed run does first: it writes the figure that is due at its step if the log has none of it."""
        step = self._trainer.step
        if not (step and self._due()):
            return
        if not any(entry.get("event") == "metric" and entry["step"] == step for entry in read_log(log.path)):
            self(log)

    def _due(self) -> bool:
        step, config = self._trainer.step, self._trainer.config
        return self._judge is not None and (step % config.metric_every == 0 or step == config.steps)

    def _end_if_stopped(self) -> None:
        if self.stopped():
            raise _Stopped
