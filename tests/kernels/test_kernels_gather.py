"""Forward pass and input gradient of the Triton kernels, in the interpreter, against dense torch in float64.

Sums of small whole numbers are exact in float32 whatever their order, so that results are compared bit by bit there:
with the reference rounded once to the kernel's dtype.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from ddst import kernels
from ddst.kernels import gather
from ddst.kernels.configs import DTYPES, SIDES, GatherConfig, Problem, gather_candidates, gather_fits
from ddst.kernels.launch import Launch, native, native_rows
from ddst.topology import build_topology
from helpers import scale
from helpers.dense import mask_of, placed_blocks, row_major, topology_of
from helpers.problems import SLOTS, Case, ConvProblem, LinearProblem, between_guards, lay_out
from helpers.tolerances import assert_close

BLOCKS = [(out, into) for out in SIDES for into in SIDES]
OPS = ("forward", "input_grad")


def scattered(problem: ConvProblem | LinearProblem, dtype: torch.dtype, numbers: str = "normal") -> Case:
    """A problem's tensors with blocks scattered over slots, NaN in the free ones and on both sides of every operand."""
    case = replace(problem, slots="scattered").build(dtype, numbers)
    tensors = {name: getattr(case, name) for name in ("x", "grad", "values", "bias", "topology")}
    if problem.layout == "expanded":  # many elements in one place: nothing can be written there
        del tensors["x"]
    return replace(case, **{name: between_guards(t) for name, t in tensors.items() if t is not None})


def holding(case: Case, slots: Tensor) -> Case:
    """The case with other blocks in as many slots: each holds what it held, or twos if it was free."""
    values = case.values.nan_to_num(2.0).masked_fill((slots < 0)[:, None, None], float("nan"))
    dims = case.mask.shape
    topology = between_guards(topology_of(slots, dims))
    mask = mask_of(slots, dims)
    return replace(case, values=between_guards(values), slots=slots, topology=topology, mask=mask)


def run(op: str, problem: ConvProblem | LinearProblem, case: Case, config: GatherConfig | None = None) -> Tensor:
    """The kernel's result."""
    settings: dict[str, Any] = {"config": config}
    if isinstance(problem, LinearProblem):
        if op == "forward":
            return kernels.linear(case.x, case.values, case.bias, case.topology, case.weight_shape, **settings)
        return kernels.linear_input_grad(case.grad, case.values, case.topology, case.weight_shape, **settings)
    explicit = problem.explicit()
    assert explicit is not None
    if op == "forward":
        args = (case.x, case.values, case.bias, case.topology, case.weight_shape)
        return kernels.conv2d(*args, *explicit, True, **settings)
    args = (case.grad, case.values, case.topology, case.weight_shape, case.x.shape[2:])
    return kernels.conv2d_input_grad(*args, *explicit, True, **settings)


def expected(op: str, case: Case) -> Tensor:
    """The same in float64."""
    if op == "input_grad":
        return case.dense_grads()[0]
    return case.dense(case.x.double(), case.values.double(), None if case.bias is None else case.bias.double())


def interpreted(op: str, block: tuple[int, int]) -> list[GatherConfig]:
    """All candidates that are different computations: warps, stages and copies are the compiler's business."""
    listed = [c for dtype in DTYPES for c in gather_candidates(op, dtype, block)]
    return list(dict.fromkeys(replace(c, warps=4, stages=3, copy=16) for c in listed))


def describe(op: str, problem: ConvProblem, dtype: torch.dtype, block: tuple[int, int]) -> Problem:
    """What configurations are asked with."""
    explicit = problem.explicit()
    assert explicit is not None
    stride, padding, dilation = ((int(a), int(b)) for a, b in explicit)
    sizes = (problem.batch or 1, problem.size, problem.output_size)
    return Problem(op, False, dtype, block, problem.weight_shape, stride, padding, dilation, *sizes, 1)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poison_outputs")
