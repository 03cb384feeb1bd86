"""What must hold on every rank: the same masks on all, and those of one process on the joined batch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import ddst
from ddst.nn import sparse_layers

BATCH = 24
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def alone() -> Any:
    """A group of this rank only: with it, a model trains here as if there were no other process."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


def mine() -> slice:
    part = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * part, (dist.get_rank() + 1) * part)


def network(density: float = 0.4, group: Any = None, **more: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    ddst.sparsify(net, density, block=8, process_group=group, **more)
    return net


def data(step: int, width: int = 40) -> Tensor:
    return torch.randn(BATCH, width, generator=torch.Generator().manual_seed(step))


def assert_ranks_equal(*models: nn.Module) -> None:
    for model in models:
        for name, tensor in model.state_dict().items():
            parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, tensor.contiguous())
            assert all(torch.equal(part, parts[0]) for part in parts), name


def assert_like_one(model: nn.Module, reference: nn.Module, atol: float = 2e-5) -> None:
    """The masks of one process on the joined batch, and its weights to rounding."""
    for layer, other in zip(sparse_layers(model).values(), sparse_layers(reference).values(), strict=True):
        assert torch.equal(layer.block_mask, other.block_mask)
        assert torch.equal(layer.slot_blocks, other.slot_blocks)
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=atol)


