"""Every operator, pass, dtype and block of a backend against float64, on the device.

A group is one backend, one kind of product and one block; it holds all shapes of problems.py. Every result is compared
with dense torch in float64 on the same numbers, must be the same bits each time, and must be exact where the numbers
are small integers. Blocks lie in random slots; memory is NaN before a kernel writes it, around what it reads, and in
free slots. The same calls are captured in CUDA graphs and replayed on other numbers, and after blocks have moved.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ddst
from ddst import backends, index_cache, topology
from ddst.benchmarks.gpu import calls, workers
from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.environment import KINDS
from ddst.benchmarks.gpu.half_blocks import HALVES, Half
from ddst.benchmarks.gpu.journal import NOTHING, Progress
from ddst.benchmarks.gpu.problems import SHAPES, Shape, Tensors, in_slots
from ddst.benchmarks.gpu.results import in_a_line
from ddst.benchmarks.gpu.timing import precision, watch_of, without_cudnn

#: Largest relative errors: root mean square, and of the largest entry. Accumulation is in float32; the 16-bit kinds add
#: the rounding of the result, TF32 that of its operands to 11 bits.
TOLERANCES = {"fp32": (3e-6, 1e-5), "tf32": (1e-3, 4e-3), "fp16": (4e-4, 8e-4), "bf16": (3e-3, 6e-3)}
OPS = ("forward", "plain", "relu", "dgrad", "wgrad", "scores")
#: "plain" (no bias) and "relu" are compiled apart and differ in the last step only: these shapes do for them.
FINISHES = ("aligned", "ragged", "linear ragged")
REPLAYED = ("aligned", "4x4 stride 2", "linear")
#: Errors of CUDA that every later call of the process repeats. A capture that fails, or a launch that is refused
#: (too much shared memory, say), is none of them.
LOST = (
    *("illegal memory access", "illegal instruction", "misaligned address", "address space not", "program counter"),
    *("unspecified launch failure", "device-side assert", "hardware stack error", "launch timed out", "uncorrectable"),
)


@dataclass(frozen=True)
class Group:
    """What one process checks at a time."""

    backend: str
    kind: str
    block: tuple[int, int]
    device: str = "cuda"
    repeats: int = 4
    shapes: tuple[Shape, ...] = SHAPES

    def __str__(self) -> str:
        return f"{self.backend} {self.kind} {self.block[0]}x{self.block[1]}"


@dataclass
class Report:
    """What a group came to: results checked, those refused with reasons, those wrong, the largest errors."""

    group: str
    checked: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    worst: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def groups(
    device: str, kinds: Sequence[str] = tuple(KINDS), blocks: Sequence[tuple[int, int]] = calls.BLOCKS
) -> tuple[list[Group], dict[str, str]]:
    """Every group that a backend of the device says yes to, the most important kinds and blocks first; and the reasons
    where one says no: "backend kind" -> reason."""
    found, refusals = [], {}
    for kind in kinds:
        dtype, mode = KINDS[kind]
        for block in blocks:
            with precision(mode):
                answers = calls.usable(device, dtype, block)
            found += [Group(backend, kind, block, device) for backend, no in answers.items() if no is None]
            if block[0] == block[1]:
                found += [Group(backend, kind, block, device) for backend in calls.forms(device, dtype)]
            refusals |= {f"{backend} {kind}": no for backend, no in answers.items() if no is not None}
    return found, refusals


def check_all(
    chosen: Sequence[Group], processes: int, deadline: Deadline, progress: Progress = NOTHING
) -> dict[str, Any]:
    """The part "correctness": counts, largest errors, and in ``wrong`` what was wrong, unfinished or refused whole."""
    part: dict[str, Any] = {"groups": [], "checked": 0, "wrong": []}
    if not chosen:
        part["wrong"].append("no backend is usable: nothing was checked")
    proven = {group: progress.earlier(str(group)) for group in chosen}
    for report in proven.values():
        if report is not None:
            part["groups"].append(report)
            part["checked"] += sum(report["checked"].values())
    waiting = [group for group, report in proven.items() if report is None]
    for done in workers.run(check_group, waiting, processes, deadline):
        report = done.result or asdict(Report(str(done.task)))
        if done.trouble is not None:
            report["wrong"].append(done.trouble)
        elif not sum(report["checked"].values()):
            report["wrong"].append(f"nothing was checked, all refused: {dict(report['refused'])}")
        part["groups"].append(report)
        part["wrong"] += [f"{report['group']}: {why}" for why in report["wrong"]]
        part["checked"] += sum(report["checked"].values())
        progress.keep(str(done.task), report, part, not report["wrong"])
    return part


def check_group(group: Group) -> dict[str, Any]:
    """The :class:`Report` of a group as a dict."""
    report, started = Report(str(group)), time.perf_counter()
    dtype, mode = KINDS[group.kind]
    try:
        with precision(mode), poisoned(), torch.no_grad(), calls.forcing(group.backend):
            for seed, shape in enumerate(group.shapes):
                _check_shape(group, shape, dtype, seed, report)
            for shape in group.shapes:
                if shape.name in REPLAYED:
                    _check_replay(group, shape, dtype, report)
                    _check_changed_index(group, shape, dtype, report)
            for half in HALVES:
                with _noting(report, f"fused half block, {half}"):
                    _check_half(group, half, dtype, report)
            for linear in (False, True):
                with _noting(report, f"{'SparseLinear' if linear else 'SparseConv2d'}"):
                    _check_layer(group, linear, dtype, report)
    except workers.DeviceLostError as lost:
        report.seconds = time.perf_counter() - started
        raise workers.DeviceLostError(str(lost), asdict(report)) from lost
    report.seconds = time.perf_counter() - started
    return asdict(report)


def _check_shape(group: Group, shape: Shape, dtype: torch.dtype, seed: int, report: Report) -> None:
    for whole in (False, True):
        tensors = Tensors.make(shape, group.block, dtype, group.device, seed, whole)
        expected = results_of(tensors)
        for op in OPS:
            if op in ("plain", "relu") and shape.name not in FINISHES:
                continue
            what = f"{op} of {shape.name}{', whole numbers' if whole else ''}"
            with _noting(report, what):
                work = program(group, tensors, op)
                result = work()
                _judge(report, group, tensors, op, what, result, expected[op], exact=whole and op != "scores")
                for _ in range(group.repeats - 1):
                    if not torch.equal(work(), result):
                        report.wrong.append(f"{what}: other bits when repeated")
                        break


def _check_replay(group: Group, shape: Shape, dtype: torch.dtype, report: Report) -> None:
    """Graphs replayed on new numbers, captured anew for a new mask, the old one once more, and after an exchange."""
    watch = watch_of(group.device)
    for op in OPS:
        with _noting(report, f"{op} of {shape.name} under replay"):
            masks = [Tensors.make(shape, group.block, dtype, group.device, seed) for seed in (100, 101)]
            graphs = []
            for tensors in masks:
                graphs.append(watch.capture([program(group, tensors, op)]))
                _replay_and_judge(report, group, tensors, op, f"{shape.name}, mask {len(graphs)}", graphs[-1])
            _replay_and_judge(report, group, masks[0], op, f"{shape.name}, first mask again", graphs[0])
            if op == "scores":  # which have no index
                continue
            fewer = masks[0].mask.flip(1)
            fewer[0] = False
            for turn, mask in enumerate((masks[0].mask.flip(0), fewer), start=1):
                moved = masks[0].move(mask, turn)
                index_cache.refresh(moved.topology)
                _replay_and_judge(report, group, moved, op, f"{shape.name}, exchange {turn}", graphs[0])


def _replay_and_judge(report: Report, group: Group, tensors: Tensors, op: str, what: str, graph: Any) -> None:
    generator = torch.Generator().manual_seed(sum(report.checked.values()))
    for tensor in (tensors.input, tensors.grad_output, tensors.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    tensors.values.masked_fill_(tensors.outside(), 0.0)
    tensors.values[tensors.slots < 0] = math.nan
    expected = results_of(tensors)[op]
    graph.outputs[0].fill_(math.nan)
    graph.replay()
    _judge(report, group, tensors, op, f"{op} replayed, {what}", graph.outputs[0], expected)


def _check_changed_index(group: Group, shape: Shape, dtype: torch.dtype, report: Report) -> None:
    """The index vector is changed in place: what was cached for it must not be used."""
    for op in OPS[:-1]:  # scores have no index
        with _noting(report, f"{op} of {shape.name} after a change in place"):
            tensors = Tensors.make(shape, group.block, dtype, group.device, 100)
            program(group, tensors, op)()
            tensors.move(tensors.mask.flip(0), 1)
            expected = results_of(tensors)[op]
            what = f"{op} of {shape.name} after the index changed in place"
            _judge(report, group, tensors, op, what, program(group, tensors, op)(), expected)


def _check_layer(group: Group, linear: bool, dtype: torch.dtype, report: Report) -> None:
    """A layer by autograd, with block scores, before and after its mask is changed."""
    kernel = (1, 1) if linear else (3, 3)
    yes, reason = backends.supports(
        calls.plain(group.backend), backends.Problem(group.device, dtype, group.block, kernel, linear=linear)
    )
    if not yes:
        raise calls.RefusedError(reason)
    make = ddst.SparseLinear if linear else partial(ddst.SparseConv2d, kernel_size=3, padding=1)
    into, out = 3 * group.block[1], 2 * group.block[0]
    torch.manual_seed(0)
    layer = make(into, out, block=group.block, density=0.4, device=group.device, dtype=dtype)
    layer.backend = calls.plain(group.backend)
    for mask in (layer.block_mask, layer.block_mask.flip(0)):
        layer.set_block_mask(mask)
        with torch.no_grad():
            layer.values.normal_()
            layer.values[layer.slot_blocks.to(group.device) < 0] = 0.0
        layer.request_scores()
        pixels = () if linear else (6, 5)
        x, gy = (torch.randn(9, c, *pixels, device=group.device).to(dtype) for c in (into, out))
        x.requires_grad_()
        with torch.enable_grad():
            y = layer(x)
            grads = torch.autograd.grad(y, (x, layer.values, layer.bias), gy)
        with torch.enable_grad(), without_cudnn():
            wide = [t.detach().double().requires_grad_() for t in (x, layer.dense_weight(), layer.bias)]
            expected_y = F.linear(*wide) if linear else F.conv2d(*wide, padding=1)
            gx, gw, gb = torch.autograd.grad(expected_y, wide, gy.double())
        blocks = topology.as_blocks(gw, group.block)
        scores = torch.linalg.vector_norm(blocks, dim=(-2, -1))
        expected = (expected_y, gx, in_slots(blocks[mask], layer.slot_blocks.to(group.device), fill=0.0), gb, scores)
        names = ("output", "input's gradient", "values' gradient", "bias's gradient", "scores")
        for name, result, right in zip(names, (y, *grads, layer.take_scores()), expected, strict=True):
            report.checked["layer"] = report.checked.get("layer", 0) + 1
            error, why = compare(result.detach(), right.detach(), group.kind)
            report.worst["layer"] = max(report.worst.get("layer", 0.0), error)
            if why is not None:
                report.wrong.append(f"{type(layer).__name__}, {name}: {why}")


def _check_half(group: Group, half: Half, dtype: torch.dtype, report: Report) -> None:
    """A fused half block by autograd: output, moments, every gradient; the same bits each time."""
    results, expected = half.run(calls.plain(group.backend), group.device, group.block, dtype)
    again, _ = half.run(calls.plain(group.backend), group.device, group.block, dtype)
    for name, result in results.items():
        report.checked["half block"] = report.checked.get("half block", 0) + 1
        # The activated map is rounded once more than in float64; statistics are float32.
        error, why = compare(result.to(dtype), expected[name], group.kind, slack=4.0)
        report.worst["half block"] = max(report.worst.get("half block", 0.0), error)
        if why is None and not torch.equal(result, again[name]):
            why = "other bits when repeated"
        if why is not None:
            report.wrong.append(f"fused half block, {half}, {name}: {why}")


def program(group: Group, tensors: Tensors, op: str) -> Callable[[], Tensor]:
    """A call of the group's backend: with bias, "plain" without, "relu" with a fused one."""
    name, arguments = tensors.arguments("forward" if op in ("plain", "relu") else op)
    if op == "relu":
        if group.backend != "triton":
            raise calls.RefusedError("no operator with a fused ReLU")
        return calls.with_relu(name, arguments)
    if op == "plain":
        arguments = [*arguments[:2], None, *arguments[3:]]
    return calls.bound(name, arguments, group.backend)


