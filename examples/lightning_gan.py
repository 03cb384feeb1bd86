"""A sparse GAN on 8x8 digits in Lightning, by manual optimization; the lines marked "sparse" make it so.

python examples/lightning_gan.py --steps 300        (needs lightning and scikit-learn)
"""

import argparse

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.utils.parametrizations import spectral_norm

import ddst  # sparse


class SparseGAN(lightning.LightningModule):
    def __init__(self, steps: int, density: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.G = nn.Sequential(
            *(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
            *(nn.Linear(256, 64), nn.Tanh()),
        )
        self.D = nn.Sequential(
            *(spectral_norm(nn.Linear(64, 256)), nn.LeakyReLU(0.1)),
            *(spectral_norm(nn.Linear(256, 256)), nn.LeakyReLU(0.1)),
            spectral_norm(nn.Linear(256, 1)),
        )
        ddst.sparsify(self.G, density)  # sparse: before the optimizers are made
        ddst.sparsify(self.D, density, reserve=1.0)  # sparse: D's density may rise to 1 without new tensors
        self.steps = steps

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(net.parameters(), 5e-4, betas=(0.0, 0.9)) for net in (self.G, self.D)]

    def on_fit_start(self) -> None:
        every = max(2, self.steps // 10)
        # sparse: Lightning wraps the optimizers; the scheduler takes torch's own.
        self.scheduler = ddst.DDST(
            self.G, self.D, *self.trainer.optimizers, total_steps=self.steps,
            interval_g=every, interval_d=every, br_every=1, br_window=every,
        )  # fmt: skip

    def training_step(self, batch: list[Tensor], _: int) -> None:
        opt_g, opt_d = self.optimizers()
        (real,) = batch
        noise = torch.randn(len(real), 64, device=self.device)
        opt_d.zero_grad()
        self.manual_backward(relu(1 - self.D(real)).mean() + relu(1 + self.D(self.G(noise).detach())).mean())
        opt_d.step()
        opt_g.zero_grad()
        fake_scores = self.D(self.G(noise))
        self.manual_backward(-fake_scores.mean())
        opt_g.step()
        report = self.scheduler.step(real=real, noise=noise, fake_scores=fake_scores)  # sparse
        if report.decision is not None:
            print(
                f"step {report.step}: {report.decision.action}; d_G {report.density_g:.3f} d_D {report.density_d:.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="generator iterations")
    parser.add_argument("--density", type=float, default=0.3, help="share of active weights at the start")
    args = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    digits = torch.utils.data.TensorDataset(torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1)
    loader = torch.utils.data.DataLoader(digits, batch_size=32, shuffle=True, drop_last=True)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_steps=2 * args.steps, max_epochs=-1, devices=1, **quiet)  # steps of both optimizers
    trainer.fit(SparseGAN(args.steps, args.density), loader)


if __name__ == "__main__":
    main()
