"""What the operators on CUDA devices check before anything runs; the kernels themselves: tests/kernels.

The checks read shapes, dtypes and devices only, so they can be asked without a device, with meta data made up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddst.ops.cuda import dispatch, half_block, preferred
from ddst.ops.cuda.dispatch import AUTO, CUDA, TRITON, Meta

DEVICE, F32 = torch.device("cuda", 0), torch.float32
SHAPE, BLOCK = (40, 20, 3, 3), (16, 16)  # R = 3, C = 2
WINDOW = ((2, 1), (1, 1), (1, 1))


def meta(*shape: int, dtype: torch.dtype = F32, where: torch.device = DEVICE) -> Meta:
    return Meta(torch.Size(shape), dtype, where)


@pytest.fixture(autouse=True)
def _every_block_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.backends, "supports", lambda backend, problem: (problem.block == BLOCK, "odd block"))
    for check in (dispatch._check_conv2d, dispatch._check_linear):
        check.cache_clear()


def conv2d(**change: Any) -> None:
    given = {
        "input": meta(2, 20, 9, 8),
        "grad_output": meta(2, 40, 5, 8),
        "values": meta(5, 16, 16),
        "bias": meta(40),
        "topology": meta(3 + 2 + 2 + 5 * 5, dtype=torch.int32),
        "weight_shape": SHAPE,
        "block": BLOCK,
        "window": WINDOW,
        "input_size": None,
        "backend": AUTO,
    } | change
    positional = [given.pop(name) for name in ("backend", "weight_shape", "block", "window", "input_size")]
    dispatch._check_conv2d("conv2d", *positional, **given)


def linear(**change: Any) -> None:
    given = {
        "input": meta(7, 20),
        "grad_output": meta(7, 40),
        "values": meta(4, 16, 16),
        "bias": meta(40),
        "topology": meta(3 + 2 + 2 + 5 * 4, dtype=torch.int32),
        "weight_shape": SHAPE[:2],
        "block": BLOCK,
        "backend": AUTO,
    } | change
    positional = [given.pop(name) for name in ("backend", "weight_shape", "block")]
    dispatch._check_linear("linear", *positional, **given)


def test_good_arguments_pass() -> None:
    conv2d()
    conv2d(input=None, input_size=(9, 8))
    conv2d(input=None, input_size=(10, 8), grad_output=meta(2, 40, 5, 8))
    conv2d(values=None, bias=None, topology=None)
    linear()
    linear(input=None, bias=None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": meta(5, 16)}, r"values has the shape \[5, 16\], expected \[slots, b_out, b_in\]"),
        ({"values": meta(6, 16, 16)}, "values has 6 slots, expected 5 as in topology"),
        ({"values": meta(5, 16, 16, dtype=torch.float16)}, "values is torch.float16 .*, expected torch.float32"),
        ({"bias": meta(40, where=torch.device("cpu"))}, "bias is torch.float32 on cpu, expected .* on cuda:0 as input"),
        ({"bias": meta(41)}, r"bias has the shape \[41\], expected \[40\]"),
        ({"topology": meta(31, dtype=torch.int32)}, "topology .* expected an int32 vector of 7"),
        ({"topology": meta(32, dtype=torch.int64)}, "topology is torch.int64"),
        ({"topology": meta(32, dtype=torch.int32, where=torch.device("cpu"))}, "topology .* on cpu"),
        ({"topology": meta(32, 1, dtype=torch.int32)}, "topology .* int32 vector"),
        ({"block": (16, 0)}, r"block is \[16, 0\]"),
        ({"block": (16, 8), "values": None, "topology": None}, "backend triton: odd block"),
        ({"backend": 1}, r"backend is 1, expected one of 0 \(auto\), 2 \(triton\), 3 \(cuda\) for CUDA tensors"),
        ({"backend": 7}, "backend is 7, expected one of"),
    ],
)
def test_what_both_kinds_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"ddst::conv2d: .*(?:" + message + ")"):
        conv2d(**change)
    if not {"values", "topology"} & set(change):
        with pytest.raises(ValueError, match=r"ddst::linear: .*(?:" + message + ")"):
            linear(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": meta(2, 21, 9, 8)}, r"input has the shape \[2, 21, 9, 8\], expected \[N, 20, H, W\]"),
        ({"input": meta(2, 20, 9)}, "input has the shape"),
        ({"grad_output": meta(3, 40, 5, 8)}, r"grad_output has the shape .*, expected \[2, 40, 5, 8\]"),
        ({"grad_output": meta(2, 40, 4, 8)}, "grad_output"),
        ({"weight_shape": (40, 20)}, r"weight_shape is \[40, 20\], expected \[C_out, C_in, kH, kW\]"),
        ({"window": ((0, 1), (1, 1), (1, 1))}, r"stride is \[0, 1\], expected two ints of at least 1"),
        ({"window": ((1, 1), (-1, 0), (1, 1))}, "padding"),
        ({"window": ((1, 1), (1, 1), (1,))}, "dilation"),
        ({"window": ((1, 1), (0, 0), (5, 1)), "grad_output": None}, r"9 x 8 pixels .* smaller than the kernel"),
        ({"input": None, "input_size": (9,)}, r"input_size is \[9\]"),
    ],
)
def test_what_a_convolution_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv2d(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": meta(7, 21)}, r"input has the shape \[7, 21\], expected \[B, 20\]"),
        ({"grad_output": meta(6, 40)}, r"grad_output has the shape \[6, 40\], expected \[7, 40\]"),
        ({"weight_shape": SHAPE}, r"weight_shape .* expected \[C_out, C_in\]"),
    ],
)
def test_what_a_linear_map_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**change)


class Module:
    """Stands for ddst.kernels or ddst.ops.cuda.compiled."""

    answer = (True, "")

    def supports(self, *arguments: Any) -> tuple[bool, str]:
        return self.answer


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, Module]:
    found = {"triton": Module(), "cuda": Module()}
    monkeypatch.setattr(dispatch.importlib, "import_module", {"ddst.kernels": found["triton"]}.__getitem__)
    monkeypatch.setattr(dispatch, "compiled", found["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X1")
    return found


def chosen(backend: int) -> Any:
    x, topology = torch.zeros(1, 20, dtype=torch.bfloat16), torch.zeros(7 + 5 * 3, dtype=torch.int32)
    return dispatch._kernels("linear", backend, x, SHAPE[:2], BLOCK, topology)  # 3 of 6 blocks


def test_triton_runs_unless_cuda_is_asked_for(modules: dict[str, Module]) -> None:
    assert chosen(AUTO) is modules["triton"]
    assert chosen(TRITON) is modules["triton"]
    assert chosen(CUDA) is modules["cuda"]
    modules["cuda"].answer = (False, "no such block")
    with pytest.raises(ValueError, match="ddst::linear: backend cuda: no such block"):
        chosen(CUDA)


@pytest.mark.parametrize("low, high, taken", [(0.5, 0.5, True), (0.1, 0.4, False), (0.6, 1.0, False)])
def test_auto_takes_cuda_where_it_was_measured_to_be_the_fastest(
    modules: dict[str, Module], monkeypatch: pytest.MonkeyPatch, low: float, high: float, taken: bool
) -> None:
    kind = preferred.kind("X1", "linear", torch.bfloat16, BLOCK)
    monkeypatch.setattr(preferred, "load", lambda: {kind: (low, high)})
    assert chosen(AUTO) is modules["cuda" if taken else "triton"]
    assert chosen(TRITON) is modules["triton"]
    modules["cuda"].answer = (False, "no such block")
    assert chosen(AUTO) is modules["triton"]


def test_reasons_of_a_preference_name_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = preferred.kind("X1", "conv2d", torch.float16, (32, 32), (3, 3))
    monkeypatch.setattr(preferred, "load", lambda: {kind: (0.1, 0.3)})
    assert preferred.is_cuda_preferred(kind, 0.2) == (True, "measured to be the fastest on X1")
    assert "from 0.1 to 0.3" in preferred.is_cuda_preferred(kind, 0.5)[1]
    assert "no kept measurement on X2" in preferred.is_cuda_preferred(kind._replace(device="X2"), 0.2)[1]
    assert preferred.is_cuda_preferred(kind._replace(block="16x16"), 0.2)[0] is False


def test_the_table_in_the_package_can_be_read_and_others_are_refused(tmp_path: Path) -> None:
    assert isinstance(preferred.load(), dict)
    wrong = tmp_path / "preferred.json"
    wrong.write_text('{"lines": [{"from": 0.1}]}')
    with pytest.raises(ValueError, match="lacks 'kind'"):
        preferred.read(wrong)


@pytest.mark.parametrize(
    "name",
    [f"{kind}{what}" for kind in ("conv2d", "linear") for what in ("", "_input_grad", "_weight_grad", "_block_scores")],
)
def test_every_operator_is_served_on_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ddst::{name}", "CUDA")
    assert callable(getattr(dispatch, name))


OPS = [f"{kind}{what}" for kind in ("conv2d", "linear") for what in ("", "_input_grad", "_weight_grad")]
FUSED = (1e-5, 1.0, 1, 1, 1, False, False, True)  # epsilon and so on of a half block that does nothing besides


@pytest.mark.parametrize("op", [*OPS, "norm_act_conv2d"])
def test_a_topology_of_other_strides_is_refused(op: str) -> None:
    """Kernels read its numbers one after another."""
    topology = torch.zeros(2 * 32, dtype=torch.int32)[::2]
    x, values = torch.zeros(2, 20, 9, 8), torch.zeros(5, 16, 16)
    if op.startswith("linear"):
        x, shape = x[:, :, 0, 0], list(SHAPE[:2])
        arguments: dict[str, list[Any]] = {
            "linear": [x, values, None, topology, shape],
            "linear_input_grad": [torch.zeros(2, 40), values, topology, shape],
            "linear_weight_grad": [torch.zeros(2, 40), x, topology, shape, BLOCK],
        }
    else:
        y, window = torch.zeros(2, 40, 5, 8), WINDOW
        arguments = {
            "conv2d": [x, values, None, topology, SHAPE, *window, True],
            "conv2d_input_grad": [y, values, topology, SHAPE, (9, 8), *window, True],
            "conv2d_weight_grad": [y, x, topology, SHAPE, BLOCK, *window],
            "norm_act_conv2d": [x, values, *[None] * 6, topology, SHAPE, *window, *FUSED],
        }
    function = getattr(half_block if op.startswith("norm") else dispatch, op)
    with pytest.raises(ValueError, match=rf"ddst::{op}: topology has the strides \[2\], expected a contiguous vector"):
        function(*arguments[op])


def test_the_backend_argument_is_checked_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=f"backend is {TRITON}, expected"):
        torch.ops.ddst.linear(
            torch.zeros(1, 16), torch.zeros(0, 16, 16), None, torch.zeros(4, dtype=torch.int32), [16, 16], TRITON
        )
