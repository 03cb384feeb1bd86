"""Two revisions of this project beside each other: the library loaded here, and that of another commit.

What is compared is the compiled operators. The other commit's sources are built into ``build/against/<commit>`` of the
checkout (once: later comparisons reuse it). Each library is loaded by a process of its own, both run the same program
(``against_worker.py``, which imports torch only) on the same tensors, and they compute in turn, never at once; the
ratio is taken from neighbouring measurements. Both results are compared with the reference first. Not seen: changes of
the Python side, and of benchmarks/ itself. An operator whose arguments have changed since is reported as an error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ddst._extension import LIBRARY
from ddst.benchmarks.problem import PASSES, Problem
from ddst.benchmarks.registry import Case
from ddst.benchmarks.report import ROOT
from ddst.benchmarks.runner import Row, Settings
from ddst.measure import Spread


def library_of(revision: str) -> tuple[str, Path]:
    """``(commit, path of its library)``, built if it is not there yet.

    Raises:
        ValueError: no git checkout, no such commit, or its library does not build.
    """

    def git(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, **kwargs)

    found = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found.returncode:
        raise ValueError(f"--against: {revision!r} is no commit of a git checkout at {ROOT}")
    commit = found.stdout.strip()
    folder = ROOT / "build" / "against" / commit[:12]
    library = folder / "ddst" / "_lib" / LIBRARY.name
    if library.is_file():
        return commit[:12], library
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        archive = Path(temporary, "sources.tar")
        git("archive", "--output", str(archive), commit, check=True)
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(archive) as sources:
            sources.extractall(folder, filter="data")
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, capture_output=True, text=True
    )
    if built.returncode or not library.is_file():
        raise ValueError(f"--against: {revision} does not build in {folder}:\n{(built.stdout + built.stderr)[-2000:]}")
    return commit[:12], library


class Worker:
    """A process with one library: answers one request at a time."""

    def __init__(self, library: Path, threads: int, clock: str) -> None:
        program = Path(__file__).with_name("against_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program), str(library), str(threads), clock],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},  # memory.py says why
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; an error of the other side comes as ``{"error": ...}``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):  # it has ended: there is no answer
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": "the process with this library has ended"}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=30)


class Comparison:
    """Two workers: this library and another."""

    def __init__(self, other: Path, settings: Settings, this: Path = LIBRARY) -> None:
        self.settings = settings
        self.workers = [Worker(library, settings.threads, settings.clock) for library in (this, other)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: Any) -> None:
        for worker in self.workers:
            worker.__exit__(*details)

    def measure(self, case: Case) -> Row:
        """A row like those of `runner.measure`, its only baseline "revision"."""
        row: Row = {**asdict(case), "block": list(case.block), "threads": self.settings.threads, "wrong": []}
        row |= {"layout": self.settings.layout, "baselines": ["revision"], "passes": {}}
        problem = Problem.make(case, self.settings.layout == "channels_last")
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder, "calls.pt"))
            torch.save(problem.packed_calls(), file)
            for which, worker in zip(("this", "the other"), self.workers, strict=True):
                answer = worker.ask(load=file)
                if "error" in answer:
                    row["wrong"].append(f"{which} revision: {answer['error']}")
                    continue
                results = torch.load(answer["results"])
                whys = [
                    problem.wrong(i, r, e) for i, (r, e) in enumerate(zip(results, problem.expected(), strict=True))
                ]
                row["wrong"] += [f"{which} revision: {why}" for why in whys if why]
        if row["wrong"]:
            return row
        steps = [[0.0] * self.settings.repeats for _ in self.workers]
        for i, name in enumerate(PASSES):
            samples: list[list[float]] = [[], []]
            for k in range(self.settings.repeats):
                for side, worker in enumerate(self.workers):
                    samples[side].append(float(worker.ask(time=i)["seconds"]))
                    steps[side][k] += samples[side][k]
            row["passes"][name] = _figures(samples)
        row["step"] = _figures(steps)
        return row


def _figures(samples: list[list[float]]) -> Row:
    ours, theirs = samples
    baseline = {"seconds": Spread.of(theirs).median, "speedup": asdict(Spread.of_ratios(theirs, ours))}
    return {"seconds": Spread.of(ours).median, "baselines": {"revision": baseline}}
