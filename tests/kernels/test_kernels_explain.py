"""What ddst.explain says of a layer on Triton kernels: every pass's configuration, for the sizes that really run."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from ddst import SparseConv2d, SparseLinear
from ddst.nn import SparseLayer

explain_module = importlib.import_module("ddst.nn.explain")


def layers() -> list[tuple[SparseLayer, torch.Tensor]]:
    return [
        (SparseLinear(40, 70), torch.zeros(2, 3, 40)),
        (SparseConv2d(20, 40, 3, stride=(2, 1), padding=(0, 2), dilation=(1, 2)), torch.zeros(3, 20, 9, 8)),
        (SparseConv2d(20, 40, (2, 3), padding="same"), torch.zeros(20, 5, 6)),
        (SparseConv2d(16, 16, 3, padding=1, padding_mode="reflect"), torch.zeros(2, 16, 5, 6)),
        (SparseConv2d(16, 16, 4, padding="same", padding_mode="circular"), torch.zeros(2, 16, 5, 6)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_sizes_are_those_the_operator_gets(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layers()[index]
    seen: list[Any] = []

    def conv2d(input: torch.Tensor, *arguments: Any) -> torch.Tensor:
        y = torch.ops.ddst.conv2d(input, *arguments)
        seen.append((*arguments[4:7], input.shape[0], input.shape[2:], y.shape[2:]))
        return y

    def linear(input: torch.Tensor, *arguments: Any) -> torch.Tensor:
        seen.append(((1, 1), (0, 0), (1, 1), input.shape[0], (1, 1), (1, 1)))
        return torch.ops.ddst.linear(input, *arguments)

    monkeypatch.setattr(importlib.import_module("ddst.ops.conv2d"), "_call_conv2d", conv2d)
    monkeypatch.setattr(importlib.import_module("ddst.ops.linear"), "_call_linear", linear)
    layer(x)
    assert [tuple(map(_plain, found)) for found in seen] == [tuple(map(_plain, explain_module._sizes(layer, x)))]


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)


def test_every_pass_has_a_configuration_and_says_that_it_was_not_measured() -> None:
    for layer, x in layers():
        forms = explain_module.triton_forms(layer, x)
        assert list(forms) == ["forward", "input gradient", "weight gradient"]
        for text in forms.values():
            assert "Config(" in text
            assert "not measured on cpu" in text


def test_it_says_of_every_pass_why_it_does_not_run_in_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X1")
    layer = SparseConv2d(32, 32, 3, density=0.5)
    text = explain_module.cuda_preference(layer, layer.problem("cuda", torch.bfloat16), torch.device("cuda"))
    assert text.count("no kept measurement on X1") == 3
    assert "weight gradient" in text
