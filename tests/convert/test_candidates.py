"""Which layers stay as they are, the reason the report gives, and how they count towards the density."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.nn.utils import spectral_norm as hooked_spectral_norm

from ddst.convert import sparsify
from ddst.convert.candidates import find_candidates
from ddst.nn import PackedParameter, SparseLinear, sparse_layers


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def odd_layers() -> nn.ModuleDict:
    """One candidate of every kind that stays as it is, and one that is swapped."""
    tied = nn.Linear(32, 32)
    twin = nn.Linear(32, 32)
    twin.weight = tied.weight
    two = parametrizations.spectral_norm(nn.Linear(32, 32))
    parametrize.register_parametrization(two, "weight", nn.Identity())
    two_norms = parametrizations.weight_norm(nn.Linear(32, 32))
    parametrize.register_parametrization(two_norms, "weight", nn.Identity())
    hooked = nn.Linear(32, 32)
    hooked._register_load_state_dict_pre_hook(lambda *args: None)
    patched, compiled, namesake = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
    patched.forward = lambda x: x
    compiled.compile(backend="eager")
    namesake.block = "4"
    return nn.ModuleDict(
        {
            "swapped": nn.Linear(256, 256),
            "grouped": nn.Conv2d(64, 48, 3, groups=2),
            "grouped_up": nn.ConvTranspose1d(48, 64, 3, groups=2),
            "three_d": nn.Conv3d(32, 32, 3),
            "patched": patched,
            "compiled": compiled,
            "namesake": namesake,
            "narrow": nn.Conv2d(8, 32, 3),
            "own": OwnLinear(32, 32),
            "lazy": nn.LazyLinear(32),
            "tied": tied,
            "twin": twin,
            "pruned": prune.random_unstructured(nn.Linear(32, 32), "weight", 0.5),
            "pruned_bias": prune.random_unstructured(nn.Linear(32, 32), "bias", 0.5),
            "old_weight_norm": weight_norm(nn.Linear(32, 32), dim=1),
            "weight_norm": parametrizations.weight_norm(nn.Linear(32, 32), dim=1),
            "two_norms": two_norms,
            "two": two,
            "sideways": hooked_spectral_norm(nn.Conv2d(32, 32, 3), dim=2),
            "sideways_new": parametrizations.spectral_norm(nn.Conv2d(32, 32, 3), dim=3),
            "state_hook": hooked,
            "complex": nn.Linear(32, 32, dtype=torch.complex64),
            "meta": nn.Linear(32, 32, device="meta"),
            "sparse": SparseLinear(32, 32),
            "attention": nn.MultiheadAttention(32, 2),
            "encoder": nn.TransformerEncoderLayer(32, 2, 32),
        }
    )


REASONS = {
    "grouped": "groups=2 of 32 to 24 channels, no multiples of a block of 16x16",
    "grouped_up": "groups=2 of 24 to 32 channels, no multiples of a block of 16x16",
    "three_d": "Conv3d is not supported",
    "compiled": "call that after ddst.sparsify",
    "narrow": "8 to 32 channels, fewer than a block of 16x16",
    "lazy": "run the model once",
    "tied": "weight is shared: tied.weight, twin.weight",
    "twin": "weight is shared: tied.weight, twin.weight",
    "pruned": "weight_mask",
    "pruned_bias": "bias_mask",
    "old_weight_norm": "weight norm over dim=1",
    "weight_norm": "weight norm over dim=1",
    "two_norms": "parametrized: weight by _WeightNorm, weight by Identity",
    "two": "parametrized: weight by _SpectralNorm, weight by Identity",
    "sideways": "spectral norm over dim=2",
    "sideways_new": "spectral norm over dim=3",
    "state_hook": "state-dict hooks",
    "complex": "complex64",
    "meta": "meta",
    "sparse": "already sparse",
    "attention.in_proj_weight": "a parameter of its module",
    "attention.out_proj": "nn.MultiheadAttention reads its weight directly",
    "encoder.self_attn.in_proj_weight": "a parameter of its module",
    "encoder.self_attn.out_proj": "nn.MultiheadAttention reads its weight directly",
    "encoder.linear1": "TransformerEncoderLayer",
    "encoder.linear2": "TransformerEncoderLayer",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_report_names_the_reason_of_every_layer_left_as_it_is() -> None:
    model = odd_layers()
    before = dict(model.named_modules())
    report = sparsify(model, 0.5, distribution="uniform")
    reasons = {e.name: e.reason for e in report.layers}
    assert reasons.pop("swapped") is None
    for name in ("patched", "namesake", "own"):  # packed where they are
        assert reasons.pop(name) is None and model[name] is before[name]
        assert isinstance(model[name].packed_weight, PackedParameter) and isinstance(model[name], nn.Linear)
    assert (model["namesake"].block, model["patched"](3)) == ("4", 3)
    assert set(reasons) == set(REASONS)
    for name, reason in reasons.items():
        assert reason is not None
        assert REASONS[name] in reason, (name, reason)
        assert model.get_submodule(name.removesuffix(".in_proj_weight")) is before[name.removesuffix(".in_proj_weight")]
    assert isinstance(model["swapped"], SparseLinear)
    text = report.text(200)
    assert all(
        any(line.startswith(name) and reason in line for line in text.splitlines()) for name, reason in REASONS.items()
    )
    assert "4 of 30 layers sparse" in text


def test_left_layers_count_with_density_one_under_erk_unless_excluded() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=8), nn.Conv2d(64, 64, 3))

    model = make()
    sparsify(model, 0.3)
    active = sum(m.active_weights for m in sparse_layers(model).values()) + 4608
    assert abs(active - 0.3 * (2 * 36864 + 4608)) <= 256
    model = make()
    report = sparsify(model, 0.3, exclude=["1"])
    active = sum(m.active_weights for m in sparse_layers(model).values())
    assert abs(active - 0.3 * 2 * 36864) <= 256
    assert report.density == active / (2 * 36864)
    assert report.model_density == (active + 4608) / (2 * 36864 + 4608)


def test_finding_candidates_runs_no_power_iteration() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(32, 32)))
    before = model[0].parametrizations.weight[0]._u.clone()
    assert find_candidates(model)[0].norm is not None
    assert torch.equal(model[0].parametrizations.weight[0]._u, before)


def test_exclude_takes_names_modules_and_classes_with_what_is_inside() -> None:
    def make() -> nn.ModuleDict:
        inner = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        return nn.ModuleDict({"a": inner, "b": nn.Linear(64, 64), "c": nn.Conv2d(64, 64, 1)})

    def left(model: nn.ModuleDict, exclude: list) -> list[str]:
        return [e.name for e in sparsify(model, 0.5, exclude=exclude).layers if e.reason == "excluded"]

    assert left(make(), ["a.2"]) == ["a.2"]
    assert left(make(), ["a"]) == ["a.0", "a.2"]
    model = make()
    assert left(model, [model["a"], "b"]) == ["a.0", "a.2", "b"]
    assert left(make(), [nn.Linear]) == ["a.0", "a.2", "b"]
    assert left(make(), [nn.Sequential]) == ["a.0", "a.2"]
