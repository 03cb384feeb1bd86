"""DDST in a loop: measurement, decisions carried out, both orders of steps, resume, packed against dense reference."""

import io
import json

import pytest
import torch
from torch import nn

from ddst.gan import DDST, EMA, Decision
from ddst.nn import set_backend, sparse_layers
from ddst.nn.spectral_norm import spectral_norm
from helpers.training import TOTAL, ToyGan, counts, make, run, snapshot


def always(scheduler, monkeypatch, ratio, beta=1.0):
    """Makes every measurement this one."""
    monkeypatch.setattr(scheduler, "_measure", lambda *_: scheduler.balance.add(ratio * beta, beta))


def test_balance_is_measured_as_defined_and_leaves_no_trace():
    gan, scheduler = make(total_steps=1000)
    gan.d[6] = nn.Identity()  # without dropout
    for layer in sparse_layers(gan.d).values():
        spectral_norm(layer)
    run(gan, scheduler, 1)
    arguments = gan.iteration()
    state, before_g, before_d = torch.get_rng_state(), snapshot(gan.g), snapshot(gan.d)
    sample = scheduler.step(**arguments).sample
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(snapshot(gan.g), before_g, rtol=0, atol=0)
    torch.testing.assert_close(snapshot(gan.d), before_d, rtol=0, atol=0)
    with torch.no_grad():  # in the same mode, random state and order
        fake = gan.d(gan.g(arguments["noise"])).double().mean().item()
        real = gan.d(arguments["real"]).double().mean().item()
    pre = arguments["fake_scores"].double().mean().item()
    assert sample.alpha == pytest.approx(fake - pre, rel=1e-12)
    assert sample.beta == pytest.approx(real - pre, rel=1e-12)
    if sample.beta > 1e-3:
        assert sample.ratio == pytest.approx(sample.alpha / sample.beta)


class Noisy(nn.Module):
    """Adds noise of its own, as StyleGAN2's maps do."""

    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize("where", ["generator", "discriminator"])
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_both_sides_of_a_step_meet_the_same_draws_of_the_networks(where, rate):
    gan = ToyGan(batch_norm=False)
    gan.d[6] = nn.Identity()
    if where == "generator":
        gan.g[1] = Noisy()
    else:
        gan.d[6] = nn.Dropout(0.5)
    gan.opt_g = torch.optim.SGD(gan.g.parameters(), lr=rate)
    _, scheduler = make(gan, br_every=2)
    run(gan, scheduler, 1)
    weights = [parameter.detach().clone() for parameter in gan.g.parameters()]
    arguments = gan.iteration()
    state, after = torch.get_rng_state(), snapshot(gan.g)
    sample = scheduler.step(**arguments).sample
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(snapshot(gan.g), after, rtol=0, atol=0)

    @torch.no_grad()
    def scores():
        torch.set_rng_state(state)
        return gan.d(gan.g(arguments["noise"])).double().mean().item()

    alpha = scores()
    with torch.no_grad():
        for parameter, before in zip(gan.g.parameters(), weights, strict=True):
            parameter.copy_(before)
    alpha -= scores()
    assert sample.alpha == pytest.approx(alpha, rel=1e-12, abs=0)
    assert (sample.alpha == 0) == (rate == 0)
    gained = gan.d(gan.g(arguments["noise"])).mean() - arguments["fake_scores"].mean()
    assert abs(gained.item()) > 1e-3, "what other draws would have made of it"


def test_weights_are_copied_only_for_networks_that_draw():
    gan = ToyGan(batch_norm=False)
    gan.d[6] = nn.Identity()
    _, scheduler = make(gan, br_every=1)
    gan.iteration()
    assert scheduler._earlier.kept  # not measured yet: they may draw
    run(gan, scheduler, 1)
    arguments = gan.iteration()
    assert not scheduler._earlier.kept
    gan.g[1] = Noisy()  # draws from now on
    assert scheduler.step(**arguments).sample.alpha != 0  # of other draws, once
    gan.iteration()
    assert scheduler._earlier.kept


