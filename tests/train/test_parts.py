"""Models, losses, augmentation and precisions of `ddst train`: each runs, writes what fits, and resumes bit for bit."""

import math

import pytest
import torch

from ddst.data import load_images
from ddst.nn import sparse_layers
from ddst.train import Trainer, resolve, run
from ddst.train.checkpoint import CheckpointError
from ddst.train.folder import CHECKPOINT
from ddst.train.game import Game
from ddst.train.loop import TrainingError, train
from ddst.train.options import ConfigError
from ddst.train.players import learning_rates
from ddst.train.samples import generate
from ddst.train.without_effect import refuse_without_effect
from helpers.runs import TINY, checkpoint_of, differences, log_without_seconds, tiny

SMALL = {"steps": 6, "interval_g": 2, "interval_d": 2, "br_window": 2, "sample_every": 4, "checkpoint_every": 2}
GROW = {"bounds": (-2e9, -1e9)}
MODELS = {
    "resnet": {},
    "biggan": {"latent": 8},
    "dcgan": {"width_g": 32, "width_d": 32, "resolution": 16},
    "r3gan": {},
    "stylegan2": {},
}
CASES = {
    **{name: {"model": name, **settings} for name, settings in MODELS.items()},
    "strong": {"method": "sdst-strong-rigl"},
    "dda": {"method": "dda", **GROW},
    "ramp": {"method": "ddst-ramp"},
    "ada": {"method": "ddst-ada", "bounds": (-2.0, -1.5)},
    "prune": {"method": "prune", "prune_at": 4},
    "per network": {
        "method": "sdst-set", "algorithm_d": "rigl", "block_d": (4, 4), "distribution_d": "uniform", "density_d": 0.5,
    },
    "published": {"published": True, **GROW},
    "masked-dense": {"block": (1, 1), "backend": "reference", "published": True, **GROW},
    "bce": {"loss": "bce", "lr_decay": "cosine", "lr_decay_start": 2},
    "wgan": {"loss": "wgan", "accumulate": 2},
    "relativistic": {"loss": "relativistic", "r1": 0.5, "r2": 0.5},
    "lazy": {"loss": "bce", "r1": 0.5, "r2": 0.5, "lazy": 3},
    "augmented": {"augment": "color,translation,cutout", "consistency": 1.0},
    "bfloat16": {"precision": "bfloat16", "lr_decay": "linear"},
    "float16": {"precision": "float16", "ema_ramp": 0.05},
}  # fmt: skip


@pytest.fixture
def _without_report(monkeypatch):
    monkeypatch.setattr("ddst.train.job._finish", lambda trainer: None)


@pytest.mark.usefixtures("_without_report")
@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_the_same_run(tmp_path, case):
    settings, whole, parts = tiny(**SMALL, **CASES[case]), tmp_path / "whole", tmp_path / "parts"
    assert run({**settings, "out": str(whole)}) == 0
    losses = [e["loss_d"] for e in log_without_seconds(whole) if "event" not in e]
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    for i, stop in enumerate((1, 3)):
        assert run({**({"resume": True} if i else settings), "out": str(parts), "stop_after": stop}) == 0
        torch.manual_seed(i)
    assert run({"out": str(parts), "resume": True}) == 0
    assert differences(checkpoint_of(whole), checkpoint_of(parts)) == []
    assert log_without_seconds(whole) == log_without_seconds(parts)
    for picture in sorted((whole / "samples").iterdir()):
        assert picture.read_bytes() == (parts / "samples" / picture.name).read_bytes()


def trainer_for(tmp_path, images=None, **settings):
    config = resolve({**TINY, **SMALL, "out": str(tmp_path / "run"), **settings})
    return Trainer(config, images or load_images("digits", config.resolution))


