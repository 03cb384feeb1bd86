"""Which layers stay as they are, the reason the report gives, and how they count towards the density."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.nn.utils import spectral_norm as hooked_spectral_norm

from ddst.convert import sparsify
from ddst.convert.candidates import find_candidates
from ddst.nn import SparseLinear, sparse_layers


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
    return nn.ModuleDict(
        {
            "swapped": nn.Linear(256, 256),
            "grouped": nn.Conv2d(32, 32, 3, groups=2),
            "transposed": nn.ConvTranspose2d(32, 32, 3),
            "one_d": nn.Conv1d(32, 32, 3),
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
            "sideways": hooked_spectral_norm(nn.Linear(32, 32), dim=1),
            "sideways_new": parametrizations.spectral_norm(nn.Linear(32, 32), dim=1),
            "state_hook": hooked,
            "complex": nn.Linear(32, 32, dtype=torch.complex64),
            "meta": nn.Linear(32, 32, device="meta"),
            "sparse": SparseLinear(32, 32),
            "attention": nn.MultiheadAttention(32, 2),
            "encoder": nn.TransformerEncoderLayer(32, 2, 32),
        }
    )


REASONS = {
    "grouped": "groups=2",
    "transposed": "ConvTranspose2d is not supported",
    "one_d": "Conv1d is not supported",
    "narrow": "8 to 32 channels, fewer than a block of 16x16",
    "own": "subclass",
    "lazy": "run the model once",
    "tied": "weight is shared: tied.weight, twin.weight",
    "twin": "weight is shared: tied.weight, twin.weight",
    "pruned": "weight_mask",
    "pruned_bias": "bias_mask",
    "old_weight_norm": "weight norm over dim=1",
    "weight_norm": "weight norm over dim=1",
    "two_norms": "parametrized: weight by _WeightNorm, weight by Identity",
    "two": "parametrized: weight by _SpectralNorm, weight by Identity",
    "sideways": "spectral norm over dim=1",
    "sideways_new": "spectral norm over dim=1",
    "state_hook": "state-dict hooks",
    "complex": "complex64",
    "meta": "meta",
    "sparse": "already sparse",
    "attention.out_proj": "subclass",
    "encoder.self_attn.out_proj": "subclass",
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
    assert set(reasons) == set(REASONS)
    for name, reason in reasons.items():
        assert reason is not None
        assert REASONS[name] in reason, (name, reason)
        assert model.get_submodule(name) is before[name]
    assert isinstance(model["swapped"], SparseLinear)
    text = str(report)
    assert all(
        any(line.startswith(name) and reason in line for line in text.splitlines()) for name, reason in REASONS.items()
    )
    assert "1 of 25 layers sparse" in text


def test_left_layers_count_with_density_one_under_erk_unless_excluded() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=4), nn.Conv2d(64, 64, 3))

    model = make()
    sparsify(model, 0.3)
    active = sum(m.active_weights for m in sparse_layers(model).values()) + 9216
    assert abs(active - 0.3 * (2 * 36864 + 9216)) <= 256
    model = make()
    report = sparsify(model, 0.3, exclude=["1"])
    active = sum(m.active_weights for m in sparse_layers(model).values())
    assert abs(active - 0.3 * 2 * 36864) <= 256
    assert report.density == active / (2 * 36864)
    assert report.model_density == (active + 9216) / (2 * 36864 + 9216)


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
