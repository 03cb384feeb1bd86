"""Everything that is measured: the layers of the networks, and the cases (a layer in one setting) made of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

OPS = ("conv2d", "linear", "gan")
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
BATCHES = (16, 64)
BLOCKS = ((8, 8), (16, 16), (32, 32), (64, 64), (16, 4), (16, 1))
MASKS = ("random", "skewed")
#: What each operator is compared with; "dense" is always the faster of NCHW and channels_last for every pass.
BASELINES = {"conv2d": ("dense", "masked"), "linear": ("dense", "masked", "bsr", "csr"), "gan": ("dense",)}
#: Other packages, measured where --baseline names them and they are installed (`peers.py`): a step, no single passes.
PEERS = {"conv2d": ("sparseprop",), "linear": ("sparseprop", "sparselab"), "gan": ()}
SKEW = 4.0  # in a skewed mask, the fullest block row has so many times the blocks of the emptiest


@dataclass(frozen=True)
class Layer:
    """A convolution over images of size x size (padding as 'same' has it at stride 1), or a linear layer (size 0).

    With ``dims=1`` the images have one row, of ``size`` positions.

    >>> Layer(128, 256, 4, 32, stride=2).name, Layer(256, 256, 7, 512, dilation=3, dims=1).name
    ('conv4x4s2-128-256-32', 'conv1d7d3-256-256-512')
    """

    in_channels: int
    out_channels: int
    kernel: int = 1
    size: int = 0
    stride: int = 1
    dilation: int = 1
    dims: int = 2
    transposed: bool = False

    @property
    def op(self) -> str:
        """ "linear" or "conv2d"."""
        return "conv2d" if self.size else "linear"

    @property
    def name(self) -> str:
        """How the command line calls it: kind, input channels, output channels, size."""
        if not self.size:
            return f"linear-{self.in_channels}-{self.out_channels}"
        kind = "convt" if self.transposed else "conv"
        kind += f"1d{self.kernel}" if self.dims == 1 else f"{self.kernel}x{self.kernel}"
        kind += (f"s{self.stride}" if self.stride > 1 else "") + (f"d{self.dilation}" if self.dilation > 1 else "")
        return f"{kind}-{self.in_channels}-{self.out_channels}-{self.size}"

    def sides(self, length: int, row: int) -> list[int]:
        """``[vertical, horizontal]`` of a length along a side; ``row`` is what the one row of signals has for it."""
        return [length if self.dims == 2 else row, length]

    @property
    def weight_shape(self) -> list[int]:
        """Shape of the dense weight."""
        shape = [self.out_channels, self.in_channels]
        if self.transposed:
            shape.reverse()
        return [*shape, *self.sides(self.kernel, 1)] if self.size else shape

    @property
    def padding(self) -> int:
        """Padding on each side."""
        return (self.kernel - 1) * self.dilation // 2

    @property
    def out_size(self) -> int:
        """Side of the output image."""
        reach = (self.kernel - 1) * self.dilation + 1
        if self.transposed:
            return (self.size - 1) * self.stride - 2 * self.padding + reach
        return (self.size + 2 * self.padding - reach) // self.stride + 1

    @property
    def is_plain(self) -> bool:
        """Whether it is linear or a 2-D convolution, neither transposed nor dilated."""
        return not self.transposed and (self.dims, self.dilation) == (2, 1)


def _conv(*sizes: int, of: tuple[int, int], kernel: int = 3, stride: int = 1) -> list[Layer]:
    return [Layer(of[0], of[1], kernel, size, stride) for size in sizes]


#: Network -> its different layers. The layers of one shape are listed once. A transposed convolution (DCGAN's G) is
#: listed as the convolution it is the transpose of: their three passes are the same three computations.
NETWORKS: dict[str, list[Layer]] = {
    # The shapes that the project's targets are stated for; the last of each line occur in none of the networks.
    "targets": [
        *_conv(8, 16, 32, of=(256, 256)),
        *_conv(8, 16, 32, of=(128, 128)),
        *_conv(32, of=(256, 256), kernel=1),
        Layer(128, 4096),
        Layer(1024, 1024),
    ],
    # The shapes that the targets on GPUs are stated for.
    "gpu-targets": [
        *_conv(16, 32, of=(256, 256)),
        *_conv(32, of=(128, 128)),
        *_conv(32, of=(768, 384)),
        Layer(4096, 4096),
    ],
    "sngan32-g": [
        Layer(128, 4096),
        *_conv(8, 16, 32, of=(256, 256)),
        *_conv(4, 8, 16, of=(256, 256), kernel=1),
        *_conv(32, of=(256, 3)),
    ],
    "sngan32-d": [
        *_conv(32, of=(3, 128)),
        *_conv(8, 16, 32, of=(128, 128)),
        *_conv(16, of=(3, 128), kernel=1),
        *_conv(8, of=(128, 128), kernel=1),
        Layer(128, 1),
    ],
    "sngan48-g": [
        Layer(128, 18432),
        *(layer for c, size in ((512, 12), (256, 24), (128, 48)) for layer in _conv(size, of=(c, c // 2))),
        *(layer for c, size in ((256, 12), (128, 24), (64, 48)) for layer in _conv(size, of=(c, c))),
        *(layer for c, size in ((512, 6), (256, 12), (128, 24)) for layer in _conv(size, of=(c, c // 2), kernel=1)),
        *_conv(48, of=(64, 3)),
    ],
    "sngan48-d": [
        *_conv(48, of=(3, 128)),
        *_conv(12, 24, 48, of=(128, 128)),
        *_conv(24, of=(3, 128), kernel=1),
        *_conv(12, of=(128, 128), kernel=1),
        Layer(128, 1),
    ],
    "biggan32-g": [
        Layer(128, 4096),
        *_conv(8, 16, 32, of=(256, 256)),
        *_conv(8, 16, 32, of=(256, 256), kernel=1),
        *_conv(32, of=(256, 3)),
    ],
    "biggan32-d": [
        *_conv(32, of=(3, 256)),
        *_conv(8, 16, 32, of=(256, 256)),
        *_conv(16, of=(3, 256), kernel=1),
        *_conv(16, of=(256, 256), kernel=1),
        Layer(256, 1),
    ],
    "dcgan32-g": [
        Layer(128, 8192),
        *(
            layer
            for c, size in ((512, 8), (256, 16), (128, 32))
            for layer in _conv(size, of=(c // 2, c), kernel=4, stride=2)
        ),
        *_conv(32, of=(64, 3)),
    ],
    "dcgan32-d": [
        *_conv(32, of=(3, 64)),
        *(layer for c, size in ((64, 16), (128, 8), (256, 4)) for layer in _conv(size, of=(c, 2 * c))),
        *(layer for c, size in ((64, 32), (128, 16), (256, 8)) for layer in _conv(size, of=(c, c), kernel=4, stride=2)),
        Layer(8192, 1),
    ],
}

#: Name -> layer, each once.
LAYERS: dict[str, Layer] = {layer.name: layer for layers in NETWORKS.values() for layer in layers}

#: How a layer of one's own shape is named, as `Layer.name` does.
GRAMMAR = (
    "conv<K>x<K>[s<S>][d<D>]-<in>-<out>-<size> is a convolution with kernel K x K, stride S and dilation D (1 without "
    "them) and padding D (K - 1) // 2, of <in> to <out> channels on images of size x size; conv1d<K>... one of signals "
    "of that length, convt<K>x<K>... and convt1d<K>... are transposed ones; linear-<in>-<out> is a linear layer"
)
_CONV = re.compile(r"conv(t?)(1d)?(\d+)(?:x(\d+))?(?:s(\d+))?(?:d(\d+))?-(\d+)-(\d+)-(\d+)")
_LINEAR = re.compile(r"linear-(\d+)-(\d+)")


def layer_of(name: str) -> Layer:
    """The layer that a name describes, listed or not.

    Raises:
        ValueError: no such name, or a layer that cannot be.

    >>> layer_of("conv3x3-192-320-24")
    Layer(in_channels=192, out_channels=320, kernel=3, size=24, stride=1, dilation=1, dims=2, transposed=False)
    """
    if name in LAYERS:
        return LAYERS[name]
    conv, linear = _CONV.fullmatch(name), _LINEAR.fullmatch(name)
    if not linear and (not conv or (conv[2] is None) == (conv[4] is None)):
        raise ValueError(f"layer must be named as in {GRAMMAR}; got {name!r}")
    numbers = [int(n or 1) for n in (linear.groups() if linear else conv.groups()[2:] if conv else ())]
    if 0 in numbers:
        raise ValueError(f"layer {name!r}: every number must be at least 1")
    if not conv:
        return Layer(*numbers)
    kernel, width, stride, dilation, into, out, size = numbers
    layer = Layer(into, out, kernel, size, stride, dilation, 1 if conv[2] else 2, bool(conv[1]))
    if conv[4] and width != kernel:
        raise ValueError(f"layer {name!r}: the kernel must be square, got {kernel}x{width}")
    if layer.out_size < 1:
        raise ValueError(f"layer {name!r}: a kernel of {kernel} does not fit into {size} pixels and padding")
    return layer


#: Whole models for the operator "gan": name -> settings of `ddst train`.
GANS: dict[str, dict[str, object]] = {
    "sngan32": {"preset": "sngan32"},
    "sngan48": {"preset": "sngan48"},
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        op: "conv2d", "linear" or "gan". layer: its name, as :func:`layer_of` takes it, for "gan" in :data:`GANS`.
        block: rows and columns of the weight, so ``(b_in, b_out)`` of a transposed convolution.
        baselines: what it is compared with.
    """

    op: str
    layer: str
    batch: int
    density: float
    block: tuple[int, int] = (16, 16)
    mask: str = "random"
    dtype: str = "float32"
    device: str = "cpu"
    baselines: tuple[str, ...] = ("dense",)

    def __str__(self) -> str:
        block = f"{self.block[0]}x{self.block[1]}"
        return f"{self.layer} batch {self.batch} {100 * self.density:g} % {block} {self.mask}"