def test_every_configuration_is_exact(op: str, block: tuple[int, int]) -> None:
    """Ragged channels, several tiles of pixels, the last partly empty; the gradient with phases of unequal sizes; where
    rows share a program, a group of them and a row that is left over.
    """
    for dtype in DTYPES:
        listed = interpreted(op, block) if dtype == torch.float32 else [None]
        for rows in sorted({config.rows if config else 1 for config in listed}):
            blocks = (1, rows) if op == "forward" else (rows, 1)
            problem = ConvProblem(
                batch=2, size=(5, 8), kernel=(3, 2), padding=(1, 2), stride=1 if op == "forward" else (1, 3),
                mask="0.4", channels=(blocks[0] * block[1] + 8, blocks[1] * block[0] + 8), block=block,
                layout="channels_last", grad_layout="channels_last",
            )  # fmt: skip
            case = scattered(problem, dtype, "whole")
            case.values.clamp_(-1, 1)
            reference = expected(op, case)
            assert reference.abs().max() <= 256, "bfloat16 holds the results exactly"
            described = describe(op, problem, dtype, block)
            for config in listed:
                if config is None or config.rows == rows:
                    assert config is None or gather_fits(config, described)
                    assert torch.equal(run(op, problem, case, config).double(), reference), (dtype, config)


GEOMETRIES = [
    ConvProblem(stride=(2, 3), padding=(4, 5), size=(5, 6)),  # padding wider than the kernel
    ConvProblem(kernel=(4, 4), stride=2, size=(6, 7)),
    ConvProblem(kernel=(1, 1), padding=0, stride=2, size=(7, 8)),  # input pixels that no output reads
    ConvProblem(kernel=(1, 1), padding=1),
    ConvProblem(kernel=(2, 3), stride=(4, 1), dilation=(1, 2), padding=(0, 2), size=(9, 5)),
    ConvProblem(dilation=(3, 2), padding=(3, 0), size=(8, 9), stride=(1, 2)),
    ConvProblem(dilation=2, stride=2, padding=2, size=(6, 6)),  # one phase gets every tap
    ConvProblem(kernel=(7, 7), padding=3, size=(3, 2), mask="0.1"),  # more taps than bits, kernel larger than the image
    ConvProblem(kernel=(1, 40), padding=(0, 20), size=(2, 9), mask="0.1"),  # taps beyond five bits
    ConvProblem(size=(1, 1), batch=3, stride=2),  # phases without pixels
    ConvProblem(size=(3, 3), padding=0, bias=False),
    ConvProblem(mask="none"),
    ConvProblem(mask="full", size=(4, 4)),
    ConvProblem(mask="empty_lines", channels=(40, 48), batch=1),
    ConvProblem(channels=(3, 1), stride=2, kernel=(4, 4), size=(8, 8)),
    ConvProblem(batch=0),
]
VARIETIES = [
    None,
    GatherConfig(),
    GatherConfig(bits=False),
    GatherConfig(fuse=2),
    GatherConfig(rows=2),
    GatherConfig(box=(2, 4, 8)),
    GatherConfig(box=(2, 4, 8), rows=4),
]


@pytest.mark.parametrize("number, problem", list(enumerate(GEOMETRIES)), ids=str)
@pytest.mark.usefixtures("poison_outputs")
def test_geometries(number: int, problem: ConvProblem) -> None:
    """Each in every second configuration, the others where the next geometry is tried (``make test-all``: in all)."""
    if problem.channels == ConvProblem().channels:
        problem = replace(problem, channels=(20, 28))
    problem = replace(problem, block=(16, 16))
    case = scattered(problem, torch.float32)
    for first, op in enumerate(OPS):
        reference = expected(op, case)
        fitting = [c for c in VARIETIES if c is None or gather_fits(c, describe(op, problem, torch.float32, (16, 16)))]
        assert len(fitting) >= 5
        for config in fitting if scale.everything() else fitting[(first + number) % 2 :: 2]:
            assert_close(run(op, problem, case, config), reference, f"{op} {config}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poison_outputs")
