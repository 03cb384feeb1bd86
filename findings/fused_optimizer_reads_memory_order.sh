#!/usr/bin/env bash
# torch 2.13.0: an optimizer with fused=True on the CPU reads a gradient in the order of its memory, not of its indices.
# A gradient whose strides are not its parameter's is a valid one (torch.autograd.grad of a convolution on channels_last
# input returns it), fused=False takes it right, and CUDA refuses it with an error. Seen: silently another step.
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

torch.manual_seed(0)
start, transposed = torch.randn(4, 6), torch.randn(6, 4).T
surprises = []
for name in ("Adam", "SGD", "Adagrad"):
    stepped = {}
    for fused in (False, True):
        for layout, gradient in (("strided", transposed), ("contiguous", transposed.contiguous())):
            parameter = torch.nn.Parameter(start.clone())
            optimizer = getattr(torch.optim, name)([parameter], lr=1.0, fused=fused)
            for _ in range(2):
                parameter.grad = gradient.clone() if layout == "contiguous" else gradient
                optimizer.step()
            stepped[fused, layout] = parameter.detach()
    off = {key: (value - stepped[False, "contiguous"]).abs().max().item() for key, value in stepped.items()}
    print(name, *(f"fused={fused} {layout}: off by {error:.2g}" for (fused, layout), error in off.items()), sep="\n  ")
    surprises.append(off[True, "strided"] > 0.1 and max(off[False, "strided"], off[True, "contiguous"]) < 1e-5)
print("as seen" if all(surprises) else "changed", "with torch", torch.__version__)
sys.exit(not all(surprises))
PY
