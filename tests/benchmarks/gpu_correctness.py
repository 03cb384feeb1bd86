"""The correctness part of `make gpu`, run on the CPU's operators: right ones pass, and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddst import SparseConv2d, backends
from ddst.benchmarks.gpu import calls, correctness, problems, workers
from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.correctness import Group, compare
from ddst.benchmarks.gpu.problems import Shape, Tensors

# "aligned" is replayed, "ragged" has edge blocks and empty lines, "linear" is the other operator.
SHAPES = (
    Shape("aligned", blocks=(2, 2), size=(5, 4), mask="0.4"),
    Shape("ragged", blocks=(3, 3), ragged=(5, 3), size=(4, 3), mask="lines"),
    Shape("linear", blocks=(3, 2), size=(0, 0), batch=5),
)
GROUP = Group("cpu", "fp32", (16, 32), "cpu", repeats=2, shapes=SHAPES)
Work = Callable[[], Tensor]
bound = calls.bound


def wrongs(group: Group = GROUP) -> list[str]:
    return correctness.check_all([group], 0, Deadline(100.0))["wrong"]


def plant(monkeypatch: pytest.MonkeyPatch, fault: Callable[[str, list[Any], Work], Work]) -> None:
    """Lets a fault wrap every call that is checked."""

    def faulty(name: str, arguments: list[Any], *rest: Any) -> Work:
        return fault(name, arguments, bound(name, arguments, *rest))

    monkeypatch.setattr(calls, "bound", faulty)


def test_the_cpus_operators_are_right_in_every_check() -> None:
    part = correctness.check_all([GROUP, replace(GROUP, block=(16, 16))], 0, Deadline(100.0))
    assert part["wrong"] == []
    (first, _) = part["groups"]
    # normal and whole numbers on each shape; two masks, the first again, two exchanges under replay; a change in place.
    per_op = 2 * len(SHAPES) + 2 * 5 + 2
    assert first["checked"]["forward"] == first["checked"]["dgrad"] == first["checked"]["wgrad"] == per_op
    assert first["checked"]["scores"] == per_op - 2 - 2 * 2
    assert first["checked"]["layer"] == 2 * 2 * 5  # two layers, two masks
    assert first["checked"]["plain"] == 2 * 2 + 2 * 5 + 2
    assert set(first["refused"]) == {"no operator with a fused ReLU"}
    assert part["checked"] == sum(sum(group["checked"].values()) for group in part["groups"])
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["conv2d", "conv2d_input_grad", "conv2d_weight_grad", "linear_block_scores"])
def test_a_result_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def off(called: str, arguments: list[Any], work: Work) -> Work:
        return (lambda: work() * 1.0001) if called == name else work

    plant(monkeypatch, off)
    found = wrongs()
    assert any("relative error" in why for why in found)
    if name != "linear_block_scores":
        assert any("whole numbers: " in why and "entries are not exact" in why for why in found)


def test_an_unwritten_entry_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def partly(called: str, arguments: list[Any], work: Work) -> Work:
        def run() -> Tensor:
            result = work()
            fresh = torch.empty_like(result)  # holds NaN here, as every fresh memory does
            fresh[:-1] = result[:-1]
            return fresh

        return run if called == "conv2d_input_grad" else work

    plant(monkeypatch, partly)
    assert any("dgrad of aligned: " in why and "are not finite" in why for why in wrongs())


def test_other_bits_when_repeated_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def unsteady(called: str, arguments: list[Any], work: Work) -> Work:
        def run() -> Tensor:
            counted.append(1)
            return work() * (1 + 2.0**-22 * (len(counted) % 2))

        return run if called == "conv2d" else work

    plant(monkeypatch, unsteady)
    assert any("forward of aligned: other bits when repeated" in why for why in wrongs())


def test_values_outside_the_weight_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def spilling(called: str, arguments: list[Any], work: Work) -> Work:
        def run() -> Tensor:
            result = work()
            result[result == 0] = 1e-12
            return result

        return run if called == "conv2d_weight_grad" else work

    plant(monkeypatch, spilling)
    assert any("wgrad of ragged: not zero outside the weight" in why for why in wrongs())


def test_an_index_kept_across_a_change_in_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[int, Tensor] = {}
    alive: list[Tensor] = []  # so that no address is another tensor's later

    def stale(called: str, arguments: list[Any], work: Work) -> Work:
        if called != "linear":
            return work
        topology = arguments[3]
        alive.append(topology)
        first = kept.setdefault(topology.data_ptr(), topology.clone())
        return lambda: torch.ops.ddst.linear(*arguments[:3], first, *arguments[4:])

    plant(monkeypatch, stale)
    found = wrongs()
    assert found
    assert all("after the index changed in place" in why or "exchange" in why for why in found)


def test_a_free_slot_that_is_read_or_not_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(called: str, arguments: list[Any], work: Work) -> Work:
        def reading() -> Tensor:
            return work() + 0 * arguments[1].sum()

        def leaving() -> Tensor:
            result = work()
            result[-1] = float("nan")
            return result

        return {"conv2d": reading, "linear_weight_grad": leaving}.get(called, work)

    plant(monkeypatch, careless)
    found = wrongs()
    assert any("forward of aligned: " in why and "are not finite" in why for why in found)
    assert any("wgrad of linear: " in why and "are not finite" in why for why in found)


def test_lists_that_are_not_rewritten_at_an_exchange_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph walks the lists of the topology that it was captured with."""

    def captured(called: str, arguments: list[Any], work: Work) -> Work:
        first = arguments[3].clone()
        return (lambda: torch.ops.ddst.linear(*arguments[:3], first, *arguments[4:])) if called == "linear" else work

    plant(monkeypatch, captured)
    found = wrongs()
    assert any("forward replayed, linear, exchange 1" in why for why in found)
    assert not any("mask 1" in why for why in found)


