"""Curves of a run in TensorBoard and in Weights & Biases, beside the log and without a change of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddst.cli import main
from ddst.train import run
from ddst.train.log import read_log
from helpers.runs import log_without_seconds, tiny


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, plain = tmp_path / "watched", tmp_path / "plain"
    assert run(tiny(out=str(out), live="tensorboard", stop_after=7)) == 0
    assert run({"out": str(out), "resume": True}) == 0  # which remembers it
    assert run(tiny(out=str(plain))) == 0
    assert log_without_seconds(out)[1:] == log_without_seconds(plain)[1:]
    events = accumulator.EventAccumulator(str(out / "tensorboard")).Reload()
    steps = [entry for entry in read_log(out / "log.jsonl") if "event" not in entry]
    held = [(e.step, e.value) for e in events.Scalars("loss_d")]
    assert [step for step, _ in held] == [entry["step"] for entry in steps] == list(range(1, 15))
    assert [value for _, value in held] == pytest.approx([entry["loss_d"] for entry in steps], rel=1e-6)
    assert {"loss_g", "density_d", "balance_ratio", "mean_sign", "seconds", "metric/digits"} <= set(
        events.Tags()["scalars"]
    )


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    out = tmp_path / "watched"
    assert run(tiny(out=str(out), live="wandb", steps=3)) == 0
    (file,) = out.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert all(name in content for name in (b"loss_d", b"density_g", b"metric/digits", b"ddst-relaxed"))


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    options = [
        word for name, value in (("width-g", 16), ("width-d", 16), ("steps", 2)) for word in (f"--{name}", str(value))
    ]
    assert main(["train", "--out", str(tmp_path / "run"), "--live", "wandb", "--resolution", "8", *options]) == 2
    assert not (tmp_path / "run").exists()
    assert "ddst train: error: wandb is missing: pip install 'ddst[live]'" in capsys.readouterr().err


def test_a_service_that_cannot_begin_is_one_line_and_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As Weights & Biases without a login, and TensorBoard where a file is in the way of its folder."""
    wandb = pytest.importorskip("wandb")
    words = [f"--{name}={value}" for name, value in (("width-g", 16), ("width-d", 16), ("steps", 2), ("resolution", 8))]

    def no_login(dir: str, **settings: object) -> None:
        (Path(dir) / "wandb").mkdir()
        (Path(dir) / "wandb" / "debug.log").touch()
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.\n(more of it)")

    monkeypatch.setattr(wandb, "init", no_login)
    out = tmp_path / "run"
    words += ["--data-cache=none", "--compare-steps=0", "--fd-samples=40", "--block=8x8", "--density=0.3"]
    assert main(["train", "--out", str(out), "--live", "wandb", *words]) == 2
    said = capsys.readouterr().err
    assert said == "ddst train: error: --live wandb cannot begin: No API key configured. Use `wandb login` to log in.\n"
    assert not out.exists()

    out.mkdir()
    (out / "tensorboard").write_text("in the way")
    assert main(["train", "--out", str(out), "--live", "tensorboard", *words]) == 2
    assert "ddst train: error: --live tensorboard cannot begin: " in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["tensorboard"]
    assert main(["train", "--out", str(out), *words]) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", "3", "--live", "wandb"]) == 2
    assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0
