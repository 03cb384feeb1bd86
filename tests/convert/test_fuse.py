"""ddst.fuse on SNGAN: every half block is fused, and the model computes what it did."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ddst
from ddst.models import Discriminator, Generator
from ddst.nn.deferred.plan import Put
from helpers.fusing import assert_equal, fused_twin, kept_bytes, sparse, step

BACKENDS = ("auto", "reference")


def generator(backend: str = "auto", resolution: int = 16) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return sparse(Generator(resolution, 16, 3, 8), backend), (torch.randn(3, 8, dtype=torch.float64),)


def discriminator(backend: str = "auto") -> tuple[nn.Module, tuple[Tensor, ...]]:
    return sparse(Discriminator(16, 16), backend), (torch.randn(3, 3, 16, 16, dtype=torch.float64),)


def rows(report: Any) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    return {conv.name: (conv.before, conv.after) for conv in report.convs}


def test_every_half_block_of_the_generator() -> None:
    model, _ = generator()
    up, plain = ("BatchNorm2d", "relu", "2x"), ("BatchNorm2d", "relu")
    found = rows(ddst.fuse(model))
    assert {name: row for name, row in found.items() if "conv" in name} == {
        "blocks.0.conv1": (up, ("moments",)),
        "blocks.0.conv2": (plain, ("sum of 2x", "moments")),
        "blocks.1.conv1": (up, ("moments",)),
        "blocks.1.conv2": (plain, ("sum of 2x", "moments")),
    }
    assert found["to_image"] == (plain, ())  # dense, and reads what is put off all the same


def test_every_half_block_of_the_discriminator() -> None:
    model, _ = discriminator()
    report = ddst.fuse(model)
    relu = ("relu",)
    assert {name: row for name, row in rows(report).items() if "conv" in name and name != "blocks.0.conv1"} == {
        "blocks.0.conv2": (relu, ("pool", "sum")),
        "blocks.1.conv1": (relu, ()),
        "blocks.1.conv2": (relu, ("pool", "sum")),
        "blocks.2.conv1": (relu, ()),
        "blocks.2.conv2": (relu, ("sum",)),
        "blocks.3.conv1": (relu, ()),
        "blocks.3.conv2": (relu, ("sum",)),
    }
    assert report.to_dict()["fused"] == report.fused >= 7
    assert next(c.reason for c in report.convs if c.name == "blocks.0.conv1") == "it is dense"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [generator, discriminator])
@pytest.mark.parametrize("training", [True, False])
def test_equal_to_the_parts(make: Any, backend: str, training: bool) -> None:
    model, inputs = make(backend)
    model.train(training)
    twin, _ = fused_twin(model)
    assert list(twin.state_dict()) == list(model.state_dict())
    for second in (False, True):
        assert_equal(step(twin, inputs, second), step(model, inputs, second))


def test_backward_keeps_one_tensor_for_a_half_block() -> None:
    """At 8x8 and 16x16 a block keeps, in pixels of the smaller map, of its C channels:

    by its parts: norm input 1, ReLU output 1 (which upsampling needs nothing of), upsampled 4, conv1's output 4, ReLU
    output 4 (a ReLU in place overwrites what batch norm returned, and keeps it): 14. Fused: 1 + 4. The shortcut keeps
    its input, which is the norm's.
    """
    model, inputs = generator()
    twin, _ = fused_twin(model)
    keep = kept_bytes(lambda: model.blocks(model.linear(*inputs).unflatten(1, (-1, 4, 4))), list(model.parameters()))
    kept = kept_bytes(lambda: twin.blocks(twin.linear(*inputs).unflatten(1, (-1, 4, 4))), list(twin.parameters()))
    maps = 3 * 16 * 8  # bytes of one pixel of all images
    by_parts = sum((1 + 1 + 4 + 4 + 4) * maps * side**2 for side in (4, 8))
    fused = sum((1 + 4) * maps * side**2 for side in (4, 8))
    small = 20000  # statistics, norms' vectors, indices, the noise
    assert by_parts <= keep <= by_parts + small
    assert fused <= kept <= fused + small
    assert kept < 0.6 * keep


def test_undone_and_done_again() -> None:
    model, inputs = generator()
    before = step(copy.deepcopy(model), inputs)
    first = str(ddst.fuse(model))
    assert str(ddst.fuse(model)) == first
    ddst.unfuse(model)
    for module in model.modules():
        assert not any(
            isinstance(h, Put) for h in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
        assert not module._forward_pre_hooks_with_kwargs
        assert getattr(module, "plan", None) is None
    assert_equal(step(model, inputs), before, 0)


def test_copies_pickles_and_state_dicts() -> None:
    model, inputs = generator()
    twin, _ = fused_twin(model)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), torch.load(file, weights_only=False)):
        assert other.blocks[0].conv1.plan.norms[0] is other.blocks[0].bn2
        assert_equal(step(other, inputs), step(copy.deepcopy(model), inputs))
    twin.load_state_dict(model.state_dict())
    dense = copy.deepcopy(twin)
    ddst.densify(dense)
    assert_equal([dense(*inputs)], [model(*inputs)])


def test_hooks_see_tensors() -> None:
    """Those that were there before keep their modules from being fused, later ones while they are there."""
    model, inputs = generator()
    wanted = step(copy.deepcopy(model), inputs)
    seen: list[Any] = []

    def parts(report: Any) -> int:
        return sum(len(row.before) + len(row.after) for row in report.convs)

    everything = parts(fused_twin(model)[1])

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.extend([*args, output])

    for name in ("blocks.0.bn1", "blocks.0.conv1", "blocks.1.conv2", "blocks.0"):
        twin = copy.deepcopy(model)
        handle = twin.get_submodule(name).register_forward_hook(hook)
        report = ddst.fuse(twin)
        assert_equal(step(twin, inputs), wanted)
        handle.remove()
        assert parts(report) < everything
        twin, report = fused_twin(model)
        handle = twin.get_submodule(name).register_forward_hook(hook)
        if name.endswith("conv1"):  # torch lets nothing change in place what such a module returns
            twin.get_submodule(name).register_full_backward_hook(lambda m, i, o: None)
        assert_equal(step(twin, inputs), wanted)
    everywhere = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_equal(step(fused_twin(model)[0], inputs), wanted)
    finally:
        everywhere.remove()
    assert len(seen) > 20 and all(isinstance(value, Tensor) for value in seen)


def test_no_gradients_inference_and_autocast() -> None:
    model, inputs = generator()
    twin, _ = fused_twin(model)
    with torch.no_grad():
        y, want = twin(*inputs), model(*inputs)
        assert not y.requires_grad
        assert_equal([y], [want])
    with torch.inference_mode():
        assert_equal([twin(*inputs)], [model(*inputs)])
    for net, given in (generator(), discriminator()):
        net, given = net.float(), [x.float() for x in given]
        twin, _ = fused_twin(net)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, want = twin(*given), net(*given)
        assert y.dtype == want.dtype
        exact = net(*given)
        errors = [float((result.float() - exact).square().mean()) for result in (y, want)]
        assert errors[0] <= 2 * errors[1] + 1e-5
        y.float().sum().backward()


@pytest.mark.parametrize("make", [generator, discriminator])
def test_compiles_whole(make: Any) -> None:
    model, inputs = make()
    twin, _ = fused_twin(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        y, want = compiled(*inputs), model(*inputs)
        grads = torch.autograd.grad(y.square().sum(), list(twin.parameters()), allow_unused=True)
        wanted = torch.autograd.grad(want.square().sum(), list(model.parameters()), allow_unused=True)
        pairs = [(g, w) for g, w in zip(grads, wanted, strict=True) if w is not None]
        assert_equal([y, *(g for g, _ in pairs)], [want, *(w for _, w in pairs)])
    assert_equal(list(twin.buffers()), list(model.buffers()))


class Checkpointed(nn.Module):
    def __init__(self, blocks: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.blocks, self.reentrant = blocks, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    """What is inside of one is fused, nothing across."""
    blocks, _ = generator()
    model = Checkpointed(blocks.blocks, reentrant)
    twin, report = fused_twin(model)
    assert sum(row.before == ("BatchNorm2d", "relu", "2x") for row in report.convs) == 2
    assert not any("moments" in row.after for row in report.convs if row.name == "blocks.0.conv2")
    results = []
    for net in (model, twin):
        x = torch.randn(2, 16, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        net(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()])
    assert_equal(*results)


def test_growth_scores_and_training() -> None:
    model, inputs = discriminator()
    twin, _ = fused_twin(model)
    for net in (model, twin):
        for layer in ddst.nn.sparse_layers(net).values():
            layer.request_scores()
        net(*inputs).square().sum().backward()
    for a, b in zip(ddst.nn.sparse_layers(model).values(), ddst.nn.sparse_layers(twin).values(), strict=True):
        torch.testing.assert_close(a.take_scores(), b.take_scores())


def test_a_model_in_others() -> None:
    model, inputs = generator()
    whole = nn.Sequential(model)
    report = ddst.fuse(whole)
    assert report.fused >= 4 and not report.untraced
    assert report.convs[0].name == "0.blocks.0.conv1"
    with pytest.raises(TypeError, match="model must be"):
        ddst.fuse(3)  # type: ignore[arg-type]
    assert F.relu(whole(*inputs)).shape == (3, 3, 16, 16)


def test_distributed_data_parallel() -> None:
    model, inputs = generator()
    twin, _ = fused_twin(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        results = []
        for net in (nn.parallel.DistributedDataParallel(twin), model):
            net(*inputs).square().sum().backward()
            results.append([*(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()])
        assert_equal(*results)
        assert ddst.fuse(nn.parallel.DistributedDataParallel(model)).fused >= 4
    finally:
        dist.destroy_process_group()


class Half(nn.Module):
    """Norm, activation, convolution; what ``forward`` does with the activated map is a subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class Branching(Half):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(x))
        return self.conv(h) if self.training else h