def test_rounding(op: str, dtype: torch.dtype) -> None:
    """Numbers that are not whole: summed in float32, rounded once. The interpreter cuts bfloat16 off instead."""
    problem = ConvProblem(channels=(70, 50), block=(16, 32), size=(5, 6))
    case = scattered(problem, dtype)
    assert_close(run(op, problem, case), expected(op, case))


LINEARS = [
    LinearProblem(batch=(16,), features=(72, 40), block=(16, 16)),
    LinearProblem(batch=(1,), features=(37, 45), block=(16, 32), mask="empty_lines"),
    LinearProblem(batch=(130,), features=(64, 64), block=(32, 16), bias=False),
    LinearProblem(batch=(67,), features=(100, 130), block=(64, 64), layout="transposed", grad_layout="strided"),
    LinearProblem(batch=(5,), features=(20, 40), block=(16, 16), mask="none", layout="expanded"),
    LinearProblem(batch=(0,), features=(20, 40), block=(16, 16)),
]


@pytest.mark.parametrize("problem", LINEARS, ids=str)
@pytest.mark.usefixtures("poison_outputs")
def test_linear(problem: LinearProblem) -> None:
    for dtype in DTYPES:
        case = scattered(problem, dtype, "whole")
        for op in OPS:
            for config in (None, GatherConfig(), GatherConfig(pixels=128, fuse=2))[
                : 3 if dtype == torch.float32 else 1
            ]:
                assert torch.equal(run(op, problem, case, config), expected(op, case).to(dtype)), (op, dtype, config)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.usefixtures("poison_outputs")
def test_layouts(layout: str, channels_last: bool) -> None:
    """Any strides of the operands; the result in the memory format that was asked for."""
    problem = ConvProblem(channels=(20, 24), block=(16, 16), layout=layout, grad_layout=layout, size=(3, 4))
    case = problem.build(torch.float32, "whole")
    explicit = problem.explicit()
    assert explicit is not None
    values = lay_out(case.values, "strided")
    shape = case.weight_shape
    y = kernels.conv2d(case.x, values, case.bias, case.topology, shape, *explicit, channels_last)
    grad = kernels.conv2d_input_grad(case.grad, values, case.topology, shape, (3, 4), *explicit, channels_last)
    for result, op in ((y, "forward"), (grad, "input_grad")):
        assert torch.equal(result.double(), expected(op, case))
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert result.stride() == torch.empty(result.shape, memory_format=memory_format).stride()


def test_operands_at_odd_addresses() -> None:
    """The kernels are compiled for aligned addresses; other operands are copied."""
    problem = ConvProblem(channels=(16, 16), block=(16, 16), size=(3, 4), bias=False, slots="permuted")
    case = problem.build(torch.float32, "whole")

    def odd(t: Tensor) -> Tensor:
        moved = torch.empty(t.numel() + 1)[1:].as_strided(t.shape, t.stride(), 1)
        return moved.copy_(t)

    moved = replace(case, x=odd(lay_out(case.x, "channels_last")), values=odd(case.values))
    for made, t in ((native(moved.x), moved.x), (native_rows(moved.values), moved.values)):
        assert t.data_ptr() % 16 != 0 and made.data_ptr() % 16 == 0
        assert torch.equal(made, t)
    ready = lay_out(case.x, "channels_last")
    assert native(ready) is ready and native_rows(case.values) is case.values, "no copy without need"
    explicit = problem.explicit()
    assert explicit is not None
    y = kernels.conv2d(moved.x, moved.values, None, case.topology, case.weight_shape, *explicit, True)
    assert torch.equal(y.double(), expected("forward", case))


