"""ddst.nn.NormActConv2d against its parts one after the other."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddst.nn import NormActConv2d, SparseConv2d, set_backend, spectral_norm, weight_norm
from ddst.ops import channel_moments
from helpers.fusing import assert_equal, kept_bytes

C, OUT, BLOCK = 8, 12, 4


class GainAndShift(nn.Module):
    """``[N, C]`` each, of a vector per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2 * C)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        gain, shift = self.linear(y).chunk(2, 1)
        return 1 + gain, shift


def half(
    norm: nn.Module | None = None,
    activation: Any = None,
    condition: bool = False,
    backend: str = "auto",
    **settings: Any,
) -> NormActConv2d:
    conv = {name: settings.pop(name) for name in ("stride", "kernel_size", "bias") if name in settings}
    conv = {"kernel_size": 3, "padding": 1, "density": 0.5, "block": BLOCK} | conv
    module = NormActConv2d(
        SparseConv2d(C, OUT, **conv), norm, activation, condition=GainAndShift() if condition else None, **settings
    )
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            nn.init.normal_(part.weight), nn.init.normal_(part.bias)
    set_backend(module, backend)
    return module.double()


def by_parts(m: NormActConv2d, x: Tensor, residual: Any = None, condition: Any = None, factor: int = 1) -> Tensor:
    h = x if m.norm is None else m.norm(x)
    if m.condition is not None:
        gain, shift = m.condition(condition)
        h = h * gain[:, :, None, None] + shift[:, :, None, None]
    h = h if m.activation is None else m.activation(h)
    h = F.interpolate(h, scale_factor=2.0) if m.upsample == 2 else h
    y = m.conv(h)
    y = F.avg_pool2d(y, 2) if m.pool == 2 else y
    if residual is not None:
        y = y + (F.interpolate(residual, scale_factor=2.0) if factor == 2 else residual)
    return y


def check(
    m: NormActConv2d, x: Tensor | None = None, residual: Any = None, condition: Any = None, factor: int = 1
) -> None:
    """Outputs, first and second gradients, buffers; twice, as running statistics go on."""
    x = torch.randn(3, C, 6, 8, dtype=torch.float64) * 2 + 1 if x is None else x
    twin = copy.deepcopy(m)
    for _ in range(2):
        results = []
        for net in (m, twin):
            given = [None if t is None else t.detach().clone().requires_grad_() for t in (x, residual, condition)]
            if net is m:
                y = net(given[0], given[1], condition=given[2], residual_upsample=factor)
            else:
                y = by_parts(net, given[0], given[1], given[2], factor)
            leaves = [t for t in given if t is not None]
            first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
            parameters = [p for p in net.parameters() if p.requires_grad]
            loss = y.sin().sum() + sum(g.square().sum() for g in first)
            found = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True, materialize_grads=True)
            results.append([y, *first, *found, *net.buffers()])
        assert_equal(*results)


