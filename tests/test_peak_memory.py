"""The peak of what torch holds: known allocations, and what counts as state."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from ddst.peak_memory import PeakMemory, peak_memory

KIB = 1024


def fill(count: int) -> torch.Tensor:
    return torch.ones(count * KIB, dtype=torch.uint8)


def test_temporaries_count_while_they_are_there_and_once() -> None:
    layer = nn.Linear(KIB, 1, bias=False)  # 4 KiB

    def work() -> None:
        first = fill(64)
        second = fill(32)
        del first
        third = fill(16)
        del second, third

    assert peak_memory(work, [layer]) == PeakMemory(4 * KIB, (4 + 96) * KIB)


def test_what_a_training_step_keeps_is_state_and_counts_at_its_peak() -> None:
    layer = nn.Linear(256, 256, bias=False)  # 256 KiB
    adam = torch.optim.Adam(layer.parameters(), foreach=False)
    x = torch.randn(4, 256)

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        layer(x).sum().backward()
        adam.step()

    step()  # an optimizer whose state and gradients are there before
    found = peak_memory(step, [layer], [adam])
    weights = 256 * KIB
    assert found.state == 4 * weights + 4  # weights, gradient, two moments; the count of steps is a scalar of 4 bytes
    # Adam's step makes one copy of the second moment at a time, while the gradient is there.
    assert found.peak >= found.state + weights
    assert found.peak <= found.state + 2.1 * weights


def test_what_an_operator_takes_inside_of_itself_counts() -> None:
    # A sorted copy's indices are made and dropped inside of the operator.
    x = torch.randn(1000)
    assert peak_memory(lambda: x.median(), []).peak > 4 * x.numel()


def test_memory_that_two_modules_share_counts_once() -> None:
    layer = nn.Linear(KIB, 1, bias=False)
    assert peak_memory(lambda: None, [layer, nn.Sequential(layer)]).state == 4 * KIB


def test_other_devices_are_refused_and_the_environment_stays() -> None:
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'mps'"):
        peak_memory(lambda: None, [], device="mps")
    before = os.environ.get("KINETO_LOG_LEVEL")
    peak_memory(lambda: fill(1), [])
    assert os.environ.get("KINETO_LOG_LEVEL") == before