SHARING = [ConvProblem(stride=2, padding=(1, 2), size=(5, 6)), ConvProblem(kernel=(2, 1), dilation=2, size=(6, 3))]


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products by NumPy have other last bits at other widths on some processors.

    Summed in float64 and rounded once they have the same.
    """
    matmul: Callable[..., np.ndarray] = np.matmul

    def rounded_once(a: np.ndarray, b: np.ndarray, dtype: Any = np.float64) -> np.ndarray:
        return matmul(a, b, dtype=np.float64).astype(dtype)

    monkeypatch.setattr(interpreter.np, "matmul", rounded_once)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poison_outputs", "products_in_order")
def test_rows_that_share_a_program_get_the_same_bits(op: str, rows: int) -> None:
    """As alone, of numbers that are not whole: several groups in every phase, the last of one row; a row, and a group,
    without blocks.
    """
    for problem in SHARING:
        channels = (16 * rows, 32 * rows + 8)  # rows and 2 · rows + 1 blocks
        channels = channels if op == "forward" else channels[::-1]
        problem = replace(problem, channels=channels, block=(16, 16), layout="channels_last", mask="0.5")
        case = scattered(problem, torch.float32)
        kept = case.mask.clone()
        lines = kept if op == "forward" else kept.transpose(0, 1)
        lines[1], lines[rows : 2 * rows] = False, False
        case = holding(case, case.slots.masked_fill(~kept.view(-1)[case.slots.clamp(min=0)], -1))
        alone = run(op, problem, case, GatherConfig())
        assert_close(alone, expected(op, case))
        shared = GatherConfig(rows=rows)
        for config in (shared, replace(shared, bits=False), replace(shared, box=(2, 4, 8))):
            if gather_fits(config, describe(op, problem, torch.float32, (16, 16))):
                assert torch.equal(run(op, problem, case, config), alone), config


SOME = [GatherConfig(), GatherConfig(fuse=2), GatherConfig(rows=2), GatherConfig(box=(2, 4, 8))]


@pytest.mark.parametrize("config", SOME, ids=str)
def test_relu(config: GatherConfig) -> None:
    """max(y, 0), with the bias inside, where there are no blocks too; a NaN stays."""
    problem = ConvProblem(channels=(20, 36), block=(16, 16), mask="empty_lines", size=(4, 3))
    case = problem.build(torch.float32, "whole")
    explicit = problem.explicit()
    assert explicit is not None and case.bias is not None
    args = (case.x, case.values, case.bias, case.topology, case.weight_shape, *explicit, True)
    y = kernels.conv2d(*args, relu=True, config=config)
    assert torch.equal(y.double(), expected("forward", case).relu())
    assert (y[:, 16:32] == case.bias[16:32].relu()[:, None, None]).all(), "block row 1 is empty"
    case.bias[5] = float("nan")
    assert kernels.conv2d(*args, relu=True, config=config)[:, 5].isnan().all()


@pytest.mark.parametrize("config", [*SOME, GatherConfig(rows=4)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_writes_the_whole_result_and_nothing_else(op: str, config: GatherConfig) -> None:
    problem = ConvProblem(channels=(20, 28), block=(16, 16), size=(5, 7), layout="channels_last")
    case = problem.build(torch.float32, "whole")
    described = describe(op, problem, torch.float32, (16, 16))
    reference = expected(op, case)
    area = torch.full((reference.numel() + 2048,), float("nan"))
    native = reference.contiguous(memory_format=torch.channels_last)
    result = area.as_strided(native.shape, native.stride(), 1024)
    if op == "forward":
        gather.forward(described, case.x, case.values, case.bias, case.topology, result, config=config)
    else:
        grad = lay_out(case.grad, "channels_last")
        gather.input_grad(described, grad, case.values, case.topology, result, config=config)
    assert torch.equal(result.double(), reference)
    assert area[:1024].isnan().all() and area[-1024:].isnan().all()


@pytest.mark.parametrize("config", [*SOME, GatherConfig(fuse=4)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_nan_in_a_block_stays_in_its_row(op: str, config: GatherConfig) -> None:
    """Of all blocks in turn: steps of several blocks must not touch those after a row, or block 0 in their place."""
    problem = ConvProblem(channels=(24, 24), block=(16, 16), kernel=(2, 1), size=(2, 3), mask="0.6", bias=False)
    case = scattered(problem, torch.float32, "whole")
    clean = expected(op, case)
    blocks = [(n, b) for n, b in enumerate(placed_blocks(case.slots, case.mask.shape)) if b is not None]
    assert len({b[0] for _, b in blocks}) == len({b[1] for _, b in blocks}) == 2 and len(blocks) % 4
    for slot, block in blocks:
        values = case.values.clone()
        values[slot] = float("nan")
        result = run(op, problem, replace(case, values=between_guards(values)), config).double()
        hit = torch.arange(24) // 16 == block[0 if op == "forward" else 1]
        assert torch.equal(result[:, ~hit], clean[:, ~hit])
        assert result[:, hit].isnan().any()


@pytest.mark.parametrize("config", [None, GatherConfig(rows=2)], ids=str)
def test_blocks_that_move_between_slots_are_followed(config: GatherConfig | None) -> None:
    """In place, also where another number of slots is free; and by a new topology."""
    problem = ConvProblem(channels=(32, 48), block=(16, 16), size=(3, 3), bias=False)
    explicit = problem.explicit()
    assert explicit is not None
    case = scattered(problem, torch.float32, "whole")
    topology = case.topology.clone()

    def check(case: Case, topology: Tensor) -> None:
        y = kernels.conv2d(case.x, case.values, None, topology, case.weight_shape, *explicit, True, config=config)
        assert torch.equal(y.double(), expected("forward", case))
        args, size, settings = (case.grad, case.values, topology), case.x.shape[2:], {"config": config}
        x = kernels.conv2d_input_grad(*args, case.weight_shape, size, *explicit, True, **settings)
        assert torch.equal(x.double(), expected("input_grad", case))

    check(case, topology)
    for seed, dims in ((1, (0, 1, 2)), (2, (1,))):
        slots = row_major(case.mask.flip(dims))[seed:]  # fewer blocks in as many slots
        slots = torch.cat([slots, slots.new_full((len(case.slots) - len(slots),), -1)])
        case = holding(case, slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(seed))])
        topology.copy_(case.topology)
        check(case, topology)
    other = replace(problem, mask="0.7").build(torch.float32, "whole", seed=3)
    check(other, other.topology)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poison_outputs")
def test_where_blocks_lie_does_not_change_a_bit(op: str) -> None:
    """Sums are added in the order of the blocks' places in the weight, whatever their slots."""
    problem = ConvProblem(channels=(40, 48), block=(16, 16), mask="0.6", size=(5, 4))
    cases = [replace(problem, slots=slots).build(torch.float32) for slots in SLOTS]
    configs = [GatherConfig(), GatherConfig(fuse=4), GatherConfig(rows=4), GatherConfig(box=(2, 4, 8))]
    for config in configs:
        if not gather_fits(config, describe(op, problem, torch.float32, (16, 16))):
            continue
        first, *others = (run(op, problem, case, config) for case in cases)
        assert all(torch.equal(first, other) for other in others), config


