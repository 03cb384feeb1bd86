"""What `make gpu` runs on: clock and graphs, processes, time, files, and the program that starts it."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ddst
from ddst.benchmarks.gpu import __main__ as program
from ddst.benchmarks.gpu import results, run, timing, workers
from ddst.benchmarks.gpu.budget import SHARES, Budget, Deadline
from ddst.benchmarks.gpu.journal import Progress
from ddst.benchmarks.gpu.table import markdown
from ddst.benchmarks.gpu.timing import HostWatch, Program, in_turn, precision
from helpers.copies import SERVER
from helpers.worker_tasks import act

ROOT = Path(ddst.__file__).resolve().parents[1]


class FakeDevice:
    """A device whose calls take as long as they say; it notes what is captured and replayed."""

    def __init__(self, costs: dict[Any, float]) -> None:
        self.costs = costs
        self.captures: list[tuple[int, int | None]] = []
        self.replays: list[Any] = []

    def capture(self, works: Sequence[Any], keep: int | None = None) -> Any:
        self.captures.append((len(works), keep))
        return list(works)

    def seconds(self, captured: Any) -> float:
        self.replays.append(captured[0])
        return sum(self.costs[work] for work in captured)


def test_a_program_repeats_its_call_until_a_replay_is_long_enough() -> None:
    device = FakeDevice({"fast": 1e-4, "slow": 1.0})
    fast, slow = Program(device, ["fast"], target=2e-3), Program(device, ["slow"], target=2e-3)
    assert device.captures == [(1, 0), (20, 0), (1, 0)]  # the slow one is long enough at once
    assert fast.seconds() == pytest.approx(1e-4)
    assert slow.seconds() == 1.0


def test_a_cold_program_goes_round_its_tensors_and_keeps_a_result_of_each_but_one() -> None:
    device = FakeDevice({"a": 1e-4, "b": 3e-4, "c": 2e-4})
    cold = Program(device, ["a", "b", "c"], target=6e-3)
    assert device.captures == [(3, 2), (30, 2)]
    assert cold.seconds() == pytest.approx(2e-4)  # the mean


def test_programs_are_measured_in_turn() -> None:
    device = FakeDevice({"a": 1.0, "b": 2.0})
    programs = [Program(device, [name]) for name in "ab"]
    device.replays.clear()
    assert in_turn(programs, 3) == [[1.0] * 3, [2.0] * 3]
    assert device.replays == ["a", "b"] * 3


def test_a_rerun_stands_for_a_graph() -> None:
    x = torch.ones(3)
    watch = HostWatch()
    captured = watch.capture([lambda: x * 2, lambda: x + 1])
    outputs = list(captured.outputs)
    x.fill_(5.0)
    captured.replay()
    assert [o.tolist() for o in outputs] == [[10.0] * 3, [6.0] * 3]
    assert len(watch.capture([lambda: x] * 5, keep=2).outputs) == 2
    assert watch.seconds(watch.capture([lambda: x], keep=0)) > 0


def test_what_breaks_a_capture_is_what_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending a broken capture raises as well, and says less."""
    said: list[str] = []

    class Graph:
        def capture_begin(self) -> None:
            said.append("begin")

        def capture_end(self) -> None:
            said.append("end")
            raise RuntimeError("operation failed due to a previous error during capture")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: nullcontext(),
        "synchronize": lambda: None, "CUDAGraph": Graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)

    def work() -> None:
        if said:
            raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        timing.CudaGraph([work])
    assert said == ["begin", "end"]


