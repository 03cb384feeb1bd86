"""Optimizer state across mask changes, against a dense twin whose state is zeroed outside the kept blocks."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ddst.slot_change import SlotChange
from ddst.sparsity.optimizer import carry_state, check_state

BLOCKS, BLOCK = 12, (4, 3)

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.9)),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adam-single": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adagrad-begun": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=100.0),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
}

# What the optimizers themselves give a new weight, where it is not zero.
BEGINNINGS = {("rprop", "step_size"): 0.1, ("adagrad-begun", "sum"): 100.0}


def mask_of(*active):
    mask = torch.zeros(1, BLOCKS, dtype=torch.bool)
    mask[0, list(active)] = True
    return mask


def slots_of(*blocks):
    """The block in each slot, -1 where it is free."""
    return torch.tensor(blocks, dtype=torch.int32)


def set_mask(param, optimizer, slots, new, **options):
    """What a layer and carry_state do together; the slots after the change and what changed."""
    change = SlotChange.to_mask(slots, new)
    param.data = change.apply(param.detach())
    param.grad = None
    carry_state(optimizer, param, change, **options)
    return change


def step(optimizer, param, grad):
    param.grad = grad.clone()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_follows_a_masked_dense_twin_through_mask_changes(kind):
    torch.manual_seed(0)
    masks = [
        mask_of(0, 2, 3, 7),
        mask_of(2, 5, 7, 11),
        mask_of(1, 2, 5, 7),
        mask_of(1, 2, 5),
        mask_of(*range(BLOCKS)),
    ]
    slots = slots_of(7, 0, 3, 2)
    full = torch.randn(BLOCKS, *BLOCK) * masks[0].view(-1, 1, 1)
    dense, packed = nn.Parameter(full), nn.Parameter(full[slots.long()])
    dense_opt, packed_opt = OPTIMIZERS[kind]([dense]), OPTIMIZERS[kind]([packed])
    sizes = []
    for before, mask in zip([None, *masks], masks, strict=False):
        on = mask[0]
        if before is not None:
            held = {k: v for k, v in packed_opt.state[packed].items() if isinstance(v, torch.Tensor)}
            change = set_mask(packed, packed_opt, slots, mask)
            if change.slot_blocks.shape == slots.shape:  # written in place
                assert all(packed_opt.state[packed][key] is value for key, value in held.items())
            slots = change.slot_blocks
            kept = (before[0] & on).view(-1, 1, 1)
            dense.data.mul_(kept)
            for key, state in dense_opt.state[dense].items():
                if isinstance(state, torch.Tensor) and state.shape == dense.shape:
                    state.copy_(torch.where(kept, state, BEGINNINGS.get((kind, key), 0.0)))
        sizes.append(slots.numel())
        used = slots >= 0
        at = slots[used].long()
        for _ in range(3):
            grad = torch.randn(BLOCKS, *BLOCK) * on.view(-1, 1, 1)
            step(dense_opt, dense, grad)
            step(packed_opt, packed, torch.where(used[:, None, None], grad[slots.long()], 0))
        torch.testing.assert_close(packed.detach()[used], dense.detach()[at], rtol=1e-5, atol=1e-7)
        assert not packed.detach()[~used].any()
        for key, state in packed_opt.state[packed].items():
            twin = dense_opt.state[dense][key]
            if isinstance(state, torch.Tensor) and state.shape == packed.shape:
                torch.testing.assert_close(state[used], twin[at], rtol=1e-5, atol=1e-7)
            elif isinstance(state, torch.Tensor):
                torch.testing.assert_close(state, twin)
    assert sizes == [4, 4, 4, 3, BLOCKS]  # an exchange, a free slot taken, given back, and a growth


@pytest.mark.parametrize("kind", ["rprop", "adagrad", "adagrad-begun"])
def test_a_grown_block_moves_as_a_new_weight_does(kind):
    old, new = slots_of(0, 1), mask_of(0, 5)
    packed, fresh = nn.Parameter(torch.randn(2, *BLOCK)), nn.Parameter(torch.zeros(1, *BLOCK))
    optimizer, other = OPTIMIZERS[kind]([packed]), OPTIMIZERS[kind]([fresh])
    for group in (*optimizer.param_groups, *other.param_groups):
        group["lr_decay"] = 0.0
    for _ in range(3):
        step(optimizer, packed, torch.randn_like(packed))
    set_mask(packed, optimizer, old, new)
    for _ in range(3):
        grad = torch.randn_like(packed)
        step(optimizer, packed, grad)
        step(other, fresh, grad[1:])
    assert fresh.detach().abs().min() > 0
    torch.testing.assert_close(packed.detach()[1:], fresh.detach())


def stepped_adam(slots, **options):
    torch.manual_seed(1)
    param = nn.Parameter(torch.randn(slots.numel(), *BLOCK))
    adam = torch.optim.Adam([param], lr=0.1, betas=(0.5, 0.9), **options)
    for _ in range(2):
        step(adam, param, torch.randn_like(param))
    return param, adam


def test_scores_start_the_second_moments_of_grown_blocks_and_nothing_else():
    old, new = slots_of(0, 1, 2), mask_of(1, 4, 6)
    param, adam = stepped_adam(old, amsgrad=True)
    before = {key: value.clone() for key, value in adam.state[param].items()}
    set_mask(param, adam, old, new, second_moment=torch.tensor([0.25, 4.0]))
    state = adam.state[param]
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(state[key][1], before[key][1])
        reached = 1 - 0.9**2  # of a steady squared gradient, after two steps
        torch.testing.assert_close(state[key][0], torch.full(BLOCK, 0.25 * reached))
        torch.testing.assert_close(state[key][2], torch.full(BLOCK, 4.0 * reached))
    assert not state["exp_avg"][[0, 2]].any()
    assert torch.equal(state["exp_avg"][1], before["exp_avg"][1])
    assert torch.equal(state["step"], before["step"])


def test_with_a_start_the_first_step_of_a_grown_block_is_about_lr_and_without_it_much_longer():
    old, new = slots_of(0, 1), mask_of(0, 5)
    longest = {}
    for start in (None, torch.tensor([4.0])):
        param, adam = stepped_adam(old)
        for _ in range(200):  # past bias correction
            step(adam, param, torch.randn_like(param))
        set_mask(param, adam, old, new, second_moment=start)
        grad = torch.randn_like(param)
        grad[1] = 2.0
        step(adam, param, grad)
        longest["zero" if start is None else "score"] = float(param.detach()[1].abs().max())
    # exp_avg is (1 - 0.5) · g in both; exp_avg_sq is 0.1 · g² or g².
    assert longest["score"] == pytest.approx(0.1 * 0.5, rel=1e-3)
    assert longest["zero"] == pytest.approx(0.1 * 0.5 / 0.1**0.5, rel=1e-3)


def test_mean_start_and_unusable_starts():
    old, new = slots_of(0, 1), mask_of(0, 1, 5)
    param, adam = stepped_adam(old)
    kept = adam.state[param]["exp_avg_sq"].clone()
    set_mask(param, adam, old, new, second_moment="mean")
    torch.testing.assert_close(adam.state[param]["exp_avg_sq"][2], kept.mean().expand(BLOCK))
    for bad in (float("nan"), float("inf"), -1.0):
        param, adam = stepped_adam(old)
        set_mask(param, adam, old, new, second_moment=bad)
        assert not adam.state[param]["exp_avg_sq"][2].any()
    # Nothing is kept, so there is no mean.
    param, adam = stepped_adam(old)
    set_mask(param, adam, old, mask_of(7), second_moment="mean")
    assert not adam.state[param]["exp_avg_sq"].any()


def test_wrong_arguments_change_nothing():
    old, new = slots_of(0, 1), mask_of(0, 5)
    param, adam = stepped_adam(old)
    before = copy.deepcopy(adam.state_dict())
    change = SlotChange.to_mask(old, new)
    for second_moment in (torch.ones(3), "score"):
        with pytest.raises(ValueError, match="second_moment"):
            carry_state(adam, param, change, second_moment=second_moment)
    torch.testing.assert_close(adam.state_dict(), before)


def test_without_state_nothing_happens():
    param = nn.Parameter(torch.randn(2, *BLOCK))
    adam = torch.optim.Adam([param])
    carry_state(adam, param, SlotChange.to_mask(slots_of(0, 1), mask_of(3)))
    assert not adam.state[param]


def test_a_state_whose_shape_only_looks_like_a_scalar_of_the_parameter_is_told_apart():
    # One block of one weight: the step counter has no dimension, the moments have three.
    old, new = slots_of(0), mask_of(0, 1)
    param = nn.Parameter(torch.ones(1, 1, 1))
    adam = torch.optim.Adam([param])
    step(adam, param, torch.ones(1, 1, 1))
    set_mask(param, adam, old, new)
    assert adam.state[param]["step"].shape == ()
    assert adam.state[param]["exp_avg"].shape == (2, 1, 1)


class Factored(torch.optim.Optimizer):
    """Keeps one second moment per row, as memory-saving optimizers do."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row_var"] = p.grad.square().mean(-1)
                self.state[p]["exp_avg"] = p.grad.clone()


