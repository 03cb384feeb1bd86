"""Score requests while a layer moves, and that a record can be used later than it was taken."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddst
from ddst.nn import SparseLayer
from ddst.ops.gradient_record import ScoreRecorder, recorder_of
from helpers.dense import block_norms

BACKENDS = ["cpu", "reference"]


def make(backend: str = "cpu") -> tuple[SparseLayer, nn.Linear, Tensor]:
    layer = ddst.SparseLinear(19, 21, density=0.4, block=(8, 4)).double()
    layer.backend = backend
    return layer, layer.to_dense(), torch.randn(6, 19, dtype=torch.float64)


def want(twin: nn.Linear, layer: SparseLayer) -> Tensor:
    assert twin.weight.grad is not None
    return block_norms(twin.weight.grad, layer.block)


def move_to_other_memory(layer: Any) -> None:
    layer._apply(lambda t: t.clone())


MOVES = [lambda layer: layer.share_memory(), lambda layer: layer.float().double(), move_to_other_memory]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("move", MOVES, ids=["share_memory", "dtype", "memory"])
def test_a_request_survives_a_move(move: Any, backend: str) -> None:
    layer, _, x = make(backend)
    layer.request_scores()
    layer(x).pow(3).sum().backward()
    before = layer.values.data_ptr()
    move(layer)
    assert layer.values.data_ptr() != before or move is MOVES[1]
    twin: Any = layer.to_dense()
    layer(2 * x).pow(3).sum().backward()
    twin(x).pow(3).sum().backward()  # what came before the move counts, too
    twin(2 * x).pow(3).sum().backward()
    torch.testing.assert_close(layer.take_scores(), want(twin, layer), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_layer_and_every_copy_records_for_itself(device: str) -> None:
    layer, other = (ddst.SparseLinear(32, 32, device=device) for _ in range(2))
    layers = [layer, other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(other)]
    recorders = [each._recorder for each in layers]
    assert len({recorder.key for recorder in recorders}) == len(layers)
    layer.request_scores()
    assert [recorder_of(recorder.key) is recorder for recorder in recorders] == [True] + [False] * 4
    layer.cancel_scores()
    assert recorder_of(layer._recorder.key) is None


def test_a_layer_that_is_gone_leaves_no_recorder() -> None:
    layer = ddst.SparseLinear(32, 32)
    layer.request_scores()
    key = layer._recorder.key
    del layer
    gc.collect()
    assert recorder_of(key) is None
    assert ScoreRecorder().key > key  # keys are not given out again


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_record_is_scored_later_as_it_would_have_been_at_once(backend: str) -> None:
    layer, twin, x = make(backend)
    layer.request_scores()
    layer(x).pow(3).sum().backward()
    twin(x).pow(3).sum().backward()
    record = layer.take_record()
    assert not layer.scores_recorded
    with torch.no_grad():
        layer.values.zero_()
    layer(x).pow(3).sum().backward()
    layer.set_block_mask(~layer.block_mask)
    layer.cancel_scores()
    torch.testing.assert_close(layer.scores_of(record), want(twin, layer))


@pytest.mark.parametrize("moved", [False, True])
def test_an_input_changed_in_place_is_an_error_and_no_wrong_score(moved: bool) -> None:
    layer, _, x = make()
    layer.request_scores()
    layer(x).sum().backward()
    x.normal_()
    if moved:
        layer.to("cpu")
    with pytest.raises(RuntimeError, match="in place"):
        layer.take_scores()
    layer(x).sum().backward()
    assert layer.take_scores().isfinite().all()
