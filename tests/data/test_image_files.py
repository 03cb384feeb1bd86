"""Which files count as images: endings, hidden names, links in circles, and the count of what is left out."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddst.cli import main
from ddst.data import DataError, load_images
from ddst.data import files as module
from ddst.data.files import IMAGE_SUFFIXES, find_images, shown
from ddst.train.log import read_log
from helpers.runs import tiny


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def found_in(root: Path) -> list[str]:
    return [str(file.relative_to(root)) for file in find_images(root).files]


def test_endings_in_any_case_count_and_others_are_counted(tmp_path):
    names = [f"a{suffix}" for suffix in IMAGE_SUFFIXES] + ["b.PNG", "c.Jpeg", "d.x.JFIF"]
    touch(tmp_path, *names, "notes.txt", "more.TXT", "png", "e.png.bak", "f.heic")
    found = find_images(tmp_path)
    assert [file.name for file in found.files] == sorted(names)
    assert found.left_out == {".txt": 2, ".heic": 1, ".bak": 1, "without an ending": 1}
    assert "2 .txt (more.TXT)" in str(found)


def test_hidden_files_and_folders_are_left_out_but_not_a_hidden_root(tmp_path):
    root = tmp_path / ".data"
    touch(root, "a.png", "._a.png", ".b.jpg", ".git/c.png", "sub/.ipynb_checkpoints/d.png", "sub/e.png")
    found = find_images(root)
    assert found_in(root) == ["a.png", "sub/e.png"]
    assert found.left_out == {"hidden": 4}  # a hidden folder counts once


def test_links_are_followed_and_every_folder_is_read_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(elsewhere, "x/0.png", "x/1.png")
    touch(root, "dogs/0.png", "dogs/deep/1.png")
    (root / "a_link_to_dogs").symlink_to(root / "dogs")  # before it in order: the real path counts all the same
    (root / "cats").symlink_to(elsewhere)
    (root / "cats_again").symlink_to(elsewhere / "x")
    (root / "dogs" / "up").symlink_to(root)
    (root / "dogs" / "further_up").symlink_to(tmp_path)
    (elsewhere / "x" / "back").symlink_to(elsewhere)
    (root / "dogs" / "linked.png").symlink_to(root / "dogs" / "0.png")
    assert found_in(root) == ["cats/x/0.png", "cats/x/1.png", "dogs/0.png", "dogs/deep/1.png", "dogs/linked.png"]
    assert find_images(root).left_out == {module.AGAIN: 5}
    only_links = tmp_path / "links"
    only_links.mkdir()
    (only_links / "all").symlink_to(root)
    assert len(found_in(only_links)) == 5


def test_many_links_between_folders_end(tmp_path):
    for i in range(40):  # 2^40 paths
        (tmp_path / str(i)).mkdir()
        touch(tmp_path, f"{i}/a.png")
        for side in "ab":
            (tmp_path / str(i) / side).symlink_to(tmp_path / str((i + 1) % 40))
    assert len(found_in(tmp_path)) == 40


def test_links_to_nothing_and_files_of_other_sorts_are_counted(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "missing")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    os.mkfifo(tmp_path / "pipe.png")
    found = find_images(tmp_path)
    assert [file.name for file in found.files] == ["a.png"]
    assert found.left_out == {"broken link": 2, "no regular file": 1}


def test_folders_that_cannot_be_read_are_counted_and_the_top_one_is_refused(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")
    scandir = os.scandir

    def locked(path):
        if Path(path).name in ("locked", "top"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(module.os, "scandir", locked)
    found = find_images(tmp_path)
    assert [file.name for file in found.files] == ["a.png"]
    assert str(found) == "1 unreadable (locked: Permission denied)"
    (tmp_path / "top").mkdir()
    with pytest.raises(DataError, match=r"top cannot be read: Permission denied"):
        load_images(str(tmp_path / "top"), 8)


def test_a_folder_without_images_says_what_is_there(tmp_path):
    touch(tmp_path, "a.heic", "b.heic")
    with pytest.raises(DataError, match=r"holds no image file \(.*\); there is: 2 .heic \(a.heic\)"):
        load_images(str(tmp_path), 8)


def test_names_stay_one_printable_line(tmp_path):
    strange = os.fsdecode(b"a\nb\xff.png")
    (tmp_path / strange).write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        load_images(str(tmp_path), 8)
    assert "\n" not in str(caught.value)
    assert r"a\nb\udcff.png" in str(caught.value)
    str(caught.value).encode()
    assert shown("wörter 1.png") == "wörter 1.png"


def test_train_prints_one_line_and_logs_the_count(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    for i in range(6):
        (data / "class").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(data / "class" / f"{i}.png")
    shutil.copy(data / "class" / "0.png", data / "._0.png")
    touch(data, "labels.csv")
    given = tiny(block="8x8", steps=1, stop_after=1, method="ddst-relaxed", data=data, out=out)
    line = [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), str(value))]
    assert main(["train", *line]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert printed == [f"images of {data}: left out: 1 hidden (._0.png); 1 .csv (labels.csv)"]
    start = next(iter(read_log(out / "log.jsonl")))
    assert start["left_out"] == {"hidden": 1, ".csv": 1}
