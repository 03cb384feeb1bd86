"""The CPU kernels alone: every instruction set against dense float64, on random ragged problems.

The instruction set is chosen once per process, so that each one is checked in a process of its own: this file, run as
a program with DDST_CPU_CAPABILITY set.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddst  # noqa: F401  (loads the operators)
from ddst import topology

CAPABILITIES = ("portable", "avx2", "avx512")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
SIZES = (1, 2, 3, 4, 7, 8, 8, 12, 16, 16, 16, 24, 32, 40, 64)


@dataclass
class Problem:
    """One convolution with its dense reference; linear layers are 1x1 convolutions over 1x1 images."""

    block: tuple[int, int]
    weight: Tensor
    mask: Tensor
    bias: Tensor | None
    input: Tensor
    grad_output: Tensor
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    linear: bool

    @property
    def shape(self) -> list[int]:
        return list(self.weight.shape)

    @property
    def window(self) -> tuple[list[int], list[int], list[int]]:
        return self.stride, self.padding, self.dilation


def random_problem(rng: random.Random) -> Problem | None:
    """A random problem, or None where the kernel does not fit the image."""
    block = (rng.choice(SIZES), rng.choice(SIZES))
    channels = [rng.choice([1, size, 3 * size, rng.randint(1, 100)]) for size in block]
    linear = rng.random() < 0.2
    kernel = rng.choice([[1, 1], [3, 3], [rng.randint(1, 5), rng.randint(1, 5)]])
    stride, padding, dilation = ([rng.randint(low, high) for _ in "hw"] for low, high in ((1, 3), (0, 3), (1, 2)))
    if rng.random() < 0.3:
        stride, padding = [1, 1], [kernel[0] // 2, kernel[1] // 2]
    size = [rng.randint(1, 16), rng.randint(1, 16)]
    batch = rng.choice([0, 1, 2, 5, 17]) if size[0] * size[1] < 60 else rng.choice([1, 3])
    if linear:
        kernel, stride, padding, dilation, size = [1, 1], [1, 1], [0, 0], [1, 1], [1, 1]
        batch = rng.choice([0, 1, 5, 64, 150])
    out = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    if min(out) < 1:
        return None
    dtype = rng.choice([torch.float32, torch.float64])
    shape = [*channels, *kernel]
    mask = torch.rand(topology.mask_shape(shape, block)) < rng.choice([0.0, 0.1, 0.3, 0.6, 1.0])
    if rng.random() < 0.3:
        mask[rng.randrange(mask.shape[0])] = False
    if rng.random() < 0.3:
        mask[:, rng.randrange(mask.shape[1])] = False
    values = topology.pack(torch.randn(shape, dtype=dtype), mask, block)
    return Problem(
        block,
        topology.unpack(values, mask, shape),
        mask,
        torch.randn(channels[0], dtype=dtype) if rng.random() < 0.6 else None,
        torch.randn(batch, channels[1], *size, dtype=dtype),
        torch.randn(batch, channels[0], *out, dtype=dtype),
        stride,
        padding,
        dilation,
        linear,
    )


def surrounded(tensor: Tensor) -> Tensor:
    """An equal tensor whose neighbours in memory are NaN: reading past either end shows."""
    lengths = [tensor.numel(), tensor.numel() + 4096]
    memory = torch.full((lengths[1],), float("nan"), dtype=tensor.dtype)
    start = 2048
    return memory.as_strided(tensor.shape, tensor.stride(), start).copy_(tensor)


def laid_out(tensor: Tensor, rng: random.Random) -> Tensor:
    """The same tensor in a random memory layout."""
    layout = rng.choice(["nchw", "channels_last", "strided"])
    if layout == "channels_last":
        return surrounded(tensor.contiguous(memory_format=torch.channels_last))
    return torch.stack([tensor, tensor], -1)[..., 0] if layout == "strided" else surrounded(tensor)


def packed_results(problem: Problem, rng: random.Random) -> list[Tensor]:
    """Forward, input gradient, weight gradient and block scores by the packed operators."""
    ops, shape, block, window = torch.ops.ddst, problem.shape, list(problem.block), problem.window
    topo = topology.build_topology(problem.mask)
    values = topology.pack(problem.weight, problem.mask, problem.block)
    values = surrounded(values) if values.numel() else values
    if problem.linear:
        x, gy = problem.input.flatten(1), problem.grad_output.flatten(1)
        if rng.random() < 0.5:
            x, gy = x.t().contiguous().t(), gy.t().contiguous().t()
        return [
            ops.linear(x, values, problem.bias, topo, shape[:2])[..., None, None],
            ops.linear_input_grad(gy, values, topo, shape[:2])[..., None, None],
            ops.linear_weight_grad(gy, x, topo, shape[:2], block),
            ops.linear_block_scores(gy, x, shape[:2], block)[..., None, None],
        ]
    x, gy, last = laid_out(problem.input, rng), laid_out(problem.grad_output, rng), rng.random() < 0.5
    results = [
        ops.conv2d(x, values, problem.bias, topo, shape, *window, last),
        ops.conv2d_input_grad(gy, values, topo, shape, list(x.shape[2:]), *window, last),
        ops.conv2d_weight_grad(gy, x, topo, shape, block, *window),
        ops.conv2d_block_scores(gy, x, shape, block, *window),
    ]
    for result in results[:2]:
        assert result.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return results


def dense_results(problem: Problem) -> list[Tensor]:
    """The same by dense torch in float64."""
    x, gy = problem.input.double(), problem.grad_output.double()
    x.requires_grad_()
    weight = problem.weight.double().requires_grad_()
    bias = None if problem.bias is None else problem.bias.double()
    if x.shape[0] == 0:  # torch's own empty convolutions differ between versions
        forward, grads = gy, (torch.zeros_like(x), torch.zeros_like(weight))
    else:
        forward = F.conv2d(x, weight, bias, *problem.window)
        grads = torch.autograd.grad(forward, (x, weight), gy)
    full = torch.ones_like(problem.mask)
    scores = topology.pack(grads[1], full, problem.block).flatten(1).norm(dim=1).reshape(problem.mask.shape)
    return [forward.detach(), grads[0], topology.pack(grads[1], problem.mask, problem.block), scores]


def check(problem: Problem, rng: random.Random) -> None:
    """Asserts that the packed results are the dense ones."""
    dtype = problem.input.dtype
    names = ("forward", "input_grad", "weight_grad", "block_scores")
    for name, got, expected in zip(names, packed_results(problem, rng), dense_results(problem), strict=True):
        assert got.dtype == dtype and got.shape == expected.shape, f"{name}: {got.dtype} {got.shape} {expected.shape}"
        if expected.numel():
            error = ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
            assert error < TOLERANCE[dtype], f"{name}: error {error:.2e} in {problem.block} {problem.shape} {problem}"


def many_pixels() -> Iterator[Problem]:
    """What small problems do not reach: vectors over pixels (narrow blocks), and outputs stored past the caches."""
    for block, shape, size, batch, padding, dilation, dtype in [
        ((16, 1), [40, 37, 3, 3], [9, 7], 19, [1, 1], [1, 1], torch.float32),  # whole images, the last chunk shorter
        ((1, 16), [37, 40, 3, 2], [60, 33], 1, [2, 0], [1, 2], torch.float32),  # strips of rows
        ((16, 1), [40, 37, 3, 3], [64, 48], 2, [1, 1], [1, 1], torch.float32),  # the same; vectors that end with a row
        ((24, 2), [50, 21, 3, 2], [13, 15], 5, [2, 1], [1, 2], torch.float64),  # several images, rows not quite full
        ((3, 4), [20, 150, 2, 3], [25, 40], 2, [4, 5], [2, 1], torch.float64),  # padding beyond the kernel
        ((4, 2), [18, 33, 1, 1], [24, 31], 1, [0, 0], [1, 1], torch.float32),  # pixels without images
        ((2, 4), [18, 300, 1, 1], [1, 1], 700, [0, 0], [1, 1], torch.float64),  # linear
        ((8, 8), [37, 43, 3, 3], [9, 7], 19, [1, 1], [1, 1], torch.float32),  # images side by side, the last group cut
        ((5, 12), [31, 29, 2, 3], [8, 8], 21, [1, 1], [2, 1], torch.float32),
        ((7, 6), [23, 20, 3, 1], [40, 21], 3, [2, 3], [1, 1], torch.float64),
        ((4, 8), [72, 200, 3, 3], [33, 32], 2, [3, 0], [2, 2], torch.float32),  # strips of rows
        ((12, 8), [40, 24, 1, 1], [16, 9], 4, [0, 0], [1, 1], torch.float32),  # pixels without images
        ((8, 16), [64, 40, 3, 3], [128, 132], 1, [1, 1], [1, 1], torch.float32),  # more than 4 MB of output
        ((16, 16), [64, 48, 3, 3], [128, 130], 1, [1, 1], [1, 1], torch.float32),  # the same
    ]:
        mask = torch.rand(topology.mask_shape(shape, block)) < 0.3
        weight = topology.unpack(topology.pack(torch.randn(shape, dtype=dtype), mask, block), mask, shape)
        out = [size[i] + 2 * padding[i] - dilation[i] * (shape[2 + i] - 1) for i in range(2)]
        x = torch.randn(batch, shape[1], *size, dtype=dtype)
        gy, bias = torch.randn(batch, shape[0], *out, dtype=dtype), torch.randn(shape[0], dtype=dtype)
        yield Problem(block, weight, mask, bias, x, gy, [1, 1], padding, dilation, size == [1, 1])


def run_problems(seed: int, count: int) -> None:
    """Checks many_pixels() and so many random problems with one and with two threads."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for done, problem in enumerate(many_pixels()):
        torch.set_num_threads(1 + done % 2)
        check(problem, rng)
    done = 0
    while done < count:
        problem = random_problem(rng)
        if problem is not None:
            torch.set_num_threads(1 + done % 2)
            check(problem, rng)
            done += 1


