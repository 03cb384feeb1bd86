"""What :func:`ddst.advise` found: break-even densities, gains, the block to choose."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..measure import TIGHT


class Measured(NamedTuple):
    """A training step of a layer at a density: seconds, and the 95 % interval of dense over sparse time."""

    density: float
    dense: float
    sparse: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerAdvice:
    """One layer with blocks of one size.

    Attributes:
        name, shape: of the layer and its weight. calls: in one forward pass of the model.
        asked: the density that ``sparsify`` would give it.
        points: what was measured, by density.
    """

    name: str
    shape: tuple[int, ...]
    calls: int
    asked: float
    points: tuple[Measured, ...]

    @property
    def dense_seconds(self) -> float:
        """Median of the dense measurements."""
        return statistics.median(point.dense for point in self.points)

    def speedup(self, density: float) -> float:
        """Dense over sparse time at a density: each point's ratio is of pairs; between points interpolated.

        >>> points = Measured(0.1, 8.0, 1.0, 7.0, 9.0), Measured(0.5, 8.0, 5.0, 1.5, 1.7)
        >>> LayerAdvice("a", (64, 64), 1, 0.1, points).speedup(0.3)
        2.6666666666666665
        """
        return 1.0 / self._relative(density, [point.sparse / point.dense for point in self.points])

    def interval(self, density: float) -> tuple[float, float]:
        """Between what :meth:`speedup` lies with 95 % confidence, interpolated likewise."""
        low = self._relative(density, [1.0 / max(point.low, 1e-9) for point in self.points])
        return 1.0 / low, 1.0 / self._relative(density, [1.0 / point.high for point in self.points])

    def _relative(self, density: float, relative: list[float]) -> float:
        """Sparse over dense time, linear between the points and beyond the last; below the first its value."""
        points = list(zip((point.density for point in self.points), relative, strict=True))
        if density <= points[0][0] or len(points) == 1:
            return max(points[0][1], 1e-9)
        (d0, r0), (d1, r1) = next(
            (pair for pair in itertools.pairwise(points) if density <= pair[1][0]), (points[-2], points[-1])
        )
        return max(r0 + (r1 - r0) * (density - d0) / (d1 - d0), 1e-9)

    @property
    def break_even(self) -> float:
        """Sparse wins at densities below this: 0 where it never does, 1 where it does at every measured density."""
        points = [(point.density, point.sparse / point.dense) for point in self.points]
        if points[0][1] >= 1.0:
            return 0.0
        for (d0, r0), (d1, r1) in itertools.pairwise(points):
            if r1 >= 1.0:
                return d0 + (d1 - d0) * (1.0 - r0) / (r1 - r0)
        return 1.0

    def known(self, density: float) -> bool:
        """Whether the speed-up at a density was measured to within the factor :data:`ddst.measure.TIGHT`."""
        low, high = self.interval(density)
        return high <= TIGHT * low

    def told(self, density: float) -> bool:
        """Whether the measurements tell which side is faster at a density: on a busy machine they may not."""
        low, high = self.interval(density)
        return self.known(density) or low > 1.0 or high < 1.0

    @property
    def wins(self) -> bool:
        """Whether sparse was measured to be faster at the density asked for."""
        return self.told(self.asked) and self.speedup(self.asked) > 1.0

    def why_dense(self, density: float) -> str | None:
        """Why the layer should rather stay dense than have a density, or None where sparse is faster."""
        if not self.told(density):
            return f"{self.shown(density)} the dense speed at density {density:.3g}: this machine is too busy to tell"
        if self.speedup(density) > 1.0:
            return None
        limit = f"sparse wins below {self.break_even:.2g}" if self.break_even else "sparse never wins"
        return f"{self.shown(density)} the dense speed at density {density:.3g} ({limit}, measured here)"

    def shown(self, density: float) -> str:
        """The speed-up at a density as text: a number, or where it is not known its interval."""
        if self.known(density):
            return f"{self.speedup(density):.2f}x"
        low, high = self.interval(density)
        return f"{low:.2f}x to {high:.2f}x"

    def saved(self, density: float) -> float:
        """What the model's step saves with this layer at a density; where that is not known, what it saves at least; 0
        where it would lose.
        """
        if self.why_dense(density) is not None:
            return 0.0
        speedup = self.speedup(density) if self.known(density) else self.interval(density)[0]
        return self.calls * self.dense_seconds * (1.0 - 1.0 / speedup)

    @property
    def saved_seconds(self) -> float:
        """:meth:`saved` at the density asked for."""
        return self.saved(self.asked)


@dataclass(frozen=True)
class BlockAdvice:
    """All layers with blocks of one size.

    Attributes:
        model_seconds: forward and backward pass of the dense model; the layers' seconds are on its scale.
        known: whether the layers' share of these was measured to within the factor :data:`ddst.measure.TIGHT`;
            otherwise the smallest share that the measurements allow is taken.
    """

    block: tuple[int, int]
    layers: tuple[LayerAdvice, ...]
    model_seconds: float
    known: bool = True

    @property
    def gain(self) -> float:
        """Step time of the dense model over that with the winning layers sparse: computed from the layers' times."""
        return self.model_seconds / self.step_seconds({layer.name: layer.asked for layer in self.layers})

    def step_seconds(self, densities: Mapping[str, float]) -> float:
        """Of the model with these layers at these densities, the losing ones and those not named dense: computed from
        the layers' times, ``model_seconds − Σ saved``.
        """
        saved = sum(layer.saved(densities[layer.name]) for layer in self.layers if layer.name in densities)
        return self.model_seconds - min(saved, 0.99 * self.model_seconds)

    def slower(self, densities: Mapping[str, float]) -> dict[str, str]:
        """Layers that should rather stay dense than have these densities, and why; layers not measured may change."""
        reasons = {
            layer.name: layer.why_dense(densities[layer.name]) for layer in self.layers if layer.name in densities
        }
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def __str__(self) -> str:
        wins = sum(layer.wins for layer in self.layers)
        untold = sum(not layer.told(layer.asked) for layer in self.layers)
        busy = f", {untold} cannot be told on this busy machine" if untold else ""
        least = "" if self.known and all(layer.known(layer.asked) for layer in self.layers) else "at least "
        return (
            f"blocks {self.block[0]}x{self.block[1]}: {wins} of {len(self.layers)} layers win{busy}; the model's step "
            f"of {1e3 * self.model_seconds:.1f} ms would be {least}{self.gain:.2f}x as fast"
        )


