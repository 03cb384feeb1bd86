"""Generated images against real ones by named metrics; beside each figure stands what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddst.data import DataError, ImageSet
from ddst.metrics.classifier import TRAINED
from ddst.metrics.frechet import evaluate_embedded, frechet_of_moments
from ddst.metrics.inception import BATCH, FEATURES, RESIZER, Features, Inception, inception_score, to_bytes
from ddst.metrics.prdc import prdc
from ddst.metrics.statistics import Moments, Origin, Reference, read_reference

METRICS = (*TRAINED, "fid", "is", "prdc")
NEIGHBOURS = 5
MOST_NEIGHBOURS = 10_000  # Images of each side: what is usual, and the cost grows with the square.


@dataclass(frozen=True)
class Figure:
    """One number and what it depends on.

    Attributes:
        metric: "digits", "shapes" and "fid": Fréchet distances; "is"; "precision", "recall", "density", "coverage".
        value: smaller is better for distances, larger for the others.
        samples: generated images. real: real images (0: of a file that does not say).
        split: which images the real ones are. resizer: how they got their size.
        more: spread of "is", floor and class shares of "digits" and "shapes".
    """

    metric: str
    value: float
    samples: int
    real: int
    split: str
    resizer: str
    more: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        real = f" against {self.real:,} real ones" if self.real else " against a file's statistics"
        if self.metric == "is":  # It compares with nothing.
            real = ""
        more = ", ".join(f"{name} {value:.3f}" for name, value in self.more.items() if isinstance(value, float))
        return (
            f"{self.metric} {self.value:.4g}{f' ({more})' if more else ''}: {self.samples:,} samples{real} "
            f"({self.split}); {self.resizer}"
        )


class Judge:
    """Measures generated images against one reference, whose features are computed once.

    Args:
        metrics: of `METRICS`. "digits" needs grey images, "shapes" colour, the others `weights`.
        real: the reference images; None with a `reference` file.
        split: words for which images those are.
        weights: file of `Inception`'s weights. device: where it runs.
        reference: .npz of `read_reference`, in place of `real` for "fid", and for "prdc" if it holds images.
        before_batch: is called before each batch of the network; what it raises ends a measurement.

    Attributes:
        network: digest of the weights, None where no metric needs them.
        origin: what metrics of the network compare with.

    Raises:
        DataError: a metric needs what was not given; one line. As of `Inception` and `read_reference`.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        real: ImageSet | None,
        split: str,
        *,
        weights: Path | None = None,
        reference: Path | None = None,
        device: torch.device | str = "cpu",
        before_batch: Callable[[], object] = lambda: None,
    ) -> None:
        self.metrics, self._real, self._split = tuple(metrics), real, split
        unknown = [name for name in metrics if name not in METRICS]
        if unknown:
            raise DataError(f"metrics must be some of {', '.join(METRICS)}, got {unknown[0]!r}")
        by_network = [name for name in metrics if name not in TRAINED]
        if by_network and weights is None:
            raise DataError(
                f"metric {by_network[0]} needs the weights of Inception-v3 as a local file (--weights FILE: "
                "weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or pytorch-fid's)"
            )
        self._embedded = [name for name in metrics if name in TRAINED]
        for name in self._embedded:
            if real is None or real.channels != TRAINED[name][0]:
                kind = "grey" if TRAINED[name][0] == 1 else "colour"
                raise DataError(f"metric {name} is of {kind} images: its classifier knows {name} only")
        self._before_batch = before_batch
        self._network = None if not by_network or weights is None else Inception(weights, device)
        self.network = None if self._network is None else self._network.digest
        self._file = Reference(None, None) if reference is None else read_reference(reference, FEATURES)
        if "prdc" in metrics and reference is not None and self._file.images is None:
            raise DataError(f"reference {reference} holds no images (arr_0), which metric prdc needs")
        # Embedded distances are always beside the real images.
        images = real if reference is None else self._file.images
        if reference is None:
            count, side = (0, 0) if real is None else (len(real), real.resolution)
            self.origin = Origin(count, split, f"ddst.data's to {side}; {RESIZER}")
        elif self._file.origin is not None:
            self.origin = replace(self._file.origin, split=f"{reference.name}, of {self._file.origin.split}")
        else:
            self.origin = Origin(0, reference.name, f"of a file that does not say; {RESIZER}")
        for metric, least in (("fid", 2), ("prdc", NEIGHBOURS + 1)):
            by_images = metric == "prdc" or self._file.moments is None
            if metric in metrics and by_images and images is not None and len(images) < least:
                raise DataError(f"metric {metric} needs at least {least} real images, got {len(images)}")

    def __call__(self, parts: Iterable[Tensor]) -> list[Figure]:
        """The figures of generated images `[N, C, H, W]` in [-1, 1], given in parts.

        Of images only features are kept; the embedded distances pass them through a second network and keep them all.
        """
        kept: list[Tensor] = []

        def seen() -> Iterator[Tensor]:
            for part in parts:
                if self._embedded:
                    kept.append(part)
                yield to_bytes(part)

        figures: list[Figure] = []
        if self._network is not None:
            figures += self._by_network(self._network.features(self._batches(seen())))
        else:
            kept = list(parts)
        for name in self._embedded:
            assert self._real is not None
            quality = evaluate_embedded(self._real.batch(slice(None)), kept, name)
            count, resizer = sum(map(len, kept)), f"bilinear to the classifier's {quality.resolution}"
            more = {"floor": quality.floor, "shares": list(quality.shares)}
            figures.append(Figure(name, quality.distance, count, len(self._real), self._split, resizer, more))
        order = {name: i for i, name in enumerate(self.metrics)}
        return sorted(figures, key=lambda figure: order.get(figure.metric, order.get("prdc", 0)))

    def _by_network(self, fake: Features) -> list[Figure]:
        count, figures = len(fake.pool), []
        if "fid" in self.metrics:
            moments, real = self._moments
            distance = frechet_of_moments(moments, Moments.of(fake.pool))
            figures.append(Figure("fid", distance, count, real, self.origin.split, self.origin.resizer))
        if "is" in self.metrics:
            splits = min(10, count)
            mean, spread = inception_score(fake.logits, splits)
            more = {"spread": spread, "splits": splits}
            figures.append(Figure("is", mean, count, 0, "no real images in it", RESIZER, more))
        if "prdc" in self.metrics:
            real_pool, fake_pool = self._features.pool[:MOST_NEIGHBOURS], fake.pool[:MOST_NEIGHBOURS]
            found = prdc(real_pool, fake_pool, NEIGHBOURS)
            counts, origin = (len(fake_pool), len(real_pool)), self.origin
            figures += [
                Figure(name, value, *counts, origin.split, origin.resizer, {"k": NEIGHBOURS})
                for name, value in asdict(found).items()
            ]
        return figures

    @cached_property
    def _features(self) -> Features:
        """Of the reference images, of the file if it holds some."""
        assert self._network is not None
        if self._file.images is not None:
            return self._network.features(self._batches([self._file.images]))
        assert self._real is not None
        places = torch.arange(len(self._real)).split(256)
        return self._network.features(self._batches(to_bytes(self._real.batch(part)) for part in places))

    def _batches(self, parts: Iterable[Tensor]) -> Iterator[Tensor]:
        for part in parts:
            for batch in part.split(BATCH):
                self._before_batch()
                yield batch

    def moments(self) -> Moments:
        """Of the real features. Needs a network: a metric that is not embedded."""
        if self._network is None:
            raise DataError("there are statistics for metrics of the Inception network only")
        return self._moments[0]

    @cached_property
    def _moments(self) -> tuple[Moments, int]:
        if self._file.moments is not None:
            return self._file.moments, self.origin.real
        return Moments.of(self._features.pool), len(self._features.pool)
