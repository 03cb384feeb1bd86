"""A model fused and not, beside each other: outputs, gradients, running statistics, what backward keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ddst
from ddst.nn.deferred.value import Deferred


def sparse(model: nn.Module, backend: str = "auto", density: float = 0.4, block: int = 4) -> nn.Module:
    """The model in float64 with sparse layers, and values in its norms that are none of a new one."""
    model.double()
    ddst.sparsify(model, density, block=block, backend=backend, distribution="uniform", spectral_norm_noise=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model


def fused_twin(model: nn.Module) -> tuple[nn.Module, ddst.convert.FuseReport]:
    """A fused copy, which answers with tensors."""
    twin = copy.deepcopy(model)
    return twin, ddst.fuse(twin)


def step(model: nn.Module, inputs: Sequence[Any], second: bool = False) -> list[Tensor]:
    """Outputs, gradients of inputs and parameters (of a gradient penalty, if asked for), and buffers afterwards."""
    given = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    torch.manual_seed(0)  # for dropout
    output = model(*given)
    outputs = list(output) if isinstance(output, tuple | list) else [output]
    assert all(isinstance(y, Tensor) and not isinstance(y, Deferred) for y in outputs)
    loss = sum(y.square().mean() for y in outputs)
    leaves = [x for x in given if x.is_floating_point()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if second:
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        loss = sum(g.square().sum() for g in grads) + loss
    found = torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True, materialize_grads=True)
    return [*(y.detach() for y in outputs), *found, *(b.clone() for b in model.buffers())]


def assert_equal(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    assert len(found) == len(wanted)
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert got.shape == want.shape and got.dtype == want.dtype
        if got.is_floating_point():
            assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), f"{i}: {(got - want).abs().max()}"
        else:
            assert torch.equal(got, want), i


def kept_bytes(run: Callable[[], Tensor], parameters: Sequence[Tensor] = ()) -> int:
    """Bytes of what autograd keeps for the backward pass, each memory once, without parameters."""
    found: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return sum(found.values())
