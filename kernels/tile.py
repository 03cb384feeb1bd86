"""Device functions that the Triton kernels share.

An *entry* is one active block as an index list holds it: ``channel block << 2·BITS | kh << BITS | kw``.
"""

import triton
import triton.language as tl


def divisor(d: int) -> tuple[int, int]:
    """``(ceil(2**(31 + l) / d) wrapped to int32, l)`` with ``l = ceil(log2 d)``, for :func:`divide`.

    The first number exceeds ``2**(31 + l) / d`` by less than 1, so for ``m < 2**31`` the quotient is too large by less
    than ``2**-l``, which is at most ``1 / d``: too little to reach the next whole number.

    >>> divisor(1), divisor(3)
    ((-2147483648, 0), (-1431655765, 2))
    """
    bits = (d - 1).bit_length()
    return -(-(1 << (31 + bits)) // d) - (1 << 32), bits


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``acc + a b`` in float32. UPCAST: the interpreter multiplies the bits of bfloat16 (triton issue 11584)."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def hint(value, MULTIPLE: tl.constexpr):
    """``value``, which is a multiple of MULTIPLE, in a form that lets the compiler see it."""
    return value // MULTIPLE * MULTIPLE


@triton.jit
def pixels(first, COUNT: tl.constexpr, height, width, total):
    """(image, row, column, inside) of COUNT consecutive pixels of images of height × width, ``total`` pixels in all."""
    m = first + tl.arange(0, COUNT)
    t = m // width
    n = t // height
    return n, t - n * height, m - t * width, m < total


@triton.jit
def divide(m, magic, shift):
    """``m // d`` for ``0 <= m < 2**31`` with the two numbers that :func:`divisor` gives for d; exact."""
    q = tl.umulhi((m * 2).to(tl.uint32, bitcast=True), magic.to(tl.uint32, bitcast=True))
    return (q >> shift.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)


@triton.jit
def channel_block(entry, BITS: tl.constexpr):
    """An entry's channel block."""
    return entry >> (2 * BITS)


@triton.jit
def tap(entry, BITS: tl.constexpr):
    """An entry's tap ``(kh, kw)``."""
    return (entry >> BITS) & ((1 << BITS) - 1), entry & ((1 << BITS) - 1)


@triton.jit
def shift(kh, kw, first_h, first_w, DGRAD: tl.constexpr, S_H: tl.constexpr, S_W: tl.constexpr, D_H: tl.constexpr,
          D_W: tl.constexpr):  # fmt: skip
    """Distance in source pixels from a result pixel to the pixel that a tap reads; ``first`` is that of tap 0.

    Forward: ``k · dilation + first``. Input gradient: ``(first - k · dilation) / stride``, exact because the taps of
    a phase are those that divide.
    """
    if DGRAD:
        return (first_h - kh * D_H) // S_H, (first_w - kw * D_W) // S_W
    else:
        return kh * D_H + first_h, kw * D_W + first_w


@triton.jit
def inside(i, j, height, width):
    """Whether the pixel (i, j), which may be negative, lies in an image."""
    return (i.to(tl.uint32, bitcast=True) < height) & (j.to(tl.uint32, bitcast=True) < width)
