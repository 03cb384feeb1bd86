"""One run from settings to report: load the images, train or resume, and write what was found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddst.data import load_images
from ddst.sparsity.density import NetworkDensity
from ddst.train.checkpoint import load_checkpoint
from ddst.train.config import TrainConfig, check_same_run, resolve
from ddst.train.loop import CHECKPOINT, LOG, SAMPLES, Trainer, check_folder, train
from ddst.train.options import shown_value
from ddst.train.report import plot_report, summarize, table, write_summary


def run(given: Mapping[str, Any]) -> int:
    """Train as the given settings say, and print the table and the paths at the end.

    Args:
        given: settings by name as in `TrainConfig`; the others have their defaults or, with `resume`, the saved run's.

    Returns:
        The exit code: 0 for a whole run or one ended by `stop_after`, 128 + its number for one ended by a signal.

    Raises:
        ConfigError, DataError, CheckpointError: nothing has been written then.
        TrainingError: training broke off.
    """
    saved = None
    if given.get("resume"):
        out = Path(resolve({"out": given.get("out")}).out)
        saved = load_checkpoint(out / CHECKPOINT)
        config = resolve(check_same_run(saved["config"], given))
    else:
        config = resolve(given)
        check_folder(Path(config.out))
    trainer = Trainer(config, load_images(config.data, config.resolution))
    print(_heading(config, trainer, saved))
    if trainer.images.note:
        print(trainer.images.note)
    for warning in trainer.warnings:
        print(f"warning: {warning}")
    ended_by = train(trainer, saved)
    if trainer.step < config.steps:
        print(
            f"stopped after step {trainer.step} of {config.steps}; go on with: ddst train --resume --out {config.out}"
        )
        return 0 if ended_by is None else 128 + ended_by
    _finish(trainer)
    return 0


def _heading(config: TrainConfig, trainer: Trainer, saved: Mapping[str, Any] | None) -> str:
    g, d = (NetworkDensity(net) for net in (trainer.players.generator, trainer.players.discriminator))
    begun = "" if saved is None else f", resumed after step {saved['step']}"
    return (
        f"{config.method}, {len(trainer.images):,} images of {trainer.images.name} at "
        f"{config.resolution}x{config.resolution}, {config.steps} steps of batch {config.batch}{begun}\n"
        f"generator {g.active_weights:,} of {g.total_weights:,} weights, "
        f"discriminator {d.active_weights:,} of {d.total_weights:,}, blocks {shown_value(config.block)}"
    )


def _finish(trainer: Trainer) -> None:
    out = trainer.out
    grid = trainer.save_samples()
    summary = summarize(trainer)
    report = plot_report(out, trainer.config.bounds)
    numbers = write_summary(out, summary)
    print(table(summary))
    print("written:")
    for path, what in (
        (grid, f"samples of the averaged generator (earlier ones in {out / SAMPLES})"),
        (report, "balance ratio, densities and losses over steps"),
        (numbers, "the numbers of this table"),
        (out / LOG, "every step and decision, one JSON object per line"),
        (out / CHECKPOINT, "networks, optimizers and everything else of the last step"),
    ):
        print(f"  {path}  {what}")
