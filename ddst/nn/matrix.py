"""A packed weight as the matrix of its power iteration: on the registered operators, or dense."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import topology as tp
from ..ops.reference import dense_weight

_ops = torch.ops.ddst


class Matrix(Protocol):
    """A sparse matrix ``W [M, N]`` given by packed values."""

    def times(self, v: Tensor) -> Tensor:
        """``W v``, ``[M]``."""

    def transposed_times(self, u: Tensor) -> Tensor:
        """``Wᵀ u``, ``[N]``."""

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """``u vᵀ`` at the active blocks, ``[slots, b_out, b_in]``, zero outside the weight."""


class PackedMatrix:
    """The matrix on the registered operators."""

    def __init__(self, values: Tensor, topology: Tensor, shape: tuple[int, int]) -> None:
        self.values, self.topology, self.shape = values, topology, list(shape)

    def times(self, v: Tensor) -> Tensor:
        return _ops.linear(v[None], self.values, None, self.topology, self.shape)[0]

    def transposed_times(self, u: Tensor) -> Tensor:
        return _ops.linear_input_grad(u[None], self.values, self.topology, self.shape)[0]

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        block = [self.values.shape[1], self.values.shape[2]]
        return _ops.linear_weight_grad(u[None], v[None], self.topology, self.shape, block)


class DenseMatrix:
    """The matrix on the reference backend: unpacked, dense arithmetic."""

    def __init__(self, values: Tensor, topology: Tensor, shape: tuple[int, int]) -> None:
        self.weight = dense_weight(values, topology, shape)
        self.topology, self.block = topology, (values.shape[1], values.shape[2])

    def times(self, v: Tensor) -> Tensor:
        return (self.weight * v).sum(1)

    def transposed_times(self, u: Tensor) -> Tensor:
        return (self.weight * u[:, None]).sum(0)

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        rows, cols, _ = tp.grid(self.weight.shape, self.block)
        index = tp.split_topology(self.topology, rows, cols)
        blocks = F.pad(tp.as_blocks(torch.outer(u, v), self.block), (0, 0, 0, 0, 0, 1, 0, 1))  # free slots: zeros
        return blocks[index.block_row.long(), index.block_col.long()]


class TransposedMatrix:
    """The transpose of a matrix."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix

    def times(self, v: Tensor) -> Tensor:
        return self.matrix.transposed_times(v)

    def transposed_times(self, u: Tensor) -> Tensor:
        return self.matrix.times(u)

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        return self.matrix.outer(v, u)
