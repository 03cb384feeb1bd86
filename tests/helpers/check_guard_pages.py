"""Run as a program: seeded problems with every operand beside pages without permissions, on one instruction set.

    check_guard_pages.py FIRST LAST FILE

checks the seeds FIRST .. LAST - 1. FILE always holds what is computed at the moment, so that it is known what killed
the process. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ddst._extension import cpu_capability
from helpers.guard_pages import GuardedHeap, GuardedMemory, expected_results, guarded_problem
from helpers.sparse import call, op_arguments
from helpers.tolerances import TOLERANCES, relative_error


def faults(seed: int, memory: GuardedMemory, heap: GuardedHeap, progress: int) -> Iterator[str]:
    """What is wrong with the results for one seed's problem, its operands at the end (half the time: and at the start)
    of their areas; one time in eight with outputs and workspaces guarded, too."""
    draw = random.Random(f"guard pages {seed}")
    problem, dtype = guarded_problem(seed), draw.choice([torch.float32, torch.float64])
    places, last = draw.choice([("end",), ("end", "start")]), draw.random() < 0.5
    torch.set_num_threads(draw.choice([1, 1, 1, 2]))
    guard = heap if draw.random() < 1 / 8 else nullcontext()
    case = problem.build(dtype, numbers="whole", seed=seed)  # whose sums are exact in any order
    if op_arguments(problem, case) is None:  # uneven padding, which the public function adds
        return
    expected = expected_results(case)
    for at in places:
        for name, arguments in (op_arguments(problem, memory.place(case, at), last) or {}).items():
            what = f"seed {seed}: {name}, operands at the {at} of a page, {dtype}, {problem}"
            os.pwrite(progress, what.encode() + b"\n", 0)
            with guard:
                got = call(name, arguments)
            want = expected[name.partition("_")[2]]
            exact = got.shape == want.shape and torch.equal(got.double(), want)
            if not exact and not (name.endswith("scores") and relative_error(got, want).within(TOLERANCES[dtype])):
                yield f"{what}: {relative_error(got, want) if got.shape == want.shape else got.shape}"
            del got  # what lies beside it is looked at here


def main() -> None:
    warnings.simplefilter("ignore")  # of dense torch, about the padding it copies
    progress = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT)
    memory, heap = GuardedMemory(), GuardedHeap()
    seeds = range(int(sys.argv[1]), int(sys.argv[2]))
    wrong = [fault for seed in seeds for fault in faults(seed, memory, heap, progress)]
    print(json.dumps({"capability": cpu_capability(), "problems": len(seeds), "wrong": wrong}))


if __name__ == "__main__":
    main()
