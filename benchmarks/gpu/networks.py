"""The two GANs whose whole iteration is measured: SNGAN at 32×32, and one as large as BigGAN at 128×128."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ddst.convert import sparsify
from ddst.models.sngan import _DownBlock, _UpBlock
from ddst.sparsity.stats import FlopCounter
from ddst.train.players import Players


@dataclass(frozen=True)
class Network:
    """A GAN to measure.

    Attributes:
        what: what it is, for the table. batch, d_steps: of an iteration.
        plan_g: channels of the generator from its 4 × 4 map on. plan_d: channels after each block of the
            discriminator; the blocks whose place is below ``down`` halve the image.
    """

    what: str
    batch: int
    d_steps: int
    resolution: int
    plan_g: tuple[int, ...]
    plan_d: tuple[int, ...]
    down: int
    latent: int = 128


NETWORKS = {
    "sngan32": Network("SNGAN at 32×32", 64, 5, 32, (256,) * 4, (128,) * 4, down=2),
    # Channels of BigGAN with ch = 96 at 128 × 128. What it has besides is left out: class conditioning, attention at
    # 64 × 64, the split noise vector, spectral norm in the generator.
    "biggan128": Network(
        "residual GAN with BigGAN's channels (ch = 96) at 128×128, without conditioning and attention",
        64,
        2,
        128,
        (1536, 1536, 768, 384, 192, 96),
        (96, 192, 384, 768, 1536, 1536),
        down=5,
    ),
}


class WideGenerator(nn.Module):
    """:class:`ddst.models.Generator` with a channel count for every block."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        plan = network.plan_g
        self.resolution, self.latent = network.resolution, network.latent
        self.linear = nn.Linear(network.latent, 16 * plan[0])
        self.blocks = nn.Sequential(*(_UpBlock(a, b) for a, b in itertools.pairwise(plan)))
        self.bn = nn.BatchNorm2d(plan[-1])
        self.to_image = nn.Conv2d(plan[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.linear(z).unflatten(1, (-1, 4, 4))
        h = self.blocks(h.contiguous(memory_format=torch.channels_last))
        return torch.tanh(self.to_image(F.relu(self.bn(h))))


class WideDiscriminator(nn.Module):
    """:class:`ddst.models.Discriminator` with a channel count for every block."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        plan = (3, *network.plan_d)
        blocks = [
            _DownBlock(a, b, down=i < network.down, first=i == 0) for i, (a, b) in enumerate(itertools.pairwise(plan))
        ]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(plan[-1], 1)
        spectral_norm(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.blocks(x)).sum(dim=(2, 3))).squeeze(1)


class Autocast(nn.Module):
    """A network computing in another dtype: each call has its own autocast region, as weights change between calls."""

    def __init__(self, inner: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self._device, self._dtype = inner, device, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self._device, self._dtype):
            return self.inner(x)


def players_of(
    network: Network,
    density: float | None,
    block: tuple[int, int],
    device: str,
    capturable: bool = False,
    distribution: str = "erk",
) -> Players:
    """Networks, channels_last on the device, and an Adam each; dense with density None.

    ``capturable``: Adam keeps its count of steps on the device, as a CUDA graph needs it.
    """
    torch.manual_seed(0)
    optimizers, nets = [], (WideGenerator(network), WideDiscriminator(network))
    for net in nets:
        net.to(device, memory_format=torch.channels_last).train()
        if density is not None:
            sparsify(net, density, block=block, distribution=distribution)
        optimizers.append(torch.optim.Adam(net.parameters(), lr=2e-4, betas=(0.0, 0.9), capturable=capturable))
    return Players(*nets, *optimizers)  # type: ignore[arg-type]


def flops_of(players: Players, network: Network, device: str) -> tuple[float, float]:
    """``(at the present masks, dense)``: operations of an iteration's convolutions and linear layers, per image.

    ``n`` steps of D are a pass of G and three of D on two images each; the step of G is three of G and two of D.
    """
    size = network.resolution
    g = FlopCounter(players.generator, torch.zeros(1, network.latent, device=device))
    d = FlopCounter(players.discriminator, torch.zeros(1, 3, size, size, device=device))
    n = network.d_steps
    sparse, dense = (getattr(g, kind) * (n + 3) + getattr(d, kind) * (6 * n + 2) for kind in ("forward", "dense"))
    return sparse, dense
