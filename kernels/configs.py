"""How a kernel may be run: the settings that tuning chooses from, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GatherConfig:
    """How the forward pass and the input gradient run (:mod:`.gather`).

    Attributes:
        pixels: pixels per program, 64 or 128. The M of the matrix products.
        fuse: blocks per step of the loop, as one product of depth ``fuse · block``. 4 suits blocks of 16, 2 of 32.
        bits: whether a pixel's bounds tests are made once, for all taps, and kept as bits (kernels of at most 32 taps).
        copy: bytes per asynchronous copy of pixels: 16 go past L1, 8 through it.
        box: None, or the extent ``(images, height, width)`` of the box of ``pixels`` pixels that a program fetches as a
            whole by the tensor memory accelerator (sm_90 and later; forward with stride 1, input gradient; ``fuse`` 1).
        warps, stages: warps per program, steps of the loop in flight.
    """

    pixels: int = 64
    fuse: int = 1
    bits: bool = True
    copy: int = 16
    box: tuple[int, int, int] | None = None
    warps: int = 4
    stages: int = 3


def default_gather(block: tuple[int, int], depth: int) -> GatherConfig:
    """The untuned choice for blocks ``(b_out, b_in)`` of which ``depth`` is the side that is summed over.

    >>> default_gather((16, 16), 16).fuse, default_gather((64, 64), 64).pixels
    (4, 128)
    """
    return GatherConfig(pixels=128 if min(block) == 64 else 64, fuse=max(1, 64 // depth) if max(block) < 64 else 1)
