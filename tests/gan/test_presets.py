"""The methods of the tables and their parts: what each does to both networks, and that it resumes bit for bit."""

import copy

import pytest
import torch

from ddst.gan import DDST, PRESETS, DensityController, WindowSummary
from ddst.gan.fixed_rules import DensityRamp
from ddst.nn import sparse_layers
from ddst.sparsity import SparseTraining
from helpers.training import SHORT, TOTAL, ToyGan, counts, make, run, snapshot


def of_preset(name, **options):
    """A toy GAN as the preset starts it, and the scheduler that its arguments make."""
    preset = PRESETS[name]
    gan = ToyGan(density=preset.density_g(0.4), density_d=preset.density_d(0.4))
    more = {"prune_to": 0.4} if preset.method == "prune" else {}
    return make(gan, **{**preset.arguments, **more, **options})


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "dense"])
def test_a_preset_moves_and_steers_what_it_says(name):
    preset = PRESETS[name]
    bounds = {"bounds": (-2e9, -1e9)} if preset.controls_d else {}  # grows, by ADA's sign shrinks
    gan, scheduler = of_preset(name, delta=0.1, **bounds)
    start_d = scheduler.density_d
    reports = run(gan, scheduler, TOTAL)
    moved = [r.generator_update.kind for r in reports if r.generator_update]
    assert moved == ["drop"] * (preset.method == "prune") + ["exchange"] * 7 * preset.moves_g
    changed = [r.discriminator_update for r in reports if r.discriminator_update]
    assert bool(changed) == preset.steers_d
    assert (scheduler.density_d != start_d) == preset.steers_d
    if preset.steers_d:
        assert (scheduler.density_d < start_d) == (name == "ddst-ada")
    assert scheduler.density_g == pytest.approx(0.4, abs=0.05)
    assert start_d == (1 if preset.dense_d else pytest.approx(0.4, abs=0.05))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddst-ramp", {}),
        ("ddst-ada", {"bounds": (-2.0, -1.5), "delta": 0.1}),
        ("prune", {}),
        ("sdst-rigl", {"method_d": "set"}),
        ("sdst-set", {"method_d": "rigl"}),
        ("static", {"method_d": "rigl", "random_share": 0.5}),
        ("ddst-strict", {"bounds": (-2e9, -1e9), "published": True, "delta": 0.1}),
        ("sdst-rigl", {"random_share": 0.4}),
    ],
)
def test_resume_is_the_same_run_bit_for_bit(name, options):
    for stop in (7, 15, 16):
        gan, scheduler = of_preset(name, **options)
        run(gan, scheduler, stop)
        state = copy.deepcopy([x.state_dict() for x in (gan.g, gan.d, gan.opt_g, gan.opt_d, scheduler)])
        random = torch.get_rng_state()
        reports = [r.as_dict() for r in run(gan, scheduler, TOTAL - stop)]
        again, second = of_preset(name, **options)
        for part, saved in zip((again.g, again.d, again.opt_g, again.opt_d, second), state, strict=True):
            part.load_state_dict(saved)
        torch.set_rng_state(random)
        assert [r.as_dict() for r in run(again, second, TOTAL - stop)] == reports
        for net, other in ((gan.g, again.g), (gan.d, again.d)):
            for key, value in snapshot(net).items():
                assert torch.equal(value, snapshot(other)[key]), key


def test_a_ramp_is_a_line_that_ends_where_it_is_told():
    gan, scheduler = make(mode="ramp", density_range=(0.0, 0.8), exempt_d=())
    start = scheduler.density_d
    densities = {r.step: r.density_d for r in run(gan, scheduler, TOTAL) if r.decision}
    for step, density in densities.items():
        line = start + (0.8 - start) * step / TOTAL
        assert density == pytest.approx(line, abs=2 * scheduler.updater_d.resolution), step
    ramp, window = DensityRamp(0.1, 100, 10), WindowSummary(0, 1, 0.0, 0.0, None)
    assert ramp.decide(window, 0.5, 10).new_density == pytest.approx(0.46)
    assert ramp.decide(window, 0.5, 60).new_density == pytest.approx(0.42)  # late, and still on time
    assert ramp.decide(window, 0.4, 10, highest=1.0, lowest=0.35).new_density == pytest.approx(0.395)
    assert ramp.decide(window, 0.1, 50).action == "keep"
    with pytest.raises(ValueError, match="end"):
        DensityRamp(1.5, 100, 10)


def test_the_sign_of_d_steers_the_other_way_round():
    def decide(sign, **settings):
        window = WindowSummary(9, 9, 0.1, 0.5, 0.2, "", sign)
        return DensityController(signal="real_sign", **settings).decide(window, 0.4, 5)

    assert decide(0.9).action == "drop"
    assert decide(0.9).reason == "sign of D(x) 0.9 is above 0.65: D is too strong"
    assert decide(0.1).action == "grow"
    assert decide(0.6).action == "keep"
    assert decide(None).reason == "no sign of D(x): it was not measured"
    assert decide(0.1, mode="strict", density_range=(0.0, 0.4)).action == "exchange"


