"""torch.compile(fullgraph=True) of models with sparse layers equals eager, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import ddst
from ddst.ops.autograd import formulas
from helpers.tolerances import assert_close


class SmallNet(nn.Module):
    """Two convolutions of different geometry and a linear layer, all sparse, with dense parts between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ddst.SparseConv2d(3, 20, 3, padding="same", density=0.5, block=(8, 3))
        self.norm = nn.BatchNorm2d(20)
        self.conv2 = ddst.SparseConv2d(20, 16, (3, 2), stride=2, padding=1, bias=False, density=0.4, block=(8, 8))
        self.head = ddst.SparseLinear(16, 5, density=0.7, block=(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x).relu())  # a bias right before the norm would have no gradient
        return self.head(self.conv2(x).relu().mean((2, 3)))


def _loss_and_grads(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    loss = model(x).square().sum()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]


def _model_and_input(batch: int = 3) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return SmallNet(), torch.randn(batch, 3, 9, 8)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def _compare(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for i, (c, e) in enumerate(zip(compiled, eager, strict=True)):
        assert c.dtype == e.dtype
        error = (c - e).norm() / e.norm()
        assert error < 1e-5, f"result {i}: {error}"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_whole_graph_equals_eager(training: bool, memory_format: torch.memory_format) -> None:
    model, x = _model_and_input()
    model.train(training)
    x = x.to(memory_format=memory_format)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    _compare(_loss_and_grads(compiled, x), _loss_and_grads(model, x))


def test_inductor_equals_eager() -> None:
    # Inductor calls a C++ compiler for what lies between the layers, so the model is as small as can be.
    torch.manual_seed(0)
    conv = ddst.SparseConv2d(3, 10, 3, padding=1, density=0.5, block=(8, 3))
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), ddst.SparseLinear(90, 5, density=0.5, block=(4, 8)))
    x = torch.randn(2, 3, 3, 3)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    _compare(_loss_and_grads(compiled, x), _loss_and_grads(model, x))


def test_new_batch_and_image_sizes_do_not_recompile_for_ever() -> None:
    model, _ = _model_and_input()
    model.eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for batch, height, width in ((2, 9, 8), (5, 12, 10), (7, 10, 14)):
        x = torch.randn(batch, 3, height, width)
        assert_close(compiled(x), model(x).double(), "dynamic shapes")
    assert counter.frame_count <= 2


def test_compiled_model_follows_a_change_of_mask_and_of_values() -> None:
    model, x = _model_and_input()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    model.conv2.set_block_mask(~model.conv2.block_mask)
    with torch.no_grad():
        model.conv2.values.normal_()
    after = compiled(x)
    assert not torch.allclose(before, after)
    assert_close(after, model(x).double(), "after a change of mask")


def test_half_types_and_autocast_compile() -> None:
    model, x = _model_and_input()
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = compiled(x), model(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert_close(got, want.double(), "autocast")


def test_reference_backend_compiles() -> None:
    model, x = _model_and_input()
    for layer in (model.conv1, model.conv2, model.head):
        layer.backend = "reference"
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    _compare(_loss_and_grads(compiled, x), _loss_and_grads(model, x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_fakes_of_symbolic_sizes_have_the_memory_format_of_the_operator(channels_last: bool) -> None:
    # torch prefers a registered decomposition to a fake kernel there.
    layer = ddst.SparseConv2d(16, 16, 3, padding=1, density=0.5)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    x = mode.from_tensor(torch.randn(3, 16, 7, 9))
    assert isinstance(x.shape[0], torch.SymInt)
    weight = (layer.values.detach(), layer.topology, [16, 16, 3, 3])
    geometry = ([1, 1], [1, 1], [1, 1])
    values, topology, shape = weight
    with mode:
        outputs = [
            torch.ops.ddst.conv2d(x, values, None, topology, shape, *geometry, channels_last),
            torch.ops.ddst.conv2d_input_grad(x, values, topology, shape, x.shape[2:], *geometry, channels_last),
            torch.ops.ddst.norm_act_conv2d(
                x, values, None, None, *[None] * 4, topology, shape, *geometry, 0.0, 0.0, 1, 1, 1, False, False,
                channels_last,
            )[0],
        ]  # fmt: skip
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert all(y.is_contiguous(memory_format=expected) for y in outputs)


def test_no_operator_has_a_registered_decomposition() -> None:
    # Inductor refuses to call such an operator as it is where the environment has CI.
    operators = [getattr(torch.ops.ddst, name).default for name in formulas]
    assert len(operators) == 6 and not torch._decomp.get_decompositions(operators)
