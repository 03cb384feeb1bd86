"""A run watched while it trains: what goes into the log goes to TensorBoard or Weights & Biases, too."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ddst.train.config import TrainConfig
from ddst.train.options import ConfigError

Watcher = Callable[[Mapping[str, Any]], None]


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log's entry that a curve can be drawn of, by the name of the curve.

    Example:
        >>> scalars({"step": 3, "loss_d": 2.5, "balance_ratio": None, "sample": {}})
        {'loss_d': 2.5}
        >>> scalars({"event": "metric", "step": 3, "metric": "fid", "value": 7.0, "samples": 50000})
        {'metric/fid': 7.0}
    """
    event = entry.get("event")
    if event == "metric":
        return {f"metric/{entry['metric']}": entry["value"]}
    if event is not None:
        return {}
    return {name: value for name, value in entry.items() if name != "step" and isinstance(value, float)}


def require(service: str) -> None:
    """Raises ModuleNotFoundError where the package of a service is missing, before anything is written."""
    if service != "none":
        importlib.import_module(service)


@contextmanager
def live(config: TrainConfig, step: int) -> Iterator[Watcher]:
    """What is to be called with each entry of the log while the block lasts; does nothing for "none".

    TensorBoard's files go to `tensorboard` in the run's folder, where entries after `step` (of a part that is trained
    again) are marked as void. Weights & Biases decides by its own variables (`WANDB_MODE=offline`, `WANDB_PROJECT`)
    where they go; its files lie in `wandb` in the run's folder.

    Raises:
        ConfigError: it cannot begin, for whatever reason (no login, no folder); what it had written is removed.
        ModuleNotFoundError: the package is missing: `pip install 'ddst[live]'`.
    """
    if config.live == "none":
        yield lambda entry: None
        return
    require(config.live)
    files = Path(config.out) / config.live
    there = files.exists()
    with ExitStack() as held:
        try:
            watcher = held.enter_context((_tensorboard if config.live == "tensorboard" else _wandb)(config, step))
        except Exception as error:
            if not there:
                shutil.rmtree(files, ignore_errors=True)
            said = str(error).strip() or type(error).__name__
            raise ConfigError(f"--live {config.live} cannot begin: {said.splitlines()[0]}") from error
        yield watcher


@contextmanager
def _tensorboard(config: TrainConfig, step: int) -> Iterator[Watcher]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(Path(config.out) / "tensorboard"), purge_step=step + 1) as writer:

        def to_tensorboard(entry: Mapping[str, Any]) -> None:
            for name, value in scalars(entry).items():
                writer.add_scalar(name, value, entry["step"])

        yield to_tensorboard


@contextmanager
def _wandb(config: TrainConfig, step: int) -> Iterator[Watcher]:
    import wandb

    out = Path(config.out)
    run = wandb.init(dir=str(out), name=out.name, config=config.saved(), reinit="finish_previous")

    def to_wandb(entry: Mapping[str, Any]) -> None:
        if found := scalars(entry):
            run.log({**found, "step": entry["step"]})

    try:
        yield to_wandb
    finally:
        run.finish()