def test_precision_is_put_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with precision("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
        with precision("ieee"):
            assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    with timing.cudnn_benchmark(True):
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers begin as copies: there is no device here that forked processes could not use."""
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: {"spawn": SERVER}[method])


@pytest.mark.usefixtures("copied")
def test_tasks_end_each_in_their_own_way_and_the_others_go_on() -> None:
    tasks = [("fail", 2), ("lose", 4), ("die", 3), ("do", 5)]
    done = {d.task: d for d in workers.run(act, tasks, 2, Deadline(300.0))}
    assert set(done) == set(tasks)
    assert done["fail", 2].trouble == "ValueError: no 2"
    assert done["die", 3].trouble == "its process ended with exit code 3"
    assert (done["lose", 4].result, done["lose", 4].trouble) == ({"number": 4}, "the device is gone")
    assert done["do", 5].result == 5 and done["do", 5].trouble is None


@pytest.mark.usefixtures("copied")
def test_what_hangs_is_cut_off_and_what_waits_is_named() -> None:
    hanging, waiting = workers.run(act, [("hang", 1), ("do", 2)], 1, Deadline(1.5))
    assert hanging.task == ("hang", 1)
    assert str(hanging.trouble).startswith("cut off")
    assert str(waiting.trouble).startswith("not begun")
    inline = list(workers.run(act, [("do", 1), ("do", 2)], 0, Deadline(60.0)))
    assert [d.result for d in inline] == [1, 2]


class Stubborn:
    """A process that does not end when its connection does."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def join(self, seconds: float | None = None) -> None:
        self.did.append("join")

    def is_alive(self) -> bool:
        return "kill" not in self.did

    def kill(self) -> None:
        self.did.append("kill")


def test_a_process_that_does_not_end_is_killed() -> None:
    worker, process = object.__new__(workers._Worker), Stubborn()
    worker.connection, worker.process = SimpleNamespace(close=lambda: None), process  # type: ignore[assignment]
    worker.end()
    assert process.did == ["join", "kill", "join"]


def test_a_deadline_passes() -> None:
    now = [0.0]
    deadline = Deadline(5.0, lambda: now[0])
    assert (deadline.left, deadline.passed) == (5.0, False)
    now[0] = 7.0
    assert (deadline.left, deadline.passed) == (0.0, True)


def test_time_left_over_goes_to_the_parts_after() -> None:
    now = [0.0]
    budget = Budget(100.0, ["a", "b", "c"], {"a": 2.0, "b": 1.0, "c": 1.0}, clock=lambda: now[0])
    assert budget.deadline("a").left == 50.0
    now[0] = 10.0  # much less than it could have had
    assert budget.deadline("b").left == 45.0
    now[0] = 95.0  # more
    assert budget.deadline("c").left == 5.0
    assert set(SHARES) == set(run.PHASES)


def test_results_are_written_whole_after_every_part(tmp_path: Path) -> None:
    def draw(parts: dict[str, Any], file: Path) -> None:
        if not parts["kernels"]["rows"]:
            raise ValueError("nothing to draw")
        file.write_bytes(b"picture")

    def draw_without_matplotlib(parts: dict[str, Any], file: Path) -> None:
        raise ImportError("No module named 'matplotlib'")

    kept = results.Results(
        tmp_path / "out",
        lambda parts: ", ".join(parts),
        {"kernels": ("a.png", draw), "host": ("b.png", draw_without_matplotlib)},
    )
    kept.put("correctness", {"wrong": ["forward"], "error": 1.23456789})
    assert json.loads((tmp_path / "out" / "results.json").read_text())["correctness"]["error"] == 1.235
    kept.put("kernels", {"wrong": [], "rows": []})
    assert not (tmp_path / "out" / "a.png").exists()
    kept.put("kernels", {"wrong": [], "rows": [{"ms": 1}]})
    kept.put("host", {})
    assert (tmp_path / "out" / "table.md").read_text() == "correctness, kernels, host, pictures\n"
    assert (tmp_path / "out" / "a.png").read_bytes() == b"picture"
    assert kept.wrong == ["correctness: forward"]
    assert "matplotlib" in json.loads((tmp_path / "out" / "results.json").read_text())["pictures"]["missing"]["b.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "results.json", "table.md"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    results.write_whole(file, "old")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(results.os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        results.write_whole(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    assert file.read_text() == "old"


def test_a_part_that_fails_is_wrong_and_the_next_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(deadline: Deadline, progress: Progress) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    kept = results.Results(tmp_path, lambda parts: str(sorted(parts)), {})
    parts = {"host": broken, "train": lambda deadline, progress: {"left": deadline.left, "trimmed": "a bit"}}
    program.run_parts(parts, kept, Budget(10.0, parts, clock=lambda: 0.0))
    assert kept.wrong == ["host: RuntimeError: out of memory"]
    assert kept.parts["train"]["left"] == 10.0
    assert "train: 0 s, 0 wrong, no time for 1" in capsys.readouterr().out


def test_rates_that_cannot_be_measured_keep_nothing_else_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str) -> dict[str, Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(program.environment, "measure", broken)
    known = program.surroundings("cpu")
    assert known["device"] == "cpu" and known["versions"]["torch"] == torch.__version__
    assert known["wrong"] == ["rates were not measured: RuntimeError: operation not permitted when stream is capturing"]
    assert "operation not permitted" in markdown({"environment": known})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says something on machines without a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_builds_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "build", lambda: pytest.fail("built"))
    assert run.main(["--only", "host"]) == run.NO_GPU == 3
    said = capsys.readouterr().err
    assert "no GPU is visible to torch" in said and said.count("\n") == 1
    assert program.main([]) == run.NO_GPU
    with pytest.raises(SystemExit) as ended:
        run.main(["--only", "everything"])
    assert ended.value.code == 2


@pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="not a source tree")
def test_make_gpu_starts_it_with_its_arguments() -> None:
    made = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu", "PYTHON=python-of-mine", "ARGS=--only host"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.stdout.split() == ["python-of-mine", "-P", "benchmarks/gpu/run.py", "--only", "host"]


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="not a source tree")
def test_the_working_tree_is_found_first_in_the_program_and_in_its_workers() -> None:
    code = f"""
import runpy, sys
runpy.run_path({str(ROOT / "benchmarks" / "gpu" / "run.py")!r}, run_name="__mp_main__")
assert type(sys.meta_path[0]).__name__ == "WorkingTree"
for name in ("ddst", "ddst.benchmarks", "ddst.kernels"):
    print(sys.meta_path[0].find_spec(name).origin)
print(sys.meta_path[0].find_spec("torch"), sys.meta_path[0].find_spec("ddst.nn"))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    origins = [str(ROOT / folder / "__init__.py") for folder in ("ddst", "benchmarks", "kernels")]
    assert done.stdout.split() == [*origins, "None", "None"]


def test_importing_the_starter_changes_nothing() -> None:
    before = list(sys.meta_path)
    runpy.run_path(str(Path(run.__file__)), run_name="elsewhere")
    assert sys.meta_path == before
