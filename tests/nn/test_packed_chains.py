"""Random chains of what can be done to a weight, packed and dense: factors, views, sums, products; their gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ddst import topology as tp
from ddst.nn.packed.weight import PackedWeight
from helpers.packed_uses import Own, pack, packed_in
from helpers.scale import problems

Step = Callable[[Any], Any]

SHAPES = [
    (21, 11), (8, 4), (1, 11), (21, 1), (2, 2), (3, 2, 3), (21, 11, 3, 3), (21, 11, 1, 1), (1, 11, 3, 3), (21, 1, 3, 1),
    (1, 2, 11, 3, 3), (1, 21, 11, 3, 2), (16, 8, 2, 2),
]  # fmt: skip


def factor(rng: random.Random, shape: tuple[int, ...], batch: bool) -> torch.Tensor:
    """Along some of the dimensions, with a batch where they have the size 1 or not."""
    sizes = [rng.choice([1, 2, 3]) if batch and size == 1 else size if rng.random() < 0.4 else 1 for size in shape]
    return torch.rand(sizes, dtype=torch.float64) + 0.5


def change(rng: random.Random, shape: tuple[int, ...]) -> Step:
    dims, one = len(shape), rng.randrange(max(len(shape), 1))
    f, order = factor(rng, shape, rng.random() < 0.3), rng.sample(range(dims), dims)
    some, new = rng.sample(range(dims), rng.randrange(dims + 1)), rng.randrange(-dims - 1, dims + 1)
    steps: list[Step] = [
        lambda w: 1.5 * w, lambda w: w * f, lambda w: w / f, lambda w: f * w, lambda w: -w, abs, lambda w: w.square(),
        lambda w: w * w, lambda w: w.permute(order), lambda w: w.unsqueeze(new), lambda w: w.squeeze(),
    ]  # fmt: skip
    if dims:
        size, last = shape[one], rng.randrange(one, dims)
        half = rng.choice([part for part in range(1, size + 1) if size % part == 0])
        split = [*shape[:one], half, size // half, *shape[one + 1 :]]
        wider = [rng.choice([s, -1, 2]) if s == 1 else rng.choice([s, -1]) for s in shape]
        times = [2 if i == one else 1 for i in range(dims)]
        steps += [
            lambda w: w.squeeze(one - dims), lambda w: w.flip(some), lambda w: w.reshape(split),
            lambda w: w.expand(*wider), lambda w: w.repeat(times), lambda w: w.flatten(one, last),
            lambda w: w.flatten(one),
        ]  # fmt: skip
        if size == 1:
            steps.append(lambda w: w[(slice(None),) * one + (0,)])
    return rng.choice(steps)


def use(rng: random.Random, shape: tuple[int, ...]) -> Step:
    """A sum, a norm or a product, as the number of dimensions has it."""
    dims, keep = len(shape), rng.random() < 0.5
    some = rng.sample(range(dims), rng.randrange(1, dims + 1))
    uses: list[Step] = [
        lambda w: w.sum(some, keep), lambda w: w.mean(some, keep), lambda w: w.norm(2, some, keep),
        lambda w: torch.linalg.vector_norm(w, dim=some), lambda w: F.normalize(w, dim=some[0]), lambda w: w.sum(),
    ]  # fmt: skip
    if dims in (3, 4):
        space, groups = [4] * (dims - 2), rng.choice([g for g in (1, 2, 3) if shape[0] % g == 0])
        x = torch.randn(rng.choice([1, 2]), shape[1] * groups, *space, dtype=torch.float64)
        back = torch.randn(rng.choice([1, 2]), shape[0], *space, dtype=torch.float64)
        convolution, transposed = (F.conv1d, F.conv_transpose1d) if dims == 3 else (F.conv2d, F.conv_transpose2d)
        if max(shape[2:]) <= 6:
            uses += 2 * [lambda w: convolution(x, w, padding=1, groups=groups)]
            uses += 2 * [lambda w: transposed(back, w, groups=groups)]
    if dims == 2:
        right, left = (torch.randn(3, size, dtype=torch.float64) for size in (shape[1], shape[0]))
        uses += 2 * [lambda w: F.linear(right, w), lambda w: left @ w, lambda w: w @ right.t()]
    return rng.choice(uses)


@pytest.mark.parametrize("seed", range(problems(300, 12000)))
def test_a_random_chain_equals_that_of_the_dense_weight(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    module = Own(rng.choice(SHAPES), lambda m: m.weight)
    pack(module, "weight")
    weight, layer = module.weight, packed_in(module)
    leaf = weight.unpacked().detach().requires_grad_()
    dense = leaf
    for _ in range(rng.randrange(1, 7)):
        step = change(rng, tuple(dense.shape))
        weight, dense = step(weight), step(dense)
        assert (weight.shape, weight.dtype) == (dense.shape, dense.dtype)
        if not isinstance(weight, PackedWeight) or dense.numel() > 100_000:
            break
    if dense.dim() and rng.random() < 0.7:
        last = use(rng, tuple(dense.shape))
        weight, dense = last(weight), last(dense)
    found = weight.unpacked() if isinstance(weight, PackedWeight) else weight
    torch.testing.assert_close(found, dense)
    (mine,), (theirs,) = (
        torch.autograd.grad(y.sin().sum(), into) for y, into in ((found, layer.values), (dense, leaf))
    )
    theirs = tp.pack_slots(theirs.reshape(layer.weight_shape), layer.slot_blocks, layer.block)
    torch.testing.assert_close(mine, theirs)
