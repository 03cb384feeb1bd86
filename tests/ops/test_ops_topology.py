"""The topology vector as the operators read it: rewritten in place, and refused unless it is what it must be."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ddst.ops import conv2d, linear
from helpers.dense import mask_dims, pack_blocks, topology_of
from helpers.problems import Case, ConvProblem, LinearProblem, between_guards, make_mask
from helpers.sparse import BACKENDS, Problem, apply, call, forward_and_grads, op_arguments
from helpers.tolerances import assert_close

CONV = ConvProblem(channels=(20, 37), kernel=(2, 2), size=(3, 4), mask="0.4", slots="scattered")
PROBLEMS: list[Problem] = [CONV, LinearProblem(features=(50, 43), mask="0.3", slots="scattered")]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=["conv", "linear"])


def moved(case: Case, seed: int) -> Case:
    """The same tensors, other blocks in the same number of slots: a case of its own, with a new vector."""
    g = torch.Generator().manual_seed(seed)
    count = case.slots.numel()
    ranks = make_mask("0.4", case.weight_shape, case.block, g).flatten().nonzero()[:, 0]
    ranks = torch.cat([ranks[:count], torch.full((count,), -1)])[:count]
    slots = ranks[torch.randperm(count, generator=g)].int()
    mask = torch.zeros(case.mask.numel(), dtype=torch.bool)
    mask[slots[slots >= 0].long()] = True
    weight = torch.randn(case.weight_shape, generator=g).to(case.values.dtype)
    values = pack_blocks(weight, slots, case.block)
    values[slots < 0] = float("nan")
    dims = case.mask.shape
    return replace(case, values=values, slots=slots, mask=mask.view(dims), topology=topology_of(slots, dims))


def assert_right(case: Case, backend: str) -> None:
    y, *grads = forward_and_grads(case, backend)
    assert_close(y, case.dense(*(None if t is None else t.double() for t in (case.x, case.values, case.bias))))
    for got, want in zip(grads, case.dense_grads(), strict=True):
        assert got is not None and want is not None
        assert_close(got, want)


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("backend", BACKENDS)
@each_problem
def test_a_vector_rewritten_in_place_is_what_the_next_call_computes_with(problem: Problem, backend: str) -> None:
    case = problem.build(torch.float32)
    vector = case.topology
    for seed in range(5):
        assert_right(replace(case, topology=vector), backend)
        case = moved(case, seed)
        assert not torch.equal(vector, case.topology)
        vector.copy_(case.topology)


@each_problem
def test_a_compiled_call_follows_a_rewritten_vector(problem: Problem) -> None:
    case = problem.build(torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = conv2d if isinstance(problem, ConvProblem) else linear
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    vector = case.topology.clone()
    for seed in range(3):
        other = moved(case, seed)
        vector.copy_(other.topology)
        y = compiled(case.x, other.values, None, vector, case.weight_shape, **case.kwargs)
        assert_close(y, other.dense(case.x.double(), other.values.double(), None))
    assert counter.frame_count == 1


def slots_of(vector: Tensor, dims: torch.Size) -> Tensor | None:
    """The `slot_blocks` that make this vector, or None where none does: it is malformed.

    Column and tap of a free slot mean nothing, and may be anything.
    """
    rows, cols, taps = dims[0], dims[1], torch.Size(dims[2:]).numel()
    count = (vector.numel() - rows - cols - 2) // 5
    ranks = []
    sections = vector[rows + cols + 2 :].clone().view(5, count)
    for slot in range(count):
        row, col, tap = sections[:3, slot].tolist()
        if row == rows:
            sections[1:3, slot] = torch.tensor([cols, 0])
        elif not (0 <= row < rows and 0 <= col < cols and 0 <= tap < taps):
            return None
        ranks.append(-1 if row == rows else (row * cols + col) * taps + tap)
    slots = torch.tensor(ranks, dtype=torch.int32)
    if len(set(ranks) - {-1}) != int((slots >= 0).sum()):
        return None
    canonical = torch.cat([vector[: rows + cols + 2], sections.flatten()])
    return slots if torch.equal(canonical, topology_of(slots, dims)) else None


def corrupted(vector: Tensor, slots: int, seed: int) -> Tensor:
    """One entry changed, or two swapped."""
    rng = random.Random(seed)
    result, at = vector.clone(), rng.randrange(vector.numel())
    if rng.random() < 0.3:
        other = rng.randrange(vector.numel())
        result[at], result[other] = vector[other], vector[at]
    else:
        near = int(vector[at]) + rng.choice([-2, -1, 1, 2])
        wild = rng.choice([-(2**31), 2**31 - 1, -1, slots, slots + 1, rng.randint(-5, 2 * slots + 5)])
        result[at] = rng.choice([near, wild])
    return result


def results(problem: Problem, case: Case) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """(name, call, what is right) of the registered operators that take a topology."""
    arguments: dict[str, Any] | None = op_arguments(problem, case)
    assert arguments is not None
    bias = None if case.bias is None else case.bias.double()
    wanted: dict[str, Callable[[], Tensor]] = {
        "": lambda: case.dense(case.x.double(), case.values.double(), bias),
        "input_grad": lambda: case.dense_grads()[0],
        "weight_grad": lambda: case.dense_grads()[1],
    }
    for name, args in arguments.items():
        if (suffix := name.partition("_")[2]) in wanted:
            yield name, lambda name=name, args=args: call(name, args), wanted[suffix]


@pytest.mark.usefixtures("poison_outputs")
@each_problem
def test_a_corrupted_vector_is_refused_or_still_says_what_is_computed(problem: Problem) -> None:
    case = problem.build(torch.float32)
    accepted = refused = 0
    for seed in range(1000):
        vector = corrupted(case.topology, case.slots.numel(), seed)
        slots = slots_of(vector, case.mask.shape)
        tried = replace(case, topology=between_guards(vector))
        if slots is not None:
            values = case.values.masked_fill((slots < 0)[:, None, None], float("nan"))
            values = values.masked_fill((~case.active & (slots >= 0))[:, None, None], 0.5)
            tried = replace(tried, slots=slots, values=values)
        for name, compute, right in results(problem, tried):
            if slots is None:
                with pytest.raises(ValueError, match=f"ddst::{name}: topology "):
                    compute()
                refused += 1
            else:
                assert_close(compute(), right(), f"{name}, seed {seed}")
                accepted += 1
    assert accepted > 60 and refused > 1500


def sections(case: Case) -> dict[str, Tensor]:
    """Views of the sections of a case's vector by name, counted here by hand."""
    rows, cols = mask_dims(case.weight_shape, case.block)[:2]
    slots = case.slots.numel()
    names = ("row_ptr", "col_ptr", "block_row", "block_col", "block_tap", "row_order", "col_order")
    sizes = (rows + 1, cols + 1, *[slots] * 5)
    return dict(zip(names, case.topology.split(sizes), strict=True))


