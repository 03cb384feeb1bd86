"""The example programs run as a user would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ddst

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Where the package was imported from, whether installed or in a source tree; also for the program.
SOURCE = Path(ddst.__file__).resolve().parents[1]


def run(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_own_gan_trains_sparse(tmp_path):
    done = run("own_gan.py", "--steps", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("2 of 4 layers sparse; density 0.") == 2
    decisions = [line for line in done.stdout.splitlines() if line.startswith("step ")]
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
def test_a_gan_in_somebody_elses_loop_trains_sparse(package, tmp_path):
    pytest.importorskip(package)
    done = run(f"{package}_gan.py", "--steps", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(steps) == 9
    assert any("drop" in line or "grow" in line for line in steps), steps


def test_stylegan2_layer_has_the_penalties_of_its_dense_form(tmp_path):
    done = run("stylegan2_layer.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert re.fullmatch(r"20% of the weights left; R1, path length and their gradients equal .* to \de[+-]\d\d", line)


def test_aot_package_computes_what_the_net_computes(tmp_path):
    done = run("aot_package.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(
        r"outputs .* differ by at most (\S+); ([\d,]+) bytes, dense weights alone ([\d,]+)\n", done.stdout
    )
    assert found, done.stdout
    assert float(found[1]) < 1e-5
    assert int(found[2].replace(",", "")) < int(found[3].replace(",", ""))


@pytest.mark.parametrize("name", ["own_gan", "lightning_gan", "accelerate_gan", "stylegan2_layer", "aot_package"])
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


def test_own_gan_adds_about_five_lines():
    lines = (EXAMPLES / "own_gan.py").read_text().splitlines()
    assert sum("# sparse" in line for line in lines) == 5