class Keeping(Half):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = F.relu(self.bn(x))
        return self.conv(self.kept)


class Checkpointing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Half(), Half()
        self.saves = False

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.first, x, use_reentrant=True) if self.saves else self.first(x)
        return self.second(h)


def fused_pair(make: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = make().double()
    ddst.sparsify(plain, 0.5, block=8, distribution="uniform")
    fused = copy.deepcopy(plain)
    assert ddst.fuse(fused).fused
    return plain, fused


def test_a_reentrant_checkpoint_that_begins_later_keeps_its_gradients() -> None:
    plain, fused = fused_pair(Checkpointing)
    gradients = []
    for net in (plain, fused):
        net.saves = True
        x = torch.ones(2, 16, 4, 4, dtype=torch.float64).cumsum(0).requires_grad_()
        net(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in net.parameters())])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_leaves_a_fused_model_is_a_tensor_whichever_way_it_took() -> None:
    plain, fused = fused_pair(Branching)
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64)
    y = fused.eval()(x)
    assert type(y) is Tensor
    torch.testing.assert_close(y, plain.eval()(x))
    ddst.unfuse(fused)
    assert not fused._forward_hooks


def test_a_kept_value_whose_parameters_have_changed_is_refused() -> None:
    _, fused = fused_pair(Keeping)
    fused(torch.randn(2, 16, 4, 4, dtype=torch.float64)).sum().backward()
    with torch.no_grad():
        fused.bn.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        fused.kept + 1
