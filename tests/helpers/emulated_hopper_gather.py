"""``torch.ops.ddst_cuda.hopper_gather`` on CPU tensors: the kernel for sm_90a on the emulator."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ddst.ops.cuda import gather, hopper

#: The dtypes and forms that tests/cuda/hopper_gather_library.cpp holds.
FORMS = [
    (torch.bfloat16, hopper.Form(1, 2)),
    (torch.float16, hopper.Form(4, 1)),
    (torch.bfloat16, hopper.Form(1, 2, 2)),
    (torch.float16, hopper.Form(1, 1, 1, True)),
]


class _Arrays(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("input", "values", "records", "order", "bias", "residual", "output")),
        ("slots", ctypes.c_int64), ("record_ints", ctypes.c_int64),
        *((n, ctypes.c_void_p) for n in ("mean", "scale", "shift", "activated")),
        *((n, ctypes.c_int) for n in ("relu", "seed", "clusters", "fused", "norm", "residual_halved", "squares")),
        ("slope", ctypes.c_float), ("factor", ctypes.c_float),
    ]  # fmt: skip


class EmulatedHopper:
    """Stands for ``torch.ops.ddst_cuda``, which holds this operator only.

    Attributes:
        library: the compiled emulation, which also stands for the library of CUDA C++ kernels.
        seed: order of warps and lanes; calls: the direction of every call; clusters: in a grid.
    """

    def __init__(self, file: Path) -> None:
        self.library = ctypes.CDLL(str(file))
        self.seed, self.clusters = 0, 2
        self.calls: list[bool] = []

    def hopper_gather(
        self, input: Tensor, values: Tensor, records: Tensor, order: Tensor, bias: Tensor | None,
        residual: Tensor | None, weight_shape: list[int], input_size: list[int], stride: list[int], padding: list[int],
        input_gradient: bool, relu: bool, granules: int, cluster: int, depth: int, im2col: bool, fused: bool,
        mean: Tensor | None, scale: Tensor | None, shift: Tensor | None, activated: Tensor | None, slope: float,
        upsample: int, pool: int, residual_upsample: int,
    ) -> Tensor:  # fmt: skip
        self.calls.append(input_gradient)
        assert (pool if input_gradient else upsample) == 1, "refused"
        window = gather.Window(tuple(input_size), tuple(stride), tuple(padding))
        dtype = gather.dtype_code(input.dtype, False)
        problem = gather.problem_of(dtype, weight_shape, values.shape[1:], window, input.shape[0])
        whole, by = (input_size, upsample) if input_gradient else (list(problem)[4:6], pool)
        size = [side // by for side in whole]
        output = input.new_empty(input.shape[0], *size, weight_shape[1 if input_gradient else 0])
        kept = [
            None if t is None else t.permute(0, 2, 3, 1).contiguous() if t.dim() == 4 else t.contiguous()
            for t in (input, values, records, order, bias, residual, activated)
        ]
        tables = [mean, scale, shift, kept.pop()]
        arrays = _Arrays(
            *(None if t is None else t.data_ptr() for t in (*kept, output)), values.shape[0], records.numel(),
            *(None if t is None else t.data_ptr() for t in tables), relu, self.seed, self.clusters, fused,
            0 if scale is None else scale.dim(), residual_upsample == 2, by == 2, slope, 0.25 if pool == 2 else 1.0,
        )  # fmt: skip
        message = ctypes.create_string_buffer(2000)
        self.library.hopper_gather(
            problem, ctypes.c_bool(input_gradient), granules, cluster, depth, ctypes.c_bool(im2col),
            ctypes.byref(arrays), message, len(message),
        )  # fmt: skip
        assert not message.value, message.value.decode()
        return output
