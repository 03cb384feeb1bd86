"""``published=True`` is the authors' method: beside it, written out from its formulas on dense masked weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ddst
from ddst.gan import DDST, DensityController, WindowSummary
from ddst.nn import sparse_layers

TOTAL, INTERVAL_G, INTERVAL_D, EVERY, WINDOW = 40, 3, 4, 1, 3
PRUNE_AT, PRUNE_TO = 26, 0.25
ADAM = {"lr": 2e-3, "betas": (0.0, 0.9)}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def networks(seed: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    g = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 12))
    d = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1))
    adam = torch.optim.Adam(d.parameters(), lr=5e-3)
    for _ in range(20):  # until D rates data above G's images: below, ours leaves a sample out
        adam.zero_grad()
        (d(g(torch.randn(16, 8)).detach()).mean() - d(1 + 0.5 * torch.randn(16, 12)).mean()).backward()
        adam.step()
    return g, d


class Published:
    """Dense weights and gradients; a 0/1 mask is multiplied in after every optimizer step. No code of ddst."""

    def __init__(
        self, g: nn.Module, d: nn.Module, masks: dict[str, list[Tensor]], mode: str, method: str, bounds: tuple
    ) -> None:
        self.nets, self.masks, self.bounds = {"g": g, "d": d}, masks, bounds
        self.strict, self.steers, self.method = mode == "strict", mode != "sdst", method
        self.opt = {name: torch.optim.Adam(net.parameters(), **ADAM) for name, net in self.nets.items()}
        self.ratios: list[float] = []
        for name in self.nets:
            self.mask(name)

    def weights(self, name: str) -> list[Tensor]:
        return [module.weight for module in self.nets[name] if isinstance(module, nn.Linear)]

    @torch.no_grad()
    def mask(self, name: str) -> None:
        for weight, mask in zip(self.weights(name), self.masks[name], strict=True):
            weight.mul_(mask)

    def flat(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        join = lambda tensors: torch.cat([t.detach().reshape(-1) for t in tensors])  # noqa: E731
        return (join(self.weights(name)), join(self.masks[name]), join(w.grad for w in self.weights(name)))

    def move(self, name: str, dropped: int, grown: int, drawn: Tensor | None = None) -> None:
        """`drawn`: the mask that holds what a random growth drew; it must have kept what is not dropped."""
        weight, mask, gradient = self.flat(name)
        mask[weight.abs().masked_fill(~mask, math.inf).argsort(stable=True)[:dropped]] = False
        if drawn is None:
            mask[gradient.abs().masked_fill(mask, -math.inf).argsort(descending=True, stable=True)[:grown]] = True
        else:
            assert bool(drawn[mask].all()) and int((drawn & ~mask).sum()) == grown
            mask = drawn.clone()
        sizes = [m.numel() for m in self.masks[name]]
        self.masks[name] = [part.view_as(m) for part, m in zip(mask.split(sizes), self.masks[name], strict=True)]
        self.mask(name)

    def fraction(self, step: int) -> float:
        return 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * step / TOTAL)) / 2

    def iteration(self, step: int, reals: list[Tensor], noises: list[Tensor], drawn: Tensor) -> None:
        """`drawn`: the mask of G after it, of which SET takes what it drew."""
        g, d = self.nets["g"], self.nets["d"]
        for real, noise in zip(reals, noises, strict=False):
            self.opt["d"].zero_grad()
            (torch.relu(1 - d(real)).mean() + torch.relu(1 + d(g(noise).detach())).mean()).backward()
            self.opt["d"].step()
            self.mask("d")
        kept = [w.grad.clone() for w in self.weights("d")]
        self.opt["g"].zero_grad()
        before = d(g(noises[-1])).mean()
        (-before).backward()
        self.opt["g"].step()
        self.mask("g")
        for weight, gradient in zip(self.weights("d"), kept, strict=True):
            weight.grad = gradient
        with torch.no_grad():
            alpha, beta = d(g(noises[-1])).mean() - before, d(reals[-1]).mean() - before
        self.ratios.append(float(alpha / beta))
        mask = self.flat("g")[1]
        active = int(mask.sum())
        if self.method in ("rigl", "set") and 1 < step < TOTAL and step % INTERVAL_G == 0:
            moved = math.ceil(self.fraction(step) * active - 0.5)
            self.move("g", moved, moved, drawn if self.method == "set" else None)
        if self.method == "prune" and step == PRUNE_AT:
            self.move("g", active - int(PRUNE_TO * mask.numel()), 0)
        if self.steers and 1 < step < TOTAL and step % INTERVAL_D == 0 and len(self.ratios) >= WINDOW:
            self.steer(step, sum(self.ratios[-WINDOW:]) / WINDOW)

    def steer(self, step: int, ratio: float) -> None:
        _, mask, _ = self.flat("d")
        total, active = mask.numel(), int(mask.sum())
        d_max = 0.5 if self.strict else 1.0
        if ratio >= self.bounds[1]:
            if active < math.floor(d_max * total):
                target = min(active / total + 0.05, d_max) * total
                self.move("d", 0, math.ceil(target - active - 0.5))
            elif self.strict and active <= math.ceil(d_max * total):
                moved = math.ceil(self.fraction(step) * active - 0.5)
                self.move("d", moved, moved)
        elif ratio <= self.bounds[0] and active / total > 0.05:
            target = max(active / total - 0.05, 0.05) * total
            self.move("d", math.ceil(active - target - 0.5), 0)


@pytest.mark.parametrize(
    ("mode", "method", "bounds", "density_g", "density_d", "wanted"),
    [
        ("relaxed", "rigl", (0.0, 0.01), 0.3, 0.25, {"grow"}),
        ("relaxed", "rigl", (0.3, 0.4), 0.3, 0.3, {"drop"}),
        ("strict", "rigl", (0.0, 0.01), 0.3, 0.4, {"grow", "exchange"}),
        ("relaxed", "static", (0.3, 0.4), 0.3, 0.3, {"drop"}),
        ("sdst", "static", None, 0.3, 0.3, set()),
        ("sdst", "rigl", None, 0.3, 0.3, set()),
        ("sdst", "rigl", None, 0.3, 1.0, set()),
        ("sdst", "set", None, 0.3, 0.3, set()),
        ("sdst", "set", None, 0.3, 1.0, set()),
        ("sdst", "prune", None, 1.0, 1.0, set()),
    ],
    ids=[
        *("grows", "drops", "strict", "dda", "static", "balance-rigl", "strong-rigl", "balance-set", "strong-set"),
        "prune",
    ],
)
def test_masks_weights_and_densities_are_theirs_at_every_iteration(mode, method, bounds, density_g, density_d, wanted):
    g, d = networks(2)
    theirs_g, theirs_d = copy.deepcopy(g), copy.deepcopy(d)
    for net, density in ((g, density_g), (d, density_d)):
        ddst.sparsify(net, density, block=1, distribution="uniform", backend="reference")
    masks = {
        name: [layer.block_mask.clone().view(layer.weight_shape) for layer in sparse_layers(net).values()]
        for name, net in (("g", g), ("d", d))
    }
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), **ADAM) for net in (g, d))
    more = {"prune_to": PRUNE_TO, "prune_at": PRUNE_AT} if method == "prune" else {}
    scheduler = DDST(
        g, d, opt_g, opt_d, total_steps=TOTAL, mode=mode, method=method, published=True, br_eps=0.0,
        interval_g=INTERVAL_G, interval_d=INTERVAL_D, br_every=EVERY, br_window=WINDOW,
        **more, **({} if bounds is None else {"bounds": bounds}),
    )  # fmt: skip
    theirs = Published(theirs_g, theirs_d, masks, mode, method, bounds)
    first = torch.cat([mask.flatten() for mask in masks["g"]])
    draw = torch.Generator().manual_seed(2)
    actions = set()
    for step in range(1, TOTAL + 1):
        reals = [1 + 0.5 * torch.randn(16, 12, generator=draw) for _ in range(2)]
        noises = [torch.randn(16, 8, generator=draw) for _ in range(3)]
        for real, noise in zip(reals, noises, strict=False):
            opt_d.zero_grad()
            (torch.relu(1 - d(real)).mean() + torch.relu(1 + d(g(noise).detach())).mean()).backward()
            opt_d.step()
        opt_g.zero_grad()
        scores = d(g(noises[-1]))
        (-scores.mean()).backward()
        opt_g.step()
        report = scheduler.step(real=reals[-1], noise=noises[-1], fake_scores=scores)
        actions.add(report.decision.action if report.decision else "keep")
        after = torch.cat([layer.block_mask.flatten() for layer in sparse_layers(g).values()])
        theirs.iteration(step, reals, noises, after)
        assert report.sample is not None and report.sample.beta > 0  # where theirs and ours average the same samples
        assert report.sample.ratio == pytest.approx(theirs.ratios[-1], rel=1e-6, abs=1e-9)
        for name, net in (("g", g), ("d", d)):
            for layer, mask, weight in zip(
                sparse_layers(net).values(), theirs.masks[name], theirs.weights(name), strict=True
            ):
                assert torch.equal(layer.block_mask.view(mask.shape), mask), (step, name)
                torch.testing.assert_close(layer.dense_weight(), weight, rtol=0, atol=1e-9)
    assert wanted <= actions
    assert torch.equal(first, after) == (method == "static")


def first_step(start: str) -> float:
    """Mean length of grown weights' first steps, in units of the learning rate, at betas (0, 0.9)."""
    torch.manual_seed(0)
    net = nn.Sequential(ddst.SparseLinear(48, 48, density=0.3, block=1))
    adam = torch.optim.Adam(net.parameters(), 1e-3, betas=(0.0, 0.9))
    training = ddst.SparseTraining(net, adam, total_steps=1000, interval=20, grown_second_moment=start)
    target, moves, grown = torch.randn(48, 48) / 7, [], None
    for _ in range(62):
        x = torch.randn(32, 48)
        adam.zero_grad()
        (net(x) - x @ target).square().mean().backward()
        before, mask = net[0].dense_weight().detach().clone(), net[0].block_mask.clone()
        adam.step()
        if grown is not None:
            moves.append((net[0].dense_weight().detach() - before)[grown].abs().mean() / 1e-3)
            grown = None
        if training.step() is not None:
            grown = net[0].block_mask & ~mask
    return float(torch.stack(moves).mean())


