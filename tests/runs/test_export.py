"""ddst export: each form computes what the run's averaged generator computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ddst
from ddst.cli import main
from ddst.models import Generator
from ddst.models.families import FAMILIES, Sizes
from ddst.nn import sparse_layers
from ddst.runs.export import onnx_of
from ddst.train.checkpoint import CheckpointError
from ddst.train.generator import read_generator
from ddst.train.options import ConfigError


def test_packed_and_dense_files(sparse_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ddst.load_generator(sparse_run)
    z = torch.randn(5, run.latent)
    for form in ("safetensors", "dense"):
        path = tmp_path / f"g.{form}"
        assert main(["export", str(sparse_run), f"--{form}", "--out", str(path)]) == 0
        assert capsys.readouterr().out.startswith(f"{path}  {form}: generator of step 14, ")
        generator, about = read_generator(path)
        assert about.step == 14 and about.settings["method"] == "ddst-relaxed"
        torch.testing.assert_close(generator(z), run(z))
        assert bool(sparse_layers(generator)) == (form == "safetensors")
    # The dense one is the state dict of the plain network.
    assert type(generator.linear) is nn.Linear
    plain = Generator(8, 16, 1, 16).eval()
    plain.load_state_dict(generator.state_dict())
    torch.testing.assert_close(plain(z), run(z))


@pytest.mark.parametrize("name", ["sparse_run", "dense_run"])
def test_onnx(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run, path = request.getfixturevalue(name), tmp_path / "g.onnx"
    assert main(["export", str(run), "--onnx", "--out", str(path)]) == 0
    with pytest.raises(
        CheckpointError, match=r"g\.onnx: it is an ONNX file; expected a checkpoint of .* --safetensors"
    ):
        ddst.load_generator(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = ddst.load_generator(run)
    for batch in (1, 7):
        z = torch.randn(batch, generator.latent)
        (images,) = session.run(["image"], {"noise": z.numpy()})
        torch.testing.assert_close(torch.from_numpy(images), generator(z).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_takes_any_number_of_images(family: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    classes, side = (3, 64) if FAMILIES[family].conditional else (1, 8)  # BigGAN's attention begins at 64 pixels.
    generator = FAMILIES[family].generator(Sizes(side, 128 if side == 64 else 16, 16, 20, 3, classes)).eval()
    inputs = [torch.randn(5, 20), *([torch.tensor([0, 2, 1, 1, 0])] if classes > 1 else [])]
    ddst.sparsify(generator, 0.5, block=8, sample=tuple(inputs))
    session = onnxruntime.InferenceSession(onnx_of(generator), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        given = [value[:batch] for value in inputs]
        names = [taken.name for taken in session.get_inputs()]
        (images,) = session.run(["image"], {n: v.numpy() for n, v in zip(names, given, strict=True)})
        torch.testing.assert_close(torch.from_numpy(images), generator(*given).detach(), atol=5e-5, rtol=1e-4)


def test_onnx_of_a_generator_that_fixes_its_batch_is_refused() -> None:
    pytest.importorskip("onnxscript")

    class Fixed(nn.Module):
        latent = 4

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z.reshape(len(z), 1, 2, 2)

    with pytest.raises(ConfigError, match=r"^--onnx: the exporter fixed 'noise' at 2 images, expected any number: "):
        onnx_of(Fixed())


def test_nothing_is_overwritten_and_nothing_half_written(
    sparse_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert main(["export", str(sparse_run), "--dense", "--out", str(taken)]) == 2
    assert main(["export", str(tmp_path), "--dense", "--out", str(tmp_path / "new")]) == 2
    assert main(["export", str(sparse_run), "--dense", "--out", str(tmp_path / "no" / "new")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("ddst export: error: ") for line in errors)
    assert errors[2].endswith(f"new cannot be written: there is no folder {tmp_path / 'no'}")
    assert taken.read_text() == "mine" and list(tmp_path.iterdir()) == [taken]