def test_factored_and_flat_states_are_refused_before_anything_changes():
    param = nn.Parameter(torch.randn(2, *BLOCK))
    change = SlotChange.to_mask(slots_of(0, 1), mask_of(3))
    factored = Factored([param])
    step(factored, param, torch.randn_like(param))
    before = {key: value.clone() for key, value in factored.state[param].items()}
    with pytest.raises(ValueError, match=r"Factored keeps a state 'row_var' of shape \(2, 4\)"):
        carry_state(factored, param, change)
    torch.testing.assert_close(dict(factored.state[param]), before)
    for optimizer in (torch.optim.Adafactor([param]), torch.optim.LBFGS([param])):
        with pytest.raises(ValueError, match="optimizer is " + type(optimizer).__name__):
            check_state(optimizer, param)


def test_learning_rate_schedulers_and_saved_states_go_on():
    old, new = slots_of(0, 1), mask_of(0, 3, 5)
    param, adam = stepped_adam(old)
    scheduler = lr_scheduler.ExponentialLR(adam, 0.5)
    step(adam, param, torch.randn_like(param))
    set_mask(param, adam, old, new)
    scheduler.step()
    saved = copy.deepcopy(adam.state_dict())
    twin = nn.Parameter(param.detach().clone())
    other = torch.optim.Adam([twin], lr=0.1, betas=(0.5, 0.9))
    other.load_state_dict(saved)
    grad = torch.randn_like(param)
    step(adam, param, grad)
    step(other, twin, grad)
    assert torch.equal(param, twin)
    assert adam.param_groups[0]["lr"] == 0.05


