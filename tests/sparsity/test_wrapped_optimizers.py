"""Optimizers that hold another one, real packages and small classes of their kind: followed, or refused by name."""

import copy

import pytest
import torch
from torch import nn

import ddst
from ddst.nn.spectral_norm import spectral_norm
from ddst.slot_change import SlotChange
from ddst.sparsity import TopologyUpdater, carry_state
from ddst.sparsity.optimizer import StateChange, check_state
from ddst.sparsity.wrapped import optimizers_of
from helpers.training import ToyGan, make, run


class SamLike(torch.optim.Optimizer):
    """Moments in .base_optimizer; two backward passes a step, the first one's gradient is thrown away."""

    def __init__(self, params, **settings):
        super().__init__(params, settings)
        self.base_optimizer = torch.optim.Adam(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params:
            self.state[p]["e_w"] = 0.05 * p.grad
            p.add_(self.state[p]["e_w"])
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        for p in params:
            p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()
        return loss


class Holder(torch.optim.Optimizer):
    """Never ran Optimizer.__init__, as accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Lookahead(torch.optim.Optimizer):
    """Slow weights in its own state, beside the inner optimizer's, which it holds in a list."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.inner, self.count = [optimizer], 0
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.inner[0].step(closure)
        self.count += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", p.detach().clone())
            if self.count % 3 == 0:
                p.copy_(slow.lerp_(p, 0.5))


def train(wrap, method="rigl", steps=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    ddst.sparsify(model, 0.4)
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=1e-2))
    training = ddst.SparseTraining(model, optimizer, method=method, total_steps=100, interval=4, drop_fraction=0.5)
    first = model[0].block_mask.clone()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 64)) - 1).square().mean().backward()
        optimizer.step()
        training.step()
    assert not torch.equal(first, model[0].block_mask)
    return model, optimizer, training


