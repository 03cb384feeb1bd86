"""ddst.fuse on other people's ways to write a network: what is fused, why not, and that nothing changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ddst
from ddst.models.registry import MODELS
from helpers.fusing import assert_equal, fused_twin, kept_bytes, sparse, step

C = 8


def conv(c_in: int = C, c_out: int = C, side: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, side, padding=side // 2, **settings)


class Basic(nn.Module):
    """torchvision's residual block: convolution, norm, ReLU; one nn.ReLU for all places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            conv(bias=False),
            nn.BatchNorm2d(C),
            conv(bias=False),
            nn.BatchNorm2d(C),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Preactivated(nn.Module):
    """The activated value goes to two convolutions, and the block is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv1, self.conv2, self.short = nn.BatchNorm2d(C), conv(), conv(), conv(side=1)
        self.norm2 = nn.BatchNorm2d(C, momentum=None)

    def block(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norm(x), 0.2)
        short = self.short(h)
        return short + self.conv2(F.leaky_relu(self.norm2(self.conv1(h)), negative_slope=0.2, inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x)).mean(1, keepdim=True)


class Conditional(nn.Module):
    """Conditional batch norm written with the function, and a gain and shift by views."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))
        self.gain, self.shift, self.conv = nn.Linear(4, C), nn.Linear(4, C), conv()
        self.up = nn.Upsample(scale_factor=2)
        self.pool = nn.AvgPool2d(2)

    def norm(self, x: Tensor, y: Tensor) -> Tensor:
        h = F.batch_norm(x, self.mean, self.var, None, None, self.training, 0.1, 1e-4)
        gain, shift = (1 + self.gain(y)).view(y.size(0), -1, 1, 1), self.shift(y).unsqueeze(2).unsqueeze(3)
        return h * gain + shift

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pool(self.conv(self.up(F.relu(self.norm(x, y)))))


class Elsewhere(nn.Module):
    """Values that go elsewhere, too: nothing can be fused with conv1 and conv2, conv3 has no norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv1, self.conv2, self.conv3 = nn.BatchNorm2d(C), conv(), conv(), conv()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.norm(x))
        k = F.relu(self.conv1(h))
        return h, self.conv3(self.conv2(k)), k.flatten(1)


class Overwritten(nn.Module):
    """The norm's input is changed before the convolution reads the norm; the convolution's while it would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv1, self.conv2 = nn.BatchNorm2d(C), conv(), conv()

    def forward(self, given: Tensor) -> Tensor:
        x = given + 0
        with torch.no_grad():
            h = F.relu(self.norm(x))
            x.view(-1).add_(1)
            a = self.conv1(h)
            b = self.conv2(x)
            x.mul_(2)
            found = a.sum() + (b + x).sum()
        return found + (given * self.conv1.bias.sum()).square().sum()


class Partly(nn.Module):
    """Control flow that torch.fx cannot follow, around a block that it can; gradients are stopped inside."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), conv())
        self.norm, self.conv = nn.BatchNorm2d(C), conv()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        h = self.block(x)
        with torch.no_grad():
            h = F.relu(self.norm(h))
        return self.conv(h) + x


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class OwnGradient(nn.Module):
    """An activation whose gradient is somebody's own: its forward looks like a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(C), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(Guided.apply(self.norm(x)))


class Shared(nn.Module):
    """One norm and one convolution for two places, of which one is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(C), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(self.norm(x)))).tanh()


class Twice(nn.Module):
    """One input activated twice, by the function; behind modules that do nothing, as attention that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.nothing = conv(), conv(), conv(), nn.Identity()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.nothing(self.conv1(F.relu(x)) + self.conv2(F.relu(x)))
        return self.conv3(F.relu(self.nothing(self.norm(h))))


