"""Small sparse models and GANs, their masked-dense gradients, and loops over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ddst import SparseConv2d, SparseLinear
from ddst.gan import DDST, StepReport
from ddst.nn import SparseLayer, set_backend, sparse_layers


def classifier(block: Any = (8, 8), density: float = 0.4, backend: str = "auto", seed: int = 0) -> nn.Sequential:
    """Two convolutions and two linear layers; channel counts that are no multiple of the block, all layers sparse."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"density": density, "block": block}
    model = nn.Sequential(
        SparseConv2d(8, 24, 3, padding=1, **options),
        nn.ReLU(),
        SparseConv2d(24, 20, 3, stride=2, padding=1, **options),
        nn.ReLU(),
        nn.Flatten(),
        SparseLinear(20 * 4, 32, **options),
        nn.ReLU(),
        SparseLinear(32, 10, **options),
    )
    set_backend(model, backend)
    return model


def batch(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Images ``[size, 8, 4, 4]`` and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 8, 4, 4, generator=generator), torch.randint(10, (size,), generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step on the batch of a seed."""
    images, labels = batch(seed)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def dense_gradient_norms(layer: SparseLayer, gradient: Tensor) -> Tensor:
    """``[R, C, kH, kW]`` block norms of a dense weight's gradient, block by block, in plain Python."""
    out = torch.zeros(layer.block_mask.shape, dtype=gradient.dtype)
    height, width = layer.block
    for index in torch.cartesian_prod(*[torch.arange(n) for n in layer.block_mask.shape]).tolist():
        row, col, *tap = index
        part = gradient[(slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width), *tap)]
        out[tuple(index)] = part.norm()
    return out


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in the state dict."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def counts(model: nn.Module) -> dict[str, int]:
    """Active blocks of every sparse layer."""
    return {name: layer.nnz for name, layer in sparse_layers(model).items()}


class ToyGan:
    """A GAN on vectors of length 16 whose loop is written out: ``d_steps`` steps of D, one of G.

    Args:
        detach: whether D's loss stops at the images. freeze: whether D's parameters are frozen in G's backward pass.
        order: "dg" steps D first, "gd" G first, "both" runs all backward passes before the steps.
    """

    def __init__(
        self,
        block: Any = (8, 8),
        density: float = 0.4,
        backend: str = "auto",
        d_steps: int = 1,
        detach: bool = True,
        freeze: bool = False,
        order: str = "dg",
        density_d: float | None = None,
        batch_norm: bool = True,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        g: dict[str, Any] = {"density": density, "block": block}
        d: dict[str, Any] = {"density": density_d or density, "block": block}
        norm = nn.BatchNorm1d(32) if batch_norm else nn.Identity()
        self.g = nn.Sequential(
            SparseLinear(16, 32, **g), norm, nn.ReLU(), SparseLinear(32, 32, **g), nn.ReLU(), SparseLinear(32, 16, **g)
        )
        self.d = nn.Sequential(
            SparseLinear(16, 32, **d), nn.ReLU(), SparseLinear(32, 32, **d), nn.ReLU(), SparseLinear(32, 32, **d),
            nn.ReLU(), nn.Dropout(0.1), SparseLinear(32, 1, **d),
        )  # fmt: skip
        for net in (self.g, self.d):
            set_backend(net, backend)
        self.opt_g = torch.optim.Adam(self.g.parameters(), lr=2e-3, betas=(0.0, 0.9))
        self.opt_d = torch.optim.Adam(self.d.parameters(), lr=2e-3, betas=(0.0, 0.9))
        self.d_steps, self.detach, self.freeze, self.order = d_steps, detach, freeze, order

    def real(self) -> Tensor:
        return torch.randn(16, 16).cumsum(1) / 4

    def d_backward(self) -> Tensor:
        real, fake = self.real(), self.g(torch.randn(16, 16))
        self.opt_d.zero_grad()
        loss = (
            torch.relu(1 - self.d(real)).mean() + torch.relu(1 + self.d(fake.detach() if self.detach else fake)).mean()
        )
        loss.backward()
        return real

    def g_backward(self) -> tuple[Tensor, Tensor]:
        noise = torch.randn(16, 16)
        self.opt_g.zero_grad()
        self.d.requires_grad_(not self.freeze)
        scores = self.d(self.g(noise))
        (-scores.mean()).backward()
        self.d.requires_grad_(True)
        return noise, scores

    def iteration(self) -> dict[str, Tensor]:
        """One iteration; what :meth:`ddst.DDST.step` wants."""
        if self.order == "both":
            real = self.d_backward()
            noise, scores = self.g_backward()
            self.opt_d.step()
            self.opt_g.step()
            return {"real": real, "noise": noise, "fake_scores": scores}
        if self.order == "gd":
            noise, scores = self.g_backward()
            self.opt_g.step()
        for _ in range(self.d_steps):
            real = self.d_backward()
            self.opt_d.step()
        if self.order == "dg":
            noise, scores = self.g_backward()
            self.opt_g.step()
        return {"real": real, "noise": noise, "fake_scores": scores}


TOTAL = 24
SHORT: dict[str, Any] = {
    "total_steps": TOTAL, "interval_g": 3, "interval_d": 4, "br_every": 2, "br_window": 4, "warmup": 0,
    "exempt_g": (),  # all of G moves: of three layers "ends" would leave one
}  # fmt: skip


def make(gan: ToyGan | None = None, **options: Any) -> tuple[ToyGan, DDST]:
    """A toy GAN and its scheduler, with intervals for a run of 24 iterations."""
    gan = gan or ToyGan()
    return gan, DDST(gan.g, gan.d, gan.opt_g, gan.opt_d, **{**SHORT, **options})


def run(gan: ToyGan, scheduler: DDST, steps: int) -> list[StepReport]:
    """Iterations and what the scheduler did at each."""
    return [scheduler.step(**gan.iteration()) for _ in range(steps)]
