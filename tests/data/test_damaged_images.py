"""Damaged image files are read or refused by name, and never end the process. The long test is in tests/torture."""

from ddst.data import load_images
from ddst.data.files import IMAGE_SUFFIXES
from ddst.data.pixels import FORMATS
from helpers.damage import DAMAGES, damaged, in_a_process, whole_files


def test_whole_files_are_read_and_are_of_every_format(tmp_path):
    for i, (ending, data) in enumerate(whole_files()):
        (tmp_path / f"{i}{ending}").write_bytes(data)
    assert len(load_images(str(tmp_path), 16)) == len(whole_files())
    assert {ending for ending, _ in whole_files()} >= IMAGE_SUFFIXES - {".jpe"}
    assert len(FORMATS) == 8


def test_damage_is_seeded_and_changes_the_file():
    files, numbers = whole_files(), range(200)
    assert [damaged(n) for n in numbers] == [damaged(n) for n in numbers]
    assert sum(damaged(n)[1] != files[n % len(files)][1] for n in numbers) > 190
    assert len(DAMAGES) == 5


def test_a_sample_of_damaged_files_is_read_or_refused(tmp_path):
    outcomes = in_a_process(tmp_path, 0, 240)
    assert outcomes["refused"] > 60
    assert outcomes["read"] > 20
