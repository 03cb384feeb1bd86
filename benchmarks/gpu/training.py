"""A few hundred steps of DDST on digits, on the device: losses finite, blocks moving, densities where they belong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.iteration import unfinite
from ddst.data import load_images
from ddst.nn import sparse_layers
from ddst.train.config import resolve
from ddst.train.loop import Trainer, TrainingError
from ddst.train.samples import generate, save_grid

STEPS = 300


def train(
    device: str, deadline: Deadline, samples: Path | None = None, steps: int = STEPS, **settings: Any
) -> dict[str, Any]:
    """The part "train": what happened in so many steps of the default method, and in ``wrong`` what should not have.

    Args:
        samples: where a grid of generated digits goes. settings: of ``ddst train``, other than its defaults.
    """
    moving = {"interval_g": 25, "drop_fraction_steps": steps}  # In so few steps, too.
    config = resolve({"out": "unused", "steps": steps, "device": device, **moving, **settings})
    trainer = Trainer(config, load_images("digits", config.resolution))
    layers = sparse_layers(trainer.players.generator)
    before = {name: layer.block_mask.clone() for name, layer in layers.items()}
    part: dict[str, Any] = {"steps": 0, "updates_g": 0, "updates_d": 0, "decisions": 0, "wrong": []}
    reports, started = [], time.perf_counter()
    try:
        while trainer.step < steps and not deadline.passed:
            part["loss_d"], part["loss_g"], report = trainer.train_step()
            reports.append(report)
    except TrainingError as error:
        part["wrong"].append(str(error))
    part["steps"], part["seconds"] = trainer.step, time.perf_counter() - started
    if not reports:
        part["wrong"].append("no step was done")
        return part
    for name, what in (("g", "generator_update"), ("d", "discriminator_update")):
        part[f"updates_{name}"] = sum(getattr(report, what) is not None for report in reports)
    part["decisions"] = sum(report.decision is not None for report in reports)
    part["density_g"], part["density_d"] = reports[-1].density_g, reports[-1].density_d
    part["balance_ratio"] = trainer.scheduler.balance.value
    part["moved_g"] = [name for name, mask in before.items() if not mask.equal(layers[name].block_mask)]
    part["wrong"] += unfinite(trainer.players) + _complaints(trainer, part, reports)
    if trainer.step < steps:
        part["trimmed"] = f"no time for the last {steps - trainer.step} steps"
    if samples is not None and not part["wrong"]:
        save_grid(samples, generate(trainer.ema.module, trainer.grid_noise))
    return part


def _complaints(trainer: Trainer, part: dict[str, Any], reports: list[Any]) -> list[str]:
    """What a run of so many steps must have done and has not."""
    config, found = trainer.config, []
    if trainer.step > config.interval_g and not part["moved_g"]:
        found.append(f"no block of G has moved in {trainer.step} steps, updates are every {config.interval_g}")
    resolution = trainer.scheduler.training_g.updater.resolution
    off = max(abs(report.density_g - config.density) for report in reports)
    if off > resolution:
        found.append(f"G's density is off by {off:.4f} from {config.density}, more than a block ({resolution:.4f})")
    low, high = config.density_d_min, config.density_d_max
    slack = trainer.scheduler.updater_d.resolution if trainer.scheduler.updater_d else 0.0
    outside = [r.density_d for r in reports if not low - slack <= r.density_d <= high + slack]
    if outside:
        found.append(f"D's density {outside[0]:.4f} left its range [{low}, {high}]")
    if trainer.step > max(config.interval_d, config.warmup or 0) and not part["decisions"]:
        found.append(f"no decision on D's density in {trainer.step} steps, they are every {config.interval_d}")
    return found
