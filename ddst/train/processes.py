"""The processes of one run, as torchrun starts them: who they are, what the first does for all, how they end together.

Every process draws the indices and the noise of the whole batch and takes its share, so that the run is the same with
any number of them. Only the first one writes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist

from ddst.distributed import ranks, sums
from ddst.train.options import ConfigError, flag
from ddst.train.terminal import OneLineError

# A process that dies is noticed at once, by its closed connections; one that hangs, after this.
PATIENCE = timedelta(minutes=10)

T = TypeVar("T")


class ProcessError(OneLineError, RuntimeError):
    """Another process of the run has ended; the message is one line."""


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun started, if it did, until the end of the block; each takes a device."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or ranks() > 1:
        yield
        return
    backend = "gloo"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local < torch.cuda.device_count() and dist.is_nccl_available():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        parted()


def parted() -> None:
    """From here on each process is alone."""
    if ranks() > 1:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def rank() -> int:
    """Of this process, 0 where it is alone."""
    return dist.get_rank() if ranks() > 1 else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def share(batch: int) -> slice:
    """This process's part of a batch.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    count = ranks()
    if batch % count:
        raise ConfigError(f"{flag('batch')} must be a multiple of the number of processes, {count}, got {batch}")
    part = batch // count
    return slice(rank() * part, (rank() + 1) * part)


def by_first(action: Callable[[], T]) -> T | None:
    """What the first process does for all, before any of them goes on; None on the others.

    Raises:
        ProcessError: on the others, where it raised on the first.
    """
    result, error = None, None
    if first():
        try:
            result = action()
        except Exception as raised:
            error = raised
    failed = sums([int(error is not None)])[0]
    if error is not None:
        raise error
    if failed:
        raise ProcessError("rank 0 ended with an error, see its message")
    return result


def agreed(caught: Callable[[], int | None], busy: bool = False) -> int | None:
    """The signal that any of the processes got, on all of them.

    Args:
        caught: the one that this process has got by now. busy: it does something for all and asks in between; the
            others, which are not busy, wait until it asks as one of them.
    """
    known = (int(signal.SIGINT), int(signal.SIGTERM))
    if ranks() == 1:
        return caught()
    while True:
        here = caught()
        *counts, at_work = sums([*(int(here == number) for number in known), int(busy)])
        if busy or not at_work:
            return next((number for number, count in zip(known, counts, strict=True) if count), None)


@contextmanager
def together(after: Callable[[], str]) -> Iterator[None]:
    """Turns what torch raises when another process is gone into a `ProcessError`.

    Args:
        after: says what is left.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OneLineError) or ranks() == 1 or not _lost(error):
            raise
        raise ProcessError(f"another process of the run has ended, or hangs ({after()}): {error}") from error


def _lost(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timeout")
    )
