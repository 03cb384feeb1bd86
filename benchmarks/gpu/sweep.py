"""Every configuration that tuning may choose, checked for exactness on the device.

Small integers, whose sums every configuration must get right to the last bit, on rows of every length at which a
pipeline begins or ends (0, 1, 2, stages - 1, stages, stages + 1, long), on windows that leave the image, between guards
of NaN, many times over: a race shows as a result that is wrong now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddst.benchmarks.gpu import calls, workers
from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.correctness import compare, device_is_lost, poisoned
from ddst.benchmarks.gpu.environment import KINDS
from ddst.benchmarks.gpu.journal import NOTHING, Progress
from ddst.benchmarks.gpu.problems import Shape, Tensors
from ddst.benchmarks.gpu.results import in_a_line
from ddst.benchmarks.gpu.timing import precision
from ddst.topology import mask_shape

#: Pass -> the operator's name in the tuning tables.
TABLE_NAMES = {"forward": "forward", "dgrad": "input_grad", "wgrad": "weight_grad"}
ROWS = 7
SHAPES = (
    Shape("3x3", blocks=(ROWS, 4), size=(16, 16), batch=3),
    Shape("3x3 stride 2x3", blocks=(ROWS, 4), ragged=(3, 5), size=(17, 14), stride=(2, 3), padding=(4, 5)),
    Shape("linear", blocks=(ROWS, 24), size=(0, 0), batch=150),
)


@dataclass(frozen=True)
class Sweep:
    """What one process checks at a time: all candidates of a pass, a kind of product and a block."""

    op: str
    kind: str
    block: tuple[int, int]
    device: str = "cuda"
    repeats: int = 30
    shapes: tuple[Shape, ...] = SHAPES

    def __str__(self) -> str:
        return f"{self.op} {self.kind} {self.block[0]}x{self.block[1]}"


def sweeps(device: str) -> list[Sweep]:
    """All of them, the most important first."""
    return [Sweep(op, kind, block, device) for kind in KINDS for block in calls.BLOCKS for op in TABLE_NAMES]


def check_all(
    chosen: Sequence[Sweep], processes: int, deadline: Deadline, progress: Progress = NOTHING
) -> dict[str, Any]:
    """The part "candidates": how many of how many sweeps were done, configurations checked, ``wrong``, ``trimmed``."""
    part: dict[str, Any] = {"sweeps": len(chosen), "done": 0, "configurations": 0, "trimmed": [], "wrong": []}
    proven = {sweep: progress.earlier(str(sweep)) for sweep in chosen}
    for found in proven.values():
        if found is not None:
            part["done"] += 1
            part["configurations"] += found["configurations"]
    waiting = [sweep for sweep, found in proven.items() if found is None]
    for done in workers.run(check_sweep, waiting, processes, deadline):
        if done.trouble is not None and done.result is None:
            late = done.trouble.startswith(("not begun", "cut off"))
            part["trimmed" if late else "wrong"].append(f"{done.task}: {done.trouble}")
            continue
        part["done"] += 1
        part["configurations"] += done.result["configurations"]
        part["wrong"] += [f"{done.task}: {why}" for why in done.result["wrong"]]
        progress.keep(str(done.task), done.result, part, not done.result["wrong"])
    return part


def check_sweep(sweep: Sweep) -> dict[str, Any]:
    """``configurations``: how many were checked; ``wrong``."""
    from ddst.kernels import configs

    dtype, mode = KINDS[sweep.kind]
    found: dict[str, Any] = {"configurations": 0, "wrong": []}
    with precision(mode), poisoned():
        for config in configs.candidates(TABLE_NAMES[sweep.op], dtype, sweep.block):
            results = [_check(sweep, config, shape, dtype, found) for shape in sweep.shapes]
            found["configurations"] += any(results)
    return found


def _check(sweep: Sweep, config: Any, shape: Shape, dtype: torch.dtype, found: dict[str, Any]) -> bool:
    """Whether the configuration does this shape; notes what is wrong with its results."""
    from ddst.kernels.configs import GatherConfig, gather_fits

    tensors = tensors_of(sweep, config.stages, shape, dtype, getattr(config, "rows", 1))
    if isinstance(config, GatherConfig) and not gather_fits(config, table_problem(tensors, sweep.op)):
        return False
    expected = tensors.expected()[sweep.op].to(dtype)
    try:
        work = configured(tensors, sweep.op, config)
        for repeat in range(sweep.repeats):
            result = work()
            if not torch.equal(result, expected):
                why = compare(result, expected.double(), sweep.kind, exact=True)[1]
                found["wrong"].append(f"{config} on {shape.name}, call {repeat + 1}: {why}")
                break
    except Exception as error:
        message = f"{config} on {shape.name}: {in_a_line(error)}"
        found["wrong"].append(message)
        if device_is_lost(error):
            raise workers.DeviceLostError(message, found) from error
    return True


def tensors_of(sweep: Sweep, stages: int, shape: Shape, dtype: torch.dtype, rows: int = 1) -> Tensors:
    """Whole numbers under a mask whose rows, for the input gradient columns, have all lengths of interest.

    With ``rows`` > 1 the unions of as many have; the last one is alone.
    """
    turned = sweep.op == "dgrad"
    blocks = ((shape.blocks[0] - 1) * rows + 1, shape.blocks[1])
    shape = replace(shape, blocks=blocks[::-1] if turned else blocks)
    shape = replace(shape, ragged=shape.ragged[::-1]) if turned else shape
    sizes = [shape.blocks[i] * sweep.block[i] for i in range(2)]
    dims = mask_shape(sizes if shape.linear else [*sizes, *shape.kernel], sweep.block)
    dims = (dims[1], dims[0], *dims[2:]) if turned else dims
    unions = mask_of_lengths((ROWS, *dims[1:]), stages)
    mask = unions.repeat_interleave(rows, 0)[: dims[0]]
    others = torch.arange(dims[0]) % rows != 0
    mask[others] &= torch.rand(mask[others].shape, generator=torch.Generator().manual_seed(stages)) < 0.5
    mask = mask.transpose(0, 1).contiguous() if turned else mask
    return Tensors.make(shape, sweep.block, dtype, sweep.device, stages, whole=True, mask=mask)


def mask_of_lengths(dims: Sequence[int], stages: int) -> Tensor:
    """A mask whose first rows have 0, 1, 2, stages - 1, stages, stages + 1 and half of all active blocks.

    >>> mask_of_lengths((7, 4, 3, 3), 3).flatten(1).sum(1).tolist()
    [0, 1, 2, 2, 3, 4, 18]
    """
    mask = torch.zeros(dims[0], torch.Size(dims[1:]).numel(), dtype=torch.bool)
    width = mask.shape[1]
    generator = torch.Generator().manual_seed(stages)
    for row, length in enumerate((0, 1, 2, stages - 1, stages, stages + 1, width // 2)[: dims[0]]):
        mask[row, torch.randperm(width, generator=generator)[:length]] = True
    return mask.view(tuple(dims))


def configured(tensors: Tensors, op: str, config: Any) -> Any:
    """A call of a Triton kernel in one configuration."""
    from ddst import kernels

    name, arguments = tensors.arguments(op)
    return lambda: getattr(kernels, name)(*arguments, config=config)


def table_problem(tensors: Tensors, op: str) -> Any:
    """The call as the tuning tables see it."""
    from ddst.kernels import configs

    shape, one = tensors.shape, (1, 1)
    common = (TABLE_NAMES[op], shape.linear, tensors.values.dtype, tensors.block)
    if shape.linear:
        layer = ((*tensors.weight_shape, 1, 1), one, (0, 0), one, shape.batch, one, one)
    else:
        size, out = tuple(tensors.input.shape[2:]), tuple(tensors.grad_output.shape[2:])
        layer = (tuple(tensors.weight_shape), shape.stride, shape.padding, shape.dilation, shape.batch, size, out)
    return configs.Problem(*common, *layer, tensors.values.shape[0])
