"""Whether a run collapses: what its log says, against limits that stand here.

Three signs, none of which is looked for in the first eighth of a run, where samples are still those of an untrained
generator:

* "weak discriminator": the window's balance ratio is above 1 (and above its upper bound) for an eighth of the run
  without a break: one step of G makes up more than all that D sees between its images and the data. Above the upper
  bound alone says nothing: healthy runs of small networks are so for most of their time (dense 0.6 to 0.9, DDST 0.5 to
  0.7).
* "one class": `exp(−Σ p log p)` of the class shares that the embedded classifier finds in samples, which is how many
  classes there are, is below 2.
* "one picture": :func:`spread` of a sample grid is below 0.2 of that of real images.

The last two are the collapse itself, and tell it from pictures; the first is the state it comes from, D being too weak
for G, and healthy runs can be in it. Real digits hold 10.0 classes and of one class alone have a spread of 0.8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddst.data import ImageSet
from ddst.train.config import TrainConfig
from ddst.train.log import RunLog, read_log

WEAK, ONE_CLASS, ONE_PICTURE = "weak discriminator", "one class", "one picture"
#: Share of the run: of its beginning without signs; for which the ratio must stay above its limit.
FIRST, LONG = 1 / 8, 1 / 8
SMALLEST_RATIO = 1.0
FEWEST_CLASSES = 2.0
SMALLEST_SPREAD = 0.2
MOST_REAL = 1000  # Real images that samples are compared with.


def spread(images: Tensor) -> float:
    """√(mean over pairs i ≠ j of mean (xᵢ − xⱼ)²): how far two pictures are apart, on average; 0 of one picture.

    Args:
        images: `[N, C, H, W]`.

    Numerics: by 2 · variance of each pixel, which is that mean exactly, in float64.

    Example:
        >>> import torch
        >>> spread(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
        1.0
    """
    return math.sqrt(2 * images.double().var(dim=0).mean().item()) if len(images) > 1 else 0.0


def classes_of(shares: Sequence[float]) -> float:
    """exp(−Σ p log p): how many equally frequent classes have the entropy of these shares.

    Example:
        >>> round(classes_of([0.25] * 4), 6), classes_of([1.0, 0.0])
        (4.0, 1.0)
    """
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0))


@dataclass(frozen=True)
class Sign:
    """A sign of collapse that begins or ends.

    Attributes:
        step: at which. sign: which. begins: or ends. value: what was seen. limit: what it was compared with.
    """

    step: int
    sign: str
    begins: bool
    value: float
    limit: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        seen = {
            WEAK: f"the balance ratio has been above {self.limit:.2f} for {self.value:.0f} steps: D is too weak",
            ONE_CLASS: f"samples hold {self.value:.2f} classes, below {self.limit:g}",
            ONE_PICTURE: f"samples are {self.value:.2f} times as far apart as real images, below {self.limit:g}",
        }[self.sign]
        return f"{self.sign} {'from' if self.begins else 'until'} step {self.step}" + (
            f" ({seen})" if self.begins else ""
        )


class CollapseWatch:
    """Reads a run's log entry by entry; what it says is a function of them alone, so a resumed run says the same.

    Args:
        bounds: of the balance ratio. steps: of the whole run.

    Attributes:
        standing: signs that have begun and not ended, by their name.
        found: all that have begun or ended, in order.

    Example:
        >>> watch = CollapseWatch((0.45, 0.55), steps=80)
        >>> for step in (10, 20, 30):
        ...     watch.see({"event": "samples", "step": step, "spread": 0.1 if step > 10 else 0.0})
        >>> [str(sign) for sign in watch.found]
        ['one picture from step 20 (samples are 0.10 times as far apart as real images, below 0.2)']
    """

    def __init__(self, bounds: Sequence[float], steps: int) -> None:
        self._upper = max(float(bounds[1]), SMALLEST_RATIO)
        self._first, self._long = steps * FIRST, max(steps * LONG, 1)
        self._above = 0
        self.standing: dict[str, Sign] = {}
        self.found: list[Sign] = []

    def see(self, entry: Mapping[str, Any]) -> None:
        """The next entry of the log."""
        event, step = entry.get("event"), entry.get("step", 0)
        if event is None and "balance_ratio" in entry:
            ratio = entry["balance_ratio"]
            if ratio is not None:
                self._above = self._above + 1 if ratio > self._upper else 0
            elif self._above:  # β near zero: D does not rate real images higher, which is no strength either.
                self._above += 1
            self._judge(WEAK, step, self._above >= self._long, self._above, self._upper)
        elif event == "metric" and (shares := _shares(entry)):
            count = classes_of(shares)
            self._judge(ONE_CLASS, step, count < FEWEST_CLASSES, count, FEWEST_CLASSES)
        elif event == "samples" and isinstance(entry.get("spread"), int | float):
            self._judge(ONE_PICTURE, step, entry["spread"] < SMALLEST_SPREAD, entry["spread"], SMALLEST_SPREAD)

    def _judge(self, name: str, step: int, seen: bool, value: float, limit: float) -> None:
        if step <= self._first or seen == (name in self.standing):
            return
        sign = Sign(step, name, seen, float(value), limit)
        self.found.append(sign)
        if seen:
            self.standing[name] = sign
        else:
            del self.standing[name]

    @property
    def collapsed(self) -> bool:
        """Whether the pictures say so, by what was last seen of them."""
        return bool(self.standing.keys() & {ONE_CLASS, ONE_PICTURE})


def _shares(entry: Mapping[str, Any]) -> list[float]:
    more = entry.get("more")
    shares = more.get("shares") if isinstance(more, dict) else None
    numbers = isinstance(shares, list) and all(isinstance(p, int | float) and 0 <= p <= 1 for p in shares)
    return shares if numbers and isinstance(shares, list) else []


def watched(entries: Iterable[Mapping[str, Any]], bounds: Sequence[float], steps: int) -> CollapseWatch:
    """The watch after all entries of a log."""
    watch = CollapseWatch(bounds, steps)
    for entry in entries:
        watch.see(entry)
    return watch


class Signs:
    """Looks at a run while it trains: writes how far its samples are apart, and each sign when it begins or ends.

    Args:
        log: of the run; what it holds already is read. settings: of the run. images: the real ones.
    """

    def __init__(self, log: RunLog, settings: TrainConfig, images: ImageSet) -> None:
        self._log, self._images = log, images
        self._watch = watched(read_log(log.path), settings.bounds, settings.steps)
        self._written = len(self._watch.found)
        others = log.watcher

        def see(entry: Mapping[str, Any]) -> None:
            others(entry)
            self._watch.see(entry)

        log.watcher = see

    def samples(self, step: int, images: Tensor) -> None:
        """Writes the spread of a sample grid."""
        if self._real > 0:
            self._log.write(event="samples", step=step, spread=spread(images) / self._real)

    def write(self) -> None:
        """Writes what has begun or ended since the last call."""
        for sign in self._watch.found[self._written :]:
            self._log.write(event="collapse", **sign.as_dict())
        self._written = len(self._watch.found)

    @cached_property
    def _real(self) -> float:
        count = len(self._images)
        chosen = torch.arange(0, count, max(1, count // MOST_REAL))[:MOST_REAL]
        return spread(self._images.batch(chosen))


def told(watch: CollapseWatch) -> str:
    """One line for the end of a run.

    Example:
        >>> told(CollapseWatch((0.45, 0.55), steps=80))
        'no sign of collapse'
    """
    if not watch.found:
        return "no sign of collapse"
    said = "; ".join(map(str, watch.found))
    return f"{'collapsed' if watch.collapsed else 'signs of collapse, none in the last pictures'}: {said}"
