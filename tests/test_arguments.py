"""Every public function, called with one argument replaced by what does not belong there.

It works, or raises a TypeError, ValueError or RuntimeError that names the argument; nothing else comes out, and nothing
takes long.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ddst
from ddst import gan, ops, sparsity
from ddst import nn as sparse_nn
from ddst import topology as tp
from ddst._arguments import check_bool, check_int, check_ints, check_number, check_one_of
from ddst.convert.advice_report import Advice, BlockAdvice, LayerAdvice, Measured
from ddst.models import Generator
from ddst.slot_change import SlotChange
from ddst.train.generator import About, write_generator

VALUES: list[Any] = [
    None,
    "x",
    1.5,
    True,
    -1,
    0,
    10**30,
    math.nan,
    math.inf,
    object(),
    [],
    {},
    [object()],
    (1, "x"),
    nn.Linear,
    torch.zeros(3, dtype=torch.int64),
    torch.zeros(2, 2, dtype=torch.bool),
    torch.zeros(1, 1, 1, 1, 1),
    torch.full((2, 2), math.nan),
]


def sparse_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(ddst.SparseLinear(16, 16, density=0.5, block=8), nn.ReLU(), nn.Linear(16, 2))


@functools.cache
def generator_file() -> Path:
    path = Path(tempfile.mkdtemp(), "generator.safetensors")
    settings = {"method": "dense", "resolution": 8, "width_g": 8, "width_d": 8, "latent": 4}
    about = About(settings, channels=1, classes=1, layers={}, step=0, versions={})
    write_generator(path, Generator(8, 8, 1, 4), about)
    return path


def made_up_advice() -> Advice:
    """Both layers of a model are twice as fast at a density of a half, and take all its time."""
    points = (Measured(0.5, 1.0, 0.5, 2.0, 2.0), Measured(1.0, 1.0, 1.0, 1.0, 1.0))
    layers = tuple(LayerAdvice(name, (16, 16), 1, 0.5, points) for name in ("0", "1"))
    return Advice(0.5, (BlockAdvice((8, 8), layers, 2.0),))


def trained() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = sparse_model()
    return model, torch.optim.SGD(model.parameters(), 0.1)


def adam_and_change() -> dict[str, Any]:
    model = sparse_model()
    layer = model[0]
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 16)).sum().backward()
    adam.step()
    return {"optimizer": adam, "param": layer.values, "change": layer.set_block_mask(~layer.block_mask)}


def networks() -> dict[str, Any]:
    g, d = (nn.Sequential(ddst.SparseLinear(16, 16, density=0.5, block=8)) for _ in range(2))
    return {
        "generator": g,
        "discriminator": d,
        "opt_g": torch.optim.SGD(g.parameters(), 0.1),
        "opt_d": torch.optim.SGD(d.parameters(), 0.1),
    }


def average_and_model() -> dict[str, Any]:
    model = sparse_model()
    return {"average": copy.deepcopy(model), "model": model}


def packed(*spatial: int) -> dict[str, Any]:
    mask = torch.ones(2, 2, *spatial, dtype=torch.bool)
    weight_shape = (16, 16, *spatial)
    return {
        "input": torch.ones(1, 16, *[2 * n for n in spatial]),
        "values": torch.ones(int(mask.sum()), 8, 8),
        "bias": torch.ones(16),
        "topology": tp.build_topology(mask),
        "weight_shape": weight_shape,
    }


def conv_scores() -> dict[str, Any]:
    x = torch.ones(1, 16, 4, 4)
    return {"grad_output": x, "input": x, "weight_shape": (16, 16, 1, 1), "block": (8, 8)}


def flops() -> Any:
    return sparsity.FlopCounter(sparse_model(), torch.ones(2, 16))


def loaded(thing: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    return thing.load_state_dict, {"state": thing.state_dict()}


def updater() -> sparsity.TopologyUpdater:
    return sparsity.TopologyUpdater(*trained(), growth="random")


def with_model(function: Callable[..., Any], **options: Any) -> Callable[[], tuple[Callable[..., Any], dict[str, Any]]]:
    return lambda: (function, {"model": sparse_model(), **options})


LAYER = {"bias": True, "device": None, "dtype": None, "density": 0.5, "block": 8}
SUMMARY = gan.WindowSummary(4, 4, 0.3, 0.5, 0.6)
MASK = torch.ones(2, 2, dtype=torch.bool)
SLOTS = torch.tensor([3, -1, 0], dtype=torch.int32)

#: Name -> what makes the function and its right arguments anew for each call.
CASES: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
    "load_generator": lambda: (ddst.load_generator, {"path": generator_file(), "device": "cpu"}),
    "PackedParameter": lambda: (
        sparse_nn.PackedParameter,
        {"shape": (16, 16, 3, 3), **{name: value for name, value in LAYER.items() if name != "bias"}},
    ),
    "SparseLinear": lambda: (ddst.SparseLinear, {"in_features": 16, "out_features": 16, **LAYER}),
    "SparseConv2d": lambda: (
        ddst.SparseConv2d,
        {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1,
         "padding_mode": "zeros", **LAYER},
    ),
    "SparseConv1d": lambda: (
        ddst.SparseConv1d,
        {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 2,
         "padding_mode": "zeros", **LAYER},
    ),
    "SparseConvTranspose1d": lambda: (
        ddst.SparseConvTranspose1d,
        {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1,
         "groups": 1, "dilation": 1, "padding_mode": "zeros", **LAYER},
    ),
    "SparseConvTranspose2d": lambda: (
        ddst.SparseConvTranspose2d,
        {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1,
         "groups": 1, "dilation": 1, "padding_mode": "zeros", **LAYER},
    ),
    "SparseConvTranspose2d.__call__": lambda: (
        ddst.SparseConvTranspose2d(16, 16, 3, 2, block=8, density=0.5),
        {"input": torch.ones(1, 16, 4, 4), "output_size": (9, 10)},
    ),
    "SparseConv1d.__call__": lambda: (ddst.SparseConv1d(16, 16, 3, block=8), {"input": torch.ones(1, 16, 4)}),
    "SparseConvTranspose2d.from_dense": lambda: (
        ddst.SparseConvTranspose2d.from_dense,
        {"module": nn.ConvTranspose2d(16, 16, 1), "density": None, "block_mask": None, "block": 8},
    ),
    "SparseLinear.from_dense": lambda: (
        ddst.SparseLinear.from_dense, {"module": nn.Linear(16, 16), "density": 0.5, "block_mask": None, "block": 8},
    ),
    "SparseConv2d.from_dense": lambda: (
        ddst.SparseConv2d.from_dense, {"module": nn.Conv2d(16, 16, 1), "density": None, "block_mask": None, "block": 8},
    ),
    "set_block_mask": lambda: (sparse_model()[0].set_block_mask, {"mask": MASK}),
    "set_backend": with_model(sparse_nn.set_backend, backend="reference"),
    "sparse_layers": with_model(sparse_nn.sparse_layers),
    "named_weights": with_model(sparse_nn.named_weights),
    "modulated_conv2d": lambda: (
        ddst.functional.modulated_conv2d,
        {
            "input": torch.ones(1, 16, 4, 4), "weight": ddst.SparseConv2d(16, 16, 3, density=0.5, block=8),
            "style": torch.ones(1, 16), "demodulate": True, "stride": 1, "padding": 1, "up": 1, "eps": 1e-8,
        },
    ),
    "explain": lambda: (
        functools.partial(ddst.explain, measure=False), {"layer": sparse_model()[0], "input": torch.ones(2, 16)},
    ),
    "spectral_norm": lambda: (
        sparse_nn.spectral_norm,
        {"layer": sparse_model()[0], "n_power_iterations": 1, "eps": 1e-12, "noise": 0.05, "style": "hook"},
    ),
    "SpectralNorm": lambda: (
        sparse_nn.SpectralNorm,
        {"weight_shape": (16, 16), "block": (8, 8), "n_power_iterations": 1, "eps": 1e-12, "noise": 0.05,
         "style": "hook", "device": None, "dtype": None, "dim": 0},
    ),
    "weight_norm": lambda: (sparse_nn.weight_norm, {"layer": sparse_model()[0], "dim": 0, "style": "hook"}),
    "WeightNorm": lambda: (
        sparse_nn.WeightNorm,
        {"weight_shape": (16, 16), "dim": None, "style": "hook", "device": None, "dtype": None},
    ),
    "remove_weight_norm": lambda: (
        sparse_nn.remove_weight_norm, {"layer": sparse_nn.weight_norm(sparse_model()[0])},
    ),
    "sparsify": lambda: (
        ddst.sparsify,
        {"model": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "density": 0.5, "block": 8, "backend": "auto",
         "distribution": "erk", "exclude": (), "generator": None, "mask": "random", "spectral_norm_noise": None,
         "only_if_faster": False, "sample": None},
    ),
    "sparsify(time_budget)": lambda: (
        ddst.sparsify,
        {"model": nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "time_budget": 0.5, "distribution": "work",
         "block": 8, "only_if_faster": made_up_advice(), "sample": torch.ones(1, 16)},
    ),
    "densify": with_model(ddst.densify),
    "fuse": with_model(ddst.fuse),
    "unfuse": with_model(ddst.unfuse),
    "NormActConv2d": lambda: (
        sparse_nn.NormActConv2d,
        {"conv": ddst.SparseConv2d(16, 16, 1, block=8), "norm": nn.BatchNorm2d(16), "activation": nn.ReLU(),
         "condition": None, "upsample": 1, "pool": 1},
    ),
    "NormActConv2d.forward": lambda: (
        sparse_nn.NormActConv2d(ddst.SparseConv2d(16, 16, 1, block=8)),
        {"input": torch.ones(2, 16, 2, 2), "residual": torch.ones(2, 16, 2, 2), "moments": torch.ones(2, 16),
         "residual_upsample": 1, "return_moments": True},
    ),
    "synchronize": with_model(ddst.synchronize),
    "dense_state_dict": with_model(ddst.dense_state_dict),
    "advise": lambda: (
        ddst.advise,
        {"model": nn.Sequential(nn.Linear(16, 16)), "sample": torch.ones(1, 16), "density": 0.5, "blocks": [8],
         "densities": (1.0,), "distribution": "erk", "exclude": (), "backend": "auto", "repeats": 1},
    ),
    "carry_state": lambda: (ddst.carry_state, {**adam_and_change(), "second_moment": None}),
    "SparseTraining": lambda: (
        ddst.SparseTraining,
        dict(zip(("model", "optimizer"), trained(), strict=True))
        | {"method": "rigl", "total_steps": 9, "interval": 3, "drop_fraction": 0.3, "drop_fraction_end": 0.1,
           "drop_fraction_steps": None, "schedule": "cosine", "scope": None, "ranking": None, "max_norm_share": None,
           "exempt": None, "connected": None, "grace": None,
           "random_share": 0.0, "prune_to": None, "prune_at": None, "grown_second_moment": None, "begin": 0,
           "end": None, "seed": 0, "generator": None},
    ),
    "SparseTraining.load_state_dict": lambda: loaded(ddst.SparseTraining(*trained(), total_steps=9)),
    "TopologyUpdater": lambda: (
        sparsity.TopologyUpdater,
        dict(zip(("model", "optimizer"), trained(), strict=True))
        | {"growth": "gradient", "scope": None, "ranking": None, "max_norm_share": None, "exempt": None,
           "grown_second_moment": None, "random_share": 0.0, "connected": None, "grace": 0, "generator": None},
    ),
    "exchange": lambda: (updater().exchange, {"fraction": 0.5, "step": 0}),
    "change_density": lambda: (updater().change_density, {"target": 0.5, "step": 0}),
    "DropSchedule": lambda: (
        sparsity.DropSchedule, {"initial": 0.3, "total_steps": 9, "shape": "cosine", "final": 0.1},
    ),
    "DropSchedule.__call__": lambda: (sparsity.DropSchedule(0.3, 9), {"step": 3}),
    "network_stats": lambda: (
        sparsity.network_stats,
        dict(zip(("model", "optimizer"), trained(), strict=True)) | {"average": None},
    ),
    "FlopCounter": with_model(sparsity.FlopCounter, sample=torch.ones(2, 16), forward=None),
    "TrainingFlops": lambda: (
        sparsity.TrainingFlops, {"generator": flops(), "discriminator": flops(), "d_steps": 1},
    ),
    "TrainingFlops.load_state_dict": lambda: loaded(sparsity.TrainingFlops(flops(), flops())),
    "choose_drop": lambda: (
        sparsity.choose_drop,
        {"norms": [torch.ones(3)], "amount": 1, "keys": None, "sizes": None, "max_norm_share": None, "stay": None,
         "lines": ()},
    ),
    "choose_grow": lambda: (sparsity.choose_grow, {"scores": [torch.ones(3)], "amount": 1, "sizes": None}),
    "relative_keys": lambda: (
        sparsity.relative_keys, {"norms": torch.ones(3), "sizes": torch.ones(3), "active": None},
    ),
    "DDST": lambda: (
        ddst.DDST,
        networks()
        | {"total_steps": 99, "mode": "strict", "method": "rigl", "method_d": None, "interval_g": 9, "interval_d": 9,
           "delta": 0.05,
           "bounds": (0.4, 0.6), "density_range": None, "br_every": 1, "br_window": 4, "br_average": None,
           "br_eps": 1e-3, "warmup": 0, "drop_fraction": None, "drop_fraction_d": None, "drop_fraction_end": 0.1,
           "drop_fraction_steps": None, "schedule": "cosine", "scope": None, "ranking": None, "max_norm_share": None,
           "grown_second_moment": None,
           "connected": None, "grace": None,
           "signal": "balance_ratio", "random_share": 0.0, "published": False, "prune_to": None, "prune_at": None,
           "exempt_g": None, "exempt_d": None, "ema": None, "seed": 0, "generate": None, "score": None},
    ),
    "DDST.step": lambda: (
        ddst.DDST(**networks(), total_steps=99, mode="sdst", interval_g=9, br_every=1, br_window=4).step,
        {"fake_scores": torch.ones(2, 16), "noise": torch.ones(2, 16), "real": torch.ones(2, 16)},
    ),
    "DDST.load_state_dict": lambda: loaded(
        ddst.DDST(**networks(), total_steps=99, interval_g=9, interval_d=9, br_every=1, br_window=4)
    ),
    "EMA": with_model(ddst.EMA, decay=0.9, start=0, ramp=0.1),
    "EMA.load_state_dict": lambda: loaded(ddst.EMA(sparse_model())),
    "BalanceRatio": lambda: (ddst.BalanceRatio, {"window": 4, "average": "ratio_of_means", "eps": 1e-3}),
    "BalanceRatio.add": lambda: (ddst.BalanceRatio().add, {"alpha": 0.1, "beta": 0.5, "sign": None}),
    "BalanceRatio.load_state_dict": lambda: loaded(ddst.BalanceRatio()),
    "DensityController": lambda: (
        ddst.DensityController,
        {"mode": "strict", "bounds": (0.4, 0.6), "delta": 0.05, "density_range": None, "warmup": 0,
         "signal": "real_sign", "published": False},
    ),
    "decide": lambda: (
        ddst.DensityController().decide,
        {"window": SUMMARY, "density": 0.5, "step": 9, "lowest": 0.0, "highest": 1.0, "resolution": 0.0},
    ),
    "replay": lambda: (
        ddst.DensityController().replay, {"decision": ddst.DensityController().decide(SUMMARY, 0.5, 9)},
    ),
    "conv2d": lambda: (ops.conv2d, packed(1, 1) | {"stride": 1, "padding": 0, "dilation": 1, "backend": "auto"}),
    "channel_moments": lambda: (ops.channel_moments, {"input": torch.ones(2, 3, 4, 4)}),
    "norm_act_conv2d": lambda: (
        ops.norm_act_conv2d,
        packed(1, 1) | {"stride": 1, "padding": 0, "dilation": 1, "norm": None, "negative_slope": 0.0, "upsample": 1,
                        "pool": 1, "residual": None, "residual_upsample": 1, "moments": False, "backend": "auto"},
    ),
    "conv_transpose2d": lambda: (
        ops.conv_transpose2d,
        packed(1, 1) | {"stride": 2, "padding": 0, "output_padding": 1, "dilation": 1, "backend": "auto"},
    ),
    "linear": lambda: (ops.linear, packed() | {"backend": "auto"}),
    "linear_transposed": lambda: (
        ops.linear_transposed,
        {name: value for name, value in packed().items() if name != "bias"} | {"backend": "auto"},
    ),
    "conv2d_block_scores": lambda: (
        ops.conv2d_block_scores, conv_scores() | {"stride": 1, "padding": 0, "dilation": 1, "backend": "auto"},
    ),
    "linear_block_scores": lambda: (
        ops.linear_block_scores,
        {"grad_output": torch.ones(1, 16), "input": torch.ones(1, 16), "weight_shape": (16, 16), "block": 8,
         "backend": "auto"},
    ),
    "follow": lambda: (ddst.follow, average_and_model()),
    "check_block": lambda: (tp.check_block, {"block": 8}),
    "block_count": lambda: (tp.block_count, {"density": 0.5, "total": 9}),
    "random_mask": lambda: (
        tp.random_mask, {"weight_shape": (16, 16), "block": (8, 8), "nnz": 2, "generator": None, "groups": 2},
    ),
    "build_topology": lambda: (tp.build_topology, {"mask": MASK}),
    "pack": lambda: (tp.pack, {"weight": torch.ones(16, 16), "mask": MASK, "block": (8, 8)}),
    "row_major_slots": lambda: (tp.row_major_slots, {"mask": MASK}),
    "mask_of_slots": lambda: (tp.mask_of_slots, {"slot_blocks": SLOTS, "shape": (2, 2)}),
    "topology_of_slots": lambda: (tp.topology_of_slots, {"slot_blocks": SLOTS, "shape": (2, 2)}),
    "pack_slots": lambda: (
        tp.pack_slots, {"weight": torch.ones(16, 16), "slot_blocks": SLOTS, "block": (8, 8)},
    ),
    "unpack_slots": lambda: (
        tp.unpack_slots, {"values": torch.ones(3, 8, 8), "slot_blocks": SLOTS, "weight_shape": (16, 16)},
    ),
    "inside_slots": lambda: (
        tp.inside_slots, {"slot_blocks": SLOTS, "weight_shape": (16, 16), "block": (8, 8)},
    ),
    "inside": lambda: (tp.inside, {"mask": MASK, "weight_shape": (16, 16), "block": (8, 8)}),
    "SlotChange.to_mask": lambda: (
        SlotChange.to_mask, {"slot_blocks": SLOTS, "mask": MASK, "reserve": 0},
    ),
    "SlotChange.between": lambda: (SlotChange.between, {"before": SLOTS, "after": SLOTS.flip(0)}),
    "SlotChange.apply": lambda: (
        SlotChange.to_mask(SLOTS, MASK).apply, {"stored": torch.ones(3, 8, 8)},
    ),
    "unpack": lambda: (tp.unpack, {"values": torch.ones(4, 8, 8), "mask": MASK, "weight_shape": (16, 16)}),
}  # fmt: skip

#: What is handed to the user's own modules and functions, which check it.
NOT_OURS = {
    ("DDST.step", "noise"),
    ("DDST.step", "real"),
    ("FlopCounter", "sample"),
    ("FlopCounter", "forward"),
    ("advise", "sample"),
    ("sparsify", "sample"),
    ("sparsify(time_budget)", "sample"),
    ("sparsify(time_budget)", "only_if_faster"),  # True measures in earnest: these layers meet no budget
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_argument_works_or_is_named(case: str) -> None:
    order = random.Random(case)
    function, right = CASES[case]()
    function(**right)
    wrong = [(name, value) for name in right for value in VALUES]
    order.shuffle(wrong)  # what one call leaves behind must not depend on the order
    unnamed = []
    for name, value in wrong:
        function, right = CASES[case]()
        try:
            function(**{**right, name: value})
        except (TypeError, ValueError, RuntimeError) as error:
            # exempt_g is TopologyUpdater's exempt, block_mask its own mask.
            named = name.removesuffix("_g").removesuffix("_d") in str(error)
            if not named and (case, name) not in NOT_OURS:
                unnamed.append(f"{name}={value!r:.40}: {type(error).__name__}: {str(error)[:100]}")
        except Exception as error:
            unnamed.append(f"{name}={value!r:.40}: {type(error).__name__}: {str(error)[:100]}")
    assert not unnamed, "\n".join(unnamed)


def test_every_public_function_is_among_the_cases() -> None:
    results = {
        "Explanation", "SparseLayer", "PackedWeight", "Advice", "NetworkStats", "UpdateReport", "BalanceSample",
        "Decision", "Preset", "PRESETS", "StepReport", "WindowSummary", "__version__", "build_info",
        "keep_freed_memory",
        "Norm",  # an argument of norm_act_conv2d
        "capture",  # needs a CUDA device, or a pretended one: tests/test_captured_step.py
        "watch",  # of a DistributedDataParallel, which needs processes: tests/distributed
    }  # fmt: skip
    public = {name for module in (ddst, ddst.functional, sparse_nn, sparsity, gan, ops) for name in module.__all__}
    assert public - results <= set(CASES)
    assert not any(inspect.signature(function).parameters for function in (ddst.build_info, ddst.keep_freed_memory))


def test_numpys_numbers_are_numbers_and_bools_are_not() -> None:
    assert check_int("n", np.int32(3), 1) == 3 and type(check_int("n", np.int32(3))) is int
    assert check_ints("n", np.int64(2), 2) == (2, 2) and check_ints("n", (np.int8(1), 2), 2) == (1, 2)
    assert check_number("x", np.float32(0.5), 0, 1) == 0.5 and check_number("x", np.int64(1)) == 1.0
    for check in (lambda v: check_int("n", v), lambda v: check_number("n", v), lambda v: check_ints("n", v, 2)):
        for value in (True, np.bool_(True), torch.tensor(1)):
            with pytest.raises(TypeError, match="n must be"):
                check(value)
    with pytest.raises(TypeError, match="flag must be True or False"):
        check_bool("flag", 1)
    with pytest.raises(TypeError, match="kind must be one of a, b"):
        check_one_of("kind", ["a"], ("a", "b"))
    layer = ddst.SparseConv2d(
        np.int64(16), np.int32(16), np.int64(3), stride=np.array([1, 2])[1], padding=(1,), block=8
    )
    assert layer(torch.ones(1, 16, 4, 4)).shape == (1, 16, 2, 2)


@pytest.mark.parametrize("options", [{"block": 1}, {}])
def test_a_weight_of_too_many_blocks_is_refused_before_a_mask_is_drawn(options: dict[str, int]) -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"1000000x1000000 has \d+ blocks"):
        ddst.SparseLinear(10**6, 10**6, **options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("padding", [10**5, (0, 2**31 - 1), 2**31, 10**30])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_a_huge_padding_is_refused_by_name(padding: Any, mode: str) -> None:
    with pytest.raises(ValueError, match="padding"):
        ddst.SparseConv2d(16, 16, 3, padding=padding, padding_mode=mode)(torch.ones(1, 16, 4, 4))
