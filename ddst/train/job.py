"""One run from settings to report: load the images, train or resume, and write what was found."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ddst.data import DataError, load_images
from ddst.data.cache import cache_folder
from ddst.data.images import advice_if_gone
from ddst.distributed import sums
from ddst.sparsity.density import NetworkDensity
from ddst.train.checkpoint import CheckpointError, load_checkpoint
from ddst.train.collapse import told, watched
from ddst.train.config import TrainConfig, check_same_run, check_saved, fitting, resolve
from ddst.train.folder import (
    BEST,
    CHECKPOINT,
    LOG,
    SAMPLES,
    check_folder,
    make_folder,
    only_writer,
    reached,
    settings_begun,
    versions,
)
from ddst.train.judging import Judging
from ddst.train.log import Kept, kept_log, read_log
from ddst.train.loop import Trainer, enough_memory, train
from ddst.train.options import ConfigError, shown_value
from ddst.train.processes import by_first, first, joined, parted, together
from ddst.train.report import plot_report, summarize, table, write_summary
from ddst.train.terminal import one_line
from ddst.train.without_effect import refuse_without_effect


def run(given: Mapping[str, Any]) -> int:
    """Train as the given settings say, and print the table and the paths at the end.

    Only one process writes to the folder: the lock on it is held from before anything is read there to the end. Of
    those that torchrun started it is the first one; all read the images, and a checkpoint that is resumed from.

    Args:
        given: settings by name as in `TrainConfig`; the others have their defaults or, with `resume`, the saved run's.

    Returns:
        The exit code: 0 for a whole run or one ended by `stop_after`, 128 + its number for one ended by a signal.

    Raises:
        ConfigError, DataError, CheckpointError: nothing has been written then.
        ProcessError: another process of the run is gone, or ended with an error.
        TrainingError, OSError: training or the report broke off; the last checkpoint stays.
    """
    with joined(), together(lambda: "before training"):
        if given.get("resume"):
            return _resume(given)
        config = resolve(given)
        refuse_without_effect(given, config)
        return _begin(config)


def _begin(config: TrainConfig, *warnings: str) -> int:
    out = Path(config.out)
    by_first(lambda: check_folder(out))
    trainer = _trainer(config)
    trainer.try_step()
    judge = by_first(lambda: Judging(trainer))
    there = out.exists()
    by_first(lambda: make_folder(out))
    try:
        with _writer(out) as more:
            by_first(lambda: check_folder(out))  # Another process may have been faster.
            return _train(trainer, None, judge, [*warnings, *more])
    except ConfigError:
        if not there:
            with suppress(OSError):  # It is not empty, or another process was faster.
                out.rmdir()
        raise


@contextmanager
def _writer(out: Path) -> Iterator[list[str]]:
    """The lock of the folder, held by the first process for all."""
    with ExitStack() as held:
        yield by_first(lambda: held.enter_context(only_writer(out))) or []


def _resume(given: Mapping[str, Any]) -> int:
    out = Path(resolve({"out": given.get("out")}).out)
    path = out / CHECKPOINT
    if not sums([by_first(lambda: _is_there(out, path)) or 0])[0]:
        # It may have ended before its first checkpoint: then it begins anew, with the settings it was given.
        try:
            settings = check_saved(settings_begun(out))
        except ConfigError:
            message = f"no checkpoint to resume from: {path} does not exist; leave out --resume to begin a run"
            raise CheckpointError(message) from None
        return _begin(_continued(settings, given), f"{path} does not exist: the run begins anew")
    with _writer(out) as warnings:
        saved = load_checkpoint(path)
        try:
            settings = check_saved(saved.get("config"))
            resolve({**settings, "out": str(out)})
        except ConfigError as error:
            raise CheckpointError(f"checkpoint {path} does not fit any run: config: {error}") from None
        config = _continued(settings, given)
        if type(done := saved.get("step")) is int and config.steps < done:
            raise ConfigError(f"cannot resume with --steps {config.steps}: the run in --out has made {done}")
        try:
            trainer = _trainer(config)
        except ConfigError as error:
            raise CheckpointError(f"checkpoint {path} cannot be continued here: config: {error}") from None
        except DataError as error:
            advice = "" if "data" in given else advice_if_gone(config.data)
            raise CheckpointError(f"{path} cannot be continued: {error}{advice}") from None
        trainer.load_state_dict(saved)
        kept = by_first(lambda: kept_log(out / LOG, saved["log"], trainer.step)) or Kept(0, ())
        judge = by_first(lambda: Judging(trainer))
        return _train(trainer, kept, judge, [*warnings, *kept.warnings, *_other_versions(saved["versions"])])


def _is_there(out: Path, path: Path) -> int:
    with reached("--out", out):
        return int(path.exists())


def _continued(settings: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    config = resolve(check_same_run(settings, given))
    refuse_without_effect(given, config)
    return config


def _other_versions(before: Mapping[str, str]) -> list[str]:
    changed = [(name, before.get(name), now) for name, now in versions().items() if before.get(name) != now]
    return [f"written with {name} {old}, going on with {now}: numbers may differ" for name, old, now in changed]


def _trainer(config: TrainConfig) -> Trainer:
    with fitting("images of this --resolution"):
        images = load_images(config.data, config.resolution, cache=cache_folder(config.data_cache))
    return Trainer(config, images)


def _train(trainer: Trainer, kept: Kept | None, judge: Judging | None, warnings: Sequence[str]) -> int:
    config = trainer.config
    if first():
        print(_heading(config, trainer, kept is not None))
        if trainer.images.took:
            print(one_line(f"data {trainer.images.name}: {trainer.images.took}"))
        if trainer.images.note:
            print(one_line(trainer.images.note))
        for warning in [*warnings, *trainer.warnings]:
            print(f"warning: {one_line(warning)}")
    writes = first()
    ended_by = train(trainer, kept, judge)
    parted()
    if not writes:
        return 0 if ended_by is None else 128 + ended_by
    if ended_by is not None or trainer.step < config.steps:
        again = f"ddst train --resume --out {shlex.quote(config.out)}"
        print(f"stopped after step {trainer.step} of {config.steps}; go on with: {one_line(again)}")
        return 0 if ended_by is None else 128 + ended_by
    with enough_memory(trainer):
        _finish(trainer)
    return 0


def _heading(config: TrainConfig, trainer: Trainer, resumed: bool) -> str:
    g, d = (NetworkDensity(net) for net in (trainer.players.generator, trainer.players.discriminator))
    begun = f", resumed after step {trainer.step}" if resumed else ""
    if "steps" in trainer.changed:
        begun += f" of {trainer.changed['steps'][0]} that were planned"
    return (
        f"{config.method}, {len(trainer.images):,} images of {one_line(trainer.images.name)} at "
        f"{config.resolution}x{config.resolution}, {config.steps} steps of batch {config.batch}{begun}\n"
        f"generator {g.active_weights:,} of {g.total_weights:,} weights, "
        f"discriminator {d.active_weights:,} of {d.total_weights:,}, blocks {shown_value(config.block)}"
        f"{'' if config.block_d == config.block else f' and {shown_value(config.block_d)}'}"
    )


def _finish(trainer: Trainer) -> None:
    out, best = trainer.out, trainer.best
    grid, _ = trainer.save_samples()
    summary = summarize(trainer)
    report = plot_report(out)
    numbers = write_summary(out, summary)
    print(table(summary))
    print(told(watched(read_log(out / LOG), trainer.config.bounds, trainer.config.steps)))
    print("written:")
    for path, what in (
        (grid, f"samples of the averaged generator (earlier ones in {SAMPLES})"),
        (report, "balance ratio, densities and losses over steps"),
        (numbers, "the numbers of this table"),
        *([(out / BEST, f"the best generator, {best.value:.4g} by {best.measure}")] if best is not None else ()),
        (out / LOG, "every step and decision, one JSON object per line"),
        (out / CHECKPOINT, "networks, optimizers and everything else of the last step"),
    ):
        print(f"  {one_line(str(path))}  {what}")
