"""What a value that is not computed yet is made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...ops.norm_act_conv2d import Norm

if TYPE_CHECKING:
    from ..conv2d import SparseConv2d

#: A torch function and what it gets beside its first argument.
Step = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


class Mode(NamedTuple):
    """Whether gradients are recorded, and the dtype of autocast, or None where it is off."""

    grad: bool
    autocast: torch.dtype | None


_RECORDING, _NOT_RECORDING = Mode(True, None), Mode(False, None)


def mode_of(device: torch.device) -> Mode:
    """What torch's functions would run in now."""
    kind = device.type
    if torch.is_autocast_enabled(kind):
        return Mode(torch.is_grad_enabled(), torch.get_autocast_dtype(kind))
    return _RECORDING if torch.is_grad_enabled() else _NOT_RECORDING


def in_mode(mode: Mode, device: torch.device) -> AbstractContextManager[Any]:
    """Runs torch's functions in that mode."""
    stack = ExitStack()
    stack.enter_context(torch.set_grad_enabled(mode.grad))
    stack.enter_context(
        torch.autocast(device.type, dtype=mode.autocast or torch.bfloat16, enabled=mode.autocast is not None)
    )
    return stack


def version_of(tensor: Tensor) -> int:
    """Counts the changes in place; compiled code knows none."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def versions_of(*tensors: Tensor | None) -> tuple[int, ...]:
    """Those of all that are there."""
    if torch.compiler.is_compiling():
        return tuple(0 for tensor in tensors if tensor is not None)
    return tuple([0 if t.is_inference() else t._version for t in tensors if t is not None])


class Activated(NamedTuple):
    """``up(act(norm(source)))``.

    Attributes:
        source: ``[N, C, H, W]``.
        mode: in which the last of it was asked for.
        version: of source, when it was. noted: of what the norm holds, when it was.
        moments: of source, if they are known.
        norm: with batch statistics or running ones; gamma and beta, one of which may be missing.
        slope: of the leaky ReLU; 1 for none.
        upsample: 1 or 2.
        steps: torch's functions that make the same of source.
        takes_norm: whether a batch norm of this is put off, too.
        asks: whether a convolution is to wait for its epilogue whatever its plan is.
        shared: whether others may hold source itself, so that changes in place have to be seen there.
    """

    source: Tensor
    mode: Mode
    version: int
    moments: Tensor | None = None
    norm: Norm | None = None
    slope: float = 1.0
    upsample: int = 1
    steps: tuple[Step, ...] = ()
    takes_norm: bool = False
    asks: bool = False
    shared: bool = True
    noted: tuple[int, ...] = ()

    def noting(self) -> Activated:
        """The same with the versions of what the norm holds."""
        return self._replace(noted=self.versions())

    def versions(self) -> tuple[int, ...]:
        """Of mean, variance, gain and shift as they are now."""
        return () if self.norm is None else versions_of(*self.norm[:4])

    @property
    def shape(self) -> tuple[int, ...]:
        n, c, h, w = self.source.shape
        return n, c, h * self.upsample, w * self.upsample

    @property
    def is_doubled(self) -> bool:
        """Whether it is nothing but the source upsampled."""
        return self.norm is None and self.slope == 1 and self.upsample == 2

    def tensor(self) -> Tensor:
        """The value by torch's own functions."""
        if self.steps:
            self.check_source()
        found = self.source
        for function, args, named in self.steps:
            found = function(found, *args, **named)
        return found

    def check_source(self) -> None:
        """Raises where the value is lost."""
        if version_of(self.source) != self.version or self.versions() != self.noted:
            raise lost("the input, a parameter or a buffer")


def lost(what: str) -> RuntimeError:
    """The error of a value that can no longer be computed as it would have been."""
    return RuntimeError(
        f"{what} of a fused norm, activation or convolution was changed in place before its value was read: call "
        "ddst.unfuse(model), or read it before"
    )


class Convolved(NamedTuple):
    """``pool(conv(input))``: a convolution that has been called and waits for its epilogue.

    Attributes:
        layer: the convolution. input: what it reads. values: the packed weight it was called with.
        mode: in which it was called.
        pool: 1 or 2.
        noted: versions of values and bias, when it was called.
    """

    layer: SparseConv2d
    input: Activated
    values: Tensor
    mode: Mode
    pool: int = 1
    noted: tuple[int, ...] = ()

    def check(self) -> None:
        """Raises where the value is lost."""
        self.input.check_source()
        if versions_of(self.values, self.layer.bias) != self.noted:
            raise lost("the weight or bias")
