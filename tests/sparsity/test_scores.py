"""Which backward pass the growth scores come from, and that nothing is recorded without a request."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from ddst.nn import sparse_layers
from ddst.nn.spectral_norm import spectral_norm
from ddst.sparsity.score_collector import ScoreCollector
from helpers.training import ToyGan, batch, classifier, dense_gradient_norms, make, run, train_step


def dense_norms_of_the_loss(model, loss_of):
    """Block norms of the gradient of a loss with respect to each layer's dense weight, with torch's dense layers.

    Under spectral norm the estimate of the largest singular value counts as a constant.
    """
    model = copy.deepcopy(model)
    norms = {}
    for name, layer in sparse_layers(model).items():
        weight = layer.dense_weight().detach().requires_grad_()

        def dense_forward(module, inputs, output, raw=weight):
            x = inputs[0]
            weight = raw if module.spectral_norm is None else raw / module.spectral_norm.sigma(module)
            if weight.dim() == 2:
                return nn.functional.linear(x, weight, module.bias)
            return nn.functional.conv2d(x, weight, module.bias, module.stride, module.padding)

        handle = layer.register_forward_hook(dense_forward)
        loss_of(model).backward()
        handle.remove()
        norms[name] = dense_gradient_norms(layer, weight.grad)
    return norms


def cross_entropy(seed):
    images, labels = batch(seed)
    return lambda model: nn.functional.cross_entropy(model(images), labels)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scores_are_those_of_the_last_step(backend):
    model = classifier(backend=backend)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    collector.request()
    train_step(model, sgd, 1)
    train_step(model, sgd, 2)
    expected = dense_norms_of_the_loss(model, cross_entropy(3))
    train_step(model, sgd, 3)
    assert collector.arrived
    assert set(collector.latest) == set(sparse_layers(model))
    for name, scores in collector.latest.items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_are_summed():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    expected = dense_norms_of_the_loss(model, lambda m: cross_entropy(1)(m) + cross_entropy(2)(m))
    collector.request()
    cross_entropy(1)(model).backward()
    cross_entropy(2)(model).backward()
    sgd.step()
    for name, scores in collector.latest.items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-6)


def test_without_a_request_nothing_is_recorded():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    train_step(model, sgd, 1)
    assert not collector.arrived
    assert not any(layer.scores_requested for layer in sparse_layers(model).values())
    collector.request()
    assert all(layer.scores_requested for layer in sparse_layers(model).values())
    train_step(model, sgd, 2)
    collector.cancel()
    assert not collector.latest
    assert not any(layer.scores_requested for layer in sparse_layers(model).values())
    train_step(model, sgd, 3)
    assert not collector.arrived


def test_no_score_is_computed_before_the_request(monkeypatch):
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    for layer in sparse_layers(model).values():
        monkeypatch.setattr(layer, "take_record", lambda layer=layer: calls.append(layer))
    ScoreCollector(sparse_layers(model), sgd)
    train_step(model, sgd, 1)
    assert not calls


def test_layers_that_no_backward_pass_reached_are_missing():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    collector.request()
    model[:3](batch(1)[0]).sum().backward()
    sgd.step()
    assert list(collector.latest) == ["0", "2"]


def test_an_optimizer_that_runs_a_closure_is_served():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    expected = dense_norms_of_the_loss(model, cross_entropy(1))
    collector.request()

    def closure():
        sgd.zero_grad()
        loss = cross_entropy(1)(model)
        loss.backward()
        return loss

    sgd.step(closure)
    assert collector.arrived
    torch.testing.assert_close(collector.latest["0"], expected["0"], rtol=1e-4, atol=1e-6)


def test_with_spectral_norm_scores_are_those_of_the_raw_weight():
    model = classifier()
    for layer in sparse_layers(model).values():
        spectral_norm(layer, noise=0.0)
        layer.values.data.mul_(5.0)
    model.train()
    for _ in range(3):
        model(batch(1)[0])
    model.eval()  # no more power iterations: sigma stays
    expected = dense_norms_of_the_loss(model, cross_entropy(1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    collector.request()
    train_step(model, sgd, 1)
    for name, scores in collector.latest.items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-3, atol=1e-6)


# A loop with all backward passes before all steps would mix the losses' gradients unless it detaches and freezes.
LOOPS = [(order, detach, freeze) for order in ("dg", "gd") for detach in (True, False) for freeze in (True, False)]


@pytest.mark.parametrize("order, detach, freeze", [*LOOPS, ("both", True, True)])
def test_gradients_of_the_other_networks_loss_are_kept_apart(order, detach, freeze):
    gan = ToyGan(detach=detach, freeze=freeze, order=order, d_steps=2 if order == "dg" else 1)
    collectors = {}
    for net, own, other in ((gan.g, gan.opt_g, gan.opt_d), (gan.d, gan.opt_d, gan.opt_g)):
        collectors[net] = ScoreCollector(sparse_layers(net), own)
        collectors[net].set_aside_at(other)
        collectors[net].request()
    taken = {}
    for net, optimizer in ((gan.g, gan.opt_g), (gan.d, gan.opt_d)):

        def keep_gradients(*_, net=net):
            taken[net] = {name: layer.values.grad.clone() for name, layer in sparse_layers(net).items()}

        optimizer.register_step_pre_hook(keep_gradients)
    masks = {net: {name: layer.block_mask for name, layer in sparse_layers(net).items()} for net in (gan.g, gan.d)}
    gan.iteration()
    for net in (gan.g, gan.d):
        assert collectors[net].arrived
        for name, scores in collectors[net].latest.items():
            # At active blocks the dense gradient is the one the optimizer used.
            norms = taken[net][name].norm(dim=(1, 2))
            torch.testing.assert_close(scores[masks[net][name]], norms, rtol=1e-4, atol=1e-7)


def test_state_restores_the_request_and_scores_in_waiting():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    collector.request()
    train_step(model, sgd, 1)
    state = collector.state_dict()
    twin = classifier()
    other = ScoreCollector(sparse_layers(twin), torch.optim.SGD(twin.parameters(), lr=0.1))
    other.load_state_dict(state)
    assert other.requested
    assert all(layer.scores_requested for layer in sparse_layers(twin).values())
    for name, scores in collector.latest.items():
        assert torch.equal(other.latest[name], scores)
    state["latest"]["0"] = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="'0'"):
        other.load_state_dict(state)


def counted_scores(monkeypatch, model):
    """The layers whose scores are computed, in order."""
    calls = []
    for name, layer in sparse_layers(model).items():

        def scores_of(record, scale, name=name, original=layer.scores_of):
            calls.append(name)
            return original(record, scale)

        monkeypatch.setattr(layer, "scores_of", scores_of)
    return calls


def test_scores_are_computed_once_and_only_when_asked_for(monkeypatch):
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    calls = counted_scores(monkeypatch, model)
    collector.request()
    for seed in range(5):
        train_step(model, sgd, seed)
    assert collector.arrived
    assert calls == []
    first = collector.latest
    assert calls == list(sparse_layers(model))
    again = collector.latest
    assert all(again[name] is first[name] for name in first)
    collector.cancel()
    assert len(calls) == len(first)


@pytest.mark.parametrize("action, computed", [("keep", 0), ("drop", 0), ("grow", 1)])
def test_a_decision_computes_the_scores_it_needs(monkeypatch, action, computed):
    gan, scheduler = make(ToyGan(d_steps=5), exempt_d=(), grown_second_moment="score", delta=0.1)
    ratio = {"keep": 0.5, "drop": 0.1, "grow": 0.9}[action]
    monkeypatch.setattr(scheduler, "_measure", lambda *_: scheduler.balance.add(ratio, 1.0))
    calls = counted_scores(monkeypatch, gan.d)
    report = run(gan, scheduler, 4)[-1]
    assert report.decision.action == action
    assert len(calls) == computed * len(sparse_layers(gan.d))


def factors_alive(steps):
    """How many of some steps' inputs are still held by someone."""
    return [sum(memory() is not None for memory in step) for step in steps]


