"""The averaged generator: the average itself, and that its masks follow the model's."""

import pytest
import torch
from torch import nn

from ddst.convert import densify, sparsify
from ddst.gan import EMA
from ddst.nn import sparse_layers
from ddst.nn.spectral_norm import spectral_norm
from ddst.sparsity import SparseTraining
from ddst.topology import unpack
from helpers.training import batch, classifier, snapshot, train_step


def test_average_of_a_dense_model():
    model = nn.Linear(2, 1)
    ema = EMA(model, decay=0.9)
    expected = model.weight.detach().clone()
    for i in range(5):
        nn.init.constant_(model.weight, float(i))
        ema.update()
        expected = 0.9 * expected + 0.1 * i
    torch.testing.assert_close(ema.module.weight, expected)
    assert not ema.module.weight.requires_grad
    assert not ema.module.training


def test_the_first_updates_copy_until_start():
    model = nn.Linear(1, 1)
    ema = EMA(model, decay=0.5, start=2)
    seen = []
    for value in (4.0, 8.0, 0.0):
        nn.init.constant_(model.weight, value)
        ema.update()
        seen.append(ema.module.weight.item())
    assert seen == [4.0, 8.0, 4.0]


def test_buffers_are_copied():
    model = nn.BatchNorm1d(3)
    ema = EMA(model)
    model(torch.randn(8, 3) + 5)
    ema.update()
    assert torch.equal(ema.module.running_mean, model.running_mean)
    assert ema.module.num_batches_tracked == 1


def test_follows_a_masked_dense_average_through_mask_changes():
    model = classifier()
    layers = sparse_layers(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    training = SparseTraining(model, adam, total_steps=40, interval=3, drop_fraction=0.5)
    ema = EMA(model, decay=0.7)
    averages = {name: layer.dense_weight().detach().clone() for name, layer in layers.items()}
    changed = 0
    for i in range(12):
        train_step(model, adam, i)
        changed += training.step() is not None
        ema.update()
        for name, layer in layers.items():
            weight = layer.dense_weight().detach()
            active = unpack(torch.ones_like(layer.values), layer.block_mask, layer.weight_shape)
            averages[name] = (0.7 * averages[name] + 0.3 * weight) * active
            shadow = sparse_layers(ema.module)[name]
            assert torch.equal(shadow.block_mask, layer.block_mask)
            torch.testing.assert_close(shadow.dense_weight(), averages[name], rtol=1e-5, atol=1e-7)
    assert changed == 4


def test_following_spectral_norm_draws_no_random_numbers():
    model = classifier()
    for layer in sparse_layers(model).values():
        spectral_norm(layer)
    ema = EMA(model)
    mask = model[2].block_mask.clone()
    mask[:, 0] = True
    model[2].set_block_mask(mask)
    state = torch.get_rng_state()
    ema.update()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ema.module[2].spectral_norm.u, model[2].spectral_norm.u)
    model.eval()
    model.load_state_dict(ema.module.state_dict())
    images, _ = batch(0)
    torch.testing.assert_close(ema.module(images), model(images))


def test_follows_the_models_dtype():
    model = nn.Sequential(classifier(), nn.BatchNorm1d(10))
    for layer in sparse_layers(model).values():
        spectral_norm(layer)
    ema = EMA(model, decay=0.5)
    before = ema.module[0][7].bias.clone()
    model.double()
    model[0][2].set_block_mask(~model[0][2].block_mask)
    nn.init.constant_(model[0][7].bias, 1.0)
    ema.update()
    for (name, mine), theirs in zip(ema.module.state_dict().items(), model.state_dict().values(), strict=True):
        assert mine.dtype == theirs.dtype, name
    torch.testing.assert_close(ema.module[0][7].bias, 0.5 * before.double() + 0.5)
    assert ema.module(batch(0)[0].double()).dtype == torch.float64


def test_state_is_restored_with_its_masks():
    model = classifier()
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    training = SparseTraining(model, adam, total_steps=40, interval=3)
    ema = EMA(model, decay=0.7, start=2)
    for i in range(4):
        train_step(model, adam, i)
        training.step()
        ema.update()
    twin = classifier(seed=9)
    twin.load_state_dict(model.state_dict())
    other = EMA(twin, decay=0.7, start=2)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 4
    for each in (model, twin):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.mul_(1.5)
    ema.update()
    other.update()
    torch.testing.assert_close(snapshot(other.module), snapshot(ema.module), rtol=0, atol=0)


def test_an_older_average_follows_the_models_masks_at_its_next_update():
    model = classifier()
    ema = EMA(model)
    ema.update()
    older = ema.state_dict()
    older = {"module": {name: value.clone() for name, value in older["module"].items()}, "updates": 1}
    model[2].set_block_mask(~model[2].block_mask)
    ema.update()
    ema.load_state_dict(older)
    assert not torch.equal(ema.module[2].block_mask, model[2].block_mask)
    ema.update()
    assert torch.equal(ema.module[2].block_mask, model[2].block_mask)


def test_the_average_neither_trains_nor_records():
    model = classifier()
    for layer in sparse_layers(model).values():
        layer.request_scores()
    ema = EMA(model)
    assert not any(layer.scores_requested for layer in sparse_layers(ema.module).values())
    assert not any(p.requires_grad for p in ema.module.parameters())


@pytest.mark.parametrize("options, error", [({"decay": 1.5}, ValueError), ({"start": -1}, ValueError)])
def test_errors_name_the_argument(options, error):
    with pytest.raises(error, match=next(iter(options))):
        EMA(nn.Linear(1, 1), **options)


def test_model_must_be_a_module():
    with pytest.raises(TypeError, match="model"):
        EMA([nn.Linear(1, 1)])


def test_an_average_made_before_sparsify_or_densify_is_refused_by_name():
    model = nn.Sequential(nn.Linear(32, 32))
    ema = EMA(model)
    before = snapshot(ema.module)
    sparsify(model, 0.5)
    with pytest.raises(ValueError, match=r"make the EMA after ddst\.sparsify"):
        ema.update()
    torch.testing.assert_close(snapshot(ema.module), before, rtol=0, atol=0)
    ema = EMA(model)
    densify(model)
    with pytest.raises(ValueError, match=r"0\.\w+\): make the EMA after"):
        ema.update()


def test_a_model_that_has_run_can_be_averaged():
    """torch's spectral norm holds its last weight with a graph, which deepcopy refuses."""
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    model(torch.randn(2, 4)).sum().backward()
    weight = model[0].weight
    ema = EMA(model, decay=0.5)
    assert model[0].weight is weight
    assert weight.grad_fn is not None
    assert torch.equal(ema.module[0].weight, weight)
    assert ema.module[0].weight.grad_fn is None
    ema.update()
    assert ema.module(torch.randn(2, 4)).shape == (2, 4)


def test_a_ramp_shortens_the_averages_half_life_at_the_start():
    """After t updates it is at most ramp · t of them, so that the first weights are forgotten at once."""
    model = nn.Linear(1, 1, bias=False)
    ema, expected = EMA(model, decay=0.9, ramp=0.5), None
    for t in range(30):
        nn.init.constant_(model.weight, float(t))
        ema.update()
        decay = min(0.9, 0.5 ** (1 / (0.5 * t))) if t else 0.0
        expected = float(t) if expected is None else decay * expected + (1 - decay) * t
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert 0.5 ** (1 / (0.5 * 29)) > 0.9  # from there on it is the decay that was given
