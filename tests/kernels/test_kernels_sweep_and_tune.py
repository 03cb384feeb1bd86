"""The sweep over configurations and tuning, on kernels in Triton's interpreter; `make gpu` runs both on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddst import kernels
from ddst.benchmarks import registry, tune
from ddst.benchmarks.gpu import sweep
from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.kernel_rows import Spec
from ddst.benchmarks.gpu.problems import Shape
from ddst.benchmarks.gpu.sweep import Sweep
from ddst.benchmarks.registry import Layer
from ddst.kernels import configs, tuning

SHAPES = (
    Shape("1x2", blocks=(7, 2), size=(3, 4), batch=1, kernel=(1, 2), padding=(0, 1)),
    Shape("linear", blocks=(7, 9), size=(0, 0), batch=3),
)
LAYER = Layer(16, 32, 1, 2)
SPEC = Spec(LAYER.name, 2, "fp32", (16, 16), 1.0)


class Watch:
    """Says that the last candidate is the fastest."""

    def __init__(self) -> None:
        self.programs = 0

    def capture(self, works: Sequence[Callable[[], Tensor]], keep: int | None = None) -> float:
        self.programs += 1
        return 1.0 / self.programs

    def seconds(self, captured: float) -> float:
        return captured


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two configurations of each operator, and no table from elsewhere."""
    all_of, choose = configs.candidates, tuning.choose
    for module in (configs, tuning):
        monkeypatch.setattr(module, "candidates", lambda *asked: all_of(*asked)[:2])
    monkeypatch.setitem(registry.LAYERS, LAYER.name, LAYER)
    tuning.table_of.cache_clear()
    yield
    tuning.table_of.cache_clear()
    choose.cache_clear()


def wrong_by(monkeypatch: pytest.MonkeyPatch, name: str, of: Callable[[Any], bool]) -> None:
    """Lets a kernel be off by one in the configurations that are asked for."""
    right = getattr(kernels, name)

    def off(*arguments: Any, config: Any) -> Tensor:
        result = right(*arguments, config=config)
        return result + 1 if of(config) else result

    monkeypatch.setattr(kernels, name, off)


@pytest.mark.parametrize("op", list(sweep.TABLE_NAMES))
def test_configurations_are_exact_on_rows_of_every_length(op: str) -> None:
    part = sweep.check_all([Sweep(op, "fp32", (16, 16), "cpu", 1, SHAPES)], 0, Deadline(100.0))
    assert part["wrong"] == []
    assert part["done"] == 1
    assert part["configurations"] >= 1


def test_an_inexact_configuration_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    second = configs.candidates("weight_grad", torch.float32, (16, 16))[1]
    wrong_by(monkeypatch, "linear_weight_grad", lambda config: config == second)
    part = sweep.check_all([Sweep("wgrad", "fp32", (16, 16), "cpu", 1, SHAPES[1:])], 0, Deadline(100.0))
    (why,) = part["wrong"]
    assert why.startswith(f"wgrad fp32 16x16: {second} on linear, call 1: ")
    assert part["configurations"] == 2
    late = sweep.check_all(sweep.sweeps("cpu"), 0, Deadline(0.0))
    assert (late["done"], late["wrong"], len(late["trimmed"])) == (0, [], 3 * 4 * 9)


def test_masks_have_rows_of_every_length_in_the_order_the_pass_walks() -> None:
    for op in ("forward", "dgrad"):
        tensors = sweep.tensors_of(Sweep(op, "fp32", (16, 32), "cpu"), 4, sweep.SHAPES[0], torch.float32)
        mask = tensors.mask if op == "forward" else tensors.mask.transpose(0, 1)
        assert mask.flatten(1).sum(1).tolist() == [0, 1, 2, 3, 4, 5, 18]
        assert tensors.values[tensors.slots >= 0].frac().count_nonzero() == 0
        tensors = sweep.tensors_of(Sweep(op, "fp32", (16, 32), "cpu"), 4, sweep.SHAPES[1], torch.float32, 4)
        mask = (tensors.mask if op == "forward" else tensors.mask.transpose(0, 1)).flatten(1)
        assert mask.shape == (25, 36)
        assert [union.any(0).sum() for union in mask.split(4)] == [0, 1, 2, 3, 4, 5, 18]


def test_tuning_records_the_fastest_of_the_exact_ones(tmp_path: Path) -> None:
    part = tune.tune([SPEC], "cpu", Deadline(300.0), 0, 1, tmp_path / "table.json", Watch())
    assert part["wrong"] == part["trimmed"] == []
    assert [line["what"] for line in part["chosen"]] == [f"{op} of {SPEC}" for op in sweep.TABLE_NAMES]
    table = tuning.Table.load(tmp_path / "table.json")
    assert table.device == "cpu"
    problem = tune.table_problem(tune.Task(SPEC, "wgrad", "cpu"))
    assert tuning.choose(problem, "cpu") == table.fastest(problem) == tuning.candidates_for(problem)[1]
    assert table.sources[0]["torch"] == torch.__version__


def test_a_configuration_that_is_not_exact_is_not_tuned_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    second = configs.candidates("weight_grad", torch.float32, (16, 16))[1]
    wrong_by(monkeypatch, "conv2d_weight_grad", lambda config: config == second)
    result = tune.check(tune.Task(SPEC, "wgrad", "cpu", 1))
    assert result == {"exact": [0], "wrong": [f"{second} is not exact"]}
    late = tune.tune([SPEC], "cpu", Deadline(0.0), 0, 1, tmp_path / "table.json")
    assert (late["chosen"], len(late["trimmed"])) == ([], 3)
    assert not (tmp_path / "table.json").exists()


def test_the_problem_of_a_table_is_that_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(tuning, "choose", lambda problem, device: asked.append(problem) or _stop())
    for layer in (Layer(48, 40, 3, 6, stride=2), Layer(40, 48)):
        monkeypatch.setitem(registry.LAYERS, layer.name, layer)
        spec = Spec(layer.name, 3, "fp32", (16, 32), 0.5)
        inputs = tune.activations(layer, 3, torch.float32, "cpu", 1)
        (problem,) = tune.problems_of(spec, *inputs)
        for op in sweep.TABLE_NAMES:
            with pytest.raises(InterruptedError):
                tune.configured(problem, op, None)()
            assert asked[-1] == tune.table_problem(tune.Task(spec, op, "cpu"))


def _stop() -> None:
    raise InterruptedError


def test_the_command_line_chooses_layers_and_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = tune.chosen_specs(tune.parser().parse_args([]))
    assert str(chosen[0]) == "conv3x3-256-256-16 batch 64 bf16 32x32 10 %"
    assert len(chosen) == 5 * 3 * 4
    line = ["--layer", "sngan32-d", "--batch", "8", "--block", "32x32", "--density", "0.1", "--dtype", "tf32"]
    found = {str(spec) for spec in tune.chosen_specs(tune.parser().parse_args(line))}
    assert "conv3x3-128-128-16 batch 8 tf32 32x32 10 %" in found
    assert not any("3x3-3-" in spec for spec in found)  # three channels hold no block
    with pytest.raises(SystemExit):
        tune.main(["--layer", "nothing"])
    if not torch.cuda.is_available():
        assert tune.main([]) == 3
        assert "no GPU is visible" in capsys.readouterr().err
