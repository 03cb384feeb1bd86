"""Options of the command line reach the library, and what it refuses comes back as one line that names the option."""

import copy
import os
import subprocess
from pathlib import Path

import pytest
import torch

import ddst
from ddst.data import load_images
from ddst.train import Trainer, resolve, train
from ddst.train.config import fitting, setting_errors
from ddst.train.options import ConfigError
from ddst.train.scheduler import rules_in_force
from helpers.runs import TINY, differences, log_without_seconds

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"
ALWAYS_GROW = (-2e9, -1e9)


def trainer_for(tmp_path, **settings):
    config = resolve({**TINY, "out": str(tmp_path / "run"), **settings})
    return Trainer(config, load_images(config.data, config.resolution))


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [
        ({"preset": "demo", "steps": 400}, 50),
        ({"preset": "demo", "steps": 400, "block": (1, 1)}, 0),
        ({"preset": "sngan32", "steps": 400}, 50),
        ({"preset": "sngan32", "steps": 100_000}, 1000),
        ({"preset": "sngan32", "steps": 100_000, "block": (1, 1)}, 0),
        ({"preset": "sngan32", "steps": 100_000, "warmup": 7}, 7),
    ],
)
def test_warm_up_is_the_librarys_whatever_the_preset(tmp_path, settings, warmup):
    given = {k: v for k, v in TINY.items() if k != "warmup"}
    config = resolve({**given, "out": str(tmp_path / "run"), "interval_g": 100, "interval_d": 100, **settings})
    assert Trainer(config, load_images("digits", 8)).scheduler.controller.warmup == warmup


@pytest.mark.parametrize(("end", "steps"), [(0.25, 14), (0.0, 14), (0.05, 8)])
def test_drop_fractions_fall_alike_in_both_networks(tmp_path, end, steps):
    settings = {"method": "ddst-strict", "bounds": ALWAYS_GROW, "density_d_max": 0.3, "interval_d": 4}
    fractions = {"drop_fraction": 0.25, "drop_fraction_d": 0.25, "drop_fraction_end": end, "drop_schedule": "linear"}
    fractions["drop_fraction_steps"] = steps
    trainer = trainer_for(tmp_path, **settings, **fractions)
    train(trainer, None)
    log = log_without_seconds(tmp_path / "run")
    for network in ("generator", "discriminator"):
        updates = [e for e in log if e.get("event") == "update" and e["network"] == network]
        assert [e["step"] for e in updates] == [4, 8, 12]
        wanted = [end + (0.25 - end) * max(0, 1 - e["step"] / steps) for e in updates]
        assert [e["fraction"] for e in updates] == pytest.approx(wanted)


def test_rules_for_blocks_are_each_networks_own(tmp_path):
    def rules(**settings):
        scheduler = trainer_for(tmp_path, interval_g=3, interval_d=4, method="ddst-strict", **settings).scheduler
        said = rules_in_force(scheduler)  # as in the log's first line
        assert list(said) == ["generator", "discriminator"]
        return [(of["connected"], of["grace"], of["scope"], of["ranking"]) for of in said.values()]

    single, larger = (False, 0, "global", "raw"), (True, 15, "layer", "relative")
    assert rules(block=(8, 8), block_d=(1, 1)) == [larger, single]
    assert rules(block=(1, 1), block_d=(8, 8)) == [single, (True, 20, "layer", "relative")]
    assert rules(block=(8, 8), block_d=(8, 8), published=True) == [single, single]
    assert [of[0] for of in rules(block=(8, 8), block_d=(1, 1), connected=True)] == [True, True]
    pruned = rules_in_force(trainer_for(tmp_path, method="prune").scheduler)
    assert pruned == {"generator": {"ranking": "relative", "connected": False, "exempt": ()}}
    relaxed = rules_in_force(trainer_for(tmp_path, method="ddst-relaxed").scheduler)
    assert "grace" in relaxed["generator"] and "grace" not in relaxed["discriminator"]  # D exchanges nothing
    for method in ("static", "dense"):
        assert rules_in_force(trainer_for(tmp_path, method=method).scheduler) == {}


