"""The small digit classifier whose features the Fréchet distance compares, one per resolution 8, 16 and 32."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

RESOLUTIONS = (8, 16, 32)
FEATURES = 64


def weights_path(resolution: int) -> Path:
    """Where the shipped weights of the classifier for `resolution` lie."""
    return Path(__file__).with_name(f"digits{resolution}.safetensors")


def nearest_resolution(resolution: int) -> int:
    """The trained resolution nearest in octaves; the larger of two that are equally near.

    Example:
        >>> [nearest_resolution(r) for r in (8, 12, 16, 24, 48, 64)]
        [8, 16, 16, 32, 32, 32]
    """
    return min(RESOLUTIONS, key=lambda r: (abs(math.log2(r / resolution)), -r))


class DigitClassifier(nn.Module):
    """logits = W · h(x): convolution, ReLU and 2x max pooling until 2x2 pixels are left, then 64 ReLU units h.

    Args:
        resolution: 8, 16 or 32, the side of the images it takes.

    The buffer `scale` multiplies h in `features` and sets the unit of the Fréchet distance: leaving one of the ten
    classes out of the real digits costs 20 on average, at every resolution.

    `forward` takes grey images `[N, 1, resolution, resolution]` in [-1, 1] and returns logits `[N, 10]`.
    """

    def __init__(self, resolution: int) -> None:
        super().__init__()
        if resolution not in RESOLUTIONS:
            raise ValueError(f"resolution must be one of {RESOLUTIONS}, got {resolution}")
        self.resolution = resolution
        widths = [1, 16, 32, 32, 32][: int(math.log2(resolution))]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.hidden = nn.Linear(4 * widths[-1], FEATURES)
        self.head = nn.Linear(FEATURES, 10)
        self.register_buffer("scale", torch.ones(()))
        self.scale: Tensor

    def features(self, images: Tensor) -> Tensor:
        """scale · h(x), `[N, 64]`.

        Raises:
            ValueError: the images have another shape.
        """
        return self.scale * self._hidden(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self._hidden(images))

    def _hidden(self, images: Tensor) -> Tensor:
        expected = (1, self.resolution, self.resolution)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be [N, {', '.join(map(str, expected))}], got {list(images.shape)}")
        h = images
        for conv in self.convs:
            h = F.max_pool2d(F.relu(conv(h)), 2)
        return F.relu(self.hidden(h.flatten(1)))


def load_classifier(resolution: int) -> DigitClassifier:
    """The shipped classifier for `resolution` (8, 16 or 32), in eval mode, without gradients.

    Example:
        >>> load_classifier(8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    with torch.device("meta"):  # No initialisation, which would draw from torch's default generator.
        net = DigitClassifier(resolution)
    weights = {name: t.to(torch.float32) for name, t in load_file(weights_path(resolution)).items()}
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)
