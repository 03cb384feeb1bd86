"""The report of a conversion: a row for every weight, and what is left of weights, multiply-adds and time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..nn import SparseLayer
from .advice_report import BlockAdvice
from .candidates import Candidate
from .table import fitted


@dataclass(frozen=True)
class LayerReport:
    """What :func:`ddst.sparsify` did with one weight: that of a layer, or another parameter that acts as one.

    Attributes:
        name: first dotted name of the layer, or of the parameter. kind: class of its module. shape: of the dense
            weight.
        active: active weights. size: all weights.
        blocks, num_blocks: active and all blocks, 0 where the weight was left as it is.
        slots: places that ``values`` has for blocks; those beyond ``blocks`` are idle, but take memory and travel with
            a reduction of gradients.
        reason: why it was left as it is, or None.
        counted: whether :attr:`SparsifyReport.density` counts it.
        multiply_adds: of a forward pass of the sample with all weights active (weights × output positions × calls),
            see :func:`~ddst.convert.watch.multiply_adds`; None without a sample.
        dense_seconds, seconds: of its part in a training step, dense and as it is now, on the scale of
            ``SparsifyReport.dense_seconds``; None where it was not measured.
        note: of a weight packed in a module that computes in its own way: which code makes it dense, if any does.
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
    multiply_adds: float | None = None
    dense_seconds: float | None = None
    seconds: float | None = None
    note: str = ""

    @property
    def density(self) -> float:
        """Active weights over all weights; 1 for a lazy layer, which has none yet."""
        return self.active / self.size if self.size else 1.0


@dataclass(frozen=True)
class SparsifyReport:
    """What :func:`ddst.sparsify` did; prints as a table.

    Attributes:
        layers: a row for every convolution and linear layer of the model and every other parameter that acts as a
            weight (:func:`~ddst.convert.find_weights`), in module order.
        dense_seconds: of a training step of the dense model, as measured; None if it was not.
    """

    layers: tuple[LayerReport, ...]
    dense_seconds: float | None = None

    @property
    def density(self) -> float:
        """``Σ active / Σ size`` over the layers that the distribution counts: the density that was asked for.

        With "erk" every layer of a kind that has a sparse twin and is not excluded, those left dense with density 1;
        with "work" every weight that is not excluded (whose share of multiply-adds was asked for); otherwise the
        swapped layers.
        """
        return _share([layer for layer in self.layers if layer.counted])

    @property
    def model_density(self) -> float:
        """``Σ active / Σ size`` over every weight of the model, excluded and unsupported ones too; what
        :attr:`ddst.DDST.density_g` and its controller count.
        """
        return _share(list(self.layers))

    @property
    def multiply_adds_left(self) -> float | None:
        """``Σ density · multiply_adds / Σ multiply_adds`` over every weight; None without a sample, or where it reached
        none.
        """
        whole = sum(layer.multiply_adds or 0.0 for layer in self.layers)
        return sum(layer.density * (layer.multiply_adds or 0.0) for layer in self.layers) / whole if whole else None

    @property
    def time_left(self) -> float | None:
        """``1 − Σ (dense_seconds − seconds) / dense_seconds of the model``: the share of a dense training step that is
        left by what was measured, everything that is not a sparse layer as before; None where nothing was measured.
        """
        if self.dense_seconds is None:
            return None
        saved = sum((layer.dense_seconds or 0.0) - (layer.seconds or 0.0) for layer in self.layers)
        return 1.0 - min(saved / self.dense_seconds, 0.99)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold.

        Returns:
            ``density``, ``model_density``, ``multiply_adds_left``, ``time_left``, ``dense_seconds`` (see there),
            ``sparse`` (number of rows swapped), and ``layers``: for each row its attributes and its
            ``density``.

        >>> import ddst
        >>> from torch import nn
        >>> found = ddst.sparsify(nn.Sequential(nn.Linear(64, 64)), 0.25).to_dict()
        >>> found["density"], found["time_left"], found["layers"][0]["shape"]
        (0.25, None, [64, 64])
        """
        return {
            "density": self.density,
            "model_density": self.model_density,
            "multiply_adds_left": self.multiply_adds_left,
            "time_left": self.time_left,
            "dense_seconds": self.dense_seconds,
            "sparse": self._sparse,
            "layers": [
                {**asdict(layer), "shape": list(layer.shape), "density": layer.density} for layer in self.layers
            ],
        }

    @property
    def _sparse(self) -> int:
        return sum(layer.reason is None for layer in self.layers)

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size((100, 24)).columns)

    def text(self, width: int) -> str:
        """The table in lines of at most ``width`` characters (more only where the numbers alone need more, up to 60):
        long names are shortened in their middle, reasons wrapped.

        ``work`` and ``time`` are the row's multiply-adds and seconds now, over those of the whole dense model.
        """
        whole = sum(layer.multiply_adds or 0.0 for layer in self.layers)
        columns = ["layer", "kind", "weight", "density", "blocks"]
        columns += ["work"] * (whole > 0) + ["time"] * (self.dense_seconds is not None)
        rows = [(*columns, "")]
        for layer in self.layers:
            row = [layer.name, layer.kind, "x".join(map(str, layer.shape)), f"{layer.density:.4f}"]
            row.append(f"{layer.blocks}/{layer.num_blocks}" if layer.num_blocks else "-")
            if whole:
                row.append(f"{layer.density * (layer.multiply_adds or 0.0) / whole:.4f}")
            if self.dense_seconds is not None:
                row.append("-" if layer.seconds is None else f"{layer.seconds / self.dense_seconds:.4f}")
            idle = f"{layer.slots - layer.blocks} slots in reserve" if layer.slots > layer.blocks else ""
            notes = ", ".join(filter(None, (layer.note, idle)))
            rows.append((*row, f"left as it is: {layer.reason}" if layer.reason else notes))
        parts = [
            f"{self._sparse} of {len(self.layers)} layers sparse; density {self.density:.4f}, "
            f"of all weights {self.model_density:.4f}"
        ]
        if self.multiply_adds_left is not None:
            parts.append(f"of all multiply-adds {self.multiply_adds_left:.4f}")
        if self.time_left is not None:
            parts.append(f"measured step time {self.time_left:.4f}")
        return fitted(rows, "lll" + "r" * (len(columns) - 3), ", ".join(parts), max(width, 20))


def _share(layers: list[LayerReport]) -> float:
    return sum(layer.active for layer in layers) / max(1, sum(layer.size for layer in layers))


def layer_report(
    candidate: Candidate, layer: SparseLayer | None, work: Mapping[str, float] | None, measured: BlockAdvice | None
) -> LayerReport:
    """The row of a candidate, and of the sparse layer in its place.

    Args:
        layer: None where the candidate stays as it is.
        work: multiply-adds by name. measured: with what takes how long.
    """
    c = candidate
    sparse = c.module if isinstance(c.module, SparseLayer) else layer
    times = {one.name: one for one in measured.layers} if measured is not None else {}
    dense_seconds = seconds = None
    if c.name in times:
        timed = times[c.name]
        dense_seconds = timed.calls * timed.dense_seconds
        seconds = dense_seconds - (0.0 if layer is None else timed.saved(layer.nnz / layer.num_blocks))
    return LayerReport(
        c.name,
        c.kind,
        c.shape,
        c.size if sparse is None else sparse.active_weights,
        c.size,
        0 if sparse is None else sparse.nnz,
        0 if sparse is None else sparse.num_blocks,
        0 if sparse is None else sparse.slots,
        c.reason,
        c.counted,
        None if work is None else work[c.name],
        dense_seconds,
        seconds,
        c.note,
    )
