"""Copies of sparse layers whose origin's blocks move: they follow, or say that they mix different blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ddst
from ddst.nn import SparseLayer, sparse_layers
from ddst.nn.spectral_norm import spectral_norm
from helpers.layers import weight_of

DECAY = 0.8


def net(norm: bool = False, reserve: float | None = None) -> nn.Sequential:
    """A convolution with batch norm and a linear layer, both ragged."""
    model = nn.Sequential(
        ddst.SparseConv2d(6, 11, 3, density=0.4, block=(4, 4), padding=1, reserve=reserve),
        nn.BatchNorm2d(11),
        nn.Flatten(),
        ddst.SparseLinear(11 * 9, 7, density=0.3, block=(4, 8), reserve=reserve),
    )
    if norm:
        spectral_norm(model[0])
    return model


def images() -> Tensor:
    return torch.randn(3, 6, 3, 3)


def move(model: nn.Module, grow: int = 0) -> None:
    """Other blocks in every sparse layer: as many, or so many more."""
    for layer in sparse_layers(model).values():
        flat = layer.block_mask.flatten()
        on, off = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
        count = max(3, -grow)
        flat[on[torch.randperm(on.numel())[:count]]] = False
        flat[off[torch.randperm(off.numel())[: count + grow]]] = True
        layer.set_block_mask(flat.view(layer.mask_shape))


def train(model: nn.Module) -> None:
    """Something like a step: new weights at the active blocks, and new statistics."""
    model.train()(images()).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad / (parameter.grad.norm() + 0.01) * 0.3)
            parameter.grad = None


def training(model: nn.Module, growths: tuple[int, ...] = (0, 0, 0, 0)) -> Iterator[None]:
    """Steps with moves of the mask between them."""
    for grow in growths:
        for _ in range(2):
            train(model)
            yield
        move(model, grow)
    train(model)
    yield


def lerp_loop(average: nn.Module, model: nn.Module) -> None:
    """What people write themselves."""
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - DECAY)
        for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)


def data_loop(average: nn.Module, model: nn.Module) -> None:
    """The same past autograd's eyes, as older code does."""
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.data.mul_(DECAY).add_(theirs.data, alpha=1 - DECAY)


def state_loop(average: nn.Module, model: nn.Module) -> None:
    """timm's ModelEmaV3: floats of the state dict are averaged, integers copied."""
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - DECAY)
            else:
                mine.copy_(theirs)


loops = pytest.mark.parametrize("loop", [lerp_loop, data_loop, state_loop])
Loop = Callable[[nn.Module, nn.Module], None]


@loops
@pytest.mark.parametrize("growths", [(0, 0, 0, 0), (5, 0, -6, 2)])
@pytest.mark.parametrize("reserve", [None, 0.9])
def test_a_follower_averages_every_block_with_itself(
    loop: Loop, growths: tuple[int, ...], reserve: float | None
) -> None:
    model = net(reserve=reserve)
    average = copy.deepcopy(model).requires_grad_(False)
    ddst.follow(average, model)
    layers, followers = sparse_layers(model), sparse_layers(average)
    wanted = {name: weight_of(layer).detach() for name, layer in layers.items()}
    moves = 0
    for _ in training(model, growths):
        for name, layer in layers.items():
            active = (weight_of(layer) != 0).to(torch.float32)
            # What was dropped has left the average; what came enters as zero.
            wanted[name] = (DECAY * wanted[name] + (1 - DECAY) * weight_of(layer).detach()) * active
        loop(average, model)
        moves += 1
        for name, follower in followers.items():
            assert torch.equal(follower.slot_blocks, layers[name].slot_blocks)
            torch.testing.assert_close(weight_of(follower), wanted[name], rtol=1e-5, atol=1e-6)
        average(images())
    assert moves == 9
    if growths[0] and reserve is None:
        assert followers["0"].storage_version >= 2
    if reserve is not None:
        assert followers["0"].storage_version == 0


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_torchs_averaged_model_equals_the_librarys_average(use_buffers: bool, norm: bool) -> None:
    model = net(norm)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=use_buffers)
    ddst.follow(average, model)
    own = ddst.EMA(model, decay=DECAY, start=1)
    for _ in training(model):
        average.update_parameters(model)
        own.update()
        average(images())
    layers = sparse_layers(average.module)
    assert layers.keys() == sparse_layers(model).keys()
    for name, layer in layers.items():
        assert torch.equal(layer.slot_blocks, sparse_layers(model)[name].slot_blocks)
        torch.testing.assert_close(layer.values, sparse_layers(own.module)[name].values, rtol=1e-5, atol=1e-6)