def gradients_are_means(ddp: nn.Module, model: nn.Module) -> None:
    """Whether gradients after a backward pass are the same on all ranks, which see other data."""
    for step in range(3):
        model.zero_grad()
        ddp(data(step)[mine()]).square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parts = [torch.empty_like(parameter.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, parameter.grad.contiguous())
            assert parameter.grad.abs().max() > 0
            assert all(torch.equal(part, parts[0]) for part in parts)


def train(
    model: nn.Module,
    forward: nn.Module,
    part: slice,
    *,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    pieces: int = 1,
    steps: int = 10,
    clip: float | None = None,
    **settings: Any,
) -> nn.Module:
    """Adam with exchanges at 3, 6 and 9."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    training = ddst.SparseTraining(model, optimizer, total_steps=30, interval=3, **settings)
    loss = loss or (lambda net, x: net(x).sub(x[:, :8]).square().mean())
    for step in range(steps):
        optimizer.zero_grad()
        parts = data(step)[part].chunk(pieces)
        for number, x in enumerate(parts):
            wrapped = isinstance(forward, DistributedDataParallel) and number < pieces - 1
            with forward.no_sync() if wrapped else contextlib.nullcontext():
                (loss(forward, x) / pieces).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        training.step()
    return model


def compare_with_one(
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel, start: nn.Module | None = None, **settings: Any
) -> None:
    group = alone()
    reference = train(one := network(group=group), one, slice(None), process_group=group, **settings)
    model = network()
    before = [layer.block_mask for layer in sparse_layers(model).values()]
    train(model, wrap(model), mine(), **settings)
    assert any(
        not torch.equal(b, layer.block_mask) for b, layer in zip(before, sparse_layers(model).values(), strict=True)
    )
    assert all(layer.storage_version == 0 for layer in sparse_layers(model).values())
    assert_ranks_equal(model)
    assert_like_one(model, reference)


@check
def rigl() -> None:
    compare_with_one()


@check
def random_growth_whatever_the_ranks_generators() -> None:
    group, seed = alone(), torch.Generator().manual_seed
    one = network(group=group)
    train(one, one, slice(None), process_group=group, method="set", generator=seed(0))
    model = network()
    train(model, DistributedDataParallel(model), mine(), method="set", generator=seed(dist.get_rank()))
    assert_ranks_equal(model)
    assert_like_one(model, one)


@check
def reference_backend_and_a_loop_that_reduces_by_itself() -> None:
    class Averaged(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            ddst.distributed.average_gradients(p for group in self.param_groups for p in group["params"])
            return super().step(closure)

    group = alone()
    one, model = network(group=group), network(backend="reference")
    results = []
    for net, part, kind, own in ((one, slice(None), torch.optim.Adam, group), (model, mine(), Averaged, None)):
        optimizer = kind(net.parameters(), 1e-2)
        training = ddst.SparseTraining(net, optimizer, total_steps=30, interval=3, process_group=own)
        for step in range(10):
            optimizer.zero_grad()
            net(data(step)[part]).square().mean().backward()
            optimizer.step()
            results.append(training.step())
    assert_ranks_equal(model)
    assert_like_one(model, one)


@check
def accumulation_with_no_sync() -> None:
    compare_with_one(pieces=2)


@check
def bucket_views() -> None:
    compare_with_one(lambda net: DistributedDataParallel(net, gradient_as_bucket_view=True))


@check
def static_graph() -> None:
    compare_with_one(lambda net: DistributedDataParallel(net, static_graph=True))


@check
def two_forwards_and_a_gradient_penalty() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        other = (x * 0.5).requires_grad_()
        score = net(other)
        (slope,) = torch.autograd.grad(score.sum(), other, create_graph=True)
        return net(x).square().mean() - score.mean() + slope.square().sum(1).mean()

    compare_with_one(loss=loss)


@check
def compiled_inside() -> None:
    torch._dynamo.reset()
    compare_with_one(lambda net: DistributedDataParallel(torch.compile(net, backend="aot_eager")))


@check
def a_layer_that_a_gradient_reaches_on_one_rank_only() -> None:
    """Counts as zero on the others, as in the mean that DistributedDataParallel makes."""
    group = alone()

    class Branches(nn.Module):
        def __init__(self, own: Any) -> None:
            super().__init__()
            self.net, self.group = network(group=own), own

        def forward(self, x: Tensor) -> Tensor:
            # The first share of the batch goes through the middle layer, the others pass it by.
            shares = x.split(BATCH // dist.get_world_size())
            through = [(self.group is not None and i == 0) or (self.group is None and dist.get_rank() == 0)
                       for i in range(len(shares))]  # fmt: skip
            rest = [self.net[0](share) for share in shares]
            middle = [self.net[2](r.tanh()) if t else r for r, t in zip(rest, through, strict=True)]
            return torch.cat([self.net[4](m.tanh()) for m in middle])

    one, model = Branches(group), Branches(None)
    # Clipped, so that what was recorded is not what the step sees.
    train(one, one, slice(None), process_group=group, clip=1e-2)
    train(model, DistributedDataParallel(model, find_unused_parameters=True), mine(), clip=1e-2)
    assert_ranks_equal(model)
    assert_like_one(model, one)


def gan(group: Any, part: slice, wrap: Callable[[nn.Module], nn.Module], reserve: float | None) -> Any:
    torch.manual_seed(1)
    g = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 40))
    d = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    nn.utils.parametrizations.spectral_norm(d[2])
    ddst.sparsify(g, 0.4, block=8, process_group=group)
    ddst.sparsify(d, 0.3, block=8, process_group=group, reserve=reserve)
    g_ddp, d_ddp = (DistributedDataParallel(g), wrap(d)) if group is None else (g, d)
    # A large eps: otherwise Adam makes whole steps of what is rounding (units that are off for the whole batch).
    opt_g, opt_d = (torch.optim.Adam(net.parameters(), 1e-3, betas=(0.0, 0.9), eps=1e-3) for net in (g, d))
    scheduler = ddst.DDST(
        g, d, opt_g, opt_d, total_steps=60, interval_g=4, interval_d=5, bounds=(-2e9, -1e9), br_every=1, br_window=3,
        warmup=0, process_group=group, exempt_d=(),
    )  # fmt: skip
    reports = []
    for step in range(18):
        real, noise = data(step)[part], data(1000 + step, 16)[part]
        opt_d.zero_grad()
        scores = d_ddp(torch.cat([real, g(noise).detach()]))
        (1 - scores[: len(real)]).relu().mean().add((1 + scores[len(real) :]).relu().mean()).backward()
        opt_d.step()
        opt_g.zero_grad()
        d.requires_grad_(False)
        fake_scores = d(g_ddp(noise))
        (-fake_scores.mean()).backward()
        d.requires_grad_(True)
        opt_g.step()
        reports.append(scheduler.step(real=real, noise=noise, fake_scores=fake_scores))
    return g, d, d_ddp, reports


def check_gan(wrap: Callable[[nn.Module], nn.Module], reserve: float | None) -> nn.Module:
    group = alone()
    one = gan(group, slice(None), lambda net: net, reserve)
    g, d, d_ddp, reports = gan(None, mine(), wrap, reserve)
    assert_ranks_equal(g, d)
    assert_like_one(g, one[0])
    assert_like_one(d, one[1])
    actions = [r.decision.action for r in reports if r.decision is not None]
    assert actions == [r.decision.action for r in one[3] if r.decision is not None] == ["grow"] * 3
    assert [(r.density_g, r.density_d) for r in reports] == [(r.density_g, r.density_d) for r in one[3]]
    for mine_, other in zip(reports, one[3], strict=True):
        assert mine_.sample.beta == pytest.approx(other.sample.beta, abs=1e-5)
    grown = sum(layer.storage_version for layer in sparse_layers(d).values())
    assert grown == 0 if reserve else grown > 0
    return d_ddp


@check
def ddst_whose_density_rises() -> None:
    seen = []

    def counting(state, bucket):  # torch reads annotations of hooks, not strings
        seen.append(bucket.buffer().numel())
        return default_hooks.allreduce_hook(state, bucket)

    def wrap(net: nn.Module) -> nn.Module:
        ddp = ddst.watch(DistributedDataParallel(net))
        ddp.register_comm_hook(None, counting)
        ddp.training = False  # of the wrapper alone
        return ddp

    ddp = check_gan(wrap, None)
    assert len(set(seen)) > 1  # the hook is there after the storage has grown, and sees the larger gradient
    assert not ddp.training  # modes are kept
    with pytest.raises(ValueError, match=r"DistributedDataParallel .* ddst\.watch\(ddp\)"):
        check_gan(DistributedDataParallel, None)


@check
def ddst_whose_density_rises_into_a_reserve() -> None:
    check_gan(DistributedDataParallel, 1.0)


@check
def seeds_per_rank() -> None:
    torch.manual_seed(dist.get_rank())
    drawn = nn.Sequential(nn.Linear(100, 64), nn.ReLU(), nn.Linear(64, 40))
    ddst.sparsify(drawn, 0.5)
    slots = [layer.slot_blocks for layer in sparse_layers(drawn).values()]
    assert ddst.distributed.average(torch.cat(slots).double()).equal(torch.cat(slots).double())
    DistributedDataParallel(drawn)
    assert_ranks_equal(drawn)


@check
def synchronize_what_was_drawn_alone() -> None:
    group = alone()
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(100, 64)), nn.BatchNorm1d(64), nn.Linear(64, 40))
    ddst.sparsify(model, 0.3 + 0.1 * dist.get_rank(), process_group=group)
    assert ddst.distributed.average(torch.tensor(float(model[0].slots))) != model[0].slots
    ddst.synchronize(model)
    assert_ranks_equal(model)
    other = nn.Sequential(nn.Linear(32 + 32 * dist.get_rank(), 32))
    ddst.sparsify(other, 0.5, process_group=group)
    before = other[0].dense_weight()
    with pytest.raises(RuntimeError, match=r"the model's parts on rank 1.* and on rank 0 are not the same"):
        ddst.synchronize(other)
    assert torch.equal(other[0].dense_weight(), before)


@check
def loading_another_number_of_blocks() -> None:
    checkpoint, model = network(0.6).state_dict(), network(0.4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ddp: nn.Module = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"ddst\.watch\(ddp\)"):
        model.load_state_dict({k: v for k, v in checkpoint.items() if not k.endswith("bias")}, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ddst.watch(ddp)
    kept = ddp(data(0)[mine()]).sum()  # a graph that lives on
    model.load_state_dict(checkpoint)
    gradients_are_means(ddp, model)
    assert all(layer.storage_version == 1 for layer in sparse_layers(model).values())
    del kept


@check
def masks_by_hand_and_densify_under_a_wrapper() -> None:
    model = network(0.4)
    ddp: nn.Module = DistributedDataParallel(model)
    layer = model[0]
    full = torch.ones_like(layer.block_mask)
    for change in (lambda: layer.set_block_mask(full), lambda: ddst.densify(model), lambda: ddst.densify(ddp)):
        with pytest.raises(RuntimeError, match=r"ddst\.watch\(ddp\)"):
            change()
    assert not layer.block_mask.all()
    gradients_are_means(ddp, model)
    ddst.watch(ddst.watch(ddp))
    layer.set_block_mask(full)
    gradients_are_means(ddp, model)
    ddst.densify(ddp)
    gradients_are_means(ddp, model)
    ddst.sparsify(model, 0.5, block=8)
    gradients_are_means(ddp, model)


@check
def ranks_that_hold_other_blocks_stop() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    training = ddst.SparseTraining(model, optimizer, method="set", total_steps=9, interval=2)
    if dist.get_rank() == 1:
        mask = model[2].block_mask
        model[2].set_block_mask(mask.flip(0))
    masks = [layer.block_mask for layer in sparse_layers(model).values()]
    training.step()
    model(data(0)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"blocks of sparse layers on rank 1 .*\(in 2\).*ddst\.synchronize\(model\)"):
        training.step()
    assert all(torch.equal(m, s.block_mask) for m, s in zip(masks, sparse_layers(model).values(), strict=True))
    with pytest.raises(RuntimeError, match=r"blocks of sparse layers on rank 1 .*ddst\.synchronize\(model\)"):
        ddst.SparseTraining(model, optimizer, total_steps=9)


@check
def distributed_checkpoints_keep_blocks_and_values_together() -> None:
    model = network()
    wrapped = DistributedDataParallel(model)
    train(model, wrapped, mine(), method="set")
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(folder)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder[0])
    other = network()
    for layer in sparse_layers(other).values():
        layer.set_block_mask(layer.block_mask.flip(0))
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder[0])
    other.load_state_dict(state["model"])
    assert_ranks_equal(other)
    for one, two in zip(sparse_layers(model).values(), sparse_layers(other).values(), strict=True):
        assert torch.equal(one.dense_weight(), two.dense_weight())
    assert torch.equal(model(data(0)), other(data(0)))


@check
def powersgd_is_refused() -> None:
    model = network()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook)
    with pytest.raises(ValueError, match="PowerSGD"):
        ddst.SparseTraining(model, torch.optim.SGD(model.parameters(), 0.1), total_steps=9)


@check
def averages_ignore_no_strides() -> None:
    count, rank = dist.get_world_size(), dist.get_rank()
    base = torch.arange(24.0).view(2, 3, 2, 2) + 24 * rank
    expected = torch.arange(24.0).view(2, 3, 2, 2) + 12 * (count - 1)
    for laid in (base, base.to(memory_format=torch.channels_last) if rank else base, base.half()):
        assert torch.equal(ddst.distributed.average(laid).float(), expected)
    assert torch.equal(ddst.distributed.average(base[0].transpose(0, 2)), expected[0].transpose(0, 2))
    one = torch.tensor(float(rank)).expand(5)
    assert torch.equal(ddst.distributed.average(one), torch.full((5,), (count - 1) / 2))


@check
def bytes_follow_density() -> None:
    def bytes_of(net: nn.Module) -> int:
        total = 0

        def counting(state, bucket):  # torch reads annotations of hooks, not strings
            nonlocal total
            total += bucket.buffer().nbytes
            return default_hooks.allreduce_hook(state, bucket)

        ddp = DistributedDataParallel(net)
        ddp.register_comm_hook(None, counting)
        ddp(torch.randn(1, 128, 4, 4)).sum().backward()
        return total + sum(buffer.nbytes for buffer in net.buffers())  # which travel at each forward

    net = nn.Sequential(*(nn.Conv2d(128, 128, 3, padding=1) for _ in range(3)))
    dense = bytes_of(net)
    ddst.sparsify(net, 0.1)
    assert bytes_of(net) / dense <= 0.12


@check
def fully_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    group = alone()
    one, model = network(group=group), network()
    whole = {name: value.clone() for name, value in ddst.dense_state_dict(model).items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*sparse_layers(model).values(), model):
        fully_shard(module, mesh=mesh)
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in ddst.dense_state_dict(model).items()}
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in whole)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for method in ("rigl", "set"):
        with pytest.raises(ValueError, match="fully_shard"):
            ddst.SparseTraining(model, optimizer, method=method, total_steps=9)
    for call in (lambda: ddst.sparsify(model, 0.2), lambda: ddst.densify(model), lambda: ddst.synchronize(model)):
        with pytest.raises(ValueError, match=r"before fully_shard|then fully_shard"):
            call()
    with pytest.raises(RuntimeError, match="fully_shard"):
        model[0].set_block_mask(~model[0].block_mask)
    train(one, one, slice(None), process_group=group, method="static", steps=4)
    train(model, model, mine(), method="static", steps=4)
    for layer, other in zip(sparse_layers(model).values(), sparse_layers(one).values(), strict=True):
        torch.testing.assert_close(layer.dense_weight(), other.dense_weight(), rtol=0, atol=2e-5)
