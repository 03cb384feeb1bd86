"""A trained generator of more than one class, through every command that reads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ddst
from ddst.cli import main
from ddst.nn import sparse_layers
from ddst.runs.export import export
from ddst.train import run
from ddst.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ddst.train.generator import read_generator
from ddst.train.log import read_log
from helpers.datasets import png, zipped
from helpers.runs import tiny


def images_of(path: Path) -> torch.Tensor:
    generator = ddst.load_generator(path)
    noise = torch.randn(10, generator.latent, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return generator(noise, torch.arange(10))


def test_it_is_read_from_all_that_holds_it(conditional_run: Path, tmp_path: Path) -> None:
    generator, about = read_generator(conditional_run)
    assert (generator.classes, about.classes, about.channels) == (10, 10, 1) and sparse_layers(generator)
    held = load_checkpoint(conditional_run / "checkpoint.pt")["ema"]["module"]
    assert all(torch.equal(value, held[key]) for key, value in generator.state_dict().items())
    expected = images_of(conditional_run)
    assert expected.shape == (10, 1, 16, 16)
    for form in ("safetensors", "dense"):
        out = tmp_path / f"{form}.safetensors"
        assert main(["export", str(conditional_run), f"--{form}", "--out", str(out)]) == 0
        assert read_generator(out)[1].classes == 10
        torch.testing.assert_close(images_of(out), expected)
    torch.testing.assert_close(images_of(conditional_run / "best.safetensors"), expected)  # judged after the last step


def test_noise_and_classes_that_do_not_fit_are_named(conditional_run: Path) -> None:
    generator = ddst.load_generator(conditional_run)
    noise = torch.zeros(2, generator.latent)
    for inputs, message in (
        ((noise, torch.tensor([0, 10])), "y must be classes from 0 to 9, got 0 to 10"),
        ((noise, torch.tensor([-1, 0])), "y must be classes from 0 to 9, got -1 to 0"),
        (
            (noise[:, :-1], torch.tensor([0, 1])),
            rf"z must be noise \[N, {generator.latent}\], got \[2, ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            generator(*inputs)


def test_it_is_drawn_from(conditional_run: Path, tmp_path: Path) -> None:
    command = ["sample", str(conditional_run), "--count", "4", "--out"]
    turns, one = tmp_path / "turns.png", tmp_path / "one.png"
    assert main([*command, str(turns)]) == 0
    assert main([*command, str(one), "--class", "9"]) == 0
    assert turns.read_bytes() != one.read_bytes()


def test_training_and_evaluate_judge_the_same_classes(conditional_run: Path) -> None:
    (judged,) = (entry for entry in read_log(conditional_run / "log.jsonl") if entry.get("event") == "metric")
    seed = read_generator(conditional_run)[1].config.seed + 3
    command = ["evaluate", str(conditional_run), "--metrics", "digits", "--samples", "40", "--seed", str(seed)]
    assert main(command) == 0
    (figure,) = json.loads((conditional_run / "evaluation.json").read_text())["figures"]
    assert figure["value"] == pytest.approx(judged["value"], rel=1e-6)  # the trainer's is fused


def test_classes_that_are_not_those_of_its_tensors(conditional_run: Path, tmp_path: Path) -> None:
    state = load_checkpoint(conditional_run / "checkpoint.pt")
    save_checkpoint(tmp_path / "checkpoint.pt", {**state, "classes": 9})
    with pytest.raises(CheckpointError, match=r"embed.weight must have the shape \(9, 128\), got \(10, 128\)"):
        export(tmp_path, "dense", tmp_path / "none.safetensors")


def test_a_class_that_no_image_is_of_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers of a dataset.json may have gaps."""
    pictures = {f"{i}.png": png(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(4)}
    data = zipped(tmp_path / "set.zip", pictures, [[name, 500 * (i % 2)] for i, name in enumerate(pictures)])
    sizes = {"model": "biggan", "resolution": 8, "width_g": 16, "width_d": 16, "latent": 12, "batch": 4, "steps": 1}
    assert run(tiny(out=str(tmp_path / "run"), data=str(data), method="dense", metric_every=0, **sizes)) == 0
    assert "2 classes by dataset.json (its 0, 500 from 0 on)" in capsys.readouterr().out
    command = ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "g.png"), "--count", "1", "--class"]
    assert main([*command, "1"]) == 0
    assert main([*command, "500"]) == 2
    assert "--class" in capsys.readouterr().err