@loops
def test_a_static_mask_needs_no_follower(loop: Loop) -> None:
    model = net()
    average = copy.deepcopy(model)
    wanted = {name: weight_of(layer).detach() for name, layer in sparse_layers(model).items()}
    for layer in sparse_layers(model).values():
        layer.set_block_mask(layer.block_mask)  # nothing moves
    for _ in range(4):
        train(model)
        loop(average, model)
        average(images())
    for name, layer in sparse_layers(average).items():
        weight = sparse_layers(model)[name]
        assert torch.equal(layer.slot_blocks, weight.slot_blocks)
        assert not torch.equal(weight_of(layer), wanted[name])


@loops
@pytest.mark.parametrize("frozen", [False, True])
def test_a_copy_that_nobody_told_of_raises_and_names_the_remedy(loop: Loop, frozen: bool) -> None:
    model = net()
    average = copy.deepcopy(model).requires_grad_(not frozen)
    train(model)
    loop(average, model)
    average(images())
    move(model)
    train(model)
    loop(average, model)
    with pytest.raises(RuntimeError, match=r"ddst\.follow\(average, model\)"):
        average(images())
    average.load_state_dict(model.state_dict())  # a state of one mask makes it whole again
    average(images())
    ddst.follow(average, model)
    move(model)
    loop(average, model)
    average(images())


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_nobody_told_of_raises(use_buffers: bool) -> None:
    model = net()
    average = AveragedModel(model, use_buffers=use_buffers)
    average.update_parameters(model)
    average(images())
    move(model)
    train(model)
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match=r"ddst\.follow"):
        average(images())


def test_integers_that_were_averaged_are_met_even_with_a_static_mask() -> None:
    """timm's ModelEmaV2 averages all entries of the state dict."""
    model = net()
    average = copy.deepcopy(model)
    train(model)
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(0.5 * mine + 0.3 * theirs)
    with pytest.raises(RuntimeError, match="slot_blocks"):
        average(images())


def test_a_snapshot_keeps_computing_what_it_did() -> None:
    model = net()
    train(model)
    best = copy.deepcopy(model).eval()
    x = images()
    expected, slots = best(x), best[0].slot_blocks.clone()
    for _ in training(model, (0, 4, -5)):
        assert torch.equal(best(x), expected)
    assert torch.equal(best[0].slot_blocks, slots)
    assert not torch.equal(model[0].block_mask, best[0].block_mask)
    model.load_state_dict(best.state_dict())  # and takes the model back
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("frozen_first", [False, True])
def test_a_copy_that_is_trained_on_its_own_is_left_alone(frozen_first: bool) -> None:
    model = net()
    twin = copy.deepcopy(model)
    if frozen_first:
        twin = copy.deepcopy(twin.requires_grad_(False))
    move(model)
    twin.requires_grad_(True)
    slots = twin[0].slot_blocks.clone()
    for _ in range(3):
        train(twin)
        move(model)
    twin.eval()(images())
    assert torch.equal(twin[0].slot_blocks, slots)
    move(twin)
    train(twin)
    assert not torch.equal(twin[0].slot_blocks, slots)


def test_a_copy_given_a_mask_of_its_own_no_longer_follows() -> None:
    model = net()
    average = copy.deepcopy(model)
    ddst.follow(average, model)
    mask = ~average[0].block_mask
    average[0].set_block_mask(mask)
    move(model)
    assert torch.equal(average[0].block_mask, mask)
    assert torch.equal(average[3].block_mask, model[3].block_mask)


