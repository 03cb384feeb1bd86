"""A sparse GAN on 8x8 digits with Hugging Face Accelerate; the lines marked "sparse" make it so.

python examples/accelerate_gan.py --steps 300        (needs accelerate and scikit-learn)
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

import ddst  # sparse


def networks() -> tuple[nn.Module, nn.Module]:
    generator = nn.Sequential(
        *(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
        *(nn.Linear(256, 64), nn.Tanh()),
    )
    discriminator = nn.Sequential(
        *(spectral_norm(nn.Linear(64, 256)), nn.LeakyReLU(0.1)),
        *(spectral_norm(nn.Linear(256, 256)), nn.LeakyReLU(0.1)),
        spectral_norm(nn.Linear(256, 1)),
    )
    return generator, discriminator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="generator iterations")
    parser.add_argument("--density", type=float, default=0.3, help="share of active weights at the start")
    args = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator()
    digits = torch.utils.data.TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1)
    loader = torch.utils.data.DataLoader(digits, batch_size=32, shuffle=True, drop_last=True)

    G, D = networks()
    ddst.sparsify(G, args.density)  # sparse: before the optimizers are made
    ddst.sparsify(D, args.density, reserve=1.0)  # sparse: D's density may rise to 1 without new tensors
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 5e-4, betas=(0.0, 0.9)) for net in (G, D))
    G, D, opt_g, opt_d, loader = accelerator.prepare(G, D, opt_g, opt_d, loader)
    every = max(2, args.steps // 10)
    scheduler = ddst.DDST(  # sparse: takes Accelerate's optimizers, and follows torch's in them
        G, D, opt_g, opt_d, total_steps=args.steps, interval_g=every, interval_d=every, br_every=1, br_window=every
    )

    step = 0
    while step < args.steps:
        for (real,) in loader:
            noise = torch.randn(len(real), 64, device=accelerator.device)
            opt_d.zero_grad()
            accelerator.backward(relu(1 - D(real)).mean() + relu(1 + D(G(noise).detach())).mean())
            opt_d.step()
            opt_g.zero_grad()
            fake_scores = D(G(noise))
            accelerator.backward(-fake_scores.mean())
            opt_g.step()
            report = scheduler.step(real=real, noise=noise, fake_scores=fake_scores)  # sparse
            if report.decision is not None:
                densities = f"d_G {report.density_g:.3f} d_D {report.density_d:.3f}"
                accelerator.print(f"step {report.step}: {report.decision.action}; {densities}")
            step += 1
            if step == args.steps:
                break


if __name__ == "__main__":
    main()
