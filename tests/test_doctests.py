"""The examples in the docstrings of every module run and give what they show."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import ddst
import ddst.benchmarks

# ddst.kernels is not imported to find its modules: on import it decides whether it is interpreted (tests/kernels).
KERNELS = importlib.util.find_spec("ddst.kernels")
assert KERNELS is not None
MODULES = sorted(
    {
        module.name
        for package in (ddst, ddst.benchmarks)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.startswith(("ddst._lib.", "ddst.kernels"))
    }
    | {module.name for module in pkgutil.iter_modules(KERNELS.submodule_search_locations, "ddst.kernels.")}
)


@pytest.mark.parametrize("name", ["ddst", *MODULES])
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_public_functions_have_examples() -> None:
    """Guards the test above: examples are found at all."""
    finder = doctest.DocTestFinder()
    assert any(test.examples for test in finder.find(importlib.import_module("ddst.topology")))
