"""A run's generator as a file for other programs: ONNX, or safetensors of packed or of dense weights."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from ddst.convert import densify
from ddst.nn import sparse_layers
from ddst.train.checkpoint import replacing
from ddst.train.generator import read_generator, write_generator
from ddst.train.options import ConfigError
from ddst.train.target import check_target

FORMS = ("onnx", "dense", "safetensors")


def export(source: Path, form: str, out: Path) -> str:
    """Write the averaged generator of a run, always in eval mode; returns a line on what was written.

    Args:
        source: see :func:`ddst.load_generator`.
        form: "onnx": noise (and classes) in, images out, any batch size; packed weights stay packed in the file; what
            a stylegan2 generator draws itself the program that runs the file draws.
            "dense": torch's own layers, as safetensors. "safetensors": packed. `ddst.load_generator` reads both.
        out: the file; it is written whole or not at all.

    Raises:
        CheckpointError: no generator at `source`. ConfigError: `out` exists, or lies where nothing can be written.
        OSError: writing broke off.
    """
    check_target("--out", out)
    if out.exists():
        raise ConfigError(f"--out {out} exists")
    generator, about = read_generator(source)
    packed = len(sparse_layers(generator))
    if form == "onnx":
        content = onnx_of(generator)
        with replacing(out) as file:
            file.write(content)
    else:
        write_generator(out, densify(generator) if form == "dense" else generator, about)
    held = f"{packed} weights packed" if packed and form != "dense" else "all weights dense"
    return f"{form}: generator of step {about.step}, {held}, {out.stat().st_size:,} bytes"


def inputs_of(generator: nn.Module, batch: int) -> tuple[Tensor, ...]:
    """Noise, and class 0 for a generator that takes classes: what it is called with."""
    with_latent: object = generator
    noise = torch.zeros(batch, with_latent.latent)  # type: ignore[attr-defined]
    return (noise, torch.zeros(batch, dtype=torch.int64)) if getattr(generator, "classes", None) else (noise,)


def onnx_of(generator: nn.Module) -> bytes:
    """The ONNX file of a generator in eval mode: inputs "noise" ``[N, latent]`` (and "class" ``[N]``), output "image".

    Raises:
        ModuleNotFoundError: onnxscript or onnx is missing. ConfigError: the exporter fixed the number of images.
    """
    inputs, names = inputs_of(generator, 2), ["noise", "class"]
    with _quiet():
        program = torch.onnx.export(
            generator.eval(),
            inputs,
            input_names=names[: len(inputs)],
            output_names=["image"],
            dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in inputs),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for value in (*model.graph.input, *model.graph.output):
        if (first := value.type.tensor_type.shape.dim[0]).HasField("dim_value"):  # Else it has a name, "batch".
            raise ConfigError(
                f"--onnx: the exporter fixed {value.name!r} at {first.dim_value} images, expected any number: "
                "the generator computes with its batch as a plain number"
            )
    return model.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own progress and of packages that are not needed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
