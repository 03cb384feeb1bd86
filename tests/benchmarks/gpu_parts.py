"""The parts of `make gpu` that measure, on the CPU in tiny sizes: rows, iterations, training, host time, tables."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddst.benchmarks import registry
from ddst.benchmarks.gpu import calls, environment, host_time, kernel_rows, primitives, results
from ddst.benchmarks.gpu.budget import Deadline
from ddst.benchmarks.gpu.kernel_rows import Spec
from ddst.benchmarks.gpu.pictures import PICTURES
from ddst.benchmarks.gpu.table import markdown, short
from ddst.benchmarks.problem import PASSES
from ddst.benchmarks.registry import Layer
from helpers.gpu_training import TRAINING

needs_training = pytest.mark.skipif(importlib.util.find_spec("ddst.train") is None, reason="this build has no training")
CONV, LINEAR = Layer(32, 48, 3, 4), Layer(48, 32)
SPECS = [Spec(layer.name, 3, "fp32", (16, 16), 0.5) for layer in (CONV, LINEAR)]
KNOWN: dict[str, Any] = {
    "device": "cpu", "commit": "abc", "date": "today", "versions": {"torch": "2"}, "l2_bytes": 50_000,
    "copy_bytes_per_s": 1e10, "l2_bytes_per_s": None, "flops_per_s": dict.fromkeys(environment.KINDS, 1e11),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (CONV, LINEAR):
        monkeypatch.setitem(registry.LAYERS, layer.name, layer)


def test_rows_hold_both_sides_warm_and_cold() -> None:
    part = kernel_rows.measure_all(SPECS, KNOWN, "cpu", Deadline(100.0), rounds=2)
    assert part["wrong"] == part["trimmed"] == []
    assert [(r["layer"], r["pass"]) for r in part["rows"]] == [(s.layer, p) for s in SPECS for p in PASSES]
    for row in part["rows"]:
        for state in ("warm", "cold"):
            figures = row[state]
            assert figures["seconds"] > 0 and figures["dense_seconds"] > 0
            assert figures["speedup"]["low"] <= figures["speedup"]["median"] <= figures["speedup"]["high"]
            assert figures["floor_share"] == pytest.approx(row["floor"] / figures["seconds"])
        assert row["floor"] < row["dense_floor"]
        assert row["error"] < 1e-6


def test_a_wrong_row_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_rows.packed_work

    def wrong(problem: Any, index: int, backend: str) -> Callable[[], Tensor]:
        work = right(problem, index, backend)
        return (lambda: work() * 1.01) if index == 1 else work

    monkeypatch.setattr(kernel_rows, "packed_work", wrong)
    part = kernel_rows.measure_all(SPECS[:1], KNOWN, "cpu", Deadline(100.0), rounds=1)
    assert ["cold" in row for row in part["rows"]] == [True, False, True]
    assert len(part["wrong"]) == 1
    assert "dgrad cpu: relative error" in part["wrong"][0]
    assert "wrong, not timed" in markdown({"kernels": part})


def test_a_wrong_dense_side_or_a_refusal_is_not_timed_either(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernel_rows.Problem.dense

    def wrong(problem: Any, channels_last: bool, dtype: torch.dtype | None = None) -> Any:
        works = right(problem, channels_last, dtype)
        return [lambda: works[0]() + 0.1, *works[1:]] if channels_last else works

    def refuse(problem: Any, index: int, backend: str) -> Any:
        raise calls.RefusedError("stride 3")

    with monkeypatch.context() as patch:
        patch.setattr(kernel_rows.Problem, "dense", wrong)
        part = kernel_rows.measure_all(SPECS[:1], KNOWN, "cpu", Deadline(100.0), rounds=1)
    assert ["cold" in row for row in part["rows"]] == [False, True, True]
    assert "the dense side: relative error" in part["wrong"][0]
    monkeypatch.setattr(kernel_rows, "packed_work", refuse)
    part = kernel_rows.measure_all(SPECS[:1], KNOWN, "cpu", Deadline(100.0), rounds=1)
    assert (part["wrong"], [row["refused"] for row in part["rows"]]) == ([], ["stride 3"] * 3)
    assert "stride 3" in markdown({"kernels": part})


def test_a_budget_trims_the_least_important_rows() -> None:
    specs = kernel_rows.specs()
    assert len(set(specs)) == len(specs)
    assert str(specs[0]) == "conv3x3-256-256-16 batch 64 bf16 32x32 10 %"
    bf16 = [spec for spec in specs if spec.kind == "bf16"]
    assert specs[: len(bf16)] == bf16
    assert {(s.layer, s.block, s.density) for s in bf16} == {
        (layer, block, density)
        for layer in kernel_rows.BATCHES
        for block in ((16, 16), (32, 32), (64, 64))
        for density in (0.1, 0.2, 0.3, 0.5)
    }
    half = bf16[: len(bf16) // 2]
    assert {spec.layer for spec in half} == set(kernel_rows.BATCHES)  # trimmed are densities and blocks, not layers
    assert sum(s.density == 0.1 for s in half) > 2 * sum(s.density == 0.5 for s in half)
    part = kernel_rows.measure_all(SPECS, KNOWN, "cpu", Deadline(0.0))
    assert (part["rows"], part["trimmed"]) == ([], [str(spec) for spec in SPECS])
    assert "No time was left for 2: conv3x3" in markdown({"kernels": part})


def test_host_time_is_measured_for_dense_and_packed_calls() -> None:
    part = host_time.measure("cpu", number=2, rounds=1, dtype=torch.float32)
    assert set(part["seconds"]) == {"dense", "cpu"}
    assert set(part["seconds"]["cpu"]) == {"forward", "dgrad", "wgrad", "layer", "step"}
    assert all(seconds > 0 for found in part["seconds"].values() for seconds in found.values())


def test_the_environment_is_described_and_measured() -> None:
    facts = environment.describe("cpu") | environment.measure("cpu", size=64, copied=2**20)
    assert set(facts["flops_per_s"]) == {"bf16", "fp16", "tf32", "fp32"}
    assert facts["copy_bytes_per_s"] > 0
    assert "library" not in facts["build"]  # a path of this machine
    assert torch.__version__ in markdown({"environment": facts})
    assert environment.peak_of(KNOWN, "bf16").floor(1e11, 1) == 1.0


@needs_training
def test_an_iteration_is_compared_with_the_dense_one() -> None:
    from ddst.benchmarks.gpu import iteration
    from ddst.benchmarks.gpu.networks import Network

    tiny = {"tiny": Network("tiny", 2, 1, 8, (16, 16), (16, 16), down=1, latent=8)}
    variants = [iteration.Variant("tiny", density, (8, 8)) for density in (None, 0.3)]
    part = iteration.measure_all(variants, "cpu", Deadline(100.0), rounds=1, networks=tiny)
    dense, sparse = part["rows"]
    assert part["wrong"] == []
    assert (dense["flops_share"], "speedup" in dense) == (1.0, False)
    assert 0.2 < sparse["flops_share"] < 0.8
    assert sparse["speedup"]["graph"] == pytest.approx(dense["graph"]["median"] / sparse["graph"]["median"])
    assert "| tiny | 2 | 30 % erk |" in markdown({"iteration": part})
    assert "iteration tiny 30 %" in short({"iteration": part})
    assert iteration.measure_all(variants, "cpu", Deadline(0.0), networks=tiny)["trimmed"] == [
        "tiny dense",
        "tiny 30 % erk",
    ]


@needs_training
def test_an_iteration_with_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddst.benchmarks.gpu import iteration
    from ddst.benchmarks.gpu.networks import Network

    monkeypatch.setattr(iteration, "wrong_gradients", lambda players: ["gradient of linear"])
    tiny = {"tiny": Network("tiny", 2, 1, 8, (16, 16), (16, 16), down=1, latent=8)}
    part = iteration.measure_all([iteration.Variant("tiny", 0.3, (8, 8))], "cpu", Deadline(100.0), 1, tiny)
    assert part["wrong"] == ["tiny 30 % erk: gradient of linear"]
    assert "wrong, not timed" in markdown({"iteration": part}) and "tiny" not in short({"iteration": part})
    assert "eager" not in part["rows"][0]


@needs_training
def test_the_networks_are_what_they_are_called() -> None:
    from ddst.benchmarks.gpu.iteration import VARIANTS
    from ddst.benchmarks.gpu.networks import NETWORKS, WideDiscriminator, WideGenerator
    from ddst.models import Discriminator, Generator

    def shapes(net: torch.nn.Module) -> list[torch.Size]:
        return [parameter.shape for parameter in net.parameters()]

    network = NETWORKS["sngan32"]
    assert shapes(WideGenerator(network)) == shapes(Generator(32, 256))
    assert shapes(WideDiscriminator(network)) == shapes(Discriminator(32, 128))
    wide = NETWORKS["biggan128"]
    assert 4 * 2 ** (len(wide.plan_g) - 1) == wide.resolution == 128
    assert [c // 96 for c in wide.plan_g] == [16, 16, 8, 4, 2, 1]
    assert [c // 96 for c in wide.plan_d] == [1, 2, 4, 8, 16, 16]
    with torch.device("meta"):
        generator, discriminator = WideGenerator(wide), WideDiscriminator(wide)
    assert generator(torch.zeros(1, 128, device="meta")).shape == (1, 3, 128, 128)
    assert discriminator(torch.zeros(1, 3, 128, 128, device="meta")).shape == (1,)
    assert {v.density for v in VARIANTS} == {None, 0.1, 0.3, 0.5}
    for name in NETWORKS:
        assert next(v for v in VARIANTS if v.network == name).density is None


@needs_training
def test_training_on_digits_moves_blocks_and_keeps_densities(tmp_path: Path) -> None:
    from ddst.benchmarks.gpu import training

    part = training.train("cpu", Deadline(100.0), tmp_path / "digits.png", 8, **TRAINING)
    assert part["wrong"] == []
    assert part["steps"] == 8 and part["moved_g"] and part["updates_g"] == 2 and part["decisions"] == 1
    assert part["density_g"] == pytest.approx(0.3, abs=0.02)
    assert (tmp_path / "digits.png").stat().st_size > 0
    assert "8 steps of DDST" in markdown({"train": part})
    assert training.train("cpu", Deadline(0.0), None, 8, **TRAINING)["wrong"] == ["no step was done"]


@needs_training
def test_training_that_does_not_train_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddst.benchmarks.gpu import training
    from ddst.sparsity import TopologyUpdater

    monkeypatch.setattr(TopologyUpdater, "exchange", lambda *_, **__: None)
    part = training.train("cpu", Deadline(100.0), None, 5, **TRAINING)
    assert any("no block of G has moved in 5 steps" in why for why in part["wrong"])
    monkeypatch.setattr(training, "load_images", lambda *_: _not_a_number())
    part = training.train("cpu", Deadline(100.0), None, 5, **TRAINING)
    assert any("loss is not finite at step 1" in why for why in part["wrong"])


def _not_a_number() -> Any:
    from ddst.data import ImageSet

    return ImageSet("nan", torch.full((9, 1, 8, 8), float("nan")), 1.0)


@pytest.mark.parametrize("end, wrong", [("exit 0", []), ("exit 3", ["probe_device: exit code 3: two"])])
def test_every_device_program_is_compiled_and_must_end_well(tmp_path: Path, end: str, wrong: list[str]) -> None:
    # The compiler is a shell script which "compiles" a shell script: it copies it to the name after -o.
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\nfor a; do last=$a; case $a in *.cu) from=$a;; esac; done\ncp "$from" "$last"\n')
    compiler.chmod(0o755)
    (tmp_path / "device").mkdir()
    source = tmp_path / "device" / "probe_device.cu"
    source.write_text(f"#!/bin/sh\necho one\necho two\n{end}\n")
    source.chmod(0o755)
    part = primitives.run_all("sm_90a", Deadline(60.0), tmp_path / "device", [str(compiler)])
    assert part["programs"] == {"probe_device": "two"}
    assert part["wrong"] == wrong
    assert "| probe_device | two |" in markdown({"primitives": part})
    missing = primitives.run_all("sm_90a", Deadline(60.0), tmp_path / "device", ["no-such-compiler"])
    assert "no no-such-compiler on this machine" in missing["missing"]
    shutil.rmtree(tmp_path / "device")
    assert primitives.run_all("sm_90a", Deadline(60.0), tmp_path / "device")["wrong"] == []


def test_pictures_and_table_of_a_whole_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figures = {"seconds": 1e-4, "dense_seconds": 2e-4, "floor_share": 0.5}
    figures["speedup"] = {"median": 2.0, "low": 1.9, "high": 2.1}  # type: ignore[assignment]
    common = {"batch": 64, "kind": "bf16", "backend": "triton", "wrong": None, "floor": 1e-5, "dense_floor": 1e-4}
    rows = [
        {**common, "layer": "conv", "block": (16, 16), "density": d, "pass": name, "cold": figures, "warm": figures}
        for d in (0.1, 0.3)
        for name in PASSES
    ]
    spread = {"median": 0.01, "low": 0.01, "high": 0.01}
    line = {"network": "sngan32", "what": "SNGAN", "batch": 64, "distribution": "erk", "wrong": []}
    line |= {"eager": spread, "graph": spread}
    iterations = [{**line, "density": None, "flops_share": 1.0}, {**line, "density": 0.1, "flops_share": 0.1}]
    kept = results.Results(tmp_path, markdown, PICTURES)
    kept.put("environment", KNOWN)
    kept.put("kernels", {"rows": rows, "wrong": [], "trimmed": ["conv 50 %"]})
    kept.put("iteration", {"rows": iterations, "wrong": []})
    kept.put("tune", {"chosen": [{"what": "forward", "ms": 1.0, "over_default": None, "config": "a"}], "wrong": ["b"]})
    kept.put("candidates", {"configurations": 3, "done": 1, "sweeps": 2, "wrong": []})
    kept.put("host", {"failed": "RuntimeError: no", "wrong": ["RuntimeError: no"]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration.png", "kernels.png", "results.json", "table.md"]
    table = (tmp_path / "table.md").read_text()
    for text in ("100.0 | 200.0 | 2.00×", "50 %", "3 configurations exact", "This part ended with an error", "- b"):
        assert text in table
    assert json.loads((tmp_path / "results.json").read_text())["kernels"]["rows"][0]["cold"]["seconds"] == 1e-4
    assert "conv" in short(kept.parts) and "2.00" in short(kept.parts) and "2 wrong" in short(kept.parts)
