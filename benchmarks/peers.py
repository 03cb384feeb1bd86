"""Other packages that train with sparse weights on the CPU, as optional baselines: a whole step on the same weights.

    pip install --no-build-isolation --no-deps sparseprop==0.1.14 sparselab==0.2.2    (and scipy)
    python -m ddst.benchmarks --layer conv3x3-256-256-16 linear-1024-1024 --baseline dense sparseprop sparselab

SparseProp takes single weights (its convolution in two ways, of which the faster counts), SparseLab linear layers. Both
give input and weight gradient in one call, so that they have a step and no passes.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddst.benchmarks.problem import PASSES, Problem
from ddst.benchmarks.registry import PEERS
from ddst.measure import Clock, Spread, fastest, interleaved

Row = dict[str, Any]
Work = Callable[[], object]


@dataclass(frozen=True)
class Peer:
    """A layer of another package, holding a problem's weights.

    Attributes:
        layer: takes the input. values: its trainable weights, in the package's format.
        to_dense: makes of a gradient in that format a dense one.
    """

    layer: Callable[[Tensor], Tensor]
    values: Tensor
    to_dense: Callable[[Tensor], Tensor]

    def step(self, x: Tensor, grad_output: Tensor) -> list[Tensor]:
        """Output, input gradient and weight gradient, the last one in the package's format."""
        with torch.enable_grad():
            wanted = x.detach().requires_grad_()
            y = self.layer(wanted)
            return [y.detach(), *torch.autograd.grad(y, [wanted, self.values], grad_output)]

    def wrong(self, problem: Problem, expected: Sequence[Tensor]) -> list[str]:
        """What differs from dense torch in float64."""
        y, gx, values = self.step(problem.input, problem.grad_output)
        results = (y, gx, self.to_dense(values))
        return [why for i, result in enumerate(results) if (why := problem.wrong(i, result, expected[i])) is not None]


def _sparseprop(problem: Problem) -> list[Peer]:
    from sparseprop.modules import SparseConv2d, SparseLinear
    from sparseprop.modules.utils import from_csr_2d, from_sparse_format_conv2d

    layer, shape = problem.layer, problem.layer.weight_shape
    if layer.op == "linear":
        linear = SparseLinear(problem.weight)
        return [Peer(linear, linear.W_val, lambda g: from_csr_2d(g, linear.W_idx, shape))]
    if not layer.is_plain or layer.stride > 2:
        raise NotImplementedError("plain convolutions of stride 1 and 2 only")
    found = []
    for over_columns in (False, True):
        conv = SparseConv2d(problem.weight, None, layer.padding, layer.stride, over_columns)
        index = conv.W_idx
        found.append(Peer(conv, conv.W_val, lambda g, index=index: from_sparse_format_conv2d(g, index, shape)))
    return found


def _sparselab(problem: Problem) -> list[Peer]:
    import numpy as np
    import sparselab

    weight = problem.weight.contiguous()
    rows, columns = weight.shape

    def matrix() -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return sparselab.PaddedCSR.from_dense(weight)

    layer = sparselab.SparseLinear(columns, rows, sparsity=1 - problem.density, bias=False)
    # The layer draws its own mask and shares values with its matrix; this gives it the problem's in the same way.
    layer._csr = matrix()
    layer._values = nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))

    def to_dense(gradient: Tensor) -> Tensor:
        filled = matrix()
        np.asarray(filled.values)[:] = gradient.numpy()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return filled.to_dense()

    return [Peer(layer, layer._values, to_dense)]


MAKERS: dict[str, Callable[[Problem], list[Peer]]] = {"sparseprop": _sparseprop, "sparselab": _sparselab}
assert set(MAKERS) == {name for names in PEERS.values() for name in names}


def measure(
    name: str, problem: Problem, expected: Sequence[Tensor], dense: Sequence[Work], repeats: int, clock: Clock
) -> Row:
    """``seconds``, ``speedup`` (its time / ours), ``of_dense`` (dense time / its), or why there is none (``missing``).

    Args:
        expected: the results of the three passes in float64. dense: dense torch's passes, each in its faster layout.
    """
    if problem.input.dtype != torch.float32 or problem.input.device.type != "cpu":
        return {"missing": "float32 on the CPU only"}
    try:
        peers = MAKERS[name](problem)
    except ModuleNotFoundError as error:
        return {"missing": f"{error.name} is not installed"}
    except NotImplementedError as error:
        return {"missing": str(error)}
    whys = [why for peer in peers for why in peer.wrong(problem, expected)]
    if whys:
        return {"missing": f"wrong: {', '.join(whys)}"}
    steps: list[Work] = [lambda peer=peer: peer.step(problem.input, problem.grad_output) for peer in peers]
    chosen = steps[fastest(steps, clock) if len(steps) > 1 else 0]
    packed = problem.packed()
    programs: list[Work] = [lambda: [work() for work in packed], lambda: [work() for work in dense], chosen]
    ours, theirs, its = interleaved(programs, repeats, clock)
    return {
        "version": importlib.metadata.version(name),
        "seconds": Spread.of(its).median,
        "speedup": asdict(Spread.of_ratios(its, ours)),
        "of_dense": asdict(Spread.of_ratios(theirs, its)),
    }


def dense_passes(rivals: Sequence[dict[str, tuple[Any, str]]]) -> list[Work] | None:
    """Dense torch's program of each pass, from what the runner found; None if one has none."""
    works = [rivals[i].get("dense", ("", ""))[0] for i in range(len(PASSES))]
    return None if any(isinstance(work, str) for work in works) else works
