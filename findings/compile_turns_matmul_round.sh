#!/usr/bin/env bash
# torch 2.13.0: torch.compile turns `w @ x` round. Where w is a plain object with __torch_function__ (no tensor) and x a
# tensor, Python calls w.__matmul__ first; compiled, that method is passed over and __torch_function__ is called with
# Tensor.matmul and the operands exchanged: for square matrices another result, without a word, under fullgraph=True.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-$work/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3.11 -m venv "$work/venv"
  "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
fi
cd "$work"

"$python" -P - <<'PY'
import sys

import torch


class Weight:
    def __init__(self, dense):
        self.dense = dense

    def __matmul__(self, other):
        return self.dense @ other

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*(a.dense if isinstance(a, Weight) else a for a in args), **(kwargs or {}))


torch.manual_seed(0)
weight, x = Weight(torch.randn(4, 4)), torch.randn(4, 4)


def product(x):
    return weight @ x


right, turned = weight.dense @ x, x @ weight.dense
compiled = torch.compile(product, fullgraph=True, backend="eager")(x)
print(f"eager:    w @ x to {(product(x) - right).abs().max():.1g}")
print(f"compiled: w @ x to {(compiled - right).abs().max():.1g}, x @ w to {(compiled - turned).abs().max():.1g}")
surprise = torch.equal(product(x), right) and not torch.allclose(compiled, right) and torch.allclose(compiled, turned)
print("as seen" if surprise else "changed", "with torch", torch.__version__)
sys.exit(not surprise)
PY