def test_layers_may_be_exempt_in_both_networks(tmp_path):
    def exempt(**settings):
        scheduler = trainer_for(tmp_path, **settings).scheduler
        return scheduler.training_g.updater.exempt, scheduler.updater_d.exempt

    # Blocks small enough that the ends (one image channel, one score) are sparse layers too.
    ends = ("linear", "to_image"), ("blocks.0.conv1", "linear")
    single = {"block": (1, 1), "distribution": "uniform"}
    assert exempt(**single) == ((), ())
    assert exempt(**single, exempt_g="ends", exempt_d="ends") == ends
    assert exempt(**single, exempt_g="none", exempt_d="ends") == ((), ends[1])
    pairs = {"block": (1, 2), "distribution": "uniform"}
    # One image channel is less than a block of D's first layer.
    assert exempt(**pairs, scope="global") == (ends[0], ("linear",))
    assert exempt(**pairs) == (ends[0], ("linear",))
    assert exempt(**pairs, exempt_g="none", exempt_d="none") == ((), ())


def test_average_starts_when_it_is_told(tmp_path):
    trainer = trainer_for(tmp_path, ema_start=2)
    weight, average = trainer.players.generator.bn.weight, trainer.ema.module.bn.weight
    for same in (True, True, False):
        trainer.train_step()
        assert weight.equal(average) == same


def test_library_errors_name_the_option():
    for error, message in (
        (ValueError('scope="x" is\nnothing'), r'^--scope "x" is nothing$'),
        (TypeError("br_window must be an int"), r"^--br-window must be an int$"),
        (ValueError("something else"), r"^something else$"),
    ):
        with pytest.raises(ConfigError, match=message), setting_errors():
            raise error


def test_memory_that_runs_out_names_the_sizes():
    for error, message in (
        (RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"), r"^--batch do not fit: .*allocate memory$"),
        (MemoryError(), r"^--batch do not fit: not enough memory$"),
    ):
        with pytest.raises(ConfigError, match=message), fitting("--batch"):
            raise error
    with pytest.raises(RuntimeError, match="a fault of ours"), fitting("--batch"):
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize(("given", "expected"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
@pytest.mark.parametrize("target", ["demo", "test"])
def test_threads_that_wait_sleep_in_make(target, given, expected):
    """With busy waiting, training on cores that others use takes several times as long. The user's own choice holds."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MAKE", "MFLAGS"))} | given
    show = f"{target}: ; @echo policy=$$OMP_WAIT_POLICY"
    # The recipe is replaced by one that shows what a recipe would see; prerequisites count as made.
    lines = [line for line in MAKEFILE.read_text().splitlines() if "export" in line]
    done = subprocess.run(
        ["make", "-s", "-f", "-", target],
        input="\n".join([*lines, show, ""]),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"policy={expected}"


@pytest.mark.parametrize(
    ("settings", "noise"), [({}, 0.05), ({"block": (1, 1)}, 0.0), ({"block": (1, 1), "sn_noise": 0.2}, 0.2)]
)
def test_noise_of_the_spectral_norm_reaches_every_sparse_layer(tmp_path, settings, noise):
    discriminator = trainer_for(tmp_path, **settings).players.discriminator
    assert {layer.spectral_norm.noise for layer in ddst.nn.sparse_layers(discriminator).values()} == {noise}


def test_a_device_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = resolve({"out": str(tmp_path / "run"), "device": "cuda"})
    with pytest.raises(ConfigError, match="--device cuda: torch sees no CUDA device"):
        Trainer(config, load_images("digits", config.resolution))
    assert not (tmp_path / "run").exists()


def test_trying_a_step_leaves_no_trace(tmp_path):
    trainer = trainer_for(tmp_path)
    before = copy.deepcopy(trainer.state_dict())
    trainer.try_step()
    assert differences(before, trainer.state_dict()) == []
    parameters = [*trainer.players.generator.parameters(), *trainer.players.discriminator.parameters()]
    assert all(p.grad is None and p.requires_grad for p in parameters)


def test_networks_that_no_machine_like_this_could_hold_are_not_built(tmp_path, monkeypatch):
    """Building them would end in the operating system's killing the process."""
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with pytest.raises(
        ConfigError, match=r"these --width-g, --width-d and --latent do not fit: built dense they need 0\.0 GB"
    ):
        trainer_for(tmp_path)
