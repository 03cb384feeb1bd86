"""Measures which configuration of the Triton kernels is the fastest on this device, and keeps it in a table.

    python -m ddst.benchmarks tune                                    the layers of the GPU targets
    python -m ddst.benchmarks tune --layer sngan32 --batch 64 --dtype bf16 --block 32x32 --density 0.1 0.3

Every candidate computes the layer on small integers first and must be exact; then it is timed as a CUDA graph on
tensors that are not in the cache. The times go into ``ddst/kernels/tables/<device>.json``, by which the kernels choose
from then on. Layers that have the same shape class, block, dtype and density bucket share an entry.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddst.benchmarks import registry
from ddst.benchmarks.gpu import workers
from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.correctness import device_is_lost, poisoned
from ddst.benchmarks.gpu.environment import KINDS, describe
from ddst.benchmarks.gpu.journal import NOTHING, Progress
from ddst.benchmarks.gpu.kernel_rows import BATCHES, Spec, activations, problems_of, specs
from ddst.benchmarks.gpu.results import in_a_line
from ddst.benchmarks.gpu.sweep import TABLE_NAMES
from ddst.benchmarks.gpu.timing import Program, Watch, forget, in_turn, precision, sets_needed, watch_of, without_cudnn
from ddst.benchmarks.problem import PASSES, Problem
from ddst.benchmarks.registry import GANS, layer_of
from ddst.measure import Spread

FEW_IMAGES, FEW_ROWS = 4, 256  # of the exactness check, whose reference is computed in float64
MATTERING = 10  # of the specs of `make gpu`, the first, are tuned there
CHECKING = 0.6  # share of the time for checking, which also compiles; the rest is for timing


@dataclass(frozen=True)
class Task:
    """One pass of one layer."""

    spec: Spec
    op: str
    device: str
    repeats: int = 10

    def __str__(self) -> str:
        return f"{self.op} of {self.spec}"


def tune(
    chosen: Sequence[Spec],
    device: str,
    deadline: Deadline,
    processes: int = 0,
    rounds: int = 5,
    path: Path | None = None,
    watch: Watch | None = None,
    progress: Progress = NOTHING,
) -> dict[str, Any]:
    """The part "tune": what was chosen for each pass of each spec, ``wrong`` configurations, ``trimmed`` passes.

    Args:
        chosen: the important ones first. path: of the table; by default the one that the kernels read.
    """
    from ddst.kernels import tuning

    model, watch = tuning.device_name(0 if device == "cuda" else -1), watch or watch_of(device)
    part: dict[str, Any] = {"chosen": [], "trimmed": [], "wrong": []}
    source = source_of(device)
    checked = []
    tasks = []
    for task in (Task(spec, op, device) for spec in chosen for op in PASSES):
        line = progress.earlier(str(task))
        if line is None or tuning.table_of(model).fastest(table_problem(task)) is None:
            tasks.append(task)
        else:
            part["chosen"].append(line)
    for done in workers.run(check, tasks, processes, Deadline(CHECKING * deadline.left)):
        if done.result is None:
            late = done.trouble is not None and done.trouble.startswith(("not begun", "cut off"))
            part["trimmed" if late else "wrong"].append(f"{done.task}: {done.trouble}")
            continue
        part["wrong"] += [f"{done.task}: {why}" for why in done.result["wrong"]]
        checked.append((done.task, done.result["exact"], not done.result["wrong"]))
    for task, exact, right in sorted(checked, key=lambda triple: tasks.index(triple[0])):
        if deadline.passed:
            part["trimmed"].append(f"{task}: checked, not timed")
        elif exact:
            try:
                problem, measured = times(task, exact, watch, rounds)
            except Exception as error:
                part["wrong"].append(f"{task}: {in_a_line(error)}")
                if device_is_lost(error):
                    break
                continue
            tuning.record(problem, measured, source, model)
            best = min(measured, key=lambda pair: pair[1])
            default = next((ms for config, ms in measured if config == tuning.candidates_for(problem)[0]), None)
            gain = default / best[1] if default else None
            line = {"what": str(task), "config": str(best[0]), "ms": best[1], "over_default": gain}
            part["chosen"].append(line)
            part["file"] = tuning.save(model, path).name
            progress.keep(str(task), line, part, right)
            forget(device, collect=False)
    return part


def check(task: Task) -> dict[str, Any]:
    """``exact``: the places among the candidates of those that are exact on small integers; ``wrong``: why not others.

    Few images are computed: their number changes neither the compiled kernel nor the rows of the mask.
    """
    few = FEW_ROWS if layer_of(task.spec.layer).op == "linear" else FEW_IMAGES
    small = replace(task.spec, batch=min(few, task.spec.batch))
    dtype, mode = KINDS[task.spec.kind]
    found: dict[str, Any] = {"exact": [], "wrong": []}
    generator = torch.Generator(task.device).manual_seed(0)

    def whole(like: Tensor) -> Tensor:
        return like.copy_(torch.randint(-3, 4, like.shape, generator=generator, device=task.device))

    with torch.no_grad(), precision(mode), poisoned():
        inputs, gradients = activations(layer_of(small.layer), small.batch, dtype, task.device, 1)
        (problem,) = problems_of(small, [whole(inputs[0])], [whole(gradients[0])], whole)
        with without_cudnn():
            expected = problem.expected()[PASSES.index(task.op)].to(dtype)
        for place, config in enumerate(candidates(task)):
            try:
                work = configured(problem, task.op, config)
                if all(torch.equal(work(), expected) for _ in range(task.repeats)):
                    found["exact"].append(place)
                else:
                    found["wrong"].append(f"{config} is not exact")
            except Exception as error:
                message = f"{config}: {in_a_line(error)}"
                found["wrong"].append(message)
                if device_is_lost(error):
                    raise workers.DeviceLostError(message, found) from error
    return found


def times(task: Task, exact: Sequence[int], watch: Watch, rounds: int) -> tuple[Any, list[tuple[Any, float]]]:
    """``(the problem as the tables know it, pairs of a configuration and its milliseconds)``, cold, in turn."""
    layer, (dtype, mode) = layer_of(task.spec.layer), KINDS[task.spec.kind]
    size = dtype.itemsize * task.spec.batch * max(layer.size, 1) ** 2 * (layer.in_channels + layer.out_channels)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if task.device == "cuda" else 0
    allowed = candidates(task)
    with torch.no_grad(), precision(mode):
        sets = problems_of(
            task.spec, *activations(layer, task.spec.batch, dtype, task.device, sets_needed(size, cache))
        )
        programs = [
            Program(watch, [configured(problem, task.op, allowed[place]) for problem in sets]) for place in exact
        ]
        samples = in_turn(programs, rounds)
    measured = [(allowed[place], 1e3 * Spread.of(own).median) for place, own in zip(exact, samples, strict=True)]
    return table_problem(task), measured


def configured(problem: Problem, op: str, config: Any) -> Callable[[], Tensor]:
    """A pass of a problem by a Triton kernel in one configuration."""
    from ddst import kernels

    name, arguments = problem.packed_calls()[PASSES.index(op)]
    return partial(getattr(kernels, name), *arguments, config=config)


def candidates(task: Task) -> list[Any]:
    """What there is to choose from."""
    from ddst.kernels import tuning

    return tuning.candidates_for(table_problem(task))


def table_problem(task: Task) -> Any:
    """The pass as the tables know it."""
    from ddst.kernels import configs

    spec, layer, one = task.spec, layer_of(task.spec.layer), (1, 1)
    common = (TABLE_NAMES[task.op], layer.op == "linear", KINDS[spec.kind][0], spec.block)
    if layer.op == "linear":
        sizes = ((*layer.weight_shape, 1, 1), one, (0, 0), one, spec.batch, one, one)
    else:
        stride, padding = (layer.stride,) * 2, (layer.padding,) * 2
        sizes = (tuple(layer.weight_shape), stride, padding, one, spec.batch, (layer.size,) * 2, (layer.out_size,) * 2)
    return configs.Problem(*common, *sizes, blocks_of(spec))


def blocks_of(spec: Spec) -> int:
    """Number of active blocks."""
    from ddst.topology import block_count, mask_shape

    shape = torch.Size(mask_shape(layer_of(spec.layer).weight_shape, spec.block))
    return block_count(spec.density, shape.numel())


def source_of(device: str) -> dict[str, Any]:
    """Where measurements come from, as the table keeps it."""
    facts = describe(device)
    return {
        **{name: facts[name] for name in ("date", "commit", "device")},
        **facts["versions"],
        "command": "python -m ddst.benchmarks tune",
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ddst.benchmarks.__main__ import block_of, density_of, positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command.add_argument
    add("--layer", nargs="+", metavar="NAME", help="layers or networks (default: gpu-targets, each with its batch)")
    add("--batch", type=positive, help="default: 64, that of the target for the layers of gpu-targets")
    add("--dtype", nargs="+", choices=tuple(KINDS), default=["bf16"], help="default: bf16")
    add("--block", nargs="+", type=block_of, default=[(32, 32), (64, 64), (16, 16)])
    add("--density", nargs="+", type=density_of, default=[0.1, 0.3, 0.2, 0.5])
    add("--budget", type=float, default=300.0, metavar="SECONDS", help="default: 300")
    add("--processes", type=positive, default=8, help="that compile and check at once (default: 8)")
    return command


def chosen_specs(arguments: argparse.Namespace) -> list[Spec]:
    """The specs of a command line, the important ones first.

    Raises:
        ValueError: an unknown layer.
    """
    layers = registry.layers_of(arguments.layer or ["gpu-targets"])
    odd = [name for name in layers if name not in GANS and not layer_of(name).is_plain]
    if odd:
        raise ValueError(f"--layer takes linear layers and plain 2-D convolutions here, got {', '.join(odd)}")
    wanted = [
        Spec(layer, arguments.batch or BATCHES.get(layer, 64), kind, block, density)
        for kind in arguments.dtype
        for density in arguments.density
        for block in arguments.block
        for layer in layers
        if layer not in GANS and layer_of(layer).out_channels >= block[0] and layer_of(layer).in_channels >= block[1]
    ]
    order = {spec: place for place, spec in enumerate(specs())}
    return sorted(wanted, key=lambda spec: order.get(spec, len(order)))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a configuration was wrong, 3 without a GPU."""
    command = parser()
    arguments = command.parse_args(argv)
    try:
        chosen = chosen_specs(arguments)
    except ValueError as error:
        command.error(str(error))
    if not torch.cuda.is_available():
        print(f"tune: no GPU is visible to torch {torch.__version__}: nothing to measure", file=sys.stderr)
        return 3
    part = tune(chosen, "cuda", Deadline(arguments.budget), arguments.processes)
    for line in part["chosen"]:
        gain = f", {line['over_default']:.2f}x the default" if line["over_default"] else ""
        print(f"{line['what']}: {line['ms']:.4f} ms{gain}: {line['config']}")
    for name in ("trimmed", "wrong"):
        for line in part[name]:
            print(f"{name}: {line}")
    return 1 if part["wrong"] else 0
