"""Training a GAN end to end: settings, loop, checkpoints, log and report. `ddst train` is the command line of it."""

from typing import TYPE_CHECKING, Any

from ddst.train.checkpoint import CheckpointError
from ddst.train.config import TrainConfig, resolve
from ddst.train.options import ConfigError

if TYPE_CHECKING:
    from ddst.train.job import run
    from ddst.train.loop import Trainer, TrainingError, train
    from ddst.train.processes import ProcessError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ProcessError",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "resolve",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    # Looked up late: these need Pillow and more, while `ddst --help` shows the settings where only torch is installed.
    if name == "run":
        from ddst.train.job import run

        return run
    if name == "ProcessError":
        from ddst.train.processes import ProcessError

        return ProcessError
    if name in ("Trainer", "TrainingError", "train"):
        from ddst.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
