#!/usr/bin/env bash
# torch 2.13.0: torch.utils.flop_counter.FlopCounterMode counts under torch.no_grad(); under torch.inference_mode() it
# raises AttributeError "'NoneType' object has no attribute 'next_functions'" as soon as a module inside is called with a
# tensor that requires grad, such as a parameter handed to a submodule (a table of embeddings, learned queries, a weight
# that a submodule rescales). Networks that hand parameters to no submodule are counted.
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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Scale(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Layer(nn.Module):
    def __init__(self, hands_over):
        super().__init__()
        self.weight, self.scale, self.hands_over = nn.Parameter(torch.randn(4, 4)), Scale(), hands_over

    def forward(self, x):
        return x @ self.scale(self.weight) if self.hands_over else self.scale(x) @ self.weight


def count(layer, mode):
    with FlopCounterMode(display=False) as counter, mode():
        layer(torch.randn(2, 4))
    return counter.get_total_flops()


error = None
print("no_grad:       ", *(count(Layer(hands_over), torch.no_grad) for hands_over in (False, True)))
print("inference_mode:", count(Layer(False), torch.inference_mode))
try:
    print("inference_mode, a parameter handed over:", count(Layer(True), torch.inference_mode))
except AttributeError as raised:
    error = str(raised)
    print("inference_mode, a parameter handed over: AttributeError:", error)
surprise = error is not None and "next_functions" in error
print("as seen" if surprise else "changed", "with torch", torch.__version__)
sys.exit(not surprise)
PY
