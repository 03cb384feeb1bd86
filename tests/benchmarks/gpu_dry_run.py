"""All of `make gpu`, played on a pretended device: what it does in which order, what it leaves, and its faults."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddst.benchmarks import tune
from ddst.benchmarks.gpu import __main__ as program
from ddst.benchmarks.gpu import (
    calls,
    correctness,
    environment,
    half_blocks,
    host_time,
    iteration,
    kernel_rows,
    pictures,
    primitives,
    problems,
    run,
    sweep,
    training,
    workers,
)
from ddst.benchmarks.gpu.budget import CUT_OFF, ClosingTime, Deadline
from ddst.benchmarks.gpu.run import PHASES
from ddst.benchmarks.gpu.table import markdown
from ddst.kernels import configs
from ddst.ops.cuda import compiled
from helpers import fake_cuda
from helpers.dry_run import CONV, Stage, staged

LOST = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with staged(tmp_path, monkeypatch) as stage:
        yield stage


def test_a_first_call_proves_everything_and_a_second_takes_it_over(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    code = stage.call()
    first = capsys.readouterr().out
    assert (code, stage.builds) == (0, 1), first
    parts = json.loads((stage.out / "results.json").read_text())
    assert set(PHASES) < set(parts)
    assert [line.split(":")[0] for line in first.splitlines() if ": at most" in line] == list(PHASES)
    for part in parts.values():
        for row in [part, *part.get("rows", []), *part.get("chosen", []), *part.get("groups", [])]:
            assert row["device"] == fake_cuda.NAME
    words = first[first.index(": new results, the latest first") :]
    order = [words.index(what) for what in ("host ", "tuned ", "iteration sngan32 dense", "over dense: forward")]
    assert order == sorted(order), "the last part first"
    assert all("peak_bytes" in row for row in parts["iteration"]["rows"])
    assert parts["correctness"]["checked"] > 100
    journal = (stage.out / "journal.jsonl").read_text()
    assert {json.loads(line)["part"] for line in journal.splitlines()} == set(PHASES)

    assert (stage.call(), stage.builds) == (0, 1)
    second = capsys.readouterr().out
    assert "2 libraries and 0 kernels" in second
    assert (stage.out / "journal.jsonl").read_text() == journal, "nothing was done again"
    assert f"{fake_cuda.NAME}: no new result\nearlier results" in second
    assert parts.keys() == json.loads((stage.out / "results.json").read_text()).keys()

    for file in (stage.folder / "tables").iterdir():
        file.unlink()  # another machine: the tuning table comes with the results
    assert stage.call("--only", "host", "--anew") == 0
    assert (stage.builds, [f.name for f in (stage.folder / "tables").iterdir()]) == (2, ["nvidia-pretended.json"])
    assert run.main(["--only", "host", "--objects", str(stage.archive)]) == 0
    assert (stage.folder / "benchmarks" / "results" / "nvidia-pretended" / "table.md").is_file()


def test_a_call_that_is_cut_off_leaves_what_it_has(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = iteration._measure

    def cut(variant: Any, *rest: Any) -> dict[str, Any]:
        if variant.density is not None:
            raise KeyboardInterrupt
        return measure(variant, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(iteration, "_measure", cut)
        with pytest.raises(KeyboardInterrupt):
            stage.call("--only", "iteration", "host")
    kept = json.loads((stage.out / "results.json").read_text())["iteration"]["rows"]
    assert [row["density"] for row in kept] == [None]
    assert stage.call("--only", "iteration") == 0
    out = capsys.readouterr().out
    assert stage.builds == 1, "its objects had been kept at once"
    assert (
        out.count("iteration sngan32 dense") == 1 and "graph 1.00x" in out
    )  # dense again, as what it is compared with


def test_time_that_is_over_ends_the_program_whatever_hangs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [SimpleNamespace(kill=lambda: ended.append("kid"))])
    closing = ClosingTime(0.0, lambda: ended.append("said"), ended.append)
    with closing:
        closing._timer.join()
    assert ended == ["said", "kid", CUT_OFF]
    results = SimpleNamespace(wrong=["a" * 300], parts={}, folder="there")
    program.last_words(results, cut_off=True)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "no device: no new result\n0 wrong\ncut off; written: there" in said and "a" * 201 not in said
    with ClosingTime(100.0, lambda: None):
        pass


def test_what_cannot_be_built_or_has_no_gpu_ends_early(
    stage: Stage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.build_code = 1
    assert stage.call() == run.CANNOT_BUILD
    assert "make gpu: the build failed with exit code 1:\ncompiling\nfailed" in capsys.readouterr().err
    stage.build_code = 0
    assert stage.call("--prebuild", "sm_90a") == 0
    assert "MiB in" in capsys.readouterr().out and not stage.out.exists()
    assert run.prebuilt(stage.archive, run.objects.facts_of(run.ROOT, "sm_90a"))
    assert not run.prebuilt(stage.archive, run.objects.facts_of(run.ROOT, "sm_100a"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        assert "needs torch" in str(run.no_gpu())
    for start in (run.__file__, str(program.__file__)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(sys, "argv", ["gpu", "--only", "host"])
            patch.setattr(sys, "meta_path", list(sys.meta_path))
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(start, run_name="__main__")
        assert ended.value.code == run.NO_GPU


def wrongs(check: Any, task: Any, lost: bool) -> Any:
    """What a process finds wrong, as the last it says if the device is lost."""
    if not lost:
        return check(task)["wrong"]
    with pytest.raises(workers.DeviceLostError) as ended:
        check(task)
    return ended.value.result["wrong"]


def test_faults_of_every_part_are_said(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part, with something planted."""
    specs, (group, *_) = kernel_rows.specs(), correctness.groups("cuda")[0]
    known = environment.describe("cuda") | environment.measure("cuda")

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    for error in (RuntimeError("odd"), LOST):
        with monkeypatch.context() as patch:
            patch.setattr(kernel_rows, "packed_work", broken)
            part = kernel_rows.measure_all(specs, known, "cuda", Deadline(100.0))
            assert part["wrong"] and ("rows" in part)
        with monkeypatch.context() as patch:
            patch.setattr(correctness, "program", broken)
            patch.setattr(iteration, "_measure", broken)
            patch.setattr(sweep, "configured", broken)
            patch.setattr(tune, "times", broken)
            patch.setattr(tune, "configured", broken)
            assert iteration.measure_all(iteration.VARIANTS, "cuda", Deadline(100.0))["wrong"]
            for check, task in (
                (sweep.check_sweep, sweep.sweeps("cuda")[0]),
                (tune.check, tune.Task(specs[0], "wgrad", "cuda")),
                (correctness.check_group, group),
            ):
                assert wrongs(check, task, error is LOST)
        with monkeypatch.context() as patch:
            patch.setattr(tune, "times", broken)
            assert tune.tune(specs[:1], "cuda", Deadline(100.0))["wrong"]
    with monkeypatch.context() as patch:  # each result differs from the one before
        patch.setattr(torch, "equal", lambda a, b: False)
        patch.setattr(tune.torch, "equal", lambda a, b: False)
        assert any("other bits when repeated" in why for why in correctness.check_group(group)["wrong"])
        assert sweep.check_sweep(sweep.sweeps("cuda")[0])["wrong"]
        assert tune.check(tune.Task(specs[1], "wgrad", "cuda"))["wrong"]
    with monkeypatch.context() as patch:
        patch.setattr(correctness, "compare", lambda *_, **__: (1.0, "off"))
        assert len(correctness.check_group(replace(group, shapes=group.shapes[:1]))["wrong"]) > 20
    with monkeypatch.context() as patch:
        patch.setattr(iteration, "wrong_gradients", lambda players: [])
        patch.setattr(iteration, "gan_iteration", lambda *_: (torch.tensor(float("nan")), torch.tensor(0.0)))
        row = iteration.measure_all(iteration.VARIANTS[:1], "cuda", Deadline(100.0))
        assert "a loss is not finite" in row["wrong"][0]
    with monkeypatch.context() as patch:
        patch.setattr(configs, "gather_fits", lambda *_: False)
        assert sweep.check_sweep(sweep.sweeps("cuda")[0]) == {"configurations": 0, "wrong": []}
    with monkeypatch.context() as patch:
        patch.setattr(calls, "usable", lambda *_: {"triton": "no"})
        assert set(host_time.measure("cuda")["seconds"]) == {"dense"}