def prepared(optimizer):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (extra: integrations)")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize("wrap", [Holder, prepared, lambda o: Holder(Holder(o))])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_holder_trains_as_what_it_holds(wrap, method):
    plain, held = train(lambda o: o, method)[0], train(wrap, method)[0]
    torch.testing.assert_close(held.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_adam_over_all_layers_at_once_trains_as_adam_layer_by_layer(how, method):
    def other(adam):
        return torch.optim.Adam(adam.param_groups[0]["params"], lr=adam.defaults["lr"], **how)

    (plain, adam, _), (at_once, fast, _) = train(lambda o: o, method), train(other, method)
    assert isinstance(adam, torch.optim.Adam) and fast.defaults | how == fast.defaults
    torch.testing.assert_close(at_once.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def test_ddst_takes_holders():
    gan = ToyGan()
    gan.opt_g, gan.opt_d = Holder(gan.opt_g), Holder(gan.opt_d)
    plain, scheduler = make()
    _, held = make(gan)
    torch.manual_seed(1)
    expected = [r.as_dict() for r in run(plain, scheduler, 12)]
    torch.manual_seed(1)
    assert [r.as_dict() for r in run(gan, held, 12)] == expected
    assert any(r["generator_update"] for r in expected) and any(r["discriminator_update"] for r in expected)


def state_at(optimizer, layer, slots):
    return {k: v[slots] for k, v in optimizer.state[layer.values].items() if isinstance(v, torch.Tensor) and v.dim()}


def test_outer_and_inner_state_are_carried_through_exchange_growth_and_drop():
    model, optimizer, training = train(Lookahead)
    updater, layer = training.updater, model[0]
    inner = optimizer.inner[0]
    assert optimizers_of(optimizer) == [optimizer, inner]
    updater.growth = "random"
    for act in (
        lambda: updater.exchange(0.5, 50),
        lambda: updater.change_density(0.8, 51),
        lambda: updater.change_density(0.2, 52),
    ):
        before = {int(b): i for i, b in enumerate(layer.slot_blocks.tolist()) if b >= 0}
        held = {o: state_at(o, layer, slice(None)) for o in (optimizer, inner)}
        act()
        after = {int(b): i for i, b in enumerate(layer.slot_blocks.tolist()) if b >= 0}
        kept = sorted(before.keys() & after.keys())
        new = [after[b] for b in sorted(after.keys() - before.keys())]
        for one, old in held.items():
            for key, state in state_at(one, layer, slice(None)).items():
                assert state.shape == layer.values.shape
                assert torch.equal(state[[after[b] for b in kept]], old[key][[before[b] for b in kept]])
                if "sq" not in key:
                    assert not state[new].any()
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()


def test_sam_is_scored_by_the_gradient_of_its_second_pass():
    torch.manual_seed(0)
    model = nn.Sequential(ddst.SparseLinear(64, 64, density=0.4))
    sam = SamLike(model.parameters(), lr=0.0)
    training = ddst.SparseTraining(model, sam, total_steps=100, interval=50)
    collector, x = training.updater.scores, torch.randn(8, 64)

    def closure():
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    collector.request()
    closure()
    sam.step(closure)
    active = model[0].block_mask
    gradient = torch.linalg.vector_norm(model[0].values.grad, dim=(1, 2))
    scores = collector.latest["0"].flatten()[model[0].slot_blocks.long()]
    assert active.any()
    torch.testing.assert_close(scores, gradient)


def test_zero_redundancy_optimizer_trains_as_what_it_shards():
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("torch is built without distributed")
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = train(lambda o: o)[0]
        zero = train(lambda o: ZeroRedundancyOptimizer(o.param_groups[0]["params"], torch.optim.Adam, lr=1e-2))[0]
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(zero.state_dict(), plain.state_dict(), rtol=0, atol=0)


def param_and_adam():
    param = nn.Parameter(torch.randn(3, 4, 4))
    return param, torch.optim.Adam([param])


def test_what_cannot_be_followed_is_refused_by_name():
    param, adam = param_and_adam()
    with pytest.raises(ValueError, match=r"Bare never ran Optimizer.__init__"):
        optimizers_of(type("Bare", (Holder,), {"param_groups": property(lambda self: adam.param_groups)})(None))
    outer = torch.optim.SGD([param], lr=0.1)
    outer.parts = {"a": adam, "b": torch.optim.SGD([param], lr=0.1)}
    with pytest.raises(ValueError, match=r"SGD holds several optimizers .*\.parts \(Adam\), \.parts \(SGD\)"):
        optimizers_of(outer)
    outer.parts = torch.optim.Adam([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"SGD holds Adam in \.parts, which steps other tensors"):
        optimizers_of(outer)


@pytest.mark.parametrize("place", ["list", "keyed", "group", "state", "object"])
def test_state_outside_of_the_parameters_state_is_refused_by_name(place):
    param, adam = param_and_adam()
    moment = torch.zeros_like(param)
    if place == "list":
        adam.moments = [None, [moment]]
    elif place == "keyed":
        adam.moments = {param: moment.flatten()}
    elif place == "group":
        adam.param_groups[0]["moments"] = [moment]
    elif place == "state":
        adam.state["extra"] = {param: moment}
    else:
        adam.moments = type("Store", (), {})()
        adam.moments.state = {param: {"m": moment}}
    with pytest.raises(ValueError, match="optimizer Adam keeps something of a parameter"):
        check_state(adam, param)


def test_several_settings_and_caches_of_an_optimizer_are_no_state():
    param, adam = param_and_adam()
    param.grad = torch.ones_like(param)
    adam.step()
    adam.names, adam.cache, adam.table = {param: 0}, [param, param.grad], torch.zeros(5)
    torch.optim.lr_scheduler.ExponentialLR(adam, 0.9)
    check_state(adam, param)


def test_state_in_dicts_and_lists_is_carried():
    param, adam = param_and_adam()
    nested = {"sets": {1, 2}, "square": torch.ones(3, 4, 4), "more": [torch.ones(3, 4, 4), 3, None]}
    adam.state[param] = {0: nested, "step": torch.tensor([2.0])}
    slots = torch.tensor([0, 1, 2], dtype=torch.int32)
    square = nested["square"]
    carry_state(adam, param, SlotChange.to_mask(slots, torch.tensor([[True, True, False, True]])))
    assert nested["square"] is square
    for moment in (square, nested["more"][0]):
        assert moment[:2].all() and not moment[2].any()
    carry_state(adam, param, SlotChange.to_mask(slots, torch.tensor([[True] * 4])))
    assert nested["square"].shape == nested["more"][0].shape == (4, 4, 4)


@pytest.mark.parametrize("entry", [object(), (torch.zeros(3, 4, 4),), torch.zeros(3, 1, 1), [torch.zeros(3, 3)]])
def test_states_in_objects_tuples_and_of_other_shapes_are_refused_by_name(entry):
    param, adam = param_and_adam()
    adam.state[param] = {"deep": {"entry": entry}}
    with pytest.raises(ValueError, match=r"Adam keeps a state 'deep'\['entry'\]"):
        check_state(adam, param)


PACKAGES = {
    "schedulefree": lambda m, p: m.AdamWScheduleFree(p, lr=1e-3),
    "lion_pytorch": lambda m, p: m.Lion(p, lr=1e-3),
    "adabelief_pytorch": lambda m, p: m.AdaBelief(p, lr=1e-3, print_change_log=False),
}


@pytest.mark.parametrize("package", PACKAGES)
def test_optimizers_of_other_packages_follow(package):
    module = pytest.importorskip(package, reason=f"{package} is not installed (extra: integrations)")

    def make_one(adam):
        optimizer = PACKAGES[package](module, adam.param_groups[0]["params"])
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    model, optimizer, training = train(make_one)
    training.updater.growth = "random"
    training.updater.change_density(0.8, 51)
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


class Factored(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["rows"] = p.grad.flatten().view(-1, 1).mean(1)[: max(p.shape[0] // 2, 2)]


def test_a_state_that_cannot_follow_is_refused_at_the_first_step_not_at_the_first_update():
    torch.manual_seed(0)
    model = nn.Sequential(ddst.SparseLinear(64, 64, density=0.4))
    optimizer = Factored(model.parameters())
    training = ddst.SparseTraining(model, optimizer, total_steps=1000, interval=100)
    training.step()  # no step yet
    model(torch.randn(8, 64)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="optimizer Factored keeps a state 'rows'"):
        training.step()
    gan = ToyGan()
    gan.opt_d = Factored(gan.d.parameters())
    _, scheduler = make(gan)
    with pytest.raises(ValueError, match="optimizer Factored keeps a state 'rows'"):
        run(gan, scheduler, 1)


@pytest.mark.parametrize("action", ["exchange", "grow"])
@pytest.mark.parametrize("where", ["mask", "state"])
def test_an_update_that_raises_leaves_everything_as_it_was(monkeypatch, action, where):
    torch.manual_seed(0)
    model = nn.Sequential(*(spectral_norm(ddst.SparseLinear(64, 64, density=0.4)) for _ in range(3)))
    average = copy.deepcopy(model)
    ddst.follow(average, model)
    adam = torch.optim.Adam(model.parameters())
    updater = TopologyUpdater(model, adam, growth="random", exempt=())
    model(torch.randn(8, 64)).sum().backward()
    adam.step()

    def everything():
        return copy.deepcopy([model.state_dict(), average.state_dict(), adam.state_dict()]), [
            layer.values.grad.clone() for layer in model
        ]

    before, calls = everything(), []
    kind, name = (type(model[0]), "change_slots") if where == "mask" else (StateChange, "commit")
    original = getattr(kind, name)

    def failing(self, *args):
        calls.append(1)
        done = original(self, *args)
        if len(calls) == 3:
            raise MemoryError("out of memory")
        return done

    monkeypatch.setattr(kind, name, failing)
    with pytest.raises(MemoryError):
        updater.exchange(0.5) if action == "exchange" else updater.change_density(0.8)
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    monkeypatch.setattr(kind, name, original)
    model(torch.randn(8, 64)).sum().backward()
    adam.step()
    report = updater.exchange(0.5) if action == "exchange" else updater.change_density(0.8)
    assert len(report.grown) == 3