def large(rows: int, wide: int) -> Tensor:
    """Zeros, float16, in memory of which only the pages that are written to exist."""
    no_reserve = 0x4000  # mmap.MAP_NORESERVE of Python 3.13
    memory = mmap.mmap(-1, 2 * rows * wide, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float16).view(rows, wide)


@pytest.mark.parametrize("op", OPS)
def test_sources_beyond_int32(op: str) -> None:
    """The last rows of a source of more than 2**31 elements."""
    rows, wide = 2**11 + 3, 2**20
    source = large(rows, wide)
    mask = torch.zeros(1, wide // 16, dtype=torch.bool)
    mask[0, 0] = mask[0, -1] = True
    values = torch.randint(-3, 4, (2, 16, 16)).half()
    ends = torch.zeros(rows, 32).half()
    ends[-4:] = torch.randint(-3, 4, (4, 32)).half()
    source[-4:, :16], source[-4:, -16:] = ends[-4:, :16], ends[-4:, 16:]
    if op == "forward":
        result = kernels.linear(source, values, None, build_topology(mask), (16, wide))
        weight = torch.cat([values[0], values[1]], 1).T
    else:
        result = kernels.linear_input_grad(source, values, build_topology(mask.T), (wide, 16))
        weight = torch.cat([values[0], values[1]])
    assert torch.equal(result.double(), ends.double() @ weight.double())


def test_results_beyond_int32() -> None:
    """One block row of a result of more than 2**31 elements; the other programs are left out."""
    rows, wide = 2**11 + 3, 2**20
    one = (1, 1)
    problem = Problem("forward", True, torch.float16, (16, 16), (wide, 16, 1, 1), one, (0, 0), one, rows, one, one, 1)
    whole = gather.plan(problem, GatherConfig(), "ieee", False, False)
    last = wide // 16 - 1
    only = Launch(gather.gather, (-(-rows // 64),), (1, *whole.scalars[1:]), whole.constants, 4, 3)
    x, values = torch.randint(-3, 4, (rows, 16)).half(), torch.randint(-3, 4, (1, 16, 16)).half()
    ptr = torch.zeros(last + 2, dtype=torch.int32)
    ptr[-1] = 1
    zeros, result = torch.zeros(2, dtype=torch.int32), large(rows, wide)
    only(x, values, result, values, ptr, zeros, zeros, torch.tensor([last], dtype=torch.int32))
    assert torch.equal(result[:, -16:].double(), x.double() @ values[0].double().T)


@pytest.mark.parametrize("config", [*SOME[:3], GatherConfig(fuse=4), GatherConfig(box=(64, 1, 1))], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_values_beyond_int32(op: str, config: GatherConfig) -> None:
    """A block at the end of values of more than 2**31 elements."""
    at, one = 2**23 + 2, (1, 1)
    values = large(at + 1, 256).view(-1, 16, 16)
    values[at] = torch.randint(-3, 4, (16, 16))
    x, result = torch.randint(-3, 4, (2, 16)).half(), torch.empty(2, 16).half()
    problem = Problem(op, True, torch.float16, (16, 16), (16, 16, 1, 1), one, (0, 0), one, 2, one, one, 1)
    launch = gather.plan(problem, config, "ieee", False, False)
    source = x if config.box is None else gather._boxes(x, launch.constants)
    ptr = torch.tensor([at, at + 1], dtype=torch.int32)
    entries = torch.zeros(at + 2, dtype=torch.int32)
    ids = torch.full((at + 2, config.rows), -1, dtype=torch.int32)
    ids[:, 0] = torch.arange(at + 2)
    launch(source, values, result, values, ptr, entries, ids, entries)
    weight = values[at].double()
    assert torch.equal(result.double(), x.double() @ (weight.T if op == "forward" else weight))


def test_what_int32_cannot_count_is_refused() -> None:
    def plan(config: GatherConfig = GatherConfig(), **changes: Any) -> None:  # noqa: B008
        shape, one, size = (16, 16, 3, 3), (1, 1), (8, 8)
        problem = Problem("forward", False, torch.float16, (16, 16), shape, one, one, one, 1, size, size, 1)
        gather.plan(problem._replace(**changes), config, "ieee", False, False)

    plan()
    with pytest.raises(ValueError, match="count pixels in int32"):
        plan(images=2**25, input_size=(8, 8), output_size=(8, 8))
    with pytest.raises(ValueError, match="less than 2\\*\\*31 elements"):
        plan(input_size=(2**14, 2**14), output_size=(2**14, 2**14))
    with pytest.raises(ValueError, match="2097152 channel blocks apart"):
        plan(weight_shape=(16, 2**26, 3, 3), input_size=(1, 1), output_size=(1, 1))
    with pytest.raises(ValueError, match="config must fit"):
        plan(weight_shape=(16, 20, 3, 3), config=GatherConfig(box=(1, 8, 8)))


def test_supports() -> None:
    assert kernels.supports(torch.bfloat16, (64, 16))[0]
    assert kernels.supports(torch.float32, None)[0]
    assert "float64" in kernels.supports(torch.float64, (16, 16))[1]
    ok, reason = kernels.supports(torch.float32, (16, 8))
    assert not ok and "(16, 8)" in reason