def test_no_time_is_said_of_every_part(stage: Stage) -> None:
    late, known = Deadline(0.0), {"l2_bytes": 0}
    assert len(kernel_rows.measure_all(kernel_rows.specs(), known, "cuda", late)["trimmed"]) == 2
    assert iteration.measure_all(iteration.VARIANTS, "cuda", late)["trimmed"]
    assert sweep.check_all(sweep.sweeps("cuda"), 0, late)["trimmed"]
    assert tune.tune(kernel_rows.specs(), "cuda", late)["trimmed"]
    assert all("not begun" in why for why in correctness.check_all(correctness.groups("cuda")[0], 0, late)["wrong"])
    assert correctness.check_all([], 0, late)["wrong"] == ["no backend is usable: nothing was checked"]
    assert training.train("cuda", late)["wrong"] == ["no step was done"]
    said, trouble = primitives._run(["sleep", "9"], late)
    assert trouble == "did not end in time", said


class Soon:
    """A deadline that passes once something has been done."""

    left = 100.0

    def __init__(self, asked: int) -> None:
        self._asked = asked

    @property
    def passed(self) -> bool:
        self._asked -= 1
        return self._asked < 0


def test_time_that_ends_within_a_part_is_said(stage: Stage) -> None:
    part = training.train("cuda", Soon(1))  # type: ignore[arg-type]
    assert part["trimmed"] == "no time for the last 7 steps" and not part["wrong"]
    part = tune.tune(kernel_rows.specs()[:1], "cuda", Soon(0))  # type: ignore[arg-type]
    assert [why.split(": ")[1] for why in part["trimmed"]] == ["checked, not timed"] * 3


