"""Two builds of ddst beside each other: the one that runs this, and that of another revision, folder or wheel.

Layers and whole GAN iterations are compared, each build in a process of its own that runs the same program
(``against_worker.py``) on public Python only: what the operators take as arguments may differ between the builds, and
changes of the Python side are seen. The two compute in turn, never at once, and take turns in who begins; both results
are checked first. Stated is the median of the ratios of neighbouring measurements with its 95 % interval
(`ddst.measure.MedianInterval`). A revision is installed once into ``build/against/<commit>`` of the checkout.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ddst import peak_memory
from ddst.benchmarks.gan_iteration import D_STEPS
from ddst.benchmarks.problem import mask_of
from ddst.benchmarks.registry import GANS, Case, layer_of
from ddst.benchmarks.report import ROOT
from ddst.benchmarks.runner import Row, Settings
from ddst.measure import MedianInterval, Spread

LEAST_SECONDS = 2e-2  # of one measurement: calls are made in a row until they take so long
HEAD = f"{'layer':<24} batch dens. block {'mask':<6} {'pass':<8}       ms  other ms   time  [95 % interval]"


@dataclass(frozen=True)
class Build:
    """An installed build: how it is called, and the folder that holds its package (None: the one that runs this)."""

    name: str
    folder: Path | None = None


def build_of(target: str, scratch: Path, cuda: bool = False) -> Build:
    """The build that ``--against`` names: a folder that holds the package, a wheel, or a git revision, which is built.

    Args:
        scratch: where a wheel is unpacked. cuda: whether a revision's CUDA C++ kernels are built, too.

    Raises:
        ValueError: nothing of that name, or it cannot be built.
    """
    path = Path(target)
    if path.is_dir():
        if not (path / "ddst" / "__init__.py").is_file():
            raise ValueError(f"--against: folder {target} holds no package ddst: give the folder it is installed into")
        return Build(str(path), path.resolve())
    if path.suffix == ".whl" and path.is_file():
        install(path, scratch / "wheel", {})
        return Build(path.stem, scratch / "wheel")

    def git(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, **kwargs)

    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{target}^{{commit}}")
    if found.returncode:
        raise ValueError(f"--against: {target!r} is no folder, no wheel and no commit of a git checkout at {ROOT}")
    commit = found.stdout.strip()
    folder = ROOT / "build" / "against" / (commit[:12] + "-cuda" * cuda)
    if not folder.is_dir():
        archive, sources = scratch / "sources.tar", scratch / "sources"
        git("archive", "--output", str(archive), commit, check=True)
        with tarfile.open(archive) as packed:
            packed.extractall(sources, filter="data")
        install(sources, folder, {} if cuda else {"DDST_BUILD_CUDA": "0"})
    return Build(commit[:12], folder)


def install(what: Path, folder: Path, settings: dict[str, str]) -> None:
    """Installs sources or a wheel into a folder, whole or not at all, from what is at hand: nothing is downloaded."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
        command += ["--disable-pip-version-check", "--target", f"{temporary}/build", str(what)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
        if done.returncode:
            raise ValueError(f"--against: {what} cannot be installed:\n{(done.stdout + done.stderr)[-2000:]}")
        shutil.move(f"{temporary}/build", folder)


class Worker:
    """A process that runs one build: answers one request at a time."""

    def __init__(self, build: Build, threads: int, clock: str) -> None:
        self.build = build
        # What ddst.keep_freed_memory sets, which the other build may not have.
        environment = {**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
        if build.folder is not None:
            paths = [str(build.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        program = Path(__file__).with_name("against_worker.py")
        answers, written = os.pipe()  # not standard output, to which a build may print
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program), str(written), str(threads), clock],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
            pass_fds=[written],
        )
        os.close(written)
        self._answers = os.fdopen(answers)

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; an error of the other side comes as ``{"error": ...}``."""
        assert self._process.stdin is not None
        line = ""
        with suppress(BrokenPipeError):  # it has ended: there is no answer
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.readline()
        return json.loads(line) if line else {"error": "the process of this build has ended"}

    def check(self) -> None:
        """Raises ValueError if the process does not run its build."""
        said = self.ask(do="hello")
        if "error" in said:
            raise ValueError(f"--against: {self.build.name} does not start: {said['error']}")
        if self.build.folder is not None and self.build.folder not in Path(said["file"]).resolve().parents:
            raise ValueError(f"--against: {self.build.name} is not what runs: ddst is imported from {said['file']}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._answers.close()


class Comparison:
    """Two workers: this build and another.

    Args:
        exchanges: random exchanges of every mask before anything is measured: layers in the state of a long run.
    """

    def __init__(self, other: Build, settings: Settings, exchanges: int = 0, this: Build | None = None) -> None:
        self.settings, self.exchanges = settings, exchanges
        builds = (this or Build("this build"), other)
        self.workers = [Worker(build, settings.threads, settings.clock) for build in builds]

    def __enter__(self) -> Self:
        try:
            for worker in self.workers:
                worker.check()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *details: Any) -> None:
        for worker in self.workers:
            worker.__exit__(*details)

    def measure(self, case: Case) -> Row:
        """The case, ``wrong`` (reasons), and of every pass and the step seconds of both and ``ratio``, this / other."""
        row: Row = {**asdict(case), "block": list(case.block), "threads": self.settings.threads, "wrong": []}
        row |= {"layout": self.settings.layout, "baselines": ["build"], "exchanges": self.exchanges, "passes": {}}
        request = gan_request(case) if case.op == "gan" else layer_request(case)
        request |= {"exchanges": self.exchanges, "channels_last": self.settings.layout == "channels_last"}
        programs: list[str] = []
        for which, worker in zip(("this build", "the other build"), self.workers, strict=True):
            answer = worker.ask(**request)
            whys = [answer["error"]] if "error" in answer else answer["wrong"]
            row["wrong"] += [f"{which}: {why}" for why in whys]
            programs = answer.get("programs", [])
        if row["wrong"]:
            return row
        calls = {program: self._calls(program) for program in programs}
        times: dict[str, list[list[float]]] = {program: [[], []] for program in programs}
        for i in range(self.settings.repeats):
            for program in programs:
                for side in (0, 1) if i % 2 == 0 else (1, 0):
                    times[program][side].append(self._seconds(side, program, calls[program]))
        figures = {program: _figures(*samples) for program, samples in times.items()}
        row["step"] = figures.pop("step")
        if case.op == "gan":
            row["peak"] = self._peaks()
        row["passes"] = figures
        return row

    def _peaks(self) -> Row:
        """Bytes that an iteration holds at its peak, in both builds, and the ratio this / other."""
        answers = [worker.ask(do="peak", file=peak_memory.__file__) for worker in self.workers]
        for worker, answer in zip(self.workers, answers, strict=True):
            if "error" in answer:
                raise ValueError(f"--against: {worker.build.name}: peak memory: {answer['error']}")
        ours, theirs = (answer["peak"] for answer in answers)
        return {"bytes": ours, "other": theirs, "ratio": ours / theirs}

    def _seconds(self, side: int, program: str, calls: int) -> float:
        answer = self.workers[side].ask(do="time", program=program, calls=calls)
        if "error" in answer:
            raise ValueError(f"--against: {self.workers[side].build.name}: {program}: {answer['error']}")
        return float(answer["seconds"])

    def _calls(self, program: str) -> int:
        """How many calls in a row take long enough in the faster build; the same for both. Also warms up."""
        least = min(min(self._seconds(side, program, 1) for _ in range(3)) for side in (0, 1))
        return max(1, min(1000, round(LEAST_SECONDS / max(least, 1e-7))))


def layer_request(case: Case) -> dict[str, Any]:
    """What a worker is asked to make of a layer; the mask comes from here, so that it is the same in both builds."""
    layer, mask = layer_of(case.layer), mask_of(case, torch.Generator().manual_seed(0))
    if not layer.is_plain:
        raise ValueError(f"--against compares linear layers and plain 2-D convolutions, got {case.layer}")
    names = ("in_channels", "out_channels", "kernel", "size", "stride", "padding")
    sizes = {**{name: getattr(layer, name) for name in names}, "density": float(mask.double().mean())}
    active = mask.flatten().nonzero().flatten().tolist()
    return {"do": "layer", **sizes, "active": active, **_common(case)}


def gan_request(case: Case) -> dict[str, Any]:
    """What a worker is asked to make of a GAN: the networks and optimizers of ``ddst train --preset ...``."""
    from ddst.train.config import resolve

    config = resolve({"out": "unused", "method": "static", **GANS[case.layer]})
    names = ("resolution", "width_g", "width_d", "latent", "lr", "lr_d", "betas")
    given = {name: getattr(config, name) for name in names}
    return {"do": "gan", **given, "d_steps": D_STEPS, "density": case.density, **_common(case)}


def _common(case: Case) -> dict[str, Any]:
    return {"batch": case.batch, "block": list(case.block), "dtype": case.dtype, "device": case.device}


def _figures(ours: list[float], theirs: list[float]) -> Row:
    ratio = MedianInterval.of_ratios(ours, theirs)
    bounds = {name: bound if math.isfinite(bound) else None for name, bound in asdict(ratio).items()}
    other = {"seconds": Spread.of(theirs).median, "ratio": bounds}
    return {"seconds": Spread.of(ours).median, "baselines": {"build": other}}


def text_of(row: Row) -> str:
    """A row as lines of text: one a pass and one for the step, or one that says what is wrong."""
    head = f"{row['layer']:<24} {row['batch']:>5} {100 * row['density']:4g}% "
    head += f"{row['block'][0]}x{row['block'][1]}".ljust(6) + f"{row['mask']:<6}"
    if row["wrong"]:
        return f"{head} WRONG, not timed: {', '.join(row['wrong'])}"
    lines = []
    for name, figures in (*row["passes"].items(), ("step", row["step"])):
        other = figures["baselines"]["build"]
        times = f"{name:<8} {1e3 * figures['seconds']:8.3f}  {1e3 * other['seconds']:8.3f}  "
        lines.append(f"{head if not lines else ' ' * len(head)} {times}{ratio_text(other['ratio'])}")
    if "peak" in row:
        peak = row["peak"]
        mib = f"{'peak MiB':<8} {peak['bytes'] / 2**20:8.1f}  {peak['other'] / 2**20:8.1f}"
        lines.append(f"{' ' * len(head)} {mib}  x{peak['ratio']:.3f}")
    return "\n".join(lines)


def ratio_text(ratio: dict[str, float | None]) -> str:
    """Time of this build over that of the other, with its interval.

    >>> ratio_text({"median": 1.0213, "low": 0.99, "high": None})
    'x1.021  [fewer than 6 repeats: unknown]'
    """
    low, high = ratio["low"], ratio["high"]
    interval = "fewer than 6 repeats: unknown" if low is None or high is None else f"{low:.3f}, {high:.3f}"
    return f"x{ratio['median']:.3f}  [{interval}]"


def slowest(rows: list[Row]) -> str:
    """The pass with the largest ratio, as a line."""
    found = [
        (figures["baselines"]["build"]["ratio"], f"{name} of {row['layer']} at {100 * row['density']:g} %")
        for row in rows
        if not row["wrong"]
        for name, figures in (*row["passes"].items(), ("step", row["step"]))
    ]
    if not found:
        return "nothing was measured"
    ratio, what = max(found, key=lambda pair: pair[0]["median"])
    return f"largest ratio this build / the other: {ratio_text(ratio)}, {what}"
