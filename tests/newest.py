"""Runs tests with the newest torch and Triton that the package index has, and keeps what came out (`make test-newest`).

    python -P tests/newest.py [--write] [--venv DIR] [--torch VERSION] [TESTS ...]

``--torch`` takes another torch, with the Triton that belongs to it (`make test-oldest`). The packages go into a virtual
environment of their own (several GB where they are CUDA builds), which is deleted afterwards unless ``--venv`` names
it; ddst is this tree with the library built in it by the pinned torch's headers. ``--write`` writes
docs/notes/newest.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "notes" / "newest.md"
TESTS = ["tests/ops", "tests/nn", "tests/sparsity", "tests/gan", "tests/kernels"]
#: Compiles every kernel, as none is recorded with another version of Triton.
LEFT_OUT = ["tests/kernels/test_kernels_compile.py"]
PACKAGES = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
VERSIONS = """
import platform, numpy, torch, triton
print(torch.__version__, triton.__version__, numpy.__version__, platform.python_version())
"""


def run(*command: str | Path, **settings: object) -> subprocess.CompletedProcess[str]:
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], text=True, check=True, **settings)  # type: ignore[call-overload]


def prepare(python: Path, version: str | None) -> None:
    """An environment with the newest packages and this torch; without one Triton's newest, whatever torch asks for."""
    run(sys.executable, "-m", "venv", python.parents[1])
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tests = [need for need in needs["dev"] if need.startswith(("pytest", "hypothesis"))]
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--upgrade"]
    run(*pip, f"torch=={version}" if version else "torch", "numpy", *needs["train"], *tests)
    if version is None:
        run(*pip, "--no-deps", "triton")


def install(python: Path) -> None:
    """ddst as it is installed here: this tree, with the library that is built in it, which any torch loads."""
    packages = Path(run(python, "-c", PACKAGES, stdout=subprocess.PIPE).stdout.strip())
    for file in importlib.metadata.files("ddst") or []:
        if ".." not in file.parts and "__pycache__" not in file.parts:
            (packages / file).parent.mkdir(exist_ok=True)
            shutil.copy(str(file.locate()), packages / file)


def outcome(python: Path, tests: list[str]) -> tuple[int, list[str], list[str]]:
    """(exit code, lines on failures, the counts in pytest's last line) of the tests."""
    ignored = [f"--ignore={ROOT / file}" for file in LEFT_OUT]
    command = [python.with_name("pytest"), "-q", "-m", "not torture", "-p", "no:cacheprovider", *ignored, *tests]
    print("+", *command, flush=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    lines = []
    with subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as done:
        assert done.stdout is not None
        for line in done.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (
        done.returncode,
        bad,
        re.findall(r"\d+ (?:passed|failed|skipped|errors?|deselected)", lines[-1] if lines else ""),
    )


def commit() -> str:
    """The commit of this tree, marked where files differ from it."""
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def write(tested: str, versions: str, tests: list[str], code: int, bad: list[str], counts: list[str]) -> None:
    torch, triton, numpy, python = versions.split()
    lines = [
        "# The tests with the newest torch and Triton",
        "",
        "Written by `make test-newest`, which is run by hand.",
        "",
        f"- {datetime.date.today()}, commit {tested}",
        f"- torch {torch}, Triton {triton}, numpy {numpy}, Python {python}",
        "- the library as built with the headers of the torch that pyproject.toml names",
        f"- `{' '.join(tests)}` without `{' '.join(LEFT_OUT)}`",
        f"- {', '.join(counts) or 'no tests ran'}; pytest's exit code {code}",
        *(["", "```", *bad, "```"] if bad else []),
    ]
    RESULT.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", default=TESTS, help="files and folders (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument(
        "--venv", type=Path, metavar="DIR", help="where the environment is made and kept; used if there"
    )
    parser.add_argument("--torch", metavar="VERSION", help="not the newest one")
    options = parser.parse_args()
    if options.torch and options.write:
        parser.error(f"--write: {RESULT.name} is of the newest torch")
    with tempfile.TemporaryDirectory() as temporary:
        python = (options.venv or Path(temporary) / "venv").absolute() / "bin" / "python"
        if not python.exists():
            prepare(python, options.torch)
        install(python)
        versions = run(python, "-P", "-c", VERSIONS, stdout=subprocess.PIPE).stdout.strip()
        tested = commit()
        result = outcome(python, options.tests)
        if options.write:
            write(tested, versions, options.tests, *result)
    return result[0]


if __name__ == "__main__":
    sys.exit(main())
