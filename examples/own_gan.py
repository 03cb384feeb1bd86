"""A small GAN loop of one's own on 8x8 digits, made sparse by the lines marked "sparse".

python examples/own_gan.py --steps 500
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

import ddst  # sparse


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128 * 2 * 2),
        nn.Unflatten(1, (128, 2, 2)),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.Conv2d(128, 1, 3, padding=1), nn.Tanh()),
    )


def discriminator() -> nn.Module:
    return nn.Sequential(
        *(spectral_norm(nn.Conv2d(1, 128, 3, padding=1)), nn.LeakyReLU(0.1)),
        *(spectral_norm(nn.Conv2d(128, 128, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)),
        *(spectral_norm(nn.Conv2d(128, 128, 3, padding=1)), nn.LeakyReLU(0.1)),
        *(nn.Flatten(), spectral_norm(nn.Linear(128 * 4 * 4, 1))),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="generator iterations")
    parser.add_argument("--density", type=float, default=0.2, help="share of active weights at the start")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1

    G, D = generator(), discriminator()
    print(ddst.sparsify(G, args.density))  # sparse: before the optimizers are made
    print(ddst.sparsify(D, args.density))  # sparse
    opt_g = torch.optim.Adam(G.parameters(), lr=5e-4, betas=(0.0, 0.9))
    opt_d = torch.optim.Adam(D.parameters(), lr=5e-4, betas=(0.0, 0.9))
    every = max(2, args.steps // 10)
    scheduler = ddst.DDST(  # sparse: G's blocks move, D's density follows the balance ratio
        G, D, opt_g, opt_d, total_steps=args.steps, interval_g=every, interval_d=every, br_every=1, br_window=every
    )

    for _ in range(args.steps):
        real, noise = digits[torch.randint(len(digits), (32,))], torch.randn(32, 64)
        opt_d.zero_grad()
        (relu(1 - D(real)).mean() + relu(1 + D(G(noise).detach())).mean()).backward()
        opt_d.step()
        opt_g.zero_grad()
        fake_scores = D(G(noise))
        (-fake_scores.mean()).backward()
        opt_g.step()
        report = scheduler.step(real=real, noise=noise, fake_scores=fake_scores)  # sparse
        if report.decision is not None:
            print(f"step {report.step}: {report.decision.action}, {report.decision.reason}; d_D {report.density_d:.3f}")

    with torch.no_grad():
        image = G.eval()(torch.randn(1, 64))[0, 0]
    print("\n".join("".join(" .:-=+*#%@"[int((v + 1) * 4.99)] * 2 for v in row) for row in image.tolist()))


if __name__ == "__main__":
    main()
