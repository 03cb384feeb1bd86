#!/usr/bin/env bash
# torch 2.13.0: reading an optimizer's state for a distributed checkpoint takes a step. Before the first step,
# get_optimizer_state_dict(model, optimizer) makes the state by stepping with gradients of zero and lr 0: step hooks
# fire, moments count a step that never was, and training goes on otherwise than without the read.
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
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

first, hooks = {}, {}
for read in (False, True):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.0, 0.9))
    calls = []
    optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append(1))
    if read:
        get_optimizer_state_dict(model, optimizer)
    hooks[read] = len(calls)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    first[read] = (model.weight - before).abs().max().item() / 0.1
for read in (False, True):
    print(f"state read first: {read}: {hooks[read]} step hooks called by it, first step {first[read]:.3f} · lr")
surprise = hooks == {False: 0, True: 1} and abs(first[False] - 1) < 0.01 and first[True] > 1.3
print("as seen" if surprise else "changed", "with torch", torch.__version__)
sys.exit(not surprise)
PY
