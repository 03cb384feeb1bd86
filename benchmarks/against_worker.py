"""Runs the operators of one library on request; started by `against.py`, once for each revision.

Imports torch only, so that it runs with the library of any revision: ``against_worker.py LIBRARY THREADS CLOCK``.
A request is a line of JSON on standard input, its answer a line on standard output:
``{"load": FILE}`` loads calls ``[(operator, arguments)]``, runs each and answers with a file of the results;
``{"time": i}`` answers with seconds per call of call i.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

LEAST_SECONDS = 2e-3


def main() -> None:
    """Answers until standard input ends."""
    library, threads, clock_name = sys.argv[1:]
    torch.ops.load_library(library)
    torch.set_num_threads(int(threads))
    clock = time.process_time if clock_name == "cpu" else time.perf_counter
    calls: list[Any] = []
    counts: list[int] = []

    def load(file: str) -> dict[str, Any]:
        loaded = torch.load(file)
        calls[:] = [(getattr(torch.ops.ddst, name).default, arguments) for name, arguments in loaded]
        results = str(Path(file).with_suffix(f".{os.getpid()}.pt"))
        torch.save([operator(*arguments) for operator, arguments in calls], results)
        counts[:] = [max(1, min(1000, round(LEAST_SECONDS / max(timed(i, 1), 1e-7)))) for i in range(len(calls))]
        return {"results": results}

    def timed(i: int, repeats: int) -> float:
        operator, arguments = calls[i]
        start = clock()
        for _ in range(repeats):
            operator(*arguments)
        return (clock() - start) / repeats

    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                answer = load(request["load"])
            else:
                answer = {"seconds": timed(request["time"], counts[request["time"]])}
        except Exception as error:  # whatever it is, the other side has to hear of it
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
