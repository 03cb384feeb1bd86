"""The examples in the docstrings of every module run and give what they show; those of the guide run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import ddst
import ddst.benchmarks
from ddst.cli import build_parser
from ddst.train.config import refuse_without_effect, resolve

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


ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
CODE = [name for name, path in PAGES.items() if "```python" in path.read_text()]


@pytest.mark.parametrize("name", CODE)
def test_the_code_of_a_page_of_the_guide(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs from top to bottom, with what stands in comments of the page."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        with mock.patch.dict(os.environ):
            for example in Sybil([PythonCodeBlockParser()]).parse(PAGES[name]).examples():
                example.evaluate()
    finally:
        torch.set_num_threads(threads)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_page_whose_code_breaks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: a block behind another one is run, in the same names."""
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- invisible-code-block: python\nx = 1\n-->\n\n```python\ny = x\n```\n\n```python\nassert x != y\n```\n"
    )
    monkeypatch.setitem(PAGES, "page.md", page)
    with pytest.raises(AssertionError):
        test_the_code_of_a_page_of_the_guide("page.md", tmp_path, monkeypatch)
    assert {"README.md", "own-loop.md", "distributed.md"} <= set(CODE)


def test_the_commands_of_the_guide_are_such_that_there_are() -> None:
    blocks = [
        block for page in PAGES.values() for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S)
    ]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("ddst ")]
    assert len(lines) > 10
    for line in lines:
        given = vars(build_parser()[0].parse_args(shlex.split(line, comments=True)[1:]))
        if given.pop("command") == "train" and not given.get("resume"):
            refuse_without_effect(given, resolve(given).method)


def test_the_readmes_links_lead_somewhere() -> None:
    """Sphinx follows those of the guide."""
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGES["README.md"].read_text())
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_reference_of_ddst_has_all_its_names() -> None:
    """The other pages of the reference list a module whole."""
    page = (ROOT / "docs" / "api" / "ddst.md").read_text()
    named = re.findall(r"^\.\. auto(?:class|function):: ddst\.(\w+)$", page, re.M)
    assert sorted(named) == sorted(set(ddst.__all__) - {"__version__"})
