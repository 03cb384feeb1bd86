"""One topology update: what leaves, what enters, what is conserved, and what it does to layers and optimizer."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ddst
from ddst.nn import sparse_layers
from ddst.sparsity.updater import TopologyUpdater
from helpers.dense import active_entries
from helpers.training import batch, classifier, counts, snapshot, train_step


def make(growth="gradient", block=(8, 8), density=0.4, optimizer=torch.optim.Adam, **options):
    """Of the rules of ranking alone; `connected` has tests of its own."""
    model = classifier(block, density)
    opt = optimizer(model.parameters(), lr=0.01)
    return model, opt, TopologyUpdater(model, opt, growth=growth, **{"connected": False, **options})


def ready(model, optimizer, updater, seed=1):
    updater.scores.request()
    train_step(model, optimizer, seed)


def grown_slots(layer, old):
    """bool per slot: whether it holds a block that was not active in the mask ``old``."""
    return (layer.slot_blocks >= 0) & ~old.flatten()[layer.slot_blocks.long().clamp(min=0)]


def active_ids(layer):
    return set(layer.block_mask.flatten().nonzero()[:, 0].tolist())


def test_exchange_by_layer_drops_the_smallest_and_grows_the_largest_scores():
    model, adam, updater = make(ranking="raw")
    ready(model, adam, updater)
    before = {name: (active_ids(layer), layer.dense_weight().detach()) for name, layer in updater.layers.items()}
    norms = {name: layer.block_norms() for name, layer in updater.layers.items()}
    scores = dict(updater.scores.latest)
    report = updater.exchange(0.4, step=7)
    assert (report.step, report.kind, report.fraction) == (7, "exchange", 0.4)
    for name, layer in updater.layers.items():
        old, old_weight = before[name]
        k = math.floor(0.4 * len(old))
        dropped = {sorted(old)[i] for i in norms[name].flatten()[sorted(old)].sort().indices[:k].tolist()}
        candidates = [i for i in range(layer.num_blocks) if i not in old or i in dropped]
        grown = set(sorted(candidates, key=lambda i, name=name: -float(scores[name].flatten()[i]))[:k])
        assert active_ids(layer) == (old - dropped) | grown
        # A block dropped and grown back has stayed as it was.
        assert report.grown.get(name, 0) == len(grown - old)
        assert report.dropped.get(name, 0) == len(dropped - grown)
        # Kept blocks keep their values, grown ones are zero, as they were in the dense weight before.
        active = active_entries(layer.block_mask, layer.weight_shape, layer.block)
        assert torch.equal(layer.dense_weight(), old_weight * active)


@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_exchange_conserves_the_blocks_and_empties_no_layer(growth, scope):
    # 16 and 32 channels: no edge blocks, so that a count of weights is a count of blocks.
    model = nn.Sequential(
        ddst.SparseLinear(32, 64, density=0.3, block=(8, 8)),
        ddst.SparseLinear(64, 64, density=0.2, block=(8, 8)),
        ddst.SparseLinear(64, 32, density=0.05, block=(8, 8)),
    )
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = TopologyUpdater(model, sgd, growth=growth, scope=scope, exempt=(), connected=False)
    for fraction in (0.3, 1.0, 0.1):
        before = counts(model)
        updater.scores.request()
        model(torch.randn(8, 32)).square().sum().backward()
        sgd.step()
        report = updater.exchange(fraction)
        after = counts(model)
        assert sum(after.values()) == sum(before.values())
        assert report.density_after == report.density_before == pytest.approx(updater.density)
        assert min(after.values()) >= 1
        assert sum(report.grown.values()) == sum(report.dropped.values()) > 0
        if scope == "layer":
            assert after == before


def test_global_exchange_with_edge_blocks_keeps_the_density_to_within_a_block():
    model, adam, updater = make(scope="global", exempt=())
    ready(model, adam, updater)
    report = updater.exchange(0.5)
    assert sum(report.grown.values()) > 0
    assert abs(report.density_after - report.density_before) <= 2 * updater.resolution


def test_global_ranking_of_raw_norms_may_strip_a_layer_to_one_block_and_relative_ranking_does_not():
    stripped = {}
    for ranking in ("raw", "relative"):
        model, _, updater = make(scope="global", ranking=ranking, exempt=(), optimizer=torch.optim.SGD)
        with torch.no_grad():
            model[2].values.mul_(1e-3)
        updater.change_density(updater.density * 0.5)
        stripped[ranking] = counts(model)["2"]
    assert stripped["raw"] == 1
    assert stripped["relative"] > 10


def test_global_growth_by_raw_scores_fills_the_layer_with_the_largest_gradients_and_relative_growth_does_not():
    grown = {}
    for ranking in ("raw", "relative"):
        model, adam, updater = make(scope="global", ranking=ranking, exempt=(), density=0.3)
        ready(model, adam, updater)
        updater.scores.latest["2"].mul_(1e3)
        report = updater.change_density(updater.density * 1.3)
        grown[ranking] = set(report.grown)
    assert grown["raw"] == {"2"}
    assert grown["relative"] == {"0", "2", "5", "7"}


def test_growth_and_drop_of_density_meet_the_target_to_within_a_block():
    model, adam, updater = make(density=0.3)
    for target in (0.45, 0.40, 0.80, 0.20):
        ready(model, adam, updater)
        before = counts(model)
        report = updater.change_density(target)
        assert abs(updater.density - target) <= updater.resolution * (1 + 1e-9)
        assert report.density_after == updater.density
        assert report.kind == ("grow" if target > report.density_before else "drop")
        grown, dropped = sum(report.grown.values()), sum(report.dropped.values())
        assert sum(counts(model).values()) == sum(before.values()) + grown - dropped
        assert (grown == 0) != (dropped == 0)


def test_density_ends_at_full_layers_and_at_one_block_each():
    model, adam, updater = make(exempt=["7"])
    low, high = updater.attainable_density
    last = counts(model)["7"]
    ready(model, adam, updater)
    updater.change_density(1.0)
    assert updater.density == pytest.approx(high)
    assert high < 1.0
    assert all(layer.nnz == layer.num_blocks for name, layer in updater.layers.items())
    ready(model, adam, updater)
    assert not updater.exchange(0.5).grown  # full layers: what leaves is grown back
    updater.change_density(0.0)
    assert updater.density == pytest.approx(low, abs=updater.resolution)
    assert {name: n for name, n in counts(model).items() if name != "7"} == {"0": 1, "2": 1, "5": 1}
    assert counts(model)["7"] == last
    train_step(model, adam, 5)  # and it still trains
    assert all(p.isfinite().all() for p in model.parameters())


def test_random_growth_asks_for_no_scores_and_follows_its_generator():
    masks = []
    for seed in (3, 3, 4):
        model, adam, updater = make("random", generator=torch.Generator().manual_seed(seed))
        updater.scores.request()
        assert not any(layer.scores_requested for layer in updater.layers.values())
        train_step(model, adam, 1)
        updater.exchange(0.5)
        masks.append([layer.block_mask.clone() for layer in updater.layers.values()])
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(masks[0], masks[2], strict=True))


def test_grown_blocks_start_at_zero_with_the_squared_score_per_weight():
    model, adam, updater = make(density=0.3)
    train_step(model, adam, 0)
    ready(model, adam, updater)
    layer, old = model[2], model[2].block_mask.clone()
    scores, sizes = updater.scores.latest["2"], ddst.topology.block_sizes(layer.weight_shape, layer.block)
    updater.exchange(0.5)
    grown = grown_slots(layer, old)
    assert grown.any()
    state = adam.state[layer.values]
    assert not layer.values[grown].any()
    assert not state["exp_avg"][grown].any()
    assert state["exp_avg"][~grown].any()
    expected = (scores.square() / sizes[:, :, None, None]).flatten()[layer.slot_blocks[grown].long()]
    expected = expected * (1 - 0.999**2)  # after two steps
    assert expected.unique().numel() > 1
    torch.testing.assert_close(state["exp_avg_sq"][grown], expected.view(-1, 1, 1).expand(-1, 8, 8))


@pytest.mark.parametrize(
    "growth, block, start", [("gradient", (1, 1), "mean"), ("random", (8, 8), "mean"), ("gradient", (8, 8), "zero")]
)
def test_other_starts_of_the_second_moment(growth, block, start):
    model, adam, updater = make(
        growth, block, density=0.3, exempt=(), grown_second_moment="zero" if start == "zero" else None
    )
    assert updater.grown_second_moment == start
    train_step(model, adam, 0)
    ready(model, adam, updater)
    layer, old = model[2], model[2].block_mask.clone()
    updater.exchange(0.5)
    grown = grown_slots(layer, old)
    moments = adam.state[layer.values]["exp_avg_sq"]
    assert grown.any()
    expected = moments[(layer.slot_blocks >= 0) & ~grown].mean() if start == "mean" else torch.zeros(())
    torch.testing.assert_close(moments[grown], expected.expand_as(moments[grown]))


def test_defaults_are_the_papers_for_single_weights_and_the_rules_for_blocks():
    _, _, blocks = make(block=(8, 8))
    _, _, single = make(block=(1, 1))
    _, _, over_layers = make(block=(8, 8), scope="global")
    assert (blocks.scope, blocks.ranking, blocks.exempt) == ("layer", "relative", ())
    assert blocks.grown_second_moment == "score"
    assert (single.scope, single.ranking, single.exempt) == ("global", "raw", ())
    assert (over_layers.scope, over_layers.ranking, over_layers.exempt) == ("global", "relative", ("0", "7"))


def test_ends_are_the_first_and_last_weight_layers_sparse_or_dense():
    def exempt(*layers):
        model = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return TopologyUpdater(model, optimizer, exempt="ends").exempt

    def sparse():
        return ddst.SparseLinear(16, 16, density=1.0, block=8)

    assert exempt(sparse(), sparse(), sparse()) == ("0", "2")
    assert exempt(nn.Linear(16, 16), sparse(), sparse()) == ("2",)
    assert exempt(nn.Linear(16, 16), sparse(), sparse(), nn.Linear(16, 1)) == ()
    assert exempt(sparse(), sparse()) == ()  # nothing would be left
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 1))
    assert exempt(sparse(), sparse(), normed) == ("0",)


def test_exempt_layers_do_not_change():
    model, adam, updater = make(exempt=["2"], density=0.3)
    ready(model, adam, updater)
    assert not model[2].scores_requested
    before = model[2].block_mask.clone()
    report = updater.exchange(0.5)
    assert "2" not in report.dropped
    updater.scores.request()
    train_step(model, adam, 2)
    updater.change_density(0.6)
    assert torch.equal(model[2].block_mask, before)


def lines_of(layer):
    """Blocks of each block row of the weight, and of each block column of each group."""
    mask = layer.block_mask.reshape(*layer.block_mask.shape[:2], -1).sum(2)
    return mask.sum(1), mask.reshape(layer.groups, -1, mask.shape[1]).sum(1).flatten()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_no_update_cuts_off_a_row_or_a_column_of_blocks(scope, growth):
    model = nn.Sequential(
        ddst.SparseConv2d(32, 64, 3, padding=1, density=0.2, block=(8, 8)),
        ddst.SparseConv2d(64, 64, 3, padding=1, density=0.2, block=(8, 8), groups=2),
        ddst.SparseConvTranspose2d(64, 24, 3, density=0.2, block=(8, 8)),
        nn.Flatten(),
        ddst.SparseLinear(24 * 36, 60, density=0.3, block=(8, 8)),  # with edge blocks
    )
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    updater = TopologyUpdater(model, adam, growth=growth, scope=scope, exempt=())
    layers = updater.layers.values()
    assert updater.connected and all(bool((line > 0).all()) for layer in layers for line in lines_of(layer))
    low = updater.attainable_density[0]
    for step, fraction in enumerate((0.3, 1.0, 0.5)):
        updater.scores.request()
        adam.zero_grad()
        model(torch.randn(4, 32, 4, 4)).square().mean().backward()
        adam.step()
        report = updater.exchange(fraction, step)
        assert sum(report.dropped.values()) > 0 and report.density_after == pytest.approx(updater.density)
        assert all(bool((line > 0).all()) for layer in layers for line in lines_of(layer))
    low, asked = updater.attainable_density[0], []
    for target in (0.15, 0.0):
        asked.append(updater.change_density(target).density_after)
        assert all(bool((line > 0).all()) for layer in layers for line in lines_of(layer))
    assert asked == [pytest.approx(0.15, abs=updater.resolution), pytest.approx(low)]
    # Between the blocks that all lines need and one for each of them.
    for layer in layers:
        rows, columns = (line.numel() for line in lines_of(layer))
        assert max(rows, columns) <= int(layer.block_mask.sum()) < rows + columns


def test_without_connected_a_single_exchange_cuts_rows_off():
    """What the test above would miss if masks stayed covered by themselves."""
    model = nn.Sequential(ddst.SparseLinear(128, 128, density=0.15, block=(8, 8)), nn.Linear(128, 1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = TopologyUpdater(model, sgd, growth="random", exempt=(), connected=False)
    sgd.zero_grad()
    model(torch.randn(4, 128)).sum().backward()
    sgd.step()
    updater.exchange(0.5)
    assert any(bool((line == 0).any()) for line in lines_of(model[0]))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_block_that_entered_stays_for_its_grace(scope):
    model = nn.Sequential(ddst.SparseLinear(128, 128, density=0.3, block=(8, 8)), nn.Linear(128, 1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)  # what enters stays zero, the smallest of all
    make_one = lambda: TopologyUpdater(  # noqa: E731
        model, sgd, growth="random", scope=scope, exempt=(), grace=10, generator=torch.Generator().manual_seed(3)
    )
    updater, masks, reports = make_one(), [model[0].block_mask.clone()], []
    for step in (5, 9, 14):
        reports.append(updater.exchange(0.2, step))
        masks.append(model[0].block_mask.clone())
        if step == 9:  # A resumed run knows them, too.
            state = copy.deepcopy(updater.state_dict())
            updater = make_one()
            updater.load_state_dict(state)
    first, second = masks[1] & ~masks[0], masks[2] & ~masks[1]
    assert int(first.sum()) == reports[0].grown["0"] > 3
    # Of the share asked for, what is in its grace is no part.
    mature = int(masks[1].sum()) - int(first.sum())
    assert int(second.sum()) == pytest.approx(0.2 * mature, abs=1.01) and bool((masks[3] & first == first).all())
    updater.exchange(0.2, 15)  # the first ones' grace is over, and they are zero
    gone = masks[3] & ~model[0].block_mask
    assert int(gone.sum()) > 3 and bool((first & gone == gone).all())
    assert bool((model[0].block_mask & second == second).all())
    # A fall of the density has no regard for it.
    updater.change_density(0.15, 16)
    assert not bool((model[0].block_mask & second == second).all())


def test_a_grace_needs_the_step_and_the_states_own_shape():
    model = nn.Sequential(ddst.SparseLinear(64, 64, density=0.5, block=(8, 8)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = TopologyUpdater(model, sgd, growth="random", grace=5)
    with pytest.raises(ValueError, match="step must be given: grace=5 counts steps"):
        updater.exchange(0.3)
    with pytest.raises(ValueError, match="step must be given: grace=5 counts steps"):
        updater.change_density(0.3)
    state = updater.state_dict()
    before = updater.generator.get_state()
    state["generator"] = torch.Generator().manual_seed(9).get_state()
    for wrong in (torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.zeros(64)):
        with pytest.raises(ValueError, match=r"state\['entered'\] must hold torch.int64 of shape \(64,\) for layer"):
            updater.load_state_dict({**state, "entered": {"0": wrong}})
    assert torch.equal(updater.generator.get_state(), before)


def test_norm_share_caps_what_leaves():
    model, adam, updater = make(max_norm_share=0.02, exempt=())
    with torch.no_grad():
        for layer in updater.layers.values():
            layer.values.copy_(torch.ones_like(layer.values))
    ready(model, adam, updater)
    before = {name: layer.nnz for name, layer in updater.layers.items()}
    report = updater.exchange(0.9)
    for name, nnz in before.items():
        assert report.dropped.get(name, 0) <= 0.03 * nnz + 1


def test_layers_without_a_gradient_are_left_alone():
    model, adam, updater = make()
    updater.scores.request()
    model[:3](batch(1)[0]).sum().backward()
    adam.step()
    before = snapshot(model[5])
    report = updater.exchange(0.5)
    assert set(report.dropped) <= {"0", "2"}
    assert report.dropped
    torch.testing.assert_close(snapshot(model[5]), before)


def test_nothing_is_changed_when_the_optimizer_cannot_follow():
    model, _, updater = make(optimizer=torch.optim.SGD)
    updater.optimizer.state[model[7].values]["row_var"] = torch.ones(model[7].nnz, 8)
    ready(model, updater.optimizer, updater)
    before = snapshot(model)
    with pytest.raises(ValueError, match="row_var"):
        updater.exchange(0.5)
    torch.testing.assert_close(snapshot(model), before)


def test_a_layer_whose_scores_are_not_finite_is_left_alone():
    model, adam, updater = make()
    ready(model, adam, updater)
    updater.scores.latest["2"][0, 0] = math.nan
    before = model[2].block_mask.clone()
    report = updater.exchange(0.3)
    assert report.grown and "2" not in report.grown
    assert torch.equal(model[2].block_mask, before)
    assert model(batch(2)[0]).isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.02, 1.0),
    st.lists(st.tuples(st.sampled_from(["exchange", "density"]), st.floats(0, 1)), min_size=1, max_size=4),
    st.sampled_from(["layer", "global"]),
    st.sampled_from(["gradient", "random"]),
)
def test_any_sequence_of_updates_keeps_the_invariants(density, actions, scope, growth):
    torch.manual_seed(0)
    model = nn.Sequential(
        ddst.SparseLinear(20, 24, density=density, block=8),
        nn.ReLU(),
        ddst.SparseLinear(24, 30, density=density, block=8),
        nn.ReLU(),
        ddst.SparseLinear(30, 16, density=density, block=8),
    )
    adam = torch.optim.Adam(model.parameters())
    updater = TopologyUpdater(model, adam, scope=scope, growth=growth, exempt="ends")
    ends = {name: sparse_layers(model)[name].block_mask.clone() for name in ("0", "4")}
    for kind, value in actions:
        updater.scores.request()
        adam.zero_grad()
        model(torch.randn(4, 20)).square().mean().backward()
        adam.step()
        before = updater.density
        if kind == "exchange":
            updater.exchange(value)
            assert abs(updater.density - before) <= 2 * updater.resolution
        else:
            updater.change_density(value)
            low, high = updater.attainable_density
            assert low - 2 * updater.resolution <= updater.density <= high + 1e-9
            reachable = min(max(value, low), high)
            assert abs(updater.density - reachable) <= 2 * updater.resolution
        for name, layer in sparse_layers(model).items():
            assert 1 <= layer.nnz <= layer.num_blocks
            assert layer.values.isfinite().all()
            assert adam.state[layer.values]["exp_avg"].shape == layer.values.shape
            if name in ends:
                assert torch.equal(layer.block_mask, ends[name])


@pytest.mark.parametrize(
    "options, named",
    [
        ({"growth": "best"}, "growth"),
        ({"scope": "block"}, "scope"),
        ({"ranking": "absolute"}, "ranking"),
        ({"max_norm_share": 2.0}, "max_norm_share"),
        ({"exempt": "first"}, "exempt"),
        ({"exempt": ["missing"]}, "exempt"),
        ({"grown_second_moment": "one"}, "grown_second_moment"),
        ({"growth": "random", "grown_second_moment": "score"}, "grown_second_moment"),
    ],
)
def test_errors_name_the_argument(options, named):
    with pytest.raises(ValueError, match=named):
        make(**options)


def test_errors_of_model_and_optimizer():
    model = classifier()
    with pytest.raises(TypeError, match="model"):
        TopologyUpdater("model", torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer"):
        TopologyUpdater(model, None)
    with pytest.raises(ValueError, match=r"optimizer does not hold 0\.values"):
        TopologyUpdater(model, torch.optim.SGD(model[7].parameters(), lr=0.1))
    with pytest.raises(ValueError, match="Adafactor"):
        TopologyUpdater(model, torch.optim.Adafactor(model.parameters()))
    _, _, updater = make()
    with pytest.raises(RuntimeError, match=r"scores\.request"):
        updater.exchange(0.3)
    with pytest.raises(ValueError, match="fraction"):
        updater.exchange(1.5)
    with pytest.raises(ValueError, match="target"):
        updater.change_density(-0.1)
