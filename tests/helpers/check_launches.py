"""Run as a program, without TRITON_INTERPRET: what launches hand to the device, on a machine that has none.

Kernels are really compiled, for sm_90, and then given to a driver that only writes down what it is asked to launch.
Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.problems import ConvProblem, LinearProblem
from helpers.sparse import op_arguments

launched: list[tuple[Any, ...]] = []


class Launcher:
    """Stands for the C function that starts a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *args: Any) -> None:
        own = args[-len(self.types) :]
        plain = [a.data_ptr() if isinstance(a, torch.Tensor) else getattr(a, "shape", a) for a in own]
        described = [(kind, str(a)) for kind, a in zip(self.types, plain, strict=True)]
        launched.append((function, [x, y, z], stream, described))


class Driver:
    """A driver of one sm_90 device."""

    launcher_cls = Launcher
    utils: Any

    def __init__(self) -> None:
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, f"{name} {hash(binary)}", 0, 0, 1024


def compiled() -> int:
    """Number of kernels compiled so far."""
    from ddst.kernels import block_scores, gather, weight_grad

    found = [v for m in (gather, weight_grad, block_scores) for v in vars(m).values()]
    kernels = {id(k): k for k in found if isinstance(k, triton.runtime.JITFunction)}
    return sum(len(k.device_caches[0][0]) for k in kernels.values() if k.device_caches)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    from ddst import kernels
    from ddst.kernels.configs import GatherConfig

    def call(problem: ConvProblem | LinearProblem, seed: int = 0, **settings: Any) -> list[list[tuple[Any, ...]]]:
        """Every op twice, on the same tensors: what triton's own launch and then a repeated one handed over."""
        case = problem.build(torch.bfloat16, seed=seed)
        found = []
        arguments = op_arguments(problem, case)
        assert arguments is not None
        for name, args in arguments.items():
            for _ in range(2):
                launched.clear()
                getattr(kernels, name)(*args, **(settings if "score" not in name and "weight" not in name else {}))
                found.append(list(launched))
        return found

    convolution = ConvProblem(
        channels=(64, 48), block=(16, 32), layout="channels_last", grad_layout="channels_last", size=(8, 16)
    )
    linear = LinearProblem(features=(64, 48), block=(16, 32), batch=(16,))
    report: dict[str, Any] = {"pairs": []}
    for problem in (convolution, linear):
        found = call(problem)
        report["pairs"] += [[a, b] for a, b in zip(found[::2], found[1::2], strict=True)]
    boxed = convolution.build(torch.bfloat16)
    launched.clear()
    for _ in range(2):
        kernels.conv2d(
            boxed.x, boxed.values, boxed.bias, boxed.topology, boxed.weight_shape, *convolution.explicit(), True,
            config=GatherConfig(box=(1, 8, 8)),
        )  # fmt: skip
    *_, first, again = launched  # before them, the lists that both walk are written
    report["box"] = [[first], [again]]

    odd = torch.zeros(49, dtype=torch.bfloat16)[1:]
    launched.clear()
    for bias in (boxed.bias, odd, boxed.bias):
        args = (boxed.x, boxed.values, bias, boxed.topology, boxed.weight_shape)
        kernels.conv2d(*args, *convolution.explicit(), True)
    report["odd"] = [function for function, *_ in launched]

    # Large enough for programs of several rows, which are the default at high density.
    shared = replace(convolution, channels=(128, 256), block=(32, 32), size=(16, 16), batch=72, mask="0.1")
    call(shared)
    counts, report["shared"] = {"before": compiled()}, []
    for mask in ("0.1", "0.9", "full"):
        call(replace(convolution, mask=mask))
        call(replace(linear, mask=mask))
        (function, *_), *_ = call(replace(shared, mask=mask))[0]
        report["shared"].append(function)
    counts["density"] = compiled()
    call(replace(convolution, size=(9, 17), batch=3, padding=2, dilation=2))
    call(replace(linear, batch=(17,)))
    counts["sizes"] = compiled()
    call(replace(convolution, channels=(56, 40)))
    counts["channels"] = compiled()
    report["compiled"] = counts
    print(json.dumps(report))


if __name__ == "__main__":
    main()
