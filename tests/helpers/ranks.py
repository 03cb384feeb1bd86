"""Processes on gloo that run checks together: started once for many checks, whose results come from every rank."""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from helpers.copies import SERVER


def run_checks(count: int, names: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """What each check said on each rank: "" where it passed, else the traceback; "not run" after one that failed."""
    mp.start_processes(_rank, (count, list(names), str(folder)), count, start_method=SERVER.get_start_method())
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    return {name: [mine.get(name, "not run") for mine in said] for name in names}


def _rank(rank: int, count: int, names: list[str], folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from helpers import train_checks
    from helpers.rank_checks import CHECKS

    train_checks.folder = Path(folder)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    said: dict[str, str] = {}
    for name in names:
        try:
            torch.manual_seed(0)
            CHECKS[name]()
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc()
        # A check that failed on one rank may have left another in the middle of a reduction.
        worst = torch.tensor(bool(said[name]), dtype=torch.int64)
        try:
            dist.all_reduce(worst)
        except RuntimeError:
            worst.fill_(1)
        if worst:
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()
