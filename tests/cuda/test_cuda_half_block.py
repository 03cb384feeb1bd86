"""The fused half block in CUDA C++: ddst's calls, with the kernels on the emulator, against its formula in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ddst import _extension
from ddst.ops.cuda import compiled, gather, hopper
from ddst.ops.cuda import weight_grad as cwg
from helpers import emulation
from helpers.emulated_gather import EmulatedOps
from helpers.emulated_weight_grad import Library
from helpers.half_blocks import Built, HalfBlock
from helpers.tolerances import assert_close

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
SM90 = gather.Device(132, 227 * 1024, (9, 0))
CONV = replace(HalfBlock().conv, channels=(40, 24), size=(6, 5))
BLOCKS = [
    HalfBlock(conv=CONV, residual=1),
    HalfBlock(conv=replace(CONV, size=(4, 4), channels=(24, 40)), norm="sample", upsample=2, slope=0.2, residual=2),
    HalfBlock(conv=replace(CONV, size=(7, 6), layout="channels_last"), norm="none", pool=2, residual=1),
    HalfBlock(conv=replace(CONV, stride=2, block=(32, 16)), norm="sample", batch_stats=False),
    HalfBlock(conv=replace(CONV, kernel=(1, 1), padding=0), upsample=2, pool=2, affine=False, slope=1.0),
    HalfBlock(conv=replace(CONV, channels=(72, 136), size=(5, 4), mask="0.2"), norm="sample"),  # two groups of channels
]


class _Emulated:
    """``torch.ops.ddst_cuda``."""

    def __init__(self, gathers: EmulatedOps, weight_grads: Library) -> None:
        self.conv2d_gather = gathers.conv2d_gather
        self.conv2d_weight_grad = weight_grads.conv2d_weight_grad
        self.library = gathers.library


@pytest.fixture(scope="module")
def emulated(request: pytest.FixtureRequest) -> _Emulated:
    folder = Path(request.config.cache.mkdir("cuda"))
    files = [
        emulation.compile_program(emulation.TESTS / f"{name}_library.cpp", folder, "-shared", "-fPIC")
        for name in ("gather", "weight_grad")
    ]
    return _Emulated(EmulatedOps(files[0]), Library(files[1]))


@pytest.fixture
def ops(emulated: _Emulated, monkeypatch: pytest.MonkeyPatch) -> _Emulated:
    monkeypatch.setattr(torch.ops, "ddst_cuda", emulated)
    monkeypatch.setattr(gather, "facts", lambda device: SM90)
    monkeypatch.setattr(gather, "library", lambda: emulated.library)
    monkeypatch.setattr(hopper, "library", lambda: emulated.library)  # which has no kernels for sm_90a
    for module in (gather, cwg):
        monkeypatch.setattr(module, "tf32_allowed", lambda *, linear: False)
    monkeypatch.setattr(cwg, "_device", lambda index: cwg.Device(4, 227 * 1024))
    return emulated


def results(built: Built) -> dict[str, Tensor]:
    y, moments = compiled.norm_act_conv2d(*built.forward_arguments())
    gradients = compiled.norm_act_conv2d_input_grad(*built.input_grad_arguments())
    values, bias = compiled.norm_act_conv2d_weight_grad(*built.weight_grad_arguments())
    found = dict(zip(("input", "gamma", "beta"), gradients, strict=True))
    return {"output": y, "moments": moments, "values": values, "bias": bias} | found


def errors(built: Built, found: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result relative to its largest entry."""
    errors = {}
    for name, right in built.expected.items():
        active = built.case.active if name == "values" else slice(None)
        difference = (found[name].double() - right)[active].abs().max()
        errors[name] = float(difference / right[active].abs().max())
    return errors


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.usefixtures("poison_outputs", "ops")
def test_matches_float64(block: HalfBlock) -> None:
    """float32 in full precision."""
    built = block.build()
    found = results(built)
    for name, right in built.expected.items():
        active = built.case.active if name == "values" else slice(None)
        if name != "moments":
            assert_close(found[name][active], right[active], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", BLOCKS[:3], ids=str)
@pytest.mark.usefixtures("ops")
def test_16_bits(block: HalfBlock, dtype: torch.dtype) -> None:
    """The emulator rounds as a device; the interpreter, which runs the passes of the norm, cuts bfloat16 off."""
    built = block.build(dtype)
    allowed = 4 * torch.finfo(dtype).eps
    found = errors(built, results(built))
    assert all(error < allowed for error in found.values()), found


@pytest.mark.usefixtures("ops")
def test_large_tiles(ops: _Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "facts", lambda device: SM90._replace(multiprocessors=1))
    for block in (HalfBlock(conv=replace(CONV, size=(10, 10), channels=(80, 72)), norm="sample", upsample=2),
                  HalfBlock(conv=replace(CONV, size=(18, 18), channels=(16, 72)), pool=2)):  # fmt: skip
        built = block.build(torch.float16)
        found = errors(built, results(built))
        assert all(error < 4e-3 for error in found.values()), found
    assert True in ops.conv2d_gather.__self__.calls  # type: ignore[attr-defined]


@pytest.mark.usefixtures("ops")
def test_nothing_cancels_at_mean_1000_and_spread_1() -> None:
    built = HalfBlock(conv=CONV).build(mean=1000.0)
    found = errors(built, results(built))
    assert all(error < 2e-4 for name, error in found.items() if name != "moments"), found


@pytest.mark.usefixtures("ops")
def test_no_images() -> None:
    built = HalfBlock(conv=replace(CONV, batch=0), pool=2).build()
    found = results(built)
    assert found["output"].shape == (0, 24, 3, 2) and found["input"].shape == (0, 40, 6, 5)
    assert all(found[name].count_nonzero() == 0 for name in ("values", "bias", "gamma", "beta"))


@pytest.mark.usefixtures("ops")
def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    strided = HalfBlock(conv=replace(CONV, stride=2), upsample=2).build()
    with pytest.raises(ValueError, match=r"needs stride 1 with upsample=2, got \(2, 2\): use backend 'triton'"):
        compiled.norm_act_conv2d_input_grad(*strided.input_grad_arguments())
    monkeypatch.setattr(_extension, "cuda_kernels_loaded", lambda: True)
    for op in ("norm_act_conv2d", "norm_act_conv2d_input_grad", "norm_act_conv2d_weight_grad"):
        arguments = (op, torch.device("cpu"), torch.float16)
        assert compiled.supports(*arguments, (24, 40, 3, 3), (16, 16), (1, 1), (1, 1)) == (True, "")
        yes, reason = compiled.supports(*arguments, (24, 20, 3, 3), (16, 16), (1, 1), (1, 1))
        assert not yes and "channels must be multiples of 8, got 20 in, 24 out" in reason