def test_a_follower_of_another_model_is_not_moved_by_the_one_it_was_copied_from() -> None:
    first, second = net(), net()
    average = copy.deepcopy(first)
    ddst.follow(average, second)
    assert torch.equal(average[0].slot_blocks, second[0].slot_blocks)
    move(first)
    assert torch.equal(average[0].slot_blocks, second[0].slot_blocks)
    move(second)
    assert torch.equal(average[0].slot_blocks, second[0].slot_blocks)


def test_followers_of_followers_and_copies_of_both() -> None:
    model = net()
    ema = ddst.EMA(model, decay=DECAY)
    slow = ddst.EMA(ema.module, decay=DECAY)
    pair = copy.deepcopy({"model": model, "ema": ema})
    for _ in training(model):
        ema.update()
        slow.update()
    assert torch.equal(slow.module[0].slot_blocks, model[0].slot_blocks)
    for _ in training(pair["model"]):
        pair["ema"].update()
        pair["ema"].module(images())
    assert pair["ema"].model is pair["model"]
    assert torch.equal(pair["ema"].module[0].slot_blocks, pair["model"][0].slot_blocks)
    assert torch.equal(ema.module[0].slot_blocks, model[0].slot_blocks)
    for average in (ema, slow):
        average.module(images())


@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("growths", [(0, 0), (4, -9)])
def test_states_of_model_and_average_load_in_any_order(model_first: bool, growths: tuple[int, ...]) -> None:
    model = net()
    ema = ddst.EMA(model, decay=DECAY)
    for _ in training(model, growths):
        ema.update()
    states = [copy.deepcopy(model.state_dict()), copy.deepcopy(ema.state_dict())]
    other = net()
    twin = ddst.EMA(other, decay=DECAY)
    loads = [lambda: other.load_state_dict(states[0]), lambda: twin.load_state_dict(states[1])]
    for load in loads if model_first else loads[::-1]:
        load()
    if not model_first:  # the model's mask came last, and the average has followed it: its values are loaded anew
        twin.load_state_dict(states[1])
    x = images()
    assert torch.equal(twin.module(x), ema.module(x))
    for _ in range(2):
        torch.manual_seed(5)
        train(model)
        move(model)
        ema.update()
        torch.manual_seed(5)
        train(other)
        move(other)
        twin.update()
        torch.testing.assert_close(twin.module.state_dict(), ema.module.state_dict(), rtol=0, atol=0)


def test_follow_refuses_what_is_no_copy() -> None:
    model = net()
    with pytest.raises(TypeError, match="average must be a torch"):
        ddst.follow(model.state_dict(), model)
    with pytest.raises(TypeError, match="model must be a torch"):
        ddst.follow(model, None)
    for wrong in (model, nn.Linear(2, 2), nn.Sequential(net()[0])):
        with pytest.raises(ValueError, match="average must be a copy of model"):
            ddst.follow(wrong, model)


def test_a_copy_does_not_keep_its_origin_alive_nor_the_other_way_round() -> None:
    import gc
    import weakref

    model = net()
    average = copy.deepcopy(model)
    ddst.follow(average, model)
    average(images())
    held = weakref.ref(average[0])
    del average
    gc.collect()
    assert held() is None
    origin: weakref.ref[SparseLayer] = weakref.ref(model[0])
    average = copy.deepcopy(model)
    ddst.follow(average, model)
    del model
    gc.collect()
    assert origin() is None
    average(images())


