"""What tuning may choose: the lists themselves, and how problems are told apart."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from ddst.kernels.configs import (
    DENSITIES,
    DTYPES,
    OPS,
    SIDES,
    GatherConfig,
    Problem,
    WeightGradConfig,
    candidates,
    density_bucket,
    expected_reads,
    shape_class,
)
from ddst.kernels.tuning import candidates_for, choose, defaults

BLOCKS = list(itertools.product(SIDES, SIDES))
ONE = (1, 1)


def problem(op: str = "forward", images: int = 64, blocks: int = 230) -> Problem:
    return Problem(
        op, False, torch.bfloat16, (16, 16), (256, 256, 3, 3), ONE, ONE, ONE, images, (32, 32), (32, 32), blocks
    )


@pytest.mark.parametrize("op", ["forward", "input_grad", "weight_grad"])
def test_candidates(op: str) -> None:
    """Few, each once, and with at least 64 rows in every product. Kernels of k×k stay at 4 warps: with 8, Triton has
    been seen to miscompile loops over taps (pytorch issue 173068), and no device has shown yet that ours are right.
    """
    for dtype, block in itertools.product(DTYPES, BLOCKS):
        listed = candidates(op, dtype, block)
        assert 2 <= len(listed) <= 8
        assert len(set(listed)) == len(listed)
        for config in listed:
            assert config.warps == 4
            if isinstance(config, WeightGradConfig):
                assert config.group * block[1 if config.by == "row" else 0] >= 64
                assert config.pixels * dtype.itemsize in (128, 256)
            else:
                assert config.pixels in (64, 128)


def test_unknown_operator() -> None:
    assert candidates("block_scores", torch.float32, (16, 16)) == []
    with pytest.raises(ValueError, match=f"op must be one of .*{OPS[0]}.*, got 'sum'"):
        candidates("sum", torch.float32, (16, 16))


def test_every_problem_has_a_default() -> None:
    """However small the images, whatever the channels."""
    for op, dtype, block in itertools.product(("forward", "input_grad", "weight_grad"), DTYPES, BLOCKS):
        for shape, size in (((3, 1, 1, 1), (1, 1)), ((64, 64, 3, 3), (4, 4)), ((250, 30, 4, 4), (31, 17))):
            small = Problem(op, False, dtype, block, shape, (2, 1), ONE, ONE, 1, size, size, 1)
            assert candidates_for(small), small


def test_a_box_that_covers_twice_the_pixels_is_no_candidate() -> None:
    big, small = problem(), problem()._replace(input_size=(4, 4), output_size=(4, 4))
    boxes = [c for c in candidates_for(big) if isinstance(c, GatherConfig) and c.box is not None]
    assert boxes
    assert not set(boxes) & set(candidates_for(small))


def test_rows_share_a_program_where_that_saves_a_quarter_of_the_reads() -> None:
    """By default, from 30 % on; unless too few programs are left. Both defaults are known at every density."""
    for op, block in itertools.product(("forward", "input_grad"), ((16, 16), (32, 32), (64, 64))):
        asked = problem(op)._replace(block=block)
        total = 9 * (256 // block[0]) ** 2
        rows = {}
        for density in DENSITIES:
            now = asked._replace(blocks=round(density * total))
            first = choose(now, "unknown device")
            assert isinstance(first, GatherConfig) and first == defaults(now)[0]
            assert set(defaults(now)) == set(defaults(asked))
            rows[density] = first.rows
            least = min(expected_reads(config, now) for config in candidates(op, now.dtype, block))
            assert expected_reads(first, now) < least / 0.75
        assert rows == {d: 4 if d >= 0.3 and block[0] < 64 else 1 for d in DENSITIES}
        assert choose(asked._replace(blocks=total, images=1), "unknown device").rows == 1


@pytest.mark.parametrize("settings", [{"rows": 3}, {"rows": 2, "fuse": 2}, {"rows": 8}])
def test_rows_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rows must be 1, 2 or 4, and more than 1 with fuse 1 only"):
        GatherConfig(**settings)


def test_shape_classes() -> None:
    """Equal for sizes that round to the same powers of two; different for another kernel, stride or size."""
    base = problem()
    same = base._replace(images=60, weight_shape=(250, 270, 3, 3), blocks=500, block=(32, 32))
    assert shape_class(same) == shape_class(base)
    for other in (
        base._replace(images=16),
        base._replace(stride=(2, 2)),
        base._replace(weight_shape=(256, 256, 1, 1)),
        base._replace(weight_shape=(128, 256, 3, 3)),
        base._replace(weight_shape=(256, 128, 3, 3)),
    ):
        assert shape_class(other) != shape_class(base)


def test_density_buckets() -> None:
    assert [density_bucket(density) for density in DENSITIES] == list(DENSITIES)
    assert density_bucket(0.0) == DENSITIES[0]
    assert density_bucket(problem(blocks=16 * 16 * 9).density) == 1.0
    assert density_bucket(problem(blocks=230).density) == 0.1


def test_configurations_are_plain_data() -> None:
    """They are written to JSON and read back."""
    for config in (GatherConfig(box=(1, 8, 8)), WeightGradConfig()):
        assert type(config)(**dataclasses.asdict(config)) == config
