"""The end of a run: its files, its counted costs, and that judging a run changes nothing of it."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image
from torch import nn

from ddst.data import load_images
from ddst.nn import sparse_layers
from ddst.sparsity import network_stats
from ddst.sparsity.dense_moments import DenseMoments
from ddst.train import Trainer, resolve, run
from ddst.train.compare import Timing, compare_with_dense
from ddst.train.log import RunLog
from ddst.train.report import summarize, table
from ddst.train.samples import generate, to_pixels
from helpers.runs import TINY, differences, tiny


def trainer_for(tmp_path, **settings):
    config = resolve({**TINY, "out": str(tmp_path / "run"), **settings})
    return Trainer(config, load_images(config.data, config.resolution))


def test_finished_run_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "run"
    assert run({**TINY, "out": str(out), "compare_steps": 2}) == 0
    said = capsys.readouterr().out
    for name in ("log.jsonl", "checkpoint.pt", "report.png", "summary.json", "samples/step_000014.png"):
        assert (out / name).is_file()
        assert str(out / name) in said
    for words in ("density", "parameters", "weight state", "FLOPs", "seconds per step", "dense twin", "Fréchet", "9:"):
        assert words in said
    with Image.open(out / "report.png") as picture:
        assert picture.width > 500
    with Image.open(out / "samples" / "step_000014.png") as picture:
        assert picture.size == (491, 491)  # 10 x 10 tiles of 8 x 8 pixels enlarged six times, with lines between.
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 14
    assert summary["timing"]["pairs"] == 2
    assert sum(summary["quality"]["shares"]) == pytest.approx(1)


@pytest.mark.parametrize("names", [["0", "1", "2"], ["a/0", "a/1", "b/2"]], ids=["without labels", "with labels"])
def test_folder_run_says_that_there_is_no_distance(tmp_path, capsys, names):
    folder = tmp_path / "images"
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (80 * i, 10, 200)).save(folder / f"{name}.png")
    assert run(tiny(steps=2, data=str(folder), out=str(tmp_path / "run"))) == 0
    said = capsys.readouterr().out
    assert "3 images of" in said
    assert "no distance: digits and shapes have one embedded, other data FID with --inception" in said
    assert "class shares" not in said


def test_judging_a_run_changes_nothing_of_it(tmp_path):
    trainer = trainer_for(tmp_path, compare_steps=2)
    trainer.train_step()
    before = trainer.state_dict()
    frozen = torch.get_rng_state()
    summarize(trainer)
    assert torch.equal(frozen, torch.get_rng_state())
    assert differences(before, trainer.state_dict()) == []


def test_dense_run_has_no_twin_and_costs_one(tmp_path):
    trainer = trainer_for(tmp_path, method="dense", compare_steps=2)
    trainer.train_step()
    summary = summarize(trainer)
    assert summary.timing is None
    for cost in (summary.generator, summary.discriminator):
        assert cost.density == cost.flops_ratio == 1
        assert cost.parameters == cost.dense_parameters
        assert cost.state_bytes == cost.dense_state_bytes
    assert "dense twin (median" not in table(summary)


def test_counted_costs_follow_the_masks_of_every_step(tmp_path):
    trainer = trainer_for(tmp_path, bounds=(-2e9, -1e9))  # D grows at step 5.
    expected_g, expected_d, total = 0.0, 0.0, 0.0
    for _ in range(7):
        g, d = trainer.flops.generator.forward, trainer.flops.discriminator.forward
        expected_g, expected_d, total = expected_g + g, expected_d + d, total + 5 * g + 7 * d  # Two D steps.
        trainer.train_step()
    assert d > 1.05 * expected_d / 7  # Grown.
    summary = summarize(trainer)
    dense_g, dense_d = trainer.flops.generator.dense, trainer.flops.discriminator.dense
    assert summary.generator.flops_ratio == pytest.approx(expected_g / (7 * dense_g))
    assert summary.discriminator.flops_ratio == pytest.approx(expected_d / (7 * dense_d))
    assert summary.flops_ratio == pytest.approx(total / (7 * (5 * dense_g + 7 * dense_d)))


def test_the_table_says_what_counted_operations_leave_out(tmp_path):
    plain = trainer_for(tmp_path)
    with_penalties = trainer_for(tmp_path, r1=1.0, lazy=2, consistency=10.0)
    for trainer in (plain, with_penalties):
        trainer.train_step()
    assert "is not counted" not in table(summarize(plain))
    assert "; what --r1, --consistency adds is not counted)" in table(summarize(with_penalties))
    assert plain.flops.relative == with_penalties.flops.relative


def test_the_table_has_the_last_figure_of_data_without_an_embedded_distance(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.out.mkdir()
    with RunLog(trainer.out / "log.jsonl") as log:
        for step, value in ((2, 9.0), (4, 7.0111), (6, math.nan)):  # which is null in the file
            log.write(event="metric", step=step, metric="fid", value=value, samples=16, seconds=1.0, flops=1.0)
    summary = dataclasses.replace(summarize(trainer), quality=None)
    assert summary.measured == {"metric": "fid", "value": 7.0111, "samples": 16, "step": 4}
    assert "\nfid of 16 samples after step 4: 7.011" in table(summary)


def test_weight_state_follows_density(tmp_path):
    # Wide enough that the layers ERK keeps dense weigh little.
    trainer = trainer_for(tmp_path, width_g=128, width_d=128, density=0.1, method="static")
    trainer.train_step()
    summary = summarize(trainer)
    for cost in (summary.generator, summary.discriminator):
        assert 0.1 < cost.state_bytes / cost.dense_state_bytes < 0.125
        assert cost.density == pytest.approx(0.1, abs=0.002)


def test_timing_is_of_as_many_pairs_as_asked_within_the_limit(tmp_path):
    trainer = trainer_for(tmp_path)
    timing = compare_with_dense(trainer, pairs=3)
    assert timing.pairs == 3
    assert timing.seconds > 0 < timing.dense
    assert compare_with_dense(trainer, pairs=50, limit=0.0).pairs == 1
    assert Timing(0.5, 2.0, 3, 1, 2, 3).speedup == 4


@pytest.mark.parametrize("settings", [{}, {"augment": "color,translation,cutout", "precision": "float16"}], ids=str)
def test_memory_of_an_iteration_holds_the_weight_state_and_more(tmp_path, capfd, settings):
    trainer = trainer_for(tmp_path, compare_steps=1, **settings)
    before = copy.deepcopy(trainer.state_dict())
    summary = summarize(trainer)
    assert "CPUAllocator" not in capfd.readouterr().err  # No block that is older than the recording is freed in it.
    assert not differences(before, trainer.state_dict())
    timing = summary.timing
    assert timing is not None
    sparse, dense = (
        sum(getattr(cost, name) for cost in (summary.generator, summary.discriminator))
        for name in ("state_bytes", "dense_state_bytes")
    )
    assert sparse < timing.peak_bytes < timing.dense_peak_bytes
    assert dense < timing.checkpointed_peak_bytes
    if not settings:  # In float16 some processors convert first, which of networks this small is the peak.
        assert timing.checkpointed_peak_bytes < timing.dense_peak_bytes
    assert "memory of an iteration at its peak, weight state included" in table(summary)
    trainer.train_step()
    assert (trainer.players.game.augmented_from is None) == (not settings)


@pytest.mark.parametrize("settings", [{}, {"published": True}], ids=str)
def test_time_memory_and_weight_state_have_the_moments_of_dense_gradients(tmp_path, monkeypatch, settings):
    """What `published` does and holds in every step is timed and counted."""
    trainer = trainer_for(tmp_path, compare_steps=1, **settings)
    trainer.train_step()
    players, updates = trainer.players, []
    kept = DenseMoments.update
    monkeypatch.setattr(DenseMoments, "update", lambda self, g: (updates.append(sorted(g)), kept(self, g)))
    summary = summarize(trainer)
    # Of D and of G: in two timed iterations of two D steps, three for the peak of one, and two more layer by layer.
    g, d = ([sorted(sparse_layers(net))] for net in (players.generator, players.discriminator))
    expected = 2 * (2 * d + g) + 3 * (d + g) + 2 * (2 * d + g)
    assert updates == (expected if settings else [])
    nets = players.generator, players.discriminator
    dense = 8 * sum(math.prod(layer.weight_shape) for net in nets for layer in sparse_layers(net).values())
    held = sum(tensor.nbytes for tensors in trainer.scheduler.held for tensor in tensors)
    assert held == (dense if settings else 0)
    state = sum(cost.state_bytes for cost in (summary.generator, summary.discriminator))
    g, d = (
        network_stats(players.generator, players.optimizer_g, trainer.ema.module).memory,
        network_stats(players.discriminator, players.optimizer_d).memory,
    )
    assert state == g.total + g.index + d.total + d.index + held
    assert summary.timing.peak_bytes > state


def test_grid_repeats_pixels_and_keeps_colours():
    images = torch.full((3, 3, 8, 8), -1.0)
    images[1, 0] = 1.0
    images[2] = 5.0  # Clipped.
    picture = to_pixels(images, columns=2, gap=1, smallest=16)
    assert picture.shape == (35, 35, 3)
    assert picture[1:17, 1:17].max() == 0
    assert picture[1:17, 18:34].unique(dim=0).tolist()
    assert picture[5, 20].tolist() == [255, 0, 0]
    assert picture[20, 5].tolist() == [255, 255, 255]
    assert picture[20, 25].tolist() == [96, 96, 96]  # No fourth image.


def test_generating_does_not_disturb_the_generator():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    noise = torch.randn(10, 4)
    running = net[1].running_mean.clone()
    images = generate(net, noise, batch=3)
    assert net.training
    assert torch.equal(net[1].running_mean, running)
    assert not math.isclose(float(images.std()), 1.0, rel_tol=1e-6)  # Running statistics, not the batch's.
    torch.testing.assert_close(images, generate(net, noise))
