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
from ddst.benchmarks.paper.published import DISTANCES
from ddst.cli import build_parser
from ddst.train.config import resolve
from ddst.train.without_effect import refuse_without_effect

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
            refuse_without_effect(given, resolve(given))


def test_the_papers_tables_have_a_command_for_each_row() -> None:
    """Of each network and data, in the published sizes and the authors' form."""
    preset_of = {"SNGAN on CIFAR-10": "sngan32", "SNGAN on STL-10": "sngan48", "BigGAN on CIFAR-10": "biggan32",
                 "BigGAN on TinyImageNet": "biggan64"}  # fmt: skip
    full = {"static": "static-balance", "sdst-set": "sdst-balance-set", "sdst-rigl": "sdst-balance-rigl"}
    rows = ["dense", *(full.get(method, method) for method in DISTANCES)]
    sections = dict(re.findall(r"^## ([^\n]+)\n+```sh\n(.*?)^```", PAGES["paper.md"].read_text(), re.M | re.S))
    folders = []
    for title, preset in preset_of.items():
        configs = []
        for line in sections[title].splitlines():
            given = vars(build_parser()[0].parse_args(shlex.split(line)[1:]))
            assert given.pop("command") == "train"
            configs.append(resolve(given))
        assert [config.method for config in configs] == rows
        folders += [config.out for config in configs]
        for config in configs:
            assert config.preset == preset and config.steps == (100_000 if config.model == "sngan" else 200_000)
            if config.method != "dense":
                assert (config.density, config.block, config.backend) == (0.1, (1, 1), "reference")
                assert config.published == (not config.method.startswith("static"))
    assert len(set(folders)) == 4 * len(rows)


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