def in_process(capability: str, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs this file as a program with one instruction set forced."""
    environment = {**os.environ, "DDST_CPU_CAPABILITY": capability, **variables}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-P", str(Path(__file__).resolve()), *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_instruction_set_against_dense(capability: str) -> None:
    result = in_process(capability, "0", "80")
    if "does not support" in result.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == [capability, "80"]


def test_unknown_instruction_set_is_refused() -> None:
    result = in_process("sse9", "0", "1")
    assert result.returncode != 0
    assert "DDST_CPU_CAPABILITY is 'sse9', expected portable, avx2 or avx512" in result.stderr


def example(block: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Input, values, topology and weight shape of a layer with an empty block row."""
    torch.manual_seed(0)
    shape = [48, 32, 3, 3]
    mask = torch.rand(topology.mask_shape(shape, block)) < 0.5
    mask[1] = False
    values = topology.pack(torch.randn(shape), mask, block)
    return torch.randn(8, 32, 12, 12), values, topology.build_topology(mask), shape


@pytest.mark.parametrize("block", [(16, 16), (16, 1)], ids=str)
def test_threads_do_not_change_forward_and_dgrad(block: tuple[int, int]) -> None:
    x, values, topo, shape = example(block)
    gy = torch.randn(8, 48, 12, 12)
    window = ([1, 1], [1, 1], [1, 1])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(
                [
                    torch.ops.ddst.conv2d(x, values, None, topo, shape, *window, False),
                    torch.ops.ddst.conv2d_input_grad(gy, values, topo, shape, [12, 12], *window, False),
                    torch.ops.ddst.conv2d_weight_grad(gy, x, topo, shape, list(block), *window),
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[1][2], results[2][2])  # the weight gradient: the same for the same number of threads


def passes(
    threads: int, block: tuple[int, int], shape: list[int], density: float, batch: int, size: int
) -> list[Tensor]:
    """Forward, input gradient and weight gradient of a layer with a 3x3 kernel (linear for a shape of two)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(topology.mask_shape(shape, block), generator=generator) < density
    mask[0] = True  # one row of blocks is much heavier than the others
    values, topo = topology.pack(torch.randn(shape, generator=generator), mask, block), topology.build_topology(mask)
    image = [size, size] if len(shape) == 4 else []
    x = torch.randn(batch, shape[1], *image, generator=generator)
    gy = torch.randn(batch, shape[0], *image, generator=generator)
    window = ([1, 1], [1, 1], [1, 1])
    torch.set_num_threads(threads)
    if len(shape) == 2:
        return [
            torch.ops.ddst.linear(x, values, None, topo, shape),
            torch.ops.ddst.linear_input_grad(gy, values, topo, shape),
            torch.ops.ddst.linear_weight_grad(gy, x, topo, shape, list(block)),
        ]
    return [
        torch.ops.ddst.conv2d(x, values, None, topo, shape, *window, False),
        torch.ops.ddst.conv2d_input_grad(gy, values, topo, shape, image, *window, False),
        torch.ops.ddst.conv2d_weight_grad(gy, x, topo, shape, list(block), *window),
    ]


@pytest.mark.parametrize(
    ("block", "shape", "density", "batch", "size"),
    [
        ((16, 16), [1024, 512], 0.1, 16, 1),  # threads share out output blocks
        ((16, 16), [512, 1024], 0.1, 70, 1),  # pixels a power of two apart
        ((16, 16), [128, 128, 3, 3], 0.3, 7, 9),  # tiles, with weights that each thread packs
        ((16, 16), [256, 256, 3, 3], 0.3, 6, 16),  # weights that are packed once, by all threads
        ((16, 8), [96, 96, 3, 3], 0.3, 5, 8),
        ((8, 12), [90, 100, 3, 3], 0.3, 5, 8),  # packed for the input gradient, too, in the order of columns
    ],
)
def test_every_way_to_share_out_work_gives_the_bits_of_one_thread(
    block: tuple[int, int], shape: list[int], density: float, batch: int, size: int
) -> None:
    before = torch.get_num_threads()
    try:
        one, *others = [passes(threads, block, shape, density, batch, size) for threads in (1, 2, 3, 5)]
    finally:
        torch.set_num_threads(before)
    for several in others:
        assert torch.equal(one[0], several[0])
        assert torch.equal(one[1], several[1])
        torch.testing.assert_close(one[2], several[2], rtol=1e-3, atol=1e-3)  # may add in another order


@pytest.mark.skipif(torch.ops.ddst.cpu_capability() == "portable", reason="needs registers of a cache line's half")
def test_a_small_weight_gradient_has_the_bits_of_one_thread() -> None:
    """Threads share out its blocks: no partial sums, so no other order of addition."""
    before = torch.get_num_threads()
    try:
        results = [passes(threads, (16, 16), [1024, 512], 0.2, 160, 1)[2] for threads in (1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def weight_grad_digest(threads: int) -> str:
    """A digest of the weight gradient's bits, computed with so many threads."""
    x, _, topo, shape = example()
    gy = torch.randn(8, 48, 12, 12)
    torch.set_num_threads(threads)
    grad = torch.ops.ddst.conv2d_weight_grad(gy, x, topo, shape, [16, 16], [1, 1], [1, 1], [1, 1])
    return hashlib.sha256(grad.numpy().tobytes()).hexdigest()


def test_fixed_shares_give_the_same_weight_grad_for_any_number_of_threads() -> None:
    def digests(shares: str) -> list[str]:
        result = in_process("portable", "digests", DDST_WEIGHT_GRAD_SHARES=shares)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout.split()

    free, fixed = digests(""), digests("3")
    assert len(free) == len(fixed) == 3
    assert len(set(free)) > 1  # else the problem would show nothing
    assert len(set(fixed)) == 1
    assert set(digests("1")) == {free[0]}  # one share: what one thread computes


@pytest.mark.parametrize("shares", ["0", "many", "2000"])
def test_wrong_shares_are_refused(shares: str) -> None:
    result = in_process("portable", "digests", DDST_WEIGHT_GRAD_SHARES=shares)
    assert result.returncode != 0
    assert f"DDST_WEIGHT_GRAD_SHARES is '{shares}', expected a number from 1 to 1024" in result.stderr


def test_images_that_are_computed_in_strips_and_batches() -> None:
    """Images larger than the kernels' batch of source bytes, and some that fill several batches."""
    rng = random.Random(1)
    torch.manual_seed(1)
    for batch, channels, size, stride in [(2, 70, 40, 1), (1, 160, 33, 2), (9, 64, 16, 1)]:
        out = (size - 1) // stride + 1
        mask = torch.rand(topology.mask_shape([channels, channels, 3, 3], (16, 8))) < 0.2
        values = topology.pack(torch.randn(channels, channels, 3, 3), mask, (16, 8))
        weight = topology.unpack(values, mask, [channels, channels, 3, 3])
        x, gy = torch.randn(batch, channels, size, size), torch.randn(batch, channels, out, out)
        check(Problem((16, 8), weight, mask, None, x, gy, [stride] * 2, [1, 1], [1, 1], False), rng)


def test_empty_block_row_gives_exactly_the_bias() -> None:
    x, values, topo, shape = example()
    window = ([1, 1], [1, 1], [1, 1])
    assert (torch.ops.ddst.conv2d(x, values, None, topo, shape, *window, True)[:, 16:32] == 0).all()
    bias = torch.randn(48)
    y = torch.ops.ddst.conv2d(x, values, bias, topo, shape, *window, True)
    assert torch.equal(y[:, 16:32], bias[16:32, None, None].expand(8, 16, 12, 12))


def test_outside_of_edge_blocks_is_zero_even_next_to_nan() -> None:
    shape = [20, 21, 3, 3]
    mask = torch.ones(topology.mask_shape(shape, (16, 16)), dtype=torch.bool)
    x, gy = torch.full((2, 21, 5, 5), float("nan")), torch.full((2, 20, 5, 5), float("inf"))
    grad = torch.ops.ddst.conv2d_weight_grad(
        gy, x, topology.build_topology(mask), shape, [16, 16], [1, 1], [1, 1], [1, 1]
    )
    outside = ~topology.inside(mask, shape, (16, 16))
    assert outside.any() and (grad[outside] == 0).all()
    assert grad[~outside].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.randn(8, 16, 12, 12)}, r"input has 16 channels .*expected 32"),
        ({"input": torch.randn(32, 12, 12)}, r"input has shape \[32, 12, 12\], expected 4"),
        ({"input": torch.randn(8, 32, 12, 12).double()}, "input has dtype Double, expected Float like values"),
        ({"values": torch.randn(3, 16, 16)}, "values has 3 blocks, expected"),
        ({"values": torch.randn(3, 16)}, r"values has shape \[3, 16\], expected \[nnz, b_out, b_in\]"),
        ({"bias": torch.randn(47)}, r"bias has shape \[47\], expected \[48\]"),
        ({"topology": torch.zeros(8, dtype=torch.int32)}, "topology has 8 numbers, expected"),
        ({"topology": torch.zeros(7, dtype=torch.int64)}, "topology has dtype Long, expected Int"),
        ({"weight_shape": [48, 32, 3]}, "weight_shape has 3 numbers, expected 4"),
        ({"stride": [0, 1]}, r"stride is \[0, 1\], expected two ints of at least 1"),
        ({"dilation": [9, 9]}, "is smaller than the kernel"),
        ({"padding": [0, 1_200_000_000]}, "makes an output of .* expected at most 2\\^31 - 1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    x, values, topo, shape = example()
    arguments: dict[str, object] = {"input": x, "values": values, "bias": None, "topology": topo}
    arguments |= {"weight_shape": shape, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    with pytest.raises(ValueError, match=message):
        torch.ops.ddst.conv2d(**(arguments | change), channels_last=True)


def test_a_topology_of_another_grid_is_refused() -> None:
    x, values, topo, shape = example()
    broken = topo.clone()
    broken[-1] = 1000  # a block id past the end: the kernels would read outside values
    with pytest.raises(ValueError, match="topology does not describe"):
        torch.ops.ddst.conv2d(x, values, None, broken, shape, [1, 1], [1, 1], [1, 1], True)


if __name__ == "__main__":
    if sys.argv[1] == "digests":
        print(*[weight_grad_digest(threads) for threads in (1, 2, 3)])
        sys.exit()
    print(torch.ops.ddst.cpu_capability())
    run_problems(int(sys.argv[1]), int(sys.argv[2]))
    print(sys.argv[2])
