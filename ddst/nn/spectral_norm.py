"""Spectral norm on packed values: power iteration whose cost falls with density, and which cannot get stuck.

A weight ``[C_out, C_in, kH, kW]`` is the matrix ``[C_out, C_in · kH · kW]`` of torch's spectral norm. Its columns put
in the order (input block, tap, channel within the block) make every stored block a block of that matrix, of the
same rank (:mod:`ddst.topology`): the block mask ``[R, C, kH, kW]`` is read as ``[R, C · kH · kW]``. So the layer's
values and a second index vector are the matrix, and the operators of a linear layer multiply by it; no dense weight is
formed. Of a transposed convolution, ``[C_in, C_out, kH, kW]``, torch takes the matrix ``[C_out, C_in · kH · kW]``: the
transpose of what the same values are with the mask read as ``[R · kH · kW, C]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hooked_spectral_norm

from .. import topology as tp
from .._arguments import check_device, check_dtype, check_int, check_number, check_one_of, check_weight_shape
from ..operator_view import to_block_order
from .matrix import DenseMatrix, Matrix, PackedMatrix, TransposedMatrix
from .repeated_calls import RepeatedCalls, may_be_checkpointed
from .storage import placed_topology

if TYPE_CHECKING:
    from .base import SparseLayer

_ops = torch.ops.ddst

STYLES = ("hook", "parametrization")

#: Power iterations after a change of the mask, and at the start.
SETTLING_ITERATIONS = 12

#: Names of the raw weight, u and v in a dense layer's state dict, by the kind of torch's spectral norm.
DENSE_KEYS = {
    "hook": ("weight_orig", "weight_u", "weight_v"),
    "parametrization": (
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
    ),
}

_SPARSE_KEYS = ("weight", "spectral_norm.u", "spectral_norm.v")

LayerT = TypeVar("LayerT", bound="SparseLayer")


def rename_dense_keys(state_dict: dict[str, Any], prefix: str) -> None:
    """Names the entries of torch's spectral norm, of either kind, "weight", "spectral_norm.u" and "spectral_norm.v".

    >>> state = {"weight_orig": 1, "weight_u": 2, "weight_v": 3}
    >>> rename_dense_keys(state, "")
    >>> state
    {'weight': 1, 'spectral_norm.u': 2, 'spectral_norm.v': 3}
    """
    for keys in DENSE_KEYS.values():
        if prefix + keys[0] in state_dict:
            for old, new in zip(keys, _SPARSE_KEYS, strict=True):
                if prefix + old in state_dict:
                    state_dict[prefix + new] = state_dict.pop(prefix + old)


def _unit(vector: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(x / max(‖x‖, ε), ‖x‖)``."""
    norm = torch.linalg.vector_norm(vector)
    return vector / norm.clamp_min(eps), norm


def _noise_like(vector: Tensor) -> Tensor:
    """Numbers of mean 0 and variance 1, always the same: a hash of each entry's place.

    Nothing is drawn, so that a copy of a layer, a repeated call and a compiled graph do what the layer does;
    nothing depends on the last bits of the weights, which differ between kernels.
    """
    low = 0xFFFFFFFF
    bits = torch.arange(1, vector.numel() + 1, device=vector.device) * 0x9E3779B1 & low
    for _ in range(2):
        bits = (bits ^ (bits >> 16)) * 0x045D9F3B & low
    return ((bits ^ (bits >> 16)).to(vector.dtype) / 2**31 - 1) * math.sqrt(3)


