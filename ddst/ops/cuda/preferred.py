"""Where the CUDA C++ kernels were measured to be the fastest: what "auto" goes by on a CUDA device.

``preferred.json`` is made by ``python -m ddst.benchmarks prefer RESULTS.json`` from a run of ``make gpu`` that is kept
in ``benchmarks/results/``. Without a line for a device, "auto" runs Triton there.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).with_name("preferred.json")


class Kind(NamedTuple):
    """What one measurement speaks for.

    Attributes:
        device: the model, as ``torch.cuda.get_device_name`` calls it.
        op: the operator, such as "conv2d_input_grad".
        dtype: such as "bfloat16"; "tf32" for float32 multiplied in TF32.
        block, kernel, stride: as texts, such as "32x32".
    """

    device: str
    op: str
    dtype: str
    block: str
    kernel: str
    stride: str


def kind(
    device: str,
    op: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    kernel: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    *,
    tf32: bool = False,
) -> Kind:
    """The kind of a call; ``tf32``: whether torch lets float32 be multiplied in TF32.

    >>> kind("X1", "linear", torch.bfloat16, (32, 16))
    Kind(device='X1', op='linear', dtype='bfloat16', block='32x16', kernel='1x1', stride='1x1')
    """
    texts = (f"{a}x{b}" for a, b in (block, kernel, stride))
    products = "tf32" if tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")
    return Kind(device, op, products, *texts)


@functools.cache
def load() -> dict[Kind, tuple[float, float]]:
    """:func:`read` of the table in this package, once."""
    return read(FILE)


def read(path: Path) -> dict[Kind, tuple[float, float]]:
    """``kind -> (lowest, highest density)`` between which CUDA C++ was the fastest on every layer measured.

    Raises:
        ValueError: a file that is no such table.
    """
    try:
        lines = json.loads(path.read_text())["lines"]
        return {Kind(**line["kind"]): (float(line["from"]), float(line["to"])) for line in lines}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold the lines of `python -m ddst.benchmarks prefer`, lacks {error}") from error


def is_cuda_preferred(asked: Kind, density: float) -> tuple[bool, str]:
    """``(yes, reason)``: whether a kept measurement says that CUDA C++ is faster than Triton and than dense."""
    known = load()
    if not any(line.device == asked.device for line in known):
        return False, f"no kept measurement on {asked.device} says that it is faster than Triton and than dense"
    if asked not in known:
        return False, f"not measured to be the fastest on {asked.device} for {asked.op}, {asked.dtype}, {asked.block}"
    low, high = known[asked]
    if not low <= density <= high:
        return False, f"measured to be the fastest from {low:g} to {high:g} density, the layer has {density:.3g}"
    return True, f"measured to be the fastest on {asked.device}"
