#!/usr/bin/env bash
# torch 2.13.0: fx.symbolic_trace keeps what is computed and drops under which conditions. `with torch.no_grad()` in a
# forward leaves no trace, so a stop-gradient lets gradients through; `training=self.training` is a constant from then on.
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


class Stopped(torch.nn.Module):
    def forward(self, x):
        with torch.no_grad():
            scale = x * 3
        return torch.nn.functional.dropout(x * scale, 0.5, self.training)


def gradient(module):
    x = torch.tensor([2.0], requires_grad=True)
    return torch.autograd.grad(module(x).sum(), x)[0].item()


module = Stopped().eval()
traced = torch.fx.symbolic_trace(module)
print(traced.code)
slopes = gradient(module), gradient(traced)
ones = torch.ones(1000)
module.train()
traced.train()
dropped = (module(ones) == 0).float().mean().item(), (traced(ones) == 0).float().mean().item()
print(f"gradient at 2: {slopes[0]} of the module (the factor 6), {slopes[1]} traced (12 = the factor counted as well)")
print(f"after .train(): {dropped[0]:.0%} dropped by the module, {dropped[1]:.0%} traced")
surprise = slopes == (6.0, 12.0) and dropped[0] > 0.3 and dropped[1] == 0
print("as seen" if surprise else "changed", "with torch", torch.__version__)
sys.exit(not surprise)
PY
