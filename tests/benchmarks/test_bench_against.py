"""Two builds beside each other: the protocol, what a build may be, and what is said when one is wrong."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ddst
from ddst.benchmarks import __main__ as command
from ddst.benchmarks import against, registry, report
from ddst.benchmarks.against import Build, Comparison, Worker
from ddst.benchmarks.registry import Case
from ddst.benchmarks.runner import Settings
from ddst.measure import Peak

INSTALLED = Path(ddst.__file__).resolve().parents[1]
PROGRAM = Path(against.__file__).with_name("against_worker.py")
CASE = Case("conv2d", "conv3x3-24-32-6", 2, 0.5)
LINE = ["--layer", CASE.layer, "--density", "0.5", "--batch", "2", "--repeats", "6"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "LEAST_SECONDS", 1e-6)
    monkeypatch.setattr(report, "peak", lambda *_: Peak(1e11, 1e10))


def edited(folder: Path, before: str, after: str) -> Build:
    """A build whose package runs some lines before this one's, and some after."""
    (folder / "ddst").mkdir(parents=True)
    real = INSTALLED / "ddst" / "__init__.py"
    own = real.read_text().replace("from __future__ import annotations\n", "")
    text = f"{before}\n__path__.insert(0, {str(real.parent)!r})\n{own}\n{after}\n"
    (folder / "ddst" / "__init__.py").write_text(text)
    return Build("edited", folder)


def worker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("against_worker", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(importlib.util.find_spec("ddst.train") is None, reason="this build holds no training")
def test_the_command_compares_layers_and_whole_gan_iterations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.GANS, "tiny", {"preset": "sngan32", "resolution": 16, "width_g": 16, "width_d": 16})
    kept = tmp_path / "run.json"
    line = [*LINE, "--against", str(INSTALLED), "--exchanges", "2", "--block", "8x8", "--json", str(kept)]
    line[1:2] = [CASE.layer, "linear-40-24", "tiny"]
    assert command.main(line) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"in place of dense: the build of {INSTALLED}, after 2 exchanges of every mask" in printed
    assert printed[-1].startswith("largest ratio this build / the other: x")
    table = printed[printed.index(against.HEAD) + 1 : -1]
    names = [line.split("  [")[0].split()[-4] for line in table[:-1]]
    assert names == 2 * ["forward", "dgrad", "wgrad", "step"] + ["step"]
    assert table[-1].split()[:2] == ["peak", "MiB"]
    assert table[0].startswith(f"{CASE.layer:<24}     2   50% 8x8   random forward")
    run = report.load(kept)
    assert run["against"] == str(INSTALLED)
    for row in run["rows"]:
        assert (row["wrong"], row["exchanges"]) == ([], 2)
        for figures in (*row["passes"].values(), row["step"]):
            ratio = figures["baselines"]["build"]["ratio"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    peak = run["rows"][-1]["peak"]
    assert peak["bytes"] == pytest.approx(peak["other"], rel=1e-3)  # the same build twice
    assert peak["ratio"] == pytest.approx(1, rel=1e-3)


def test_a_wrong_a_failing_and_a_dying_build_are_reported(tmp_path: Path) -> None:
    """One that also prints, and whose version shows that it is what runs."""
    other = edited(
        tmp_path,
        "print('hello from a build')",
        """
import os
__version__ = "edited"
_right = SparseConv2d.forward
SparseConv2d.forward = lambda self, x: _right(self, x) * 1.01
SparseLinear.forward = lambda self, x: os._exit(3) if self.in_features == 16 else 1 / 0
""",
    )
    with Comparison(other, Settings(repeats=1)) as comparison:
        said = [worker.ask(do="hello") for worker in comparison.workers]
        wrong = comparison.measure(CASE)
        fails = comparison.measure(Case("linear", "linear-32-32", 2, 1.0))
        dies = comparison.measure(Case("linear", "linear-16-16", 2, 1.0))
    assert [answer["version"] for answer in said] == [ddst.__version__, "edited"]
    assert Path(said[1]["file"]).is_relative_to(tmp_path)
    which = "the other build: "
    assert [why.split(" (")[0] for why in wrong["wrong"]] == [which + name for name in ("forward", "dgrad", "wgrad")]
    assert "step" not in wrong
    assert "WRONG, not timed" in against.text_of(wrong)
    assert against.slowest([wrong]) == "nothing was measured"
    assert fails["wrong"] == [which + "ZeroDivisionError: division by zero"]
    assert dies["wrong"] == [which + "the process of this build has ended"]
    assert [worker._process.returncode for worker in comparison.workers] == [0, 3]


def test_a_build_that_does_not_start_or_is_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Worker(edited(tmp_path, "raise ImportError('broken')", ""), 1, "wall")
    with broken, pytest.raises(ValueError, match=r"--against: edited does not start"):
        broken.check()
    monkeypatch.setattr(broken, "ask", lambda **_: {"file": str(INSTALLED / "ddst" / "__init__.py")})
    with pytest.raises(ValueError, match=r"edited is not what runs: ddst is imported from"):
        broken.check()


class FakeWorker:
    """Answers without a process; notes who was asked for what."""

    asked: list[tuple[str, str, int]] = []  # noqa: RUF012

    def __init__(self, build: Build, threads: int, clock: str) -> None:
        self.build = build

    def ask(self, **request: Any) -> dict[str, Any]:
        if request["do"] != "time":
            return {"wrong": [], "programs": ["forward", "step"]}
        self.asked.append((self.build.name, request["program"], request["calls"]))
        return {"seconds": 2.0 if self.build.name == "a" else 0.5}


def test_both_are_asked_in_turn_and_take_turns_in_who_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "Worker", FakeWorker)
    monkeypatch.setattr(against, "LEAST_SECONDS", 1.5)
    row = Comparison(Build("b"), Settings(repeats=6), this=Build("a")).measure(CASE)
    asked = FakeWorker.asked[-24:]
    assert [program for _, program, _ in asked] == ["forward", "forward", "step", "step"] * 6
    assert [name for name, program, _ in asked if program == "step"] == ["a", "b", "b", "a"] * 3
    assert {calls for _, _, calls in asked} == {3}  # of the faster build, the same for both
    expected = {"seconds": 0.5, "ratio": {"median": 4.0, "low": 4.0, "high": 4.0}}
    assert row["step"] == {"seconds": 2.0, "baselines": {"build": expected}}
    assert against.slowest([row]) == (
        "largest ratio this build / the other: x4.000  [4.000, 4.000], forward of conv3x3-24-32-6 at 50 %"
    )


