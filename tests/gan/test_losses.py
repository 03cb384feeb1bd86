"""Losses and penalties beside their formulas, on sparse networks beside dense ones, and what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ddst
from ddst.gan.losses import LOSSES, discriminator_loss, generator_loss, gradient_penalty, zero_centred_penalty

REAL, FAKE = torch.tensor([1.5, 0.2, -0.7]), torch.tensor([-2.0, 0.4, 1.0])


def soft(x):
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("kind", "of_d", "of_g"),
    [
        ("hinge", (0.0 + 0.8 + 1.7) / 3 + (0.0 + 1.4 + 2.0) / 3, 0.6 / 3),
        ("wgan", -0.6 / 3 - 1.0 / 3, 0.6 / 3),
        (
            "bce",
            (soft(-1.5) + soft(-0.2) + soft(0.7)) / 3 + (soft(-2.0) + soft(0.4) + soft(1.0)) / 3,
            (soft(2.0) + soft(-0.4) + soft(-1.0)) / 3,
        ),
        ("relativistic", (soft(-3.5) + soft(0.2) + soft(1.7)) / 3, (soft(3.5) + soft(-0.2) + soft(-1.7)) / 3),
    ],
)
def test_losses_are_their_formulas(kind, of_d, of_g):
    assert discriminator_loss(kind, REAL, FAKE).item() == pytest.approx(of_d, abs=1e-6)
    assert generator_loss(kind, FAKE, REAL).item() == pytest.approx(of_g, abs=1e-6)


def test_bce_is_torchs_cross_entropy():
    ones, zeros = torch.ones(3), torch.zeros(3)
    expected = F.binary_cross_entropy_with_logits(REAL, ones) + F.binary_cross_entropy_with_logits(FAKE, zeros)
    torch.testing.assert_close(discriminator_loss("bce", REAL, FAKE), expected)
    torch.testing.assert_close(generator_loss("bce", FAKE), F.binary_cross_entropy_with_logits(FAKE, ones))


def twins():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16 * 16, 1))
    sparse = nn.Sequential(*dense)
    report = ddst.sparsify(sparse, 0.5, block=8, distribution="uniform")
    plain = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16 * 16, 1))
    plain.load_state_dict(ddst.dense_state_dict(sparse))
    assert report.model_density < 1
    return sparse, plain


def penalties(score, real, fake):
    torch.manual_seed(1)
    return gradient_penalty(score, real, fake), zero_centred_penalty(score, real), zero_centred_penalty(score, fake)


def test_penalties_of_sparse_networks_and_their_gradients_are_those_of_dense_ones():
    sparse, dense = twins()
    real, fake = torch.randn(4, 8, 4, 4), torch.randn(4, 8, 4, 4)
    ours, theirs = (list(penalties(lambda x, n=net: n(x).flatten(), real, fake)) for net in (sparse, dense))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    sum(ours).backward()
    sum(theirs).backward()
    got = ddst.topology.unpack_slots(sparse[0].values.grad, sparse[0].slot_blocks, sparse[0].weight_shape)
    mask = (sparse[0].dense_weight() != 0).float()
    torch.testing.assert_close(got, dense[0].weight.grad * mask, rtol=1e-3, atol=1e-5)
    assert got.abs().sum() > 0


def test_a_penalty_reaches_the_discriminator_and_not_what_made_the_images():
    weight = torch.tensor([2.0], requires_grad=True)
    images = torch.ones(3, 5, requires_grad=True)
    value = zero_centred_penalty(lambda x: weight * x.sum(1), images)
    assert value.item() == pytest.approx(0.5 * 5 * 4)
    value.backward()
    assert weight.grad.item() == pytest.approx(10)
    assert images.grad is None
    flat = gradient_penalty(lambda x: 0 * x.sum(1) * weight, images, torch.zeros(3, 5))
    flat.backward()
    assert flat.item() == pytest.approx(1, abs=1e-5) and weight.grad.isfinite().all()


def test_wrong_arguments_are_named():
    for call, message in (
        (lambda: discriminator_loss("lsgan", REAL, FAKE), f"kind must be one of {LOSSES[0]}"),
        (lambda: generator_loss("relativistic", FAKE), "real must be the scores of data"),
        (lambda: discriminator_loss("relativistic", REAL[:2], FAKE), "real must hold as many scores"),
        (lambda: gradient_penalty(torch.sum, torch.ones(2, 3), torch.ones(3, 3)), "real must have fake's shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
