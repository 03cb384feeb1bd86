"""A parameter of somebody else's module, kept as packed blocks.

``attach`` puts a :class:`PackedParameter` in the place of a plain parameter: the module's attribute (``weight``)
becomes a property that gives a :class:`~ddst.nn.packed.weight.PackedWeight`, and a child module (``packed_weight``)
holds the blocks. The module is made an instance of a subclass of its own class, of the same name, so that nothing else
of it changes: methods, hooks, other parameters, what it is an instance of, copies and pickles.

torch.fx takes such a module for a leaf, as it does sparse layers: what the module does to its weight before it uses it
is done while the graph is traced, and would be a constant there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..._arguments import check_int
from ...backends import Problem
from ...operator_view import operator_shape
from ..base import SparseLayer
from .callers import raised_here
from .other_parameters import OtherParameters
from .weight import PackedWeight

#: What the child module of a parameter is called: this and the parameter's name.
PREFIX = "packed_"


class PackedParameter(SparseLayer):
    """``W`` as blocks, for a module that computes with it in its own way.

    It has everything of a sparse layer but a forward pass: mask, growth scores, state dict, averages.

    Args:
        shape: of the parameter, ``(rows, columns, …)`` with up to two spatial dimensions, after any number of
            dimensions of size 1.
        density, block, reserve, device, dtype: as in :class:`~ddst.SparseConv2d`.

    Attributes:
        leading: number of dimensions of size 1 before those of ``weight_shape``.
    """

    runs: ClassVar[bool] = False
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

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameter."""
        return (*[1] * self.leading, *self.weight_shape)

    @property
    def has_run(self) -> bool:
        """Whether code has computed with the blocks, or is given a tensor anyway."""
        return self.gives_dense_weight or bool(self.weight_uses.packed)

    def to_dense(self) -> nn.Parameter:
        """The parameter itself, with zeros where there is no block."""
        dense = self.dense_weight().detach().reshape(self.shape)
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
        self.groups, self.op_shape = groups, operator_shape(self.weight_shape, groups)
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
        return f"{self.shape}, density={self.density:.3g}, block={self.block}, blocks={self.nnz}/{self.num_blocks}"


def split_shape(shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """``(leading ones, weight shape)`` of a parameter's shape: two dimensions at least, four at most.

    >>> split_shape((1, 64, 32, 3, 3)), split_shape((1, 64))
    ((1, (64, 32, 3, 3)), (0, (1, 64)))

    Raises:
        ValueError: it has fewer dimensions, or more that are no leading ones.
    """
    if not isinstance(shape, tuple | list):
        raise TypeError(f"shape must be a tuple of ints, got {type(shape).__name__}")
    sizes = [check_int("shape", size, 1) for size in shape]
    leading = max(len(sizes) - 4, 0)
    weight_shape = tuple(sizes[leading:])
    if len(weight_shape) < 2 or any(size != 1 for size in sizes[:leading]):
        raise ValueError(f"shape must have 2 to 4 dimensions, after any of size 1, got {tuple(shape)}")
    return leading, weight_shape


class HoldsPackedParameters:
    """What the classes of modules with packed parameters have beside their own.

    Attributes:
        packed_attributes: names of the parameters.
        own_class: the class that the module had before.
    """

    packed_attributes: ClassVar[tuple[str, ...]] = ()
    own_class: ClassVar[type]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not handed on: a class that keeps a register of its subclasses has no new one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # type(module)(...) in the module's own code makes one with plain parameters.
        self.__class__ = type(self).own_class
        self.__class__.__init__(self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call: Any = super().__call__  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.fx.Proxy):  # a leaf to torch.fx, as sparse layers are
                tracer: Any = value.tracer
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        try:
            return call(*args, **kwargs)
        except Exception as error:
            unused = [name for name in type(self).packed_attributes if not _packed_at(self, name).has_run]
            if unused and not raised_here(error):
                error.add_note(
                    f"ddst: {' and '.join(unused)} of this {type(self).__name__} is packed and has not run yet. If its "
                    "code takes nothing but a tensor, call ddst.sparsify with sample=, which finds that out, or with "
                    "exclude="
                )
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).packed_attributes:
            _assign(_packed_at(self, name), name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.removesuffix("_orig") in type(self).packed_attributes:  # as torch's pruning begins
            raise RuntimeError(_refusal(name.removesuffix("_orig")))
        super().register_parameter(name, param)  # type: ignore[misc]

    def __delattr__(self, name: str) -> None:
        # Where torch removes a norm, "weight" goes first, then what it was computed from.
        packed = type(self).packed_attributes
        if any(key in packed for key in (name, f"{name}_orig", f"{name}_v")):
            raise AttributeError(_refusal(name))
        super().__delattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        get_state = getattr(self, "__getstate__", None)
        state = get_state() if get_state is not None else dict(self.__dict__)
        return _rebuild, (type(self).own_class, type(self).packed_attributes), state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A dense state dict: the child takes what it finds under "weight".
        for name in type(self).packed_attributes:
            value, packed = state_dict.get(prefix + name), _packed_at(self, name)
            if isinstance(value, Tensor) and tuple(value.shape) == packed.shape:
                del state_dict[prefix + name]
                state_dict[f"{prefix}{PREFIX}{name}.weight"] = value.reshape(packed.weight_shape)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


def _refusal(name: str) -> str:
    return (
        f"{name} is packed by ddst.sparsify and cannot be taken away or replaced: apply or remove norms, "
        "parametrizations and pruning before, leave the module out with exclude=, or call ddst.densify first"
    )


def _packed_at(module: Any, name: str) -> PackedParameter:
    packed = module.__dict__["_modules"][PREFIX + name]
    assert isinstance(packed, PackedParameter)
    return packed


def _assign(packed: PackedParameter, name: str, value: Any) -> None:
    if not isinstance(value, Tensor | PackedWeight):
        raise TypeError(
            f"{name} is packed: it can be assigned a tensor, whose entries at active blocks it takes, got "
            f"{type(value).__name__}"
        )
    packed._packed_weight().assign(value)
    if isinstance(value, nn.Parameter):
        packed.values.requires_grad_(value.requires_grad)


def _rebuild(base: type, attributes: tuple[str, ...]) -> Any:
    return object.__new__(packed_class(base, attributes))


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
        "own_class": base,
        **{name: of(name) for name in attributes},
    }
    return type(base.__name__, (HoldsPackedParameters, base), body)


