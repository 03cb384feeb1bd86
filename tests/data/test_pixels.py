"""What is black and white in every kind of image: a ramp comes out as a ramp, or is refused by name."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from ddst.data import DataError, load_images

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))
BYTES = np.rint(RAMP * 255).astype(np.uint8)
COLOURS = np.stack([BYTES, BYTES[:, ::-1], np.full_like(BYTES, 90)], axis=2)


def loaded(folder, side=64):
    """Of the one image of a folder, `[side, side, 3]` as 0 ... 255, without a resize at 64."""
    return load_images(str(folder), side).stored[0].permute(1, 2, 0).numpy()


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[:, :, None], 3, axis=2)


def save(folder, image, name="a.png", **kwargs):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(folder / name, **kwargs)


@pytest.mark.parametrize(
    "name, array",
    [
        ("a.png", BYTES),
        ("a.png", (RAMP * 65535).astype(np.uint16)),
        ("a.tif", (RAMP * 65535).astype(np.uint16)),
        ("a.tif", (RAMP * 65535).astype(">u2")),
        ("a.pgm", (RAMP * 65535).astype(np.uint16)),
        ("a.tif", (RAMP * 65535).astype(np.int32)),
        ("a.tif", RAMP.astype(np.float32)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.dtype.str,
)
@pytest.mark.parametrize("side", [64, 16])
def test_a_grey_ramp_of_any_depth_is_the_ramp(tmp_path, name, array, side):
    save(tmp_path, array, name)
    expected = np.asarray(Image.fromarray(BYTES).resize((side, side), Image.Resampling.BICUBIC))
    assert np.abs(loaded(tmp_path, side).astype(int) - grey(expected)).max() <= 1


@pytest.mark.parametrize("maxval", [1000, 4095])
def test_a_pgm_states_its_white(tmp_path, maxval):
    values = np.rint(RAMP * maxval).astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 %d\n" % maxval + values.tobytes())
    assert np.abs(loaded(tmp_path).astype(int) - grey(BYTES)).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_tiff_whose_white_is_zero_is_inverted(tmp_path, dtype):
    top = 1.0 if dtype is np.float32 else np.iinfo(dtype).max
    save(tmp_path, (RAMP * top).astype(dtype), "a.tif")
    whole, photometric = (tmp_path / "a.tif").read_bytes(), b"\x06\x01\x03\x00\x01\x00\x00\x00"
    assert whole.count(photometric + b"\x01") == 1
    (tmp_path / "a.tif").write_bytes(whole.replace(photometric + b"\x01", photometric + b"\x00"))
    assert np.abs(loaded(tmp_path).astype(int) - grey(255 - BYTES)).max() <= 1


def test_twelve_bits_reach_white(tmp_path):
    levels = np.rint(RAMP * 4095).astype(np.uint16)
    a, b = levels[:, 0::2], levels[:, 1::2]
    packed = np.stack([a >> 4, ((a & 15) << 4) | (b >> 8), b & 255], axis=2).astype(np.uint8).tobytes()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (277, 1), (278, 64), (279, len(packed))):
        tags[tag] = value
    tags[273] = 0  # the data's place, counted from the end of the tags
    (tmp_path / "a.tif").write_bytes(b"II*\x00\x08\x00\x00\x00" + tags.tobytes(8) + packed)
    assert np.abs(loaded(tmp_path).astype(int) - grey(BYTES)).max() <= 1


@pytest.mark.parametrize(
    "array, message",
    [
        ((RAMP * 255).astype(np.int32), "black where white is 65535"),
        ((RAMP * 65536).astype(np.int32), "values from 0 to 65536, expected 0"),
        ((RAMP * 65535 - 1).astype(np.int32), "values from -1"),
        ((RAMP * 255).astype(np.float32), "values from 0 to 255, expected 0"),
        ((RAMP * 2 - 1).astype(np.float32), "values from -1 to 1"),
        (np.where(RAMP == 1, np.nan, RAMP).astype(np.float32), "values from nan"),
    ],
)
def test_values_without_a_known_white_are_refused_by_name(tmp_path, array, message):
    save(tmp_path, array, "a.tif")
    with pytest.raises(DataError, match=rf"cannot read image .*a\.tif: .*{message}"):
        load_images(str(tmp_path), 16)


@pytest.mark.parametrize("bits", [8, 16])
def test_signed_samples_are_refused(tmp_path, bits):
    array = BYTES if bits == 8 else BYTES.astype(np.uint16)
    save(tmp_path, array, "a.tif", tiffinfo={339: 2})
    with pytest.raises(DataError, match=rf"a\.tif: signed samples of {bits} bits"):
        load_images(str(tmp_path), 16)


def test_black_stays_black_at_every_depth(tmp_path):
    for i, dtype in enumerate((np.uint8, np.uint16, np.int32, np.float32)):
        save(tmp_path, np.zeros((8, 8), dtype), f"{i}.tif")
    assert load_images(str(tmp_path), 8).stored.max() == 0


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA"])
def test_transparent_pixels_are_laid_over_white_before_the_resize(tmp_path, mode):
    # Left half opaque grey 100; right half transparent over black, whose black must nowhere be seen.
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (100, 100, 100, 255)
    save(tmp_path, Image.fromarray(pixels).convert(mode), "a.tif" if mode == "PA" else "a.png")
    images = load_images(str(tmp_path), 16)
    row = images.stored[0, 0, 8]
    assert row[:6].tolist() == [100] * 6
    assert row[10:].tolist() == [255] * 6
    assert row.min() >= 90  # bicubic rings a little
    assert images.note == f"images of {tmp_path}: 1 with transparent pixels laid over white"


def test_half_transparent_is_half_white(tmp_path):
    save(tmp_path, np.full((8, 8, 4), (100, 0, 200, 51), np.uint8))
    assert np.abs(loaded(tmp_path, 8)[0, 0].astype(int) - [224, 204, 244]).max() <= 1


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    save(tmp_path, np.dstack([COLOURS, np.full_like(BYTES, 255)]))
    images = load_images(str(tmp_path), 64)
    assert np.array_equal(images.stored[0].permute(1, 2, 0).numpy(), COLOURS)
    assert images.note == ""


@pytest.mark.parametrize(
    "mode, colour, depth", [("L", 255, np.uint8), ("RGB", (0, 255, 90), np.uint8), ("I;16", 0, np.uint16)]
)
def test_a_transparent_colour_becomes_white(tmp_path, mode, colour, depth):
    array = COLOURS if mode == "RGB" else BYTES if depth == np.uint8 else (RAMP * 65535).astype(np.uint16)
    save(tmp_path, array, transparency=colour)
    images = load_images(str(tmp_path), 64)
    expected = COLOURS.copy() if mode == "RGB" else grey(BYTES)
    expected[np.all(expected == (colour if mode == "RGB" else (colour,) * 3), axis=2)] = 255
    assert np.abs(images.stored[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert "1 with transparent pixels" in images.note


def test_palettes_with_a_transparent_entry_are_laid_over_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(0, (0, 0, 4, 8))
    image.save(tmp_path / "a.gif", transparency=0)
    pixels = loaded(tmp_path, 8)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 7].tolist() == [200, 0, 0]


@pytest.mark.parametrize("array", [np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8), np.uint16)])
def test_an_image_with_nothing_to_see_is_refused(tmp_path, array):
    save(tmp_path, array, transparency=0 if array.ndim == 2 else None)
    with pytest.raises(DataError, match=r"a\.png: every pixel is wholly transparent"):
        load_images(str(tmp_path), 8)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "LAB", "HSV"])
def test_other_modes_are_colours(tmp_path, mode):
    source = Image.fromarray(COLOURS)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(source, *profiles, outputMode="LAB")
    else:
        image = source.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    name = "a.png" if mode in "1P" else "a.tif"
    if mode == "HSV":
        image = image.convert("RGB")
    image.save(tmp_path / name)
    assert np.abs(loaded(tmp_path).astype(int) - expected).max() <= 2


def test_sixteen_bits_a_colour_keep_their_upper_eight(tmp_path):
    values = (COLOURS.astype(">u2") * 257).tobytes()
    (tmp_path / "a.ppm").write_bytes(b"P6 64 64 65535\n" + values)
    assert np.abs(loaded(tmp_path).astype(int) - COLOURS).max() <= 1


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.avif", "a.webp", "a.gif", "a.pnm", "a.BMP"])
def test_every_ending_is_read(tmp_path, name):
    kind = {"jfif": "JPEG", "jpe": "JPEG", "pnm": "PPM"}.get(name[2:])
    save(tmp_path, np.full((16, 16, 3), 120, np.uint8), name, format=kind)
    assert np.abs(loaded(tmp_path, 8).astype(int) - 120).max() <= 4


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (0, 200)]
    for name in ("a.gif", "b.tif", "c.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=10)
    assert load_images(str(tmp_path), 8).stored.max() <= 3


def test_only_image_readers_open_a_file(tmp_path):
    """A file that is PostScript inside would start another program."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="EPS")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"a\.png: cannot identify image file"):
        load_images(str(tmp_path), 8)
