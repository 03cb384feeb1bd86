"""Digits and folders: range, size, order, and one clear line for every way a folder can be wrong."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddst.data import DataError, load_images


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_digits_at_their_own_size_are_the_scaled_originals():
    images = load_images("digits", 8)
    expected = torch.from_numpy(load_digits().images).float().div(8).sub(1)
    torch.testing.assert_close(images.batch(slice(None))[:, 0], expected)
    assert images.labels is not None
    assert images.labels.tolist()[:10] == list(range(10))


@pytest.mark.parametrize("resolution", [16, 32])
def test_digits_enlarged_keep_range_and_mean(resolution):
    images = load_images("digits", resolution)
    batch = images.batch(torch.arange(50))
    assert batch.shape == (50, 1, resolution, resolution)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.min() >= -1
    assert batch.max() <= 1
    small = load_images("digits", 8).batch(torch.arange(50))
    assert (torch.nn.functional.avg_pool2d(batch, resolution // 8) - small).abs().mean() < 0.15


def test_folder_is_cropped_resized_and_sorted(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = (255, 0, 0)  # The central square is red, what is cropped away is black.
    write(tmp_path / "b.png", wide)
    write(tmp_path / "sub" / "c.PNG", np.full((9, 9), 255, np.uint8))  # Grey becomes RGB; small is enlarged.
    write(tmp_path / "a.bmp", np.zeros((16, 16, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    images = load_images(str(tmp_path), 16)
    assert len(images) == 3
    assert images.channels == 3
    assert images.labels is None
    batch = images.batch(slice(None))
    assert torch.equal(batch[0], torch.full((3, 16, 16), -1.0))
    torch.testing.assert_close(batch[1].mean(dim=(1, 2)), torch.tensor([1.0, -1.0, -1.0]), atol=0.01, rtol=0)
    assert torch.equal(batch[2], torch.full((3, 16, 16), 1.0))


def test_rotated_photograph_is_set_upright(tmp_path):
    tall = Image.new("RGB", (16, 16))
    tall.paste((255, 255, 255), (0, 0, 16, 8))  # White on top as stored.
    exif = Image.Exif()
    exif[0x0112] = 3  # Orientation: turned by 180 degrees.
    tall.save(tmp_path / "a.png", exif=exif)
    batch = load_images(str(tmp_path), 16).batch(slice(None))
    assert batch[0, :, :4].max() == -1
    assert batch[0, :, 12:].min() == 1


def test_wrong_folders_give_one_line(tmp_path):
    empty, file = tmp_path / "empty", tmp_path / "file.png"
    empty.mkdir()
    (empty / "readme.md").write_text("x")
    write(file, np.zeros((8, 8, 3), np.uint8))
    for data, message in (
        (tmp_path / "none", "does not exist"),
        (empty, "holds no image file"),
        (file, "is not a folder"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load_images(str(data), 8)
        assert str(data) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_unreadable_image_is_named(tmp_path, damage):
    write(tmp_path / "good.png", np.zeros((8, 8, 3), np.uint8))
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    bad = tmp_path / "sub" / "bad.png"
    write(bad, noise)
    whole = bad.read_bytes()
    bad.write_bytes({"text": b"this is no image", "truncated": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(DataError, match=r"cannot read image .*bad\.png") as caught:
        load_images(str(tmp_path), 8)
    assert "\n" not in str(caught.value)


def test_fingerprint_tells_changed_images(tmp_path):
    write(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    before = load_images(str(tmp_path), 8).fingerprint()
    assert before == load_images(str(tmp_path), 8).fingerprint()
    changed = np.zeros((8, 8, 3), np.uint8)
    changed[3, 3] = 200
    write(tmp_path / "a.png", changed)
    assert load_images(str(tmp_path), 8).fingerprint() != before