@pytest.mark.parametrize("late", [False, True])
def test_overwriting_a_models_slots_in_place_raises_until_followers_are_told(late: bool) -> None:
    """As code does that writes a best state back entry by entry."""
    model, saved = net(), net()  # as many blocks, others
    average = copy.deepcopy(model)
    ddst.follow(average, model)
    kept = {name: weight_of(layer).detach() for name, layer in sparse_layers(average).items()}
    best = copy.deepcopy(model).eval()
    x = images()
    expected = best(x)
    for mine, theirs in zip(model.state_dict().values(), saved.state_dict().values(), strict=True):
        mine.copy_(theirs)
    if late:
        lerp_loop(average, model)  # which would mix blocks of two masks, and nobody could tell
    with pytest.raises(RuntimeError, match=r"averages follow this layer.*ddst\.follow\(average, model\)"):
        model(x)
    assert torch.equal(best(x), expected)  # a snapshot is none
    ddst.follow(average, model)
    torch.testing.assert_close(model(x), saved(x))
    for name, layer in sparse_layers(average).items():
        assert torch.equal(layer.slot_blocks, sparse_layers(model)[name].slot_blocks)
        if not late:
            active = weight_of(sparse_layers(saved)[name]) != 0
            torch.testing.assert_close(weight_of(layer), kept[name] * active)
    for _ in training(model, (0, 0)):
        lerp_loop(average, model)
        average(images())


def test_slots_overwritten_with_nonsense_are_not_followed() -> None:
    model = net()
    average = copy.deepcopy(model)
    slots = average[0].slot_blocks.clone()
    model[0].slot_blocks.fill_(3)
    with pytest.raises(RuntimeError, match="slot_blocks was overwritten"):
        ddst.follow(average, model)
    assert torch.equal(average[0].slot_blocks, slots)


def pickled(module: nn.Module, tmp_path: Path) -> nn.Module:
    torch.save(module, tmp_path / "average.pt")
    return torch.load(tmp_path / "average.pt", weights_only=False)


@loops
def test_a_pickled_average_computes_what_it_did_and_can_follow_again(loop: Loop, tmp_path: Path) -> None:
    model = net()
    average = copy.deepcopy(model).eval()
    ddst.follow(average, model)
    for _ in training(model, (0,)):
        loop(average, model)
    x = images()
    expected = average(x)
    loaded = pickled(pickled(average, tmp_path), tmp_path)
    for grow in (0, 4):
        move(model, grow)
        assert torch.equal(loaded(x), expected)
    torch.testing.assert_close(loaded.bfloat16().float()(x), expected, rtol=0.05, atol=0.05)
    again, wanted = pickled(average, tmp_path), weight_of(average[0])
    ddst.follow(again, model)
    assert torch.equal(weight_of(again[0]), wanted)
    for _ in training(model, (0, 3)):
        loop(again, model)
        loop(average, model)
        torch.testing.assert_close(again(x), average(x))


@loops
@pytest.mark.parametrize("moved", [False, True])
def test_a_pickled_average_that_is_updated_without_a_model_raises(loop: Loop, moved: bool, tmp_path: Path) -> None:
    model = net()
    average = copy.deepcopy(model)
    ddst.follow(average, model)
    loaded = pickled(average, tmp_path)
    if moved:
        move(model)
    train(model)
    loop(loaded, model)
    with pytest.raises(RuntimeError, match=r"was pickled.*ddst\.follow\(average, model\)"):
        loaded(images())
    loaded = pickled(average, tmp_path)
    train(loaded)  # a model of its own
    loaded(images())


def test_a_pickled_librarys_average_goes_on(tmp_path: Path) -> None:
    model = net()
    ema = ddst.EMA(model, decay=DECAY)
    ema.update()
    torch.save(ema, tmp_path / "ema.pt")
    loaded = torch.load(tmp_path / "ema.pt", weights_only=False)
    move(loaded.model)
    for _ in training(loaded.model):
        loaded.update()
        loaded.module(images())


def test_a_snapshot_may_change_its_dtype_after_blocks_have_moved() -> None:
    model = net()
    best = copy.deepcopy(model).eval()
    move(model)
    x = images()
    expected = best(x)
    torch.testing.assert_close(best.double()(x.double()).float(), expected)
    lerp_loop(best, model.double())
    with pytest.raises(RuntimeError, match=r"ddst\.follow"):
        best(x.double())
