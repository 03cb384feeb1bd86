"""Scores and second moments are those of the gradient that the optimizer's step saw: scaled, clipped, skipped."""

import pytest
import torch
from torch import nn

import ddst
from ddst.nn import sparse_layers
from ddst.nn.spectral_norm import spectral_norm
from ddst.sparsity.score_collector import ScoreCollector
from ddst.sparsity.second_moment import is_second_moment, reached_share
from helpers.training import batch, classifier, train_step

ADAMS = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    # Capturable refuses parameters on a CPU; a step held in a tensor is what matters here.
    "tensor-lr": {"lr": torch.tensor(1e-3), "foreach": False},
}


def loss_of(model, seed):
    images, labels = batch(seed)
    return nn.functional.cross_entropy(model(images), labels)


def collected(model, optimizer):
    collector = ScoreCollector(sparse_layers(model), optimizer)
    collector.request()
    return collector


def scores_of_the_clean_step(**options):
    model = classifier(**options)
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    collector = collected(model, sgd)
    train_step(model, sgd, 1)
    return collector.latest


def assert_equal_scores(scores, clean, factor=1.0):
    assert scores.keys() == clean.keys()
    for name, score in scores.items():
        torch.testing.assert_close(score, clean[name] * factor)


@pytest.mark.parametrize("kind", ADAMS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scores_are_unscaled(kind, backend):
    clean = scores_of_the_clean_step(backend=backend)
    model = classifier(backend=backend)
    adam = torch.optim.Adam(model.parameters(), **{"lr": 0.0, **ADAMS[kind]})
    scaler = torch.amp.GradScaler("cpu", init_scale=3.0 * 2**14)
    collector = collected(model, adam)
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(adam)
    assert_equal_scores(collector.latest, clean)


@pytest.mark.parametrize("fused", [False, True])
def test_scores_are_unscaled_and_clipped_as_a_whole_and_layer_by_layer(fused):
    clean = scores_of_the_clean_step()
    model = classifier()
    adam = torch.optim.Adam(model.parameters(), 0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    collector = collected(model, adam)
    scaler.scale(loss_of(model, 1)).backward()
    scaler.unscale_(adam)
    total = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    model[2].values.grad.mul_(0.5)
    scaler.step(adam)
    factor = 1e-3 / (float(total) + 1e-6)
    scores = collector.latest
    torch.testing.assert_close(scores.pop("2"), clean["2"] * factor * 0.5)
    assert_equal_scores(scores, {name: clean[name] for name in scores}, factor)


def test_with_spectral_norm_the_factor_is_that_of_the_whole_gradient():
    def run(clip):
        torch.manual_seed(0)
        layer = spectral_norm(ddst.SparseLinear(32, 32, density=0.4, block=(8, 8)))
        sgd = torch.optim.SGD(layer.parameters(), 0.0)
        collector = collected(layer, sgd)
        layer(torch.randn(4, 32)).square().sum().backward()
        if clip:
            layer.values.grad.mul_(0.125)
        sgd.step()
        return collector.latest[""]

    torch.testing.assert_close(run(True), run(False) * 0.125)


def test_gradients_that_no_backward_pass_accumulated_are_scored_by_the_step_too():
    clean = scores_of_the_clean_step()
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    collector = collected(model, sgd)
    params = list(model.parameters())
    for p, gradient in zip(params, torch.autograd.grad(loss_of(model, 1) * 1000, params), strict=True):
        p.grad = gradient / 1000
    sgd.step()
    assert_equal_scores(collector.latest, clean)


def test_a_step_made_inside_of_the_backward_pass_is_scored():
    clean = scores_of_the_clean_step()
    model = nn.Sequential(*classifier())
    layer = model[0]  # the last to get its gradient
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    collector = collected(model, sgd)
    layer.values.register_post_accumulate_grad_hook(lambda _: sgd.step())
    loss_of(model, 1).backward()
    assert_equal_scores({"0": collector.latest["0"]}, {"0": clean["0"]})


def test_what_zero_grad_threw_away_is_not_scored():
    clean = scores_of_the_clean_step()
    for set_to_none in (True, False):
        model = classifier()
        sgd = torch.optim.SGD(model.parameters(), 0.0)
        collector = collected(model, sgd)
        loss_of(model, 7).backward()
        sgd.zero_grad(set_to_none)
        loss_of(model, 1).backward()
        sgd.step()
        assert_equal_scores(collector.latest, clean)


def test_accumulated_gradients_count_all():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    collector = collected(model, sgd)
    ((loss_of(model, 1) + loss_of(model, 2)) / 2).backward()
    sgd.step()
    joint = collector.latest
    sgd.zero_grad()
    collector.request()
    for seed in (1, 2):
        (loss_of(model, seed) / 2).backward()
    sgd.step()
    assert_equal_scores(collector.latest, joint)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_gives_no_scores_and_what_it_recorded_goes(fused):
    clean = scores_of_the_clean_step()
    model = classifier()
    adam = torch.optim.Adam(model.parameters(), 0.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    collector = collected(model, adam)
    scaler.scale(loss_of(model, 3) * float("inf")).backward()
    scaler.step(adam)
    scaler.update()
    assert not collector.arrived and not collector.steps.any
    adam.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(adam)
    assert collector.arrived and collector.steps.any
    assert_equal_scores(collector.latest, clean)


def test_without_a_scaler_a_gradient_that_is_not_finite_gives_no_scores():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    collector = collected(model, sgd)
    (loss_of(model, 3) * float("inf")).backward()
    sgd.step()
    assert not collector.arrived


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("fused", [False, True])
def test_no_block_moves_in_a_skipped_step(method, fused):
    torch.manual_seed(0)
    model = nn.Sequential(ddst.SparseLinear(64, 64, density=0.5))
    adam = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    training = ddst.SparseTraining(model, adam, method=method, total_steps=20, interval=4)
    moved = []
    for step in range(1, 8):
        adam.zero_grad()
        loss = model(torch.randn(8, 64)).square().mean() * (float("inf") if step == 4 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(adam)
        scaler.update()
        if training.step() is not None:
            moved.append(step)
    assert moved == [5]


@pytest.mark.parametrize("kind", ["plain", "foreach", "fused"])
def test_training_with_a_scaler_is_training_without_one(kind):
    def run(scale):
        torch.manual_seed(0)
        model = nn.Sequential(ddst.SparseLinear(64, 64, density=0.3), nn.ReLU(), ddst.SparseLinear(64, 16))
        adam = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-6, **ADAMS[kind])
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        training = ddst.SparseTraining(model, adam, total_steps=20, interval=4)
        for _ in range(6):
            adam.zero_grad()
            scaler.scale(model(torch.randn(8, 64)).square().mean()).backward()
            scaler.step(adam)
            scaler.update()
            training.step()
        return model[0].block_mask, adam.state[model[0].values]["exp_avg_sq"], model[0].values.detach()

    plain, scaled = run(1.0), run(2.0**16)
    assert torch.equal(plain[0], scaled[0])
    torch.testing.assert_close(plain[1], scaled[1], rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(plain[2], scaled[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("names, share", [({"betas": (0.9, 0.99)}, 0.99), ({"alpha": 0.9}, 0.9), ({"rho": 0.5}, 0.5)])
def test_a_running_mean_has_reached_its_share_of_a_steady_gradient(names, share):
    assert reached_share({"step": torch.tensor(3.0)}, names) == pytest.approx(1 - share**3)
    assert reached_share({}, {**names, "k": 3}) == pytest.approx(1 - share**3)
    assert reached_share({}, names) == reached_share({"step": 3}, {}) == 1


def test_second_moments_are_known_by_their_names():
    means = (
        "exp_avg_sq",
        "max_exp_avg_sq",
        "square_avg",
        "exp_avg_var",
        "max_variance_ma",
        "update_by_adam_exp_avg_sq_0",
    )
    assert all(is_second_moment(name) for name in (*means, "grad_sum_sq"))
    assert not any(is_second_moment(name) for name in ("exp_avg", "momentum_buffer", "acc_delta", "sum", "z", "s"))


def test_first_steps_of_grown_blocks_are_as_long_as_others_from_the_first_update_on():
    torch.manual_seed(0)
    model = nn.Sequential(ddst.SparseLinear(128, 128, density=0.3))
    adam = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.999))
    training, grown = ddst.SparseTraining(model, adam, total_steps=100, interval=4), None
    for step in range(1, 6):
        before, slots = model[0].values.detach().clone(), model[0].slot_blocks.clone()
        adam.zero_grad()
        (model(torch.randn(32, 128)) - 1).square().mean().backward()
        adam.step()
        if grown is not None:
            assert step == 5 and grown.any()
            moved = (model[0].values.detach() - before).abs().mean((1, 2)) / 1e-3
            assert 0.3 < float(moved[grown].mean()) < 1.5
        grown = None if training.step() is None else model[0].slot_blocks != slots
