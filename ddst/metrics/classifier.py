"""The small classifiers whose features the Fréchet distance compares, one for each embedded data set and resolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

#: Channels, and resolutions of which there is a classifier, of each embedded data set.
TRAINED: Mapping[str, tuple[int, tuple[int, ...]]] = {"digits": (1, (8, 16, 32)), "shapes": (3, (32,))}
FEATURES = 64


def weights_path(resolution: int, data: str = "digits") -> Path:
    """Where the shipped weights of a data set's classifier for `resolution` lie."""
    return Path(__file__).with_name(f"{data}{resolution}.safetensors")


def nearest_resolution(resolution: int, data: str = "digits") -> int:
    """The trained resolution nearest in octaves; the larger of two that are equally near.

    Example:
        >>> [nearest_resolution(r) for r in (8, 12, 16, 24, 48, 64)]
        [8, 16, 16, 32, 32, 32]
    """
    return min(TRAINED[data][1], key=lambda r: (abs(math.log2(r / resolution)), -r))


class EmbeddedClassifier(nn.Module):
    """logits = W · h(x): convolution, ReLU and 2x max pooling until 2x2 pixels are left, then 64 ReLU units h.

    Args:
        resolution: of `TRAINED[data]`, the side of the images it takes.
        data: "digits" or "shapes", ten classes both.

    The buffer `scale` multiplies h in `features` and sets the unit of the Fréchet distance: leaving one of the ten
    classes out of the real images costs 20 on average, at every resolution.

    `forward` takes images `[N, channels, resolution, resolution]` in [-1, 1], one channel for digits and three for
    shapes, and returns logits `[N, 10]`.
    """

    def __init__(self, resolution: int, data: str = "digits") -> None:
        super().__init__()
        if data not in TRAINED:
            raise ValueError(f"data must be one of {', '.join(TRAINED)}, got {data!r}")
        channels, resolutions = TRAINED[data]
        if resolution not in resolutions:
            raise ValueError(f"resolution must be one of {resolutions}, got {resolution}")
        self.resolution, self.channels = resolution, channels
        widths = [channels, 16, 32, 32, 32][: int(math.log2(resolution))]
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
        expected = (self.channels, self.resolution, self.resolution)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be [N, {', '.join(map(str, expected))}], got {list(images.shape)}")
        h = images
        for conv in self.convs:
            h = F.max_pool2d(F.relu(conv(h)), 2)
        return F.relu(self.hidden(h.flatten(1)))


def load_classifier(resolution: int, data: str = "digits") -> EmbeddedClassifier:
    """A shipped classifier, in eval mode, without gradients; arguments as of `EmbeddedClassifier`.

    Example:
        >>> load_classifier(8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    with torch.device("meta"):  # No initialisation, which would draw from torch's default generator.
        net = EmbeddedClassifier(resolution, data)
    weights = {name: t.to(torch.float32) for name, t in load_file(weights_path(resolution, data)).items()}
    net.load_state_dict(weights, assign=True)
    return net.eval().requires_grad_(False)
