"""ddst sample: grids, files, walks and classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ddst
from ddst.cli import main
from ddst.models import biggan, stylegan2
from ddst.runs.sample import draw, labels_of, noise_of, walks
from ddst.train.options import ConfigError


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_files_and_grid_show_the_same_images(sparse_run: Path, tmp_path: Path) -> None:
    grid, folder = tmp_path / "grid.png", tmp_path / "images"
    command = ["sample", str(sparse_run), "--out", str(grid), "--count", "130", "--seed", "7"]
    assert main([*command, "--folder", str(folder)]) == 0
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:05d}.png" for i in range(130)]
    generator = ddst.load_generator(sparse_run)
    images = torch.cat(list(draw(generator, noise_of(generator, 130, 7))))
    expected = ((images + 1) * 127.5).round().to(torch.uint8)
    first, last = pixels(folder / "00000.png"), pixels(folder / "00129.png")
    assert first.shape == (8, 8, 3) and (first == expected[0].permute(1, 2, 0).numpy()).all()
    assert (last == expected[129].permute(1, 2, 0).numpy()).all()
    # Twelve columns; every pixel six times, a line of one pixel between.
    shown = pixels(grid)
    assert shown.shape == (1 + 11 * 49, 1 + 12 * 49, 3)
    assert (shown[1 + 10 * 49 :: 6, 1 + 9 * 49 :: 6][:8, :8] == last).all()
    before = grid.read_bytes()
    assert main(command) == 0 and grid.read_bytes() == before
    assert main([*command[:-1], "8"]) == 0 and grid.read_bytes() != before


def test_a_walk_ends_at_two_noises_and_has_their_lengths() -> None:
    for latent in (1, 2, 64):
        rows = walks(latent, 14, 5, seed=3)
        assert rows.shape == (14, latent) and rows.isfinite().all()
        ends = torch.randn(2, 3, latent, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(rows[[0, 5, 10]], ends[0])
        torch.testing.assert_close(rows[[4, 9]], ends[1, :2])
    lengths, between = rows[:5].norm(dim=1), ends[:, 0].norm(dim=1)
    torch.testing.assert_close(lengths, torch.lerp(between[0], between[1], torch.linspace(0, 1, 5)))


def test_a_grid_of_walks(sparse_run: Path, tmp_path: Path) -> None:
    grid = tmp_path / "walk.png"
    assert main(["sample", str(sparse_run), "--out", str(grid), "--count", "9", "--interpolate"]) == 0
    generator = ddst.load_generator(sparse_run)
    (images,) = draw(generator, walks(16, 9, 3, seed=0))
    middle = ((images[4] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert (pixels(grid)[1 + 49 :: 6, 1 + 49 :: 6][:8, :8] == middle).all()


def test_a_generator_that_draws_noise_draws_the_same_for_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = stylegan2.Generator(resolution=8, width=8, latent=16, depth=1, channels=1).eval()
    for name, parameter in generator.named_parameters():
        if name.endswith("strength"):
            torch.nn.init.ones_(parameter)
    monkeypatch.setattr("ddst.runs.sample.read_generator", lambda source: (generator, SimpleNamespace(step=0)))

    def sampled(*options: str) -> bytes:
        torch.randn(3)  # Wherever torch's own generator stands.
        before, grid = torch.get_rng_state(), tmp_path / "grid.png"
        assert main(["sample", "a run", "--out", str(grid), "--count", "4", *options]) == 0
        assert torch.equal(torch.get_rng_state(), before)
        return grid.read_bytes()

    assert sampled() == sampled() and sampled("--seed", "5") == sampled("--seed", "5")
    same = torch.zeros(129, 16)
    five, again, six = (torch.cat(list(draw(generator, same, seed=seed))) for seed in (5, 5, 6))
    assert torch.equal(five, again) and not torch.equal(five[0], six[0])
    assert not torch.equal(five[0], five[128])  # of two parts


def test_a_walk_stays_in_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = biggan.Generator(multipliers=(2, 1), width=8, attention=8, classes=3).eval()
    given: list[torch.Tensor] = []
    generator.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    monkeypatch.setattr("ddst.runs.sample.read_generator", lambda source: (generator, SimpleNamespace(step=0)))
    command = ["sample", "a run", "--out", str(tmp_path / "walks.png"), "--count", "14", "--interpolate"]
    assert main(command) == 0
    assert main([*command, "--class", "2"]) == 0
    assert given[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 2 and given[1].tolist() == [2] * 14


def test_classes() -> None:
    generator = biggan.Generator(multipliers=(2, 1), width=8, attention=8, classes=3).eval()
    assert labels_of(generator, 5).tolist() == [0, 1, 2, 0, 1]
    labels = labels_of(generator, 130, 2)
    assert labels.tolist() == [2] * 130
    noise = noise_of(generator, 130, 0)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.cat(list(draw(generator, noise, labels)))[128:], generator(noise, labels)[128:]
        )
    with pytest.raises(ConfigError, match="--class must be from 0 to 2, got 3"):
        labels_of(generator, 5, 3)


def test_a_folder_in_which_nothing_may_be_made_is_refused(
    sparse_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # As root everything may be.
    for module in ("evaluate", "sample"):  # In this order: the first import of evaluate takes what sample has.
        monkeypatch.setattr(f"ddst.runs.{module}.draw", lambda *given: pytest.fail("images were drawn"))
    before = sorted(sparse_run.iterdir())
    for command, why in (
        (["sample", sparse_run, "--folder", tmp_path], "nothing may be made in it"),
        (["evaluate", sparse_run, "--samples", "11"], f"nothing may be made in {sparse_run}"),
        (["replay", sparse_run], f"nothing may be made in {sparse_run}"),
    ):
        assert main([str(word) for word in command]) == 2
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith(f"ddst {command[0]}: error: ") and line.endswith(why) and said.out == ""
    assert sorted(sparse_run.iterdir()) == before


def test_what_cannot_be_is_one_line(sparse_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.png").write_text("mine")
    (tmp_path / "full" / "checkpoint.pt").mkdir()
    (tmp_path / "a.png").mkdir()
    run, out = str(sparse_run), str(tmp_path / "g.png")
    for arguments, message in (
        ([run], "--out FILE or --folder DIR is required"),
        ([run, "--out", out, "--class", "1"], "--class 1: this generator knows no classes"),
        ([run, "--folder", str(tmp_path / "full")], "must be new or empty"),
        ([run, "--folder", "x" * 300], "File name too long"),
        (["x" * 300, "--out", out], "File name too long"),
        ([run, "--out", out, "--count", "10001"], "--count must be at most 10000 for one grid"),
        ([run, "--out", str(tmp_path / "g.jpg")], "--out must end in .png, got "),
        ([run, "--out", str(tmp_path / "no" / "g.png")], f"there is no folder {tmp_path / 'no'}"),
        ([run, "--out", str(tmp_path / "a.png")], f"--out {tmp_path / 'a.png'} is a folder, expected a file"),
        ([run, "--folder", str(tmp_path / "full" / "mine.png" / "x")], "x cannot be made: Not a directory"),
        ([str(tmp_path / "full"), "--out", out], "cannot read "),
        ([str(tmp_path / "none"), "--out", out], "no run and no generator"),
    ):
        assert main(["sample", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ddst sample: error: ") and message in line
    assert not Path(out).exists() and not (tmp_path / "g.jpg").exists()
    for option, value in (("--count", "0"), ("--count", "x"), ("--seed", "-1")):
        with pytest.raises(SystemExit) as ended:
            main(["sample", run, "--out", out, option, value])
        assert ended.value.code == 2
