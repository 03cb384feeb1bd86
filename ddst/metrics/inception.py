"""The field's network: Inception-v3 of 2015 as torch-fidelity carries it over from TensorFlow, weights from a file."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddst.data import DataError

FEATURES, CLASSES = 2048, 1008
BATCH = 64
RESIZER = "the network's bilinear to 299 (TensorFlow 1)"


@dataclass(frozen=True)
class Features:
    """`pool` `[N, 2048]`, for FID and neighbours, and `logits` `[N, 1008]` without bias, for the inception score."""

    pool: Tensor
    logits: Tensor


class Inception:
    """h(x) and W h(x) of Inception-v3, weights read from a local file.

    Args:
        path: the published `weights-inception-2015-12-05-6726825d.pth` (torch-fidelity) or
            `pt_inception-2015-12-05-6726825d.pth` (pytorch-fid): one state dict, the same names. Read without
            unpickling code.
        device: where it runs.

    Attributes:
        digest: of the weights, whatever file they came from: figures of two of them cannot be compared.

    Raises:
        DataError: the file is missing, damaged, or its tensors are not those of the network; one line.
        ModuleNotFoundError: torch-fidelity is missing: `pip install --no-deps torch-fidelity`.

    Cost: 5.7 billion multiply-adds an image.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu") -> None:
        network = _blank_network()
        weights = _weights(path, network.state_dict())
        network.load_state_dict(weights)
        self.digest = digest_of(weights)
        self._network, self._device = network.to(device), device

    @torch.no_grad()
    def features(self, parts: Iterable[Tensor], batch: int = BATCH) -> Features:
        """Of images `[N, 3, H, W]` or `[N, 1, H, W]` uint8, in parts. In eval mode, `batch` at a time."""
        pool, logits = [], []
        for part in parts:
            for images in part.split(batch):
                found = self._network(images.expand(-1, 3, -1, -1).to(self._device))
                pool.append(found[0].cpu())
                logits.append(found[1].cpu())
        return Features(torch.cat(pool), torch.cat(logits))


def digest_of(weights: dict[str, Tensor]) -> str:
    """Of the values that a network computes with, in the order of their names.

    >>> a, b = torch.zeros(2), torch.ones(2)
    >>> digest_of({"a": a, "b": b}) == digest_of({"b": b, "bn.num_batches_tracked": torch.tensor(3), "a": a})
    True
    >>> digest_of({"a": a, "b": b}) == digest_of({"a": b, "b": a})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if not name.endswith("num_batches_tracked"):
            digest.update(weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of images in [-1, 1], clipped and rounded: what a picture of them holds."""
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) ‖ p(y)): mean and standard deviation over `splits` parts, as torch-fidelity has them.

    The order is shuffled first, with torch-fidelity's seed 2020; float64.

    >>> inception_score(torch.eye(2).repeat(3, 1) * 100, splits=1)  # Two classes, every image surely of one.
    (2.0, 0.0)
    """
    shuffled = logits[np.random.RandomState(2020).permutation(len(logits))].double()
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for part in (shuffled[start:end] for start, end in pairwise(edges)):
        p = part.softmax(1)
        scores.append(float((p * (part.log_softmax(1) - p.mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _module() -> ModuleType:
    """torch-fidelity's module of the network, without the package around it.

    The package imports torchvision, whose wheels each fit one build of torch and do not load beside another; the
    network needs torch only.
    """
    package, name = "torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"
    if package in sys.modules:
        return import_module(name)
    if (spec := find_spec(package)) is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = module_from_spec(spec)  # Not executed: a place to look for its modules.
    try:
        return import_module(name)
    finally:  # Whoever imports the package itself gets all of it.
        for known in [known for known in sys.modules if known.partition(".")[0] == package]:
            del sys.modules[known]


def _blank_network() -> Any:
    class Blank(_module().FeatureExtractorInceptionV3):  # type: ignore[misc]
        """Its own reading of the weights would unpickle whatever the file holds."""

        filled = False

        def load_state_dict(self, state: Any, *more: Any, **options: Any) -> Any:
            if self.filled:
                return super().load_state_dict(state, *more, **options)
            self.filled = True

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        return Blank("ddst", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)


def _weights(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"weights {path} cannot be read: {error.strerror or error}") from None
    except Exception:  # What torch says of it is advice on how to load it all the same.
        raise DataError(f"weights {path} cannot be read: damaged, or more than tensors and plain values") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"weights {path} are no state dict of tensors")
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):  # Older files lack it, and nothing reads it.
            state.setdefault(name, tensor)
        elif name not in state:
            raise DataError(f"weights {path} are not of Inception-v3: {name} is missing")
        elif state[name].shape != tensor.shape:
            sizes = f"{list(state[name].shape)}, expected {list(tensor.shape)}"
            raise DataError(f"weights {path} are not of Inception-v3: {name} is {sizes}")
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise DataError(f"weights {path} are not of Inception-v3: {unknown[0]} is unknown")
    return state