def _swap(section: Tensor, i: int, j: int) -> None:
    section[[i, j]] = section[[j, i]]


def _named_twice(part: dict[str, Tensor]) -> None:
    part["row_order"][1] = part["row_order"][0]


def _named_twice_by_columns(part: dict[str, Tensor]) -> None:
    part["col_order"][1] = part["col_order"][0]


def _free_slot_in_a_row(part: dict[str, Tensor]) -> None:
    part["row_order"][0] = part["row_order"][-1]


def _free_slot_in_a_column(part: dict[str, Tensor]) -> None:
    part["col_order"][0] = part["col_order"][-1]


def _block_in_two_slots(part: dict[str, Tensor]) -> None:
    one, two = part["row_order"][:2].tolist()
    for name in ("block_row", "block_col", "block_tap"):
        part[name][two] = part[name][one]


def _block_among_the_free(part: dict[str, Tensor]) -> None:
    # One slot fewer in the last row and column with blocks, and its triple left as it was.
    for ptr in (part["row_ptr"], part["col_ptr"]):
        ptr[ptr == ptr[-1].item()] -= 1


def _more_blocks_than_slots(part: dict[str, Tensor]) -> None:
    part["row_ptr"][-1] = part["col_ptr"][-1] = part["row_order"].numel() + 1


def _negative_count(part: dict[str, Tensor]) -> None:
    part["row_ptr"][-1] = part["col_ptr"][-1] = -1


def _falling_pointer(part: dict[str, Tensor]) -> None:
    part["row_ptr"][1] = part["row_ptr"][2] + 1


def _negative_pointer(part: dict[str, Tensor]) -> None:
    part["row_ptr"][0] = -1


