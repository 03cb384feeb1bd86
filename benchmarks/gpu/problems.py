"""The problems that correctness is checked on: small, ragged, and of every kind that has gone wrong somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddst import topology
from ddst.benchmarks.gpu.timing import without_cudnn

FREE = 3  # slots of a problem that hold no block
GUARD = 256  # entries of NaN before and after every tensor of a problem; keeps 16-byte alignment


@dataclass(frozen=True)
class Shape:
    """A layer, its input and its mask. ``size`` (0, 0): a linear layer, ``batch`` rows of it.

    Attributes:
        blocks: (output rows, input columns) of blocks; ragged: how many channels of the last ones are missing.
        mask: "none", "full", "lines" (an empty row and an empty column), "one" per row, or a density such as "0.3".
    """

    name: str
    blocks: tuple[int, int] = (3, 3)
    ragged: tuple[int, int] = (0, 0)
    batch: int = 2
    size: tuple[int, int] = (12, 12)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    mask: str = "0.4"
    channels_last: bool = True

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer."""
        return self.size == (0, 0)


#: One list for every block, dtype and backend. Row lengths 0, 1, 2, and longer than any pipeline; k × k with strides
#: and paddings that leave whole tiles outside the image; sides that no tile divides.
SHAPES = (
    Shape("aligned", size=(16, 16), batch=4, mask="0.3"),
    Shape("ragged", blocks=(3, 3), ragged=(5, 3), size=(13, 11), batch=3, mask="lines"),
    Shape("strided", ragged=(1, 7), size=(17, 19), stride=(2, 3), padding=(4, 5), dilation=(2, 1)),
    Shape("4x4 stride 2", kernel=(4, 4), stride=(2, 2), size=(16, 12), mask="0.2"),
    Shape("1x1", kernel=(1, 1), padding=(0, 0), size=(9, 15), mask="one"),
    Shape("1x5 dilated", kernel=(1, 5), padding=(0, 4), dilation=(1, 2), size=(5, 14), ragged=(2, 0)),
    Shape("nchw", ragged=(3, 5), size=(10, 7), channels_last=False),
    Shape("none", mask="none"),
    Shape("full", blocks=(2, 9), mask="full", size=(8, 8)),
    Shape("one pixel", size=(3, 3), padding=(0, 0), batch=70),
    Shape("linear", blocks=(4, 5), size=(0, 0), batch=130, mask="0.4"),
    Shape("linear ragged", blocks=(3, 3), ragged=(7, 5), size=(0, 0), batch=37, mask="lines"),
    Shape("linear row", blocks=(2, 12), size=(0, 0), batch=1, mask="full"),
    Shape("linear none", size=(0, 0), batch=5, mask="none"),
    Shape("3x3 stride 2", blocks=(4, 4), stride=(2, 2), size=(14, 14), mask="0.2"),
    Shape("even", blocks=(4, 4), batch=3, mask="0.2"),
)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a problem in the dtype that is tested, guarded by NaN on both sides.

    Attributes:
        slots: which block lies in which slot, in random order; :data:`FREE` are free, and NaN in ``values``.
    """

    shape: Shape
    block: tuple[int, int]
    weight_shape: list[int]
    mask: Tensor
    slots: Tensor
    topology: Tensor
    values: Tensor
    bias: Tensor
    input: Tensor
    grad_output: Tensor

    @classmethod
    def make(
        cls,
        shape: Shape,
        block: tuple[int, int],
        dtype: torch.dtype,
        device: str,
        seed: int,
        whole: bool = False,
        mask: Tensor | None = None,
    ) -> Tensors:
        """Normal numbers, or with ``whole`` integers from -3 to 3, whose products and sums float32 holds exactly.

        ``mask``: in place of one of the shape's kind.
        """
        generator = torch.Generator().manual_seed(seed)
        out, into = (shape.blocks[i] * block[i] - shape.ragged[i] for i in range(2))
        weight_shape = [out, into] if shape.linear else [out, into, *shape.kernel]
        if mask is None:
            mask = make_mask(shape.mask, topology.mask_shape(weight_shape, block), generator)

        def numbers(*sizes: int) -> Tensor:
            if whole:
                return torch.randint(-3, 4, sizes, generator=generator).to(dtype)
            return torch.randn(sizes, generator=generator).to(dtype)

        def place(tensor: Tensor) -> Tensor:
            return guarded(tensor.to(device), shape.channels_last and tensor.dim() == 4)

        slots = scattered(mask, int(mask.sum()) + FREE, generator)
        values = in_slots(numbers(int(mask.sum()), *block) * topology.inside(mask, weight_shape, block), slots)
        image, result = ([], []) if shape.linear else (list(shape.size), output_size(shape))
        x, gy = numbers(shape.batch, into, *image), numbers(shape.batch, out, *result)
        index = topology.topology_of_slots(slots, mask.shape)
        return cls(
            shape, block, weight_shape, *(t.to(device) for t in (mask, slots, index)),
            *(place(t) for t in (values, numbers(out), x, gy)),
        )  # fmt: skip

    def move(self, mask: Tensor, seed: int) -> Tensors:
        """The same memory with the blocks of another mask, in other slots, with new numbers: all is written in place.

        The lists that are kept for the topology are left as they are.
        """
        generator = torch.Generator().manual_seed(seed)
        mask = mask.cpu()
        slots = scattered(mask, self.slots.numel(), generator)
        numbers = torch.randn(int(mask.sum()), *self.block, generator=generator)
        values = in_slots(numbers * topology.inside(mask, self.weight_shape, self.block), slots)
        for tensor, new in (
            (self.mask, mask),
            (self.slots, slots),
            (self.topology, topology.topology_of_slots(slots, mask.shape)),
            (self.values, values),
            (self.input, torch.randn(self.input.shape, generator=generator)),
            (self.grad_output, torch.randn(self.grad_output.shape, generator=generator)),
        ):
            tensor.copy_(new)
        return self

    def outside(self) -> Tensor:
        """bool ``[slots, b_out, b_in]``: what of a gradient lies outside the weight, or in a free slot."""
        inside = topology.inside(self.mask, self.weight_shape, self.block)
        return in_slots((~inside).float(), self.slots, fill=1.0).bool()

    def arguments(self, op: str) -> tuple[str, list[object]]:
        """Name and arguments of the registered operator of a pass: forward, dgrad, wgrad or scores."""
        shape, block, topo = self.weight_shape, list(self.block), self.topology
        x, gy = self.input, self.grad_output
        if self.shape.linear:
            return {
                "forward": ("linear", [x, self.values, self.bias, topo, shape]),
                "dgrad": ("linear_input_grad", [gy, self.values, topo, shape]),
                "wgrad": ("linear_weight_grad", [gy, x, topo, shape, block]),
                "scores": ("linear_block_scores", [gy, x, shape, block]),
            }[op]
        window = [list(self.shape.stride), list(self.shape.padding), list(self.shape.dilation)]
        last = self.shape.channels_last
        return {
            "forward": ("conv2d", [x, self.values, self.bias, topo, shape, *window, last]),
            "dgrad": ("conv2d_input_grad", [gy, self.values, topo, shape, list(x.shape[2:]), *window, last]),
            "wgrad": ("conv2d_weight_grad", [gy, x, topo, shape, block, *window]),
            "scores": ("conv2d_block_scores", [gy, x, shape, block, *window]),
        }[op]

    def expected(self) -> dict[str, Tensor]:
        """The four results by dense torch in float64: autograd of a dense layer, which calls nothing of ddst's."""
        packed = self.values.double()[slots_by_block(self.slots)]
        weight = topology.unpack(packed, self.mask, self.weight_shape).requires_grad_()
        x = self.input.double().requires_grad_()
        with torch.enable_grad(), without_cudnn():
            if self.shape.linear:
                y = F.linear(x, weight, self.bias.double())
            else:
                s = self.shape
                y = F.conv2d(x, weight, self.bias.double(), s.stride, s.padding, s.dilation)
            gx, gw = torch.autograd.grad(y, (x, weight), self.grad_output.double())
        blocks = topology.as_blocks(gw, self.block)
        return {
            "forward": y.detach(),
            "dgrad": gx,
            "wgrad": in_slots(blocks[self.mask], self.slots, fill=0.0),
            "scores": torch.linalg.vector_norm(blocks, dim=(-2, -1)),
        }