def test_a_generator_that_draws_and_made_no_step_has_gained_nothing():
    gan = ToyGan()
    gan.g[1] = Noisy()
    _, scheduler = make(gan, br_every=1)
    first = gan.iteration()
    assert scheduler.step(**first).sample.alpha != 0
    noise, scores = gan.g_backward()  # A gradient scaler may skip the step.
    assert scheduler.step(real=first["real"], noise=noise, fake_scores=scores).sample.alpha == 0


def test_schedule_of_measurements_updates_and_decisions():
    gan, scheduler = make()
    reports = run(gan, scheduler, TOTAL)
    assert [r.step for r in reports] == list(range(1, TOTAL + 1))
    assert [r.step for r in reports if r.sample is not None] == list(range(2, TOTAL + 1, 2))
    assert [r.step for r in reports if r.generator_update is not None] == [3, 6, 9, 12, 15, 18, 21]  # not at 24
    assert [r.step for r in reports if r.decision is not None] == [4, 8, 12, 16, 20]
    for report in reports:
        json.dumps(report.as_dict(), allow_nan=False)
    assert reports[-1].density_g == pytest.approx(scheduler.density_g)


def test_ratio_above_the_bounds_grows_d_up_to_full(monkeypatch):
    gan, scheduler = make(delta=0.25, exempt_d=())
    always(scheduler, monkeypatch, 0.9)
    before = scheduler.density_d
    reports = run(gan, scheduler, TOTAL)
    assert [r.decision.action for r in reports if r.decision] == ["grow", "grow", "grow", "keep", "keep"]
    first = reports[3]
    assert first.discriminator_update.kind == "grow"
    assert first.density_d == pytest.approx(before + 0.25, abs=2 * scheduler.updater_d.resolution)
    assert scheduler.density_d == 1.0
    assert all(layer.nnz == layer.num_blocks for layer in sparse_layers(gan.d).values())


@pytest.mark.parametrize("connected", [False, True])
def test_ratio_below_the_bounds_drops_d_to_its_floor_and_empties_no_layer(connected, monkeypatch):
    gan, scheduler = make(delta=0.3, density_range=(0.0, 1.0), exempt_d=(), connected=connected)
    always(scheduler, monkeypatch, 0.1)

    def lines():
        """Which rows and columns of blocks have any."""
        masks = [layer.block_mask for layer in sparse_layers(gan.d).values()]
        pairs = [mask.reshape(*mask.shape[:2], -1).any(2) for mask in masks]
        return [(p.any(0).tolist(), p.any(1).tolist()) for p in pairs]

    before = lines()
    reports = run(gan, scheduler, TOTAL)
    assert [r.decision.action for r in reports if r.decision] == ["drop", "keep", "keep", "keep", "keep"]
    assert (lines() == before) if connected else set(counts(gan.d).values()) == {1}
    assert scheduler.density_d == pytest.approx(scheduler.updater_d.attainable_density[0], abs=0.02)
    assert all(p.isfinite().all() for p in gan.d.parameters())


def test_strict_exchanges_at_its_upper_end(monkeypatch):
    gan, scheduler = make(mode="strict", delta=0.2, density_range=(0.05, 0.5), drop_fraction_d=0.5, exempt_d=())
    always(scheduler, monkeypatch, 0.9)
    reports = [r for r in run(gan, scheduler, TOTAL) if r.decision]
    assert [r.decision.action for r in reports] == ["grow", "exchange", "exchange", "exchange", "exchange"]
    for report in reports[1:]:
        assert report.discriminator_update.kind == "exchange"
        assert report.density_d == pytest.approx(0.5, abs=2 * scheduler.updater_d.resolution)
    fractions = [r.discriminator_update.fraction for r in reports[1:]]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] == pytest.approx(0.005 + 0.495 * 0.75)  # cosine at a third of the run
    assert sum(reports[1].discriminator_update.grown.values()) > 0


def test_first_and_last_layers_of_d_are_exempt_by_default(monkeypatch):
    gan, scheduler = make()
    assert scheduler.updater_d.exempt == ("0", "7")
    always(scheduler, monkeypatch, 0.9)
    before = counts(gan.d)
    run(gan, scheduler, TOTAL)
    after = counts(gan.d)
    assert (after["0"], after["7"]) == (before["0"], before["7"])
    assert after["2"] > before["2"]
    low, high = scheduler.updater_d.attainable_density
    assert low < scheduler.density_d <= high < 1.0


