"""SparseTraining: when updates happen, what is asked for when, resume, packed against the dense reference."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from ddst.nn import SparseLinear, sparse_layers
from ddst.sparsity import SparseTraining
from helpers.training import batch, classifier, counts, snapshot, train_step

TOTAL = 20


def make(
    method="rigl", block=(8, 8), backend="auto", total_steps=TOTAL, interval=4, optimizer=torch.optim.Adam, **options
):
    model = classifier(block, 0.4, backend)
    opt = optimizer(model.parameters(), lr=0.01)
    training = SparseTraining(model, opt, method=method, total_steps=total_steps, interval=interval, **options)
    return model, opt, training


def run(model, optimizer, training, steps, first=0):
    reports = []
    for i in range(first, first + steps):
        train_step(model, optimizer, i)
        reports.append(training.step())
    return reports


def steps_of(reports):
    return [report.step for report in reports if report is not None]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"interval": 4}, [4, 8, 12, 16]),  # not at 20, the last step
        ({"interval": 1, "total_steps": 6}, [2, 3, 4, 5]),  # not at the first and the last
        ({"interval": 4, "begin": 8}, [8, 12, 16]),
        ({"interval": 4, "end": 12}, [4, 8]),
        ({"interval": 4, "begin": 9, "end": 16}, [12]),
        ({"interval": 30}, []),
    ],
)
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_updates_come_at_multiples_of_the_interval_but_never_first_or_last(method, options, expected):
    reports = run(*make(method, **options), steps=options.get("total_steps", TOTAL))
    assert steps_of(reports) == expected


def test_no_update_after_the_run_has_ended():
    assert steps_of(run(*make(), steps=2 * TOTAL)) == [4, 8, 12, 16]


def test_static_never_changes_a_mask_and_never_asks():
    model, adam, training = make("static")
    masks = {name: layer.block_mask.clone() for name, layer in sparse_layers(model).items()}
    for i in range(TOTAL):
        train_step(model, adam, i)
        assert training.step() is None
        assert not any(layer.scores_requested for layer in sparse_layers(model).values())
    assert all(torch.equal(layer.block_mask, masks[name]) for name, layer in sparse_layers(model).items())


def test_the_dense_gradient_is_asked_for_only_before_an_update():
    model, adam, training = make()
    asked = []
    for i in range(TOTAL):
        # During this step's backward pass:
        asked.append(any(layer.scores_requested for layer in sparse_layers(model).values()))
        train_step(model, adam, i)
        training.step()
    assert [step for step, was in enumerate(asked, 1) if was] == [4, 8, 12, 16]


def test_set_never_asks():
    model, adam, training = make("set")
    for i in range(TOTAL):
        assert not any(layer.scores_requested for layer in sparse_layers(model).values())
        train_step(model, adam, i)
        training.step()


def test_counts_per_layer_stay_and_fractions_follow_the_schedule():
    model, adam, training = make(drop_fraction=0.6, schedule="linear")
    before = counts(model)
    reports = [r for r in run(model, adam, training, TOTAL) if r is not None]
    assert counts(model) == before
    assert [r.fraction for r in reports] == pytest.approx([0.005 + 0.595 * (1 - t / 20) for t in (4, 8, 12, 16)])
    assert reports[0].grown == reports[0].dropped
    assert sum(reports[0].grown.values()) > 0


def test_fractions_may_fall_over_fewer_steps_than_the_run():
    training = make(drop_fraction=0.6, schedule="linear", drop_fraction_steps=8)[2]
    assert [training.drop_fraction(t) for t in (0, 4, 8, 16)] == pytest.approx([0.6, 0.3025, 0.005, 0.005])
    assert training.is_update_step(16), "and go on at their last value"


def test_default_drop_fraction_depends_on_the_block():
    assert make(block=(8, 8))[2].drop_fraction(0) == 0.3
    assert make(block=(8, 1))[2].drop_fraction(0) == 0.3
    assert make(block=(1, 1))[2].drop_fraction(0) == 0.5
    assert make(block=(8, 8), schedule=lambda step: 7.0)[2].drop_fraction(0) == 1.0


def test_warns_where_rows_and_columns_need_every_block():
    def of(density, **options):
        model = nn.Sequential(SparseLinear(64, 64, density=density, block=(8, 8)))
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        return SparseTraining(model, sgd, total_steps=20, interval=4, **options)

    with pytest.warns(UserWarning, match="of 8 blocks in the largest layer, connected, .* no block of Seq") as said:
        of(0.125)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="largest layer, max_norm_share=0.001, .* no block of Sequential is"):
        of(0.5, connected=False, max_norm_share=0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of(0.125, connected=False)
        of(0.5)
        of(0.125, method="static")
        of(0.125, schedule=lambda step: 0.0)  # may not be asked ahead
        of(0.125, begin=17)  # no update at all


def test_says_where_pruning_could_not_reach_its_density():
    model = nn.Sequential(SparseLinear(24, 24, density=1.0, block=(8, 8)))
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    grid = model[0].values.data.view(3, 3, 8, 8)
    grid.copy_(torch.eye(3).add(0.1)[..., None, None].expand(grid.shape))  # the diagonal covers all rows and columns
    training = SparseTraining(
        model, sgd, method="prune", prune_to=1 / 3, prune_at=2, total_steps=6, connected=True, exempt=()
    )
    assert training.updater.attainable_density[0] == pytest.approx(1 / 3)
    for step in range(3):
        model(torch.randn(4, 24)).sum().backward()
        sgd.step()
        if step != 1:
            assert training.step() is None
            continue
        # A row and a column, of which the corner may leave: four blocks.
        star = torch.ones(3, 3)
        star[1:, 1:], star[0, 0] = 0.1, 0.5
        grid.copy_(star[..., None, None].expand(grid.shape))
        with pytest.warns(UserWarning, match=r"pruned to 0\.4444, not to prune_to=0\.33.*: rows and columns need"):
            report = training.step()
        assert report.density_after == pytest.approx(4 / 9)


def test_mixing_kinds_of_optimizers_trains_on():
    for optimizer in (torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD, torch.optim.Adagrad):
        model, opt, training = make(optimizer=optimizer)
        assert steps_of(run(model, opt, training, TOTAL)) == [4, 8, 12, 16]
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("block", [(8, 8), (1, 1)])
def test_packed_and_dense_reference_take_the_same_decisions(method, block):
    runs = {backend: make(method, block, backend, optimizer=torch.optim.SGD) for backend in ("auto", "reference")}
    for model, _, _ in runs.values():
        model.load_state_dict(snapshot(runs["auto"][0]))
    for i in range(TOTAL):
        reports = [run(*each, steps=1, first=i)[0] for each in runs.values()]
        assert reports[0] == reports[1]
    left, right = (snapshot(model) for model, _, _ in runs.values())
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def save(*parts):
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    return buffer.getvalue()


def load(data, *parts):
    for part, state in zip(parts, torch.load(io.BytesIO(data), weights_only=True), strict=True):
        part.load_state_dict(state)


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_resume_at_any_step_is_bit_exact(method):
    model, adam, training = make(method)
    saved = []
    for i in range(TOTAL):
        saved.append(save(model, adam, training))
        run(model, adam, training, 1, first=i)
    final = snapshot(model)
    for k in (1, 3, 4, 7, 14, 16, 19):  # after 3 and 7 a request is open, 4 and 16 made an update
        twin, other, resumed = make(method, seed=5)
        load(saved[k], twin, other, resumed)
        run(twin, other, resumed, TOTAL - k, first=k)
        for name, value in snapshot(twin).items():
            assert torch.equal(value, final[name]), (k, name)
        for parameter, twin_parameter in zip(model.parameters(), twin.parameters(), strict=True):
            for key, value in adam.state[parameter].items():
                assert torch.equal(other.state[twin_parameter][key], value)


def test_resume_between_the_optimizers_step_and_ours():
    runs = []
    for interrupted in (False, True):
        model, adam, training = make()
        run(model, adam, training, 3)
        train_step(model, adam, 3)
        if interrupted:
            data = save(model, adam, training)
            model, adam, training = make(seed=5)
            load(data, model, adam, training)
        report = training.step()
        assert report.step == 4
        runs.append(snapshot(model))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_a_skipped_optimizer_step_delays_the_update_by_one():
    model, adam, training = make()
    run(model, adam, training, 3)
    assert training.step() is None  # step 4 without an optimizer step, as a gradient scaler does
    (report,) = run(model, adam, training, 1, first=4)
    assert report.step == 5
    assert steps_of(run(model, adam, training, 15, first=5)) == [8, 12, 16]


def test_without_any_gradient_it_says_so_instead_of_never_updating():
    _, _, training = make()
    assert [training.step() for _ in range(7)] == [None] * 7
    with pytest.raises(RuntimeError, match=r"no gradient reached a sparse layer from step 4 to 8"):
        training.step()


def test_gradient_scaler_and_clipping_work():
    model, sgd, training = make(optimizer=torch.optim.SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    reports = []
    for i in range(10):
        images, labels = batch(i)
        sgd.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
        scaler.unscale_(sgd)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(sgd)
        scaler.update()
        reports.append(training.step())
    assert steps_of(reports) == [4, 8]


def test_updates_while_a_graph_is_kept_and_under_set_to_none_false():
    model, adam, training = make()
    kept = []
    for i in range(9):
        images, labels = batch(i)
        adam.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        adam.step()
        training.step()
        kept.append(loss)
    assert training.steps == 9


def test_a_copied_model_is_independent():
    model, adam, training = make()
    run(model, adam, training, 3)
    twin = copy.deepcopy(model)
    before = snapshot(twin)
    assert run(model, adam, training, 1, first=3)[0] is not None
    torch.testing.assert_close(snapshot(twin), before, rtol=0, atol=0)
    assert not any(layer.scores_requested for layer in sparse_layers(twin).values())


def test_close_lets_go_of_model_and_optimizer():
    model, adam, training = make()
    run(model, adam, training, 3)
    training.close()
    assert not any(layer.scores_requested for layer in sparse_layers(model).values())
    assert not adam._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"method": "snip"}, ValueError, "method"),
        ({"total_steps": 0}, ValueError, "total_steps"),
        ({"total_steps": 2.5}, TypeError, "total_steps"),
        ({"interval": 0}, ValueError, "interval"),
        ({"drop_fraction": 1.5}, ValueError, "drop_fraction"),
        ({"drop_fraction_steps": 0}, ValueError, "drop_fraction_steps must be"),
        ({"drop_fraction_steps": 0.3}, TypeError, "drop_fraction_steps must be"),
        ({"schedule": "sine"}, ValueError, "schedule"),
    ],
)
def test_errors_name_the_argument(options, error, named):
    with pytest.raises(error, match=named):
        make(**options)


def test_a_dense_model_is_refused_unless_static():
    model = nn.Linear(4, 4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"ddst\.sparsify"):
        SparseTraining(model, sgd, total_steps=10)
    assert SparseTraining(model, sgd, method="static", total_steps=10).density == 1.0


@pytest.mark.parametrize("stopped_after", [3, 7])
def test_a_second_one_for_the_same_model_takes_over(stopped_after):
    model, adam, first = make()
    run(model, adam, first, stopped_after)  # a notebook cell, interrupted
    second = SparseTraining(model, adam, total_steps=TOTAL, interval=4)
    assert steps_of(run(model, adam, second, TOTAL)) == [4, 8, 12, 16]
    with pytest.raises(RuntimeError, match="taken over"):
        run(model, adam, first, 1)


def test_a_closed_one_says_so():
    model, _, training = make()
    training.close()
    with pytest.raises(RuntimeError, match=r"closed: by close\(\)"):
        training.step()
    assert not any(layer.scores_requested for layer in sparse_layers(model).values())


def test_what_lies_outside_the_weight_does_not_keep_an_edge_block():
    net = nn.Sequential(SparseLinear(20, 52, density=1.0))
    net[0].set_block_mask(torch.tensor([[False, True], [True, True], [True, True], [True, True]]))
    nn.init.constant_(net[0].values, 1.0)
    assert net[0].block_norms()[3, 1] == 4.0
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    training = SparseTraining(net, sgd, method="set", ranking="raw", scope="layer", total_steps=9, interval=2)
    training.updater.exchange(0.15, 2)
    assert not net[0].block_mask[3, 1]
