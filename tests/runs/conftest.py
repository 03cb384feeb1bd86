"""Tiny runs, trained once for all tests of this folder."""

from pathlib import Path

import pytest
import torch

from ddst.train import run
from helpers.runs import tiny


@pytest.fixture(scope="session")
def sparse_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("runs") / "sparse", method="ddst-relaxed")


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory.mktemp("runs") / "dense", method="dense")


@pytest.fixture(scope="session")
def conditional_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"model": "biggan", "resolution": 16, "width_g": 32, "width_d": 32, "latent": 24, "batch": 8, "steps": 2}
    return _trained(tmp_path_factory.mktemp("runs") / "conditional", metric_every=2, **settings)


def _trained(out: Path, **settings: object) -> Path:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert run(tiny(out=str(out), **settings)) == 0
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    return out
