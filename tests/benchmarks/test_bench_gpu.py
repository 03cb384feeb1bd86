"""The tests of `make gpu`, all in one process, and that together they have run every line of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddst.benchmarks import tune
from ddst.benchmarks.gpu import run
from helpers.executed import Executed

PARTS = ("gpu_runtime", "gpu_objects", "gpu_parts", "gpu_correctness", "gpu_dry_run")
FILES = [*sorted(Path(run.__file__).parent.glob("*.py")), Path(tune.__file__)]
if importlib.util.find_spec("matplotlib") is None:
    FILES.remove(Path(run.__file__).with_name("pictures.py"))
EXECUTED = Executed(FILES)


def _take(name: str) -> None:
    """Makes the tests and fixtures of a file beside this one those of this file."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {key: value for key, value in vars(module).items() if key.startswith("test_")}
    fixtures = {
        key: value for key, value in vars(module).items() if type(value).__name__ == "FixtureFunctionDefinition"
    }
    assert not (found.keys() | fixtures.keys()) & globals().keys(), f"names of {name} are taken"
    globals().update(found | fixtures)


for part in PARTS:
    _take(part)
NAMES = {name for name in globals() if name.startswith("test_")}
_ran: set[str] = set()


@pytest.fixture(autouse=True)
def _watched(request: pytest.FixtureRequest) -> Iterator[None]:
    _ran.add(request.function.__name__)
    with EXECUTED.watching():
        yield


def test_z_every_line_has_run() -> None:
    """Also those that say what went wrong. Asked of the whole file only."""
    if NAMES - _ran:
        pytest.skip("some tests of this file were left out")
    missed = EXECUTED.missed()
    assert not missed, "\n".join(missed)