@pytest.mark.parametrize("ratio, beta", [(0.9, 0.0), (0.9, -1.0), (0.9, float("nan")), (0.5, 1.0)])
def test_density_is_kept_with_a_reason_when_beta_has_no_meaning_or_br_is_in_bounds(monkeypatch, ratio, beta):
    gan, scheduler = make()
    always(scheduler, monkeypatch, ratio, beta)
    before = counts(gan.d)
    decisions = [r.decision for r in run(gan, scheduler, 9) if r.decision]
    assert [d.action for d in decisions] == ["keep", "keep"]
    assert all(d.reason for d in decisions)
    assert counts(gan.d) == before


def test_no_decision_before_the_window_is_full_or_in_warm_up(monkeypatch):
    gan, scheduler = make(br_window=12, warmup=13)
    always(scheduler, monkeypatch, 0.9)
    reasons = [r.decision.reason for r in run(gan, scheduler, 17) if r.decision]
    assert reasons[:3] == ["warm-up until step 13"] * 3
    assert reasons[3].startswith("balance ratio 0.9")
    gan, scheduler = make(br_window=12)
    reasons = [r.decision.reason for r in run(gan, scheduler, 9) if r.decision]
    assert reasons == ["window holds 2 of 6 samples", "window holds 4 of 6 samples"]


def test_logged_decisions_can_be_replayed(monkeypatch):
    gan, scheduler = make(delta=0.1)
    lines = [json.dumps(r.as_dict()) for r in run(gan, scheduler, TOTAL)]
    logged = [Decision.from_dict(d) for d in (json.loads(line)["decision"] for line in lines) if d]
    assert len(logged) == 5
    assert [scheduler.controller.replay(d) for d in logged] == logged


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_sdst_never_changes_d_and_asks_nothing_of_it(method):
    gan, scheduler = make(mode="sdst", method=method, drop_fraction=0.6)
    before = {name: layer.block_mask.clone() for name, layer in sparse_layers(gan.d).items()}
    masks_g = [layer.block_mask.clone() for layer in sparse_layers(gan.g).values()]
    reports = []
    for _ in range(TOTAL):
        assert not any(layer.scores_requested for layer in sparse_layers(gan.d).values())
        reports.append(scheduler.step(**gan.iteration()))
    assert all(r.decision is None and r.discriminator_update is None for r in reports)
    assert all(torch.equal(layer.block_mask, before[name]) for name, layer in sparse_layers(gan.d).items())
    moved = any(
        not torch.equal(a, layer.block_mask) for a, layer in zip(masks_g, sparse_layers(gan.g).values(), strict=True)
    )
    assert moved == (method != "static")
    assert len([r for r in reports if r.sample]) == TOTAL // 2
    assert scheduler.balance.full


def test_static_measures_dense_networks_too():
    gan = ToyGan()
    gan.g, gan.d = nn.Linear(16, 16), nn.Linear(16, 1)
    gan.opt_g = torch.optim.SGD(gan.g.parameters(), lr=0.01)
    gan.opt_d = torch.optim.SGD(gan.d.parameters(), lr=0.01)
    scheduler = DDST(gan.g, gan.d, gan.opt_g, gan.opt_d, total_steps=10, mode="sdst", method="static", br_every=1)
    reports = run(gan, scheduler, 3)
    assert scheduler.balance.summary().samples == 3
    assert (reports[0].density_g, reports[0].density_d) == (1.0, 1.0)


