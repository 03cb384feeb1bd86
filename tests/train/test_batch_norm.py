"""--batch-norm: local, or torch's SyncBatchNorm, which trains on CUDA devices only."""

from __future__ import annotations

import pytest
from torch import nn

from ddst.train.config import resolve
from ddst.train.options import ConfigError
from ddst.train.players import build_networks
from helpers.runs import TINY


def settings(**given):
    return resolve({**{k: v for k, v in TINY.items() if k not in ("data",)}, "out": "unused", **given})


def test_synced_is_refused_by_name_on_a_cpu():
    from ddst.train.loop import Trainer

    with pytest.raises(ConfigError, match=r"--batch-norm synced: .* --device cuda"):
        Trainer(settings(batch_norm="synced"), images=None)


def test_synced_replaces_the_batch_norms_of_g_and_keeps_their_names():
    local, _ = build_networks(settings(), 1)
    synced, _ = build_networks(settings(batch_norm="synced"), 1)
    assert list(local.state_dict()) == list(synced.state_dict())
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in local.modules())
