"""Which passes run on the kernels for sm_90a, in which form, and with what: by their own plans, which need no GPU."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddst import topology as tp
from ddst.ops.cuda import compiled, gather, hopper, hopper_weight_grad
from ddst.ops.cuda import weight_grad as cwg
from ddst.ops.cuda.gather_problem import Device, Window
from helpers import emulation

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
H100 = Device(132, 227 * 1024, (9, 0))
SHAPE, BLOCK, WINDOW = (256, 256, 3, 3), (16, 16), Window((32, 32), (1, 1), (1, 1))


@pytest.fixture(scope="module")
def plans(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The functions of libddst_cuda.so that say what the kernels would do."""
    folder = Path(request.config.cache.mkdir("cuda"))
    first, second = (emulation.KERNELS / f"hopper_{name}_plan.cpp" for name in ("gather", "weight_grad"))
    return ctypes.CDLL(str(emulation.compile_program(first, folder, "-shared", "-fPIC", str(second), optimize="-O1")))


class Calls:
    """Stands for ``torch.ops.ddst_cuda``: keeps the arguments, returns an empty result."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Tensor:
            self.made.append((name, arguments))
            if name.endswith("weight_grad"):
                return torch.empty(arguments[2].numel(), *arguments[7])
            shape, size = arguments[6 if name == "hopper_gather" else 5 :][:2]
            return torch.empty(arguments[0].shape[0], *size, shape[0])

        return call


@pytest.fixture
def calls(plans: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """On what says to be an H100."""
    made = Calls()
    monkeypatch.setattr(torch.ops, "ddst_cuda", made)
    monkeypatch.setattr(hopper, "library", lambda: plans)
    monkeypatch.setattr(gather, "facts", lambda device: H100)
    monkeypatch.setattr(gather, "refusal", lambda *_, **__: "")
    monkeypatch.setattr(cwg, "_device", lambda index: cwg.Device(*H100))
    return made


def form(density: float, **changes: Any) -> hopper.Form | None:
    its = {"dtype": torch.bfloat16, "shape": SHAPE, "block": BLOCK, "window": WINDOW, "images": 64, "device": H100}
    its |= {"input_gradient": False} | changes
    first = [its.pop(name) for name in ("dtype", "shape", "block", "window", "images")]
    slots = round(density * math.prod(tp.grid(first[1], first[2])))
    return hopper.form_of(*first, slots, **its)


def test_the_model_chooses_by_density_and_block(calls: Calls) -> None:
    assert form(0.1) == hopper.Form(1, 2, 2), "no zeros are multiplied where most blocks are missing"
    assert form(1.0, block=(64, 64)) == hopper.Form(4, 2), "blocks of 64 channels are there or not as a whole"
    assert form(0.1, images=1) is None, "four tiles are less than the multiprocessors"
    assert form(0.0) is None


def test_the_model_takes_im2col_where_patches_are_large(calls: Calls) -> None:
    """A patch of stride 2 has four parts, one for each parity, whatever the taps that have blocks."""
    strided = Window((28, 28), (2, 2), (1, 1))
    assert form(0.05, window=strided, images=128) == hopper.Form(1, 2, 1, True)
    assert form(0.3, window=strided, images=128) == hopper.Form(1, 2)
    assert form(0.05, window=strided, images=128, input_gradient=True) == hopper.Form(1, 2), "a phase has no stride"
    assert form(0.05, window=strided, images=128, fused=True) in hopper.FORMS[:4], "which changes patches"
    plans = {
        chosen: hopper.plan(
            torch.bfloat16, SHAPE, BLOCK, strided, 128, chosen, input_gradient=False, device=H100
        )[0]
        for chosen in (hopper.FORMS[0], hopper.Form(1, 1, 1, True))
    }  # fmt: skip
    tiles = [cut.tiles for cut in plans.values() if cut is not None]
    assert tiles == [128, -(-128 * 14 * 14 // 256)], "a tile of im2col is any 256 pixels"


def test_the_model_compares_whole_passes(calls: Calls) -> None:
    """A form that fits with many small tiles alone is no way around too few; one that needs fewer is not refused."""
    few = {"shape": (64, 64, 3, 3), "window": Window((8, 8), (1, 2), (1, 1)), "images": 256}
    assert hopper.plan(torch.bfloat16, few["shape"], BLOCK, few["window"], 256, hopper.Form(1, 2, 2),
                       input_gradient=False, device=H100)[0].tiles == 256  # fmt: skip
    assert form(0.1, **few) is None, "the first form has 32"
    fewer = {"shape": (128, 128, 3, 3), "window": Window((28, 28), (2, 2), (1, 1)), "images": 128}
    assert form(0.05, **fewer) == hopper.Form(1, 2, 1, True), "98 tiles, where patches have 128"
    for density in (0.01, 0.05, 0.1, 0.3, 1.0):
        for its in (few, fewer, {"shape": SHAPE, "window": WINDOW, "images": 64}):
            _, why = hopper.choose(torch.bfloat16, its["shape"], BLOCK, its["window"], its["images"], density,
                                   input_gradient=False, device=H100)  # fmt: skip
            assert "inf" not in why


@pytest.mark.parametrize(
    ("chosen", "changes", "why"),
    [
        (hopper.Form(1, 1, 2), {"shape": (256, 40, 3, 3)}, "even number of slices of 16, got 3"),
        (hopper.Form(1, 1, 1, True), {"fused": True}, "a fused half block changes patches"),
        (hopper.Form(1, 2, 1, True), {"window": Window((32, 32), (2, 2), (1, 1)), "input_gradient": True}, "strided"),
        (hopper.Form(4, 1, 2), {}, "products of four granules"),
        (hopper.Form(1, 1, 1, True), {"window": Window((32, 32), (1, 1), (200, 1))}, "lower[1] is -200"),
    ],
)
def test_what_a_form_refuses_is_named(calls: Calls, chosen: hopper.Form, changes: dict[str, Any], why: str) -> None:
    its = {"shape": SHAPE, "window": WINDOW, "input_gradient": False, "fused": False} | changes
    cut, said = hopper.plan(
        torch.bfloat16, its["shape"], BLOCK, its["window"], 64, chosen,
        input_gradient=its["input_gradient"], device=H100, fused=its["fused"],
    )  # fmt: skip
    assert cut is None and why in said
    assert form(0.1, **changes) is not None, "another form takes it"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"device": H100._replace(capability=(8, 0))}, "needs compute capability 9.0, got 8.0"),
        ({"device": H100._replace(capability=(10, 0))}, "needs compute capability 9.0, got 10.0"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16, got torch.float32"),
        ({"fused": True, "halved": True}, "does not upsample what it reads"),
        ({"shape": (256, 256, 5, 5)}, "taps"),
        ({"device": H100._replace(shared_bytes=48 * 1024)}, "shared memory"),
    ],
)
def test_what_is_refused_is_named(calls: Calls, changes: dict[str, Any], why: str) -> None:
    its = {"dtype": torch.bfloat16, "shape": SHAPE, "device": H100, "fused": False, "halved": False} | changes
    plan, said = hopper.plan(
        its["dtype"], its["shape"], BLOCK, WINDOW, 64, hopper.FORMS[0],
        input_gradient=False, device=its["device"], fused=its["fused"], halved=its["halved"],
    )  # fmt: skip
    assert plan is None and why in said
    assert form(0.1, **changes) is None
    with hopper.forced(hopper.FORMS[0]):
        assert form(0.1, **changes) is None, "no form can be forced on what refuses it"


def test_a_library_without_the_kernels_is_named(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (None, "/nowhere/libddst_cuda.so"):
        monkeypatch.setattr(hopper, "library", lambda library=library: ctypes.CDLL(library))
        assert "holds no code for sm_90a" in hopper.device_refusal(torch.bfloat16, (9, 0))
        assert form(0.1) is None


def test_supports_names_operators(calls: Calls) -> None:
    ok, why = hopper.supports("conv2d_input_grad", H100, torch.float16, SHAPE, BLOCK, (2, 2), (1, 1))
    assert ok and not why
    assert hopper.supports("linear", H100, torch.float16, (64, 64), BLOCK)[0]
    assert hopper.supports("norm_act_conv2d", H100, torch.bfloat16, SHAPE, BLOCK, (1, 1), (1, 1))[0]
    ok, why = hopper.supports("conv2d_weight_grad", H100, torch.bfloat16, SHAPE, BLOCK)
    assert not ok and "conv2d_weight_grad does not gather" in why
    assert not hopper.supports("conv2d", H100, torch.bfloat16, SHAPE, (16, 8))[0]


def test_forms_can_be_forced(calls: Calls) -> None:
    for chosen in hopper.FORMS:
        with hopper.forced(chosen):
            assert form(0.1) == chosen and form(0.1, images=1) == chosen
    with hopper.forced("general"):
        assert form(0.1) is None
        with hopper.forced(hopper.Form(4, 1)):
            assert form(0.1) == hopper.Form(4, 1)
        assert form(0.1) is None
    assert form(0.1) is not None
    with pytest.raises(ValueError, match="choice must be 'general' or one of"), hopper.forced("wgmma"):
        pass


def layer(density: float = 0.1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, gradient, values and topology of 256 → 256, 3 × 3 at 32²; one image stands for many."""
    mask = torch.rand(tp.mask_shape(SHAPE, BLOCK), generator=torch.Generator().manual_seed(1)) < density
    x = torch.zeros(64, 256, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return x, x, torch.zeros(int(mask.sum()), *BLOCK, dtype=torch.bfloat16), tp.build_topology(mask)


def test_operators_get_the_lists_of_their_form(calls: Calls) -> None:
    x, gy, values, topology = layer()
    window = ((1, 1), (1, 1), (1, 1))
    compiled.conv2d(x, values, None, topology, SHAPE, *window, True)
    compiled.conv2d_input_grad(gy, values, topology, SHAPE, (32, 32), *window, True)
    compiled.conv2d_weight_grad(gy, x, topology, SHAPE, BLOCK, *window)
    names, arguments = zip(*calls.made, strict=True)
    assert names == ("hopper_gather", "hopper_gather", "hopper_weight_grad")
    for at, input_gradient in enumerate((False, True)):
        records, order = arguments[at][2:4]
        assert records.shape == (2 * 16 * 88,) and order.sort()[0].tolist() == [0, 1]
        assert arguments[at][10:] == (input_gradient, False, 1, 2, 2, False, False, *[None] * 4, 1.0, 1, 1, 1)
        assert int(records.view(32, 88)[:, 0].sum()) == values.shape[0], "every block is listed once"
    units, tile = arguments[2][5], arguments[2][12]
    assert units.numel() % (16 * 8) == 0 and math.prod(tile) == 64
    assert sorted(units[units >= 0].tolist()) == list(range(values.shape[0]))
    with hopper.forced("general"):
        compiled.conv2d(x, values, None, topology, SHAPE, *window, True)
        compiled.conv2d_weight_grad(gy, x, topology, SHAPE, BLOCK, *window)
    assert [name for name, _ in calls.made[3:]] == ["conv2d_gather", "conv2d_weight_grad"]
    assert calls.made[4][1][5].numel() % (8 * 8) == 0


def test_a_form_keeps_lists_of_its_own(calls: Calls) -> None:
    x, _, values, topology = layer()
    for chosen, listed in ((hopper.Form(1, 1), 1.0), (hopper.Form(4, 2), 3.0)):
        with hopper.forced(chosen):
            compiled.conv2d(x, values, None, topology, SHAPE, (1, 1), (1, 1), (1, 1), True)
        counts = calls.made[-1][1][2].view(32, 88)[:, 0].sum()
        assert listed * values.shape[0] <= counts < (listed + 0.6) * values.shape[0]


GEOMETRY = cwg.Geometry(64, (32, 32), (32, 32), SHAPE, BLOCK, (1, 1), (1, 1), (1, 1))


def test_weight_gradient_plans_fill_the_device_and_fit(calls: Calls) -> None:
    for density in (0.05, 0.1, 0.3, 1.0):
        for shape, block, size in ((SHAPE, BLOCK, 32), ((512, 128, 3, 3), (32, 16), 8), ((64, 64, 4, 4), (64, 64), 4)):
            geometry = GEOMETRY._replace(
                weight_shape=shape, block=block, input_size=(size,) * 2, output_size=(size,) * 2
            )
            slots = max(1, round(density * math.prod(tp.grid(shape, block))))
            plan = hopper_weight_grad.plan(geometry, slots, 2, H100.multiprocessors, H100.shared_bytes)
            assert plan is not None and math.prod(plan.tile) == 64
            facts, why = hopper_weight_grad.facts(geometry, plan.band, plan.tile, 2, False)
            assert facts is not None and not why and facts.shared_bytes <= H100.shared_bytes and facts.stages >= 2
            groups = hopper_weight_grad.expected_groups(geometry, density, plan.band)
            assert plan.shares == max(1, min(H100.multiprocessors // groups, facts.tiles))


def test_weight_gradients_that_are_refused_are_named(calls: Calls) -> None:
    def why(geometry: cwg.Geometry = GEOMETRY, dtype: torch.dtype = torch.bfloat16, **uses: bool) -> str:
        return hopper_weight_grad.refusal(geometry, dtype, (9, 0), **{"fused": False, "halved": False} | uses)

    assert why() == "" and why(fused=True) == ""
    assert "half the sides: copies cannot repeat pixels" in why(fused=True, halved=True)
    assert why(dtype=torch.float32) == "takes bfloat16 and float16, got torch.float32"
    assert "multiple of 8" in why(GEOMETRY._replace(weight_shape=(256, 252, 3, 3)))
    assert "columns of a" in why(GEOMETRY._replace(weight_shape=(256, 256, 3, 300)))
