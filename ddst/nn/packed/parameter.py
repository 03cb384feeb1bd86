"""A parameter of somebody else's module, kept as packed blocks.

``attach`` puts a :class:`PackedParameter` in the place of a plain parameter: the module's attribute (``weight``)
becomes a property that gives a :class:`~ddst.nn.packed.weight.PackedWeight`, and a child module (``packed_weight``)
holds the blocks. The module is made an instance of a subclass of its own class, of the same name, so that nothing else
of it changes: methods, hooks, other parameters, what it is an instance of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ... import topology as tp
from ...backends import Problem
from ..base import SparseLayer
from .weight import PackedWeight

#: What the child module of a parameter is called: this and the parameter's name.
PREFIX = "packed_"


class PackedParameter(SparseLayer):
    """``W`` as blocks, for a module that computes with it in its own way.

    It has everything of a sparse layer but a forward pass: mask, growth scores, state dict, averages.

    Args:
        shape: of the parameter, ``(rows, columns, …)`` with up to two spatial dimensions, after any number of
            dimensions of size 1.
        density, block, reserve, device, dtype: as in :class:`~ddst.nn.SparseConv2d`.

    Attributes:
        leading: number of dimensions of size 1 before those of ``weight_shape``.
    """

    dense_kind: ClassVar[type[nn.Module]] = nn.Module

    def __init__(
        self,
        shape: Sequence[int],
        block: Sequence[int] | int = (16, 16),
        density: float = 0.1,
        reserve: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        leading, weight_shape = split_shape(shape)
        super().__init__(weight_shape, False, block, density, reserve, device, dtype)
        self.leading = leading

    @classmethod
    def of(cls, parameter: Tensor, mask: Tensor, block: Sequence[int] | int, reserve: float | None) -> PackedParameter:
        """The blocks of a parameter that a mask names; nothing is shared."""
        packed = cls(parameter.shape, block, 1 / mask.numel(), reserve, parameter.device, parameter.dtype)
        packed._adopt(parameter.reshape(packed.weight_shape), mask, None)
        return packed

    def _packed_weight(self) -> PackedWeight:
        if not torch.compiler.is_compiling():
            self._check_slots()
        return PackedWeight.of(self, self.values, self.leading, bound=True)

    def to_dense(self) -> nn.Parameter:
        """The parameter itself, with zeros where there is no block."""
        dense = self.dense_weight().detach().reshape([1] * self.leading + list(self.weight_shape))
        return nn.Parameter(dense.contiguous(), requires_grad=self.values.requires_grad)

    def use_groups(self, groups: int) -> bool:
        """Takes the weight for that of a convolution with so many groups, from its first use on."""
        if groups == self.groups:
            return True
        if self.groups != 1 or self.weight_uses.packed or torch.compiler.is_compiling() or groups < 1:
            return False
        rows, cols = self.weight_shape[:2]
        if rows % groups or (rows // groups) % self.block[0] or cols % self.block[1]:
            return False
        self.groups, self.op_shape = groups, tp.operator_shape(self.weight_shape, groups)
        self.__dict__.pop("topology")
        self._place()
        return True

    def forward(self, *args: Any) -> Tensor:
        raise RuntimeError("a PackedParameter is no layer: call the module that holds it")

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        linear = len(self.weight_shape) == 2
        space = (1, 1) if linear else self.op_shape[2:]
        return Problem(device, dtype, self.block, (space[0], space[1]), linear=linear)

    def extra_repr(self) -> str:
        shape = tuple([1] * self.leading + list(self.weight_shape))
        return f"{shape}, density={self.density:.3g}, block={self.block}, blocks={self.nnz}/{self.num_blocks}"


def split_shape(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """``(leading ones, weight shape)`` of a parameter's shape: two dimensions at least, four at most.

    >>> split_shape((1, 64, 32, 3, 3)), split_shape((1, 64))
    ((1, (64, 32, 3, 3)), (0, (1, 64)))

    Raises:
        ValueError: it has fewer dimensions, or more that are no leading ones.
    """
    leading = max(len(shape) - 4, 0)
    weight_shape = tuple(int(size) for size in shape[leading:])
    if len(weight_shape) < 2 or any(size != 1 for size in shape[:leading]):
        raise ValueError(f"shape must have 2 to 4 dimensions, after any of size 1, got {tuple(shape)}")
    return leading, weight_shape


class HoldsPackedParameters:
    """What the classes of modules with packed parameters have beside their own.

    Attributes:
        packed_attributes: names of the parameters.
    """

    packed_attributes: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).packed_attributes:
            _assign(self.__dict__["_modules"][PREFIX + name], name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        get_state = getattr(self, "__getstate__", None)
        state = get_state() if get_state is not None else dict(self.__dict__)
        return _rebuild, (type(self).__mro__[2], type(self).packed_attributes), state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A dense state dict: the child takes what it finds under "weight".
        for name in type(self).packed_attributes:
            if prefix + name in state_dict:
                state_dict[f"{prefix}{PREFIX}{name}.weight"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


def _assign(packed: PackedParameter, name: str, value: Any) -> None:
    if not isinstance(value, Tensor | PackedWeight):
        raise TypeError(
            f"{name} is packed: it can be assigned a tensor, whose entries at active blocks it takes, got "
            f"{type(value).__name__}"
        )
    with torch.no_grad():
        packed._packed_weight().call("copy_", value.unpacked() if isinstance(value, PackedWeight) else value)
    if isinstance(value, nn.Parameter):
        packed.values.requires_grad_(value.requires_grad)


def _rebuild(base: type, attributes: tuple[str, ...]) -> Any:
    kind: Any = packed_class(base, attributes)
    return kind.__new__(kind)


@functools.cache
def packed_class(base: Any, attributes: tuple[str, ...]) -> type:
    """The subclass of a module's class in which parameters of these names are packed."""

    def of(name: str) -> property:
        return property(lambda module: module.__dict__["_modules"][PREFIX + name].weight)

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "packed_attributes": attributes,
        **{name: of(name) for name in attributes},
    }
    return type(base.__name__, (HoldsPackedParameters, base), body)


def attach(module: nn.Module, name: str, packed: PackedParameter) -> None:
    """Puts packed blocks in the place of a module's parameter."""
    del module._parameters[name]
    kind: Any = type(module)
    attributes: tuple[str, ...] = (name,)
    if isinstance(module, HoldsPackedParameters):
        kind, attributes = kind.__mro__[2], (*kind.packed_attributes, name)
    children = dict(module._modules)
    module._modules.clear()  # the first of the children, as the parameter came before them
    module.add_module(PREFIX + name, packed)
    module._modules.update(children)
    module.__class__ = packed_class(kind, attributes)
    # torch's hook for spectral norm computes "weight" from "weight_orig", and holds what it last was.
    product = name.removesuffix("_orig")
    if product != name and isinstance(module.__dict__.get(product), Tensor):
        module.__dict__[product] = packed.weight


def detach(module: nn.Module) -> None:
    """Gives a module its parameters back, dense: the inverse of :func:`attach`."""
    assert isinstance(module, HoldsPackedParameters)
    attributes = type(module).packed_attributes
    module.__class__ = type(module).__mro__[2]
    for name in attributes:
        packed = module._modules.pop(PREFIX + name)
        assert isinstance(packed, PackedParameter)
        setattr(module, name, packed.to_dense())
