"""Programs that begin as copies of one process, which has imported what they all need: seconds each are saved.

A copy is forked and runs as the rest of its interpreter's script, so that it ends as any program does, buffers written
and code returned. The process they are copies of only imports: threads of a computation would be missing in them.
``SERVER`` makes such copies run functions at the same time, as multiprocessing does.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SERVER = multiprocessing.get_context("forkserver")
# One server for all tests of a process, so one list: what the first step of an optimizer imports stands there, too.
SERVER.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "ddst.cli",
        "ddst.train.job",
        "sklearn.datasets",
        "matplotlib.figure",
        "pytest",
    ]
)

# What a copy writes goes to files, which it may still close or replace.
_SERVER = """
import json, os, sys
_folder, _pairs, _codes = sys.argv[1], json.loads(sys.argv[2]), []
sys.argv = sys.argv[:1]
for _number, (_before, _code) in enumerate(_pairs):
    exec(_before)
    _child = os.fork()
    if _child == 0:
        for _stream, _name in ((1, "out"), (2, "err")):
            _file = os.open(f"{_folder}/{_number}.{_name}", os.O_WRONLY | os.O_CREAT)
            os.dup2(_file, _stream)
            os.close(_file)
        break
    _codes.append(os.waitstatus_to_exitcode(os.waitpid(_child, 0)[1]))
else:
    _code = "print(json.dumps(_codes))"
exec(_code)
"""


class Done(NamedTuple):
    """How a copy ended, as of a ``subprocess.CompletedProcess`` of bytes."""

    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def out(self) -> str:
        return self.stdout.decode()

    @property
    def err(self) -> str:
        return self.stderr.decode()


def run_copies(
    programs: Sequence[tuple[str, str]], environment: Mapping[str, str] | None = None, timeout: float = 600
) -> list[Done]:
    """Runs programs one after another, each in a copy, in a folder that is deleted afterwards.

    Args:
        programs: (what is imported before the copy is made, the copy's code). What was imported for one is there
            for the next ones.
        environment: of the process that is copied; default: this one's.
        timeout: seconds for all of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-c", _SERVER, folder, json.dumps(programs)]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        codes = json.loads(done.stdout.splitlines()[-1])
        said = [[Path(folder, f"{n}.{stream}").read_bytes() for stream in ("out", "err")] for n in range(len(codes))]
    return [Done(code, *both) for code, both in zip(codes, said, strict=True)]
