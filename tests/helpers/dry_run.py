"""`make gpu` on a pretended device: all that it runs is there in tiny sizes, from the build to the last table."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddst import backends
from ddst.benchmarks import registry, tune
from ddst.benchmarks.gpu import (
    __main__ as program,
)
from ddst.benchmarks.gpu import (
    calls,
    correctness,
    environment,
    host_time,
    iteration,
    kernel_rows,
    networks,
    primitives,
    run,
    sweep,
    training,
    workers,
)
from ddst.benchmarks.gpu.networks import Network
from ddst.benchmarks.gpu.problems import Shape
from ddst.benchmarks.registry import Layer
from ddst.kernels import configs, tuning
from ddst.ops.cuda import compiled, gather, hopper, hopper_weight_grad
from helpers import fake_cuda
from helpers import interpreter as interpreter
from helpers.gpu_training import TRAINING

CONV, LINEAR = Layer(16, 32, 1, 2), Layer(32, 16)
SHAPES = (
    Shape("aligned", blocks=(2, 2), size=(4, 3), batch=1, mask="0.4"),
    Shape("linear ragged", blocks=(2, 3), ragged=(7, 5), size=(0, 0), batch=3, mask="lines"),
)
SWEPT = (
    Shape("linear", blocks=(7, 9), size=(0, 0), batch=3),
    Shape("1x2", blocks=(7, 2), size=(3, 4), batch=1, kernel=(1, 2), padding=(0, 1)),
)
#: "Compiles" a shell script: copies it to the name after -o.
COMPILER = '#!/bin/sh\nfor a; do last=$a; case $a in *.cu) from=$a;; esac; done\ncp "$from" "$last"\n'
#: Takes the one piece of machine code out of a library that holds nothing else.
CUOBJDUMP = '#!/bin/sh\nset -- *.so\ncp "$1" code.1.sm_90a.cubin\n'


def cubin(architecture: str, note: bool = True) -> bytes:
    """What :func:`ddst.benchmarks.gpu.objects.described` reads of machine code: by CUDA 13, or by CUDA 12."""
    number = int("".join(c for c in architecture if c.isdigit()))
    flags = 0x6005A04 if note else 0x5A0000 | number | (0x800 if architecture.endswith("a") else 0)
    header = b"\x7fELF" + bytes(12) + struct.pack("<HHIQQQI", 2, 190, 1, 0, 0, 0, flags) + bytes(12)
    return header + (b"-arch " + architecture.encode() + b" -m 64 \0" if note else b"")


class Stage:
    """Where calls of `make gpu` are played."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.out, self.archive = folder, folder / "out", folder / "objects.tar.xz"
        self.builds = 0
        self.build_code = 0
        self._patch = patch

    def script(self, name: str, text: str) -> Path:
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
        return file

    def builder(self, command: list[str], **settings: Any) -> Any:
        """Stands for setup.py."""
        self.builds += 1
        settings["stdout"].write("compiling\nfailed\n" if self.build_code else "compiling\n")
        for name, content in {"libddst.so": b"cpu", "libddst_cuda.so": cubin("sm_90a")}.items():
            run.LIBRARIES.mkdir(exist_ok=True)
            (run.LIBRARIES / name).write_bytes(content)
        return SimpleNamespace(returncode=self.build_code)

    def call(self, *arguments: str) -> int:
        """A call of ``run.py``; its exit code."""
        for cached in (tuning.table_of, tuning.device_name):  # each call is a process of its own
            cached.cache_clear()
        return run.main(["--out", str(self.out), "--objects", str(self.archive), *arguments])


