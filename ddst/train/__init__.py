"""Training a GAN end to end: settings, loop, checkpoints, log and report. `ddst train` is the command line of it."""

from ddst.train.config import TrainConfig, resolve
from ddst.train.job import run
from ddst.train.loop import Trainer, train

__all__ = ["TrainConfig", "Trainer", "resolve", "run", "train"]