def test_fewer_than_six_repeats_state_no_interval() -> None:
    figures = against._figures([2.0] * 5, [1.0] * 5)
    assert figures["baselines"]["build"]["ratio"] == {"median": 2.0, "low": None, "high": None}
    assert "unknown" in against.ratio_text(figures["baselines"]["build"]["ratio"])


def test_the_worker_calls_no_operator() -> None:
    """Only public Python, as the arguments of the operators differ between revisions."""
    program = PROGRAM.read_text()
    assert "torch.ops" not in program
    imported = [line for line in program.splitlines() if re.match(r"\s*(import|from) ddst", line)]
    assert [line.strip() for line in imported] == ["import ddst", "from ddst.models import Discriminator, Generator"]


def test_both_builds_get_the_mask_of_the_case() -> None:
    case = Case("linear", "linear-40-24", 3, 0.5, (8, 8), "skewed", "float64")
    request = {**against.layer_request(case), "exchanges": 0, "channels_last": True}
    wrong, programs = worker_module().layer_programs(request)
    assert (wrong, list(programs)) == ([], ["forward", "dgrad", "wgrad", "step"])
    mask = against.mask_of(case, torch.Generator().manual_seed(0))
    assert request["active"] == mask.flatten().nonzero().flatten().tolist()
    assert programs["wgrad"]().shape == (int(mask.sum()), 8, 8)


def test_exchanges_keep_the_count_and_move_the_blocks() -> None:
    for density in (0.25, 1.0):
        layer = ddst.SparseLinear(64, 64, density=density, block=8)
        before = layer.block_mask.clone()
        worker_module().exchange([layer], 20)
        assert layer.block_mask.sum() == before.sum()
        assert torch.equal(layer.block_mask, before) == (density == 1.0)


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


def test_a_wheel_is_unpacked_into_a_folder(tmp_path: Path) -> None:
    wheel = tmp_path / "ddst-0.0.7-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("ddst/__init__.py", "__version__ = '0.0.7'")
        packed.writestr("ddst-0.0.7.dist-info/METADATA", "Metadata-Version: 2.1\nName: ddst\nVersion: 0.0.7\n")
        packed.writestr("ddst-0.0.7.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr("ddst-0.0.7.dist-info/RECORD", "")
    build = against.build_of(str(wheel), tmp_path / "scratch")
    assert build.name == wheel.stem
    assert build.folder is not None
    assert (build.folder / "ddst" / "__init__.py").read_text() == "__version__ = '0.0.7'"


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
