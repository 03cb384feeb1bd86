"""float32 in full precision by the CUDA kernels ("3xTF32"): all passes, on the emulator, whose mma cuts sums off."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddst import _extension
from ddst import topology as tp
from ddst.ops.cuda import compiled, gather, weight_grad
from helpers import emulated_weight_grad, emulation
from helpers.emulated_gather import EmulatedOps
from helpers.slots import scatter
from helpers.tolerances import TOLERANCES, assert_close, relative_error

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
BLOCKS = emulated_weight_grad.BLOCKS
ONE = (1, 1)
SM90 = gather.Device(1, 227 * 1024, (9, 0))


@pytest.fixture(scope="module")
def libraries(request: pytest.FixtureRequest) -> SimpleNamespace:
    folder = Path(request.config.cache.mkdir("cuda"))
    gather, weight_grad = (
        emulation.compile_program(emulation.TESTS / f"{name}_library.cpp", folder, "-shared", "-fPIC")
        for name in ("gather", "weight_grad")
    )
    ops = EmulatedOps(gather)
    return SimpleNamespace(
        gather=ops,
        conv2d_gather=ops.conv2d_gather,
        conv2d_weight_grad=emulated_weight_grad.Library(weight_grad).conv2d_weight_grad,
    )


@pytest.fixture(autouse=True)
def ops(libraries: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedOps]:
    """``torch.ops.ddst_cuda`` on the CPU, while torch allows no TF32; the emulated gather, which counts its calls."""
    libraries.gather.calls = []
    monkeypatch.setattr(torch.ops, "ddst_cuda", libraries)
    monkeypatch.setattr(gather, "facts", lambda device: SM90)
    monkeypatch.setattr(gather, "library", lambda: libraries.gather.library)
    monkeypatch.setattr(weight_grad, "_device", lambda index: emulated_weight_grad.DEVICE)
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    allow_tf32(convolution=False, linear=False)
    yield libraries.gather
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


def allow_tf32(*, convolution: bool, linear: bool) -> None:
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolution, linear


class Layer:
    """A convolution and its operands; all passes by the CUDA kernels and by torch in float64."""

    def __init__(self, images, size, channels, kernel, block, stride=ONE, padding=(0, 0), density=0.5, seed=0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.shape, self.block, self.stride, self.padding = (*channels, *kernel), block, stride, padding
        self.mask = torch.rand(tp.mask_shape(self.shape, block), generator=g) < density
        self.slots = scatter(self.mask, free=2, seed=seed)
        self.topology = self.slots.topology
        self.values = self.slots.spread(tp.pack(torch.randn(self.shape, generator=g), self.mask, block))
        self.x = torch.randn(images, channels[1], *size, generator=g)
        out = [(size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)]
        self.gy = torch.randn(images, channels[0], *out, generator=g)

    def change(self, function) -> None:
        """Applies a function to every operand; what lies outside of the weight stays zero."""
        self.x, self.gy = function(self.x), function(self.gy)
        self.values = self.slots.spread(tp.pack(function(self.weight), self.mask, self.block))

    @property
    def weight(self) -> Tensor:
        return tp.unpack(self.values[self.slots.of_block], self.mask, self.shape)

    def passes(self) -> dict[str, Tensor]:
        window = (self.stride, self.padding, ONE)
        return {
            "y": compiled.conv2d(self.x, self.values, None, self.topology, self.shape, *window, True),
            "gx": compiled.conv2d_input_grad(
                self.gy, self.values, self.topology, self.shape, self.x.shape[2:], *window, True
            ),
            "gw": compiled.conv2d_weight_grad(self.gy, self.x, self.topology, self.shape, self.block, *window),
        }

    def expected(self) -> dict[str, Tensor]:
        weight, x, gy = self.weight.double(), self.x.double(), self.gy.double()
        window = (self.stride, self.padding)
        gw = torch.nn.grad.conv2d_weight(x, self.shape, gy, *window)
        return {
            "y": F.conv2d(x, weight, None, *window),
            "gx": torch.nn.grad.conv2d_input(x.shape, weight, gy, *window),
            "gw": self.slots.spread(tp.pack(gw, self.mask, self.block), fill=0.0),
        }


def check(layer: Layer) -> None:
    expected = layer.expected()
    for name, got in layer.passes().items():
        assert got.dtype == torch.float32
        assert_close(got, expected[name], name)


def test_random_problems_meet_the_tolerance_of_float32(ops: EmulatedOps) -> None:
    rng = random.Random(5)
    for seed in range(25):
        kernel = rng.choice([ONE, (3, 3), (4, 4), (2, 3)])
        stride, padding = (rng.randint(1, 2), rng.randint(1, 2)), (rng.randint(0, 2), rng.randint(0, 2))
        size = (rng.randint(kernel[0], 10), rng.randint(kernel[1], 10))
        channels = (4 * rng.randint(1, 25), 4 * rng.randint(1, 25))
        density = rng.choice([0.1, 0.5, 1.0])
        check(Layer(rng.randint(1, 4), size, channels, kernel, rng.choice(BLOCKS), stride, padding, density, seed))
    assert not any(ops.calls)


def test_long_sums_of_one_sign_meet_the_tolerance() -> None:
    """Sums that are cut off at every product drift by 3.5·10⁻⁵ here; those rounded do not."""
    layer = Layer(9, (8, 8), (16, 512), (3, 3), (16, 64), padding=ONE, density=1.0)
    layer.change(torch.abs)
    check(layer)


def test_the_large_tile_is_not_for_full_float32(ops: EmulatedOps) -> None:
    layer = Layer(1, (20, 20), (80, 16), ONE, (16, 16))
    layer.passes()
    assert ops.calls == [False, False]
    allow_tf32(convolution=True, linear=False)
    layer.passes()
    assert ops.calls == [False, False, True, False]


def test_whole_numbers_are_exact() -> None:
    layer = Layer(2, (7, 6), (40, 36), (3, 3), (32, 16), padding=ONE)
    layer.change(lambda tensor: (tensor * 100).round())
    expected = layer.expected()
    for name, got in layer.passes().items():
        assert torch.equal(got.double(), expected[name]), name


def test_zeros_stay_zeros() -> None:
    layer = Layer(2, (6, 6), (32, 32), (3, 3), (16, 16), padding=ONE)
    layer.x.zero_(), layer.gy.zero_()
    assert all(bool((got == 0).all()) for got in layer.passes().values())


@pytest.mark.parametrize("where", ["x", "values", "gy", "both"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.0e38, 1e-44], ids=str)
def test_numbers_at_the_ends_come_out_as_in_float32(value: float, where: str) -> None:
    """64 pixels: a whole tile, beyond which nothing is multiplied by zero. 1 is its own high part: its rest is zero."""
    layer = Layer(1, (8, 8), (32, 32), ONE, (16, 16), density=1.0)
    first = layer.slots.of_block[0]
    layer.values[first, :, 5], layer.x[0, 7], layer.gy[0, 9] = 1.0, 1.0, -1.0
    if where in ("x", "both"):
        layer.x[0, 5, 1, 2] = value
    if where in ("values", "both"):
        layer.values[first, 3, 5] = value
    if where in ("gy", "both"):
        layer.gy[0, 3, 1, 2] = value
    expected = layer.expected()
    for name, got in layer.passes().items():
        want = expected[name].float()
        assert torch.equal(got.isfinite(), want.isfinite()), name
        if value == 3e38 and where == "both":  # a product that overflows may come out as NaN
            continue
        assert torch.equal(got.isnan(), want.isnan()), name
        assert torch.equal(got.isposinf(), want.isposinf()) and torch.equal(got.isneginf(), want.isneginf()), name
        finite = want.isfinite()
        ordinary = finite & (want.abs() < 1e30)
        assert_close(got[ordinary], want[ordinary], name)
        assert_close(got[finite & ~ordinary], want[finite & ~ordinary], name)


@pytest.mark.parametrize("linear", [False, True])
def test_torch_decides_about_tf32(linear: bool) -> None:
    layer = Layer(40, ONE, (48, 64), ONE, (16, 16), density=0.7)
    expected = layer.expected()
    for convolutions, linears in [(True, False), (False, True)]:
        allow_tf32(convolution=convolutions, linear=linears)
        got = _linear_passes(layer) if linear else layer.passes()
        for name, result in got.items():
            error = relative_error(result.view_as(expected[name]), expected[name])
            exact = error.within(TOLERANCES[torch.float32])
            assert exact == (linears if not linear else convolutions), (name, error)
            assert error.rms < 1e-3, name


def _linear_passes(layer: Layer) -> dict[str, Tensor]:
    x, gy, shape = layer.x[:, :, 0, 0], layer.gy[:, :, 0, 0], layer.shape[:2]
    topology = layer.topology
    return {
        "y": compiled.linear(x, layer.values, None, topology, shape),
        "gx": compiled.linear_input_grad(gy, layer.values, topology, shape),
        "gw": compiled.linear_weight_grad(gy, x, topology, shape, layer.block),
    }


def test_both_precisions_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "cuda_kernels_loaded", lambda: True)
    for allowed in (False, True):
        allow_tf32(convolution=allowed, linear=not allowed)
        for op in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad", "linear", "linear_weight_grad"):
            shape = (64, 64) if op.startswith("linear") else (64, 64, 3, 3)
            assert compiled.supports(op, torch.device("cuda:0"), torch.float32, shape, (32, 16)) == (True, "")