MALFORMED = {
    "a slot named twice by rows": _named_twice,
    "a slot named twice by columns": _named_twice_by_columns,
    "a free slot named by a row": _free_slot_in_a_row,
    "a free slot named by a column": _free_slot_in_a_column,
    "a block in two slots": _block_in_two_slots,
    "an active block behind the last row": _block_among_the_free,
    "more blocks than slots": _more_blocks_than_slots,
    "a negative number of blocks": _negative_count,
    "a row that ends before it begins": _falling_pointer,
    "a negative pointer": _negative_pointer,
    "a first pointer above zero": lambda part: part["col_ptr"][0].fill_(1),
    "rows unsorted": lambda part: _swap(part["row_order"], 0, 1),
    "columns unsorted": lambda part: _swap(part["col_order"], 0, 1),
    "free slots unsorted": lambda part: _swap(part["row_order"], -1, -2),
    "free slots of columns in another order": lambda part: _swap(part["col_order"], -1, -2),
    "a slot past the end": lambda part: part["row_order"][0].fill_(part["row_order"].numel()),
    "a free slot past the end": lambda part: part["row_order"][-1].fill_(part["row_order"].numel()),
    "a negative slot": lambda part: part["col_order"][0].fill_(-1),
    "a row past the grid": lambda part: part["block_row"][part["row_order"][0].long()].fill_(1000),
    "a column below zero": lambda part: part["block_col"][part["row_order"][0].long()].fill_(-1),
    "a tap past the kernel": lambda part: part["block_tap"][part["row_order"][0].long()].fill_(1000),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
@each_problem
def test_a_malformed_vector_is_refused(problem: Problem, change: Callable[[dict[str, Tensor]], None]) -> None:
    case = replace(problem, mask="full").build(torch.float32)
    full = case.slots.clone()
    full[full == 1] = -1  # at least two free slots
    case = replace(case, slots=full, topology=topology_of(full, case.mask.shape))
    before = case.topology.clone()
    change(sections(case))
    assert not torch.equal(case.topology, before) and slots_of(case.topology, case.mask.shape) is None
    for name, compute, _ in results(problem, case):
        with pytest.raises(ValueError, match=f"ddst::{name}: topology does not describe {full.numel()} slots"):
            compute()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("more", [-6, -5, -1, 1, 4, 5, 10])
@each_problem
def test_a_vector_of_another_length_is_refused(problem: Problem, more: int, backend: str) -> None:
    case = problem.build(torch.float32)
    vector = torch.cat([case.topology, torch.zeros(max(more, 0), dtype=torch.int32)])[: case.topology.numel() + more]
    case = replace(case, topology=vector)
    with pytest.raises(ValueError, match="topology"):
        apply(case, backend)
    for _, compute, _ in results(problem, case):
        with pytest.raises(ValueError, match="topology"):
            compute()


@each_problem
def test_values_of_another_number_of_slots_are_refused(problem: Problem) -> None:
    case = problem.build(torch.float32)
    slots = torch.cat([case.slots, torch.tensor([-1], dtype=torch.int32)])
    case = replace(case, topology=topology_of(slots, case.mask.shape))
    expected = f"values has {slots.numel() - 1} slots, expected {slots.numel()} as in topology"
    for name, compute, _ in results(problem, case):
        if not name.endswith("weight_grad"):
            with pytest.raises(ValueError, match=expected):
                compute()


@pytest.mark.parametrize("backend", [-1, 2, 3, 4, 5, 2**40])
@each_problem
def test_a_code_of_no_backend_on_the_cpu_is_refused(problem: Problem, backend: int) -> None:
    case = problem.build(torch.float32)
    arguments = op_arguments(problem, case)
    assert arguments is not None
    for name, args in arguments.items():
        if not name.endswith("block_scores"):
            assert torch.equal(call(name, (*args, 1)), call(name, args))
            with pytest.raises(
                ValueError, match=rf"ddst::{name}: backend is {backend}, expected 0 \(auto\) or 1 \(cpu\)"
            ):
                call(name, (*args, backend))


def test_no_schema_has_a_string() -> None:
    # torch's stable ABI never frees one: every call would keep its memory.
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("ddst::"):
            schema = getattr(torch.ops.ddst, name.removeprefix("ddst::")).default._schema
            assert not re.search(r"\bstr\b", str(schema)), schema
