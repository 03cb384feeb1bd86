"""Which parameters act as weights: the report and every density of a model count the same ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import ddst
from ddst.convert import find_weights
from ddst.sparsity import network_stats
from ddst.sparsity.density import NetworkDensity


class Own(nn.Module):
    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(parameter, requires_grad=parameter.is_floating_point()))


class ChannelNorm(Own):
    pass


class CodeEmbedding(Own):
    pass


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


WEIGHTS: dict[str, tuple[nn.Module, list[str]]] = {
    "convolution": (Own(weight=ones(8, 4, 3, 3), bias=ones(8)), ["weight"]),
    "modulated, with a first dimension": (Own(weight=ones(1, 8, 4, 3, 3), gain=ones(1, 8, 1, 1)), ["weight"]),
    "several kernels": (Own(weights=ones(2, 8, 4, 3, 3)), ["weights"]),
    "to one score": (Own(weight=ones(1, 8)), ["weight"]),
    "recurrent": (nn.LSTM(4, 8), ["weight_ih_l0", "weight_hh_l0"]),
    "attention": (nn.MultiheadAttention(8, 2), ["in_proj_weight", "out_proj"]),
    "transposed, by another name": (Own(transposed_kernel=ones(8, 4)), ["transposed_kernel"]),
    "weight norm": (parametrizations.weight_norm(nn.Linear(8, 4)), [""]),
    "norms": (nn.ModuleList([nn.LayerNorm((4, 4)), nn.BatchNorm2d(4), nn.RMSNorm((4, 4))]), []),
    "a norm of one's own": (ChannelNorm(scale=ones(4, 8)), []),
    "embeddings": (nn.ModuleList([nn.Embedding(4, 8), nn.EmbeddingBag(4, 8), CodeEmbedding(codes=ones(4, 8))]), []),
    "no weights": (
        Own(const=ones(1, 8, 4, 4), pos_embedding=ones(9, 8), rel_bias=ones(9, 8), noise=ones(4), input=ones(1, 8, 4)),
        [],
    ),
    "a constant": (Own(const=ones(8, 4, 4), codebook=ones(9, 8)), []),
    "integers": (Own(weight=torch.ones(4, 4, dtype=torch.int64)), []),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_what_acts_as_a_weight(case: str) -> None:
    module, names = WEIGHTS[case]
    found = find_weights(nn.Sequential(module))
    assert [c.name for c in found] == [f"0.{name}" if name else "0" for name in names]
    sizes = [c.size for c in found]
    assert NetworkDensity(nn.Sequential(module)).total_weights == sum(sizes)


def test_a_parameter_of_several_modules_counts_once() -> None:
    one, two, tied = Own(weight=ones(8, 4)), Own(weight=ones(8, 4)), nn.Linear(4, 8)
    two.weight = one.weight
    tied.weight = nn.Parameter(ones(8, 4))
    three = Own(weight=ones(8, 4))
    three.weight = tied.weight
    assert [c.name for c in find_weights(nn.ModuleList([one, two, three, tied]))] == ["0.weight", "3"]


def test_excluded_parameters_say_so() -> None:
    model = nn.ModuleDict({"own": Own(weight=ones(64, 64)), "layer": nn.Linear(64, 64)})
    (own, layer) = ddst.sparsify(model, 0.5, exclude=(name for name in ["own"])).layers
    assert (own.name, own.reason, layer.reason) == ("own.weight", "excluded", None)


def test_a_model_of_nothing_that_can_be_packed_is_refused_with_their_names() -> None:
    for distribution in ("erk", "uniform"):
        with pytest.raises(ValueError, match=r"no layer to swap \(0\.kernels: a parameter of its module"):
            ddst.sparsify(nn.Sequential(Own(kernels=ones(64, 64))), 0.5, distribution=distribution)


class Modulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64, 3, 3))
        self.style = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(self.style(x)[:, :, None, None], self.weight, padding=1)[..., 0, 0]


def test_report_and_scheduler_count_every_weight() -> None:
    generator, discriminator = nn.Sequential(Modulated(), Modulated()), nn.Sequential(Modulated(), nn.Linear(64, 64))
    everything = {
        id(net): sum(p.numel() for p in net.parameters() if p.dim() > 1) for net in (generator, discriminator)
    }
    reports = [ddst.sparsify(net, 0.25, distribution="uniform") for net in (generator, discriminator)]
    optimizers = [torch.optim.Adam(net.parameters()) for net in (generator, discriminator)]
    scheduler = ddst.DDST(
        generator,
        discriminator,
        *optimizers,
        total_steps=100,
        interval_g=10,
        interval_d=20,
        br_window=20,
        connected=False,
    )
    densities = (scheduler.density_g, scheduler.density_d)
    for net, report, density in zip((generator, discriminator), reports, densities, strict=True):
        active = sum(p.numel() for p in net.parameters() if p.dim() > 1)  # packed values, too
        assert report.density == 0.25
        assert report.model_density == density == active / everything[id(net)] == network_stats(net).density
        assert report.model_density == pytest.approx(0.25)
        assert "0.weight  Modulated" in " ".join(str(report).split("\n")).replace("   ", "  ")
    updater = scheduler.updater_d
    assert updater is not None
    low, high = updater.attainable_density
    assert low < scheduler.density_d < high < 1.0  # the first and the last layer stay as they are
    updater.change_density(scheduler.density_d - 256 * 2 / everything[id(discriminator)], step=1)
    assert scheduler.density_d == pytest.approx(densities[1] - 256 * 2 / everything[id(discriminator)])
