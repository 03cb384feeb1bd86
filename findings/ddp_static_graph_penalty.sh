#!/usr/bin/env bash
# torch 2.13.0: DistributedDataParallel(static_graph=True) averages no gradient, ever and without a word, if the first
# iteration holds a gradient penalty (torch.autograd.grad with create_graph=True, as in WGAN-GP). The penalty's inner
# backward runs before the real one. Seen: ranks keep their own gradients; without static_graph they get the mean.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${FINDINGS_PYTHON:-$work/venv/bin/python}
if [[ -z ${FINDINGS_PYTHON:-} ]]; then
  python3.11 -m venv "$work/venv"
  "$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
fi
cd "$work"

cat > ranks.py <<'PY'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel


def rank_main(rank, folder, static):
    dist.init_process_group("gloo", init_method=f"file://{folder}/{static}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    parallel = DistributedDataParallel(model, static_graph=static)
    torch.manual_seed(rank)
    equal = []
    for _ in range(3):
        parallel.zero_grad()
        x = torch.randn(5, 4, requires_grad=True)
        score = parallel(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        (score.mean() + (slope.norm(dim=1) - 1).square().mean()).backward()
        mine = model[0].weight.grad
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        equal.append(torch.equal(*both))
    if rank == 0:
        print(f"static_graph={static}: gradients of both ranks are equal in three iterations: {equal}", flush=True)
        with open(f"{folder}/equal-{static}", "w") as file:
            file.write(str(all(equal) if not static else any(equal)))
    dist.destroy_process_group()


if __name__ == "__main__":
    for static in (False, True):
        mp.spawn(rank_main, (os.getcwd(), static), nprocs=2)
    surprise = [open(f"equal-{static}").read() for static in (False, True)] == ["True", "False"]
    print("as seen" if surprise else "changed", "with torch", torch.__version__)
    sys.exit(not surprise)
PY
OMP_NUM_THREADS=1 "$python" ranks.py
