"""What is played: losses and penalties, augmentation, precision. How networks are called, with classes or without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.optim import Optimizer

from ddst.gan.augment import diff_augment
from ddst.gan.losses import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    lazy_weight,
    zero_centred_penalty,
)

#: What a network is called with: one tensor, or with classes (noise, labels) and (images, labels).
Inputs = Tensor | tuple[Tensor, ...]


def parts(inputs: Inputs) -> tuple[Tensor, ...]:
    """The arguments as a tuple."""
    return (inputs,) if isinstance(inputs, Tensor) else inputs


@dataclass
class Game:
    """How two networks play; the defaults are those of a plain SNGAN.

    Attributes:
        loss: of :func:`ddst.gan.losses.discriminator_loss`. gradient_penalty, r1, r2, consistency: weights in D's loss.
        augment: kinds of :func:`ddst.gan.augment.diff_augment`. random: draws them, on the CPU.
        dtype: of autocast, None for none. scaler_g, scaler_d: of float16's losses, one for each optimizer.
        joint: whether real and generated images pass D as one batch. accumulate: batches that make one step.
        lazy: R1 and R2 are part of every so many of D's steps (:func:`ddst.gan.losses.lazy_weight`).
        steps_of_d: that D has made. augmented_from: state of `random` before the images of G's last loss, if augmented.
    """

    loss: str = "hinge"
    gradient_penalty: float = 0.0
    r1: float = 0.0
    r2: float = 0.0
    consistency: float = 0.0
    augment: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    joint: bool = True
    accumulate: int = 1
    lazy: int = 1
    steps_of_d: int = 0
    random: torch.Generator = field(default_factory=torch.Generator)
    scaler_g: GradScaler | None = None
    scaler_d: GradScaler | None = None
    augmented_from: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether G and D can be called as they are, with one tensor, to score what they have scored."""
        return not self.augment and self.dtype is None

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The precision in which both networks are run."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)

    def images(self, generator: nn.Module, noise: Inputs) -> Inputs:
        """G's images, with their classes where the noise has some."""
        first, *labels = parts(noise)
        with self.autocast(first.device):
            made = generator(first, *labels).float() if self.dtype is not None else generator(first, *labels)
        return (made, *labels) if labels else made

    def scores(self, discriminator: nn.Module, images: Inputs, random: torch.Generator | None = None) -> Tensor:
        """D's scores of images, augmented."""
        first, *labels = parts(images)
        return self._raw_scores(discriminator, self.augmented(first, random), labels)

    def scores_again(self, discriminator: nn.Module, images: Inputs) -> Tensor:
        """The same, augmented as the images of G's last loss were: what G's step changed is not hidden by chance."""
        again = torch.Generator()
        if self.augmented_from is not None:
            again.set_state(self.augmented_from)
        return self.scores(discriminator, images, again)

    def augmented(self, images: Tensor, random: torch.Generator | None = None) -> Tensor:
        """Images as D sees them."""
        if not self.augment:
            return images
        return diff_augment(images, self.augment, generator=self.random if random is None else random)

    def _raw_scores(self, discriminator: nn.Module, images: Tensor, labels: list[Tensor]) -> Tensor:
        with self.autocast(images.device):
            return discriminator(images, *labels) if self.dtype is None else discriminator(images, *labels).float()

    def loss_of_d(self, discriminator: nn.Module, real: Inputs, fake: Inputs) -> Tensor:
        """D's loss of two batches with its penalties; images of G are given detached."""
        (x, *classes), (made, *wanted) = parts(real), parts(fake)
        x, made = self.augmented(x), self.augmented(made)
        if self.joint:
            both = [torch.cat(pair) for pair in zip((x, *classes), (made, *wanted), strict=True)]
            of_real, of_fake = self._raw_scores(discriminator, both[0], both[1:]).split([len(x), len(made)])
        else:
            of_real = self._raw_scores(discriminator, x, classes)
            of_fake = self._raw_scores(discriminator, made, wanted)
        loss = discriminator_loss(self.loss, of_real, of_fake)
        if self.consistency:
            twin = self._raw_scores(discriminator, _moved(x, self.random), classes)
            loss = loss + self.consistency * F.mse_loss(twin, of_real)

        def score(labels: list[Tensor]) -> Callable[[Tensor], Tensor]:
            # Without autocast: the gradient in the images would vanish in float16.
            return lambda images: discriminator(images, *labels)

        if self.gradient_penalty:
            loss = loss + self.gradient_penalty * gradient_penalty(score(classes), x, made)
        times = lazy_weight(self.steps_of_d, self.lazy)
        if self.r1 and times:
            loss = loss + times * self.r1 * zero_centred_penalty(score(classes), x)
        if self.r2 and times:
            loss = loss + times * self.r2 * zero_centred_penalty(score(wanted), made)
        return loss

    def loss_of_g(
        self, generator: nn.Module, discriminator: nn.Module, noise: Inputs, real: Inputs | None
    ) -> tuple[Tensor, Tensor]:
        """G's loss, and the scores of its images."""
        self.augmented_from = self.random.get_state() if self.augment else None
        scores = self.scores(discriminator, self.images(generator, noise))
        of_real = None
        if self.loss == "relativistic":
            if real is None:
                raise ValueError("real must be given with the relativistic loss, got None")
            with torch.no_grad():
                of_real = self.scores_again(discriminator, real)
        return generator_loss(self.loss, scores, of_real), scores

    def backward(self, loss: Tensor, scaler: GradScaler | None) -> None:
        """Adds one batch's share to the gradients."""
        loss = loss / self.accumulate if self.accumulate > 1 else loss
        (loss if scaler is None else scaler.scale(loss)).backward()

    @staticmethod
    def step(optimizer: Optimizer, scaler: GradScaler | None) -> None:
        """The optimizer's step; with a scaler none where a gradient is not finite."""
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


def _moved(images: Tensor, random: torch.Generator) -> Tensor:
    """Mirrored half of the time and moved by up to an eighth, as consistency regularisation asks for."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=random).to(images.device) < 0.5
    return diff_augment(torch.where(mirrored, images.flip(3), images), ["translation"], generator=random)
