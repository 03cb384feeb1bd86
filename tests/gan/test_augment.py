"""DiffAugment beside its published definition."""

import pytest
import torch

from ddst.gan.augment import KINDS, diff_augment


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_color_is_brightness_saturation_contrast():
    x, draw = torch.rand(3, 3, 4, 4) * 2 - 1, seeded()
    got = diff_augment(x, ["color"], generator=seeded())
    b, s, c = (torch.rand(3, 1, 1, 1, generator=draw) for _ in range(3))
    for i in range(3):
        y = x[i] + b[i] - 0.5
        grey = y.mean(0, keepdim=True)
        y = (y - grey) * (2 * s[i]) + grey
        y = (y - y.mean()) * (c[i] + 0.5) + y.mean()
        torch.testing.assert_close(got[i], y)


def test_translation_moves_by_up_to_an_eighth_and_fills_with_zeros():
    x = torch.arange(1.0, 257).view(1, 1, 16, 16).expand(200, 1, 16, 16)
    got, shifts = diff_augment(x, ["translation"], generator=seeded()), set()
    for image in got[:, 0]:
        matching = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(image, torch.nn.functional.pad(x[0, 0], (2, 2, 2, 2))[2 + dy : 18 + dy, 2 + dx : 18 + dx])
        ]
        assert len(matching) == 1
        shifts.add(matching[0])
    assert len(shifts) == 25


def test_cutout_blanks_a_square_of_half_the_side():
    got = diff_augment(torch.ones(300, 2, 8, 8), ["cutout"], generator=seeded())
    sizes = set()
    for image in got:
        assert torch.equal(image[0], image[1])
        rows, columns = (image[0] == 0).any(1), (image[0] == 0).any(0)
        assert torch.equal(image[0] == 0, rows[:, None] & columns[None, :])
        for line in (rows, columns):
            assert int(line.sum()) == 1 + int(line.nonzero().max() - line.nonzero().min())
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert max(sizes) == (4, 4) and min(sizes) == (2, 2)


def test_gradients_pass_and_a_seed_is_the_same_augmentation():
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: diff_augment(t, generator=seeded(3)), x)
    assert torch.equal(diff_augment(x, generator=seeded(1)), diff_augment(x, generator=seeded(1)))
    assert not torch.equal(diff_augment(x, generator=seeded(1)), diff_augment(x, generator=seeded(2)))
    assert torch.equal(diff_augment(x, []), x)
    assert set(KINDS) == {"color", "translation", "cutout"}


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="policy must hold color, translation, cutout only, got 'blur'"):
        diff_augment(torch.zeros(1, 1, 4, 4), ["blur"])
    with pytest.raises(TypeError, match="policy must be a list"):
        diff_augment(torch.zeros(1, 1, 4, 4), "color")
    with pytest.raises((TypeError, ValueError), match="images"):
        diff_augment(torch.zeros(4, 4))
