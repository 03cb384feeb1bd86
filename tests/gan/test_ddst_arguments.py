"""DDST's defaults by mode and block, its warnings, and errors that name the argument."""

import warnings

import pytest
import torch
from torch import nn

from ddst.gan import DDST, EMA
from ddst.nn import sparse_layers
from ddst.sparsity import DropSchedule
from helpers.training import SHORT, ToyGan, make, run


def test_warns_when_nothing_would_ever_happen():
    with pytest.warns(UserWarning, match=r"interval_g=500 and total_steps=100 G's topology is never updated") as said:
        make(total_steps=100, interval_g=500)
    assert said[0].filename.endswith("training.py")  # the caller's line, not one of the library's
    with pytest.warns(UserWarning, match=r"drop_fraction=0.00.* total_steps=100 no block of \w+ is exchanged"):
        make(total_steps=100, interval_g=2, drop_fraction=0.01)
    gan = ToyGan()
    with pytest.warns(UserWarning, match=r"of 0 blocks in the largest layer.* no block of \w+ is exchanged"):
        make(gan, exempt_g=list(sparse_layers(gan.g)))
    with pytest.warns(UserWarning, match=r"interval_d=1000.*total_steps=900 D's density is never changed"):
        make(total_steps=900, interval_d=1000)
    with pytest.warns(UserWarning, match=r"br_window=1000.*D's density is never changed"):
        make(total_steps=900, br_window=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()


def test_defaults_of_the_modes_and_blocks():
    long = {"total_steps": 100_000}

    def built(block, **options):
        gan = ToyGan(block=block)
        return DDST(gan.g, gan.d, gan.opt_g, gan.opt_d, **{**long, **options})

    relaxed, strict, single = built((8, 8)), built((8, 8), mode="strict"), built((1, 1), mode="strict")
    assert (relaxed.interval_g, relaxed.interval_d, strict.interval_d) == (500, 1000, 2000)
    assert (relaxed.controller.density_range, strict.controller.density_range) == ((0.05, 1.0), (0.05, 0.5))
    assert relaxed.controller.bounds == (0.45, 0.55)
    assert relaxed.balance.window == 100
    averages = (relaxed.balance.average, single.balance.average, built((1, 1), mode="sdst").balance.average)
    assert averages == ("ratio_of_means", "mean_of_ratios", "mean_of_ratios")
    assert built((1, 1), br_average="ratio_of_means").balance.average == "ratio_of_means"
    assert (relaxed.controller.warmup, single.controller.warmup) == (1000, 0)
    assert (relaxed.training_g.drop_fraction(0), single.training_g.drop_fraction(0)) == (0.3, 0.5)
    assert (strict._steering.fraction(0), single._steering.fraction(0)) == (0.3, 0.5)
    third, last = 100_000 // 3, [relaxed, strict, built((8, 8), drop_fraction_steps=7), built((8, 8), mode="sdst")]
    assert [s.training_g.drop_fraction(third) for s in last] == [0.005] * 4, "G's share falls over a third of the run"
    whole = [single, built((8, 8), published=True)]
    assert all(s.training_g.drop_fraction(third) > 0.1 for s in [*whole, built((8, 8), drop_fraction_steps=99_000)])
    assert strict._steering.fraction(third) > 0.1 and last[2]._steering.fraction(third) == 0.005
    published = built((8, 8), mode="strict", published=True)
    graces = [(s.training_g.updater.grace, s.updater_d.grace) for s in (strict, single, published)]
    assert graces == [(2500, 10_000), (0, 0), (0, 0)]
    assert [s.training_g.updater.connected for s in (strict, single, published)] == [True, False, False]
    assert [s.updater_d.connected for s in (strict, single, published)] == [True, False, False]
    assert (single.updater_d.exempt, single.updater_d.ranking) == ((), "raw")
    assert (strict.updater_d.exempt, strict.updater_d.ranking) == (("0", "7"), "relative")


def test_a_state_goes_on_with_the_schedule_of_the_new_length():
    gan, short = make(total_steps=30)
    run(gan, short, 5)
    other, longer = make(total_steps=90)
    other.g.load_state_dict(gan.g.state_dict())
    other.d.load_state_dict(gan.d.state_dict())
    longer.load_state_dict(short.state_dict())
    assert longer.steps == 5
    assert short.training_g.drop_fraction(10) == 0.005
    assert longer.training_g.drop_fraction(10) == DropSchedule(0.3, 30)(10)


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"mode": "loose"}, ValueError, "mode"),
        ({"method": "snip"}, ValueError, "method"),
        ({"interval_d": 0}, ValueError, "interval_d"),
        ({"br_window": 1}, ValueError, "br_window"),
        ({"bounds": (0.6, 0.4)}, ValueError, "bounds"),
        ({"delta": 0}, ValueError, "delta"),
        ({"density_range": (0.5, 0.1)}, ValueError, "density_range"),
        ({"drop_fraction_d": 2.0}, ValueError, "drop_fraction_d"),
        ({"warmup": -3}, ValueError, "warmup"),
        ({"drop_fraction_steps": 0}, ValueError, "drop_fraction_steps must be"),
        ({"exempt_d": ["nowhere"]}, ValueError, "exempt"),
        ({"br_average": "median"}, ValueError, "average"),
        ({"ema": EMA(nn.Linear(1, 1))}, ValueError, "ema"),
    ],
)
def test_errors_name_the_argument(options, error, named):
    with pytest.raises(error, match=named):
        make(**options)


@pytest.mark.parametrize("mode", ["relaxed", "strict", "ramp", "sdst"])
@pytest.mark.parametrize(
    "name, value",
    [
        ("bounds", (0.9, 0.1)),
        ("delta", -5),
        ("density_range", (3, 2)),
        ("drop_fraction_d", 77),
        ("warmup", -3),
        ("exempt_d", ["nowhere"]),
    ],
)
def test_what_concerns_d_is_checked_in_every_mode(mode, name, value):
    with pytest.raises(ValueError, match=f"^{name.removesuffix('_d')}"):
        make(mode=mode, **{name: value})


def test_errors_of_networks_and_scores():
    gan = ToyGan()
    with pytest.raises(TypeError, match="generator"):
        DDST("g", gan.d, gan.opt_g, gan.opt_d, **SHORT)
    dense = nn.Linear(16, 1)
    with pytest.raises(ValueError, match="discriminator has no sparse layers"):
        DDST(gan.g, dense, gan.opt_g, torch.optim.SGD(dense.parameters(), lr=0.1), **SHORT)
    gan, scheduler = make()
    arguments = gan.iteration()
    with pytest.raises(TypeError, match="fake_scores"):
        scheduler.step(**{**arguments, "fake_scores": 0.5})
    gan, other = make(mode="sdst")
    with pytest.raises(ValueError, match='state is of mode="relaxed"'):
        other.load_state_dict(scheduler.state_dict())
