"""Which passes run on the kernels for sm_90a (``csrc/cuda/hopper_*.cuh``), and in which form.

They run on devices of compute capability 9.0 alone, for bfloat16 and float16, under backend "cuda". Elsewhere, and for
what they refuse by name, the kernels for every architecture run.

**The model of the gather.** A CTA's time for a slice of 16 input channels is the longest of three, in clocks:
instructions issued by the busiest of the four schedulers, products on the tensor cores, bytes from the second-level
cache. The first were counted in machine code (``python -m ddst.benchmarks hopper-counts``); they depend on the density
and on how many output channels a block has. The second assume the peak rate for any number of columns, which a device
has yet to confirm for 16; the third a bandwidth. All this times a multiprocessor's tiles: patches with a halo want
tiles of powers of two, im2col takes 256 pixels in a row and copies them for each tap that has a block. A product of one
granule of 16 channels multiplies no zeros; one of four takes fewer instructions for 64 channels, and multiplies the
zeros of those that are not active: where a pixel is Inf or NaN, they become NaN there without having a block, which
they do not in the form of one granule. Where there are too few tiles for the device's multiprocessors, the kernel for
every architecture has smaller ones. Waiting is in no count: stages of 32 channels take fewer instructions than those of
16, and there are half as many of them.

None of this has been measured. `forced` sets a form, or the other kernel, aside of the model.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch

from ... import topology as tp
from .gather_problem import GATHERS, Device, Window, dtype_code, problem_of
from .gather_problem import library as library

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
TILE_PIXELS, TILE_CHANNELS, GRANULE = 256, 128, 16


class Form(NamedTuple):
    """``granules`` of 16 output channels in one product, 1 or 4; ``cluster``: CTAs that share copies of weights;
    ``depth``: slices of 16 input channels copied at once, 1 or 2; ``im2col``: pixels are copied anew for each tap that
    has a block, not in patches with a halo."""

    granules: int
    cluster: int
    depth: int = 1
    im2col: bool = False


FORMS = tuple(
    Form(granules, cluster, depth, im2col)
    for granules, depth, im2col in ((1, 1, False), (4, 1, False), (1, 2, False), (1, 1, True))
    for cluster in (1, 2)
)


class Plan(NamedTuple):
    """How the gather kernel would cut a problem (``hopper_gather_plan.cpp``)."""

    tile_images: int
    tile_rows: int
    tile_columns: int
    patch_rows: int
    patch_columns: int
    tiles: int
    groups: int
    slices: int
    stages: int
    record_ints: int
    shared_bytes: int


#: What `forced` sets: nothing, "general" for the kernels of every architecture, or a form of the gather.
_forced: list[Form | str] = []


@contextmanager
def forced(choice: Form | str) -> Iterator[None]:
    """Within it, every pass that can runs like this, in all threads: a `Form` (weight gradients then run on their
    kernel for sm_90a), or ``"general"``, the kernels of every architecture.

    >>> with forced("general"):
    ...     is_general()
    True
    """
    if choice != "general" and choice not in FORMS:
        raise ValueError(f"choice must be 'general' or one of {FORMS}, got {choice!r}")
    _forced.append(choice)
    try:
        yield
    finally:
        _forced.pop()


def is_general() -> bool:
    """Whether `forced` asks for the kernels of every architecture."""
    return bool(_forced) and _forced[-1] == "general"


def _has_kernels() -> bool:
    try:
        return hasattr(library(), "ddst_cuda_hopper_gather_plan")
    except OSError:  # built without a CUDA compiler
        return False


def device_refusal(dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """Why no kernel for sm_90a runs there, "" if one may.

    >>> device_refusal(torch.float32, (9, 0))
    'takes bfloat16 and float16, got torch.float32'
    """
    if capability != CAPABILITY:
        return f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"
    if dtype not in DTYPES:
        return f"takes bfloat16 and float16, got {dtype}"
    if not _has_kernels():
        return "libddst_cuda.so holds no code for sm_90a: build it with 90-real among DDST_CUDA_ARCHS"
    return ""


def plan(
    dtype: torch.dtype,
    weight_shape: tuple[int, ...],
    block: tuple[int, int],
    window: Window,
    images: int,
    form: Form,
    *,
    input_gradient: bool,
    device: Device,
    fused: bool = False,
    squares: bool = False,
    halved: bool = False,
) -> tuple[Plan | None, str]:
    """``(how the kernel would run this, "")``, or ``(None, why it does not)``."""
    why = device_refusal(dtype, device.capability)
    if why:
        return None, why
    return _plan(
        dtype, weight_shape, block, window, images, form,
        input_gradient=input_gradient, device=device, fused=fused, squares=squares, halved=halved,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _plan(
    dtype: torch.dtype, weight_shape: tuple[int, ...], block: tuple[int, int], window: Window, images: int, form: Form,
    *, input_gradient: bool, device: Device, fused: bool,
    squares: bool,
    halved: bool,
) -> tuple[Plan | None, str]:  # fmt: skip
    facts, message = (ctypes.c_int32 * len(Plan._fields))(), ctypes.create_string_buffer(256)
    library().ddst_cuda_hopper_gather_plan(
        problem_of(dtype_code(dtype, False), weight_shape, block, window, images), ctypes.c_bool(input_gradient),
        form.granules, form.cluster, form.depth, *map(ctypes.c_bool, (form.im2col, fused, squares, halved)),
        device.shared_bytes, facts, message, len(message),
    )  # fmt: skip
    why = message.value.decode()
    return (None, why) if why else (Plan(*facts), "")


class Slots(NamedTuple):
    """Instructions that the busiest scheduler issues, as ``hopper-counts`` prints them, for a slice of a tile.

    Two warps multiply there and, for the kernels of sm_90a, one may copy: per slice, per tap with blocks, per product,
    and per listed block.
    """

    slice: float
    tap: float
    product: float
    listed: float


#: Least squares over densities of 2 to 50 % of what is counted for blocks of 16 x 16, within 15 slots (forward; bf16;
#: 3 x 3).
SLOTS: dict[Form | str, Slots] = {
    Form(1, 1): Slots(141, 47.8, 14, 14.3),
    Form(1, 2): Slots(158, 45.6, 14, 8.6),
    Form(4, 1): Slots(135, 33.2, 14, 12.2),
    Form(4, 2): Slots(139, 35.1, 14, 6.0),
    Form(1, 1, 2): Slots(94, 48.9, 14, 14.1),
    Form(1, 2, 2): Slots(97, 48.6, 14, 8.3),
    Form(1, 1, 1, True): Slots(146, 44.6, 14, 14.4),
    Form(1, 2, 1, True): Slots(164, 50.3, 14, 6.3),
    "general": Slots(596, 117, 28, 1.3),
}
_PRODUCT_CLOCKS = 32  # of four 64 x 16 x 16 products, two of each warpgroup, at 1024 multiply-adds a clock
_BYTES_A_CLOCK = 24  # of 132 multiprocessors each: 5.5 TB/s at 1.75 GHz


class Work(NamedTuple):
    """What a slice of a full tile holds: expected taps that have a block, products, listed blocks."""

    taps: float
    products: float
    listed: float


def _work(form: Form | str, density: float, side: int, taps: int) -> Work:
    width = form.granules * GRANULE if isinstance(form, Form) else GRANULE
    places, together = TILE_CHANNELS // side, max(1, width // side)  # together: blocks of a product
    products = taps * (TILE_CHANNELS // width) * (1 - (1 - density) ** together)
    return Work(taps * (1 - (1 - density) ** places), products, products * width / side)


def slice_slots(form: Form | str, density: float, side: int, taps: int) -> float:
    """Instructions of the busiest scheduler for a slice of a full tile, for blocks of ``side`` output channels.

    >>> [round(slice_slots(form, 0.1, 16, 9)) for form in (Form(1, 2), Form(1, 2, 2), Form(4, 2), "general")]
    [554, 507, 554, 1407]
    """
    work, slots = _work(form, density, side, taps), SLOTS[form]
    return slots.slice + slots.tap * work.taps + slots.product * work.products + slots.listed * work.listed


def slice_clocks(form: Form | str, density: float, side: int, taps: int) -> float:
    """Clocks of such a slice, if copies are no limit."""
    width = form.granules if isinstance(form, Form) else 1
    rate = 1 if isinstance(form, Form) else 0.62  # mma.sync reaches about that share of the tensor cores' peak
    products = _work(form, density, side, taps).products * width * _PRODUCT_CLOCKS / rate
    return max(slice_slots(form, density, side, taps), products)


def copy_clocks(form: Form, cut: Plan, density: float, side: int, taps: int) -> float:
    """Clocks in which the bytes of such a slice come: pixels, where there is a block for them, and weights once a
    cluster."""
    work = _work(form, density, side, taps)
    if form.im2col:
        pixels = work.taps * TILE_PIXELS
    else:
        any_block = 1 - (1 - density) ** (TILE_CHANNELS // side * taps * form.depth)
        pixels = any_block * cut.tile_images * cut.patch_rows * cut.patch_columns
    return (pixels * GRANULE + work.listed * side * GRANULE / form.cluster) * 2 / _BYTES_A_CLOCK


@lru_cache(maxsize=4096)
def choose(
    dtype: torch.dtype,
    weight_shape: tuple[int, ...],
    block: tuple[int, int],
    window: Window,
    images: int,
    density: float,
    *,
    input_gradient: bool,
    device: Device,
    fused: bool = False,
    squares: bool = False,
    halved: bool = False,
) -> tuple[Form | None, str]:
    """``(form, why)`` by the model; None for the kernel of every architecture. ``density``: of slots."""
    side, taps = block[1 if input_gradient else 0], math.prod(weight_shape[2:])
    plans = {
        form: plan(
            dtype, weight_shape, block, window, images, form,
            input_gradient=input_gradient, device=device, fused=fused, squares=squares, halved=halved,
        )
        for form in FORMS
    }  # fmt: skip
    first, why = plans[FORMS[0]]  # it takes whatever any form takes
    if first is None:
        return None, why
    if 4 * first.tiles * first.groups < 3 * device.multiprocessors:
        return None, f"{first.tiles * first.groups} tiles are too few for {device.multiprocessors} multiprocessors"

    def estimate(form: Form, cut: Plan) -> tuple[float, float]:
        """Clocks; where products or copies are the limit, the fewest instructions."""
        clocks = max(slice_clocks(form, density, side, taps), copy_clocks(form, cut, density, side, taps))
        return _waves(cut, device) * clocks, slice_slots(form, density, side, taps)

    costs = {form: estimate(form, cut) for form, (cut, _) in plans.items() if cut is not None}
    best = min(costs, key=lambda form: costs[form])
    # The kernel of every architecture has about as many tiles as the first form, and as large patches.
    copies = copy_clocks(FORMS[0], first, density, side, taps)
    general = _waves(first, device) * max(slice_clocks("general", density, side, taps), copies)
    mine = costs[best][0]
    why = f"estimated at {mine:.0f} clocks a slice of all tiles, {general:.0f} by the kernel of every architecture"
    return (best if mine < general else None), why


def _waves(cut: Plan, device: Device) -> float:
    """Tiles of a multiprocessor."""
    return max(1.0, cut.tiles * cut.groups / device.multiprocessors)


def form_of(
    dtype: torch.dtype,
    weight_shape: tuple[int, ...],
    block: tuple[int, int],
    window: Window,
    images: int,
    slots: int,
    *,
    input_gradient: bool,
    device: Device,
    fused: bool = False,
    squares: bool = False,
    halved: bool = False,
) -> Form | None:
    """The form that runs: the forced one where the kernel takes the problem, else what the model says."""
    if slots == 0 or is_general() or device_refusal(dtype, device.capability):
        return None
    if _forced and isinstance(_forced[-1], Form):
        cut, _ = plan(
            dtype, weight_shape, block, window, images, _forced[-1],
            input_gradient=input_gradient, device=device, fused=fused, squares=squares, halved=halved,
        )  # fmt: skip
        return None if cut is None else _forced[-1]
    density = 2 ** (round(4 * math.log2(slots / math.prod(tp.grid(weight_shape, block)))) / 4)
    return choose(
        dtype, weight_shape, block, window, images, min(1.0, density),
        input_gradient=input_gradient, device=device, fused=fused, squares=squares, halved=halved,
    )[0]  # fmt: skip


def supports(
    op: str,
    device: Device,
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    block: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    form: Form = FORMS[0],
) -> tuple[bool, str]:
    """``(ok, reason)``: whether the gather kernel for sm_90a runs an operator in a form, and if not why, whatever the
    size."""
    if op not in GATHERS:
        return False, f"{op} does not gather"
    taps = (1, 1) if len(weight_shape) == 2 else (weight_shape[2], weight_shape[3])
    window = Window((max(32, taps[0]), max(32, taps[1])), (stride[0], stride[1]), (padding[0], padding[1]))
    _, why = plan(
        dtype, (weight_shape[0], weight_shape[1], *taps), (block[0], block[1]), window, 1, form,
        input_gradient=GATHERS[op], device=device, fused=op.startswith("norm"),
    )  # fmt: skip
    return not why, why
