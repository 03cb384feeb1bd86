"""Two builds beside each other: the protocol, what a build may be, and what is said when one is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import ddst
from ddst.benchmarks import __main__ as command
from ddst.benchmarks import against, registry, report
from ddst.benchmarks.against import Build, Comparison
from ddst.benchmarks.registry import Case
from ddst.benchmarks.runner import Settings
from ddst.measure import Peak

INSTALLED = Path(ddst.__file__).resolve().parents[1]
CASE = Case("conv2d", "conv3x3-24-32-6", 2, 0.5)
LINE = ["--layer", CASE.layer, "--density", "0.5", "--batch", "2", "--repeats", "6"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "LEAST_SECONDS", 1e-6)
    monkeypatch.setattr(report, "peak", lambda *_: Peak(1e11, 1e10))


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Build]:
    """Makes a build whose package runs some lines before this one's, and some after."""

    def make(before: str = "", after: str = "") -> Build:
        package = tmp_path / "other" / "ddst"
        package.mkdir(parents=True)
        real = INSTALLED / "ddst" / "__init__.py"
        text = f"{before}\n__path__.insert(0, {str(real.parent)!r})\n{real.read_text()}\n{after}\n"
        (package / "__init__.py").write_text(text.replace("from __future__ import annotations\n", ""))
        return Build("edited", package.parent)

    return make


def test_two_builds_are_compared_pass_by_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str]] = []
    ask = against.Worker.ask

    def noted(self: against.Worker, **request: object) -> dict[str, object]:
        if request["do"] == "time":
            asked.append((comparison.workers.index(self), str(request["program"])))
        return ask(self, **request)

    monkeypatch.setattr(against.Worker, "ask", noted)
    with Comparison(Build("other", INSTALLED), Settings(repeats=6), exchanges=3) as comparison:
        row = comparison.measure(CASE)
        linear = comparison.measure(Case("linear", "linear-40-24", 3, 0.5, (8, 8), "skewed", "float64"))
        pids = {worker._process.pid for worker in comparison.workers}
    assert len(pids) == 2
    assert all(worker._process.returncode == 0 for worker in comparison.workers)
    assert row["wrong"] == linear["wrong"] == []
    assert list(row["passes"]) == ["forward", "dgrad", "wgrad"]
    for figures in (*row["passes"].values(), row["step"], linear["step"]):
        ratio = figures["baselines"]["build"]["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    # Every round measures every pass in both, and they take turns in who begins.
    sides = [side for side, program in asked if program == "forward"][-12:]
    assert sides == [0, 1, 1, 0] * 3
    text = against.text_of(row)
    named = [line.split("  [")[0].split()[-4] for line in text.splitlines()]
    assert named == ["forward", "dgrad", "wgrad", "step"]
    assert against.slowest([row]).startswith("largest ratio this build / the other: x")
    json.dumps(report.rounded(row), allow_nan=False)


def test_the_builds_that_run_are_those_that_were_named(edited: Callable[..., Build]) -> None:
    other = edited(after="__version__ = 'edited'")
    with Comparison(other, Settings(repeats=1)) as comparison:
        said = [worker.ask(do="hello") for worker in comparison.workers]
    assert [answer["version"] for answer in said] == [ddst.__version__, "edited"]
    assert other.folder is not None
    assert Path(said[1]["file"]).is_relative_to(other.folder)


def test_the_worker_calls_no_operator() -> None:
    """Only public Python, as the arguments of the operators differ between revisions."""
    program = Path(against.__file__).with_name("against_worker.py").read_text()
    assert "torch.ops" not in program
    imported = [line for line in program.splitlines() if re.match(r"\s*(import|from) ddst", line)]
    assert [line.strip() for line in imported] == ["import ddst", "from ddst.models import Discriminator, Generator"]


def test_a_wrong_build_is_named_and_not_timed(edited: Callable[..., Build]) -> None:
    wrong = """
_right = SparseConv2d.forward
SparseConv2d.forward = lambda self, x: _right(self, x) * 1.01
"""
    with Comparison(edited(after=wrong), Settings(repeats=1)) as comparison:
        row = comparison.measure(CASE)
    assert [why.split(" (")[0] for why in row["wrong"]] == [
        "the other build: forward",
        "the other build: dgrad",
        "the other build: wgrad",
    ]
    assert "WRONG, not timed" in against.text_of(row)
    assert "step" not in row
    assert against.slowest([row]) == "nothing was measured"


def test_a_build_that_fails_or_dies_is_reported(edited: Callable[..., Build]) -> None:
    fails = (
        "import os\nSparseConv2d.forward = lambda self, x: 1 / 0\nSparseLinear.forward = lambda self, x: os._exit(3)"
    )
    with Comparison(edited(after=fails), Settings(repeats=1)) as comparison:
        row = comparison.measure(CASE)
        dead = comparison.measure(Case("linear", "linear-16-16", 2, 1.0))
    assert row["wrong"] == ["the other build: ZeroDivisionError: division by zero"]
    assert dead["wrong"] == ["the other build: the process of this build has ended"]


def test_what_a_build_prints_does_not_disturb(edited: Callable[..., Build]) -> None:
    with Comparison(edited(before="print('hello from a build')"), Settings(repeats=1)) as comparison:
        assert comparison.measure(CASE)["wrong"] == []


@pytest.mark.skipif(importlib.util.find_spec("ddst.train") is None, reason="this build holds no training")
def test_whole_gan_iterations_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.GANS, "tiny", {"preset": "sngan32", "resolution": 16, "width_g": 16, "width_d": 16})
    with Comparison(Build("other", INSTALLED), Settings(repeats=6), exchanges=2) as comparison:
        row = comparison.measure(Case("gan", "tiny", 2, 0.5, (8, 8)))
    assert row["wrong"] == []
    assert row["passes"] == {}
    assert row["step"]["baselines"]["build"]["ratio"]["median"] > 0
    assert len(against.text_of(row).splitlines()) == 1