NORMS: dict[str, Any] = {
    "plain": lambda: nn.BatchNorm2d(C),
    "cumulative": lambda: nn.BatchNorm2d(C, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "no affine": lambda: nn.BatchNorm2d(C, affine=False, eps=1e-3, momentum=0.3),
    "group": lambda: nn.GroupNorm(2, C),
    "instance": lambda: nn.InstanceNorm2d(C, affine=True),
    "synced": lambda: nn.SyncBatchNorm(C),
    "none": lambda: None,
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm: str, training: bool, backend: str) -> None:
    check(half(NORMS[norm](), nn.ReLU(), backend=backend).train(training))


@pytest.mark.parametrize(
    "activation", [None, nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.LeakyReLU(0.1, True)]
)
@pytest.mark.parametrize(("upsample", "pool", "factor"), [(1, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 2)])
def test_what_is_around(activation: Any, upsample: int, pool: int, factor: int) -> None:
    size = [n * upsample // pool // factor for n in (6, 8)]
    residual = torch.randn(3, OUT, *size, dtype=torch.float64)
    check(half(nn.BatchNorm2d(C), activation, upsample=upsample, pool=pool), residual=residual, factor=factor)


@pytest.mark.parametrize("training", [True, False])
def test_a_conditional_norm(training: bool) -> None:
    condition = torch.randn(3, 3, dtype=torch.float64)
    check(half(nn.BatchNorm2d(C, affine=False), nn.ReLU(), True, upsample=2).train(training), condition=condition)
    check(half(nn.BatchNorm2d(C), nn.ReLU(), True).train(training), condition=condition)


def test_spectral_and_weight_norm_of_the_convolution() -> None:
    for norm in (spectral_norm, weight_norm):
        module = half(nn.BatchNorm2d(C), nn.ReLU())
        norm(module.conv)
        check(module.double())


def test_strides_and_channels_last() -> None:
    module = half(nn.BatchNorm2d(C), nn.ReLU(), stride=2, bias=False)
    check(module)
    module.conv.channels_last = True
    check(module)
    x = torch.randn(3, C, 6, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_moments_are_handed_on(training: bool) -> None:
    """The second norm takes those of the first one's output, and computes what it would without."""
    first = half(nn.BatchNorm2d(C), nn.ReLU(), upsample=2).train(training)
    second = NormActConv2d(SparseConv2d(OUT, OUT, 3, block=BLOCK, density=0.5), nn.BatchNorm2d(OUT), nn.ReLU())
    second = second.double().train(training)
    x = torch.randn(2, C, 4, 4, dtype=torch.float64)
    h, moments = first(x, return_moments=True)
    torch.testing.assert_close(moments, channel_moments(h))
    twin = copy.deepcopy(second)
    assert_equal([second(h, moments=moments), *second.buffers()], [by_parts(twin, h), *twin.buffers()])
    if training:  # they are what is used
        wrong = torch.stack([torch.zeros(OUT), torch.ones(OUT)]).double()
        assert not torch.allclose(second(h, moments=wrong), second(h))


def test_backward_keeps_the_input_only() -> None:
    module = half(nn.BatchNorm2d(C), nn.ReLU(), upsample=2, pool=2)
    x = torch.randn(4, C, 32, 32, dtype=torch.float64, requires_grad=True)
    parameters = list(module.parameters())
    own = x.untyped_storage().nbytes()
    assert own <= kept_bytes(lambda: module(x), parameters) <= own + 10000
    assert kept_bytes(lambda: by_parts(module, x), parameters) > 5 * own


def test_one_value_per_channel_is_an_error() -> None:
    module = half(nn.BatchNorm2d(C), nn.ReLU())
    x = torch.randn(1, C, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(x)
    module.eval()(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_and_autocast(dtype: torch.dtype) -> None:
    module = half(nn.BatchNorm2d(C), nn.ReLU(), upsample=2)
    x = torch.randn(4, C, 6, 6) + 3
    wanted = by_parts(copy.deepcopy(module), x.double())
    narrow = copy.deepcopy(module).to(dtype)
    y = narrow(x.to(dtype))
    assert y.dtype == dtype and torch.allclose(y.double(), wanted, atol=0.15, rtol=0.05)
    y.sum().backward()
    mixed = copy.deepcopy(module).float()
    with torch.autocast("cpu", dtype=dtype):
        y = mixed(x + 1000)  # whose rounding would lose the spread: it is the activation that is rounded
    assert y.dtype == dtype
    error = y.double() - by_parts(copy.deepcopy(module), x.double() + 1000)
    assert float(error.abs().max()) < 0.1


def test_hooks_see_tensors() -> None:
    module = half(nn.BatchNorm2d(C), nn.ReLU(), upsample=2)
    twin, seen = copy.deepcopy(module), []
    for part in (module.norm, module.activation, module.conv):
        part.register_forward_hook(lambda m, args, output: seen.extend([*args, output]))  # type: ignore[union-attr]
        x = torch.randn(2, C, 4, 4, dtype=torch.float64)
        assert_equal([module(x)], [by_parts(twin, x)])
    assert len(seen) == 12 and all(isinstance(value, Tensor) for value in seen)


def test_growth_scores() -> None:
    module = half(nn.BatchNorm2d(C), nn.ReLU(), upsample=2, pool=2)
    twin = copy.deepcopy(module)
    x, scores = torch.randn(2, C, 4, 4, dtype=torch.float64), []
    for net, run in ((module, module), (twin, lambda x: by_parts(twin, x))):
        net.conv.request_scores()
        run(x).square().sum().backward()
        scores.append(net.conv.take_scores())
    torch.testing.assert_close(*scores)


def test_compiles_copies_and_pickles() -> None:
    module = half(nn.BatchNorm2d(C, affine=False), nn.ReLU(), True, upsample=2)
    x, condition = torch.randn(2, C, 4, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    module.eval()
    wanted = module(x, condition=condition)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for other in (compiled, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_equal([other(x, condition=condition)], [wanted])
    assert list(module.state_dict()) == [
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "condition.linear.weight",
        "condition.linear.bias", "conv.values", "conv.bias", "conv.slot_blocks",
    ]  # fmt: skip


def test_wrong_arguments() -> None:
    conv = SparseConv2d(C, OUT, 3, padding=1, block=BLOCK)
    for arguments, error, message in (
        ((nn.Conv2d(C, OUT, 3),), TypeError, "conv must be a SparseConv2d, got Conv2d"),
        ((conv, 3), TypeError, "norm must be a module or None, got int"),
        ((conv, None, nn.GELU()), TypeError, "activation must be an nn.ReLU, nn.LeakyReLU or None, got GELU"),
        (
            (SparseConv2d(C, OUT, 3, padding=1, block=BLOCK, padding_mode="reflect"),),
            ValueError,
            "padding_mode='reflect'",
        ),
        ((SparseConv2d(C, OUT, 2, padding="same", block=BLOCK),), ValueError, "padding='same'"),
    ):
        with pytest.raises(error, match=message):
            NormActConv2d(*arguments)  # type: ignore[arg-type]
    for settings, message in (
        ({"condition": GainAndShift()}, "condition needs a norm"),
        ({"upsample": 3}, "upsample must be 1 or 2, got 3"),
        ({"pool": 0}, "pool must be"),
    ):
        with pytest.raises(ValueError, match=message):
            NormActConv2d(conv, **settings)  # type: ignore[arg-type]
    module = NormActConv2d(conv)
    x = torch.zeros(2, C, 4, 4)
    for call, message in (
        (lambda: module(x[0]), "input must have 4 dimensions"),
        (lambda: module(x, residual_upsample=3), "residual_upsample must be 1 or 2"),
        (lambda: module(x, moments=torch.zeros(2, 3)), r"moments must have the shape \(2, 8\)"),
        (lambda: module(x, torch.zeros(2, OUT, 3, 3)), "residual, upsampled by 1, must have the output's shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
