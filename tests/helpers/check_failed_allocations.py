"""Run as a program, with guard_heap.cpp preloaded: every allocation of every operator fails once, by itself.

Prints one JSON object.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.guard_pages import GuardedHeap
from helpers.problems import ConvProblem, LinearProblem
from helpers.sparse import Problem, call, op_arguments

LEAST = 512  # bytes: what Python and torch allocate to make a call is smaller
# Between them every form of the kernels, and copies of operands in other layouts.
PROBLEMS: list[Problem] = [
    ConvProblem(channels=(40, 48), block=(16, 16), size=(12, 12), layout="channels_last", grad_layout="channels_last"),
    ConvProblem(channels=(40, 48), block=(16, 16), size=(12, 12), layout="strided", grad_layout="transposed"),
    ConvProblem(channels=(40, 48), block=(8, 8), size=(20, 20)),  # vectors over pixels
    ConvProblem(channels=(40, 48), block=(16, 1), size=(20, 20)),
    ConvProblem(channels=(40, 48), block=(2, 2), size=(6, 6)),  # planes
    ConvProblem(channels=(40, 48), block=(3, 5), size=(9, 9), stride=2),
    LinearProblem(batch=(60,), features=(80, 96), block=(16, 16), layout="strided", grad_layout="strided"),
    LinearProblem(batch=(600,), features=(80, 96), block=(1, 4)),
]
MESSAGE = r"ddst::{name}: no memory for .*can't allocate memory: you tried to allocate \d+ bytes"


def main() -> None:
    torch.set_num_threads(2)
    heap = GuardedHeap()
    fail, failed, live = heap.library.guard_heap_fail, heap.library.guard_heap_failed, heap.library.guard_heap_live
    messages, wrong = [], []
    for problem in PROBLEMS:
        for name, arguments in (op_arguments(problem, problem.build(torch.float32)) or {}).items():
            expected = call(name, arguments)
            for count in range(1000):
                before, error, got = live(), None, None
                with heap:
                    fail(count, LEAST)
                    try:
                        got = call(name, arguments)
                    except Exception as caught:
                        error = f"{type(caught).__name__}: {caught}"
                    reached = failed()
                    fail(-1, 0)
                where = f"{name} of {problem}, allocation {count}"
                if got is not None:  # none failed, or one that the standard library does without
                    if not torch.equal(got, expected):
                        wrong.append(f"{where}: another result")
                elif re.match("RuntimeError: " + MESSAGE.format(name=name), str(error)):
                    messages.append(error)
                else:
                    wrong.append(f"{where}: {error}")
                del got
                if live() != before and count > 0:  # the first call fills caches
                    wrong.append(f"{where}: {live() - before} allocations are kept")
                if not reached:
                    break
    print(json.dumps({"messages": messages, "wrong": wrong}))


if __name__ == "__main__":
    main()