OWN_STARTS = {
    "Yogi": ({"initial_accumulator": 1e-6}, {"exp_avg": 1e-6, "exp_avg_sq": 1e-6}),
    "VSGD": ({"pbg2": 0.5, "pbhg2": 0.25}, {"bg": 0.5, "bhg": 0.25, "mug": 0.0}),
    "DAdaptAdaGrad": ({"d": 1e-6}, {"alphak": 1e-6, "sk": 0.0}),
    "Adai": ({"betas": (0.1, 0.99)}, {"beta1_prod": 1.0, "exp_avg": 0.0}),
}


@pytest.mark.parametrize("kind", OWN_STARTS)
@pytest.mark.parametrize("new", [mask_of(0, 5), mask_of(0, 1, 5)])
def test_states_that_do_not_begin_at_zero_begin_where_their_optimizer_does(kind, new):
    settings, starts = OWN_STARTS[kind]
    param = nn.Parameter(torch.ones(2, *BLOCK))
    optimizer = torch.optim.SGD([param], lr=0.1)
    optimizer.param_groups[0].update(settings)
    optimizer.state[param] = {name: torch.full_like(param, 7.0) for name in starts}
    change = set_mask(param, optimizer, slots_of(0, 1), new)
    for name, start in starts.items():
        state = optimizer.state[param][name]
        assert (state[change.entered] == torch.tensor(start)).all()
        assert (state[0] == 7).all()


def test_a_sum_of_squares_starts_from_those_that_stay():
    param = nn.Parameter(torch.ones(2, *BLOCK))
    optimizer = torch.optim.SGD([param], lr=0.1)
    optimizer.state[param] = {"grad_sum_sq": torch.full_like(param, 7.0)}
    change = set_mask(param, optimizer, slots_of(0, 1), mask_of(0, 5), second_moment=torch.tensor([0.5]))
    assert (optimizer.state[param]["grad_sum_sq"][change.entered] == 7).all()