@pytest.mark.parametrize(
    "order, detach, freeze, d_steps",
    [("dg", True, False, 2), ("dg", False, True, 2), ("dg", False, False, 1), ("gd", False, False, 1)],
)
def test_growth_uses_each_networks_own_gradient(monkeypatch, order, detach, freeze, d_steps):
    gan = ToyGan(order=order, detach=detach, freeze=freeze, d_steps=d_steps)
    gan, scheduler = make(gan, exempt_d=(), interval_g=4)
    always(scheduler, monkeypatch, 0.9)
    stepped, used = {}, {}
    sides = (
        (gan.g, gan.opt_g, scheduler.training_g.updater, "exchange"),
        (gan.d, gan.opt_d, scheduler.updater_d, "change_density"),
    )
    for net, optimizer, updater, update in sides:

        def norms_of_the_step(*_, net=net):
            layers = sparse_layers(net).items()
            stepped[net] = {n: (layer.block_mask.clone(), layer.values.grad.norm(dim=(1, 2))) for n, layer in layers}

        original = getattr(updater, update)

        def spy(*arguments, net=net, updater=updater, original=original):
            used[net] = dict(updater.scores.latest)
            return original(*arguments)

        optimizer.register_step_pre_hook(norms_of_the_step)
        monkeypatch.setattr(updater, update, spy)
    report = run(gan, scheduler, 4)[-1]
    assert report.discriminator_update.kind == "grow"
    assert report.generator_update.kind == "exchange"
    for net in (gan.g, gan.d):
        assert set(used[net]) == set(sparse_layers(net))
        for name, scores in used[net].items():
            mask, norms = stepped[net][name]
            torch.testing.assert_close(scores[mask], norms, rtol=1e-4, atol=1e-7)


def test_gradients_are_asked_for_only_before_an_update():
    gan, scheduler = make(interval_g=5, interval_d=7, warmup=8)
    asked = {"g": [], "d": []}
    for step in range(1, TOTAL + 1):
        for name, net in (("g", gan.g), ("d", gan.d)):
            if any(layer.scores_requested for layer in sparse_layers(net).values()):
                asked[name].append(step)
        scheduler.step(**gan.iteration())
    assert asked == {"g": [5, 10, 15, 20], "d": [14, 21]}  # no decision at 7 is a change: warm-up


def test_average_follows_the_topology():
    gan = ToyGan()
    ema = EMA(gan.g, decay=0.9)
    gan, scheduler = make(gan, ema=ema)
    for _ in range(10):
        scheduler.step(**gan.iteration())
        for name, layer in sparse_layers(gan.g).items():
            assert torch.equal(sparse_layers(ema.module)[name].block_mask, layer.block_mask)
    assert ema.updates == 10


MODES = [("relaxed", "rigl"), ("strict", "set"), ("sdst", "rigl"), ("sdst", "set"), ("sdst", "static")]


def save(gan, scheduler, ema):
    buffer = io.BytesIO()
    parts = (gan.g, gan.d, gan.opt_g, gan.opt_d, scheduler, ema)
    torch.save({"parts": [part.state_dict() for part in parts], "rng": torch.get_rng_state()}, buffer)
    return buffer.getvalue()


def load(data, gan, scheduler, ema):
    state = torch.load(io.BytesIO(data), weights_only=True)
    for part, saved in zip((gan.g, gan.d, gan.opt_g, gan.opt_d, scheduler, ema), state["parts"], strict=True):
        part.load_state_dict(saved)
    torch.set_rng_state(state["rng"])


@pytest.mark.parametrize("mode, method", MODES)
def test_resume_is_bit_exact(mode, method):
    def fresh(seed):
        gan = ToyGan(seed=seed)
        for layer in sparse_layers(gan.d).values():
            spectral_norm(layer)
        ema = EMA(gan.g, decay=0.9)
        # Narrow bounds, so that D changes at nearly every decision; strict reaches its upper end.
        options = {"bounds": (0.2, 0.2), "density_range": (0.1, 0.45), "delta": 0.1, "exempt_d": ()}
        return (*make(gan, mode=mode, method=method, ema=ema, **options), ema)

    torch.manual_seed(0)
    gan, scheduler, ema = fresh(0)
    reports = run(gan, scheduler, 8)
    saved = {8: save(gan, scheduler, ema)}
    reports += run(gan, scheduler, 3)
    saved[11] = save(gan, scheduler, ema)  # a request to both networks is open
    reports += run(gan, scheduler, TOTAL - 11)
    if mode != "sdst":
        assert any(r.discriminator_update for r in reports)
    for k, data in saved.items():
        twin, resumed, average = fresh(1)
        load(data, twin, resumed, average)
        assert run(twin, resumed, TOTAL - k) == reports[k:]
        for left, right in ((gan.g, twin.g), (gan.d, twin.d), (ema.module, average.module)):
            torch.testing.assert_close(snapshot(left), snapshot(right), rtol=0, atol=0)
        assert resumed.balance.summary() == scheduler.balance.summary()


