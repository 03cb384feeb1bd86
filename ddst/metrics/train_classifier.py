"""Makes the classifier weights that ship beside this file: `python -m ddst.metrics.train_classifier`.

Four fifths of the images train, one fifth is held out to measure accuracy; weights are stored as float16. Takes about
a minute on one core and gives the same weights on every run on one machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ddst.data import Sampler, load_images
from ddst.metrics.classifier import TRAINED, EmbeddedClassifier, weights_path
from ddst.metrics.frechet import frechet_distance

# The unit of the distance: what leaving out one class costs, on average over the ten.
MISSING_CLASS = 20.0


def held_out(size: int) -> Tensor:
    """bool `[size]`: every fifth image in a fixed random order, never trained on."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[order[: size // 5]] = True
    return chosen


@torch.no_grad()
def _missing_class_cost(net: EmbeddedClassifier, images: Tensor, labels: Tensor) -> float:
    features = net.features(images)
    return sum(frechet_distance(features, features[labels != k]) for k in range(10)) / 10


def train(data: str, resolution: int, epochs: int) -> tuple[EmbeddedClassifier, float]:
    """A classifier of a data set trained at `resolution`, rounded to float16, and its accuracy on held-out images."""
    torch.manual_seed(resolution)
    found = load_images(data, resolution)
    images, labels, test = found.batch(slice(None)), found.labels, held_out(len(found))
    assert labels is not None
    x, y = images[~test], labels[~test]
    net, batch = EmbeddedClassifier(resolution, data), 64
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * len(x) // batch
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    sampler = Sampler(len(x), batch, seed=resolution)
    for _ in range(steps):
        chosen = sampler.next()
        loss = F.cross_entropy(net(x[chosen]), y[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    net.eval().half().float()
    net.scale.fill_((MISSING_CLASS / _missing_class_cost(net, images, labels)) ** 0.5)
    with torch.no_grad():
        accuracy = (net(images[test]).argmax(1) == labels[test]).float().mean().item()
    return net, accuracy


def main() -> None:
    """Train every data set's classifiers and write their weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=weights_path(8).parent, help="folder of the weight files")
    args = parser.parse_args()
    torch.set_num_threads(1)  # Sums in the same order on any number of cores.
    for data, resolution in [(name, side) for name in args.data for side in TRAINED[name][1]]:
        net, accuracy = train(data, resolution, args.epochs)
        path = args.out / weights_path(resolution, data).name
        save_file({name: t.half() if t.ndim else t for name, t in net.state_dict().items()}, path)
        print(f"{path.name}: {path.stat().st_size} bytes, held-out accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
