"""What :func:`ddst.advise` found: break-even densities, gains, the block to choose."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerAdvice:
    """One layer with blocks of one size.

    Attributes:
        name, shape: of the layer and its weight. calls: in one forward pass of the model.
        asked: the density that ``sparsify`` would give it.
        points: ``(density, dense seconds, sparse seconds)`` of a training step of the layer, by density.
    """

    name: str
    shape: tuple[int, ...]
    calls: int
    asked: float
    points: tuple[tuple[float, float, float], ...]

    @property
    def dense_seconds(self) -> float:
        """Median of the dense measurements."""
        ordered = sorted(dense for _, dense, _ in self.points)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def speedup(self, density: float) -> float:
        """Dense over sparse time at a density: each point's ratio is of one pair; between points interpolated.

        >>> LayerAdvice("a", (64, 64), 1, 0.1, ((0.1, 8.0, 1.0), (0.5, 8.0, 5.0))).speedup(0.3)
        2.6666666666666665
        """
        return 1.0 / self._relative(density)

    def _relative(self, density: float) -> float:
        """Sparse over dense time, linear between the points and beyond the last; below the first its value."""
        points = [(d, sparse / dense) for d, dense, sparse in self.points]
        if density <= points[0][0] or len(points) == 1:
            return points[0][1]
        (d0, r0), (d1, r1) = next(
            (pair for pair in itertools.pairwise(points) if density <= pair[1][0]), (points[-2], points[-1])
        )
        return max(r0 + (r1 - r0) * (density - d0) / (d1 - d0), 1e-9)

    @property
    def break_even(self) -> float:
        """Sparse wins at densities below this: 0 where it never does, 1 where it does at every measured density."""
        points = [(d, sparse / dense) for d, dense, sparse in self.points]
        if points[0][1] >= 1.0:
            return 0.0
        for (d0, r0), (d1, r1) in itertools.pairwise(points):
            if r1 >= 1.0:
                return d0 + (d1 - d0) * (1.0 - r0) / (r1 - r0)
        return 1.0

    @property
    def wins(self) -> bool:
        """Whether sparse is faster at the density asked for."""
        return self.speedup(self.asked) > 1.0

    def why_dense(self, density: float) -> str | None:
        """Why the layer should rather stay dense than have a density, or None where sparse is faster."""
        if self.speedup(density) > 1.0:
            return None
        limit = f"sparse wins below {self.break_even:.2g}" if self.break_even else "sparse never wins"
        return f"{self.speedup(density):.2f}x the dense speed at density {density:.3g} ({limit}, measured here)"

    @property
    def saved_seconds(self) -> float:
        """What the model's step saves with this layer sparse; 0 where it would lose."""
        return self.calls * self.dense_seconds * (1.0 - 1.0 / self.speedup(self.asked)) if self.wins else 0.0


@dataclass(frozen=True)
class BlockAdvice:
    """All layers with blocks of one size. ``model_seconds``: forward and backward pass of the dense model."""

    block: tuple[int, int]
    layers: tuple[LayerAdvice, ...]
    model_seconds: float

    @property
    def gain(self) -> float:
        """Step time of the dense model over that with the winning layers sparse: computed from the layers' times."""
        saved = min(sum(layer.saved_seconds for layer in self.layers), 0.99 * self.model_seconds)
        return self.model_seconds / (self.model_seconds - saved)

    def slower(self, densities: Mapping[str, float]) -> dict[str, str]:
        """Layers that should rather stay dense than have these densities, and why; layers not measured may change."""
        reasons = {
            layer.name: layer.why_dense(densities[layer.name]) for layer in self.layers if layer.name in densities
        }
        return {name: reason for name, reason in reasons.items() if reason is not None}


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
                    numbers = (f"{layer.asked:.3f}", f"{1e3 * layer.calls * layer.dense_seconds:.3f}")
                    limit = {0.0: "never", 1.0: "always"}.get(layer.break_even, f"{layer.break_even:.2f}")
                    shape, block = "x".join(map(str, layer.shape)), f"{found.block[0]}x{found.block[1]}"
                    speedup = f"{layer.speedup(layer.asked):.2f}x"
                    rows.append((name, shape, block, *numbers, speedup, limit, advice))
        widths = [max(len(row[i]) for row in rows) for i in range(8)]
        lines = []
        for row in rows:
            left = [row[i].ljust(widths[i]) for i in range(3)] + [row[i].rjust(widths[i]) for i in range(3, 7)]
            lines.append("  ".join([*left, row[7]]).rstrip())
        lines.insert(1, "-" * max(map(len, lines)))
        for found in self.blocks:
            wins = sum(layer.wins for layer in found.layers)
            lines.append(
                f"blocks {found.block[0]}x{found.block[1]}: {wins} of {len(found.layers)} layers win; the model's step "
                f"of {1e3 * found.model_seconds:.1f} ms would be {found.gain:.2f}x as fast"
            )
        chosen = self.best
        lines.append(f"at density {self.density:g} choose block={chosen.block}" if chosen.gain > 1 else "stay dense")
        return "\n".join(lines)
