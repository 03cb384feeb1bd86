"""What every block-sparse layer has beside its storage: initialisation, score requests, spectral norm, dense states."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from .. import topology as tp
from .._arguments import check_bool, check_device, check_dtype, check_module, check_number, check_type
from ..backends import Problem, check_backend
from ..ops.gradient_record import GradientRecord, ScoreRecorder
from ..ops.reference import block_norms_of
from ..slot_change import SlotChange
from .dense_view import DenseView
from .origin import Origin, check_followers
from .spectral_norm import SpectralNorm, rename_dense_keys
from .storage import PackedStorage


class SparseLayer(PackedStorage):
    """``y = op(x, W)`` where only the active blocks of ``W`` exist: base of SparseConv2d and SparseLinear.

    Attributes:
        values, slot_blocks, topology, block, weight_shape, reserve, mask_version, storage_version: see
            :class:`~ddst.nn.storage.PackedStorage`.
        bias: parameter ``[C_out]`` or None. backend: see :mod:`ddst.backends`.
        spectral_norm: None, or the module that divides ``values`` by an estimate of the largest singular value.
    """

    bias: nn.Parameter | None
    spectral_norm: SpectralNorm | None

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        block: Sequence[int] | int,
        density: float,
        reserve: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        pair, weight_shape = tp.check_block(block), tuple(weight_shape)
        # Everything is checked, and the values have their memory, before a mask of that many blocks is drawn.
        total = tp.check_block_total(weight_shape, pair)
        nnz = tp.block_count(density, total)
        reserved = 0 if reserve is None else tp.block_count(check_number("reserve", reserve, most=1, above=0), total)
        check_bool("bias", bias)
        device, dtype = check_device("device", device), check_dtype("dtype", dtype)
        values = torch.empty((max(nnz, reserved), *pair), device=device, dtype=dtype)
        with unset_fake_temporarily():
            mask = tp.random_mask(weight_shape, pair, nnz)
            free = torch.full((reserved,), -1, dtype=torch.int32, device="cpu")
            slot_blocks = SlotChange.to_mask(free, mask, reserved).slot_blocks
        super().__init__(weight_shape, pair, slot_blocks, reserved)
        self.backend = "auto"
        self.spectral_norm = None
        self._recorder, self._records = ScoreRecorder(), False
        self._origin: Origin | None = None
        self.values = nn.Parameter(values)
        self.bias = nn.Parameter(torch.empty(weight_shape[0], device=device, dtype=dtype)) if bias else None
        self._place()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``±1/√fan_in`` with the fan-in that each block row is actually connected to (torch's rule for the
        dense layer, applied to the connections that exist), so that the output variance is that of a dense layer of
        that fan-in. Biases likewise; where a row has no block, the bias takes the dense layer's bound.
        """
        if self.values.is_meta:  # nothing to fill
            return
        rows, cols, taps = tp.grid(self.weight_shape, self.block)
        with unset_fake_temporarily():
            rank = self.slot_blocks.long()
            row, col = rank // (cols * taps), rank // taps % cols
            active = rank >= 0
            widths = (self.weight_shape[1] - self.block[1] * col).clamp(max=self.block[1]).double()
            fan_in = torch.zeros(rows, dtype=torch.float64, device="cpu").index_add_(0, row[active], widths[active])
            dense_fan_in = max(math.prod(self.weight_shape[1:]), 1)
            bound = torch.where(fan_in > 0, fan_in, dense_fan_in).rsqrt()
            scale = bound[row.clamp(min=0)][:, None, None] * tp.inside_slots(rank, self.weight_shape, self.block)
            bias_bound = bound.repeat_interleave(self.block[0])[: self.weight_shape[0]]
        self.values.uniform_(-1, 1)
        if self.bias is not None:
            self.bias.uniform_(-1, 1)
        if not isinstance(self.values.data, FakeTensor):
            self.values.mul_(scale.to(self.values))
            if self.bias is not None:
                self.bias.mul_(bias_bound.to(self.bias))

    def effective_values(self) -> Tensor:
        """The packed values the layer computes with: ``values``, divided by σ under spectral norm.

        In training mode this runs the power iteration, as torch's spectral norm does.
        """
        return self.values if self.spectral_norm is None else self.spectral_norm(self)

    @property
    def weight(self) -> DenseView:
        """``W`` as code for the dense layer reads it: unpacked anew at each look, differentiable; under spectral norm
        divided by σ. Writing into it in place (``nn.init.normal_(layer.weight)``) sets the values at active blocks.
        """
        values: Tensor = self.values
        if self.spectral_norm is not None:
            sigma = self.spectral_norm.sigma(self)
            values = values / (sigma + (sigma == 0))
        # Contiguous, so that an initialiser draws what it draws for a dense layer.
        return DenseView.of(tp.unpack_slots(values, self.slot_blocks, self.weight_shape).contiguous(), self)

    # --- the mask ---------------------------------------------------------------------------------------------------

    def change_slots(self, change: SlotChange) -> None:
        super().change_slots(change)
        self._origin = None  # a copy with a mask of its own
        if self.spectral_norm is not None:
            self.spectral_norm.after_topology_change(self)

    def _apply_change(self, change: SlotChange) -> None:
        super()._apply_change(change)
        Origin.tell_copies(self, change)

    @torch.no_grad()
    def _follow_change(self, change: SlotChange) -> None:
        """A change of the layer that this one is an average of. Its spectral norm's vectors are buffers: the average's
        own business, and nothing random is drawn for them here.
        """
        super()._apply_change(change)
        Origin.tell_copies(self, change)

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
    def scores_of(self, record: GradientRecord) -> Tensor:
        """The scores of what :meth:`take_record` returned; the same whatever became of the layer since."""
        self._check_intact(record)
        if record.dense is not None or len({(g.shape[1:], x.shape[1:]) for g, x in record.factors}) > 1:
            return block_norms_of(self.dense_gradient_of(record), self.block)
        grads, inputs = zip(*record.factors, strict=True)
        one = len(grads) == 1
        return self._block_scores(grads[0] if one else torch.cat(grads), inputs[0] if one else torch.cat(inputs))

    @torch.no_grad()
    def dense_gradient_of(self, record: GradientRecord) -> Tensor:
        """The dense gradient itself, of the weight's shape; for the reference backend, calls on inputs of different
        sizes, and what is averaged over ranks. Zero where nothing was recorded.

        Raises:
            RuntimeError: an input of a backward pass has been changed in place since.
        """
        self._check_intact(record)
        total = record.dense
        for grad_output, input in record.factors:
            part = self._dense_gradient(grad_output, input)
            total = part if total is None else total.add_(part)
        return self.values.new_zeros(self.weight_shape) if total is None else total

    def _check_intact(self, record: GradientRecord) -> None:
        if not record.intact:
            raise RuntimeError("an input of this layer was changed in place after the backward pass that scores it")

    def _block_scores(self, grad_output: Tensor, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _dense_gradient(self, grad_output: Tensor, input: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):  # a leaf to torch.fx, as the dense layer is
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        if torch.compiler.is_compiling():
            if self._records and self.backend == "reference":  # which records by a hook, in Python
                return torch.compiler.disable(self._compute)(input)
            return self._compute(input)
        self._notice_overwritten_slots()
        if self._origin is not None:
            self._origin.check(self)
        return self._compute(input)

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
        weight = state_dict.get(prefix + "weight")
        if weight is not None and prefix + "values" not in state_dict and tuple(weight.shape) == self.weight_shape:
            state_dict.pop(prefix + "weight")
            kept = tp.pack_slots(weight.detach(), self.slot_blocks, self.block)
            if norm is not None and kept.count_nonzero() != weight.count_nonzero():
                norm.settle_loaded(state_dict, prefix + "spectral_norm.", kept.to(self.values.device), self.backend)
            state_dict[prefix + "values"] = kept
            state_dict[prefix + "slot_blocks"] = self.slot_blocks
        if not self._take_slots(state_dict, prefix, error_msgs):
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


def check_plain(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises unless ``module`` is exactly a ``kind`` whose weight is a plain parameter.

    A spectral norm or another parametrization makes ``weight`` a product that changes with every look at it, and a
    subclass has a forward pass of its own.
    """
    check_type("module", module, kind, f"an nn.{kind.__name__}")
    if type(module) is not kind or not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise ValueError(
            f"module must be a plain nn.{kind.__name__}, got {type(module).__name__} with a computed weight or "
            "a forward pass of its own; ddst.sparsify carries spectral norm over"
        )


def copy_of(parameter: Tensor | None) -> nn.Parameter | None:
    """A parameter of its own memory with the same entries and ``requires_grad``."""
    return None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def mask_for(weight: Tensor, block: tuple[int, int], density: float | None, block_mask: Tensor | None) -> Tensor:
    """The mask ``from_dense`` was asked for: given, or the blocks of largest norm at a density (0.1 by default)."""
    if block_mask is not None:
        if density is not None:
            raise ValueError("give density or block_mask, not both")
        tp.check_mask(block_mask, tp.mask_shape(weight.shape, block))
        return block_mask
    norms = block_norms_of(weight.detach(), block)
    count = tp.block_count(0.1 if density is None else density, norms.numel())
    mask = torch.zeros(norms.numel(), dtype=torch.bool, device=weight.device)
    mask[norms.flatten().topk(count).indices] = True
    return mask.view(norms.shape)


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
