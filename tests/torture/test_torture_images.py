"""Thousands of damaged image files: none kills the process, each is read or refused by name."""

from collections import Counter

import pytest

from helpers.damage import in_a_process

pytestmark = pytest.mark.torture

START, FILES, AT_A_TIME = 10_000, 4_000, 500  # other numbers than those of the short test


def test_damaged_images(tmp_path, capsys):
    outcomes: Counter[str] = Counter()
    for first in range(START, START + FILES, AT_A_TIME):
        outcomes += in_a_process(tmp_path, first, first + AT_A_TIME)
    assert outcomes.total() == FILES
    assert outcomes["refused"] > 1_000
    assert outcomes["read"] > 500
    with capsys.disabled():
        print(f"\n{FILES:,} damaged images: {outcomes['refused']:,} refused, {outcomes['read']:,} read, 0 killed")
