"""Images kept on disk: made once, whole or not at all, remade when damaged or when what they are made from changes."""

import os

import pytest
import torch
from safetensors import safe_open

from ddst.data import DataError, cache, load_images
from ddst.data.cache import default_folder
from ddst.data.source import Source
from ddst.train.job import run
from helpers.datasets import images as noise
from helpers.datasets import png, write
from helpers.runs import tiny


def picture(seed):
    return png(noise(1, 12, seed)[0].transpose(1, 2, 0))


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data", {f"{'ab'[i % 2]}/{i}.png": picture(i) for i in range(5)})


def decoded(monkeypatch):
    """Counts the images that are decoded."""
    from ddst.data import folders

    calls, real = [], folders.read_pixels
    monkeypatch.setattr(folders, "read_pixels", lambda *a: calls.append(a) or real(*a))
    return calls


def same(a, b):
    return torch.equal(a.stored, b.stored) and torch.equal(a.labels, b.labels) and a.note == b.note


def test_images_are_decoded_once(tmp_path, data, monkeypatch):
    calls, where = decoded(monkeypatch), tmp_path / "kept"
    plain = load_images(str(data), 8)
    first = load_images(str(data), 8, cache=where)
    (file,) = where.iterdir()
    assert len(calls) == 10 and first.took.endswith(f"; resized images kept in {file}")
    again = load_images(str(data), 8, cache=where)
    assert len(calls) == 10 and again.took.endswith(f"; resized before, in {file}")
    assert same(plain, first) and same(first, again) and first.fingerprint() == again.fingerprint()
    assert torch.equal(again.batch(torch.tensor([1, 7])), plain.batch(torch.tensor([1, 7])))


@pytest.mark.parametrize("times", [1, 2])
def test_what_is_kept_is_mapped_from_the_first_time_and_never_written_to(tmp_path, data, times):
    where = tmp_path / "kept"
    for _ in range(times):
        kept = load_images(str(data), 8, cache=where)
    (file,) = where.iterdir()
    before = file.read_bytes()
    address = kept.stored.data_ptr()
    with open("/proc/self/maps") as maps:
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if str(file) in line]
    assert any(low <= address < high for low, high in spans)
    kept.stored.fill_(0)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "truncated", "bit of a pixel", "bit of a label", "no tensors"])
def test_a_damaged_file_is_made_again(tmp_path, data, monkeypatch, damage):
    where = tmp_path / "kept"
    first = load_images(str(data), 8)
    load_images(str(data), 8, cache=where)
    (file,) = where.iterdir()
    whole = bytearray(file.read_bytes())
    with safe_open(file, "pt") as opened:
        sizes = {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
    assert sizes == {"labels": 40, "stored": 5 * 3 * 64}
    label, pixel = len(whole) - sizes["stored"] - 8, len(whole) - 9
    if damage.startswith("bit"):
        whole[pixel if damage.endswith("pixel") else label] ^= 1
    file.write_bytes({"empty": b"", "truncated": whole[:-1], "no tensors": b"\x02\0\0\0\0\0\0\0{}"}.get(damage, whole))
    calls = decoded(monkeypatch)
    again = load_images(str(data), 8, cache=where)
    assert len(calls) == 5 and same(first, again)
    assert same(first, load_images(str(data), 8, cache=where)) and len(calls) == 5
    assert [file] == list(where.iterdir())


def test_any_change_of_what_it_is_made_from_makes_another(tmp_path, data, monkeypatch):
    where = tmp_path / "kept"

    def kept():
        load_images(str(data), 8, cache=where)
        return len(list(where.iterdir()))

    assert kept() == 1
    file = data / "a" / "0.png"
    times = file.stat()
    while file.stat().st_ctime_ns == times.st_ctime_ns:  # Clocks of file systems tick.
        file.write_bytes(file.read_bytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # The time of change tells all the same.
    assert kept() == 2
    file.rename(data / "b" / "0.png")  # Another class.
    assert kept() == 3
    (data / "b" / "0.png").unlink()
    assert kept() == 4
    load_images(str(data), 16, cache=where)
    assert kept() == 5
    monkeypatch.setattr("PIL.__version__", "0")
    assert kept() == 6


def test_what_cannot_be_kept_is_said_and_nothing_is_left(tmp_path, data, monkeypatch):
    write(tmp_path, {"file": b"x"})
    images = load_images(str(data), 8, cache=tmp_path / "file" / "kept")
    assert f"resized images not kept in {tmp_path / 'file' / 'kept'}: " in images.took and len(images) == 5

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    images = load_images(str(data), 8, cache=tmp_path / "kept")
    assert images.took.endswith(f"resized images not kept in {tmp_path / 'kept'}: No space left on device")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_file_that_is_gone_is_named(tmp_path):
    source = Source("", [tmp_path / "gone.png"], lambda _: None)
    with pytest.raises(FileNotFoundError):
        cache.kept_file(tmp_path, source, tmp_path, 8)


def test_the_default_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "ddst" / "images"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_folder() == tmp_path / "home" / ".cache" / "ddst" / "images"


def test_train_keeps_images_and_says_so(tmp_path, data, capsys):
    where = tmp_path / "kept"
    settings = tiny(data=str(data), data_cache=str(where), stop_after=1, flips=True)
    for out, words in (("a", "resized images kept in"), ("b", "resized before, in")):
        run({**settings, "out": str(tmp_path / out)})
        took = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data ")]
        (file,) = where.iterdir()
        assert took == [f"data {data}: folder of image files, 2 class folders, a to b; {words} {file}"]
    again = {"out": str(tmp_path / "b"), "resume": True}
    for given, words in (({}, f"; resized before, in {file}"), ({"data_cache": "none"}, "")):
        run({**again, **given, "stop_after": 3})
        (took,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data ")]
        assert took == f"data {data}: folder of image files, 2 class folders, a to b{words}"


def test_train_says_what_is_expected_of_data_that_are_none(tmp_path):
    write(tmp_path, {"images.tar": b"x"})
    with pytest.raises(DataError, match=r"images\.tar is not a folder \(give a folder of image files, a \.zip of them"):
        run(tiny(data=str(tmp_path / "images.tar"), out=str(tmp_path / "run")))
