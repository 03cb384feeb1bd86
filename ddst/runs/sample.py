"""Images of a run's averaged generator: a grid, files in a folder, walks between noises, one class."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ddst.train.checkpoint import CheckpointError, naming
from ddst.train.folder import make_folder, reached
from ddst.train.generator import About, read_generator
from ddst.train.options import ConfigError
from ddst.train.samples import save_grid, to_pixels
from ddst.train.target import check_target

BATCH = 128
LARGEST_GRID = 10_000


def sample(
    source: Path,
    count: int = 64,
    seed: int = 0,
    *,
    grid: Path | None = None,
    folder: Path | None = None,
    label: int | None = None,
    interpolate: bool = False,
) -> About:
    """Draw `count` images of the averaged generator of a run, the same for the same seed on every device.

    Args:
        source: see :func:`ddst.load_generator`.
        grid: a PNG file, about as many columns as rows; it is replaced.
        folder: gets `00000.png`, `00001.png`, ... at the images' own size; must be new or empty.
        label: class of all; without, a generator that knows classes is given them in turn, walks one to a row.
        interpolate: each row of the grid is a walk from one noise to another (spherical, so every step has the length
            that noise has).

    Returns:
        What the file says of the generator.

    Raises:
        ConfigError: a class that the generator does not have, a folder that holds something, a grid that is too large
            or whose name does not end in .png, a place where nothing can be written.
        CheckpointError: no generator at `source`. OSError: a file cannot be written.
    """
    if grid is not None:
        check_target("--out", grid, ".png")
    if grid is not None and count > LARGEST_GRID:
        raise ConfigError(f"--count must be at most {LARGEST_GRID} for one grid, got {count}; --folder takes more")
    if folder is not None:
        with reached("--folder", folder):
            taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if taken:
            raise ConfigError(f"--folder {folder} must be new or empty")
    generator, about = read_generator(source)
    columns = math.ceil(math.sqrt(count))
    labels = labels_of(generator, count, label, each=columns if interpolate else 1)
    if interpolate:
        noise = walks(latent_of(generator), count, columns, seed)
    else:
        noise = noise_of(generator, count, seed)
    if folder is not None:
        make_folder(folder, "--folder")
    shown = []
    for start, images in zip(range(0, count, BATCH), draw(generator, noise, labels, seed), strict=True):
        if folder is not None:
            _save_each(folder, start, images)
        if grid is not None:
            shown.append(images)
    if grid is not None:
        save_grid(grid, torch.cat(shown), columns)
    return about


def _save_each(folder: Path, first: int, images: Tensor) -> None:
    for i, image in enumerate(images, first):
        path = folder / f"{i:05d}.png"
        with naming(path):
            Image.fromarray(to_pixels(image[None], columns=1, gap=0, smallest=1).numpy()).save(path)


def latent_of(generator: nn.Module) -> int:
    """Length of the noise that a generator takes."""
    latent = getattr(generator, "latent", None)
    if not isinstance(latent, int):
        raise CheckpointError(f"a {type(generator).__name__} does not say how long its noise is")
    return latent


def noise_of(generator: nn.Module, count: int, seed: int) -> Tensor:
    """`[count, latent]`, standard normal, drawn on the CPU."""
    return torch.randn(count, latent_of(generator), generator=torch.Generator().manual_seed(seed))


def labels_of(generator: nn.Module, count: int, label: int | None = None, each: int = 1) -> Tensor | None:
    """`[count]` classes: `label`, or all classes in turn, each for `each` images; None for a generator without.

    Raises:
        ConfigError: a label for a generator without classes, or one that it does not have.
    """
    classes = getattr(generator, "classes", None)
    if not classes:
        if label is not None:
            raise ConfigError(f"--class {label}: this generator knows no classes")
        return None
    if label is not None and not 0 <= label < classes:
        raise ConfigError(f"--class must be from 0 to {classes - 1}, got {label}")
    return torch.arange(count) // each % classes if label is None else torch.full((count,), label)


def walks(latent: int, count: int, columns: int, seed: int) -> Tensor:
    """`[count, latent]`: in rows of `columns` noises, each row from one noise to another along the sphere.

    Example:
        >>> rows = walks(512, count=6, columns=3, seed=0).view(2, 3, 512)
        >>> lengths = rows.norm(dim=2) / 512**0.5  # of noise itself about 1
        >>> bool((lengths - 1).abs().max() < 0.1)
        True
    """
    rows = math.ceil(count / columns)
    ends = torch.randn(2, rows, 1, latent, generator=torch.Generator().manual_seed(seed))
    a, b = ends / ends.norm(dim=-1, keepdim=True)
    angle = (a * b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    t = torch.linspace(0, 1, columns)[None, :, None]
    # Of one noise after another in one dimension the angle may be 0 or half a turn: there the line will do.
    sine = angle.sin()
    straight = sine < 1e-4
    safe = torch.where(straight, 1.0, sine)
    from_a = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / safe)
    from_b = torch.where(straight, t, (t * angle).sin() / safe)
    lengths = ends.norm(dim=-1, keepdim=True)
    length = lengths[0] * (1 - t) + lengths[1] * t
    return ((from_a * a + from_b * b) * length).flatten(0, 1)[:count]


@torch.no_grad()
def draw(generator: nn.Module, noise: Tensor, labels: Tensor | None = None, seed: int = 0) -> Iterator[Tensor]:
    """Images `[<= 128, C, H, W]` in [-1, 1] on the CPU, in parts, of a generator in eval mode.

    Args:
        noise: `[N, latent]`. labels: `[N]` int64 for a generator that knows classes.
        seed: of what a generator draws itself (stylegan2's noise for each pixel); torch's random state stays as it is.
    """
    device = next(generator.parameters()).device
    parts = [noise.split(BATCH)] + ([] if labels is None else [labels.split(BATCH)])
    seeds = torch.Generator().manual_seed(seed)  # Drawn: from `seed` itself would come the numbers of `noise_of`.
    for inputs in zip(*parts, strict=True):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=seeds)))
            images = generator(*(x.to(device) for x in inputs)).cpu()
        yield images
