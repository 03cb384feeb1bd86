"""``torch.ops.ddst_cuda.conv2d_gather`` on CPU tensors: the kernel on the emulator (tests/cuda/gather_library.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddst import topology as tp
from ddst.ops.cuda import gather


class _Arrays(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("input", "values", "records", "bias", "residual", "output")),
        ("blocks", ctypes.c_int64), ("record_ints", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("mean", "scale", "shift", "activated")),
        *((n, ctypes.c_int) for n in ("relu", "seed", "fused", "norm", "halved", "residual_halved", "squares")),
        ("slope", ctypes.c_float), ("factor", ctypes.c_float),
    ]  # fmt: skip


class EmulatedOps:
    """Stands for ``torch.ops.ddst_cuda``: the same operators, same arguments, on CPU tensors.

    Attributes:
        library: the compiled emulation, which also stands for the library of CUDA C++ kernels.
        seed: order of warps and lanes; calls: the ``large_tile`` of every call.
    """

    def __init__(self, file: Path) -> None:
        self.library = ctypes.CDLL(str(file))
        self.seed = 0
        self.calls: list[bool] = []

    def conv2d_gather(
        self, input: Tensor, values: Tensor, records: Tensor, bias: Tensor | None, residual: Tensor | None,
        weight_shape: list[int], input_size: list[int], stride: list[int], padding: list[int], input_gradient: bool,
        relu: bool, large_tile: bool, allow_tf32: bool, fused: bool, mean: Tensor | None, scale: Tensor | None,
        shift: Tensor | None, activated: Tensor | None, slope: float, upsample: int, pool: int, residual_upsample: int,
    ) -> Tensor:  # fmt: skip
        self.calls.append(large_tile)
        block, dtype = values.shape[1:], gather.dtype_code(input.dtype, allow_tf32)
        window = gather.Window(tuple(input_size), tuple(stride), tuple(padding))
        problem = gather.problem_of(dtype, weight_shape, block, window, input.shape[0])
        whole, by = (input_size, upsample) if input_gradient else (list(problem)[4:6], pool)
        size = [side // by for side in whole]
        output = input.new_empty(input.shape[0], *size, weight_shape[1 if input_gradient else 0])
        kept = [
            None if t is None else t.permute(0, 2, 3, 1).contiguous() if t.dim() == 4 else t.contiguous()
            for t in (input, values, records, bias, residual, activated)
        ]
        tables = [mean, scale, shift, kept.pop()]
        halved = (pool if input_gradient else upsample) == 2
        arrays = _Arrays(
            *(None if t is None else t.data_ptr() for t in (*kept, output)), values.shape[0], records.numel(),
            *(None if t is None else t.data_ptr() for t in tables), relu, self.seed, fused,
            0 if scale is None else scale.dim(), halved, residual_upsample == 2, by == 2, slope,
            0.25 if pool == 2 else 1.0,
        )  # fmt: skip
        message = ctypes.create_string_buffer(2000)
        self.library.gather(problem, input_gradient, large_tile, ctypes.byref(arrays), message, len(message))
        assert not message.value, message.value.decode()
        return output


def slow_records(
    slot_blocks: Tensor, weight_shape: Sequence[int], block: tuple[int, int], stride: tuple[int, int],
    *, input_gradient: bool, tile_channels: int,
) -> list[list[int]]:  # fmt: skip
    """`gather.gather_records` by its definition, entry by entry, of the blocks that lie in slots."""
    rows, cols, taps = tp.grid(weight_shape, block)
    ids = torch.full((rows * cols * taps,), -1)
    active = slot_blocks >= 0
    ids[slot_blocks[active]] = active.nonzero()[:, 0]
    ids = ids.view(rows, cols, taps)
    ids = ids.transpose(0, 1) if input_gradient else ids  # [out, in, tap]
    side = block[1] if input_gradient else block[0]
    granules, per_group = side // 16, tile_channels // side
    outs, ins = ids.shape[:2]
    phases = [(y, x) for y in range(stride[0]) for x in range(stride[1])] if input_gradient else [(0, 0)]
    records = []
    for phase in phases:
        for group in range(-(-outs // per_group)):
            for inner in range(ins):
                masks, listed = [0] * (-(-taps // 4) * 4), []
                for tap in range(taps):
                    y, x = divmod(tap, weight_shape[3])
                    if input_gradient and (y % stride[0], x % stride[1]) != phase:
                        continue
                    for place, out in enumerate(range(group * per_group, min((group + 1) * per_group, outs))):
                        if (found := int(ids[out, inner, tap])) >= 0:
                            masks[tap] |= ((1 << granules) - 1) << (place * granules)
                            listed.append(found)
                room = -(-taps * per_group // 4) * 4
                records.append([len(listed), 0, 0, 0, *masks, *listed, *[0] * (room - len(listed))])
    return records
