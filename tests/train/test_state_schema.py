"""The description of a run's state: what every method really saves fits, and what does not fit is named."""

import copy

import pytest
import torch

from ddst.data import load_images
from ddst.train import Trainer, resolve
from ddst.train.rules import Misfit
from ddst.train.state_schema import check_state
from helpers.runs import TINY

IMAGES = load_images("digits", 8)
LOG = {"bytes": 10, "sha256": "0"}


def trainer_for(**settings):
    return Trainer(resolve({**TINY, "out": "unused", **settings}), IMAGES)


def state_of(trainer):
    return copy.deepcopy({**trainer.state_dict(), "log": LOG})


@pytest.mark.parametrize(
    "settings",
    [
        *({"method": m} for m in ("dense", "static", "sdst-set", "sdst-rigl", "ddst-relaxed")),
        {"method": "ddst-strict", "bounds": (-2e9, -1e9), "density_d_max": 0.4, "interval_d": 3},
        {"block": (1, 1), "br_every": 2, "interval_g": 1, "interval_d": 1},
        {"block": (3, 5), "br_average": "mean_of_ratios"},
    ],
    ids=str,
)
def test_what_every_step_saves_fits(settings):
    trainer, fresh = trainer_for(**settings), trainer_for(**settings)
    check_state(state_of(trainer), fresh)
    for _ in range(TINY["steps"]):
        trainer.train_step()
        check_state(state_of(trainer), fresh)


@pytest.fixture(scope="module")
def trained():
    """After step 4, at which blocks of G have moved; D's next decision follows."""
    trainer = trainer_for(block=(8, 6))
    for _ in range(4):
        trainer.train_step()
    return state_of(trainer), trainer_for(block=(8, 6))


LAYER = "blocks.0.conv1"


def _edge(state):
    layer = state["generator"][LAYER + ".values"]
    layer += 1.0


def _slots(state, network="generator"):
    slots = state[network][LAYER + ".slot_blocks"]
    slots[0] = slots[1]


def _swap_slots(state):
    for name in ("slot_blocks", "values"):
        entry = state["ema"]["module"][f"{LAYER}.{name}"]
        entry.copy_(entry.roll(1, 0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("noise"), "^noise is missing$"),
        (lambda s: s.update(step=15), "^step must be a whole number, at least 0 and at most 14, got 15$"),
        (lambda s: s.update(step=True), "^step must be a whole number"),
        (lambda s: s.update(seconds=float("nan")), "^seconds must be a finite number of at least 0, got nan$"),
        (lambda s: s["generator"].pop("bn.weight"), r"^generator\.bn\.weight is missing$"),
        (lambda s: s["generator"].update(x=1), r"^generator\.x is unknown$"),
        (lambda s: s["generator"]["bn.weight"].fill_(float("inf")), r"^generator\.bn\.weight must be finite$"),
        (lambda s: s["generator"]["bn.running_var"].neg_(), r"generator\.bn\.running_var must be at least 0, got ent"),
        (
            lambda s: s["generator"].update({"bn.bias": torch.zeros(2)}),
            r"bn\.bias must have the shape \(16,\), got \(2,\)",
        ),
        (
            lambda s: s["generator"].update({"bn.bias": torch.zeros(16, dtype=torch.int8)}),
            "of torch.float32, got torch.i",
        ),
        (_slots, rf"generator\.{LAYER}\.slot_blocks does not say where blocks lie: a block lies in two slots"),
        (_edge, rf"generator\.{LAYER}\.values must be zero outside the weight"),
        (lambda s: s["generator"][LAYER + ".slot_blocks"].fill_(-1), "slot_blocks does not say .* no block is active"),
        (_swap_slots, rf"ema\.module\.{LAYER}\.slot_blocks must be that of the generator"),
        (lambda s: s["optimizer_d"].pop(3), r"^optimizer_d\.3 is missing$"),
        (lambda s: s["optimizer_d"][3]["step"].fill_(7), r"^optimizer_d\.3\.step must be 8, got entries from 7 to 7$"),
        (lambda s: s["optimizer_g"][0]["exp_avg_sq"].sub_(1), r"^optimizer_g\.0\.exp_avg_sq must be at least 0"),
        (lambda s: s["ema"].update(updates=3), r"^ema\.updates must be a whole number, 4, got 3$"),
        (lambda s: s["scheduler"].update(mode="strict"), r"^scheduler\.mode must be 'relaxed', got 'strict'$"),
        (
            lambda s: s["scheduler"]["balance"]["samples"].pop(),
            r"^scheduler\.balance\.samples must hold 3 measurements",
        ),
        (lambda s: s["scheduler"]["generator"].update(due=5), r"^scheduler\.generator\.due must be a whole number"),
        (lambda s: s["scheduler"].update(waiting={}), r"^scheduler\.(discriminator\.scores|waiting)"),
        (
            lambda s: s["scheduler"]["discriminator"]["scores"].update(requested=False),
            r"^scheduler\.discriminator\.scores\.requested must be True, got False$",
        ),
        (lambda s: s["sampler"].update(used=0), r"^sampler\.used must be a whole number, 32, got 0$"),
        (lambda s: s["sampler"]["order"].fill_(1), r"^sampler\.order must be a permutation of 1797 images$"),
        (lambda s: s["sampler"]["generator"].zero_(), r"^sampler\.generator is no state of a random generator$"),
        (lambda s: s.update(cuda=torch.zeros(3)), "^cuda must be None, got a tensor"),
        (lambda s: s["flops"].update(forward=[1.0, 2.0]), r"^flops\.forward must be two values, got a list$"),
        (lambda s: s["versions"].update(torch=2), r"^versions\.torch must be a text, got 2$"),
    ],
)
def test_what_does_not_fit_is_named(trained, damage, message):
    good, fresh = trained
    state = copy.deepcopy(good)
    check_state(state, fresh)
    damage(state)
    with pytest.raises(Misfit, match=message):
        check_state(state, fresh)