@pytest.mark.parametrize("spectral", [False, True])
def test_one_steps_activations_are_held_and_go_with_the_scores(spectral):
    model = classifier()
    layers = sparse_layers(model)
    if spectral:
        for layer in layers.values():
            spectral_norm(layer)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(layers, sgd)
    steps, in_backward = [], []

    def see(module, inputs):
        steps[-1].append(weakref.ref(inputs[0].untyped_storage()))

    handles = [layer.register_forward_pre_hook(see) for layer in layers.values()]
    handles.append(model[0].values.register_hook(lambda grad: in_backward.append(factors_alive(steps))))
    collector.request()
    for seed in range(3):
        steps.append([])
        train_step(model, sgd, seed)
    gc.collect()
    # The former steps' are gone when the backward pass of a step has come to its end, ...
    assert [seen[:-1] for seen in in_backward] == [[], [0], [0, 0]]
    assert factors_alive(steps) == [0, 0, 4]
    collector.state_dict()  # ... and the last one's when the scores are computed.
    assert factors_alive(steps) == [0, 0, 0]


def test_in_an_unfrozen_network_the_other_loss_does_not_drive_out_a_steps_own_record():
    gan = ToyGan(detach=True, freeze=False, d_steps=2)
    collector = ScoreCollector(sparse_layers(gan.d), gan.opt_d)
    collector.set_aside_at(gan.opt_g)
    collector.request()
    gan.d_backward()
    gan.opt_d.step()
    expected = {name: scores.clone() for name, scores in collector.latest.items()}
    assert set(expected) == set(sparse_layers(gan.d))
    gan.g_backward()
    torch.testing.assert_close(collector.latest, expected, rtol=0, atol=0)
    gan.opt_g.step()
    torch.testing.assert_close(collector.latest, expected, rtol=0, atol=0)
    assert not collector.state_dict()["aside"]
    assert not any(layer.scores_recorded for layer in sparse_layers(gan.d).values())
    gan.d_backward()
    assert not collector.latest
    gan.opt_d.step()
    assert set(collector.latest) == set(expected)


def test_an_input_changed_in_place_before_the_update_is_an_error():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    collector.request()
    images, _ = batch(1)
    model(images).sum().backward()
    sgd.step()
    images.zero_()
    with pytest.raises(RuntimeError, match="in place"):
        collector.latest  # noqa: B018


def test_close_removes_the_hooks():
    model = classifier()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    collector = ScoreCollector(sparse_layers(model), sgd)
    collector.request()
    collector.close()
    assert not sgd._optimizer_step_pre_hooks
    assert not model[0].scores_requested