class Seen(nn.Module):
    """A ReLU in place, and the tensor that it overwrote is used as well: the next code has to see it changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.conv = conv(C, C, 1), nn.ReLU(inplace=True), conv()
        self.second, self.other = nn.Conv2d(C, C, 3, padding=1), conv()

    def forward(self, x: Tensor) -> Tensor:
        h, k = self.first(x), self.second(x)
        y = self.conv(self.relu(h))
        z = self.other(F.relu(k, inplace=True))
        return y * h + z * k


class Dcgan(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.BatchNorm2d(C), nn.ReLU(), nn.ConvTranspose2d(C, C, 4, 2, 1), nn.BatchNorm2d(C), nn.ReLU(), conv()
        )


IMAGE = ((2, C, 6, 6),)
LEAKY = ("BatchNorm2d", "leaky_relu")
CASES: list[tuple[type[nn.Module], Any, dict[str, tuple[str, ...]]]] = [
    (Basic, IMAGE, {"conv1": (), "conv2": ("BatchNorm2d", "ReLU")}),
    (Preactivated, IMAGE, {"conv1": LEAKY, "conv2": LEAKY, "short": LEAKY}),
    (Conditional, (*IMAGE, (2, 4)), {"conv": ("batch_norm", "scale", "shift", "relu", "2x")}),
    (Elsewhere, IMAGE, {"conv1": (), "conv2": (), "conv3": ()}),
    (Overwritten, IMAGE, {"conv1": ("relu",), "conv2": ()}),
    (Partly, IMAGE, {"block.2": ("BatchNorm2d", "ReLU"), "conv": ()}),
    (OwnGradient, IMAGE, {"conv": ()}),
    (Shared, IMAGE, {"conv": ()}),
    (Twice, IMAGE, {"conv1": ("relu",), "conv2": ("relu",), "conv3": ("BatchNorm2d", "relu")}),
    (Seen, IMAGE, {"first": (), "second": (), "conv": ("ReLU",), "other": ("relu",)}),
    (Dcgan, IMAGE, {"2": (), "5": ("BatchNorm2d", "ReLU")}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shapes", "before"), CASES, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_finds_what_is_there_and_changes_nothing(kind: Any, shapes: Any, before: dict[str, tuple[str, ...]]) -> None:
    model = sparse(kind())
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    twin, report = fused_twin(model)
    assert {c.name: c.before for c in report.convs} == before
    assert all(c.reason for c in report.convs if not c.before)
    for training in (True, False):
        for net in (model, twin):
            net.train(training)
        for second in (False, True):
            assert_equal(step(twin, inputs, second), step(model, inputs, second))


def test_reasons() -> None:
    def reason(model: nn.Module, name: str) -> str:
        found = {c.name: c.reason for c in ddst.fuse(sparse(model)).convs}
        return found[name]

    def after_norm(layer: nn.Module) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), layer)

    assert reason(Dcgan(), "2") == "it is transposed"
    assert reason(after_norm(conv(padding_mode="reflect")), "2") == "padding_mode='reflect' pads what is activated"
    assert "also goes to the output" in reason(Elsewhere(), "conv1")
    assert "changes its input in place" in reason(Overwritten(), "conv1")
    assert "overwrites what others may hold" in reason(nn.Sequential(nn.ReLU(inplace=True), conv()), "1")
    assert "no norm, activation or upsampling" in reason(Elsewhere(), "conv3")
    assert "several places" in reason(Shared(), "conv") or "also goes" in reason(Shared(), "conv")
    model = sparse(after_norm(conv()))
    model[2].register_forward_pre_hook(lambda module, args: None)
    assert ddst.fuse(model).convs[0].reason == "it has hooks"
    dense = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), conv(), conv(C, 3, 1))
    ddst.sparsify(dense, 0.5, block=4, exclude=["2"], distribution={"3": 0.9})
    assert ddst.fuse(dense).convs[0].reason == "it is dense"
    untraced = ddst.fuse(sparse(Partly())).untraced
    assert list(untraced) == [""] and "control flow" in untraced[""]


def test_a_value_of_a_chain_acts_as_the_tensor() -> None:
    """Where the code does something else than what was proved, it gets what it would have had."""
    model = sparse(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), conv()))
    twin, _ = fused_twin(model)
    x = torch.randn(2, C, 6, 6, dtype=torch.float64)
    normed, plain = twin[0](x), model[0](x)
    assert not isinstance(normed, Tensor) and normed.shape == plain.shape and normed.dtype == plain.dtype
    assert normed.requires_grad and normed.dim() == 4 and len(normed) == 2 and normed.numel() == plain.numel()
    for function in (
        lambda h: h + 1, lambda h: 2 - h, lambda h: h * h, lambda h: -h, lambda h: h[0], lambda h: h.mean((0, 2)),
        lambda h: torch.cat([h, h], 1), lambda h: h.flatten(1), lambda h: F.max_pool2d(h, 2), lambda h: h.T,
        lambda h: F.conv2d(h, plain[:, :, :3, :3]), lambda h: F.relu(F.relu(h)), lambda h: h == h,
        lambda h: h.clone().relu_(), lambda h: F.interpolate(h, size=(3, 3)), lambda h: torch.stack(list(h)),
        lambda h: F.interpolate(F.interpolate(h, scale_factor=2.0), scale_factor=2.0),
        lambda h: copy.deepcopy(h.detach()), lambda h: F.batch_norm(h, None, None, training=True),
        lambda h: F.relu(h * torch.arange(8.0, dtype=h.dtype).view(-1, 1, 1)) + torch.ones(1, C, 1, 1, dtype=h.dtype),
        lambda h: torch.from_numpy(h.detach().numpy()), lambda h: F.avg_pool2d(h, 2), lambda h: h / h.abs().max(),
    ):  # fmt: skip
        got = function(twin[0](x))
        assert_equal([got.tensor() if not isinstance(got, Tensor) else got], [function(model[0](x))])
    assert torch.equal(normed.tensor(), normed.tensor()) and normed.tensor() is normed.tensor()
    with pytest.raises(TypeError, match=r"torch\.autograd\.Function"):
        Guided.apply(twin[0](x))
    changed = x.clone()
    waiting = twin[1](twin[0](changed))
    changed.add_(1)
    with pytest.raises(RuntimeError, match="changed in place before its value was read"):
        twin[2](waiting)


def test_in_place_activations_change_the_value_and_no_other() -> None:
    model = sparse(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(inplace=True), conv()))
    twin, _ = fused_twin(model)
    x = torch.randn(2, C, 6, 6, dtype=torch.float64)
    for net in (model, twin):
        h = net[0](x)
        k = net[1](h)
        assert torch.equal(h + 0, k + 0) and bool((h >= 0).all())
    alone = nn.Sequential(nn.ReLU(inplace=True), conv())  # the input itself is overwritten, so it is not fused
    y, z = x.clone(), x.clone()
    twin, _ = fused_twin(sparse(alone))
    assert_equal([twin(y), y], [alone(z), z])


def test_synced_batch_norm() -> None:
    """In training it runs by itself (on a CPU as any batch norm), in eval mode it is fused."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(sparse(nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), conv())))
    twin, report = fused_twin(model)
    assert report.convs[0].before == ("SyncBatchNorm", "ReLU")
    x = torch.randn(2, C, 6, 6, dtype=torch.float64)
    assert isinstance(twin[0].train()(x), Tensor) is False  # put off behind the norm, for the ReLU
    for training in (True, False):
        model.train(training), twin.load_state_dict(model.state_dict()), twin.train(training)
        assert_equal(step(twin, (x,)), step(model, (x,)))


