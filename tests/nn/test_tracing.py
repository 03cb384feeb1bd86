"""Models with sparse layers under torch.fx, torch.export and torch.jit.trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ddst

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), (9, 64)),
    "tokens": (lambda: nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32)), (9, 5, 64)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)), (9, 32, 8, 8)),
    "generator": (
        lambda: nn.Sequential(nn.ConvTranspose2d(32, 64, 4), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1, groups=2)),
        (9, 32, 1, 1),
    ),
    "signals": (
        lambda: nn.Sequential(nn.ConvTranspose1d(32, 48, 4, 2), nn.ReLU(), nn.Conv1d(48, 32, 3, padding="same")),
        (9, 32, 7),
    ),
}


def sparse(name: str, norm: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> tuple[nn.Module, Tensor]:
    make, shape = NETS[name]
    net = make()
    norm(net[0])
    ddst.sparsify(net, 0.4, distribution="uniform")
    assert len(ddst.nn.sparse_layers(net)) == 2
    return net, torch.randn(shape)


NORMS = [None, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_export_takes_other_batches(name: str, norm: Callable[[nn.Module], nn.Module] | None) -> None:
    net, x = sparse(name, norm or (lambda layer: layer))
    net.eval()
    program = torch.export.export(net, (x[:3],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
def test_jit_trace_takes_other_batches(name: str, norm: Callable[[nn.Module], nn.Module] | None) -> None:
    net, x = sparse(name, norm or (lambda layer: layer))
    net.eval()
    traced = torch.jit.trace(net, x[:3], check_trace=False)
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", [*NORMS, nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("name", NETS)
def test_a_layer_is_a_leaf_to_fx(name: str, norm: Callable[[nn.Module], nn.Module] | None) -> None:
    net, x = sparse(name, norm or (lambda layer: layer))
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    assert list(traced.state_dict()) == list(net.state_dict())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    expected = net(x)
    after = {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(before)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(dict(net.state_dict()), after)  # the spectral norm iterates as in the model
    traced(x).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