def test_a_graph_that_keeps_its_first_numbers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(called: str, arguments: list[Any], work: Work) -> Work:
        first = arguments[1].clone()
        return (lambda: torch.ops.ddst.linear(arguments[0], first, *arguments[2:])) if called == "linear" else work

    plant(monkeypatch, frozen)
    assert any("forward replayed, linear, mask 1: relative error" in why for why in wrongs())


def test_an_error_is_wrong_and_the_rest_is_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(called: str, arguments: list[Any], work: Work) -> Work:
        def run() -> Tensor:
            raise RuntimeError("out of resource: shared memory")

        return run if called == "conv2d" else work

    plant(monkeypatch, failing)
    report = correctness.check_group(GROUP)
    assert any("forward of aligned: RuntimeError: out of resource" in why for why in report["wrong"])
    assert report["checked"]["wgrad"] > 0


def test_a_lost_device_ends_the_group_with_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashing(called: str, arguments: list[Any], work: Work) -> Work:
        def run() -> Tensor:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return run if called == "conv2d_weight_grad" else work

    plant(monkeypatch, crashing)
    with pytest.raises(workers.DeviceLostError, match="the device was lost at wgrad of aligned") as caught:
        correctness.check_group(GROUP)
    assert caught.value.result["checked"]["dgrad"] == 1
    assert caught.value.result["wrong"]


def test_what_is_refused_whole_or_has_no_time_left_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert correctness.check_all([], 0, Deadline(1.0))["wrong"] == ["no backend is usable: nothing was checked"]
    late = correctness.check_all([GROUP], 0, Deadline(0.0))
    assert late["wrong"] == ["cpu fp32 16x32: not begun: no time was left"]

    def refuse(*_: Any) -> Work:
        raise calls.RefusedError("not today")

    monkeypatch.setattr(calls, "bound", refuse)
    monkeypatch.setattr(backends, "supports", lambda *_: (False, "nor tomorrow"))
    found = wrongs()
    (why,) = (one for one in found if "half block" not in one)
    assert "nothing was checked, all refused" in why
    assert "not today" in why and "nor tomorrow" in why
    assert all("nor tomorrow" in one for one in found)


def test_a_layer_whose_mask_change_is_not_seen_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseConv2d, "set_block_mask", lambda *_: None)
    found = wrongs()
    assert found
    assert all("SparseConv2d" in why for why in found)


