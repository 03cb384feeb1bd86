"""Images from the averaged generator, and grids of them as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ddst.train.checkpoint import replacing


@torch.no_grad()
def generate(
    generator: nn.Module,
    noise: Tensor,
    batch: int = 128,
    labels: Tensor | None = None,
    before_batch: Callable[[], object] = lambda: None,
) -> Tensor:
    """Images `[N, C, H, W]` in [-1, 1] of a generator in eval mode, `batch` at a time; its mode is put back.

    The noise is taken to where the generator is; the images come back on the CPU. A conditional generator (one with
    `classes`) makes images of `labels`, or of all classes in turn; to others they mean nothing. One that draws random
    numbers gets the same each time, and torch's generator is left as it was, also by what `before_batch`, which is
    called before each batch, raises.
    """
    training, device = generator.training, next(generator.parameters()).device
    inputs = [noise]
    if (classes := getattr(generator, "classes", None)) is not None:
        inputs.append(torch.arange(len(noise)) % classes if labels is None else labels)
    generator.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            images = []
            for piece in zip(*(tensor.split(batch) for tensor in inputs), strict=True):
                before_batch()
                images.append(generator(*(part.to(device) for part in piece)).cpu())
            return torch.cat(images)
    finally:
        generator.train(training)


def to_pixels(images: Tensor, columns: int, gap: int = 1, smallest: int = 48) -> Tensor:
    """One uint8 picture `[H, W, 3]` of images `[N, C, h, w]` in [-1, 1], row by row, enlarged to at least `smallest`.

    Enlarging repeats pixels, so what is seen is what was made. Values outside [-1, 1] are clipped.

    Example:
        >>> to_pixels(torch.zeros(6, 1, 8, 8), columns=3, gap=2, smallest=8).shape
        torch.Size([22, 32, 3])
    """
    n, channels, height, width = images.shape
    scale = math.ceil(smallest / height)
    tiles = (images.float().clamp(-1, 1).add(1).mul(127.5)).round().to(torch.uint8)
    tiles = tiles.repeat_interleave(scale, 2).repeat_interleave(scale, 3).expand(n, max(channels, 3), -1, -1)[:, :3]
    rows = math.ceil(n / columns)
    height, width = height * scale + gap, width * scale + gap
    picture = torch.full((gap + rows * height, gap + columns * width, 3), 96, dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        top, left = gap + (i // columns) * height, gap + (i % columns) * width
        picture[top : top + height - gap, left : left + width - gap] = tile.permute(1, 2, 0)
    return picture


def save_grid(path: Path, images: Tensor, columns: int = 10) -> None:
    """Write the images as one PNG, whole or not at all."""
    picture = io.BytesIO()  # Pillow writing to a full disk says "encoder error".
    Image.fromarray(to_pixels(images, columns).numpy()).save(picture, format="PNG")
    with replacing(path) as file:
        file.write(picture.getbuffer())