@dataclass(frozen=True)
class Advice:
    """What :func:`ddst.advise` found; prints as a table.

    Attributes:
        density: asked for. blocks: for every block size, in the order given.
    """

    density: float
    blocks: tuple[BlockAdvice, ...]

    @property
    def best(self) -> BlockAdvice:
        """The block size of which the model gains most."""
        return max(self.blocks, key=lambda found: found.gain)

    def of(self, block: tuple[int, int]) -> BlockAdvice:
        """The findings for one block size.

        Raises:
            ValueError: it was not measured.
        """
        for found in self.blocks:
            if found.block == block:
                return found
        raise ValueError(f"the advice holds blocks {[found.block for found in self.blocks]}, not {block}")

    def best_block(self, name: str) -> tuple[int, int] | None:
        """The block size with which one layer saves most, or None where none wins."""
        saved = {f.block: layer.saved_seconds for f in self.blocks for layer in f.layers if layer.name == name}
        block = max(saved, key=lambda b: saved[b], default=None)
        return block if block is not None and saved[block] > 0 else None

    def __str__(self) -> str:
        rows = [("layer", "weight", "block", "density", "dense ms", "speed-up", "wins below", "advice")]
        names = list(dict.fromkeys(layer.name for found in self.blocks for layer in found.layers))
        for name in names:
            best = self.best_block(name)
            for found in self.blocks:
                for layer in (layer for layer in found.layers if layer.name == name):
                    advice = ("best block" if found.block == best else "sparse") if layer.wins else "leave dense"
                    advice = advice if layer.told(layer.asked) else "busy machine: not told"
                    numbers = (f"{layer.asked:.3f}", f"{1e3 * layer.calls * layer.dense_seconds:.3f}")
                    limit = {0.0: "never", 1.0: "always"}.get(layer.break_even, f"{layer.break_even:.2f}")
                    limit = limit if all(layer.known(point.density) for point in layer.points) else "?"
                    shape, block = "x".join(map(str, layer.shape)), f"{found.block[0]}x{found.block[1]}"
                    speedup = layer.shown(layer.asked)
                    rows.append((name, shape, block, *numbers, speedup, limit, advice))
        widths = [max(len(row[i]) for row in rows) for i in range(8)]
        lines = []
        for row in rows:
            left = [row[i].ljust(widths[i]) for i in range(3)] + [row[i].rjust(widths[i]) for i in range(3, 7)]
            lines.append("  ".join([*left, row[7]]).rstrip())
        lines.insert(1, "-" * max(map(len, lines)))
        lines += map(str, self.blocks)
        chosen = self.best
        lines.append(f"at density {self.density:g} choose block={chosen.block}" if chosen.gain > 1 else "stay dense")
        return "\n".join(lines)