def test_the_sign_is_measured_on_the_real_batch():
    gan, scheduler = make()
    arguments = gan.iteration()
    run(gan, scheduler, 1)
    sample = scheduler.step(**arguments).sample
    gan.d.train()
    assert -1 <= sample.sign <= 1
    assert sample.sign * 16 == pytest.approx(round(sample.sign * 16))
    assert scheduler.balance.summary().mean_sign == sample.sign


@pytest.mark.parametrize(
    "block, options, still",
    [
        ((2, 2), {}, ("0", "5")),
        ((2, 2), {"method": "set"}, ("0", "5")),
        ((2, 2), {"mode": "relaxed"}, ("0", "5")),
        ((2, 2), {"mode": "ramp"}, ("0", "5")),
        ((2, 2), {"published": True}, ()),
        ((2, 2), {"exempt_g": ()}, ()),
        ((1, 1), {}, ()),
        ((2, 2), {"method": "prune", "prune_to": 0.2}, ()),
    ],
)
def test_larger_blocks_of_gs_ends_keep_their_places(block, options, still):
    gan, _ = make(ToyGan(block=block), mode="sdst")
    options = {"mode": "sdst", **options}
    scheduler = DDST(gan.g, gan.d, gan.opt_g, gan.opt_d, total_steps=TOTAL, interval_g=3, **options)
    assert scheduler.training_g.updater.exempt == still
    masks = {name: layer.block_mask.clone() for name, layer in sparse_layers(gan.g).items()}
    run(gan, scheduler, 8)
    moved = {name for name, layer in sparse_layers(gan.g).items() if not torch.equal(layer.block_mask, masks[name])}
    assert moved == (set() if options.get("method") == "prune" else set(masks) - set(still))


def test_part_of_the_growth_is_random_and_part_by_gradient():
    def grown(share, seed):
        gan, scheduler = make(ToyGan(block=(2, 2)), random_share=share, seed=seed, method="rigl", mode="sdst")
        before = {name: layer.block_mask.clone() for name, layer in sparse_layers(gan.g).items()}
        run(gan, scheduler, 3)
        masks = {name: layer.block_mask for name, layer in sparse_layers(gan.g).items()}
        return {n: set(map(tuple, (masks[n] & ~before[n]).nonzero().tolist())) for n in masks}

    by_gradient, half, other = grown(0.0, 0), grown(0.5, 0), grown(0.5, 1)
    assert half != other  # by seed
    assert grown(0.0, 1) == by_gradient
    shared = sum(len(half[n] & other[n] & by_gradient[n]) for n in half)
    assert shared >= 0.4 * sum(map(len, by_gradient.values()))
    assert grown(1.0, 0) != half


def test_pruning_leaves_the_largest_blocks_of_the_network_and_waits_for_its_step():
    gan, scheduler = of_preset("prune", exempt_g=())
    reports = run(gan, scheduler, TOTAL)
    assert [(r.step, r.generator_update.kind) for r in reports if r.generator_update] == [(16, "drop")]
    assert reports[14].density_g == 1
    assert sum(counts(gan.g).values()) < sum(layer.num_blocks for layer in sparse_layers(gan.g).values())
    for options, message in (
        ({"method": "prune"}, "prune_to must be given"),
        ({"method": "rigl", "prune_to": 0.2}, 'prune_to needs method="prune"'),
        ({"method": "prune", "prune_to": 0.2, "prune_at": 24}, "prune_at must be below total_steps, 24, got 24"),
        ({"method": "prune", "prune_to": 0.0}, "prune_to must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(mode="sdst", **options)


@pytest.mark.parametrize("scope", [None, "layer", "global"])
def test_pruning_is_of_the_network_and_of_all_its_layers_whatever_the_scope(scope):
    gan, scheduler = of_preset("prune", exempt_g=None, scope=scope)
    assert scheduler.training_g.updater.exempt == ()
    run(gan, scheduler, TOTAL)
    left, all_of_it = counts(gan.g), {name: layer.num_blocks for name, layer in sparse_layers(gan.g).items()}
    assert all(1 < left[name] < count for name, count in all_of_it.items())
    with pytest.raises(ValueError, match=r'^scope="layer" does not go with method="prune", which ranks over'):
        SparseTraining(gan.g, gan.opt_g, method="prune", prune_to=0.4, total_steps=9, scope="layer")
    with pytest.raises(ValueError, match=r"^prune_to must be at least 0\.\d+ for this model, got 0\.001: that much is"):
        SparseTraining(gan.g, gan.opt_g, method="prune", prune_to=0.001, total_steps=9)


def test_parts_that_do_not_go_together_are_refused():
    for options, message in (
        ({"method_d": "static"}, 'method_d="static" does not go with mode="relaxed"'),
        ({"mode": "sdst", "signal": "real_sign"}, 'signal="real_sign" needs mode'),
        ({"method": "set", "random_share": 0.5}, 'random_share=0.5 needs growth="gradient"'),
        ({"random_share": 1.5}, "random_share must be from 0 to 1"),
        ({"signal": "noise"}, "signal must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    gan = ToyGan()
    dense = torch.nn.Linear(16, 1)
    optimizer = torch.optim.SGD(dense.parameters())
    with pytest.raises(ValueError, match="discriminator has no sparse layers"):
        DDST(gan.g, dense, gan.opt_g, optimizer, **{**SHORT, "mode": "sdst", "method_d": "rigl"})
