"""``fuse``: norms, activations, upsampling, pooling and sums become a part of the convolutions beside them."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.fx import Node
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import type_before_parametrizations

from .._arguments import check_module
from ..nn import PackedParameter, SparseConv2d, SparseLayer
from ..nn.deferred.plan import Plan, Put, PutInput, PutOutput, Settle, hooked
from ..nn.deferred.run import refusal
from .fuse_chains import Mark, Proof, Vote
from .fuse_report import FusedConv, FuseReport
from .fuse_trace import traces_of


def fuse(model: nn.Module) -> FuseReport:
    """``conv(up(act(norm(x))))``, average pool and residual sum of block-sparse convolutions: one operator each.

    Forward and backward then keep the norm's input alone (:func:`ddst.ops.norm_act_conv2d`), where the parts keep their
    outputs, too. The model computes the same: outputs, gradients of any order, running statistics. It stays itself,
    its own code runs, and its state dict does not change: a module in front of a chain hands on a value that is not
    computed yet (:mod:`ddst.nn.deferred`), which the convolution reads, and which is a tensor for anything else.
    torch.fx is used to prove which values go to such convolutions only; what it cannot trace is looked at in parts.

    Fused are :class:`torch.nn.BatchNorm2d` (also without affine and with a gain and shift per sample behind it, as
    conditional norms have it; SyncBatchNorm in eval mode, in training it runs by itself), ReLU and leaky ReLU,
    modules or functions, nearest 2x upsampling, in front of a :class:`~ddst.SparseConv2d` that pads with zeros; behind
    it a 2x2 average pool, a sum (with a 2x upsampled operand, too) and the statistics that the next batch norm takes.

    Call it after :func:`ddst.sparsify`; again after a change of the model's modules. Hooks that are put on a module
    later see tensors: what goes through it is not fused while they are there.

    Args:
        model: any module. Its mode does not matter.

    Returns:
        A report that prints as a table: what was fused with each convolution, and why not more.

    Raises:
        TypeError: the model is no module.

    Cost: the model's code is run once, without computing.

    >>> import ddst
    >>> model = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 3, 1))
    >>> _ = ddst.sparsify(model, 0.25)
    >>> print(ddst.fuse(model))
    layer  kind          before             after
    ---------------------------------------------------------------------
    2      SparseConv2d  BatchNorm2d, ReLU
    3      Conv2d                                  not fused: it is dense
    1 of 2 convolutions fused
    >>> ddst.unfuse(model)
    """
    check_module("model", model)
    unfuse(model)
    traces, failures = traces_of(model)
    proofs = [Proof(trace) for trace in traces]
    calls = Counter(call.module for trace in traces for call in trace.calls)
    votes: dict[Mark, list[Vote]] = {}
    for proof in proofs:
        for mark, vote in proof.votes:
            votes.setdefault(mark, []).append(vote)
    made = {mark for mark, found in votes.items() if len(found) == calls[mark[1]] and _alike(found)}
    for mark in made:
        _make(mark, votes[mark])
    if made:
        model.register_forward_hook(Settle())
    return FuseReport(tuple(_rows(model, proofs, made)), failures)


def unfuse(model: nn.Module) -> None:
    """Undoes :func:`fuse`, for copies of the model, too.

    >>> unfuse(nn.Sequential(nn.ReLU()))
    """
    for module in check_module("model", model).modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Put | Settle)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(module, SparseConv2d):
            module.plan = None


def _alike(votes: list[Vote]) -> bool:
    settings = {(v.takes_norm, v.plan.pool, v.plan.sum, v.plan.hands_on, v.plan.takes_norm) for v in votes}
    return len(settings) == 1


def _make(mark: Mark, votes: list[Vote]) -> None:
    kind, module, place = mark
    seen = tuple(dict.fromkeys(m for vote in votes for m in vote.seen_by))
    first, shared = votes[0], any(vote.shared for vote in votes)
    if isinstance(module, SparseConv2d) and kind == "plan":
        norms = tuple(dict.fromkeys(norm for vote in votes for norm in vote.plan.norms))
        p = first.plan
        module.plan = Plan(p.pool, p.sum, p.hands_on, p.takes_norm, norms, seen)
    elif kind == "input":
        module.register_forward_pre_hook(PutInput(place, first.takes_norm, shared, seen), with_kwargs=True)
    else:
        module.register_forward_hook(PutOutput(None, first.takes_norm, shared, seen))


def _rows(model: nn.Module, proofs: list[Proof], made: set[Mark]) -> list[FusedConv]:
    found: dict[nn.Module, FusedConv] = {}
    for proof in proofs:
        for conv in (*proof.convs, *proof.readers):
            layer = proof.trace.leaves[conv].module
            names, mark = proof.fronts.get(conv, ((), None))
            reason = proof.reasons.get(conv, "")
            if mark is not None and mark not in made:
                names, reason = (), f"{_called(mark[1])} is called in several places, not all of which are such chains"
            before, after = tuple(filter(None, names)), _after(proof, conv, made)
            if layer not in found or found[layer].fused:  # of several calls the one with the least
                found[layer] = FusedConv("", type(layer).__name__, before, after, reason)
    rows = []
    for name, module in model.named_modules():
        kind = type_before_parametrizations(module).__name__
        if module in found:
            row = found[module]
            rows.append(FusedConv(name, row.kind, row.before, row.after, row.reason))
        elif isinstance(module, _ConvNd | SparseLayer) and _dims(module) > 0 and name:
            rows.append(FusedConv(name, kind, (), (), _why_never(module)))
    return rows


def _after(proof: Proof, conv: Node, made: set[Mark]) -> tuple[str, ...]:
    epilogue = proof.epilogues.get(conv)
    if epilogue is None:  # a dense convolution
        return ()
    layer = proof.trace.leaves[epilogue.conv].module
    if ("plan", layer, None) not in made:
        return ()
    after = ["pool"] * (epilogue.pool is not None)
    if epilogue.sum is not None:
        after.append("sum of 2x" if proof.doubled.get(epilogue.sum) in made else "sum")
    return (*after, *["moments"] * bool(proof.plans[epilogue.conv].plan.norms))


def _called(module: nn.Module) -> str:
    return type_before_parametrizations(module).__name__


def _dims(module: nn.Module) -> int:
    """Spatial dimensions of a layer's weight."""
    if isinstance(module, SparseLayer):
        return len(module.weight_shape) - 2
    return len(module.kernel_size) if isinstance(module, _ConvNd) else 0


def _why_never(module: nn.Module) -> str:
    if isinstance(module, PackedParameter):
        return "its module computes with the packed weight in its own way"
    if not isinstance(module, SparseLayer):
        return "it is transposed and dense" if isinstance(module, _ConvTransposeNd) else "it is dense"
    if not isinstance(module, SparseConv2d):
        return "it is transposed" if module.transposed else "it is no 2-D convolution"
    if hooked(module):
        return "it has hooks"
    return refusal(module) or "no code that calls it could be traced"
