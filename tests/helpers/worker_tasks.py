"""What the worker processes of `make gpu` are given in its tests; they import it by name."""

import os
import time

from ddst.benchmarks.gpu.workers import DeviceLostError


def act(task: tuple[str, int]) -> int:
    """Does what the task says, and returns its number."""
    what, number = task
    if what == "fail":
        raise ValueError(f"no {number}")
    if what == "die":
        os._exit(number)
    if what == "lose":
        raise DeviceLostError("the device is gone", {"number": number})
    if what == "hang":
        time.sleep(600)
    return number