@pytest.mark.parametrize("mode", ["relaxed", "strict"])
def test_packed_and_dense_reference_give_the_same_run(mode):
    """50 iterations, topology updates of both networks included, in float64 so that rounding stays small."""
    runs = []
    for backend in ("auto", "reference"):
        gan = ToyGan(density=0.35, batch_norm=False)
        gan.g.double()
        gan.d.double()
        for net in (gan.g, gan.d):
            set_backend(net, backend)
        torch.set_default_dtype(torch.float64)
        try:
            torch.manual_seed(3)
            options = {"total_steps": 60, "interval_d": 6, "bounds": (0.2, 0.3), "exempt_d": ()}
            gan, scheduler = make(gan, mode=mode, **options)
            reports = run(gan, scheduler, 50)
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append((gan, reports))
    (left, packed), (right, dense) = runs
    assert any(r.discriminator_update for r in packed)
    assert any(r.generator_update and r.generator_update.grown for r in packed)
    for a, b in zip(packed, dense, strict=True):
        assert (a.generator_update, a.discriminator_update) == (b.generator_update, b.discriminator_update)
        assert (a.decision is None) == (b.decision is None)
        if a.decision:
            assert (a.decision.action, a.decision.density) == (b.decision.action, b.decision.density)
        if a.sample:
            assert a.sample.alpha == pytest.approx(b.sample.alpha, rel=1e-6, abs=1e-9)
            assert a.sample.beta == pytest.approx(b.sample.beta, rel=1e-6, abs=1e-9)
    torch.testing.assert_close(snapshot(left.g), snapshot(right.g), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(snapshot(left.d), snapshot(right.d), rtol=1e-6, atol=1e-8)


def test_one_conditional_or_wrapped_network_is_measured_through_callables():
    gan = ToyGan()
    gan.d[6] = nn.Identity()  # without dropout, for which all would be called once more
    seen = []

    def generate(noise):
        seen.append("generate")
        return gan.g(noise["z"])

    def score(images):
        seen.append("score")
        return gan.d(images)[:, 0]

    _, scheduler = make(gan, generate=generate, score=score, br_every=1)
    arguments = gan.iteration()
    report = scheduler.step(
        real=arguments["real"], noise={"z": arguments["noise"]}, fake_scores=arguments["fake_scores"]
    )
    assert seen == ["generate", "score", "score"]
    assert report.sample is not None


def test_a_missing_gradient_delays_growth_and_is_reported_if_it_stays_away(monkeypatch):
    gan, scheduler = make()
    always(scheduler, monkeypatch, 0.9)
    run(gan, scheduler, 3)
    noise = torch.randn(16, 16)
    idle = {"real": gan.real(), "noise": noise, "fake_scores": gan.d(gan.g(noise))}
    scheduler.training_g.method = "static"  # G's own complaint is tested elsewhere
    report = scheduler.step(**idle)
    assert report.decision.action == "grow"
    assert report.discriminator_update is None
    waiting = scheduler.state_dict()
    json.dumps(waiting["waiting"], allow_nan=False)
    scheduler._steering.waiting = None
    scheduler.load_state_dict(waiting)
    report = scheduler.step(**gan.iteration())
    assert report.discriminator_update.kind == "grow"
    run(gan, scheduler, 2)
    for _ in range(4):
        scheduler.step(**idle)
    with pytest.raises(RuntimeError, match="discriminator from step 8 to 12"):
        scheduler.step(**idle)


def test_close_removes_every_hook():
    gan, scheduler = make()
    run(gan, scheduler, 3)
    scheduler.close()
    assert not gan.opt_g._optimizer_step_pre_hooks
    assert not gan.opt_d._optimizer_step_pre_hooks
    assert not any(layer.scores_requested for net in (gan.g, gan.d) for layer in sparse_layers(net).values())
