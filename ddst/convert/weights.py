"""Every parameter of a model that acts as a weight: what a density of the whole model counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..nn import SparseLayer
from .attached import OWN, let_attach
from .candidates import Candidate, excluded_modules, find_candidates, owners_of

#: Modules whose parameters scale, shift or are looked up, by the names that people give them.
_NO_WEIGHTS = re.compile(r"(norm(\dd)?$)|embed", re.IGNORECASE)
_NOT_A_WEIGHT = re.compile(r"bias|emb|const|(^|_)(pos|position|token)|(^|_)(latents|codebook)$", re.IGNORECASE)


def find_weights(model: nn.Module, exclude: Iterable[str | nn.Module | type] = ()) -> list[Candidate]:
    """Every layer that :func:`find_candidates` finds, and every other parameter that acts as a weight, in module order.

    Such a parameter has floating-point or complex numbers and at least two dimensions longer than 1 (two of any length
    if its name is ``weight``), and belongs neither to an embedding nor to a normalisation (torch's, or a class whose
    name ends in "Norm" or holds "Embed"). Biases, constants, positions, tokens, latents, codebooks and embeddings, by
    their names, are none, nor is what has a first dimension of 1 for the batch. One that several modules share counts
    once.

    Args:
        model, exclude: as for :func:`find_candidates`.

    Returns:
        Layers that can be swapped have ``slots``. Other parameters have none; their name is that of the parameter, and
        those that can be packed where they are have an ``attribute``.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Bilinear(8, 8, 4))
    >>> for found in find_weights(model):
    ...     print(found.name, found.kind, found.size)
    0 Linear 64
    2.weight Bilinear 256
    """
    exclude = list(exclude) if isinstance(exclude, Iterable) and not isinstance(exclude, str | nn.Module) else exclude
    layers = {id(c.module): c for c in find_candidates(model, exclude)}
    excluded = excluded_modules(model, exclude)
    # With all that hangs below a layer: parametrizations keep its raw weight in modules of their own.
    seen = {id(p) for c in layers.values() for p in c.module.parameters()}
    inside = {id(m) for c in layers.values() for m in c.module.modules()}
    owners = owners_of(model)
    found: list[Candidate] = []
    for name, module in model.named_modules():
        if id(module) in layers:
            found.append(layers[id(module)])
        if id(module) in inside or isinstance(module, SparseLayer):
            continue
        if _holds_no_weight(module):  # nor do its parametrizations
            inside |= {id(m) for m in module.modules()}
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not _is_weight(module, attribute, parameter):
                continue
            seen.add(id(parameter))
            path = f"{name}.{attribute}" if name else attribute
            reason = "excluded" if id(module) in excluded else OWN
            kind = type(module).__name__
            found.append(Candidate(module, kind, tuple(parameter.shape), [path], weight=parameter, reason=reason))
    return [let_attach(c, owners) for c in found]


def _holds_no_weight(module: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
    return isinstance(module, kinds) or bool(_NO_WEIGHTS.search(type(module).__name__))


def _is_weight(module: nn.Module, name: str, parameter: Tensor) -> bool:
    if _holds_no_weight(module):
        return False
    if isinstance(parameter, UninitializedParameter) or not (parameter.is_floating_point() or parameter.is_complex()):
        return False
    if name == "weight":
        return parameter.dim() >= 2 and parameter.numel() > 0
    if _NOT_A_WEIGHT.search(name) or (parameter.shape[:1] == (1,) and "weight" not in name):
        return False
    return sum(size > 1 for size in parameter.shape) >= 2 and math.prod(parameter.shape) > 0