@pytest.mark.parametrize(
    ("model", "resolution", "settings"),
    [
        ("sngan", 48, {}),
        ("resnet", 64, {}),
        ("dcgan", 48, {"width_g": 32, "width_d": 32}),
        ("dcgan", 32, {"width_g": 32, "width_d": 32}),
        ("biggan", 64, {"width_g": 64, "width_d": 128, "latent": 20}),
        ("biggan", 128, {"width_g": 128, "width_d": 128, "latent": 24, "batch": 1}),
        ("r3gan", 32, {}),
        ("stylegan2", 32, {}),
    ],
)
def test_every_model_takes_a_step_at_its_sizes(tmp_path, model, resolution, settings):
    trainer = trainer_for(tmp_path, model=model, resolution=resolution, **{"d_steps": 1, "batch": 2, **settings})
    for net in (trainer.players.generator, trainer.players.discriminator):
        assert sparse_layers(net)
    before = [layer.values.detach().clone() for layer in sparse_layers(trainer.players.generator).values()]
    for _ in range(2):  # behind weights that begin at 0 gradients come in the second step
        loss_d, loss_g, _ = trainer.train_step()
        assert math.isfinite(loss_d) and math.isfinite(loss_g)
    moved = [
        not torch.equal(layer.values, was)
        for layer, was in zip(sparse_layers(trainer.players.generator).values(), before, strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    assert generate(trainer.ema.module, trainer.grid_noise[:3]).shape == (3, 1, resolution, resolution)


def test_classes_reach_both_networks(tmp_path):
    trainer = trainer_for(tmp_path, model="biggan", latent=8)
    assert (trainer.classes, trainer.players.generator.classes) == (10, 10)
    noise, wanted = trainer.noise_of(torch.Generator().manual_seed(0))
    assert noise.shape == (4, 8) and wanted.shape == (4,) and wanted.dtype == torch.int64
    _, labels = trainer.real_of(torch.tensor([5, 1797 + 5, 8]))  # mirrored ones have their image's class
    assert labels.tolist() == trainer.images.labels[[5, 5, 8]].tolist()
    trainer.train_step()
    average, z = trainer.ema.module, torch.zeros(4, 8)
    one, other = generate(average, z, labels=torch.full((4,), 3)), generate(average, z)
    assert torch.equal(one[0], one[1]) and not torch.equal(other[0], other[1])  # of all classes in turn
    torch.testing.assert_close(other[3], one[3])


def test_a_conditional_model_wants_classes(tmp_path):
    images = load_images("digits", 8)
    unlabelled = type(images)("photos", images.stored, images.top)
    with pytest.raises(ConfigError, match="--model biggan needs images with classes: --data photos has none"):
        trainer_for(tmp_path, unlabelled, model="biggan", latent=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "biggan", "resolution": 48}, "--resolution must be 8, 16, 32, 64 or 128 with model biggan, got 48"),
        ({"model": "biggan", "width_g": 30}, "--width-g must be divisible by 4"),
        ({"model": "biggan", "latent": 100}, "--latent must be divisible by 3, G's pieces of z, got 100"),
        ({"model": "r3gan", "width_d": 12}, "--width-d must be divisible by 8"),
        ({"model": "dcgan", "resolution": 20}, "--resolution must be 4 times a power of two, got 20"),
        ({"model": "resnet", "resolution": 64, "width_d": 12}, "--width-d must be divisible by 8"),
        ({"model": "vqgan"}, "--model must be one of sngan, resnet, biggan"),
        ({"augment": "blur"}, "--augment: expected none, or some of color, translation, cutout"),
        ({"augment": "color,color"}, "--augment: expected none"),
        ({"method": "prune", "prune_at": 800}, r"--prune-at must be at least 2 and below --steps \(800\), got 800"),
        ({"algorithm_d": "static"}, "--algorithm-d static does not go with --method ddst-relaxed"),
        (
            {"method": "sdst-set", "random_share": 0.5},
            "--random-share needs growth by gradient, which --method sdst-set",
        ),
        ({"lr_decay_start": 5}, "--lr-decay-start has no effect without --lr-decay"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve({"out": "x", **settings})
    assert "\n" not in str(caught.value)


def test_published_settings_of_biggan():
    c = resolve({"out": "x", "preset": "biggan32"})
    assert (c.model, c.steps, c.resolution, c.batch, c.d_steps, c.latent) == ("biggan", 200_000, 32, 50, 4, 128)
    c = resolve({"out": "x", "preset": "biggan64"})
    assert (c.model, c.steps, c.resolution, c.batch, c.d_steps, c.latent) == ("biggan", 200_000, 64, 50, 4, 100)
    assert c.width_g == c.width_d == 1024
    dda, ada, strong = (resolve({"out": "x", "method": m}) for m in ("dda", "ddst-ada", "static-strong"))
    assert (dda.bounds, ada.bounds, strong.density_d) == ((0.5, 1.0), (0.55, 0.65), 1.0)


def test_rates_fall_to_zero_from_the_step_they_are_told():
    def rates(**settings):
        config = resolve({"out": "x", "steps": 100, "lr": 1.0, "lr_d": 2.0, **settings})
        return [learning_rates(config, step) for step in (0, 20, 60, 99)]

    assert rates() == [(1.0, 2.0)] * 4
    linear = rates(lr_decay="linear", lr_decay_start=20)
    assert linear == [(1.0, 2.0), (1.0, 2.0), (0.5, 1.0), pytest.approx((0.0125, 0.025))]
    assert rates(lr_decay="cosine")[1][0] == pytest.approx((1 + math.cos(0.2 * math.pi)) / 2)


def test_rates_follow_each_networks_density():
    """0.2 / √0.25 and 0.2 / √0.64 by default in the demo; the paper has one rate for all."""
    given = {"out": "x", "lr": 0.2}
    config = resolve(given)
    assert learning_rates(config, 0, (0.25, 0.64)) == pytest.approx((0.4, 0.25))
    assert learning_rates(config, 0, (1.0, 0.0)) == (0.2, 0.2)  # dense; without a block there is nothing to step
    assert learning_rates(resolve({**given, "lr_density_power": 1.0}), 0, (0.25, 0.5)) == pytest.approx((0.8, 0.4))
    for paper in ({"published": True}, {"preset": "sngan32"}):
        assert learning_rates(resolve({**given, **paper}), 0, (0.25, 0.64)) == (0.2, 0.2)
    with pytest.raises(ConfigError, match="--lr-density-power has no effect with --method dense"):
        refuse_without_effect({"lr_density_power": 0.5}, resolve({"out": "x", "method": "dense"}))


def test_rates_of_a_step_are_those_of_its_densities():
    config = resolve({**tiny(**SMALL, **GROW), "out": "unused"})
    trainer = Trainer(config, load_images("digits", config.resolution))
    met = set()
    while trainer.step < config.steps:
        densities = trainer.scheduler.density_g, trainer.scheduler.density_d
        trainer.train_step()
        optimizers = trainer.players.optimizer_g, trainer.players.optimizer_d
        assert [o.param_groups[0]["lr"] for o in optimizers] == [config.lr * d**-0.5 for d in densities]
        met.add(densities[1])
    assert len(met) > 1


def test_accumulated_batches_are_one_large_batch():
    """Where nothing mixes images: the gradient of a step is the mean over its batches."""
    from ddst.train.players import Players, gan_iteration

    def gradient(accumulate):
        torch.manual_seed(0)
        g, d = torch.nn.Linear(3, 6), torch.nn.Linear(6, 1)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (g, d)]
        players = Players(g, d, *optimizers, Game(accumulate=accumulate))
        real, noise = torch.randn(8, 6), torch.randn(16, 3)
        pieces = iter(noise.split(8 // accumulate))
        gan_iteration(players, real.split(8 // accumulate), lambda: next(pieces))
        return [p.detach().clone() for net in (g, d) for p in net.parameters()]

    for one, two in zip(gradient(1), gradient(4), strict=True):
        torch.testing.assert_close(one, two)


def test_an_unfinite_loss_ends_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    real_step = Trainer.train_step

    def breaks(self):
        if self.step == 3:
            with torch.no_grad():
                self.players.discriminator.linear.bias.fill_(math.nan)
        return real_step(self)

    monkeypatch.setattr(Trainer, "train_step", breaks)
    with pytest.raises(
        TrainingError, match=r"loss is not finite at step 4 .*last good checkpoint is that of step 2, .*"
    ):
        train(trainer)
    assert checkpoint_of(tmp_path / "run")["step"] == 2


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(tmp_path, monkeypatch):
    """The loss was finite, the step after it was not: the next loss would tell, after the checkpoint."""
    trainer = trainer_for(tmp_path)
    real_step = Trainer.train_step

    def breaks(self):
        result = real_step(self)
        if self.step == 4:
            with torch.no_grad():
                self.players.generator.bn.weight.fill_(math.inf)
        return result

    monkeypatch.setattr(Trainer, "train_step", breaks)
    with pytest.raises(TrainingError, match=r"^generator\.bn\.weight is not finite after step 4; .* of step 2, "):
        train(trainer)
    monkeypatch.setattr(Trainer, "train_step", real_step)
    assert checkpoint_of(tmp_path / "run")["step"] == 2
    assert run({"out": str(tmp_path / "run"), "resume": True, "stop_after": 3}) == 0


def test_a_step_that_the_scaler_skips_moves_no_blocks(tmp_path):
    trainer = trainer_for(tmp_path, precision="float16", method="sdst-rigl")
    trainer.train_step()
    for scaler in (trainer.players.game.scaler_g, trainer.players.game.scaler_d):
        scaler.load_state_dict({**scaler.state_dict(), "scale": 1e38})  # every gradient overflows
    masks = [layer.block_mask.clone() for layer in sparse_layers(trainer.players.generator).values()]
    values = [layer.values.detach().clone() for layer in sparse_layers(trainer.players.generator).values()]
    report = trainer.train_step()[2]  # an update is due at step 2
    assert report.generator_update is None
    for layer, mask, was in zip(sparse_layers(trainer.players.generator).values(), masks, values, strict=True):
        assert torch.equal(layer.block_mask, mask) and torch.equal(layer.values, was)
    assert trainer.players.game.scaler_g.get_scale() < 1e38
    for scaler in (trainer.players.game.scaler_g, trainer.players.game.scaler_d):
        scaler.load_state_dict({**scaler.state_dict(), "scale": 8.0})
    assert trainer.train_step()[2].generator_update is not None  # made up for


def test_what_g_gained_is_measured_on_equally_augmented_images(tmp_path, monkeypatch):
    """G all but stands still: what moves the scores beyond the power iteration is another augmentation."""

    def largest_gain():
        trainer = trainer_for(tmp_path, augment="color,translation,cutout", lr=1e-12)
        samples = [trainer.train_step()[2].sample for _ in range(4)]
        return max(abs(sample.alpha) / max(abs(sample.beta), 1e-3) for sample in samples)

    assert largest_gain() < 0.01
    monkeypatch.setattr(Game, "scores_again", Game.scores)
    assert largest_gain() > 0.05


@pytest.mark.parametrize("augment", ["none", "color,translation"])
def test_noise_that_g_draws_is_no_gain(tmp_path, augment):
    """StyleGAN2 draws numbers for every map: a G that stands still has gained nothing."""
    trainer = trainer_for(tmp_path, model="stylegan2", lr=1e-30, augment=augment)
    for styled in (trainer.players.generator.first, *trainer.players.generator.up, *trainer.players.generator.same):
        torch.nn.init.constant_(styled.strength, 0.5)
    for _ in range(3):
        state = torch.get_rng_state()
        sample = trainer.train_step()[2].sample
        assert sample.alpha == 0 and sample.beta != 0
        assert not torch.equal(state, torch.get_rng_state())


def test_measuring_leaves_the_random_numbers_of_a_run_where_they_were(tmp_path):
    def weights(**settings):
        trainer = trainer_for(tmp_path, model="stylegan2", method="static", br_window=50, **settings)
        for _ in range(3):
            trainer.train_step()
        return trainer.players.generator.state_dict()

    assert not differences(weights(br_every=1), weights(br_every=50))


def test_a_checkpoint_with_a_damaged_scaler_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, precision="float16")
    trainer.train_step()
    state = {**trainer.state_dict(), "log": {"bytes": 1, "sha256": ""}}
    state["scalers"] = [{**s, "scale": math.nan} for s in state["scalers"]]
    with pytest.raises(CheckpointError, match=rf"{CHECKPOINT} .* scalers\[0\]\.scale must be a finite number"):
        trainer_for(tmp_path, precision="float16").load_state_dict(state)


def test_other_classes_of_the_same_pixels_are_another_data_set(tmp_path):
    trainer = trainer_for(tmp_path, model="biggan", latent=8)
    state, images = trainer.state_dict(), trainer.images
    state["log"] = {"bytes": 1, "sha256": ""}
    relabelled = type(images)(images.name, images.stored, images.top, images.labels.flip(0))
    with pytest.raises(CheckpointError, match="have changed, or are others"):
        trainer_for(tmp_path, relabelled, model="biggan", latent=8).load_state_dict(state)
    trainer_for(tmp_path, images, model="biggan", latent=8).load_state_dict(state)