def layers_of(names: Sequence[str]) -> list[str]:
    """Names of layers and GANs, from names of these and of networks ("all": every listed layer); each once.

    Raises:
        ValueError: an unknown name.

    >>> layers_of(["sngan32-d", "linear-128-1"])[-2:]
    ['conv1x1-128-128-8', 'linear-128-1']
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "all":
            found.update(dict.fromkeys(LAYERS))
        elif name in NETWORKS:
            found.update(dict.fromkeys(layer.name for layer in NETWORKS[name]))
        elif name in GANS:
            found[name] = None
        else:
            try:
                found[layer_of(name).name] = None
            except ValueError as error:
                raise ValueError(f"{error}, or be one of {', '.join(['all', *NETWORKS, *GANS])}") from None
    return list(found)


def cases(
    layers: Sequence[str] = ("all",),
    *,
    ops: Sequence[str] = OPS,
    batches: Sequence[int] = BATCHES,
    densities: Sequence[float] = DENSITIES,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    masks: Sequence[str] = MASKS,
    dtype: str = "float32",
    device: str = "cpu",
    baselines: Sequence[str] | None = None,
) -> list[Case]:
    """Every combination, layers first; those that cannot be are left out.

    A layer with fewer channels than the block is no case (``ddst.sparsify`` leaves it dense), nor is a skewed mask at
    density 1, nor a skewed GAN.

    >>> len(cases(["targets"], batches=[16], blocks=[(16, 16)], masks=["random"]))
    54
    """
    found = []
    for name, batch, density, block, mask in itertools.product(layers_of(layers), batches, densities, blocks, masks):
        layer = None if name in GANS else layer_of(name)
        op = "gan" if layer is None else layer.op
        if op == "gan" and mask != "random":
            continue
        if layer is not None and (layer.weight_shape[0] < block[0] or layer.weight_shape[1] < block[1]):
            continue
        if op not in ops or (mask == "skewed" and density == 1.0):
            continue
        against = tuple(b for b in BASELINES[op] if baselines is None or b in baselines)
        against += tuple(peer for peer in PEERS[op] if baselines is not None and peer in baselines)
        found.append(Case(op, name, batch, density, block, mask, dtype, device, against))
    return found


#: What `make bench` and the command line without arguments measure.
QUICK = cases(
    ["conv3x3-256-256-16", "conv3x3-128-128-8", "conv1x1-256-256-16", "linear-128-4096"],
    batches=[16],
    densities=[0.1, 0.3],
    blocks=[(16, 16)],
    masks=["random"],
)