class SpectralNorm(nn.Module):
    """``W / σ``, ``σ = uᵀ W v``, after ``v ← Wᵀ(u + noise) / ‖·‖``, ``u ← W v / ‖·‖`` per training forward, on blocks.

    Few blocks split a matrix into independent parts. Plain power iteration leaves ``u`` exactly zero on some of them
    and then never sees a part whose singular value has become the largest. A little noise in the vector that each
    iteration starts from (share ``noise`` of its length) and a dozen iterations after each change of the mask prevent
    it. One iteration per forward call still lags behind a part that grows fast: measured at 10 % density with steps
    of 1 and 2 % of the weights' bound, the true σ was at most twice the estimate (with random noise likewise).

    Args:
        weight_shape: shape of the dense weight, ``(C_out, C_in, kH, kW)``, ``(C_out, C_in, k)`` or ``(C_out, C_in)``;
            of a grouped convolution ``C_in`` counts one group.
        block: ``(b_out, b_in)``.
        n_power_iterations: iterations per forward call in training mode, at least 1.
        eps: smallest length that a vector is divided by.
        noise: share of noise, at least 0. With 0 nothing extra is iterated, and the result is that of torch's spectral
            norm of the masked dense weight.
        style: the torch function this stands for: "hook" (:func:`torch.nn.utils.spectral_norm`) iterates v, then u;
            "parametrization" (:func:`torch.nn.utils.parametrizations.spectral_norm`) iterates u, then v, with the noise
            in v. :func:`ddst.densify` and :func:`ddst.dense_state_dict` return to it.
        device, dtype: of the vectors.
        dim: the dimension of the weight that the matrix's rows count, 0 or 1; torch takes 1 for transposed
            convolutions, whose weight has the output channels second.

    Attributes:
        u: buffer ``[C_out]``. v: buffer ``[C_in · kH · kW]``, in the order of the dense weight. (With ``dim=1`` the two
            first sizes of the weight change places.)
        topology: int32 vector, index of the matrix, kept by the layer (:meth:`place`); no buffer.

    Raises:
        ValueError: n_power_iterations, noise or style outside the above.

    Checkpointing (:mod:`torch.utils.checkpoint`, both kinds): the repeated forward pass uses the vectors of the first
    and iterates no more, so gradients and vectors are those without checkpointing. For that, training calls without
    gradients or under hooks for saved tensors draw one number from torch's default generator. With
    ``preserve_rng_state=False`` the first call cannot be known: there is a warning, and the present vectors are used.
    Under ``torch.compile`` what is checkpointed iterates again, as torch's spectral norm does everywhere.

    Numerics: computes in the dtype of the values, 16-bit floats in float32; no gradient flows through u and v. A weight
    that is all zero is returned as it is (``σ`` counts as 1), and the iteration recovers when it no longer is. The
    noise is always the same: deterministic.

    Cost: ``4 · nnz · b_out · b_in`` operations per iteration, proportional to density, and the memory of one more set
    of values until backward.

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks (ICLR 2018), algorithm 1.

    >>> from ddst.nn import SparseLinear
    >>> layer = spectral_norm(SparseLinear(64, 64, density=0.5))
    >>> for _ in range(30): y = layer(torch.randn(1, 64))
    >>> exact = torch.linalg.matrix_norm(layer.dense_weight(), 2)
    >>> bool(layer.spectral_norm.sigma(layer) > exact / 1.2)
    True
    """

    u: Tensor
    v: Tensor
    topology: Tensor

    def __init__(
        self,
        weight_shape: Sequence[int],
        block: tuple[int, int],
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        noise: float = 0.05,
        style: str = "hook",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dim: int = 0,
    ) -> None:
        check_int("n_power_iterations", n_power_iterations, 1)
        check_int("dim", dim, 0, 1)
        eps, noise = check_number("eps", eps, 0), check_number("noise", noise, 0)
        check_one_of("style", style, STYLES)
        block = tp.check_block(block)
        weight_shape = check_weight_shape("weight_shape", weight_shape)
        device, dtype = check_device("device", device), check_dtype("dtype", dtype)
        super().__init__()
        self.n_power_iterations, self.eps, self.noise, self.style = n_power_iterations, eps, noise, style
        self.dim = dim
        self._calls: RepeatedCalls[tuple[Tensor, Tensor]] = RepeatedCalls()
        *blocks, taps = tp.grid(weight_shape, block)
        count, width = blocks[1 - dim], block[1 - dim]
        self._in_channels, self._blocks = weight_shape[1 - dim], (count, taps, width)
        self._matrix_shape = (weight_shape[dim], count * taps * width)
        u = torch.randn(weight_shape[dim], device=device, dtype=dtype)
        v = torch.randn(math.prod(weight_shape) // weight_shape[dim], device=device, dtype=dtype)
        self.register_buffer("u", F.normalize(u, dim=0, eps=eps))
        self.register_buffer("v", F.normalize(v, dim=0, eps=eps))

    def place(self, layer: SparseLayer) -> None:
        """Derives the index of the matrix from the layer's slots, beside its values; called by the layer. u and v stay.

        A block's rank is the same in both: the mask ``[R, C, kH, kW]`` is read as ``[R, C · kH · kW]``. With ``dim=1``
        it becomes ``(row · kH · kW + tap) · C + column``, in ``[R · kH · kW, C]``.
        """
        count, taps, _ = self._blocks
        other, slots = layer.mask_shape[self.dim], layer.slot_blocks
        shape = (other, count * taps)
        if self.dim == 1:
            shape = (count * taps, other)
            with unset_fake_temporarily():
                moved = slots - slots % (other * taps) + slots % taps * other + slots // taps % other
                slots = torch.where(slots < 0, slots, moved)
        self.topology = placed_topology(slots, shape, layer.values.data, self.__dict__.get("topology"))

    def forward(self, layer: SparseLayer) -> Tensor:
        """``values / σ``, ``[slots, b_out, b_in]``; in training mode after ``n_power_iterations`` power iterations.

        Args:
            layer: the layer this belongs to.
        """
        iterations = self.n_power_iterations if self.training else 0
        version = (layer.values._version, layer.values.shape) if self.training and may_be_checkpointed() else None
        return self._divided(layer, iterations, version)

    def look(self, layer: SparseLayer) -> Tensor:
        """``values / σ`` for code that reads the layer's weight.

        As with torch's two kinds, the parametrization iterates in training mode at every look, the hook only before
        the layer's own forward pass.
        """
        return self(layer) if self.style == "parametrization" else self._divided(layer, 0)

    def _divided(self, layer: SparseLayer, iterations: int, version: object = None) -> Tensor:
        values = layer.values
        dtype = self._wide_dtype(values)
        wide = values if values.dtype == dtype else values.to(dtype)
        sigma = self._sigma(wide, layer.backend, iterations, version)
        # All blocks may be zero, as new ones are: then nothing is to be divided, and 0 / 0 must not come out.
        divided = wide * (sigma + (sigma == 0)).reciprocal()
        return divided if wide is values else divided.to(values.dtype)

    @torch.no_grad()
    def sigma(self, layer: SparseLayer) -> Tensor:
        """``uᵀ W v``: the present estimate of the largest singular value, a scalar; changes nothing."""
        return self._sigma(layer.values.detach().to(self._wide_dtype(layer.values)), layer.backend, 0)

    def after_topology_change(self, layer: SparseLayer) -> None:
        """A dozen iterations, so that the estimate is right at once; none where ``noise`` is 0. Called by the layer."""
        if self.noise > 0:
            self.settle(layer.values, layer.backend)

    @torch.no_grad()
    def settle(self, values: Tensor, backend: str = "auto", iterations: int = SETTLING_ITERATIONS) -> None:
        """Power iterations without a forward pass, for packed values that have changed at once."""
        values = values.detach().to(self._wide_dtype(values))
        if self._in_one_call(values, backend):
            self._iterate_in_one_call(values, self.u, self.v, iterations)
        else:
            self._iterate(self._matrix(values, backend), values.dtype, iterations)

    @torch.no_grad()
    def settle_loaded(self, state_dict: dict[str, Any], prefix: str, values: Tensor, backend: str) -> None:
        """Settles u and v of a dense state dict for the values that are kept of its weight, in that state dict."""
        u, v = state_dict.get(prefix + "u"), state_dict.get(prefix + "v")
        if self.noise > 0 and u is not None and v is not None and (u.shape, v.shape) == (self.u.shape, self.v.shape):
            self.u.copy_(u)
            self.v.copy_(v)
            self.settle(values.to(self.u), backend)
            state_dict[prefix + "u"], state_dict[prefix + "v"] = self.u.clone(), self.v.clone()

    def attach_to_dense(self, dense: nn.Module) -> None:
        """Gives a dense layer torch's spectral norm of this style, with these settings and vectors."""
        attach: Any = hooked_spectral_norm if self.style == "hook" else parametrizations.spectral_norm
        device = self.u.device
        # torch draws vectors that are replaced at once: nothing random is seen from outside.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            attach(dense, n_power_iterations=self.n_power_iterations, eps=self.eps, dim=self.dim)
        state = dense.state_dict()
        _, u, v = DENSE_KEYS[self.style]
        state[u].copy_(self.u)
        state[v].copy_(self.v)
        dense.train(dense.training)  # what was attached follows the layer

    @staticmethod
    def _wide_dtype(values: Tensor) -> torch.dtype:
        return torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else values.dtype

    def _sigma(self, values: Tensor, backend: str, iterations: int, version: object = None) -> Tensor:
        """``uᵀ W v``, differentiable in the values. ``⟨W, u vᵀ⟩`` over the active blocks is one product of vectors.

        With the version of the weights it is that of a call which may be repeated.
        """
        with torch.no_grad():
            # Fresh memory, so that several forward calls before one backward do not disturb each other.
            direction = self._direction(values.detach(), backend, iterations, version)
        return torch.dot(values.flatten(), direction.flatten())

    def _direction(self, values: Tensor, backend: str, iterations: int, version: object) -> Tensor:
        """``u vᵀ`` at the active blocks, after some iterations."""
        if not self._in_one_call(values, backend):
            matrix = self._matrix(values, backend)
            if version is None:
                u, v = self._iterate(matrix, values.dtype, iterations)
            else:
                u, v = self._iterate_once(matrix, values.dtype, iterations, version)
            return matrix.outer(u, v)
        if version is None:
            return self._iterate_in_one_call(values, self.u, self.v, iterations)

        def make(iterations: int = iterations) -> tuple[Tensor, Tensor]:
            self._iterate_in_one_call(values, self.u, self.v, iterations)
            return self.u.clone(), self.v.clone()

        u, v = self._calls.result(make, lambda: make(0), version)
        return self._iterate_in_one_call(values, u, v, 0)

    def _in_one_call(self, values: Tensor, backend: str) -> bool:
        """Whether all that is done for the values is one operator's call; tracers and ``torch.func`` see it in parts.

        A dozen small operators take longer than the products of most layers.
        """
        return (
            backend in ("auto", "cpu")
            and type(values) is Tensor
            and values.device.type == "cpu"
            and self.u.dtype == self.v.dtype == values.dtype
            and self.u.is_contiguous()
            and self.v.is_contiguous()
            and not torch.compiler.is_compiling()
            and not torch._C._is_tracing()
            and not torch._C._are_functorch_transforms_active()
        )

    def _iterate_in_one_call(self, values: Tensor, u: Tensor, v: Tensor, iterations: int) -> Tensor:
        """:meth:`_direction` of the given vectors, which it changes in place."""
        shape = [self._matrix_shape[1], self._matrix_shape[0]] if self.dim == 1 else [*self._matrix_shape]
        parametrization = int(self.style == "parametrization")
        sizes = (self._in_channels, self._blocks[1], iterations, self.dim, parametrization)
        direction: Tensor = _ops.power_iteration(values, self.topology, u, v, shape, *sizes, self.eps, self.noise)
        if iterations and not u.is_inference():
            torch.autograd.graph.increment_version((u, v))
        return direction

    def _iterate_once(
        self, matrix: Matrix, dtype: torch.dtype, iterations: int, version: object
    ) -> tuple[Tensor, Tensor]:
        """:meth:`_iterate`; where checkpointing repeats a forward call, the vectors of that call and no iteration."""

        make, present = (lambda n=n: self._iterate(matrix, dtype, n) for n in (iterations, 0))
        return self._calls.result(make, present, version)

    def _matrix(self, values: Tensor, backend: str) -> Matrix:
        kind = DenseMatrix if backend == "reference" else PackedMatrix
        if self.dim == 1:
            return TransposedMatrix(kind(values, self.topology, (self._matrix_shape[1], self._matrix_shape[0])))
        return kind(values, self.topology, self._matrix_shape)

    def _iterate(self, matrix: Matrix, dtype: torch.dtype, iterations: int) -> tuple[Tensor, Tensor]:
        """``(u, v)`` after some iterations, v in the matrix's order; 0 iterations change nothing."""
        if iterations == 0:
            return self.u.to(dtype), self._block_order(self.v.to(dtype))
        hook = self.style == "hook"
        start = self.u.to(dtype) if hook else self._block_order(self.v.to(dtype))
        for _ in range(iterations):
            if hook:
                v, norm = _unit(self._inside(matrix.transposed_times(self._noisy(start))), self.eps)
                u, _ = _unit(matrix.times(v), self.eps)
            else:
                u, norm = _unit(matrix.times(self._inside(self._noisy(start))), self.eps)
                v, _ = _unit(self._inside(matrix.transposed_times(u)), self.eps)
            start = u if hook else v
        if self.noise == 0:
            # A zero weight has no directions, and zero vectors would stay zero for ever: the old ones are kept.
            found = norm > 0
            u = torch.where(found, u, self.u)
            v = torch.where(found, v, self._block_order(self.v.to(dtype)))
        # In place: replicas of a layer share this memory with it, and must.
        self.u.copy_(u)
        cols, taps, width = self._blocks
        ordered = v.view(cols, taps, width).transpose(1, 2)
        if cols * width == self._in_channels:
            self.v.view(cols, width, taps).copy_(ordered)
        else:
            self.v.view(-1, taps).copy_(ordered.reshape(-1, taps)[: self._in_channels])
        return u, v

    def _noisy(self, start: Tensor) -> Tensor:
        """``start + noise · g / √n`` with numbers g of variance 1: ``noise`` of start's unit length."""
        if self.noise == 0:
            return start
        return start.add(_noise_like(start), alpha=self.noise / math.sqrt(start.numel()))

    def _inside(self, v: Tensor) -> Tensor:
        """Zeroes what stored parts of edge blocks beyond the last channel give: ``nn.init`` on values fills them."""
        cols, taps, width = self._blocks
        beyond = cols * width - self._in_channels
        if beyond:
            v.view(cols, taps, width)[-1, :, width - beyond :] = 0
        return v

    def _block_order(self, v: Tensor) -> Tensor:
        """``[C_in · T]`` in the dense weight's order to ``[C · T · b_in]``; channels beyond the last are zero."""
        _, taps, width = self._blocks
        return to_block_order(v, taps, width)

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, eps={self.eps}, noise={self.noise}, style={self.style!r}"


def spectral_norm(
    layer: LayerT, n_power_iterations: int = 1, eps: float = 1e-12, noise: float = 0.05, style: str = "parametrization"
) -> LayerT:
    """``W ← W / σ(W)``: attaches a :class:`SpectralNorm` to a sparse layer as ``layer.spectral_norm``.

    The matrix is the one that torch takes: its rows count the output channels.

    Args:
        layer: a sparse layer without spectral norm.
        n_power_iterations, eps, noise, style: of :class:`SpectralNorm`.

    Returns:
        The layer.

    Raises:
        TypeError: ``layer`` is no sparse layer.
        ValueError: it has a spectral or weight norm already, or another argument does not fit.

    >>> from ddst.nn import SparseConv2d
    >>> layer = spectral_norm(SparseConv2d(32, 64, 3))
    >>> layer.spectral_norm.u.shape, layer.spectral_norm.v.shape
    (torch.Size([64]), torch.Size([288]))
    """
    if isinstance(layer, type) or not getattr(layer, "runs", False):
        raise TypeError(f"layer must be a block-sparse layer, got {type(layer).__name__}")
    if layer.norm is not None:
        raise ValueError(f"layer has a {'weight' if layer.spectral_norm is None else 'spectral'} norm already")
    norm = SpectralNorm(
        layer.weight_shape,
        layer.block,
        n_power_iterations,
        eps,
        noise,
        style,
        layer.values.device,
        layer.values.dtype,
        int(layer.transposed),
    )
    norm.train(layer.training)
    norm.place(layer)
    if noise > 0 or style == "parametrization":
        norm.settle(
            layer.values, layer.backend, 15
        )  # as torch's parametrization does, which then starts from the same u and v
    layer.spectral_norm = norm
    return layer
