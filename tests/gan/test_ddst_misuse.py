"""DDST.step called where or with what it cannot measure: refused by name, and what is right is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ddst.gan import DDST, EMA
from helpers.training import SHORT, ToyGan, make


def iterations(gan: ToyGan, scheduler: DDST, count: int, when: str, skipped: tuple[int, ...] = ()) -> None:
    """A loop that calls step() "before", "after" or, with scores computed anew, "recomputed" after opt_g.step()."""
    for i in range(count):
        real = gan.d_backward()
        gan.opt_d.step()
        noise, scores = gan.g_backward()
        if when == "before":
            scheduler.step(real=real, noise=noise, fake_scores=scores)
        if i not in skipped:
            gan.opt_g.step()
        if when == "recomputed":
            scores = gan.d(gan.g(noise))
        if when != "before":
            scheduler.step(real=real, noise=noise, fake_scores=scores)


@pytest.mark.parametrize("when", ["before", "recomputed"])
@pytest.mark.parametrize("mode", ["strict", "sdst"])
def test_scores_of_after_the_step_are_refused(when: str, mode: str) -> None:
    gan, scheduler = make(mode=mode)
    with pytest.raises(RuntimeError, match=r"fake_scores were computed after the last opt_g\.step\(\)"):
        iterations(gan, scheduler, 4, when)


@pytest.mark.parametrize("skipped", [(0,), (1, 2, 3), (0, 2, 4, 6), tuple(range(9))])
def test_steps_that_a_scaler_skipped_are_not(skipped: tuple[int, ...]) -> None:
    gan, scheduler = make(method="static", mode="sdst")
    iterations(gan, scheduler, 9, "after", skipped)
    assert scheduler.steps == 9


@pytest.mark.parametrize("order", ["dg", "gd", "both"])
def test_right_loops_are_not(order: str) -> None:
    gan, scheduler = make(ToyGan(order=order))
    for _ in range(9):
        scheduler.step(**gan.iteration())


@pytest.mark.parametrize(
    "change, error, named",
    [
        (lambda a: {"noise": a["noise"][:7]}, ValueError, "fake_scores.*noise"),
        (lambda a: {"fake_scores": a["fake_scores"].mean()}, ValueError, "fake_scores.*not its mean"),
        (lambda a: {"fake_scores": a["fake_scores"][:0]}, ValueError, "fake_scores"),
        (lambda a: {"fake_scores": 0.5}, TypeError, "fake_scores"),
        (lambda a: {"real": a["real"][:, :7]}, ValueError, "real must be"),
        (lambda a: {"real": a["real"][:0]}, ValueError, "real must hold"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_changes(change: Any, error: Any, named: str) -> None:
    gan, scheduler = make(br_every=1)
    arguments = gan.iteration()
    before = copy.deepcopy(scheduler.state_dict())
    with pytest.raises(error, match=named):
        scheduler.step(**{**arguments, **change(arguments)})
    assert str(scheduler.state_dict()) == str(before)
    scheduler.step(**arguments)


def test_scores_in_another_shape_and_another_number_of_real_ones_are_taken() -> None:
    gan, scheduler = make(br_every=1)
    arguments = gan.iteration()
    report = scheduler.step(**{**arguments, "fake_scores": arguments["fake_scores"].view(-1), "real": gan.real()[:5]})
    assert report.sample is not None and report.sample.alpha != 0


def test_exchanged_optimizers_and_what_is_no_average_are_named() -> None:
    gan = ToyGan()
    for mode in ("strict", "sdst"):
        with pytest.raises(ValueError, match="opt_g must hold the generator's parameters, which opt_d holds"):
            DDST(gan.g, gan.d, gan.opt_d, gan.opt_g, **SHORT, mode=mode)
    with pytest.raises(TypeError, match=r"ema must be a ddst\.EMA"):
        make(gan, ema=copy.deepcopy(gan.g))
    both = torch.optim.SGD([*gan.g.parameters(), *gan.d.parameters()], 0.1)
    DDST(gan.g, gan.d, both, both, **SHORT, ema=EMA(gan.g)).close()
    _, scheduler = make(gan)
    scheduler.close()
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.step(**gan.iteration())
