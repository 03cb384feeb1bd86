#!/usr/bin/env bash
# torch 2.13.0: forward-mode differentiation (torch.func.jvp, jacfwd, dual numbers) through an operator whose derivative
# was given by register_autograd is silently zero where its input does not require a gradient, too. The same function
# as a torch.autograd.Function without jvp raises, as does the operator once its input requires one.
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
import torch.autograd.forward_ad as forward_ad


@torch.library.custom_op("findings::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


triple.register_autograd(lambda context, gradient: gradient * 3)


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 3

    @staticmethod
    def backward(context, gradient):
        return gradient * 3


def tangent(function):
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
        found = forward_ad.unpack_dual(out).tangent
        return None if found is None else found.tolist()


x = torch.ones(2, requires_grad=True)
backward = torch.autograd.grad(triple(x).sum(), x)[0].tolist()
silent = tangent(triple)
try:
    loud = tangent(Triple.apply)
except RuntimeError as error:
    loud = str(error).splitlines()[0]
print(f"backward mode {backward}\nforward mode  {silent} (None is torch's zero; right is [3.0, 3.0])")
print(f"autograd.Function: {loud}")
surprise = backward == [3.0, 3.0] and silent in (None, [0.0, 0.0]) and isinstance(loud, str)
print("as seen" if surprise else "changed", "with torch", torch.__version__)
sys.exit(not surprise)
PY