def test_what_training_should_have_done_is_asked() -> None:
    updater = SimpleNamespace(resolution=0.01)
    config = SimpleNamespace(interval_g=1, interval_d=1, warmup=0, density=0.3, density_d_min=0.2, density_d_max=0.4)
    scheduler = SimpleNamespace(training_g=SimpleNamespace(updater=updater), updater_d=updater)
    trainer: Any = SimpleNamespace(config=config, step=5, scheduler=scheduler)
    reports = [SimpleNamespace(density_g=0.4, density_d=0.9)]
    found = training._complaints(trainer, {"moved_g": [], "decisions": 0}, reports)
    assert [why.split(" ")[0] for why in found] == ["no", "G's", "D's", "no"]
    bad = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(bad.weight, float("inf"))
    (why,) = iteration.unfinite(SimpleNamespace(generator=bad, discriminator=torch.nn.ReLU()))  # type: ignore[arg-type]
    assert why == "generator's parameter weight is not finite"


def test_what_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment._installed("no-such-package") is None and environment._said(["no-such-program"]) is None
    assert run.WorkingTree.find_spec("torch") is None and run.WorkingTree.find_spec("ddst") is not None
    half, shape, ones = half_blocks.HALVES[0], (16, 16, 1, 1), ((1, 1),) * 3
    with pytest.raises(calls.RefusedError, match="no fused half block on 'xla'"):
        half.run("cpu", "xla", (16, 16), torch.float32)
    monkeypatch.setattr(compiled, "supports", lambda *_: (False, "too wide"))
    with pytest.raises(calls.RefusedError, match="too wide"):
        half._refuse("cuda", "cuda", (16, 16), torch.float32, shape, ones)
    with pytest.raises(calls.RefusedError, match="too wide"):
        calls.bound("linear", [torch.zeros(1), torch.zeros(1, 16, 16), None, None, (16, 16)], "cuda")
    for draw in (pictures.draw_kernels, pictures.draw_iterations):
        with pytest.raises(ValueError, match="no row to draw"):
            draw({}, Path("nowhere.png"))
    said = markdown(
        {
            "primitives": {"missing": "no nvcc"}, "train": {}, "pictures": {"missing": {"a.png": "no matplotlib"}},
            "correctness": {"checked": 0, "groups": [], "unusable": {"cuda fp32": "not built"}},
        }
    )  # fmt: skip
    for text in ("no nvcc", "No step was done", "a.png: no matplotlib", "Not usable: cuda fp32: not built"):
        assert text in said


def test_tuning_has_a_command_of_its_own(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--layer", CONV.name, "--density", "1.0", "--block", "16x16", "--dtype", "fp32", "--batch", "2"]
    assert tune.main(line) == 0
    assert f"forward of {CONV.name} batch 2 fp32 16x16 100 %: " in capsys.readouterr().out
    assert tune.main([*line, "--budget", "0"]) == 0
    assert "trimmed: forward of" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tune.main(["--layer", "convt4x4-64-32-8"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert tune.main(line) == 3


def test_every_shape_of_a_problem_can_be_made() -> None:
    for shape in problems.SHAPES:
        tensors = problems.Tensors.make(shape, (16, 16), torch.float32, "cpu", 0)
        assert [tensors.arguments(op)[0] for op in ("forward", "dgrad", "wgrad", "scores")]


def test_a_worker_serves_until_its_pipe_ends() -> None:
    class Pipe:
        def __init__(self, tasks: list[Any]) -> None:
            self.tasks, self.sent = tasks, []  # type: list[Any], list[Any]

        def recv(self) -> Any:
            if not self.tasks:
                raise EOFError
            return self.tasks.pop(0)

        def send(self, what: Any) -> None:
            self.sent.append(what)

    def act(task: str) -> str:
        if task == "lose":
            raise workers.DeviceLostError("gone", 3)
        if task == "fail":
            raise ValueError("no")
        return task

    pipes = Pipe(["do", "fail"]), Pipe(["lose", "do"])
    for pipe in pipes:
        workers._serve(pipe, act)
    assert pipes[0].sent == [("done", "do"), ("failed", "ValueError: no")]
    assert pipes[1].sent == [("lost", ("gone", 3))]
