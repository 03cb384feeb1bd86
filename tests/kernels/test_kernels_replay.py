"""What a captured graph does when blocks move between its replays: the same launches on the same memory, without ddst.

Stands for a CUDA graph, which the CPU has none of: it records the launches of a training step's passes, with the
addresses of all they read and write, and runs them again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ddst import kernels
from ddst.index_cache import refresh
from ddst.kernels.configs import GatherConfig, WeightGradConfig
from ddst.kernels.launch import Launch
from helpers.dense import pack_blocks, row_major
from helpers.problems import ConvProblem
from helpers.slots import scatter


@pytest.mark.parametrize(
    "config, by", [(GatherConfig(), "row"), (GatherConfig(fuse=2), "col"), (GatherConfig(rows=2), "row")], ids=str
)
def test_replays_follow_blocks_that_move(monkeypatch: pytest.MonkeyPatch, config: GatherConfig, by: Any) -> None:
    problem = ConvProblem(channels=(24, 20), block=(16, 16), mask="0.4", size=(3, 4), bias=False)
    explicit = problem.explicit()
    assert explicit is not None
    case = problem.build(torch.float32, "whole")
    masks = [case.mask, case.mask.flip(0, 2), torch.rand(case.mask.shape) < 0.3, torch.zeros_like(case.mask)]
    count = max(int(mask.sum()) for mask in masks) + 1
    arranged = [scatter(mask, free=count - int(mask.sum()), seed=seed) for seed, mask in enumerate(masks)]

    topology, values = arranged[0].topology.clone(), torch.full((count, 16, 16), float("nan"))
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (case.x, case.grad))
    recorded: list[tuple[Launch, tuple[Any, ...]]] = []
    call = Launch.__call__

    def recording(launch: Launch, *tensors: Any) -> None:
        recorded.append((launch, tensors))
        call(launch, *tensors)

    with monkeypatch.context() as capture:
        capture.setattr(Launch, "__call__", recording)
        shape, size = case.weight_shape, case.x.shape[2:]
        y = kernels.conv2d(x, values, None, topology, shape, *explicit, True, config=config)
        gx = kernels.conv2d_input_grad(grad, values, topology, shape, size, *explicit, True, config=config)
        chosen = WeightGradConfig(by, 4, pixels=32)
        gw = kernels.conv2d_weight_grad(grad, x, topology, shape, (16, 16), *explicit, config=chosen)
    assert len(recorded) >= 3

    for mask, slots in zip(masks, arranged, strict=True):
        packed = pack_blocks(torch.randint(-3, 4, shape).float(), mask, (16, 16))
        now = replace(case, mask=mask, slots=row_major(mask), values=packed)
        topology.copy_(slots.topology)
        values.copy_(slots.spread(packed))
        refresh(topology)
        for launch, tensors in recorded:
            launch(*tensors)
        assert torch.equal(y.double(), now.dense(now.x.double(), now.values.double(), None))
        assert torch.equal(gx.double(), now.dense_grads()[0])
        assert torch.equal(gw[slots.of_block].double(), pack_blocks(now.dense_weight_grad(), mask, (16, 16)))
        slots.check_free(gw)
