"""What it gains and costs that freed memory stays in the process (`ddst.keep_freed_memory`), measured with and without.

    python -m ddst.benchmarks freed-memory
    python -m ddst.benchmarks freed-memory --repeats 3 --channels 64 --size 16

A plain script's step: three 3×3 convolutions with ReLU, forward and backward, sparse beside dense in one process. Each
setting has a process of its own, as it holds for a whole process. Printed: ms of a sparse and a dense step, the median
of their paired ratios, page faults of a sparse step, the resident memory that the steps added, and what a further step
adds to it if its loss is kept, as scripts do in a list. Exit code 1: a result was wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ddst
from ddst.benchmarks import report
from ddst.benchmarks.runner import Settings
from ddst.measure import Spread, seconds

KEPT = "ddst.keep_freed_memory()"
#: How a row is called -> whether the function is called, and what stands in the environment.
ROWS: dict[str, tuple[bool, dict[str, str]]] = {
    "the C library's defaults": (False, {}),
    KEPT: (True, {}),
    "the same, THP_MEM_ALLOC_ENABLE=1": (True, {"THP_MEM_ALLOC_ENABLE": "1"}),
    "the same, GLIBC_TUNABLES=glibc.malloc.tcache_count=0": (True, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}),
}
#: What would change the allocator from outside is left out of the environment.
FOREIGN = ("MALLOC_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
KEPT_LOSSES = 20
TOLERANCE = 1e-3  # of the largest gradient, in float32
HEAD = f"{'setting':<54} sparse ms  dense ms  ratio  faults   resident  and a step, losses kept"


def resident() -> int:
    """Bytes of the process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def page_faults() -> int:
    """Page faults of this process so far that needed no file."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def networks(channels: int, density: float) -> tuple[nn.Module, nn.Module]:
    """Three convolutions with ReLU: sparse, and dense with the same weights."""
    torch.manual_seed(0)
    layers = [ddst.SparseConv2d(channels, channels, 3, padding=1, density=density, bias=False) for _ in range(3)]
    sparse = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))
    dense = ddst.densify(copy.deepcopy(sparse))
    return sparse, dense.to(memory_format=torch.channels_last)


def wrong(sparse: nn.Module, dense: nn.Module, x: Tensor) -> list[str]:
    """What differs between the two: output, gradient of the input."""
    x = x.detach().clone().requires_grad_()
    results = []
    for network in (sparse, dense):
        y = network(x)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    return [
        name
        for name, ours, theirs in zip(("output", "input gradient"), *results, strict=True)
        if not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
    ]


def stepped(channels: int, size: int, batch: int, density: float, repeats: int) -> dict[str, Any]:
    """What a process that steps finds, in the setting that it was started with."""
    sparse, dense = networks(channels, density)
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
    if whys := wrong(sparse, dense, x[:2]):
        return {"wrong": whys}

    def step(network: nn.Module) -> Tensor:
        # The input has a gradient, too, as that of a layer inside of a network.
        network.zero_grad(set_to_none=True)
        loss = network(x.detach().requires_grad_()).square().mean()
        loss.backward()
        return loss.detach()

    before = resident()
    times: list[list[float]] = [[], []]
    faults = []
    for i in range(repeats + 1):
        for which, network in enumerate((sparse, dense)):
            started = page_faults()
            took = seconds(lambda network=network: step(network), 3 if which == 0 else 1)
            if i:
                times[which].append(took)
                if which == 0:
                    faults.append((page_faults() - started) / 3)
    ratio = Spread.of_ratios(times[1], times[0]).median
    added = resident() - before
    losses = [step(sparse) for _ in range(KEPT_LOSSES)]
    medians = [Spread.of(samples).median for samples in times]
    return {
        "wrong": [],
        "seconds": medians[0],
        "dense_seconds": medians[1],
        "speedup": ratio,
        "page_faults": Spread.of(faults).median,
        "resident": added,
        "resident_a_loss": (resident() - before - added) / len(losses),
    }


def child(request: dict[str, Any]) -> dict[str, Any]:
    """Answers one request; the process was started for it."""
    torch.set_num_threads(request["threads"])
    kept = ddst.keep_freed_memory() if request["keep"] else None
    return {"kept": kept, **stepped(**request["settings"])}


def ask(request: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """The answer of a fresh process with these variables in its environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ddst.benchmarks", "freed-memory", "--answer", json.dumps(request)],
        stdout=subprocess.PIPE,
        env={**inherited, **environment},
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """A row."""
    keep, environment = ROWS[name]
    request = {"keep": keep, "threads": threads, "settings": settings}
    return {"setting": name, **ask(request, environment)}


def text_of(row: dict[str, Any]) -> str:
    """A row as a line."""
    if row["wrong"]:
        return f"{row['setting']:<54} WRONG, not timed: {', '.join(row['wrong'])}"
    said = " (without effect here)" if row["kept"] is False else ""
    kept = row["resident_a_loss"] / 2**20
    return (
        f"{row['setting']:<54} {1e3 * row['seconds']:9.1f} {1e3 * row['dense_seconds']:9.1f} {row['speedup']:6.2f} "
        f"{row['page_faults']:7.0f} {row['resident'] / 2**20:6.0f} MiB {kept:+10.2f} MiB{said}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ddst.benchmarks.__main__ import density_of, positive

    command = argparse.ArgumentParser(
        prog="python -m ddst.benchmarks freed-memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--channels", type=positive, default=128, help="default: 128")
    add("--size", type=positive, default=32, help="of the images (default: 32)")
    add("--batch", type=positive, default=16, help="default: 16")
    add("--density", type=density_of, default=0.1, help="default: 0.1")
    add("--repeats", type=positive, default=9, help="pairs of steps (default: 9)")
    add("--threads", type=positive, default=1)
    add("--json", type=Path, metavar="FILE", help="also keep the run in this file")
    add("--answer", type=json.loads, help=argparse.SUPPRESS)
    return command


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a result was wrong."""
    arguments = parser().parse_args(argv)
    if arguments.answer:
        print(json.dumps(child(arguments.answer)))
        return 0
    settings = {name: getattr(arguments, name) for name in ("channels", "size", "batch", "density", "repeats")}
    print(f"{settings}, {arguments.threads} thread(s), torch {torch.__version__}, {report.cpu_model()}")
    print(HEAD)
    rows = []
    for name in ROWS:
        rows.append(measure(name, settings, arguments.threads))
        print(text_of(rows[-1]), flush=True)
    if arguments.json:
        known = report.facts(Settings(arguments.threads, arguments.repeats))
        report.save(arguments.json, {**known, "kind": "freed-memory", "step": settings}, rows)
    return 1 if any(row["wrong"] for row in rows) else 0