def attach(module: nn.Module, name: str, packed: PackedParameter) -> None:
    """Puts packed blocks in the place of a module's parameter."""
    check_detachable(module)
    kind: Any = type(module)
    attributes: tuple[str, ...] = (name,)
    if isinstance(module, HoldsPackedParameters):
        kind, attributes = kind.own_class, (*kind.packed_attributes, name)
    packed_names = {key: _refusal(key) for key in attributes}
    module.__dict__["_parameters"] = OtherParameters.beside(packed_names, module._parameters)
    children = dict(module._modules)
    module._modules.clear()  # the first of the children, as the parameter came before them
    module.add_module(PREFIX + name, packed)
    module._modules.update(children)
    module.__class__ = packed_class(kind, attributes)
    _renew_product(module, name, packed.weight)


def check_detachable(module: nn.Module) -> None:
    """Raises if somebody has made a class of their own of that of a module with packed parameters."""
    kind: Any = type(module)
    if isinstance(module, HoldsPackedParameters) and HoldsPackedParameters not in kind.__bases__:
        raise ValueError(
            f"a {kind.__name__} was made of a {kind.own_class.__name__} after ddst.sparsify had packed its "
            f"{' and '.join(kind.packed_attributes)}: undo that first, with "
            "torch.nn.utils.parametrize.remove_parametrizations if it was a parametrization"
        )


def detach(module: nn.Module) -> tuple[str, ...]:
    """Gives a module its parameters back, dense, and returns their names: the inverse of :func:`attach`."""
    assert isinstance(module, HoldsPackedParameters)
    attributes = type(module).packed_attributes
    module.__class__ = type(module).own_class
    module.__dict__["_parameters"] = dict(module._parameters)
    for name in attributes:
        packed = module._modules.pop(PREFIX + name)
        assert isinstance(packed, PackedParameter)
        dense = packed.to_dense()
        setattr(module, name, dense)
        _renew_product(module, name, dense.detach())
    return attributes


def _renew_product(module: nn.Module, name: str, value: Any) -> None:
    """torch's hooks for norms compute "weight" from "weight_orig" or "weight_v", and hold what it last was."""
    product, suffix = name.rpartition("_")[::2]
    if suffix in ("orig", "v") and isinstance(module.__dict__.get(product), Tensor | PackedWeight):
        module.__dict__[product] = value
