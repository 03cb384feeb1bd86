"""Tiny training runs: settings, and comparison of what two runs left behind."""

from pathlib import Path
from typing import Any

import torch

from ddst.gan import PRESETS
from ddst.train.checkpoint import load_checkpoint
from ddst.train.config import OPTIONS
from ddst.train.log import read_log
from ddst.train.without_effect import MEASURED

# The smallest run in which everything happens: 8x8 digits, layers of 2x2 blocks and nine taps, topology updates at 4, 8
# and 12, decisions at 5 and 10, a window of 3.
TINY: dict[str, Any] = {
    "data_cache": "none",
    "resolution": 8,
    "width_g": 16,
    "width_d": 16,
    "latent": 16,
    "block": (8, 8),
    "density": 0.3,
    "batch": 4,
    "d_steps": 2,
    "steps": 14,
    "interval_g": 4,
    "interval_d": 5,
    "br_every": 1,
    "br_window": 3,
    "warmup": 0,
    "sample_every": 6,
    "checkpoint_every": 5,
    "compare_steps": 0,
    "fd_samples": 40,
    "threads": 1,
}


def tiny(**settings: Any) -> dict[str, Any]:
    """`TINY` with these settings, without those that do nothing beside them."""
    both = {**TINY, **settings}
    method = both.get("method", OPTIONS["method"].default)
    had = {k: v for k, v in both.items() if OPTIONS[k].methods is None or method in OPTIONS[k].methods}
    if not PRESETS[method].steers_d and "algorithm_d" not in had:
        had.pop("interval_d", None)
    if both.get("data", "digits") not in MEASURED and not both.get("inception"):
        had.pop("fd_samples")
    return had


def log_without_seconds(out: Path) -> list[dict[str, Any]]:
    """The log's entries without the one field that may differ between equal runs."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in read_log(out / "log.jsonl")]


def checkpoint_of(out: Path) -> dict[str, Any]:
    """The checkpoint without what says where and how long it ran."""
    state = load_checkpoint(out / "checkpoint.pt")
    for name in ("seconds", "log"):
        state.pop(name)
    return state


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Paths at which two nested states are not the same bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for k in a for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: length {len(a)} and {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}[{i}]")]
    return [] if type(a) is type(b) and a == b else [f"{where}: {a!r} and {b!r}"]
