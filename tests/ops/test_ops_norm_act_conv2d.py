"""The fused half block against its parts in float64, on dense weights: outputs, moments, all gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddst.ops import Norm, channel_moments, norm_act_conv2d
from helpers import scale
from helpers.copies import run_copies
from helpers.cpu_paths import CAPABILITIES, environment_with, machine_flags
from helpers.problems import Case, ConvProblem, sample_conv_problems
from helpers.tolerances import TOLERANCES, Tolerance, relative_error

EPS = 1e-3
NORMS = ("none", "batch", "running", "batch, plain", "batch, per sample", "running, per sample")


@dataclass(frozen=True)
class Around:
    """What is fused with a convolution: a norm of :data:`NORMS`, slope, factors; residual 0 for none, or its factor."""

    norm: str = "batch"
    slope: float = 0.0
    upsample: int = 1
    pool: int = 1
    residual: int = 0

    def __str__(self) -> str:
        return f"{self.norm},slope={self.slope},up={self.upsample},pool={self.pool},residual={self.residual}"


def spread(n: int, around: Around, dtype: torch.dtype, c: int, generator: torch.Generator) -> list[Tensor | None]:
    """gamma, beta, running mean and variance of a problem; None where it has none."""
    per_sample = "per sample" in around.norm
    shape = (n, c) if per_sample else (c,)
    plain = around.norm == "none" or "plain" in around.norm
    gamma, beta = (None if plain else torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    running = "running" in around.norm
    mean = torch.randn(c, generator=generator).to(dtype) if running else None
    var = (torch.rand(c, generator=generator) + 0.5).to(dtype) if running else None
    return [gamma, beta, mean, var]


def parts(case: Case, around: Around, x: Tensor, values: Tensor, bias: Any, residual: Any, spread: Any) -> Tensor:
    """The same by torch's functions, one after the other."""
    gamma, beta, mean, var = spread
    h = x
    if around.norm != "none":
        h = F.batch_norm(h, mean, var, training=mean is None, momentum=0.0, eps=EPS)
        if gamma is not None:
            h = h * gamma.view(-1, h.shape[1], 1, 1) + beta.view(-1, h.shape[1], 1, 1)
    h = F.leaky_relu(h, around.slope) if around.slope != 1 else h
    h = F.interpolate(h, scale_factor=2.0) if around.upsample == 2 else h
    y = case.dense(h, values, bias)
    y = F.avg_pool2d(y, 2) if around.pool == 2 else y
    if residual is not None:
        y = y + (F.interpolate(residual, scale_factor=2.0) if around.residual == 2 else residual)
    return y


def fused(case: Case, around: Around, x: Any, values: Any, bias: Any, residual: Any, spread: Any, **more: Any) -> Any:
    gamma, beta, mean, var = spread
    norm = None
    if around.norm != "none":
        if mean is None:
            mean, var = channel_moments(x)
        norm = Norm(mean, var, gamma, beta, EPS, "batch" in around.norm)
    return norm_act_conv2d(
        x, values, bias, case.topology, case.weight_shape, norm=norm, negative_slope=around.slope,
        upsample=around.upsample, pool=around.pool, residual=residual, residual_upsample=max(around.residual, 1),
        **case.kwargs, **more,
    )  # fmt: skip