def test_fewer_than_six_repeats_state_no_interval() -> None:
    figures = against._figures([2.0] * 5, [1.0] * 5)
    assert figures["baselines"]["build"]["ratio"] == {"median": 2.0, "low": None, "high": None}
    assert "unknown" in against.ratio_text(figures["baselines"]["build"]["ratio"])


def test_exchanges_keep_the_count_and_move_the_blocks() -> None:
    import torch

    spec = importlib.util.spec_from_file_location("worker", Path(against.__file__).with_name("against_worker.py"))
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    for density in (0.25, 1.0):
        layer = ddst.SparseLinear(64, 64, density=density, block=8)
        before = layer.block_mask.clone()
        worker.exchange([layer], 20)
        assert layer.block_mask.sum() == before.sum()
        assert torch.equal(layer.block_mask, before) == (density == 1.0)


def test_the_command_prints_and_keeps_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "run.json"
    line = [*LINE, "--against", str(INSTALLED), "--exchanges", "2", "--json", str(kept)]
    assert command.main(line) == 0
    printed = capsys.readouterr().out
    assert f"in place of dense: the build of {INSTALLED}, after 2 exchanges of every mask" in printed
    assert f"{CASE.layer:<24}     2   50% 16x16 random forward" in printed
    assert "[95 % interval]" in printed
    run = report.load(kept)
    assert run["against"] == str(INSTALLED)
    (row,) = run["rows"]
    assert row["exchanges"] == 2
    assert set(row["step"]["baselines"]) == {"build"}


@pytest.mark.parametrize(
    "target, message",
    [
        ("no-such-revision", "no folder, no wheel and no commit"),
        ("--output=x", "no folder, no wheel and no commit"),
        ("{tmp}", "holds no package ddst"),
        ("{tmp}/broken.whl", "cannot be installed"),
    ],
)
def test_what_is_no_build_is_named(
    target: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.whl").write_bytes(b"no wheel")
    with pytest.raises(SystemExit):
        command.main([*LINE, f"--against={target.format(tmp=tmp_path)}"])
    assert message in capsys.readouterr().err


def test_a_build_that_does_not_start_is_named(edited: Callable[..., Build]) -> None:
    other = edited(before="raise ImportError('broken')")
    comparison = Comparison(other, Settings(repeats=1))
    with pytest.raises(ValueError, match=r"--against: edited does not start"), comparison:
        pass
    assert all(worker._process.returncode is not None for worker in comparison.workers)


def test_a_revision_is_built_once_from_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What git has of the revision is installed, not what lies in the checkout."""
    root = tmp_path / "checkout"
    (root / "ddst").mkdir(parents=True)
    (root / "ddst" / "__init__.py").write_text("first = 1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for line in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(root), *line], check=True)
    (root / "ddst" / "__init__.py").write_text("second = 2")
    installed: list[str] = []

    def install(what: Path, folder: Path, settings: dict[str, str]) -> None:
        assert settings == {"DDST_BUILD_CUDA": "0"}
        installed.append((what / "ddst" / "__init__.py").read_text())
        folder.mkdir(parents=True)

    monkeypatch.setattr(against, "ROOT", root)
    monkeypatch.setattr(against, "install", install)
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        build = against.build_of("HEAD", tmp_path / str(i))
        assert build.folder is not None
        assert build.folder.parent == root / "build" / "against"
        assert build.folder.name == build.name
    assert installed == ["first = 1"]
