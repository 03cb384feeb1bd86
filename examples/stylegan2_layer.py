"""StyleGAN2's modulated convolution, as usual programs write it, made sparse; its penalties equal the dense form's.

python examples/stylegan2_layer.py
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ddst


class ModulatedConv2d(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, side, side))
        self.affine = nn.Linear(style, inputs)
        self.scale, self.padding = 1 / math.sqrt(inputs * side**2), side // 2

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        n, inputs, height, width = x.shape
        weight = self.weight * self.scale
        weight = weight.unsqueeze(0) * (1 + self.affine(w)).view(n, 1, inputs, 1, 1)
        weight = weight * (weight.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
        weight = weight.reshape(-1, inputs, *weight.shape[3:])
        y = F.conv2d(x.reshape(1, n * inputs, height, width), weight, padding=self.padding, groups=n)
        return y.reshape(n, -1, height, width)


class Network(nn.Module):
    def __init__(self, width: int = 64, style: int = 32) -> None:
        super().__init__()
        self.first, self.second = (ModulatedConv2d(width, width, 3, style) for _ in range(2))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.leaky_relu(self.second(F.leaky_relu(self.first(x, w), 0.2), w), 0.2)


def penalties(network: nn.Module, x: Tensor, w: Tensor, noise: Tensor) -> list[Tensor]:
    """R1 in x and path length in w, each followed by its gradients in x, w and the styles' layers."""
    y = network(x, w)
    (by_x,) = torch.autograd.grad(y.square().mean(), x, create_graph=True)
    (by_w,) = torch.autograd.grad((y * noise).sum() / math.sqrt(y[0, 0].numel()), w, create_graph=True)
    r1, length = by_x.square().sum([1, 2, 3]).mean(), (by_w.square().sum(1).sqrt() - 1).square().mean()
    into = [x, w, *(p for m in network.modules() if isinstance(m, nn.Linear) for p in m.parameters())]
    return [t for loss in (r1, length) for t in (loss, *torch.autograd.grad(loss, into, retain_graph=True))]


def main() -> None:
    torch.manual_seed(0)
    network, noise = Network(), torch.randn(4, 64, 16, 16)
    x, w = torch.randn(4, 64, 16, 16, requires_grad=True), torch.randn(4, 32, requires_grad=True)
    weights = sum(layer.weight.numel() for layer in (network.first, network.second))
    others = sum(p.numel() for p in network.parameters()) - weights
    ddst.sparsify(network, 0.2, exclude=[nn.Linear], sample=(x.detach(), w.detach()))
    left = (sum(p.numel() for p in network.parameters()) - others) / weights
    if left > 0.21:
        raise SystemExit(f"the modulated weights are not packed: {left:.0%} of them are left")

    dense = ddst.densify(copy.deepcopy(network))
    pairs = zip(penalties(network, x, w, noise), penalties(dense, x, w, noise), strict=True)
    worst = max(float(((ours - theirs).abs().max() / theirs.abs().max()).detach()) for ours, theirs in pairs)
    if not worst < 1e-5:
        raise SystemExit(f"R1, path length or their gradients differ by {worst:.1e} of the largest")
    print(f"{left:.0%} of the weights left; R1, path length and their gradients equal the dense form to {worst:.0e}")


if __name__ == "__main__":
    main()