@contextmanager
def staged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A stage, with everything on it small, on a pretended device; afterwards all is as it was."""
    with monkeypatch.context() as patch, fake_cuda.pretended(patch):
        stage = Stage(folder, patch)
        _small(stage, patch)
        try:
            yield stage
        finally:
            for cached in (tuning.table_of, tuning.device_name, tuning.choose):
                cached.cache_clear()


def _small(stage: Stage, patch: pytest.MonkeyPatch) -> None:
    put: Any = patch.setattr
    folder = stage.folder
    (folder / "tree").mkdir()
    # The build and the compiled objects.
    put(run, "ROOT", folder / "tree")
    put(run, "LIBRARIES", folder / "lib")
    put(run, "TRITON", folder / "triton")
    put(run, "subprocess", SimpleNamespace(run=stage.builder, STDOUT=subprocess.STDOUT))
    stage.script("cuobjdump", CUOBJDUMP)
    stage.script("nvidia-smi", "#!/bin/sh\necho 600.1\n")
    patch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))  # which the program sets
    # The device's backends are the CPU's operators.
    put(backends, "supports", lambda name, problem: (True, "pretended"))
    put(compiled, "supports", lambda op, *_: (op != "linear_input_grad", "pretended to be refused"))
    put(backends, "code", lambda name: 0)
    put(gather, "facts", lambda device: gather.Device(132, 227 * 1024, (9, 0)))
    put(hopper, "device_refusal", lambda *_: "")  # it has the forms of the kernels for sm_90a
    put(calls, "FORMS", {name: form for name, form in calls.FORMS.items() if isinstance(form, hopper.Form)})
    put(hopper, "supports", lambda op, *_: (True, "") if op == "conv2d" else (False, "pretended"))
    put(hopper_weight_grad, "supports", lambda *_: (True, ""))
    put(kernel_rows, "FORMED", (CONV.name,))
    put(workers, "run", _inline(workers.run))
    # Parts, each in a small size.
    source = folder / "device" / "probe_device.cu"
    source.parent.mkdir()
    source.write_text("#!/bin/sh\necho fine\n")
    source.chmod(0o755)
    stage.script("nvcc", COMPILER)
    put(primitives, "run_all", partial(primitives.run_all, sources=source.parent))
    put(environment, "measure", partial(environment.measure, size=32, copied=2**16))
    put(correctness, "SHAPES", SHAPES)
    groups = correctness.groups
    put(correctness, "groups", lambda device: _few_groups(*groups(device, ["fp32"], [(16, 16)])))
    for layer in (CONV, LINEAR):
        patch.setitem(registry.LAYERS, layer.name, layer)
    specs = [kernel_rows.Spec(layer.name, 2, "fp32", (16, 16), 1.0) for layer in (CONV, LINEAR)]
    put(kernel_rows, "specs", lambda: specs)
    put(kernel_rows, "measure_all", partial(kernel_rows.measure_all, rounds=1))
    all_of = configs.candidates
    for module in (configs, tuning):
        put(module, "candidates", lambda *asked: all_of(*asked)[:2])
    put(tuning, "TABLES", folder / "tables")
    put(tune, "MATTERING", 1)
    put(tune, "Task", partial(tune.Task, repeats=1))
    put(tune, "tune", partial(tune.tune, rounds=1))
    put(host_time, "measure", partial(host_time.measure, number=1, rounds=1, dtype=torch.float32))
    tiny = Network("tiny", 2, 1, 8, (16, 16), (16, 16), down=1, latent=8)
    for name in networks.NETWORKS:
        patch.setitem(networks.NETWORKS, name, tiny)
    variants = [replace(v, block=(8, 8)) for v in iteration.VARIANTS if v.network == "sngan32" and v.density != 0.5]
    put(iteration, "VARIANTS", variants)
    put(iteration, "measure_all", partial(iteration.measure_all, rounds=1))
    put(training, "train", partial(training.train, steps=8, **TRAINING))
    sweeps = sweep.sweeps
    put(
        sweep,
        "sweeps",
        lambda device: [replace(s, kind="fp32", block=(16, 16), repeats=2, shapes=SWEPT) for s in sweeps(device)[:1]],
    )
    put(program, "ROOT", folder)
    (folder / "Makefile").touch()


def _inline(run_tasks: Any) -> Any:
    return lambda function, tasks, processes, deadline: run_tasks(function, tasks, 0, deadline)


def _few_groups(found: list[Any], refusals: dict[str, str]) -> tuple[list[Any], dict[str, str]]:
    return [replace(group, repeats=2, shapes=SHAPES) for group in found], refusals