def size_of(problem: ConvProblem, around: Around) -> list[int]:
    """Height and width of the output."""
    doubled = replace(problem, size=(problem.size[0] * around.upsample, problem.size[1] * around.upsample))
    return [n // around.pool for n in doubled.output_size]


def problems(count: int) -> Iterator[tuple[ConvProblem, Around]]:
    """Convolutions of every kind, each with something else around it."""
    rng = random.Random(7)
    fitting = [p for p in sample_conv_problems() if p.batch is not None and p.explicit() is not None and p.batch != 0]
    for problem in rng.sample(fitting, min(count, len(fitting))):
        around = Around(
            rng.choice(NORMS),
            rng.choice([0.0, 0.2, 1.0]),
            rng.choice([1, 2]),
            rng.choice([1, 2]),
            rng.choice([0, 1, 2]),
        )
        size = size_of(problem, around)
        if min(size) < 1:
            around = replace(around, pool=1)
            size = size_of(problem, around)
        if any(n % 2 for n in size) and around.residual == 2:
            around = replace(around, residual=1)
        if "batch" in around.norm and problem.batch * problem.size[0] * problem.size[1] < 2:  # type: ignore[operator]
            around = replace(around, norm="running")
        yield problem, around


def check(problem: ConvProblem, around: Around, dtype: torch.dtype, backend: str) -> None:
    case = problem.build(dtype)
    g = torch.Generator().manual_seed(3)
    n, c = case.x.shape[:2]
    around_tensors = spread(n, around, dtype, c, g)
    size = size_of(problem, around)
    residual = None
    if around.residual:
        shape = (n, case.weight_shape[0], size[0] // around.residual, size[1] // around.residual)
        residual = torch.randn(shape, generator=g).to(dtype)
    grad = torch.randn(n, case.weight_shape[0], *size, generator=g).to(dtype)
    given = [case.x, case.values, case.bias, residual, *around_tensors[:2]]

    def run(function: Any, wide: bool) -> tuple[Tensor, list[Tensor | None], Any]:
        leaves = [None if t is None else t.detach().to(torch.float64 if wide else dtype) for t in given]
        leaves = [None if t is None else t.requires_grad_() for t in leaves]
        rest = [None if t is None else t.double() if wide else t for t in around_tensors[2:]]
        got = function(case, around, *leaves[:4], [*leaves[4:], *rest])
        y, moments = got if isinstance(got, tuple) else (got, None)
        wanted = [t for t in leaves if t is not None]
        grads = torch.autograd.grad(y, wanted, grad.to(y.dtype), allow_unused=True, materialize_grads=True)
        found = iter(grads)
        return y, [None if t is None else next(found) for t in leaves], moments

    y, grads, moments = run(lambda *a: fused(*a, moments=True, backend=backend), False)
    expected, expected_grads, _ = run(parts, True)
    base = TOLERANCES[dtype]
    allowed = Tolerance(base.rms * 10, base.max * 20)
    names = ("input", "values", "bias", "residual", "gamma", "beta")
    rows = [("output", y, expected), *zip(names, grads, expected_grads, strict=True)]
    var, mean = torch.var_mean(expected.detach(), (0, 2, 3), correction=0)
    rows.append(("moments", moments, torch.stack([mean, var])))
    # Through a norm of the batch the gradient of a constant is zero, made of terms that are not.
    scale = max(float(t.detach().abs().max()) for _, _, t in rows if t is not None and t.numel())
    for name, got, want in rows:
        if got is None:
            assert want is None
            continue
        assert got.shape == want.shape, name
        assert bool(got.isfinite().all()), f"{name} of {problem}, {around}: NaN"
        error = relative_error(got, want)
        small = float((got.double() - want).abs().max()) <= allowed.max * scale if got.numel() else True
        assert error.within(allowed) or small, f"{name} of {problem}, {around}: {error}"


@pytest.mark.usefixtures("poison_outputs")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("problem", "around"), list(problems(60)), ids=str)
def test_equals_its_parts(problem: ConvProblem, around: Around, dtype: torch.dtype) -> None:
    check(problem, around, dtype, "cpu")


@pytest.mark.parametrize(("problem", "around"), list(problems(12)), ids=str)
def test_equals_its_parts_on_the_reference(problem: ConvProblem, around: Around) -> None:
    check(problem, around, torch.float64, "reference")


EVERYTHING = Around("batch, per sample", 0.2, 2, 2, 2)


@pytest.mark.parametrize("size", [(5, 6), (7, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_odd_sizes(size: tuple[int, int], pool: int, upsample: int, layout: str) -> None:
    around = Around("batch", 0.0, upsample, pool, 1)
    check(ConvProblem(size=size, layout=layout, channels=(24, 40)), around, torch.float64, "cpu")


def test_every_cpu_path() -> None:
    """In copies of one process, as a path is chosen once in each."""
    there = [name for name, needed in CAPABILITIES.items() if needed <= machine_flags()]
    arguments = ["-q", "-x", __file__, "-k", "test_equals_its_parts and not reference", "-p", "no:cacheprovider"]
    setting = "os.environ['DDST_CPU_CAPABILITY'] = {!r}; sys.exit(pytest.main({!r}))"
    imported = "import pytest, hypothesis, ddst, torch._dynamo"
    programs = [(imported, setting.format(name, arguments)) for name in there]
    for name, done in zip(there, run_copies(programs, environment_with("")), strict=True):
        assert done.returncode == 0, f"{name}: {done.out[-3000:]}"


def test_empty_batch() -> None:
    case = ConvProblem(batch=0).build(torch.float32)
    around = Around("running", 0.0, 2, 2)
    y, moments = fused(
        case, around, case.x, case.values, case.bias, None, spread(0, around, torch.float32, 8, torch.Generator())
    )
    assert tuple(y.shape) == (0, 16, 6, 7) and moments is None


def test_a_mean_of_a_thousand_and_a_spread_of_one() -> None:
    """Sums of squares cancel: the error is that of torch's own batch norm, which is the rounding of the mean."""
    problem = ConvProblem(batch=4, channels=(32, 32), block=(16, 16), size=(16, 16), mask="full", slots="row_major")
    case = problem.build(torch.float32)
    x = (torch.randn(4, 32, 16, 16) + 1000).requires_grad_()
    around = Around("batch, plain")
    exact = channel_moments(x.double())
    assert relative_error(channel_moments(x)[1], exact[1]).within(Tolerance(1e-6, 4e-6))
    nothing: Any = [None] * 4
    grad = torch.randn(4, 32, 16, 16)
    wide = x.detach().double().requires_grad_()
    want = parts(case, around, wide, case.values.double(), None, None, nothing)
    (want_grad,) = torch.autograd.grad(want, wide, grad.double())
    torchs = parts(case, around, x, case.values, None, None, nothing)
    (torchs_grad,) = torch.autograd.grad(torchs, x, grad)
    ours, _ = fused(case, around, x, case.values, None, None, nothing)
    (ours_grad,) = torch.autograd.grad(ours, x, grad)
    for got, same, exactly in ((ours, torchs, want), (ours_grad, torchs_grad, want_grad)):
        assert relative_error(got, exactly).rms <= 2 * max(relative_error(same, exactly).rms, 1e-6)


def small(around: Around, batch: int = 2) -> tuple[Case, list[Any], list[Any]]:
    case = ConvProblem(batch=batch, channels=(3, 4), block=(2, 2), size=(4, 4), slots="row_major").build()
    g = torch.Generator().manual_seed(1)
    tensors = spread(batch, around, torch.float64, 3, g)
    side = 4 * around.upsample // around.pool
    residual = torch.randn(batch, 4, *[side // max(around.residual, 1)] * 2, dtype=torch.float64, generator=g)
    leaves = [case.x, case.values, case.bias, residual if around.residual else None, *tensors[:2]]
    return case, leaves, tensors[2:]


DIFFERENTIATED = [
    Around("batch", 0.2), Around("none", 0.2, 2), Around("running", 1.0, 1, 2, 1), EVERYTHING,
    Around("batch, plain", 0.2),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("around", DIFFERENTIATED, ids=str)
def test_derivatives_of_the_first_and_second_order(around: Around, backend: str) -> None:
    case, leaves, rest = small(around)
    inputs = tuple(t.clone().requires_grad_() for t in leaves if t is not None)

    def function(*given: Tensor) -> Tensor:
        values = iter(given)
        full = [None if t is None else next(values) for t in leaves]
        y: Tensor = fused(case, around, *full[:4], [*full[4:], *rest], backend=backend)[0]
        return y

    # The reference is made of torch's functions: a random direction says enough of it.
    fast = backend == "reference" and not scale.everything()
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast)


@pytest.mark.parametrize("around", [EVERYTHING, Around("none"), Around("running", 0.0, 1, 1, 1)], ids=str)
def test_opcheck(around: Around) -> None:
    case, leaves, rest = small(around)
    x, values, bias, residual, gamma, beta = leaves
    statistics: list[Any] = [None, None]
    if around.norm != "none":
        statistics = list(channel_moments(x)) if rest[0] is None else rest
    geometry = (list(case.weight_shape), [1, 1], [1, 1], [1, 1])
    prologue = (EPS, around.slope, around.upsample, around.pool)
    batch = "batch" in around.norm
    tensors = [None if t is None else t.clone().requires_grad_() for t in (x, values, bias, residual)]
    affine = [None if t is None else t.clone().requires_grad_() for t in (gamma, beta)]
    arguments: Any = (
        *tensors,
        *statistics,
        *affine,
        case.topology,
        *geometry,
        *prologue,
        max(around.residual, 1),
        batch,
        True,
        False,
        0,
        0,
    )
    torch.library.opcheck(torch.ops.ddst.norm_act_conv2d.default, arguments)
    y = torch.ops.ddst.norm_act_conv2d(*[t.detach() if isinstance(t, Tensor) else t for t in arguments])[0]
    norm = (*statistics, gamma, beta)
    back: Any = (torch.randn_like(y), x, values, *norm, case.topology, *geometry, *prologue, batch, False, 0)
    torch.library.opcheck(torch.ops.ddst.norm_act_conv2d_input_grad.default, back)
    weight: Any = (
        torch.randn_like(y),
        x,
        *norm,
        case.topology,
        list(case.weight_shape),
        [2, 2],
        *geometry[1:],
        *prologue,
        0,
    )
    torch.library.opcheck(torch.ops.ddst.norm_act_conv2d_weight_grad.default, weight)
    torch.library.opcheck(torch.ops.ddst.channel_moments.default, (x,))


@given(seed=st.integers(0, 10**6), upsample=st.sampled_from([1, 2]), pool=st.sampled_from([1, 2]))
def test_laws(seed: int, upsample: int, pool: int) -> None:
    """An upsampled residual is the residual upsampled; the sum is one of outputs; positive factors leave a ReLU."""
    torch.manual_seed(seed)
    case = ConvProblem(size=(4, 8), slots="row_major").build()
    around = Around("none", 0.0, upsample, pool, 2)
    size = size_of(ConvProblem(size=(4, 8)), around)
    residual = torch.randn(2, 16, size[0] // 2, size[1] // 2, dtype=torch.float64)
    nothing: Any = [None] * 4

    def run(x: Tensor, bias: Tensor | None, residual: Tensor | None, factor: int = 1) -> Tensor:
        y: Tensor = fused(case, replace(around, residual=factor), x, case.values, bias, residual, nothing)[0]
        return y

    bare = run(case.x, case.bias, None)
    doubled = F.interpolate(residual, scale_factor=2.0)
    torch.testing.assert_close(run(case.x, case.bias, residual, 2), run(case.x, case.bias, doubled))
    torch.testing.assert_close(run(case.x, case.bias, doubled), bare + doubled)
    torch.testing.assert_close(run(3 * case.x, None, None), 3 * run(case.x, None, None))


def test_wrong_arguments_are_named() -> None:
    case, leaves, _ = small(Around("batch"))
    x, values, bias = leaves[:3]
    call: Any = (x, values, bias, case.topology, case.weight_shape)
    for named, message in (
        ({"upsample": 3}, "upsample must be 1 or 2, got 3"),
        ({"pool": 4}, "pool must be 1 or 2, got 4"),
        ({"residual": torch.zeros(2, 4, 3, 3)}, "residual, upsampled by 1, must have the output's shape"),
        ({"norm": Norm(torch.zeros(2), torch.ones(3))}, r"norm.mean must have the shape \(3,\), got \(2,\)"),
        ({"norm": Norm(torch.zeros(3), torch.ones(3), torch.ones(3))}, "norm.gamma and norm.beta must be of one shape"),
        ({"norm": Norm(torch.zeros(3), torch.ones(3), eps=-1.0)}, r"norm\.eps must be"),
    ):
        with pytest.raises(ValueError, match=message):
            norm_act_conv2d(*call, padding=1, **named)
    nothing: Any = None
    for norm, message in (
        (Norm(torch.zeros(3), torch.ones(3), 1.0), r"norm\.gamma must be a tensor"),  # type: ignore[arg-type]
        (Norm(nothing, nothing), r"norm\.mean must be a tensor, got None"),
        (Norm(torch.zeros(3), torch.ones(3), eps="a"), r"norm\.eps must be a number"),  # type: ignore[arg-type]
        (Norm(torch.zeros(3), torch.ones(3), batch_stats=1), r"norm\.batch_stats must be"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=message):
            norm_act_conv2d(*call, padding=1, norm=norm)
    with pytest.raises(ValueError, match="input must have 3 channels"):
        norm_act_conv2d(torch.zeros(2, 5, 4, 4), *call[1:])
