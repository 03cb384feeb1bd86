"""Losses of both players from their scores, and penalties on the gradient of D in its images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ddst._arguments import check_int, check_one_of, check_tensor

LOSSES = ("hinge", "wgan", "bce", "relativistic")


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """D's loss from its scores of data and of generated images, a scalar.

    ==============  ==============================================  ==============================
    kind            loss of D                                       loss of G
    ==============  ==============================================  ==============================
    "hinge"         ``E max(0, 1 − D(x)) + E max(0, 1 + D(G(z)))``  ``−E D(G(z))``
    "wgan"          ``E D(G(z)) − E D(x)``                          ``−E D(G(z))``
    "bce"           ``E softplus(−D(x)) + E softplus(D(G(z)))``     ``E softplus(−D(G(z)))``
    "relativistic"  ``E softplus(D(G(z)) − D(x))``                  ``E softplus(D(x) − D(G(z)))``
    ==============  ==============================================  ==============================

    "bce" is the binary cross-entropy of ``sigmoid(D)`` and the non-saturating loss of G, which StyleGAN writes as
    softplus. "wgan" needs :func:`gradient_penalty`, "relativistic" (R3GAN's) both of :func:`zero_centred_penalty`.

    Args:
        kind: of the table. real, fake: scores ``[N]``, for "relativistic" of as many images each.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Source: Miyato et al. 2018 (hinge); Arjovsky et al. 2017; Goodfellow et al. 2014; Huang et al., *R3GAN*, 2024.

    >>> discriminator_loss("hinge", torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])).item()
    1.0
    """
    check_one_of("kind", kind, LOSSES)
    check_tensor("real", real), check_tensor("fake", fake)
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "wgan":
        return fake.mean() - real.mean()
    if kind == "bce":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.softplus(fake - _paired(real, fake)).mean()


def generator_loss(kind: str, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """G's loss from D's scores of its images, see :func:`discriminator_loss`; "relativistic" needs those of data, too.

    >>> generator_loss("wgan", torch.tensor([1.0, 3.0])).item()
    -2.0
    """
    check_one_of("kind", kind, LOSSES)
    check_tensor("fake", fake)
    if kind == "bce":
        return F.softplus(-fake).mean()
    if kind == "relativistic":
        if real is None:
            raise ValueError('real must be the scores of data with kind="relativistic", got None')
        return F.softplus(_paired(real, fake) - fake).mean()
    return -fake.mean()


def _paired(real: Tensor, fake: Tensor) -> Tensor:
    if real.shape != fake.shape:
        raise ValueError(f"real must hold as many scores as fake, {tuple(fake.shape)}, got {tuple(real.shape)}")
    return real


def zero_centred_penalty(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``½ E ‖∇_x D(x)‖²``: R1 at data, R2 at generated images; a scalar with a graph to D's parameters.

    Args:
        score: images → scores, one for each. images: ``[N, ...]``; what made them gets no gradient.

    Cost: a forward and a backward pass of D, and a second one of both in the loss's backward pass.
    Source: Mescheder et al., *Which Training Methods for GANs do actually Converge?* (2018).

    >>> zero_centred_penalty(lambda x: 3 * x.sum(1), torch.zeros(2, 4)).item()
    18.0
    """
    return _squared_slopes(score, check_tensor("images", images)).mean() / 2


def lazy_weight(step: int, every: int) -> int:
    """``k`` at every k-th step, the first one included, and 0 between: how often a rarely computed penalty counts.

    Over k steps it weighs as much as one of weight 1 in each. A step that has it takes k times the penalty's gradient,
    which an optimizer with second moments answers with a shorter step of those weights for a while.

    Args:
        step: of D, from 0. every: ``k``, at least 1, which is the penalty in every step.

    Cost: of :func:`zero_centred_penalty`, a k-th.
    Source: Karras et al., *Analyzing and Improving the Image Quality of StyleGAN* (2020), section 3.1, lazy
        regularisation, with k = 16 for R1. Theirs is a step of its own and changes Adam's settings for it; here the
        penalty joins the loss of the step.

    >>> [lazy_weight(step, 4) for step in range(6)]
    [4, 0, 0, 0, 4, 0]
    """
    check_int("step", step, 0)
    return 0 if step % check_int("every", every, 1) else every


def gradient_penalty(score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """``E (‖∇_x D(x̂)‖ − 1)²``, x̂ at a random place between a real and a generated image: WGAN-GP's, a scalar.

    Args:
        score: images → scores. real, fake: ``[N, ...]`` each; the places are drawn by torch's generator.

    Source: Gulrajani et al., *Improved Training of Wasserstein GANs* (2017).

    >>> gradient_penalty(lambda x: 3 * x[:, 0], torch.zeros(2, 4), torch.ones(2, 4)).item()
    4.0
    """
    if check_tensor("real", real).shape != check_tensor("fake", fake).shape:
        raise ValueError(f"real must have fake's shape {tuple(fake.shape)}, got {tuple(real.shape)}")
    place = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device, dtype=real.dtype)
    slopes = _squared_slopes(score, torch.lerp(real, fake, place))
    # The root's derivative is infinite at 0.
    return (slopes.clamp(min=1e-12).sqrt() - 1).square().mean()


def _squared_slopes(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    images = images.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(score(images).sum(), images, create_graph=True)
    return slope.flatten(1).square().sum(1)
