#!/usr/bin/env bash
# torchmetrics 1.9.0 beside torch-fidelity 0.4.0 and without torchvision: "import torchmetrics", for any metric at all,
# raises ModuleNotFoundError: No module named 'torchvision'. Tried again in the same process it succeeds, and has a FID
# that can be made and used, because torch-fidelity's network was imported before its package gave up and stays in
# sys.modules.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-$work/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3.11 -m venv "$work/venv"
  "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 tqdm==4.67.3 requests==2.34.2
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    torchmetrics==1.9.0 torch-fidelity==0.4.0 lightning-utilities==0.15.3 packaging==26.2 typing-extensions==4.16.0
fi
cd "$work"

"$python" -P - <<'PY'
import sys
from importlib.metadata import version

import torch
from torch import nn


def attempt():
    try:
        import torchmetrics.classification  # noqa: F401
    except ModuleNotFoundError as raised:
        return raised.name
    return "imported"


attempts = [attempt() for _ in range(3)]
print("import torchmetrics.classification, three times:", *attempts)
from torchmetrics.image.fid import FrechetInceptionDistance

fid = FrechetInceptionDistance(feature=nn.Flatten(), input_img_size=(1, 2, 2), normalize=True)
torch.manual_seed(0)
for real in (True, False):
    fid.update(torch.rand(64, 1, 2, 2), real=real)
print("and then a FID:", float(fid.compute()))
surprise = attempts == ["torchvision", "imported", "imported"]
print("as seen" if surprise else "changed", *(f"with {name} {version(name)}" for name in ("torchmetrics", "torch-fidelity", "torch")))
sys.exit(not surprise)
PY
