"""Forward and input gradient for sm_90a: ddst's lists and calls, with the kernel on the emulator, against float64."""

from __future__ import annotations

import inspect
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddst.ops.cuda import compiled, gather, hopper
from helpers import emulation
from helpers.emulated_hopper_gather import FORMS, EmulatedHopper
from helpers.gather_problems import BLOCKS, SM90, WINDOWS, Problem, close
from helpers.half_blocks import HalfBlock

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="needs g++ (or CXX)")
CONV = replace(HalfBlock().conv, channels=(40, 24), size=(6, 5))


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> EmulatedHopper:
    folder = Path(request.config.cache.mkdir("cuda"))
    source = emulation.TESTS / "hopper_gather_library.cpp"
    return EmulatedHopper(emulation.compile_program(source, folder, "-shared", "-fPIC", optimize="-O1"))


@pytest.fixture
def ops(library: EmulatedHopper, monkeypatch: pytest.MonkeyPatch) -> EmulatedHopper:
    """``torch.ops.ddst_cuda`` on the CPU, on what says to be an H100."""
    library.calls = []
    monkeypatch.setattr(torch.ops, "ddst_cuda", library)
    monkeypatch.setattr(gather, "facts", lambda device: SM90)
    monkeypatch.setattr(hopper, "library", lambda: library.library)
    return library


def check(ops: EmulatedHopper, problem: Problem, form: hopper.Form) -> None:
    """The passes that the form takes; im2col refuses the input gradient of strides, stages of 32 channels many taps."""
    window = gather.Window(tuple(problem.x.shape[2:]), problem.stride, problem.padding)
    runs = [
        direction
        for direction in (False, True)
        if hopper.plan(
            problem.dtype, problem.shape, problem.block, window, problem.x.shape[0], form,
            input_gradient=direction, device=SM90,
        )[0]
    ]  # fmt: skip
    assert runs == [False, True] or (runs == [False] and form.im2col) or (runs == [True] and form.depth > 1)
    ops.calls.clear()
    with hopper.forced(form):
        problem.check(forward=False in runs, input_gradient=True in runs)
    assert ops.calls == runs


@pytest.mark.parametrize("block, window", [*zip(BLOCKS, [*WINDOWS[1:], WINDOWS[0]][:5], strict=True)], ids=str)
@pytest.mark.parametrize(("dtype", "form"), FORMS, ids=str)
def test_matches_float64(ops: EmulatedHopper, dtype, form, block, window) -> None:
    if window[0] == (4, 4) and form not in hopper.FORMS[:4]:
        window = ((2, 2), (2, 2), (1, 1))  # what the others have room for
    check(ops, Problem(dtype, 2, (9, 7), (136, 40) if form.depth == 1 else (128, 64), block, window), form)


def test_random_problems(ops: EmulatedHopper) -> None:
    rng = random.Random(4)
    for i in range(9):
        ops.seed, ops.clusters = i, rng.randint(1, 3)
        dtype, form = FORMS[i % len(FORMS)]
        block = rng.choice(BLOCKS)
        kernel = rng.choice([(1, 1), (3, 3), (4, 4), (1, 3), (2, 2)] if form in hopper.FORMS[:4] else [(1, 3), (2, 2)])
        window = (kernel, (rng.randint(1, 2), rng.randint(1, 2)), (rng.randint(0, 3), rng.randint(0, 3)))
        size = (rng.randint(kernel[0], 11), rng.randint(kernel[1], 11))
        multiple = 8 if form.depth == 1 else 32
        channels = (multiple * rng.randint(1, 144 // multiple), multiple * rng.randint(1, 144 // multiple))
        check(ops, Problem(dtype, rng.randint(1, 4), size, channels, block, window, rng.random(), seed=i), form)
    ops.seed, ops.clusters = 0, 2


@pytest.mark.parametrize(("dtype", "form"), FORMS, ids=str)
def test_residual_and_relu(ops: EmulatedHopper, dtype, form) -> None:
    p = Problem(dtype, 2, (6, 5), (40, 24) if form.depth == 1 else (40, 32), (16, 16), WINDOWS[1])
    residual = torch.randn_like(p.gy)
    want = (p.y() + p.bias.double()[:, None, None] + residual.double()).relu()
    with hopper.forced(form):
        y = compiled.conv2d(
            p.x, p.values, p.bias, p.topology, p.shape, p.stride, p.padding, (1, 1), True, relu=True, residual=residual
        )
    close(y, want, p.y(p.x.double().abs(), p.weight.abs()) + 8)
    assert ops.calls == [False]


@pytest.mark.parametrize(
    "block",
    [
        HalfBlock(conv=CONV, residual=1),
        HalfBlock(conv=replace(CONV, size=(9, 8), layout="channels_last"), norm="sample", pool=2, residual=2),
        HalfBlock(conv=replace(CONV, stride=2, block=(32, 16)), norm="none", slope=0.2),
        HalfBlock(conv=replace(CONV, channels=(24, 136), size=(5, 4), mask="0.2"), norm="sample"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "form"), FORMS[:3], ids=str)
def test_half_blocks(ops: EmulatedHopper, block: HalfBlock, dtype: torch.dtype, form: hopper.Form) -> None:
    if form.depth > 1:
        block = replace(block, conv=replace(block.conv, channels=(64, 32), stride=1))  # what it does not refuse
    built = block.build(dtype)
    with hopper.forced(form):
        found = {"output": compiled.norm_act_conv2d(*built.forward_arguments())[0]}
        if block.pool == 1:  # of what was pooled the gradient is upsampled while it is read
            found["input"] = compiled.norm_act_conv2d_input_grad(*built.input_grad_arguments())[0]
    assert ops.calls == [False, True][: len(found)]
    for name, got in found.items():
        error = float((got.double() - built.expected[name]).abs().max() / built.expected[name].abs().max())
        assert error < 4 * torch.finfo(dtype).eps, (name, error)


def test_the_emulated_operator_takes_what_the_compiled_one_does() -> None:
    glue = (emulation.KERNELS / "glue_hopper_gather.cpp").read_text()
    schema = "".join(re.findall(r'"([^"]*)"', re.findall(r"m\.def\((.*?)\);", glue, re.DOTALL)[0]))
    match = re.fullmatch(r"hopper_gather\((.*)\) -> Tensor", schema)
    assert match is not None
    mine = [p for p in inspect.signature(EmulatedHopper.hopper_gather).parameters if p != "self"]
    assert [p.split()[-1] for p in match[1].split(",")] == mine
