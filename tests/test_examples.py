"""The example programs run as a user would run them."""

import importlib.util
import os
import re
from pathlib import Path

import pytest

import ddst
from helpers.copies import run_copies

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Where the package was imported from, whether installed or in a source tree; also for the program.
SOURCE = Path(ddst.__file__).resolve().parents[1]


EXAMPLE = "import runpy; sys.argv += {arguments!r}; runpy.run_path({path!r}, run_name='__main__')"
ARGUMENTS = {"own_gan": ["--steps", "20"], "stylegan2_layer": [], "aot_package": []}
OTHERS_LOOPS = {"accelerate_gan": ["--steps", "20"], "lightning_gan": ["--steps", "20"]}


@pytest.fixture(scope="module")
def examples():
    """What came of each, as a copy of one process."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    there = {name for name in OTHERS_LOOPS if importlib.util.find_spec(name.partition("_")[0])}
    started = ARGUMENTS | {name: words for name, words in OTHERS_LOOPS.items() if name in there}
    programs = []
    for name, arguments in started.items():
        imported = "import ddst, torch._dynamo" + (f", {name.partition('_')[0]}" if name in there else "")
        programs.append((imported, EXAMPLE.format(arguments=arguments, path=str(EXAMPLES / f"{name}.py"))))
    return dict(zip(started, run_copies(programs, environment), strict=True))


def test_own_gan_trains_sparse(examples):
    done = examples["own_gan"]
    assert done.returncode == 0, done.err
    assert done.err == ""
    assert done.out.count("2 of 4 layers sparse; density 0.") == 2
    decisions = [line for line in done.out.splitlines() if line.startswith("step ")]
    assert len(decisions) == 9
    assert any("warm-up" not in line for line in decisions)
    densities = [float(line.rpartition("d_D ")[2]) for line in decisions]
    assert densities[0] == pytest.approx(0.2, abs=0.02)
    actions = [line.split(": ")[1].partition(",")[0] for line in decisions]
    for action, before, after in zip(actions[1:], densities, densities[1:], strict=False):
        change = after - before
        assert {"grow": change > 0, "drop": change < 0, "keep": change == 0}[action], decisions
        assert abs(change) < 0.07, decisions
    assert set(actions) > {"keep"}


@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_a_gan_in_somebody_elses_loop_trains_sparse(package, examples):
    if f"{package}_gan" not in examples:
        pytest.skip(f"{package} is not installed")
    done = examples[f"{package}_gan"]
    assert done.returncode == 0, done.err
    steps = [line for line in done.out.splitlines() if line.startswith("step ")]
    assert len(steps) == 9
    assert any("drop" in line or "grow" in line for line in steps), steps


def test_stylegan2_layer_has_the_penalties_of_its_dense_form(examples):
    done = examples["stylegan2_layer"]
    assert done.returncode == 0, done.err
    assert done.err == ""
    (line,) = done.out.splitlines()
    assert re.fullmatch(r"20% of the weights left; R1, path length and their gradients equal .* to \de[+-]\d\d", line)


def test_aot_package_computes_what_the_net_computes(examples):
    done = examples["aot_package"]
    assert done.returncode == 0, done.err
    found = re.fullmatch(
        r"outputs .* differ by at most (\S+); ([\d,]+) bytes, dense weights alone ([\d,]+)\n", done.out
    )
    assert found, done.out
    assert float(found[1]) < 1e-5
    assert int(found[2].replace(",", "")) < int(found[3].replace(",", ""))


@pytest.mark.parametrize("name", ["own_gan", "lightning_gan", "accelerate_gan", "stylegan2_layer", "aot_package"])
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


def test_own_gan_adds_about_five_lines():
    lines = (EXAMPLES / "own_gan.py").read_text().splitlines()
    assert sum("# sparse" in line for line in lines) == 5
