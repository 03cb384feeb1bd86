"""What every block-sparse layer has beside its storage: initialisation, score requests, norms, dense states."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from .. import topology as tp
from .._arguments import check_bool, check_device, check_dtype, check_module, check_number
from ..backends import Problem, check_backend
from ..operator_view import operator_shape
from ..ops.gradient_record import GradientRecord, ScoreRecorder
from ..slot_change import SlotChange
from . import recorded_scores
from .deferred.value import tensor_of
from .from_dense import copy_of
from .origin import Origin, check_followers
from .packed.callers import WeightUses
from .packed.other_parameters import OtherParameters
from .packed.weight import PackedWeight
from .spectral_norm import SpectralNorm, rename_dense_keys
from .storage import PackedStorage
from .weight_norm import WeightNorm
from .weight_norm import rename_dense_keys as rename_weight_norm_keys

_WEIGHT = {
    "weight": "weight is packed and cannot be taken away or replaced: apply torch's norms and pruning before "
    "ddst.sparsify, or use ddst.nn.spectral_norm(layer) or ddst.nn.weight_norm(layer)"
}


class SparseLayer(PackedStorage):
    """``y = op(x, W)`` where only the active blocks of ``W`` exist: base of SparseLinear and the convolutions.

    Attributes:
        values, slot_blocks, topology, block, weight_shape, reserve, mask_version, storage_version: see
            :class:`~ddst.nn.storage.PackedStorage`.
        bias: parameter ``[C_out]`` or None. backend: see :mod:`ddst.backends`.
        gives_dense_weight: whether :attr:`weight` is a tensor, for code that would not take anything else.
        weight_uses: what has been done with :attr:`weight` outside of compiled graphs.
        spectral_norm: None, or the module that divides ``values`` by an estimate of the largest singular value.
        weight_norm: None, or the module that gives each row of ``values`` a length of its own. At most one of the two.
        runs: whether it has a forward pass, in which it takes norms.
        takes_deferred: whether it computes what is put off in front of it (:mod:`ddst.nn.deferred`).
        transposed: whether the weight's first dimension is that of the input, so that its blocks are ``(b_in, b_out)``.
        dense_kind: the class of :mod:`torch.nn` whose sparse twin this is.
        carried: names of the attributes that :func:`ddst.sparsify` took over from the instance it swapped.
    """

    runs: ClassVar[bool] = True
    takes_deferred: ClassVar[bool] = False
    transposed: ClassVar[bool] = False
    dense_kind: ClassVar[type[nn.Module]]
    carried: tuple[str, ...] = ()
    bias: nn.Parameter | None
    spectral_norm: SpectralNorm | None
    weight_norm: WeightNorm | None

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        block: Sequence[int] | int,
        density: float,
        reserve: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        groups: int = 1,
    ) -> None:
        pair, weight_shape = tp.check_block(block), tuple(weight_shape)
        # Everything is checked, and the values have their memory, before a mask of that many blocks is drawn.
        tp.check_groups(weight_shape, pair, groups)
        tp.check_block_total(operator_shape(weight_shape, groups), pair)
        total = tp.check_block_total(weight_shape, pair)
        nnz = tp.block_count(density, total)
        reserved = 0 if reserve is None else tp.block_count(check_number("reserve", reserve, most=1, above=0), total)
        check_bool("bias", bias)
        device, dtype = check_device("device", device), check_dtype("dtype", dtype)
        values = torch.empty((max(nnz, reserved), *pair), device=device, dtype=dtype)
        with unset_fake_temporarily():
            mask = tp.random_mask(weight_shape, pair, nnz, groups=groups)
            free = torch.full((reserved,), -1, dtype=torch.int32, device="cpu")
            slot_blocks = SlotChange.to_mask(free, mask, reserved).slot_blocks
        super().__init__(weight_shape, pair, slot_blocks, reserved, groups)
        self.__dict__["_parameters"] = OtherParameters.beside(_WEIGHT, {})
        self.backend = "auto"
        self.gives_dense_weight = False
        self.weight_uses = WeightUses()
        self.spectral_norm = self.weight_norm = None
        self._recorder, self._records = ScoreRecorder(), False
        self._origin: Origin | None = None
        self.values = nn.Parameter(values)
        outputs = self.op_shape[1 if self.transposed else 0]
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        self._place()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``±1/√fan_in`` with the fan-in that each block of outputs is actually connected to (torch's rule
        for the dense layer, applied to the connections that exist), so that the output variance is that of the dense
        layer. For a transposed convolution torch takes the fan-out instead; its bound grows here by the root of the
        connections that are missing. Biases likewise; outputs without a block have a bias of the dense layer's bound.
        """
        if self.values.is_meta:  # nothing to fill
            return
        rows, cols, taps = tp.grid(self.weight_shape, self.block)
        with unset_fake_temporarily():
            rank = self.slot_blocks.long()
            row, col = rank // (cols * taps), rank // taps % cols
            active = rank >= 0
            dense_fan = max(math.prod(self.weight_shape[1:]), 1)  # torch's, which for transposed layers is the fan-out
            if self.transposed:
                outputs, inputs = row // (rows // self.groups) * cols + col, row
                dense_fan_in, blocks = self.weight_shape[0] // self.groups * taps, cols * self.groups
            else:
                outputs, inputs, dense_fan_in, blocks = row, col, dense_fan, rows
            out_side, in_side = (1, 0) if self.transposed else (0, 1)
            widths = (self.weight_shape[in_side] - self.block[in_side] * inputs).clamp(max=self.block[in_side]).double()
            fan_in = torch.zeros(blocks, dtype=torch.float64, device="cpu")
            fan_in.index_add_(0, outputs[active], widths[active])
            bound = torch.where(fan_in > 0, fan_in * (dense_fan / dense_fan_in), dense_fan).rsqrt()
            scale = bound[outputs.clamp(min=0)][:, None, None] * tp.inside_slots(rank, self.weight_shape, self.block)
            bias_bound = bound.repeat_interleave(self.block[out_side])[: self.op_shape[out_side]]
        self.values.uniform_(-1, 1)
        if self.bias is not None:
            self.bias.uniform_(-1, 1)
        if not isinstance(self.values.data, FakeTensor):
            self.values.mul_(scale.to(self.values))
            if self.bias is not None:
                self.bias.mul_(bias_bound.to(self.bias))
        if self.weight_norm is not None:
            self.weight_norm.reset(self)

    @property
    def norm(self) -> SpectralNorm | WeightNorm | None:
        """The spectral or weight norm, whichever there is."""
        return self.weight_norm if self.spectral_norm is None else self.spectral_norm

    def effective_values(self) -> Tensor:
        """The packed values the layer computes with: ``values``; under spectral norm divided by σ, under weight norm
        ``g · v / ‖v‖``.

        In training mode this runs the power iteration, as torch's spectral norm does.
        """
        return self.values if self.norm is None else self.norm(self)

    @property
    def weight(self) -> PackedWeight | Tensor:
        """``W`` as code for the dense layer uses it, under spectral norm divided by σ, under weight norm
        ``g · v / ‖v‖``: a :class:`~ddst.nn.packed.weight.PackedWeight`, or a dense tensor where
        ``gives_dense_weight`` says so.

        Writing into it in place (``nn.init.normal_(layer.weight)``) sets the values at active blocks, and ``g`` to
        their norms.
        """
        weight = self._packed_weight()
        if not self.gives_dense_weight:
            return weight
        if not torch.compiler.is_compiling():
            self.weight_uses.dense.add("read as a tensor")
        return weight.dense()

    def _packed_weight(self) -> PackedWeight:
        if not torch.compiler.is_compiling():
            self._check_slots()
        values: Tensor = self.values if self.weight_norm is None else self.weight_norm(self)
        if self.spectral_norm is not None:
            values = self.spectral_norm.look(self)
        return PackedWeight.of(self, values, bound=True)

    # --- the mask ---------------------------------------------------------------------------------------------------

    def change_slots(self, change: SlotChange) -> None:
        super().change_slots(change)
        self._origin = None  # a copy with a mask of its own
        if self.spectral_norm is not None:
            self.spectral_norm.after_topology_change(self)

    def _apply_change(self, change: SlotChange) -> None:
        norms = None if self.weight_norm is None else self.weight_norm.norms(self)
        super()._apply_change(change)
        if self.weight_norm is not None and norms is not None:
            self.weight_norm.rescale(self, norms, change)
        Origin.tell_copies(self, change)

    @torch.no_grad()
    def _follow_change(self, change: SlotChange) -> None:
        """A change of the layer that this one is an average of. Its spectral norm's vectors are buffers: the average's
        own business, and nothing random is drawn for them here.
        """
        self._apply_change(change)

    def _ranked_values(self) -> Tensor:
        return self.values if self.weight_norm is None else self.weight_norm(self)

    def _place(self) -> None:
        super()._place()
        if self.spectral_norm is not None:
            self.spectral_norm.place(self)

    # --- growth scores ----------------------------------------------------------------------------------------------

    @property
    def scores_requested(self) -> bool:
        """Whether backward passes record what the block scores need."""
        return self._records

    @property
    def scores_recorded(self) -> bool:
        """Whether :meth:`take_scores` would find something: a backward pass since the request or the last take."""
        return not self._recorder.record.empty

    def request_scores(self, on_first: Callable[[], None] | None = None, keep_gradient: bool = False) -> None:
        """From now on backward passes keep what :meth:`take_scores` needs: the layer's inputs and output gradients.

        A compiled graph keeps copies of them, and only of forward calls that came after the request.

        Args:
            on_first: called in a backward pass before something is kept while nothing is.
            keep_gradient: whether :meth:`take_record` holds a copy of ``values.grad`` at the backward pass's end, too.
        """
        if not self._records:
            self._recorder.close()
            self._recorder.open(self.values)
        self._recorder.on_first, self._recorder.keep_gradient = on_first, keep_gradient
        self._records = True

    def cancel_scores(self) -> None:
        """Ends a request and frees what was recorded."""
        self._recorder.close()
        self._records = False

    def take_scores(self) -> Tensor:
        """``scores[block] = ‖∂L/∂W[block]‖₂`` of the dense gradient since the request or the last take.

        All backward passes since then are summed before the norm is taken, exactly as ``.grad`` sums them: several
        forward calls, gradient accumulation, gradient penalties and a ``zero_grad()`` in between included. ``W`` is the
        weight the layer computes with, so with spectral norm the normalised one. The record is dropped; the request
        stays open.

        Returns:
            Shape of ``block_mask``, dtype of the computation. Blocks that got no gradient score zero.

        Raises:
            RuntimeError: no request is open, no backward pass has reached the layer since, or an input of one has been
                changed in place since.

        Cost: the operations of one dense weight gradient of this layer.

        >>> from ddst.nn import SparseLinear
        >>> layer = SparseLinear(32, 32, density=0.5)
        >>> layer.request_scores()
        >>> layer(torch.randn(4, 32)).sum().backward()
        >>> layer.take_scores().shape
        torch.Size([2, 2])
        """
        return self.scores_of(self.take_record())

    def take_record(self) -> GradientRecord:
        """What :meth:`scores_of` makes :meth:`take_scores` of, for later: holds the activations and gradients."""
        if not self._records:
            raise RuntimeError("take_scores() needs request_scores() before the backward pass")
        if self._recorder.record.empty:
            raise RuntimeError("take_scores() found no gradient: no backward pass has reached this layer's values")
        return self._recorder.take()

    @torch.no_grad()
    def scores_of(self, record: GradientRecord, scale: Tensor | None = None) -> Tensor:
        """The scores of what :meth:`take_record` returned; the same whatever became of the layer since.

        Args:
            scale: ``[C_out]`` or a scalar, what each row of the gradient is multiplied by first; None for 1.
        """
        self._check_intact(record)
        return recorded_scores.scores_of(self, record, scale)

    @torch.no_grad()
    def dense_gradient_of(self, record: GradientRecord, scale: Tensor | None = None) -> Tensor:
        """The dense gradient itself, of the weight's shape; for the reference backend, calls on inputs of different
        sizes, and what is averaged over ranks. Zero where nothing was recorded.

        Args:
            scale: as in :meth:`scores_of`.

        Raises:
            RuntimeError: an input of a backward pass has been changed in place since.
        """
        self._check_intact(record)
        return recorded_scores.dense_gradient_of(self, record, scale)

    def _check_intact(self, record: GradientRecord) -> None:
        if not record.intact:
            raise RuntimeError("an input of this layer was changed in place after the backward pass that scores it")

    def forward(self, input: Tensor) -> Tensor:
        return self._forward(input)

    def _forward(self, *arguments: Any) -> Tensor:
        """:meth:`_compute`, guarded."""
        input = arguments[0]
        if isinstance(input, torch.fx.Proxy):  # a leaf to torch.fx, as the dense layer is
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, {})
        if not self.takes_deferred:
            arguments = (tensor_of(input), *arguments[1:])
        compute: Callable[..., Tensor] = self._compute
        if torch.compiler.is_compiling():
            if self._records and self.backend == "reference":  # which records by a hook, in Python
                return torch.compiler.disable(compute)(*arguments)
            return compute(*arguments)
        self._check_slots()
        return compute(*arguments)

    def _check_slots(self) -> None:
        """Before the values are used: whether they still lie where the map of slots says."""
        self._notice_overwritten_slots()
        if self._origin is not None:
            self._origin.check(self)

    @property
    def _record(self) -> int:
        """What operators are called with, so that their formulas find the recorder.

        While scores are requested a compiled graph is another one, as what it records costs copies.
        """
        return self._recorder.key if self._records or not torch.compiler.is_compiling() else 0

    def _compute(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        """What a backend has to know of this layer to say whether it can run it."""
        raise NotImplementedError

    # --- moves, copies and state dicts ------------------------------------------------------------------------------

    def _set_slots(self, slot_blocks: Tensor) -> None:
        self._recorder.take()  # what was recorded belongs to other blocks
        super()._set_slots(slot_blocks)

    def _take_overwritten_slots(self) -> None:
        if self._origin is not None:
            self._origin.check_map(self)
        check_followers(self)
        super()._take_overwritten_slots()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with nullcontext() if self._origin is None else self._origin.converted(self):
            super()._apply(fn, recurse)
        self._recorder.record.to(self.topology.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        lost = self._origin is not None and self._origin.is_lost
        return {**self.__dict__, "_recorder": None, "_records": False, "_origin": None, "_lost": lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        lost = state.pop("_lost")
        super().__setstate__(state)
        self._recorder = ScoreRecorder()
        self._place()
        self._origin = Origin.lost(self) if lost else None

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLayer:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._origin = Origin(self, twin)
        return twin

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Also takes a dense layer's ``weight``, keeping the active blocks, and packed values of another mask.

        A mask that comes with the checkpoint is taken over, so load the optimizer's state as well: what it holds
        has the shape of the old values.
        """
        norm = self.spectral_norm
        if norm is not None:
            rename_dense_keys(state_dict, prefix)
        if self.weight_norm is not None:
            rename_weight_norm_keys(state_dict, prefix)
        weight = state_dict.get(prefix + "weight")
        if weight is not None and prefix + "values" not in state_dict and tuple(weight.shape) == self.weight_shape:
            state_dict.pop(prefix + "weight")
            kept = tp.pack_slots(weight.detach(), self.slot_blocks, self.block)
            if norm is not None and kept.count_nonzero() != weight.count_nonzero():
                norm.settle_loaded(state_dict, prefix + "spectral_norm.", kept.to(self.values.device), self.backend)
            if self.weight_norm is not None:
                left = tp.unpack_slots(kept, self.slot_blocks, self.weight_shape)
                self.weight_norm.rescale_loaded(state_dict, prefix + "weight_norm.", weight.detach(), left)
            state_dict[prefix + "values"] = kept
            state_dict[prefix + "slot_blocks"] = self.slot_blocks
        if not self._take_slots(state_dict, prefix, local_metadata, error_msgs):
            return
        if self._origin is not None:
            self._origin.forget()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._place()

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"density={self.density:.3g}, block={self.block}, blocks={self.nnz}/{self.num_blocks}{bias}"

    def _adopt(self, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
        """Copies a dense layer's weight at the active blocks of ``mask``, its bias and whether they are trained."""
        free = torch.full((self.reserve,), -1, dtype=torch.int32, device="cpu")
        self.slot_blocks = SlotChange.to_mask(free, mask, self.reserve).slot_blocks
        packed = tp.pack_slots(weight.detach(), self.slot_blocks, self.block).contiguous()
        self.values = nn.Parameter(packed, requires_grad=weight.requires_grad)
        self.bias = copy_of(bias)
        self._set_slots(self.slot_blocks)


def set_backend(model: nn.Module, backend: str) -> None:
    """Makes every sparse layer of ``model`` compute with ``backend``: "auto", "cpu", "triton", "cuda" or "reference".

    >>> from ddst.nn import SparseLinear
    >>> model = nn.Sequential(SparseLinear(32, 32))
    >>> set_backend(model, "reference")
    >>> model[0].backend
    'reference'
    """
    check_backend(backend)
    for layer in sparse_layers(check_module("model", model)).values():
        layer.backend = backend


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The block-sparse layers of a model by name, in module order; a shared layer once.

    >>> from ddst.nn import SparseLinear
    >>> list(sparse_layers(nn.Sequential(nn.ReLU(), SparseLinear(32, 32))))
    ['1']
    """
    return {name: m for name, m in check_module("model", model).named_modules() if isinstance(m, SparseLayer)}
