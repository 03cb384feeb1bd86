"""Lists derived from a topology: kept, rewritten in place when blocks move, and what a captured graph finds."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from ddst import index_cache
from ddst.index_cache import cached, refresh


class Build:
    """Makes a list and a pair of lists of a topology, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, topology: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return topology * 2, topology.flip(0)


def addresses(lists: tuple[Tensor, ...]) -> list[int]:
    return [t.data_ptr() for t in lists]


def test_lists_are_made_once_and_rewritten_where_the_topology_was_written_to() -> None:
    topology, build, other = torch.arange(4), Build(), Build()
    lists = cached(topology, "a", build)
    at = addresses(lists)
    assert all(cached(topology, "a", build) is lists for _ in range(2)) and build.calls == 1
    assert cached(topology, "b", other) is not lists, "by key"
    assert cached(topology.clone(), "a", build) is not lists, "by identity of the topology"
    topology.add_(1)
    assert lists[0].tolist() == [0, 2, 4, 6], "no view of the topology"
    assert cached(topology, "a", build) is lists and addresses(lists) == at
    assert lists[0].tolist() == [2, 4, 6, 8] and lists[1].tolist() == [4, 3, 2, 1]
    assert build.calls == 3 and other.calls == 1, "what nobody asks for is not made"


def test_refresh_rewrites_everything_at_its_address() -> None:
    topology, build = torch.arange(4), Build()
    kept = [cached(topology, key, build) for key in "abc"]
    at = [addresses(lists) for lists in kept]
    topology.copy_(torch.tensor([7, 5, 3, 1]))
    refresh(topology)
    assert [addresses(lists) for lists in kept] == at
    assert all(lists[0].tolist() == [14, 10, 6, 2] and lists[1].tolist() == [1, 3, 5, 7] for lists in kept)
    assert build.calls == 6
    assert [cached(topology, key, build) for key in "abc"] == kept and build.calls == 6
    refresh(torch.arange(4))  # of which there are none


def test_another_number_of_slots_makes_new_lists() -> None:
    topology, build = torch.arange(4), Build()
    lists = cached(topology, "a", build)
    topology.resize_(6).copy_(torch.arange(6))
    longer = cached(topology, "a", build)
    assert longer[0].tolist() == [0, 2, 4, 6, 8, 10] and lists[0].tolist() == [0, 2, 4, 6]


def test_lists_made_in_inference_mode_can_be_rewritten_outside_of_it() -> None:
    topology, build = torch.arange(4), Build()
    with torch.inference_mode():
        lists = cached(topology, "a", build)
    topology.add_(1)
    refresh(topology)
    assert lists[0].tolist() == [2, 4, 6, 8]
    with torch.inference_mode():
        topology.add_(1)
        assert cached(topology, "a", build) is lists and lists[0].tolist() == [4, 6, 8, 10]


def test_inference_tensors_count_no_versions_so_that_nothing_is_kept() -> None:
    with torch.inference_mode():
        topology, build = torch.arange(4), Build()
        assert cached(topology, "a", build)[0].tolist() == [0, 2, 4, 6]
        topology.add_(1)
        refresh(topology)
        assert cached(topology, "a", build)[0].tolist() == [2, 4, 6, 8]


def test_lists_die_with_the_topology() -> None:
    topology, build = torch.arange(4), Build()
    kept = weakref.ref(cached(topology, "a", build)[0])
    gc.collect()
    assert kept() is not None
    del topology
    gc.collect()
    assert kept() is None


def test_a_graph_is_captured_with_the_lists_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made while it is captured, which has not run, is not kept, and overwrites nothing."""
    topology, build = torch.arange(4), Build()
    warm = cached(topology, "a", build)
    with monkeypatch.context() as capturing:
        capturing.setattr(index_cache, "_is_captured", lambda tensor: True)
        assert cached(topology, "a", build) is warm
        assert cached(topology, "b", build) is not cached(topology, "b", build)
        topology.add_(1)
        own = cached(topology, "a", build)
        assert own is not warm and own[0].tolist() == [2, 4, 6, 8] and warm[0].tolist() == [0, 2, 4, 6]
        with pytest.raises(RuntimeError, match="while a CUDA graph is being captured"):
            refresh(topology)
    assert cached(topology, "a", build) is warm and warm[0].tolist() == [2, 4, 6, 8]
