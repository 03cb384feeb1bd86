"""What a convolution expects behind itself, and who puts off what: kept in the modules, by ``ddst.fuse``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_map

from ..packed.callers import inside_a_function, recomputing
from .run import run, takes
from .value import Deferred, tensor_of
from .work import Activated, Convolved, mode_of, version_of, versions_of

if TYPE_CHECKING:
    from ..conv2d import SparseConv2d


@dataclass
class Plan:
    """Of a :class:`~ddst.SparseConv2d`.

    Attributes:
        pool, sum: whether its output goes to a 2x2 average pool, and then to a sum, and nowhere else.
        hands_on: whether what comes next (of the output, or of the sum) is put off in its turn.
        takes_norm: whether that may be a batch norm called as a function.
        norms: batch norms behind it, which get the moments of the result.
        seen_by: modules that see what it returns, and must have no hooks for it.
    """

    pool: bool = False
    sum: bool = False
    hands_on: bool = False
    takes_norm: bool = False
    norms: tuple[nn.Module, ...] = ()
    seen_by: tuple[nn.Module, ...] = ()

    @property
    def waits(self) -> bool:
        """Whether the convolution waits for an epilogue."""
        return self.pool or self.sum

    @property
    def wants_moments(self) -> bool:
        """Whether a norm behind it takes statistics of the batch."""
        return any(norm.training or norm.running_mean is None for norm in self.norms)


@dataclass
class Put:
    """A hook that puts off what a module does with its input, or others with its output.

    Attributes:
        place: position of the argument, or its name; None for the output.
        takes_norm: whether a batch norm is put off.
        shared: whether others than the module may hold the value.
        seen_by: modules that see the value, and must have no hooks for it.
    """

    place: int | str | None
    takes_norm: bool
    shared: bool
    seen_by: tuple[nn.Module, ...]

    def value(self, module: nn.Module, given: Any) -> Any:
        if any_hooks(self.seen_by) or (self.takes_norm and syncs(module)):
            return tensor_of(given)
        if not isinstance(given, Deferred):
            return Deferred.of(given, takes_norm=self.takes_norm, shared=self.shared) if may_defer(given) else given
        work = given.work
        if self.takes_norm and isinstance(work, Activated) and not work.steps:
            return Deferred(work._replace(takes_norm=True))
        return given


class PutInput(Put):
    """A forward pre-hook, with names."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        place = self.place
        if isinstance(place, int) and place < len(args):
            return (*args[:place], self.value(module, args[place]), *args[place + 1 :]), kwargs
        if place in kwargs:
            return args, {**kwargs, place: self.value(module, kwargs[place])}
        return args, kwargs


class PutOutput(Put):
    """A forward hook."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.value(module, output)


class Settle:
    """A forward hook of a fused model: what leaves it is tensors, whichever way its code took."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return None if isinstance(output, Tensor) else tree_map(tensor_of, output)


def may_defer(value: Any) -> bool:
    """Whether a value is a tensor that can wait: of four dimensions, and nothing that follows what is done with it."""
    if type(value) is not Tensor and type(value) is not nn.Parameter:
        return False
    if value.dim() != 4 or not value.is_floating_point() or value.is_meta or value.layout != torch.strided:
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    following = torch._C._is_tracing() or torch._C._are_functorch_transforms_active() or value.is_inference()
    return not following and not global_hooks() and not inside_a_checkpoint()


def inside_a_checkpoint() -> bool:
    """Whether a torch.autograd.Function runs the code, which hands on tensors only: a reentrant checkpoint, say."""
    if torch.compiler.is_compiling():
        return False
    return recomputing() if torch.is_grad_enabled() else inside_a_function(checkpoints=True)


def global_hooks() -> bool:
    """Whether hooks on all modules would see the value."""
    m: Any = torch_module
    return bool(
        m._global_forward_hooks
        or m._global_forward_pre_hooks
        or m._global_backward_hooks
        or m._global_backward_pre_hooks
    )


def any_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody would see a value that goes through these modules."""
    return any(map(hooked, modules))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of images as torch computes it."""
    kind = type(module)
    torchs = kind.forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and torchs and "forward" not in vars(module)


def syncs(module: nn.Module) -> bool:
    """Whether a norm's statistics are those of several processes, which it has to take itself."""
    return isinstance(module, nn.SyncBatchNorm) and module.training


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of somebody's; those of torch's norms look at weights only."""
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not isinstance(hook, Put | Settle | SpectralNorm | WeightNorm):
            return True
    return False


def convolve(layer: SparseConv2d, input: Tensor | Deferred) -> Any:
    """What a convolution returns that has a plan or gets a deferred value; None where it has to run on the tensor."""
    if isinstance(input, Deferred):
        input.check_reached()
        if not isinstance(input.work, Activated):
            input.tensor()
    elif may_defer(input):
        input = Deferred.of(input)
    else:
        return None
    read = input.work
    assert isinstance(read, Activated)
    if not takes(layer, read):
        return None
    if not read.steps:
        read = read._replace(version=version_of(read.source))
    values = layer.effective_values()
    work = Convolved(layer, read, values, mode_of(read.source.device), noted=versions_of(values, layer.bias))
    plan = layer.plan
    waits = plan is not None and plan.waits and not any_hooks(plan.seen_by)
    return Deferred(work) if waits or read.asks else finish(work)


def finish(work: Convolved, residual: Tensor | None = None, residual_upsample: int = 1) -> Any:
    """Runs a convolution with its epilogue: the tensor, or for what comes next a deferred one, held by nobody else."""
    plan = work.layer.plan
    if plan is None or not plan.hands_on or any_hooks(plan.seen_by) or inside_a_checkpoint():
        return run(work, residual, residual_upsample)[0]
    output, moments = run(work, residual, residual_upsample, plan.wants_moments)
    return Deferred.of(output, moments, takes_norm=plan.takes_norm, shared=False)