def results_of(tensors: Tensors) -> dict[str, Tensor]:
    """The float64 result of every one of :data:`OPS`."""
    expected = tensors.expected()
    bias = tensors.bias.double() if tensors.shape.linear else tensors.bias.double()[:, None, None]
    return {**expected, "plain": expected["forward"] - bias, "relu": expected["forward"].relu()}


def _judge(
    report: Report,
    group: Group,
    tensors: Tensors,
    op: str,
    what: str,
    result: Tensor,
    expected: Tensor,
    exact: bool = False,
) -> None:
    report.checked[op] = report.checked.get(op, 0) + 1
    error, why = compare(result, expected, group.kind, exact)
    report.worst[op] = max(report.worst.get(op, 0.0), error)
    if why is None and op == "wgrad" and result[tensors.outside()].count_nonzero():
        why = "not zero outside the weight, or in a free slot"
    if why is not None:
        report.wrong.append(f"{what}: {why}")


def compare(
    result: Tensor, expected: Tensor, kind: str, exact: bool = False, slack: float = 1.0
) -> tuple[float, str | None]:
    """``(relative error, what is wrong or None)`` of a result against float64.

    ``exact``: the result must be the reference rounded to its dtype. A reference that is all zero must be met exactly.
    ``slack``: how many times the tolerance is allowed.
    """
    if result.shape != expected.shape:
        return math.inf, f"shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    if result.dtype != KINDS[kind][0]:
        return math.inf, f"dtype {result.dtype}, expected {KINDS[kind][0]}"
    if result.numel() == 0:
        return 0.0, None
    difference = result.double() - expected
    if not bool(difference.isfinite().all()):
        return math.inf, f"{int((~difference.isfinite()).sum())} of {result.numel()} entries are not finite"
    scale, largest = float(expected.square().mean().sqrt()), float(expected.abs().max())
    rms, most = float(difference.square().mean().sqrt()), float(difference.abs().max())
    if largest == 0.0:
        return (0.0, None) if most == 0.0 else (math.inf, "not zero where zero is the result")
    error, allowed = (rms / scale, most / largest), [slack * tolerance for tolerance in TOLERANCES[kind]]
    if exact:
        wrong = int((result != expected.to(result.dtype)).sum())
        return error[0], f"{wrong} of {result.numel()} entries are not exact" if wrong else None
    if error[0] <= allowed[0] and error[1] <= allowed[1]:
        return error[0], None
    return error[
        0
    ], f"relative error {error[0]:.1e} rms, {error[1]:.1e} max, allowed {allowed[0]:.0e} and {allowed[1]:.0e}"


@contextmanager
def _noting(report: Report, what: str) -> Iterator[None]:
    """Notes a refusal and an error; one that the process cannot recover from ends the group."""
    try:
        yield
    except calls.RefusedError as refusal:
        report.refused[str(refusal)] = report.refused.get(str(refusal), 0) + 1
    except Exception as error:
        message = f"{what}: {in_a_line(error)}"
        report.wrong.append(message)
        if device_is_lost(error):
            raise workers.DeviceLostError(
                f"the rest was not checked, the device was lost at {message}", None
            ) from error


def device_is_lost(error: Exception) -> bool:
    """Whether every later call of this process will fail as well."""
    return any(sign in str(error) for sign in LOST)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that entries no kernel has written show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the reference uses operations without a deterministic twin
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = filled
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
