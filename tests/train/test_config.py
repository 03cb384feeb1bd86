"""Settings: defaults by method and block, ranges, what may differ on resume, and one line for everything wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from ddst.data import EMBEDDED
from ddst.metrics.classifier import TRAINED
from ddst.models.families import FAMILIES, Sizes
from ddst.train.config import (
    FREE_ON_RESUME,
    OPTIONS,
    check_same_run,
    check_saved,
    resolve,
)
from ddst.train.options import ConfigError, Option, flag, parse_block, shown_value
from ddst.train.without_effect import MEASURED, refuse_without_effect


def test_defaults_depend_on_method_block_and_preset():
    relaxed, strict = resolve({"out": "x"}), resolve({"out": "x", "method": "ddst-strict"})
    assert (relaxed.method, relaxed.density, relaxed.density_d, relaxed.block) == ("ddst-relaxed", 0.1, 0.1, (16, 16))
    assert (relaxed.density_d_max, strict.density_d_max) == (1.0, 0.5)
    assert strict.interval_d == 2 * relaxed.interval_d
    single = resolve({"out": "x", "block": (1, 1)})
    assert (single.drop_fraction, single.br_average, single.sn_noise) == (0.5, "mean_of_ratios", 0.0)
    assert (relaxed.drop_fraction, relaxed.br_average, relaxed.sn_noise) == (0.3, "ratio_of_means", 0.05)
    mixed = resolve({"out": "x", "block": (1, 1), "block_d": (16, 16)})
    assert (mixed.drop_fraction, mixed.drop_fraction_d, mixed.br_average) == (0.5, 0.3, "ratio_of_means")
    assert (relaxed.bounds, relaxed.lr_density_power) == ((0.5, 1.0), 0.5)
    dda, ada, published = (
        resolve({"out": "x", **s}) for s in ({"method": "dda"}, {"method": "ddst-ada"}, {"published": True})
    )
    assert (dda.bounds, ada.bounds, published.bounds) == ((0.5, 1.0), (0.55, 0.65), (0.45, 0.55))


def test_published_settings():
    c = resolve({"out": "x", "preset": "sngan32"})
    assert (c.steps, c.resolution, c.width_g, c.width_d, c.batch, c.d_steps) == (100_000, 32, 256, 128, 64, 5)
    assert (c.lr, c.betas, c.ema) == (2e-4, (0.0, 0.9), 0.999)
    assert (c.interval_g, c.interval_d, c.bounds, c.delta) == (500, 1000, (0.45, 0.55), 0.05)
    assert (c.br_every, c.br_window, c.density_d_min, c.warmup) == (10, 1000, 0.05, None)
    assert c.lr_density_power == 0.0
    assert resolve({"out": "x", "preset": "sngan32", "method": "dda"}).bounds == (0.5, 0.65)
    strict = resolve({"out": "x", "preset": "sngan48", "method": "ddst-strict"})
    assert (strict.interval_d, strict.density_d_max, strict.resolution, strict.width_g) == (2000, 0.5, 48, 512)


def test_given_density_is_that_of_the_discriminator_unless_it_has_its_own():
    assert resolve({"out": "x", "density": 0.3}).density_d == 0.3
    assert resolve({"out": "x", "density": 0.3, "density_d": 1.0}).density_d == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--out DIR is required"),
        ({"density": 0.0}, "--density must be above 0 and at most 1, got 0.0"),
        ({"density_d": 1.5}, "--density-d must be above 0"),
        ({"method": "magic"}, "--method must be one of dense, static, .* got magic"),
        ({"steps": 0}, "--steps must be at least 1 and at most 2147483647, got 0"),
        ({"lr": float("nan")}, "--lr must be above 0 and at most 1e20, got nan"),
        ({"lr_d": 1e300}, r"--lr-d must be above 0 and at most 1e20, got 1e\+300"),
        ({"fd_samples": 2**31 - 1}, "--fd-samples must be at least 2 and at most 1000000, got 2147483647"),
        ({"steps": "3"}, "--steps must be a whole number, got '3'"),
        ({"steps": True}, "--steps must be a whole number, got True"),
        ({"steps": None}, "--steps must be a whole number, got None"),
        ({"density": [0.1]}, r"--density must be a number, got \[0.1\]"),
        ({"density": 10**400}, "--density must be a number"),
        ({"betas": 0.5}, "--betas must be 2 numbers, got 0.5"),
        ({"betas": (0.5, "x")}, "--betas must be 2 numbers"),
        ({"block": (0, 8)}, r"--block must be two sides from 1 to 64, got \(0, 8\)"),
        ({"resume": 1}, "--resume must be a bool, got 1"),
        ({"data": b"folder"}, "--data must be a text, got b'folder'"),
        ({"bounds": (0.6, 0.5)}, "--bounds must be LO not above HI, got 0.6 0.5"),
        ({"betas": (0.0, 1.0)}, "--betas must be two numbers of at least 0 and below 1"),
        ({"resolution": 20}, "--resolution must be 8, 16, .* got 20"),
        ({"resolution": 48, "width_g": 20}, "--width-g must be divisible by 8"),
        ({"density_d_min": 0.6, "density_d_max": 0.5}, "--density-d-min must not be above --density-d-max"),
        ({"br_every": 10, "br_window": 5}, "--br-window must be at least --br-every"),
        ({"colour": 1}, "unknown setting --colour"),
    ],
)
def test_impossible_settings_give_one_line(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve({"out": "x", **given} if given else {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["16", "16x", "x16", "0x4", "65x1", "4x4x4", "ax4", "-4x4"])
def test_bad_block_is_refused(text):
    with pytest.raises(ValueError, match="expected ROWSxCOLUMNS"):
        parse_block(text)


def test_resume_takes_the_saved_settings_and_names_the_one_that_differs():
    saved = resolve({"out": "old", "method": "static", "density": 0.2, "stop_after": 5}).saved()
    merged = check_same_run(saved, {"out": "new", "resume": True, "density": 0.2, "checkpoint_every": 7})
    config = resolve(merged)
    assert (config.method, config.out, config.checkpoint_every, config.stop_after) == ("static", "new", 7, None)
    message = r"cannot resume with --density 0\.3: the run in --out has --density 0\.2"
    with pytest.raises(ConfigError, match=message):
        check_same_run(saved, {"out": "new", "resume": True, "density": 0.3})
    with pytest.raises(ConfigError, match=r"--block 8x8: .* --block 16x16"):
        check_same_run(saved, {"block": (8, 8)})


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in FREE_ON_RESUME])
def test_every_other_setting_is_pinned_on_resume(name):
    saved, declared = resolve({"out": "x"}).saved(), OPTIONS[name]
    others = [*(declared.choices or ()), "images", "cutout", True, False, 3, 0.25, (2, 2), (0.25, 0.75), None]
    for value in others:
        try:
            plain = declared.plain(name, value)
        except ConfigError:
            continue  # Of another type or range.
        if plain != saved[name]:
            with pytest.raises(ConfigError, match="cannot resume"):
                check_same_run(saved, {name: value})
            return
    raise AssertionError("no other value was tried")


def test_every_option_says_what_it_means_and_shows_its_default():
    for name, declared in OPTIONS.items():
        assert isinstance(declared, Option)
        assert len(declared.help) > 10, name
        if callable(declared.default):
            assert declared.shown, f"the default of {name} depends on others: say how"


def test_values_are_shown_as_they_are_typed():
    assert shown_value((16, 8)) == "16x8"
    assert shown_value((0.0, 0.9)) == "0.0 0.9"
    assert shown_value(None) == "none"


def test_values_become_plain_ones_that_a_checkpoint_can_hold():
    given = {"out": Path("x"), "steps": np.int64(9), "density": np.float32(0.5), "betas": [0, 0.5], "block": [8, 4]}
    config = resolve(given)
    assert (config.out, config.steps, config.density, config.betas, config.block) == ("x", 9, 0.5, (0.0, 0.5), (8, 4))
    assert [type(v) for v in (config.out, config.steps, config.density, config.betas[0])] == [str, int, float, float]


def test_settings_read_back_from_a_file_are_those_that_were_saved():
    saved = resolve({"out": "x", "method": "ddst-strict", "warmup": 3}).saved()
    assert check_saved(json.loads(json.dumps(saved))) == saved
    assert resolve({**saved, "out": "x"}).saved() == saved
    for damage, message in (
        ({"steps": "9"}, "--steps must be a whole number"),
        ({"colour": 1}, "setting 'colour' is none of this ddst"),
        ({"delta": 7.0}, "--delta must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_saved({**saved, **damage})
    with pytest.raises(ConfigError, match="setting 'seed' is missing"):
        check_saved({name: value for name, value in saved.items() if name != "seed"})
    with pytest.raises(ConfigError, match="settings must be a dict, got list"):
        check_saved([saved])


def refuse(given):
    """What `ddst train` refuses of options that can be."""
    refuse_without_effect({"out": "x", **given}, resolve({"out": "x", **given}))


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("dense", "density", 0.1),
        ("dense", "block", (16, 16)),
        ("static", "interval_g", 25),
        ("sdst-set", "delta", 0.05),
        ("sdst-rigl", "bounds", (0.4, 0.5)),
        ("prune", "scope", "layer"),
        ("dda", "scope", "global"),
        ("prune", "grown_second_moment", "mean"),
        ("static-strong", "random_share", 0.5),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(method, name, value):
    """Also where they are the defaults: who gives them believes that they do something."""
    with pytest.raises(
        ConfigError, match=rf"^{flag(name)} has no effect with --method {method}, only with .*ddst-strict$"
    ):
        refuse({"method": method, name: value})
    refuse({"method": "ddst-strict", name: value, "lr": 1e-3})


# In which all of D's density is given.
STANDING = {"density_d_min": 0.2, "density_d": 0.2, "density_d_max": 0.2, "delta": 0.1}
MOVES_NOTHING = "under which no block ever moves, only with --algorithm-d rigl or set, or --method"


@pytest.mark.parametrize(
    "given, why, helps",
    [
        ({"drop_fraction_d": 0.5}, "--method ddst-relaxed, only with ddst-strict, or with", {"method": "ddst-strict"}),
        (
            {"drop_fraction_d": 0.5},
            "--algorithm-d rigl or set and --method .*static",
            {"method": "static", "algorithm_d": "set"},
        ),
        (
            {"method": "static", "drop_fraction_d": 0.5},
            "--method static and --algorithm-d static, under which D never changes, only with --algorithm-d rigl",
            {"algorithm_d": "rigl"},
        ),
        ({"method": "sdst-rigl", "interval_d": 9}, "D never changes, only with --algorithm-d", {"algorithm_d": "rigl"}),
        ({"method": "static", "exempt_d": "ends"}, "D never changes, only with --algorithm-d", {"algorithm_d": "rigl"}),
        ({"method": "static", "scope": "layer"}, MOVES_NOTHING, {"method": "sdst-set"}),
        ({"method": "static", "ranking": "raw"}, MOVES_NOTHING, {"algorithm_d": "rigl"}),
        ({"method": "static", "max_norm_share": 0.1}, MOVES_NOTHING, {"algorithm_d": "rigl"}),
        ({"method": "static", "grown_second_moment": "mean"}, MOVES_NOTHING, {"algorithm_d": "rigl"}),
        ({"method": "static", "random_share": 0.5}, MOVES_NOTHING, {"algorithm_d": "rigl"}),
        (
            {"drop_schedule": "constant", "drop_fraction_end": 0.2},
            "--drop-schedule constant",
            {"drop_schedule": "linear"},
        ),
        (
            {"drop_schedule": "constant", "drop_fraction_steps": 7},
            "--drop-schedule constant",
            {"drop_schedule": "cosine"},
        ),
        ({"inception": "file", "metric_every": 0}, "--metric-every 0, under which nothing", {"metric_every": 5}),
        ({"data": "folder", "metric_every": 5}, "--data folder without --inception", {"inception": "file"}),
        ({"data": "folder", "metric_every": 5}, "--data folder without --inception", {"metric_every": 0}),
        ({"data": "folder", "fd_samples": 99}, "--data folder without --inception", {"inception": "file"}),
        ({"data": "folder", "fd_samples": 99, "metric_every": 0}, "--data folder without", {"data": "digits"}),
        ({"batch_norm": "synced", "model": "r3gan"}, "--model r3gan, whose generator has no", {"model": "dcgan"}),
        ({"batch_norm": "local", "model": "stylegan2"}, "--model stylegan2, whose generator", {"model": "sngan"}),
        ({"lr_decay": "linear", "lr_decay_start": 50, "steps": 50}, "--steps 50, before", {"steps": 51}),
        (
            {"sn_noise": 0.1, "model": "dcgan"},
            "--model dcgan and --method ddst-relaxed, in which no",
            {"model": "sngan"},
        ),
        (
            {"sn_noise": 0.1, "method": "static", "density_d": 1.0},
            "--method static and --density-d 1, in which no sparse layer has",
            {"distribution_d": "uniform"},
        ),
        (
            {"block_d": (4, 4), "method": "sdst-set", "density_d": 1.0},
            "--density-d 1 and --distribution-d erk, under which D is dense",
            {"method": "ddst-relaxed"},
        ),
        (STANDING, r"--density-d-min and --density-d-max 0\.2, which is D's density", {"density_d": 0.1}),
        ({"ema": 0.0, "ema_ramp": 0.5}, "--ema 0, under which the average is G itself", {"ema": 0.9}),
        ({"ema": 0.0, "ema_start": 5}, "--ema 0, under which the average is G itself", {"ema": 0.9}),
        ({"drop_fraction": 0.0, "exempt_g": "ends"}, "--drop-fraction 0, under which no", {"drop_fraction": 0.1}),
        ({"drop_fraction": 0.0, "drop_schedule": "linear"}, "--drop-fraction 0, under which", {"drop_fraction": 0.1}),
        (
            {"drop_fraction": 0.0, "drop_fraction_d": 0.0, "drop_fraction_end": 0.1, "method": "ddst-strict"},
            "--drop-fraction 0 and --drop-fraction-d 0, under which no block is exchanged",
            {"drop_fraction_d": 0.1},
        ),
        ({"drop_fraction": 0.0, "scope": "global"}, "--drop-fraction 0, under which no block", {"drop_fraction": 0.1}),
        ({"drop_fraction_end": 0.5}, "--drop-fraction 0.3, from which it falls", {"drop_fraction_end": 0.3}),
        ({"stop_after": 900}, "--steps 800, after which the run is at its end", {"stop_after": 800}),
        ({"drop_fraction": 0.0, "grace": 5}, "--drop-fraction 0, under which no block", {"drop_fraction": 0.1}),
        (
            {"drop_fraction": 0.0, "connected": False, "method": "sdst-rigl"},
            "--drop-fraction 0, under which no block is exchanged",
            {"method": "ddst-relaxed"},
        ),
        (
            {"drop_fraction": 0.0, "ranking": "raw", "method": "sdst-rigl"},
            "--drop-fraction 0, under which no block is exchanged",
            {"method": "ddst-relaxed"},
        ),
        (
            {"drop_fraction_d": 0.0, "exempt_d": "none", "method": "static", "algorithm_d": "rigl"},
            "--drop-fraction-d 0, under which no block of D moves",
            {"drop_fraction_d": 0.1},
        ),
        ({"data_cache": "folder"}, "--data digits, of which no resized images are kept", {"data": "images"}),
        ({"data_cache": "folder"}, "--data digits, of which no resized images are kept", {"data_cache": "none"}),
        ({"lazy": 1}, "--r1 0 and --r2 0", {"r1": 1.0}),
        ({"lr_decay_start": 0}, "--lr-decay none", {"lr_decay": "cosine"}),
        ({"sn_noise": 0.1, "method": "static-strong"}, "--model sngan and --method static-strong", {"model": "biggan"}),
    ],
    ids=str,
)
def test_settings_that_other_settings_make_idle_are_refused_with_what_helps(given, why, helps):
    with pytest.raises(ConfigError, match=rf"^--[a-z0-9-]+ has no effect with .*{why}") as caught:
        refuse(given)
    assert "\n" not in str(caught.value)
    refuse({**given, **helps})


def test_which_data_have_a_metric_of_their_own_and_lie_in_no_folder():
    assert set(MEASURED) == set(TRAINED) == set(EMBEDDED)


def test_which_models_have_spectral_norm_and_batch_norm():
    for name, family in FAMILIES.items():
        sizes = Sizes(8, 64, 64, 20, 1, 2)
        networks = {"generator": family.generator(sizes), "discriminator": family.discriminator(sizes)}
        names = {key: [name for name, _ in net.named_parameters()] for key, net in networks.items()}
        normed = [
            key for key, all_of_it in names.items() if any("weight_orig" in n or "parametr" in n for n in all_of_it)
        ]
        assert normed == list(family.normed), name
        norms = [module for module in networks["generator"].modules() if isinstance(module, nn.BatchNorm2d)]
        assert bool(norms) == family.batch_norm, name