def test_wrapped_models() -> None:
    model = sparse(nn.Sequential(Preactivated(), nn.BatchNorm2d(C + 0), nn.ReLU(), conv()))
    for wrapped in (nn.DataParallel(copy.deepcopy(model)), AveragedModel(model), torch.compile(copy.deepcopy(model))):
        assert ddst.fuse(wrapped).fused == ddst.fuse(copy.deepcopy(model)).fused == 4


def test_an_exception_in_the_middle_leaves_the_model_whole() -> None:
    """The trace runs the model's code: what it changes is put back."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.block = 0, nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), conv())
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return self.block(x)

    model = sparse(Counts())
    state = torch.get_rng_state()
    assert ddst.fuse(model).fused == 1
    assert model.calls == 0 and float(model.seen) == 0 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "name", ["biggan-g", "biggan-d", "spade-g", "r3gan-d", "vqgan-g", "esrgan-g", "stylegan2-d", "pix2pix-g"]
)
def test_networks_of_the_registry(name: str) -> None:
    """Conditional norms of BigGAN are fused; nothing changes in any of them."""
    torch.manual_seed(0)
    model = MODELS[name].make("tiny").double()
    inputs = MODELS[name].sample(model, 2)
    ddst.sparsify(model, 0.5, block=4, sample=inputs, spectral_norm_noise=0.0)
    twin, report = fused_twin(model)
    assert_equal(step(twin, inputs), step(model, inputs), 1e-8)
    if name == "biggan-g":
        fronts = {c.name: c.before for c in report.convs}
        assert fronts["blocks.0.conv2"] == ("BatchNorm2d", "scale", "shift", "relu")
        parameters = [list(net.parameters()) for net in (model, twin)]
        assert kept_bytes(lambda: twin(*inputs), parameters[1]) < 0.8 * kept_bytes(
            lambda: model(*inputs), parameters[0]
        )
