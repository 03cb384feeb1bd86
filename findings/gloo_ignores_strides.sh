#!/usr/bin/env bash
# torch 2.13.0: gloo's all_reduce adds up memory, not tensors. Where the ranks hold equal values in different layouts (one
# of them transposed or channels_last, say), the sum is wrong on both, without a word.
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


def rank_main(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = torch.arange(6.0).view(2, 3)
    answers = []
    for layouts in ((False, False), (False, True)):
        mine = values.t().contiguous().t() if layouts[rank] else values.clone()
        dist.all_reduce(mine)
        answers.append(torch.equal(mine, 2 * values))
        print(f"rank {rank}, transposed in memory {layouts}: {mine.tolist()}", flush=True)
    with open(f"{folder}/right-{rank}", "w") as file:
        file.write(str(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (os.getcwd(),), nprocs=2)
    surprise = all(open(f"right-{rank}").read() == "[True, False]" for rank in range(2))
    print("as seen" if surprise else "changed", "with torch", torch.__version__)
    sys.exit(not surprise)
PY
OMP_NUM_THREADS=1 "$python" ranks.py
