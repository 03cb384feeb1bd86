#!/usr/bin/env bash
# torch 2.13.0: the second derivative of weight norm over rows (torch._weight_norm, which both kinds of weight_norm call)
# takes the norms of v for constants: gradgradcheck fails, and a penalty on v's gradient has another gradient than that of
# the formula written out. One norm over all (dim=None) is right, and so are first derivatives and penalties on inputs.
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
from torch.autograd import gradcheck, gradgradcheck

torch.manual_seed(0)
v = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
rows = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
one = torch.randn((), dtype=torch.float64, requires_grad=True)


def written_out(v, g, dim):
    return v * (g / torch.norm_except_dim(v, 2, dim))


seen = {}
for name, function in (("torch", torch._weight_norm), ("formula", written_out)):
    for dim, g in ((0, rows), (-1, one)):
        normed = lambda v, g: function(v, g, dim)
        checks = [check(normed, (v, g), raise_exception=False) for check in (gradcheck, gradgradcheck)]
        seen[name, dim] = checks
        print(f"{name:8}dim={dim:2}  first derivative right: {checks[0]}  second: {checks[1]}")
right = [True, True]
surprise = seen == {("torch", 0): [True, False], ("torch", -1): right, ("formula", 0): right, ("formula", -1): right}
print("as seen" if surprise else "changed", "with torch", torch.__version__)
sys.exit(not surprise)
PY
