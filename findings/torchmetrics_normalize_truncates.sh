#!/usr/bin/env bash
# torchmetrics 1.9.0: normalize=True of the image metrics multiplies by 255 and cuts the fraction off, it does not round. Real
# images that were loaded as floats of -1 ... 1, as for a GAN, and are handed over as (x + 1) / 2 arrive one grey level
# darker at 63 of the 256 levels; handed over as bytes / 255 they arrive as they were. With a network of one's own
# (feature=module) InceptionScore hands it such bytes, too, where FrechetInceptionDistance and KernelInceptionDistance
# hand it the floats as they came.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-$work/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3.11 -m venv "$work/venv"
  "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
    torchmetrics==1.9.0 lightning-utilities==0.15.3 packaging==26.2 typing-extensions==4.16.0
fi
cd "$work"

"$python" -P - <<'PY'
import sys
import warnings

import torch
import torchmetrics
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

warnings.simplefilter("ignore")


class Seen(nn.Module):
    """A network of four features that keeps what it is given."""

    num_features = 4

    def forward(self, images):
        self.images = images
        return images.flatten(1)[:, :4].float()


levels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 256).reshape(2, 3, 16, 16)
unit = levels / 255  # what torchvision's ToTensor makes
symmetric = (unit - 0.5) / 0.5  # what its Normalize(0.5, 0.5) makes of that: the usual input of a discriminator


def seen_by(metric, images, **which):
    metric.update(images, **which)
    return metric.inception.images


score = InceptionScore(feature=Seen(), normalize=True)
for_fid = seen_by(FrechetInceptionDistance(feature=Seen(), normalize=True), unit, real=True)
for_kid = seen_by(KernelInceptionDistance(feature=Seen(), normalize=True, subset_size=2), unit, real=True)
for_score = seen_by(score, unit)
straight = int((for_score[0, 0] != levels[0, 0]).sum())
back = seen_by(score, (symmetric + 1) / 2)[0, 0].int() - levels[0, 0].int()
print("a network of one's own is given", for_score.dtype, "by InceptionScore,", for_fid.dtype, "by FID,", for_kid.dtype, "by KID")
print("levels that are changed, bytes / 255:", straight)
print("levels that are changed, by way of -1 ... 1:", int((back != 0).sum()), "by", back[back != 0].unique().tolist())
surprise = (
    (for_score.dtype, for_fid.dtype, for_kid.dtype) == (torch.uint8, torch.float32, torch.float32)
    and (straight, int((back != 0).sum()), int(back.min()), int(back.max())) == (0, 63, -1, 0)
)
print("as seen" if surprise else "changed", "with torchmetrics", torchmetrics.__version__, "and torch", torch.__version__)
sys.exit(not surprise)
PY
