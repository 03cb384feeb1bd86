"""Mirror images: indices past the last image, each once per pass, and only where a run asks for them."""

import torch

from ddst.data import ImageSet, load_images
from ddst.train.config import resolve
from ddst.train.loop import Trainer
from helpers.runs import TINY


def test_indices_past_the_end_are_mirror_images():
    stored = torch.randint(256, (3, 3, 5, 5), dtype=torch.uint8)
    images = ImageSet("x", stored.clone(), 255.0)
    batch = images.batch(torch.tensor([4, 0, 5, 1]))
    assert torch.equal(batch[0], images.batch(torch.tensor([1]))[0].flip(-1))
    assert torch.equal(batch[2], images.batch(slice(None))[2].flip(-1))
    assert torch.equal(batch[[1, 3]], images.batch(torch.tensor([0, 1])))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.stored, stored)


def test_a_run_with_flips_takes_every_image_both_ways():
    images = load_images("digits", 8)
    plain, flipped = (Trainer(resolve({**TINY, "flips": flips, "out": "x"}), images) for flips in (False, True))
    assert plain.sampler.size == len(images)
    assert flipped.sampler.size == 2 * len(images)
    drawn = torch.cat([flipped.sampler.next() for _ in range(2 * len(images) // 4 + 1)])[: 2 * len(images)]
    assert drawn.sort().values.equal(torch.arange(2 * len(images)))
    state = flipped.state_dict()
    again = Trainer(resolve({**TINY, "flips": True, "out": "x"}), images)
    again.sampler.load_state_dict(state["sampler"])
    assert again.sampler.next().equal(flipped.sampler.next())
