"""The problems every op is tested on: one generator for correctness, gradient and opcheck tests.

A problem is a description without tensors; `build` makes its tensors from a seed, always the same ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.dense import inside, mask_dims, row_major, topology_of, unpack_blocks

IntOrPair = int | tuple[int, int]


def pair(value: IntOrPair) -> tuple[int, int]:
    """(v, v) of an int, a pair as it is."""
    return (value, value) if isinstance(value, int) else value


def make_mask(kind: str, weight_shape: tuple[int, ...], block: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A block mask: 'full', 'none', 'one', 'empty_lines' (an empty row and an empty column), or a density as '0.3'.

    'heavy0.3' is a density, too, with a full first row: much more work than in the others.
    """
    dims = mask_dims(weight_shape, block)
    if kind in ("full", "none"):
        return torch.full(dims, kind == "full")
    if kind == "one":
        mask = torch.zeros(dims, dtype=torch.bool)
        mask.view(-1)[mask.numel() // 2] = True
        return mask
    if kind == "empty_lines":
        mask = torch.rand(dims, generator=generator) < 0.7
        mask[dims[0] // 2], mask[:, dims[1] // 2] = False, False
        mask[0, 0] = True
        return mask
    mask = torch.rand(dims, generator=generator) < float(kind.removeprefix("heavy"))
    mask[:1] |= kind.startswith("heavy")
    return mask


SLOTS = ("row_major", "permuted", "scattered")


def make_slots(kind: str, mask: Tensor, rng: random.Random) -> Tensor:
    """`slot_blocks` of a mask: 'row_major', 'permuted' (any order, none free) or 'scattered' (some free, at least one).

    'any' is one of them, 'scattered' in half of all cases.
    """
    if kind == "any":
        kind = rng.choice([*SLOTS, "scattered"])
    ranks = row_major(mask).tolist()
    if kind == "scattered":
        ranks += [-1] * rng.randint(1, 2 + len(ranks) // 4)
    if kind != "row_major":
        rng.shuffle(ranks)
    return torch.tensor(ranks, dtype=torch.int32)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; the memory between strided elements holds NaN."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.mT.contiguous().mT
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        sizes = [2 * n + 1 for n in t.shape]
        view = torch.full(sizes, float("nan"), dtype=t.dtype)[tuple(slice(1, None, 2) for _ in sizes)]
        return view.copy_(t)
    if layout == "expanded":
        return t[:1].expand_as(t) if t.shape[0] > 0 else t
    raise AssertionError(layout)


@dataclass(frozen=True)
class Case:
    """The tensors of one problem. Free slots of `values` hold NaN: whatever reads one shows it.

    `slots` is the int32 `slot_blocks`, and `mask` the blocks that have one.
    """

    x: Tensor
    values: Tensor
    bias: Tensor | None
    mask: Tensor
    slots: Tensor
    topology: Tensor
    grad: Tensor
    weight_shape: tuple[int, ...]
    block: tuple[int, int]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> Tensor:
        """Bool [slots]: which slots hold a block."""
        return self.slots >= 0

    def dense(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The dense operation on the unpacked weight; differentiable."""
        weight = unpack_blocks(values, self.slots, self.weight_shape)
        return F.conv2d(x, weight, bias, **self.kwargs) if weight.dim() == 4 else F.linear(x, weight, bias)

    def dense_grads(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Float64 gradients with respect to input, values and bias."""
        leaves = [t.detach().double().requires_grad_() for t in (self.x, self.values, self.bias) if t is not None]
        y = self.dense(leaves[0], leaves[1], leaves[2] if self.bias is not None else None)
        grads = torch.autograd.grad(y, leaves, self.grad.double(), allow_unused=True, materialize_grads=True)
        return grads[0], grads[1], grads[2] if self.bias is not None else None

    def dense_weight_grad(self) -> Tensor:
        """Float64 gradient with respect to the whole dense weight, active or not."""
        weight = torch.zeros(self.weight_shape, dtype=torch.float64, requires_grad=True)
        x = self.x.double()
        y = F.conv2d(x, weight, **self.kwargs) if weight.dim() == 4 else F.linear(x, weight)
        (grad,) = torch.autograd.grad(y, weight, self.grad.double())
        return grad


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, numbers: str, generator: torch.Generator) -> Tensor:
    """Normal numbers, or whole numbers in -3..3 whose sums are exact in every dtype and order of summation."""
    if numbers == "whole":
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _values(
    slots: Tensor,
    weight_shape: tuple[int, ...],
    block: tuple[int, int],
    dtype: torch.dtype,
    numbers: str,
    generator: torch.Generator,
) -> Tensor:
    """Packed values: zero outside the weight, NaN in free slots. The dense weight is the same for any slots."""
    active = (slots >= 0).nonzero()[:, 0]
    by_rank = active[slots[active].argsort()]
    values = torch.full((slots.numel(), *block), float("nan"), dtype=dtype)
    values[by_rank] = _numbers((by_rank.numel(), *block), dtype, numbers, generator)
    outside = ~inside(slots, weight_shape, block) & (slots >= 0)[:, None, None]
    return values.masked_fill(outside, 0)


@dataclass(frozen=True)
class ConvProblem:
    """A sparse convolution: sizes, block, mask, slots and layouts. `batch` None is an unbatched input."""

    batch: int | None = 2
    channels: tuple[int, int] = (8, 16)  # in, out
    kernel: tuple[int, int] = (3, 3)
    size: tuple[int, int] = (6, 7)
    block: tuple[int, int] = (8, 8)
    stride: IntOrPair = 1
    padding: IntOrPair | str = 1
    dilation: IntOrPair = 1
    mask: str = "0.4"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    bias: bool = True
    slots: str = "any"

    def __str__(self) -> str:
        # repr() shows only what differs from the defaults, which keeps test ids short.
        plain = ConvProblem()
        names = [n for n in self.__dataclass_fields__ if getattr(self, n) != getattr(plain, n)]
        return ",".join(f"{n}={getattr(self, n)}" for n in names).replace(" ", "").replace("'", "") or "default"

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.channels[1], self.channels[0], *self.kernel)

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        if self.padding == "same":
            return self.size
        strides, dilations = pair(self.stride), pair(self.dilation)
        paddings = (0, 0) if isinstance(self.padding, str) else pair(self.padding)
        reach = [d * (k - 1) + 1 for d, k in zip(dilations, self.kernel, strict=True)]
        height, width = ((self.size[i] + 2 * paddings[i] - reach[i]) // strides[i] + 1 for i in (0, 1))
        return height, width

    def build(self, dtype: torch.dtype = torch.float64, numbers: str = "normal", seed: int = 0) -> Case:
        """The tensors of this problem."""
        g = torch.Generator().manual_seed(seed)
        mask = make_mask(self.mask, self.weight_shape, self.block, g)
        shape = (self.channels[0], *self.size) if self.batch is None else (self.batch, self.channels[0], *self.size)
        x = lay_out(_numbers(shape, dtype, numbers, g), self.layout)
        slots = make_slots(self.slots, mask, random.Random(f"{self} {seed}"))
        values = _values(slots, self.weight_shape, self.block, dtype, numbers, g)
        bias = _numbers((self.channels[1],), dtype, numbers, g) if self.bias else None
        kwargs = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        grad = lay_out(
            _numbers((*shape[:-3], self.channels[1], *self.output_size), dtype, numbers, g), self.grad_layout
        )
        topology = topology_of(slots, mask.shape)
        return Case(x, values, bias, mask, slots, topology, grad, self.weight_shape, self.block, kwargs)

    def explicit(self) -> tuple[list[int], list[int], list[int]] | None:
        """(stride, padding, dilation) as the registered ops take them; None for a padding they cannot express."""
        stride, dilation = list(pair(self.stride)), list(pair(self.dilation))
        if self.padding == "valid":
            return stride, [0, 0], dilation
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, self.kernel, strict=True)]
            return None if any(t % 2 for t in total) else (stride, [t // 2 for t in total], dilation)
        assert not isinstance(self.padding, str)
        return stride, list(pair(self.padding)), dilation


@dataclass(frozen=True)
class LinearProblem:
    """A sparse linear map; `batch` holds all leading dimensions of the input."""

    batch: tuple[int, ...] = (5,)
    features: tuple[int, int] = (16, 24)  # in, out
    block: tuple[int, int] = (8, 8)
    mask: str = "0.4"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    bias: bool = True
    slots: str = "any"

    def __str__(self) -> str:
        plain = LinearProblem()
        names = [n for n in self.__dataclass_fields__ if getattr(self, n) != getattr(plain, n)]
        return ",".join(f"{n}={getattr(self, n)}" for n in names).replace(" ", "").replace("'", "") or "default"

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (self.features[1], self.features[0])

    def build(self, dtype: torch.dtype = torch.float64, numbers: str = "normal", seed: int = 0) -> Case:
        """The tensors of this problem."""
        g = torch.Generator().manual_seed(seed)
        mask = make_mask(self.mask, self.weight_shape, self.block, g)
        x = _numbers((*self.batch, self.features[0]), dtype, numbers, g)
        slots = make_slots(self.slots, mask, random.Random(f"{self} {seed}"))
        values = _values(slots, self.weight_shape, self.block, dtype, numbers, g)
        bias = _numbers((self.features[1],), dtype, numbers, g) if self.bias else None
        grad = _numbers((*self.batch, self.features[1]), dtype, numbers, g)
        if self.batch:
            x, grad = lay_out(x, self.layout), lay_out(grad, self.grad_layout)
        topology = topology_of(slots, mask.shape)
        return Case(x, values, bias, mask, slots, topology, grad, self.weight_shape, self.block)


BLOCKS = [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (16, 4), (16, 1), (4, 16), (3, 5), (32, 16)]
BLOCKS += [(24, 8), (8, 3), (48, 20), (1, 16), (64, 1), (5, 64), (40, 40), (7, 7)]
LAYOUTS = ["contiguous", "channels_last", "transposed", "strided", "expanded"]


def _named_conv_problems() -> Iterator[ConvProblem]:
    base = ConvProblem()
    yield base
    for block in BLOCKS:
        # Channel counts that are a multiple of no block side but 1, with more than one block row and column.
        channels = (block[1] + max(1, block[1] // 2) + 1, block[0] + max(1, block[0] // 3) + 1)
        yield replace(base, block=block, channels=channels, mask="0.5", size=(5, 6))
    for layout in LAYOUTS[1:]:
        yield replace(base, layout=layout, grad_layout=layout, channels=(11, 21))
    for mask in ("full", "none"):
        for slots in SLOTS:
            yield replace(base, mask=mask, slots=slots, channels=(24, 40))
    for mask in ("one", "empty_lines"):
        yield replace(base, mask=mask, channels=(24, 40))
    for mask in ("full", "none", "one", "empty_lines"):
        yield replace(base, mask=mask, channels=(19, 35), block=(16, 4), layout="channels_last")
    # Strides, paddings, dilations and kernels, square and not.
    yield replace(base, stride=2)
    yield replace(base, stride=(2, 3), padding=(4, 5), size=(9, 11))
    yield replace(base, stride=(3, 1), padding=(0, 2), kernel=(1, 5), size=(7, 8), grad_layout="channels_last")
    yield replace(base, stride=2, kernel=(4, 4), padding=1, size=(8, 8), layout="channels_last")
    yield replace(base, stride=3, kernel=(2, 2), padding=0, size=(8, 10))  # a stride that skips input pixels
    yield replace(base, stride=5, padding=3, size=(4, 6))
    yield replace(base, dilation=2, padding=2, size=(7, 6))
    yield replace(base, dilation=(3, 1), padding=(3, 0), size=(8, 9), stride=(1, 2))
    yield replace(base, dilation=(2, 4), padding="same", size=(5, 5))
    yield replace(base, padding="same", kernel=(4, 2), size=(5, 7))  # asymmetric
    yield replace(base, padding="same", kernel=(2, 3), dilation=3, size=(6, 5), layout="channels_last")
    yield replace(base, padding="valid", kernel=(3, 5), size=(6, 9))
    yield replace(base, padding="valid", stride=2)
    yield replace(base, kernel=(1, 1), padding=0, channels=(20, 28), size=(9, 5))
    yield replace(base, kernel=(1, 1), padding=0, stride=2, size=(7, 8))
    yield replace(base, kernel=(1, 1), padding=2)  # outputs that read padding only
    yield replace(base, kernel=(7, 7), padding=3, size=(5, 4))  # kernel larger than the image
    yield replace(base, kernel=(5, 1), padding=(2, 0), size=(1, 9))
    yield replace(base, size=(1, 1))
    yield replace(base, size=(3, 3), padding=0)  # one output pixel
    yield replace(base, size=(1, 13), kernel=(1, 3), padding=(0, 1))
    yield replace(base, size=(16, 16), batch=1, channels=(16, 32), block=(16, 16))
    # Batches and missing bias.
    yield replace(base, batch=None, channels=(9, 17))
    yield replace(base, batch=None, padding="same", kernel=(2, 2))
    yield replace(base, batch=0)
    yield replace(base, batch=0, layout="channels_last", bias=False)
    yield replace(base, batch=7, channels=(1, 3), block=(1, 1), mask="0.6")
    yield replace(base, bias=False, channels=(3, 16), block=(16, 3))
    # Enough work to be split over threads.
    yield replace(base, batch=4, channels=(48, 64), block=(16, 16), size=(12, 12), layout="channels_last", mask="0.2")
    yield replace(base, batch=2, channels=(150, 130), block=(64, 64), size=(9, 9), mask="0.7", kernel=(2, 2))
    yield replace(base, batch=3, channels=(33, 70), block=(16, 16), size=(11, 13), mask="0.3", grad_layout="expanded")


def _random_conv_problems(count: int, seed: int, longest: int = 4, largest: int = 12) -> Iterator[ConvProblem]:
    """Kernels up to so long, images up to so large."""
    rng = random.Random(seed)
    while count:
        block = rng.choice(BLOCKS)
        kernel = (rng.randint(1, longest), rng.randint(1, longest))
        dilation = (rng.choice([1, 1, 2]), rng.choice([1, 1, 3]))
        padding: IntOrPair | str = (rng.randint(0, 3), rng.randint(0, 3))
        stride: IntOrPair = (rng.randint(1, 3), rng.randint(1, 3))
        if rng.random() < 0.2:
            padding, stride = "same", 1
        size = (rng.randint(1, largest), rng.randint(1, largest))
        if not isinstance(padding, str) and any(
            size[i] + 2 * pair(padding)[i] < dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)
        ):
            continue
        yield ConvProblem(
            batch=rng.randint(1, 3),
            channels=(rng.randint(1, 2 * block[1] + 1), rng.randint(1, 2 * block[0] + 1)),
            kernel=kernel,
            size=size,
            block=block,
            stride=stride,
            padding=padding,
            dilation=dilation,
            mask=rng.choice(["0.1", "0.5", "0.9", "empty_lines"]),
            layout=rng.choice(LAYOUTS),
            grad_layout=rng.choice(LAYOUTS),
            bias=rng.random() < 0.7,
        )
        count -= 1


def sample_conv_problems() -> list[ConvProblem]:
    """Convolutions that cover the specification, then random combinations; the same list every time."""
    return [*_named_conv_problems(), *_random_conv_problems(24, seed=1)]


def sample_linear_problems() -> list[LinearProblem]:
    """Linear maps that cover the specification; the same list every time."""
    base = LinearProblem()
    problems = [base]
    for block in BLOCKS:
        features = (block[1] + max(1, block[1] // 2) + 1, 2 * block[0] + max(1, block[0] // 3))
        problems.append(replace(base, block=block, features=features, mask="0.5"))
    for mask in ("full", "none"):
        problems += [replace(base, mask=mask, slots=slots, features=(37, 45)) for slots in SLOTS]
    for mask in ("one", "empty_lines"):
        problems.append(replace(base, mask=mask, features=(37, 45)))
    for layout in LAYOUTS[1:]:
        problems.append(replace(base, layout=layout, grad_layout=layout, features=(19, 21), batch=(7,)))
    for batch in ((), (0,), (1,), (2, 3), (2, 0, 3), (2, 1, 3, 2), (67,)):
        problems.append(replace(base, batch=batch))
    problems.append(replace(base, bias=False, features=(1, 1), block=(1, 1), mask="full"))
    problems.append(replace(base, batch=(64,), features=(130, 200), block=(16, 16), mask="0.2"))
    problems.append(replace(base, batch=(2, 9), features=(40, 33), block=(16, 16), layout="strided"))
    return problems


def sample_problems() -> list[ConvProblem | LinearProblem]:
    """Everything: convolutions and linear maps."""
    return [*sample_conv_problems(), *sample_linear_problems()]


def wide_problems(count: int, seed: int) -> Iterator[ConvProblem | LinearProblem]:
    """Random problems with blocks of any two sides, more channels and images; about one in five is linear.

    In every layout that `between_guards` can copy.
    """
    rng = random.Random(seed)
    sides = (1, 2, 3, 4, 7, 8, 8, 12, 16, 16, 16, 24, 32, 40, 64)
    for problem in _random_conv_problems(count, seed, longest=5, largest=16):
        out, into = block = (rng.choice(sides), rng.choice(sides))
        channels = (
            rng.choice([1, into, 3 * into, rng.randint(1, 100)]),
            rng.choice([1, out, 3 * out, rng.randint(1, 100)]),
        )
        mask = rng.choice(["none", "0.1", "0.3", "0.6", "full", "empty_lines", "heavy0.1"])
        layout, grad_layout = rng.choices(LAYOUTS[:-1], k=2)
        if rng.random() < 0.2:
            batch = (rng.choice([0, 1, 5, 64, 150]),)
            yield LinearProblem(batch, channels, block, mask, layout, grad_layout, problem.bias)
            continue
        batches = [0, 1, 2, 5, 17] if problem.size[0] * problem.size[1] < 60 else [1, 3]
        problem = replace(problem, batch=rng.choice(batches), channels=channels, block=block, mask=mask)
        problem = replace(problem, layout=layout, grad_layout=grad_layout)
        if rng.random() < 0.6:  # the windows of most layers
            side = rng.choice([1, 3])
            padding, stride = rng.choice([side // 2, side // 2, 3]), rng.choice([1, 1, 2, 3])
            problem = replace(problem, kernel=(side, side), padding=padding, stride=stride, dilation=1)
        yield problem


def large_problems() -> Iterator[ConvProblem | LinearProblem]:
    """What small problems do not reach: vectors over pixels (narrow blocks), strips, outputs stored past the caches."""

    def conv(
        block: tuple[int, int],
        channels: tuple[int, int],
        kernel: tuple[int, int],
        size: tuple[int, int],
        batch: int,
        padding: IntOrPair = 1,
        dilation: IntOrPair = 1,
    ) -> ConvProblem:
        return ConvProblem(batch, channels, kernel, size, block, padding=padding, dilation=dilation, mask="0.3")

    problems = [
        conv((16, 1), (37, 40), (3, 3), (9, 7), 19),  # whole images, the last chunk shorter
        conv((1, 16), (40, 37), (3, 2), (60, 33), 1, (2, 0), (1, 2)),  # strips of rows
        conv((16, 1), (37, 40), (3, 3), (64, 48), 2),  # the same; vectors that end with a row
        conv((24, 2), (21, 50), (3, 2), (13, 15), 5, (2, 1), (1, 2)),  # several images, rows not quite full
        conv((3, 4), (150, 20), (2, 3), (25, 40), 2, (4, 5), (2, 1)),  # padding beyond the kernel
        conv((4, 2), (33, 18), (1, 1), (24, 31), 1, 0),  # pixels without images
        conv((8, 8), (43, 37), (3, 3), (9, 7), 19),  # images side by side, the last group cut
        conv((5, 12), (29, 31), (2, 3), (8, 8), 21, 1, (2, 1)),
        conv((7, 6), (20, 23), (3, 1), (40, 21), 3, (2, 3)),
        conv((4, 8), (200, 72), (3, 3), (33, 32), 2, (3, 0), 2),  # strips of rows
        conv((12, 8), (24, 40), (1, 1), (16, 9), 4, 0),  # pixels without images
        conv((8, 16), (40, 64), (3, 3), (128, 132), 1),  # more than 4 MB of output
        conv((16, 16), (48, 64), (3, 3), (128, 130), 1),  # the same
        conv((56, 16), (16, 112), (3, 3), (32, 32), 16),  # the same, of blocks that end inside a cache line
        # Several images in a chunk of rows that are not all needed.
        ConvProblem(16, (16, 16), (1, 1), (4, 4), (16, 1), stride=(2, 1), padding=0, mask="0.7"),
        ConvProblem(16, (16, 16), (3, 3), (4, 4), (16, 4), stride=(2, 1), padding=0, mask="0.7"),
        # Images larger than the kernels' batch of source bytes, and some that fill several batches.
        *(
            ConvProblem(batch, (sides, sides), (3, 3), (size, size), (16, 8), stride, mask="0.2", bias=False)
            for batch, sides, size, stride in [(2, 70, 40, 1), (1, 160, 33, 2), (9, 64, 16, 1)]
        ),
    ]
    for i, problem in enumerate(problems):
        yield replace(problem, layout=LAYOUTS[i % 4], grad_layout=LAYOUTS[i // 4 % 4])
    yield LinearProblem((700,), (300, 18), (2, 4), "0.3")
    # Linear layers whose pixels are packed into panels, with any of the instruction sets: less than a vector of pixels
    # and several tiles of them; some blocks to a cache line of the output, and several lines to a block.
    yield LinearProblem((6,), (100, 120), (16, 16), "0.5")
    yield LinearProblem((50,), (250, 261), (4, 4), "0.5")
    yield LinearProblem((33,), (200, 130), (8, 12), "0.9", bias=False)
    yield LinearProblem((100,), (256, 256), (12, 20), "0.7", "transposed", "strided")
    yield LinearProblem((16,), (160, 200), (64, 16), "heavy0.9")


def between_guards(t: Tensor) -> Tensor:
    """The same tensor in the same layout, in the middle of memory that holds NaN (or, for integers, nonsense)."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    margin = 2048
    filler = float("nan") if t.is_floating_point() else -(2**30)
    area = torch.full((span + 2 * margin,), filler, dtype=t.dtype)
    return area.as_strided(t.shape, t.stride(), margin).copy_(t)


def few(problems: list[Any], count: int) -> list[Any]:
    """`count` problems spread evenly over a list, for the checks that cost seconds each."""
    step = max(1, len(problems) // count)
    return problems[::step][:count]
