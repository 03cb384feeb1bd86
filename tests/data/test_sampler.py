"""The sampler: whole epochs, batches over their ends, exact continuation."""

import pytest
import torch

from ddst.data import Sampler


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (7, 7), (3, 8), (1, 4)])
def test_every_image_comes_once_per_epoch(size, batch):
    sampler = Sampler(size, batch, seed=1)
    drawn = torch.cat([sampler.next() for _ in range(4 * size)])
    assert drawn.numel() == 4 * size * batch
    for epoch in drawn.split(size):
        assert sorted(epoch.tolist()) == list(range(size))


def test_seed_decides_and_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (Sampler(100, 10, seed) for seed in (1, 1, 2))
    first = a.next()
    assert torch.equal(first, b.next())
    assert not torch.equal(first, c.next())
    assert torch.equal(torch.get_rng_state(), before)


def test_continues_exactly_in_the_middle_of_an_epoch():
    sampler = Sampler(10, 4, seed=3)
    for _ in range(4):
        sampler.next()
    state = sampler.state_dict()
    expected = [sampler.next() for _ in range(10)]
    other = Sampler(10, 4, seed=99)
    other.load_state_dict(state)
    assert all(torch.equal(other.next(), e) for e in expected)


def test_bad_arguments_and_state_of_another_set():
    for size, batch, name in ((0, 1, "size"), (1, 0, "batch")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Sampler(size, batch, seed=0)
    with pytest.raises(ValueError, match="for 5 images, this set has 6"):
        Sampler(6, 1, seed=0).load_state_dict(Sampler(5, 1, seed=0).state_dict())