def scattered(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Which block of a mask lies in which of ``count`` slots, at random; -1 for a free one."""
    active = topology.row_major_slots(mask)
    slots = torch.full((count,), -1, dtype=torch.int32)
    slots[torch.randperm(count, generator=generator)[: active.numel()]] = active
    return slots


def slots_by_block(slots: Tensor) -> Tensor:
    """The slot of every active block, in the order in which a mask counts them."""
    return slots.argsort()[int((slots < 0).sum()) :]


def in_slots(packed: Tensor, slots: Tensor, fill: float = float("nan")) -> Tensor:
    """``[slots, …]`` of ``[nnz, …]``, with ``fill`` in free slots."""
    spread = packed.new_full((slots.numel(), *packed.shape[1:]), fill)
    spread[slots_by_block(slots)] = packed
    return spread


def output_size(shape: Shape) -> list[int]:
    """Height and width of the output."""
    reach = [shape.dilation[i] * (shape.kernel[i] - 1) + 1 for i in range(2)]
    return [(shape.size[i] + 2 * shape.padding[i] - reach[i]) // shape.stride[i] + 1 for i in range(2)]


def make_mask(kind: str, dims: Sequence[int], generator: torch.Generator) -> Tensor:
    """A block mask of one of the kinds of :class:`Shape`."""
    if kind in ("none", "full"):
        return torch.full(tuple(dims), kind == "full")
    if kind == "one":
        return (
            torch.eye(dims[0], dims[1], dtype=torch.bool).view(*dims[:2], *[1] * (len(dims) - 2)).expand(*dims).clone()
        )
    mask = torch.rand(tuple(dims), generator=generator) < (0.7 if kind == "lines" else float(kind))
    if kind == "lines":
        mask[dims[0] // 2], mask[:, dims[1] // 2] = False, False
    return mask


def guarded(tensor: Tensor, channels_last: bool = False) -> Tensor:
    """A copy in the middle of memory that is NaN elsewhere, so that what is read outside it shows."""
    laid_out = tensor.permute(0, 2, 3, 1) if channels_last else tensor
    memory = tensor.new_full((tensor.numel() + 2 * GUARD,), float("nan"))
    inner = memory[GUARD : GUARD + tensor.numel()].view(laid_out.shape)
    inner.copy_(laid_out)
    return inner.permute(0, 3, 1, 2) if channels_last else inner
