"""The report of a conversion: one line per layer, and the densities it came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """What :func:`ddst.sparsify` did with one layer.

    Attributes:
        name: first dotted name. kind: class. shape: of the dense weight.
        active: active weights. size: all weights.
        blocks, num_blocks: active and all blocks, 0 where the layer was left as it is.
        slots: places that ``values`` has for blocks; those beyond ``blocks`` are idle, but take memory and travel with
            a reduction of gradients.
        reason: why it was left as it is, or None.
        counted: whether :attr:`SparsifyReport.density` counts it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    active: int
    size: int
    blocks: int
    num_blocks: int
    slots: int
    reason: str | None
    counted: bool

    @property
    def density(self) -> float:
        """Active weights over all weights; 1 for a lazy layer, which has none yet."""
        return self.active / self.size if self.size else 1.0


@dataclass(frozen=True)
class SparsifyReport:
    """What :func:`ddst.sparsify` did; prints as a table.

    Attributes:
        layers: every convolution and linear layer of the model, in module order.
    """

    layers: tuple[LayerReport, ...]

    @property
    def density(self) -> float:
        """``Σ active / Σ size`` over the layers that the distribution counts: the density that was asked for.

        With ERK every layer of a kind that has a sparse twin and is not excluded, those left dense with density 1;
        otherwise the swapped.
        """
        return _share([layer for layer in self.layers if layer.counted])

    @property
    def model_density(self) -> float:
        """``Σ active / Σ size`` over all convolution and linear layers, excluded and unsupported ones too."""
        return _share(list(self.layers))

    def __str__(self) -> str:
        rows = [("layer", "kind", "weight", "density", "blocks", "")]
        for layer in self.layers:
            blocks = f"{layer.blocks}/{layer.num_blocks}" if layer.num_blocks else "-"
            idle = f"{layer.slots - layer.blocks} slots in reserve" if layer.slots > layer.blocks else ""
            note = f"left as it is: {layer.reason}" if layer.reason else idle
            shape = "x".join(map(str, layer.shape))
            rows.append((layer.name, layer.kind, shape, f"{layer.density:.4f}", blocks, note))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for row in rows:
            left = [row[i].ljust(widths[i]) for i in range(3)] + [row[i].rjust(widths[i]) for i in (3, 4)]
            lines.append("  ".join([*left, row[5]]).rstrip())
        lines.insert(1, "-" * max(map(len, lines)))
        swapped = sum(layer.reason is None for layer in self.layers)
        lines.append(
            f"{swapped} of {len(self.layers)} layers sparse; density {self.density:.4f}, "
            f"of all convolution and linear weights {self.model_density:.4f}"
        )
        return "\n".join(lines)


def _share(layers: list[LayerReport]) -> float:
    return sum(layer.active for layer in layers) / max(1, sum(layer.size for layer in layers))
