"""The multiply-adds of each weight of a model, counted on a sample that leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ddst
from ddst.convert import find_weights
from ddst.convert.watch import multiply_adds, run_of


class Own(nn.Module):
    """A convolution with a weight of its own, and a linear layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8, 3, 3))
        self.style = nn.Linear(4, 8)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return nn.functional.conv2d(x * self.style(w)[:, :, None, None], self.weight, padding=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.own = Own()
        self.bn = nn.BatchNorm2d(16)
        self.unused = nn.Linear(16, 16)
        self.last = parametrizations.spectral_norm(nn.Linear(16, 3))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        x = self.own(self.up(self.down(x)), w)
        return self.last(self.bn(x).mean((2, 3)))


def expected(batch: int, side: int) -> dict[str, int]:
    """Weights × output positions (of a transposed convolution input positions) × calls."""
    at, half = batch * side * side, batch * side * side // 4
    return {
        "twice": 2 * 8 * 8 * 9 * at,
        "down": 8 * 4 * 9 * half,
        "up": 8 * 8 * 16 * half,
        "own.weight": 16 * 8 * 9 * at,
        "own.style": 4 * 8 * batch,
        "unused": 0,
        "last": 16 * 3 * batch,
    }


def test_weights_times_positions_times_calls() -> None:
    net, sample = Net(), (torch.randn(3, 8, 8, 8), torch.randn(3, 4))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    random = torch.get_rng_state()
    assert multiply_adds(net, run_of(net, sample), find_weights(net)) == expected(3, 8)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_a_sparse_layer_counts_all_its_weights_and_the_report_those_left() -> None:
    net = nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 64))
    ddst.sparsify(net, 0.5, block=(16, 16), distribution="uniform")
    assert multiply_adds(net, run_of(net, torch.ones(2, 40)), find_weights(net)) == {"0": 2 * 960, "1": 2 * 24 * 64}


def test_a_layer_that_fails_and_is_caught_leaves_the_count_in_order() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.broken, self.fine = nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.broken(x)
            except RuntimeError:
                return self.fine(x)

    net = Tries()
    assert multiply_adds(net, run_of(net, torch.ones(2, 4)), find_weights(net)) == {"broken": 0, "fine": 32}


def test_the_fused_path_of_attention_is_counted_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    net = nn.Sequential(layer)
    found = multiply_adds(net, run_of(net, torch.ones(2, 5, 8)), find_weights(net))
    assert found["0.linear1"] == found["0.linear2"] == 8 * 16 * 10
    assert found["0.self_attn.in_proj_weight"] >= 3 * 8 * 8 * 10
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_lazy_model_is_refused_before_it_is_run() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16))
    for call in (
        lambda: ddst.sparsify(net, 0.5, sample=torch.ones(2, 16)),
        lambda: ddst.advise(net, torch.ones(2, 16), density=0.5, distribution="uniform"),
    ):
        with pytest.raises(ValueError, match=r"1\.weight is lazy.*run the model once"):
            call()
    assert type(net[1]) is nn.LazyLinear
