"""The one table dtype -> tolerance of all tests, and the comparison that uses it.

An error is measured against a float64 reference in two ways: its root mean square relative to that of the reference,
and its maximum relative to the largest entry of the reference. A reference that is all zero must be met exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed relative errors of one dtype."""

    rms: float
    max: float


# Sums of a few thousand products accumulated in fp32 (fp64); half types add the rounding of the result only.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(rms=1e-14, max=4e-14),
    torch.float32: Tolerance(rms=1e-6, max=4e-6),
    torch.float16: Tolerance(rms=4e-4, max=8e-4),
    torch.bfloat16: Tolerance(rms=3e-3, max=6e-3),
}


@dataclass(frozen=True)
class Error:
    """Relative errors of a result: root mean square, and maximum."""

    rms: float
    max: float

    def within(self, tolerance: Tolerance) -> bool:
        """True where both errors are allowed; a NaN never is."""
        return self.rms <= tolerance.rms and self.max <= tolerance.max


def relative_error(actual: Tensor, expected: Tensor, terms: Tensor | None = None) -> Error:
    """Errors of `actual` relative to the float64 reference `expected` of the same shape (infinite for a NaN).

    `terms`, root sums of squares of what each entry is a sum of, are what it is relative to where they are larger: a
    result of few entries may happen to be small, as a difference of sums that are not.
    """
    if expected.numel() == 0:
        return Error(0.0, 0.0)
    reference = expected.detach().to(torch.float64)
    difference = actual.detach().to(torch.float64) - reference
    rms, largest = difference.square().mean().sqrt().item(), difference.abs().max().item()
    scale_rms, scale_max = reference.square().mean().sqrt().item(), reference.abs().max().item()
    if rms != rms:
        return Error(float("inf"), float("inf"))
    if scale_max == 0.0:
        return Error(0.0, 0.0) if largest == 0.0 else Error(float("inf"), float("inf"))
    if terms is not None:
        scale_rms = max(scale_rms, terms.square().mean().sqrt().item())
        scale_max = max(scale_max, terms.abs().max().item())
    return Error(rms / scale_rms, largest / scale_max)


def assert_close(actual: Tensor, expected: Tensor, what: str = "result", dtype: torch.dtype | None = None) -> None:
    """Fails unless `actual` has the shape of `expected` and agrees with it as TOLERANCES allows for its own dtype.

    `dtype` compares with another dtype's tolerance, where a result was computed in a coarser type than it is stored in.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    tolerance = TOLERANCES[dtype or actual.dtype]
    error = relative_error(actual, expected)
    assert error.within(tolerance), (
        f"{what}: relative error rms {error.rms:.3g} (allowed {tolerance.rms:.3g}), "
        f"max {error.max:.3g} (allowed {tolerance.max:.3g})"
    )
