"""What every block-sparse layer has: packed values, a block mask that may change, score requests, state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import topology as tp
from .._arguments import check_bool, check_device, check_dtype, check_module, check_type
from ..backends import Problem, check_backend
from ..ops.reference import block_norms_of
from ..ops.scores import GradientRecord, ScoreRecorder
from .spectral_norm import SpectralNorm, rename_dense_keys


class SparseLayer(nn.Module):
    """``y = op(x, W)`` where only the active blocks of ``W`` exist: base of SparseConv2d and SparseLinear.

    Attributes:
        values: parameter ``[nnz, b_out, b_in]``, the active blocks in the order of :mod:`ddst.topology`.
        bias: parameter ``[C_out]`` or None.
        block_mask: bool buffer, which blocks are active; change it with :meth:`set_block_mask` only.
        topology: int32 buffer built from the mask; not in the state dict.
        block: ``(b_out, b_in)``. weight_shape: shape of the dense weight. backend: see :mod:`ddst.backends`.
        spectral_norm: None, or the module that divides ``values`` by an estimate of the largest singular value.
        mask_version: grows by one with every change of the mask.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    block_mask: Tensor
    topology: Tensor
    spectral_norm: SpectralNorm | None

    def __init__(
        self,
        weight_shape: Sequence[int],
        bias: bool,
        block: Sequence[int] | int,
        density: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.block = tp.check_block(block)
        self.weight_shape = tuple(weight_shape)
        # Everything is checked, and the values have their memory, before a mask of that many blocks is drawn.
        total = tp.check_block_total(self.weight_shape, self.block)
        nnz = tp.block_count(density, total)
        check_bool("bias", bias)
        device, dtype = check_device("device", device), check_dtype("dtype", dtype)
        self.values = nn.Parameter(torch.empty((nnz, *self.block), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(weight_shape[0], device=device, dtype=dtype)) if bias else None
        self.backend = "auto"
        self.mask_version = 0
        self.spectral_norm = None
        self._recorder: ScoreRecorder | None = None
        mask = tp.random_mask(self.weight_shape, self.block, nnz)
        self._active_weights = self._count(mask)
        self.register_buffer("block_mask", mask.to(device))
        self.register_buffer("topology", tp.build_topology(mask).to(device), persistent=False)
        self.reset_parameters()

    @staticmethod
    def nnz_of(mask: Tensor) -> int:
        return int(mask.sum())

    @property
    def nnz(self) -> int:
        """Number of active blocks."""
        return self.values.shape[0]

    @property
    def num_blocks(self) -> int:
        """Number of blocks, active or not."""
        return self.block_mask.numel()

    @property
    def density(self) -> float:
        """Active weights over all weights; parts of edge blocks that lie outside the weight are not counted."""
        return self.active_weights / math.prod(self.weight_shape)

    @property
    def active_weights(self) -> int:
        """Number of weights inside active blocks, without the parts of edge blocks that lie outside the weight."""
        return self._active_weights

    def _count(self, mask: Tensor) -> int:
        return int(tp.mask_sizes(self.weight_shape, self.block)[mask.cpu()].sum())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ``±1/√fan_in`` with the fan-in that each block row is actually connected to (torch's rule for the
        dense layer, applied to the connections that exist), so that the output variance is that of a dense layer of
        that fan-in. Biases likewise; where a row has no block, the bias takes the dense layer's bound.
        """
        if self.values.is_meta:  # nothing to fill, and a mask without entries
            return
        index = self._index()
        columns = torch.arange(self.block_mask.shape[1], device="cpu")
        widths = (self.weight_shape[1] - self.block[1] * columns).clamp(max=self.block[1])
        row = index.block_row.long()
        fan_in = torch.zeros(self.block_mask.shape[0], dtype=torch.float64, device="cpu")
        fan_in.index_add_(0, row.cpu(), widths.double()[index.block_col.long().cpu()])
        dense_fan_in = math.prod(self.weight_shape[1:])
        bound = torch.where(fan_in > 0, fan_in, max(dense_fan_in, 1)).rsqrt().to(self.values)
        self.values.uniform_(-1, 1)
        self.values.mul_(bound[row][:, None, None])
        self.values.mul_(tp.inside(self.block_mask, self.weight_shape, self.block))
        if self.bias is not None:
            self.bias.uniform_(-1, 1)
            self.bias.mul_(bound.repeat_interleave(self.block[0])[: self.weight_shape[0]])

    def _index(self) -> tp.Index:
        rows, cols, _ = tp.grid(self.weight_shape, self.block)
        return tp.split_topology(self.topology, rows, cols)

    def dense_weight(self) -> Tensor:
        """``W`` with zeros at inactive blocks, differentiable; the raw weight, before any spectral norm."""
        return tp.unpack(self.values, self.block_mask, self.weight_shape)

    def effective_values(self) -> Tensor:
        """The packed values the layer computes with: ``values``, divided by σ under spectral norm.

        In training mode this runs the power iteration, as torch's spectral norm does.
        """
        return self.values if self.spectral_norm is None else self.spectral_norm(self)

    @torch.no_grad()
    def block_norms(self) -> Tensor:
        """``[nnz]``: L2 norm of each active block's values, without the parts of edge blocks outside the weight.

        Those are zero as they are made here, but whoever fills ``values`` as a whole (``nn.init``) fills them too.
        """
        values: Tensor = self.values
        if any(size % width for size, width in zip(self.weight_shape, self.block, strict=False)):
            values = values * tp.inside(self.block_mask, self.weight_shape, self.block)
        return torch.linalg.vector_norm(values, dim=(1, 2))

    # --- the mask ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_block_mask(self, mask: Tensor) -> tp.MaskChange:
        """Makes ``mask`` the set of active blocks: kept blocks keep their values, new ones are zero.

        ``values`` stays the same Parameter object, so optimizers keep it; its gradient is carried over likewise.
        Optimizer state is not the layer's: carry it with :func:`ddst.sparsity.remap_state` and what this returns.

        Not while another thread computes with the layer: mask and values are replaced one after the other, and a pass
        under way may mix old and new ones or read freed memory (as where ``.data`` of a dense layer is replaced).

        Args:
            mask: bool, shape of ``block_mask``.

        Returns:
            What changed, able to carry anything stored per block.

        Raises:
            TypeError, ValueError: not bool, or another shape; nothing is changed.

        >>> from ddst.nn import SparseLinear
        >>> layer = SparseLinear(32, 32, density=0.25)
        >>> layer.set_block_mask(torch.ones(2, 2, dtype=torch.bool)).grown.sum().item(), layer.nnz
        (3, 4)
        """
        tp.check_mask(mask, self.block_mask.shape, "mask")
        mask = mask.detach().to(self.block_mask.device)
        change = tp.MaskChange.between(self.block_mask, mask)
        self._replace_topology(mask)
        grad = self.values.grad
        self._replace_values(change.apply(self.values.detach()))
        self.values.grad = None if grad is None else change.apply(grad.detach())
        if self.spectral_norm is not None:
            self.spectral_norm.after_topology_change(self)
        return change

    def _replace_topology(self, mask: Tensor) -> None:
        topology = tp.build_topology(mask)
        self.block_mask, self.topology = mask.clone(), topology
        self._active_weights = self._count(mask)
        self.mask_version += 1
        if self.spectral_norm is not None:
            self.spectral_norm.set_block_mask(mask)
        if self._recorder is not None:
            self._recorder.take()
            self._recorder.open(topology)

    def _replace_values(self, values: Tensor) -> None:
        # Autograd remembers the shape of a leaf for as long as a graph that uses it lives (a kept loss, say), and would
        # reject gradients of the new shape. It forgets when the dtype changes, so the dtype changes for a moment.
        self.values.grad = None
        other = torch.float16 if values.dtype != torch.float16 else torch.float32
        self.values.data = values.new_empty(0, dtype=other)
        self.values.data = values

    # --- growth scores ----------------------------------------------------------------------------------------------

    @property
    def scores_requested(self) -> bool:
        """Whether backward passes record what the block scores need."""
        return self._recorder is not None

    @property
    def scores_recorded(self) -> bool:
        """Whether :meth:`take_scores` would find something: a backward pass since the request or the last take."""
        return self._recorder is not None and not self._recorder.record.empty

    def request_scores(self, on_first: Callable[[], None] | None = None) -> None:
        """From now on backward passes keep what :meth:`take_scores` needs: the layer's inputs and output gradients.

        Args:
            on_first: called in a backward pass before something is kept while nothing is.
        """
        if self._recorder is None:
            self._recorder = ScoreRecorder()
        self._recorder.on_first = on_first
        self._recorder.open(self.topology)

    def cancel_scores(self) -> None:
        """Ends a request and frees what was recorded."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder.on_first = None  # a graph of before may still write into it
        self._recorder = None

    def take_scores(self) -> Tensor:
        """``scores[block] = ‖∂L/∂W[block]‖₂`` of the dense gradient since the request or the last take.

        All backward passes since then are summed before the norm is taken, exactly as ``.grad`` sums them: several
        forward calls, gradient accumulation and gradient penalties included. ``W`` is the weight the layer computes
        with, so with spectral norm the normalised one. The record is dropped; the request stays open.

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
        if self._recorder is None:
            raise RuntimeError("take_scores() needs request_scores() before the backward pass")
        if self._recorder.record.empty:
            raise RuntimeError("take_scores() found no gradient: no backward pass has reached this layer's values")
        return self._recorder.take()

    @torch.no_grad()
    def scores_of(self, record: GradientRecord) -> Tensor:
        """The scores of what :meth:`take_record` returned; the same whatever became of the layer since."""
        if not record.intact:
            raise RuntimeError("an input of this layer was changed in place after the backward pass that scores it")
        if record.dense is not None or len({(g.shape[1:], x.shape[1:]) for g, x in record.factors}) > 1:
            return self._scores_by_dense_gradient(record)
        grads, inputs = zip(*record.factors, strict=True)
        one = len(grads) == 1
        return self._block_scores(grads[0] if one else torch.cat(grads), inputs[0] if one else torch.cat(inputs))

    def _scores_by_dense_gradient(self, record: GradientRecord) -> Tensor:
        """For the reference backend, and for calls on inputs of different sizes: one dense gradient of this layer."""
        total = record.dense
        for grad_output, input in record.factors:
            part = self._dense_gradient(grad_output, input)
            total = part if total is None else total.add_(part)
        assert total is not None
        return block_norms_of(total, self.block)

    def _block_scores(self, grad_output: Tensor, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _dense_gradient(self, grad_output: Tensor, input: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        # Recording happens in Python, in the backward formulas, which a compiled graph does not call. (As a decorator
        # of a method, disable would import the whole compiler whenever ddst is imported.)
        if self._recorder is not None and torch.compiler.is_compiling():
            return torch.compiler.disable(self._compute)(input)
        return self._compute(input)

    def _compute(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        """What a backend has to know of this layer to say whether it can run it."""
        raise NotImplementedError

    # --- moves, copies and state dicts ------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._recorder is not None:  # which knows the topology by its address
            self._recorder.open(self.topology)
            self._recorder.record.to(self.topology.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_recorder": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
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
            kept = tp.pack(weight.detach().to(self.block_mask.device), self.block_mask, self.block)
            if norm is not None and kept.count_nonzero() != weight.count_nonzero():
                norm.settle_loaded(state_dict, prefix + "spectral_norm.", kept, self.backend)
            state_dict[prefix + "values"] = kept
            state_dict[prefix + "block_mask"] = self.block_mask
        mask, values = state_dict.get(prefix + "block_mask"), state_dict.get(prefix + "values")
        if mask is not None and mask.shape == self.block_mask.shape:
            # A mask alone must be that of the present values.
            shape = tuple(self.values.shape if values is None else values.shape)
            if mask.dtype != torch.bool or shape != (self.nnz_of(mask), *self.block):
                active = f"{self.nnz_of(mask)} active blocks" if mask.dtype == torch.bool else f"the dtype {mask.dtype}"
                args[-1].append(  # torch's list of errors; it raises them together
                    f"{prefix}block_mask does not fit {prefix}values: a mask with {active} of {self.block}, values of "
                    f"shape {shape}. The layer keeps both as they are"
                )
                return
            if not torch.equal(mask.to(self.block_mask.device), self.block_mask):
                if values is None:
                    args[-1].append(
                        f"{prefix}block_mask is another one than the layer's, and {prefix}values is missing"
                    )
                    return
                self._replace_topology(mask.to(self.block_mask.device))
                self._replace_values(self.values.detach().new_zeros(values.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"density={self.density:.3g}, block={self.block}, blocks={self.nnz}/{self.num_blocks}{bias}"

    def _adopt(self, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
        """Copies a dense layer's weight at the active blocks of ``mask``, its bias and whether they are trained."""
        self._replace_topology(mask.to(weight.device))
        self.values = nn.Parameter(
            tp.pack(weight.detach(), self.block_mask, self.block).clone(), requires_grad=weight.requires_grad
        )
        self.bias = copy_of(bias)


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
