"""The balance ratio: how much of the generator's distance to the data one generator step makes up; D's sign."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ddst._arguments import check_int, check_number, check_one_of, check_state_keys

AVERAGES = ("ratio_of_means", "mean_of_ratios")
_Sample = tuple[float, float, float | None]


@dataclass(frozen=True)
class BalanceSample:
    """One measurement.

    Attributes:
        alpha: ``E[D(G_post(z))] − E[D(G_pre(z))]``.
        beta: ``E[D(x)] − E[D(G_pre(z))]``.
        ratio: ``alpha / beta``, or None where beta is at most ε or something is not finite.
        sign: ``E[sign D(x)]``, −1 … 1, or None where it was not measured.
    """

    alpha: float
    beta: float
    ratio: float | None
    sign: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Plain values that JSON can hold: numbers that are not finite become None."""
        return {name: value if value is None or math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True)
class WindowSummary:
    """What the controller decides from.

    Attributes:
        samples: measurements in the window. capacity: how many fill it.
        mean_alpha, mean_beta: over the window, 0 when it is empty.
        balance_ratio: the averaged ratio, finite, or None.
        reason: why ``balance_ratio`` is None; empty otherwise.
        mean_sign: over the samples that have a sign, None where none has.
    """

    samples: int
    capacity: int
    mean_alpha: float
    mean_beta: float
    balance_ratio: float | None
    reason: str = ""
    mean_sign: float | None = None

    @property
    def full(self) -> bool:
        """Whether the window holds as many samples as it can."""
        return self.samples >= self.capacity

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold."""
        return asdict(self)


def _mean(values: Sequence[float]) -> float:
    """Of finite numbers, and so finite, also where their sum is not: halves are divided before they are summed, and
    rounding takes no mean outside of what it is of.

    >>> _mean([1.7976931348623157e308] * 3)
    1.7976931348623157e+308
    """
    mean = 2 * math.fsum(value / 2 / len(values) for value in values)
    return min(max(mean, min(values)), max(values))


class BalanceRatio:
    """``BR = α / β`` over a sliding window: ``mean(α) / mean(β)``, or the mean of the samples' ratios.

    ``α = E[D(G_post(z))] − E[D(G_pre(z))]`` and ``β = E[D(x)] − E[D(G_pre(z))]``, with the same noise z before and
    after the generator's step and D after its update. Near 1, one step of G makes up its whole distance to the data in
    the eyes of D: D is too weak. Near 0, G's steps achieve nothing against D: D is too strong.

    A window has a value or a reason why it has none; NaN and infinity never come out:

    * "ratio_of_means" (default): None when ``mean(β) ≤ eps``, that is, when D does not rate data above G's images.
    * "mean_of_ratios" (the paper's): samples with ``β ≤ eps`` are left out of the mean (their ratio has no meaning, and
      one of them outweighs the whole window); None when more than half of the window is left out.
    * A sample whose α or β is not finite is not taken into the window at all, and counted in ``rejected``.

    Args:
        window: number of samples, at least 1. (The published runs measure every 10 iterations over 1,000.)
        average: "ratio_of_means" or "mean_of_ratios".
        eps: ``ε ≥ 0``, the smallest meaningful ``β``, in units of D's scores.

    Raises:
        ValueError: an argument outside its range.

    Source: Wang et al., *Balanced Training for Sparse GANs* (2023), balance ratio; the ratio of means is ours.

    >>> meter = BalanceRatio(window=2)
    >>> meter.add(0.1, 0.5).ratio
    0.2
    >>> meter.add(0.3, 0.5).ratio, round(meter.value, 3)
    (0.6, 0.4)
    """

    def __init__(self, window: int = 100, average: str = "ratio_of_means", eps: float = 1e-3) -> None:
        self.window = check_int("window", window, 1)
        self.average = check_one_of("average", average, AVERAGES)
        self.eps = check_number("eps", eps, 0)
        self.rejected = 0
        self._samples: deque[_Sample] = deque(maxlen=window)

    def add(self, alpha: float, beta: float, sign: float | None = None) -> BalanceSample:
        """Takes one measurement into the window; the oldest leaves when it is full.

        Args:
            alpha, beta: as in :class:`ddst.gan.BalanceSample`. sign: ``E[sign D(x)]``, of which only the mean is kept
                (``WindowSummary.mean_sign``, the signal of StyleGAN2-ADA); it is no part of the ratio.
        """
        if sign is not None:
            sign = check_number("sign", sign, -1, 1)
        # Means of scores may come as tensors.
        alpha, beta = (x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in (alpha, beta))
        alpha, beta = check_number("alpha", alpha, finite=False), check_number("beta", beta, finite=False)
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            self.rejected += 1
            return BalanceSample(alpha, beta, None, sign)
        self._samples.append((alpha, beta, sign))
        return BalanceSample(alpha, beta, self._ratio(alpha, beta), sign)

    @property
    def value(self) -> float | None:
        """The window's balance ratio, or None; :meth:`summary` has the reason."""
        return self.summary().balance_ratio

    @property
    def full(self) -> bool:
        """Whether the window holds ``window`` samples."""
        return len(self._samples) == self.window

    def summary(self) -> WindowSummary:
        """The window's averages."""
        count = len(self._samples)
        if not count:
            return WindowSummary(0, self.window, 0.0, 0.0, None, "no sample yet")
        alpha = _mean([a for a, _, _ in self._samples])
        beta = _mean([b for _, b, _ in self._samples])
        signs = [s for _, _, s in self._samples if s is not None]
        sign = math.fsum(signs) / len(signs) if signs else None
        reason = ""
        if self.average == "ratio_of_means":
            value = self._ratio(alpha, beta)
            if value is None:
                reason = (
                    f"mean beta {beta:.3g} is not above {self.eps:.3g}: D does not rate data above generated images"
                )
        else:
            ratios = [r for r in (self._ratio(a, b) for a, b, _ in self._samples) if r is not None]
            value = _mean(ratios) if ratios and 2 * len(ratios) >= count else None
            if value is None:
                reason = f"beta is not above {self.eps:.3g} in {count - len(ratios)} of {count} samples"
        return WindowSummary(count, self.window, alpha, beta, value, reason, sign)

    def _ratio(self, alpha: float, beta: float) -> float | None:
        if not beta > self.eps:
            return None
        ratio = alpha / beta
        return ratio if math.isfinite(ratio) else None

    def state_dict(self) -> dict[str, Any]:
        """The samples in the window and the count of rejected ones."""
        return {"samples": list(self._samples), "rejected": self.rejected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`; when the window is smaller now, the newest samples are kept."""
        check_state_keys(state, ("samples", "rejected"))
        samples = ((float(a), float(b), None if s is None else float(s)) for a, b, s in state["samples"])
        self._samples = deque(samples, maxlen=self.window)
        self.rejected = int(state["rejected"])