def test_weights_that_enter_are_as_warm_as_theirs():
    """Their optimizer has seen the dense gradient of every step: 0.68 lr; from zero it is 1 / sqrt(1 - 0.9) = 3.16."""
    lengths = {start: first_step(start) for start in ("dense", "mean", "zero")}
    assert lengths["dense"] == pytest.approx(0.68, abs=0.06)
    assert lengths["mean"] == pytest.approx(0.68, abs=0.1)
    assert lengths["zero"] == pytest.approx(3.14, abs=0.05)


def test_moments_of_all_weights_need_an_optimizer_that_has_them():
    net = nn.Sequential(ddst.SparseLinear(16, 16, density=0.5))
    for optimizer in (torch.optim.SGD(net.parameters()), torch.optim.Adam(net.parameters(), amsgrad=True)):
        with pytest.raises(ValueError, match=r'grown_second_moment="dense" .* needs Adam'):
            ddst.SparseTraining(net, optimizer, total_steps=9, grown_second_moment="dense")


@pytest.mark.parametrize(
    ("mode", "ratio", "density", "theirs", "ours"),
    [
        ("relaxed", 0.55, 0.3, "grow", "keep"),
        ("relaxed", 0.45, 0.3, "drop", "keep"),
        ("strict", 0.6, 0.8, "keep", "exchange"),
        ("strict", 0.6, 0.5, "exchange", "exchange"),
        ("strict", 0.5, 0.5, "keep", "keep"),
    ],
)
def test_on_the_bounds_and_above_the_highest_density(mode, ratio, density, theirs, ours):
    window = WindowSummary(100, 100, 0.3, 0.5, ratio)
    for published, action in ((True, theirs), (False, ours)):
        assert DensityController(mode, published=published).decide(window, density, 10).action == action


def test_numbers_of_the_published_scripts():
    """Schedule, exchange, range and bounds as the paper's settings give them."""
    g, d = networks(0)
    for net in (g, d):
        ddst.sparsify(net, 0.2, block=1)
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), **ADAM) for net in (g, d))
    for mode, interval, highest in (("relaxed", 1000, 1.0), ("strict", 2000, 0.5)):
        scheduler = DDST(g, d, opt_g, opt_d, total_steps=100_000, mode=mode, published=True)
        assert (scheduler.interval_g, scheduler.interval_d, scheduler.br_every, scheduler.balance.window) == (
            *(500, interval, 10, 100),
        )
        controller, training = scheduler.controller, scheduler.training_g
        assert (controller.bounds, controller.delta, controller.density_range) == ((0.45, 0.55), 0.05, (0.05, highest))
        assert scheduler.balance.average == "mean_of_ratios"
        assert [round(training.drop_fraction(t), 6) for t in (0, 25_000, 50_000, 75_000, 100_000)] == [
            *(0.5, 0.427509, 0.2525, 0.077491, 0.005),
        ]
        assert (training.updater.scope, training.updater.ranking, training.updater.exempt) == ("global", "raw", ())
