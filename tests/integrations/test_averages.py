"""Averages that other packages keep: of a static sparse model, and of one whose blocks move."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import ddst


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    ddst.sparsify(net, 0.5)
    return net


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (net(torch.randn(8, 64)) - 1).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("followed", [True, False])
def test_ema_pytorch_follows_or_says_that_it_does_not(followed: bool) -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    training = ddst.SparseTraining(net, optimizer, method="set", total_steps=100, interval=5)
    ours = ddst.EMA(net, 0.9)
    theirs = ema_pytorch.EMA(net, beta=0.9, update_every=1, update_after_step=-1, inv_gamma=1e-9, power=1.0)
    theirs.update()  # the first one copies
    if followed:
        ddst.follow(theirs, net)
    for _ in range(12):
        step(net, optimizer)
        training.step()
        ours.update()
        theirs.update()
    x = torch.randn(4, 64)
    if followed:
        assert torch.equal(theirs.ema_model[0].block_mask, net[0].block_mask)
        torch.testing.assert_close(theirs(x), ours.module(x), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(RuntimeError, match=r"ddst\.follow"):
            theirs(x)


def test_lightning_puts_the_average_into_a_static_sparse_model(tmp_path) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return (self.net(batch) - batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    model, data = Model(), torch.utils.data.DataLoader(torch.randn(48, 64), batch_size=8)
    before = model.net[0].dense_weight().detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[EMAWeightAveraging(decay=0.5)], default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data)
    x = torch.randn(4, 64)
    expected = torch.nn.functional.linear(x, model.net[0].dense_weight(), model.net[0].bias)
    torch.testing.assert_close(model.net[0](x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.net[0].dense_weight(), before)