def test_groups_are_every_kind_and_block_with_the_important_first() -> None:
    found, refusals = correctness.groups("cpu")
    assert str(found[0]) == "cpu tf32 32x32"
    assert [(g.kind, g.block) for g in found] == [(k, b) for k in ("tf32", "fp32") for b in calls.BLOCKS]
    assert set(refusals) == {"cpu bf16", "cpu fp16"}  # which the CPU's operators leave to the caller
    assert "float32 and float64" in refusals["cpu bf16"]
    assert sorted(calls.BLOCKS) == [(a, b) for a in (16, 32, 64) for b in (16, 32, 64)]


def test_comparison_of_empty_zero_and_misshapen_results() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    assert compare(torch.zeros(3), zeros, "fp32") == (0.0, None)
    assert compare(torch.full((3,), 1e-30), zeros, "fp32")[1] == "not zero where zero is the result"
    assert compare(torch.zeros(0), torch.zeros(0).double(), "fp32")[1] is None
    assert "shape" in str(compare(torch.zeros(2), zeros, "fp32")[1])
    assert "dtype" in str(compare(zeros, zeros, "fp32")[1])
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert compare(third.bfloat16(), third, "bf16", exact=True)[1] is None
    assert compare(third.bfloat16() + 2.0**-9, third, "bf16", exact=True)[1] is not None
    assert compare(third.bfloat16() * 1.008, third, "bf16", slack=4.0)[1] is None


def test_problems_are_guarded_and_shaped_as_said() -> None:
    for shape in problems.SHAPES:
        tensors = Tensors.make(shape, (16, 32), torch.float32, "cpu", 0)
        for tensor in (tensors.values, tensors.input, tensors.grad_output):
            memory = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
            assert memory[: problems.GUARD].isnan().all()
            assert memory[-problems.GUARD :].isnan().all()
            assert tensor.storage_offset() % 16 == 0
        free = tensors.slots < 0
        assert free.sum() == problems.FREE and tensors.values[free].isnan().all()
        assert all(t.isfinite().all() for t in (tensors.values[~free], tensors.input, tensors.grad_output))
        if not shape.linear:
            assert tensors.input.is_contiguous(memory_format=torch.channels_last) == shape.channels_last
    names = [shape.name for shape in problems.SHAPES]
    assert set(correctness.REPLAYED) | set(correctness.FINISHES) <= set(names)
    for seed, shape in enumerate(problems.SHAPES):  # an empty row and column, and both edges in use
        if shape.mask == "lines":
            mask = Tensors.make(shape, (16, 16), torch.float32, "cpu", seed).mask
            mask = mask.view(*mask.shape[:2], -1).any(2)
            assert not mask.any(0).all() and not mask.any(1).all()
            assert mask[-1].any() and mask[:, -1].any() and min(shape.ragged) > 0


@pytest.mark.parametrize(
    "said, lost",
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("ddst_cuda::conv2d_gather: CUDA error 719 (unspecified launch failure)", True),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("ddst_cuda::conv2d_gather: CUDA error 1 (invalid argument)", False),
        ("out of resource: shared memory, Required: 300000, Hardware limit: 232448", False),
    ],
)
def test_only_errors_that_stay_end_a_process(said: str, lost: bool) -> None:
    assert correctness.device_is_lost(RuntimeError(said)) == lost


def test_forms_of_the_kernels_are_calls_that_force_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddst.ops.cuda import hopper

    monkeypatch.setattr(hopper, "device_refusal", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    names = ["cuda/N=16", "cuda/N=64", "cuda/K=32", "cuda/im2col", "cuda/mma.sync"]
    assert calls.forms("cuda", torch.bfloat16) == names
    assert calls.forms("cpu", torch.bfloat16) == []
    for backend, choice in calls.FORMS.items():
        with calls.forcing(backend):
            assert hopper._forced == [choice]
    with calls.forcing("cuda"):
        assert hopper._forced == []
    monkeypatch.setattr(hopper, "device_refusal", lambda *_: "none here")
    assert calls.forms("cuda", torch.bfloat16) == []
