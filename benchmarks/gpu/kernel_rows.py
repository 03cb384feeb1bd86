"""The layers of the targets, packed against cuDNN and cuBLAS: warm and cold, every pass, the important rows first.

The dense side is channels_last, of the same dtype, with ``cudnn.benchmark`` and a weight without zeros (a product of
many zeros draws less power and runs faster than one of a dense network would). Both sides are CUDA graphs, replayed in
turn. A row that is not right is not timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ddst import topology
from ddst.benchmarks.gpu import calls
from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.correctness import compare, device_is_lost
from ddst.benchmarks.gpu.environment import KINDS, peak_of
from ddst.benchmarks.gpu.journal import NOTHING, Progress
from ddst.benchmarks.gpu.results import in_a_line
from ddst.benchmarks.gpu.timing import (
    Program,
    Watch,
    cudnn_benchmark,
    forget,
    in_turn,
    precision,
    sets_needed,
    watch_of,
)
from ddst.benchmarks.problem import PASSES, Problem, Work
from ddst.benchmarks.registry import NETWORKS, Layer, layer_of
from ddst.measure import Spread
from ddst.topology import block_count, mask_shape, random_mask

Row = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """One layer in one setting; it gives a row for every pass and backend."""

    layer: str
    batch: int
    kind: str
    block: tuple[int, int]
    density: float

    def __str__(self) -> str:
        block = f"{self.block[0]}x{self.block[1]}"
        return f"{self.layer} batch {self.batch} {self.kind} {block} {100 * self.density:g} %"


#: Layer -> batch, in the order of importance. The linear layer's batch is the number of its rows.
BATCHES = {
    "conv3x3-256-256-16": 64,
    "conv3x3-256-256-32": 64,
    "linear-4096-4096": 4096,
    "conv3x3-128-128-32": 128,
    "conv3x3-768-384-32": 64,
}
DENSITIES = (0.1, 0.3, 0.2, 0.5)
BLOCKS = ((32, 32), (64, 64), (16, 16))
#: Those of which every form of the kernels is measured.
FORMED = tuple(BATCHES)[:2]
assert BATCHES.keys() == {layer.name for layer in NETWORKS["gpu-targets"]}


def specs() -> list[Spec]:
    """All rows in bf16, then a few in fp16 and TF32; what the budget leaves out is the end of this list.

    The sum of the places in the three lists orders them, so that a cut takes the least important layers, densities and
    blocks alike.
    """
    ranked = [
        (i + j + k, Spec(layer, batch, "bf16", block, density))
        for i, (layer, batch) in enumerate(BATCHES.items())
        for j, density in enumerate(DENSITIES)
        for k, block in enumerate(BLOCKS)
    ]
    others = [
        Spec("conv3x3-256-256-32", 64, kind, block, density)
        for kind in ("tf32", "fp16")
        for block in BLOCKS[:2]
        for density in DENSITIES[:2]
    ]
    return [spec for _, spec in sorted(ranked, key=lambda pair: pair[0])] + others


def measure_all(
    chosen: Sequence[Spec],
    environment: dict[str, Any],
    device: str,
    deadline: Deadline,
    rounds: int = 9,
    progress: Progress = NOTHING,
) -> dict[str, Any]:
    """The part "kernels": ``rows``, ``trimmed`` (specs for which no time was left), ``wrong``."""
    part: dict[str, Any] = {"rows": [], "trimmed": [], "wrong": []}
    bench = Bench(device, environment, rounds)
    for spec in chosen:
        proven = progress.earlier(str(spec))
        if proven is not None:
            part["rows"] += proven
            continue
        if deadline.passed:
            part["trimmed"].append(str(spec))
            continue
        try:
            rows = []
            for row in bench.rows(spec):
                rows.append(row)
                part["rows"].append(row)
                if row["wrong"]:
                    part["wrong"].append(f"{spec} {row['pass']} {row['backend']}: {row['wrong']}")
                progress.tell(part)
            progress.keep(str(spec), rows, part, not any(row["wrong"] for row in rows))
        except Exception as error:
            part["wrong"].append(f"{spec}: {in_a_line(error)}")
            if device_is_lost(error):
                break
    return part


@dataclass
class Side:
    """The dense programs of a layer, pass by pass: warm and cold, or why they are not to be compared with."""

    programs: tuple[Program, Program] | None
    wrong: str | None


@dataclass
class Setting:
    """What the rows of one layer, batch and kind share: activations, and the dense programs once they are made."""

    inputs: list[Tensor]
    gradients: list[Tensor]
    dense: list[Side] = field(default_factory=list)


class Bench:
    """Measures specs on one device; keeps the tensors and dense programs of each layer."""

    def __init__(self, device: str, environment: dict[str, Any], rounds: int, watch: Watch | None = None) -> None:
        self.device, self.environment, self.rounds = device, environment, rounds
        self.watch = watch or watch_of(device)
        self._settings: dict[tuple[str, int, str], Setting] = {}

    def rows(self, spec: Spec) -> Iterator[Row]:
        """The rows of a spec: each pass on each backend that does it."""
        dtype, mode = KINDS[spec.kind]
        with precision(mode), torch.no_grad(), cudnn_benchmark(True):
            backends = [name for name, no in calls.usable(self.device, dtype, spec.block).items() if no is None]
            backends += calls.forms(self.device, dtype) if spec.layer in FORMED else []
            setting = self._setting(spec)
            sets = problems_of(spec, setting.inputs, setting.gradients)
            expected = reference(sets[0], spec.kind)
            for i, name in enumerate(PASSES):
                for backend in backends:
                    yield self._row(spec, sets, i, backend, expected[i], setting.dense[i]) | {"pass": name}
        del sets
        forget(self.device, collect=False)

    def _setting(self, spec: Spec) -> Setting:
        key = (spec.layer, spec.batch, spec.kind)
        if key not in self._settings:
            layer, dtype = layer_of(spec.layer), KINDS[spec.kind][0]
            bytes_of_one = dtype.itemsize * sum(_elements(layer, spec.batch))
            count = sets_needed(bytes_of_one, self.environment.get("l2_bytes", 0))
            inputs, gradients = activations(layer, spec.batch, dtype, self.device, count)
            self._settings[key] = setting = Setting(inputs, gradients)
            setting.dense = [self._dense(spec, setting, i) for i in range(len(PASSES))]
        return self._settings[key]

    def _dense(self, spec: Spec, setting: Setting, index: int) -> Side:
        """The dense programs of a pass on weights without zeros, checked first."""
        full = replace(spec, density=1.0)
        sets = problems_of(full, setting.inputs, setting.gradients)
        works = [problem.dense(True)[index] for problem in sets]
        result = works[0]()
        if index == 2:
            result = topology.pack(result, sets[0].mask, spec.block)
        # cuBLAS and cuDNN may add partial sums in 16 bits, which ours may not.
        wrong = compare(result, reference(sets[0], spec.kind)[index], spec.kind, slack=4.0)[1]
        return Side(None, wrong) if wrong else Side(self._programs(works), None)

    def _programs(self, works: Sequence[Work]) -> tuple[Program, Program]:
        """Warm and cold."""
        return Program(self.watch, works[:1]), Program(self.watch, works)

    def _row(self, spec: Spec, sets: list[Problem], index: int, backend: str, expected: Tensor, dense: Side) -> Row:
        row: Row = {**asdict(spec), "backend": backend, "wrong": None}
        try:
            works = [packed_work(problem, index, backend) for problem in sets]
            result = works[0]()
        except calls.RefusedError as refusal:
            return row | {"refused": str(refusal)}
        except Exception as error:
            if device_is_lost(error):
                raise
            return row | {"wrong": in_a_line(error)}
        error, row["wrong"] = compare(result, expected, spec.kind)
        row["error"] = error
        if row["wrong"] is None and dense.wrong is not None:
            row["wrong"] = f"the dense side: {dense.wrong}"
        if row["wrong"] is not None or dense.programs is None:
            return row
        del result
        problem, best = sets[0], peak_of(self.environment, spec.kind)
        floor = best.floor(problem.flops(), problem.bytes())
        row["floor"] = floor
        row["dense_floor"] = best.floor(problem.flops(dense=True), dense_bytes(problem))
        ours = self._programs(works)
        samples = in_turn([*ours, *dense.programs], self.rounds)
        for i, name in enumerate(("warm", "cold")):
            mine, theirs = samples[i], samples[2 + i]
            seconds = Spread.of(mine).median
            row[name] = {
                "seconds": seconds,
                "dense_seconds": Spread.of(theirs).median,
                "speedup": asdict(Spread.of_ratios(theirs, mine)),
                "floor_share": floor / seconds,
            }
        return row


def activations(
    layer: Layer, batch: int, dtype: torch.dtype, device: str, count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """``count`` random inputs and as many output gradients of a layer, channels_last."""
    generator = torch.Generator(device).manual_seed(0)

    def numbers(channels: int, size: int) -> list[Tensor]:
        shape = [batch, channels, size, size] if size else [batch, channels]
        made = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(count)]
        return [t.contiguous(memory_format=torch.channels_last) if size else t for t in made]

    return numbers(layer.in_channels, layer.size), numbers(layer.out_channels, layer.out_size if layer.size else 0)


def problems_of(
    spec: Spec,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    fill: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> list[Problem]:
    """The layer's problem on each set of activations, each with weights of its own; mask and index are shared.

    ``fill`` makes other weights of normal ones.
    """
    layer, dtype = layer_of(spec.layer), KINDS[spec.kind][0]
    device = inputs[0].device
    generator = torch.Generator().manual_seed(1)
    shape = mask_shape(layer.weight_shape, spec.block)
    nnz = block_count(spec.density, math.prod(shape))
    mask = random_mask(layer.weight_shape, spec.block, nnz, generator).to(device)
    index = topology.build_topology(mask)
    weights = fill(torch.randn(layer.weight_shape, generator=generator).to(device, dtype))
    found = []
    for x, gy in zip(inputs, gradients, strict=True):
        values = topology.pack(weights, mask, spec.block)
        weight = topology.unpack(values, mask, layer.weight_shape).contiguous()
        found.append(Problem(layer, mask, values, index, weight, x, gy, spec.block, True))
    return found


def packed_work(problem: Problem, index: int, backend: str) -> Callable[[], Tensor]:
    """A pass of the packed layer on a backend."""
    return calls.bound(*problem.packed_calls()[index], backend)


def reference(problem: Problem, kind: str) -> list[Tensor]:
    """The three results by dense torch in more digits: float64, for the 16-bit kinds full float32, which is a thousand
    times finer than what is compared and a hundred times faster."""
    with precision("ieee"), cudnn_benchmark(False):
        y, gx, gw = (
            work() for work in problem.dense(False, torch.float32 if kind in ("bf16", "fp16") else torch.float64)
        )
    return [y.double(), gx.double(), topology.pack(gw, problem.mask, problem.block).double()]


def dense_bytes(problem: Problem) -> float:
    """Bytes that a dense pass cannot avoid to move."""
    return float(sum(t.numel() * t.element_size() for t in (problem.input, problem.grad_output, problem.weight)))


def _elements(layer: Layer, batch: int) -> tuple[int, int]:
    """Of the input and of the output."""
    pixels = (layer.size**2, layer.out_size**2) if layer.size else (1, 1)
    return batch * layer.in_channels * pixels[0], batch * layer.out_channels * pixels[1]
