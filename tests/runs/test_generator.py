"""ddst.load_generator: the averaged generator of runs and of files, bit for bit, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ddst
from ddst.nn import sparse_layers
from ddst.runs.export import export
from ddst.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ddst.train.generator import KEY


def average_of(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoint.pt")["ema"]["module"]


@pytest.mark.parametrize("name", ["sparse_run", "dense_run"])
def test_a_run_and_its_checkpoint_hold_the_average(name: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(name)
    random_state = torch.get_rng_state()
    for path in (run, str(run / "checkpoint.pt")):
        generator = ddst.load_generator(path)
        assert not generator.training
        held = average_of(run)
        assert list(generator.state_dict()) == list(held)
        assert all(torch.equal(value, held[key]) for key, value in generator.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert bool(sparse_layers(generator)) == (name == "sparse_run")
    assert generator.classes is None
    images = generator(torch.randn(3, generator.latent))
    assert images.shape == (3, 1, 8, 8) and images.abs().max() <= 1


def test_a_state_dict_says_what_it_holds(sparse_run: Path, tmp_path: Path) -> None:
    generator = ddst.load_generator(sparse_run)
    torch.save(generator.state_dict(), tmp_path / "state.pt")
    metadata = torch.load(tmp_path / "state.pt", weights_only=True)._metadata
    for name, layer in sparse_layers(generator).items():
        facts = metadata[name]["ddst"]
        assert facts["version"] == ddst.__version__
        assert facts["weight_shape"] == list(layer.weight_shape) and facts["block"] == [8, 8]
        assert facts["density"] == layer.density


def test_a_state_dict_of_other_blocks_or_shapes_is_refused_with_both() -> None:
    held = ddst.SparseConv2d(32, 16, 3, density=0.5, block=8).state_dict()
    layer = ddst.SparseConv2d(32, 16, 3, density=0.5, block=16)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"blocks of 8x8 of a 16x32x3x3 weight \(ddst .*blocks of 16x16 of a 16x32x3x3 w"
    ):
        layer.load_state_dict(held)
    with pytest.raises(
        RuntimeError, match=r"values holds blocks of 8x8, this layer has blocks of 16x16 of a 16x32x3x3 w"
    ):
        layer.load_state_dict(dict(held))  # what it said is lost
    other = ddst.SparseConv2d(16, 32, 3, density=0.5, block=16)
    with pytest.raises(RuntimeError, match=r"of a 32x16x3x3 weight \(ddst .*of a 16x32x3x3 weight"):
        layer.load_state_dict(other.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def edited(run: Path, path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A file of the run's generator whose description was changed."""
    export(run, "safetensors", path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    edit(about)
    save_file(tensors, path, {KEY: json.dumps(about)})
    return path


def set_in(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(about: dict[str, Any]) -> None:
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = value

    return edit


LAYER = ("layers", "blocks.0.conv1")


@pytest.mark.parametrize(
    "edit, message",
    [
        (set_in("settings", "width_g", value=32), r"linear is a weight of 256x16, by its settings of 512x16"),
        (
            set_in("settings", "resolution", value=16),
            r"\(sngan of 16x16 pixels, width 16, latent 16, channels 1\): its settings make blocks\.1\.\w+ and \d+ "
            r"more that it lacks, it holds nothing that they do not make$",
        ),
        (
            set_in("settings", "model", value="r3gan"),
            r"\(r3gan of 8x8 .*\): its settings make \S+ and \d+ more that it lacks, it holds blocks.0.bn1 and \d+",
        ),
        (
            set_in("settings", "method", value="dense"),
            r"linear is packed at density 0\.\d+ in blocks of 8x8, by its settings \(--method dense\) dense$",
        ),
        (
            lambda about: about["layers"].pop("linear"),
            r"linear is dense, by its settings \(--method \S+ --density 0\.3 --block 8x8\) packed at density 0\.\d+",
        ),
        (set_in("channels", value=3), r"to_image.weight must have the shape \(3, 16, 3, 3\), got \(1, 16, 3, 3\)"),
        (set_in("settings", "block", value=[16, 16]), r"has blocks of 8x8, by its settings of 16x16"),
        (set_in(*LAYER, "density", value=0.75), r"blocks.0.conv1 has the density 0\.\d+, it says 0.75"),
        (set_in(*LAYER, "block", value=[4, 4]), r"blocks.0.conv1 has blocks of 4x4, by its settings of 8x8"),
        (set_in("settings", "preset", value="large"), r"--preset must be one of .*, got large"),
        (set_in("settings", "colour", value=1), r"unknown setting --colour"),
        (set_in("settings", "width_g", value=10**6), r"no generator of its settings: networks do not fit: .* GB"),
        (set_in("layers", value={"linear": {}}), r"description of its generator is damaged"),
        (set_in("channels", value=10**9), r"description of its generator is damaged"),
        (set_in("classes", value=0), r"description of its generator is damaged: .*classes 0"),
        (set_in("classes", value=2**40), r"description of its generator is damaged: .*classes"),
    ],
)
def test_a_description_that_is_not_that_of_the_tensors_is_refused(
    sparse_run: Path, tmp_path: Path, edit: Callable, message: str
) -> None:
    path = edited(sparse_run, tmp_path / "g.safetensors", edit)
    with pytest.raises(CheckpointError, match=message) as raised:
        ddst.load_generator(path)
    assert "\n" not in str(raised.value) and "g.safetensors" in str(raised.value)


def test_settings_that_a_file_lacks_have_their_defaults(sparse_run: Path, tmp_path: Path) -> None:
    path = edited(sparse_run, tmp_path / "g.safetensors", lambda about: about["settings"].pop("fd_samples"))
    assert torch.equal(ddst.load_generator(path).to_image.weight, average_of(sparse_run)["to_image.weight"])


def test_other_files_are_refused_in_one_line(sparse_run: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_checkpoint(tmp_path / "empty.pt", {"step": 3})
    whole = export(sparse_run, "safetensors", tmp_path / "cut.safetensors") and tmp_path / "cut.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    for name, message in (
        (
            "other.pt",
            "is a zip file such as torch.save writes, .*; expected a checkpoint of ddst train, or a file of ddst exp",
        ),
        ("other.safetensors", "no file of ddst export"),
        ("empty.pt", "holds no generator"),
        ("cut.safetensors", "cannot read"),
        ("none.pt", "no run and no generator"),
    ):
        with pytest.raises(CheckpointError, match=message) as raised:
            ddst.load_generator(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_a_moved_run_is_the_same_run(sparse_run: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse_run, tmp_path / "elsewhere")
    a, b = ddst.load_generator(sparse_run), ddst.load_generator(tmp_path / "elsewhere")
    z = torch.randn(2, a.latent)
    assert torch.equal(a(z), b(z))
