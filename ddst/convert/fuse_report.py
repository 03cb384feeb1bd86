"""The report of :func:`ddst.fuse`: a row for every convolution."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import Any

from .table import fitted


@dataclass(frozen=True)
class FusedConv:
    """What is fused with a convolution.

    Attributes:
        name, kind: of the layer.
        before: what it computes as it reads its input, in order: names of norms and activations, "2x" for upsampling.
        after: what it does to its output: "pool", "sum", "sum of 2x" (a residual that it upsamples), "moments" (for the
            norm behind it).
        reason: why not (more), or "".
    """

    name: str
    kind: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    reason: str = ""

    @property
    def fused(self) -> bool:
        """Whether anything is."""
        return bool(self.before or self.after)


@dataclass(frozen=True)
class FuseReport:
    """What :func:`ddst.fuse` found; prints as a table.

    Attributes:
        convs: a row for every convolution of the model in module order, a shared one once.
        untraced: ``{name: why}`` of modules whose code torch.fx could not run; their parts were looked at alone.
    """

    convs: tuple[FusedConv, ...]
    untraced: dict[str, str]

    @property
    def fused(self) -> int:
        """Convolutions that have something fused with them."""
        return sum(conv.fused for conv in self.convs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold: ``fused`` (their number), ``convs`` and ``untraced``."""
        rows = [{**asdict(c), "before": list(c.before), "after": list(c.after)} for c in self.convs]
        return {"fused": self.fused, "convs": rows, "untraced": dict(self.untraced)}

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size((100, 24)).columns)

    def text(self, width: int) -> str:
        """The table in lines of at most ``width`` characters."""
        rows = [("layer", "kind", "before", "after", "")]
        for conv in self.convs:
            note = conv.reason if conv.fused else f"not fused: {conv.reason}"
            rows.append((conv.name, conv.kind, ", ".join(conv.before), ", ".join(conv.after), note))
        parts = [f"{self.fused} of {len(self.convs)} convolutions fused"]
        parts += [f"code of {name or 'the model'} not traced: {why}" for name, why in self.untraced.items()]
        return fitted(rows, "llll", "; ".join(parts), max(width, 20))
