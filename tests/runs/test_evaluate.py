"""ddst evaluate: what stands beside a figure, and that the figures are those of torch-fidelity and by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddst
from ddst.cli import main
from ddst.metrics import Moments, frechet_of_moments, read_reference
from ddst.metrics.inception import FEATURES, Inception, to_bytes
from ddst.models import Generator
from ddst.runs.sample import draw, noise_of
from ddst.train.generator import read_generator, write_generator
from helpers.fidelity import import_fidelity, inception_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inception_weights(tmp_path_factory.mktemp("weights") / "made.pth")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def test_figures_say_what_they_depend_on(
    sparse_run: Path, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = tmp_path / "real.npz"
    command = ["evaluate", str(sparse_run), "--weights", str(weights), "--samples", "11"]
    real = ["--data", str(photos), "--statistics", str(statistics)]
    assert main([*command, *real, "--metrics", "prdc,fid,is"]) == 0
    lines = capsys.readouterr().out.splitlines()
    held = json.loads((sparse_run / "evaluation.json").read_text())
    names = ["precision", "recall", "density", "coverage", "fid", "is"]
    assert [f["metric"] for f in held["figures"]] == [line.split()[0] for line in lines] == names
    assert held["step"] == 14 and held["versions"]["ddst"] == ddst.__version__
    fid = held["figures"][4]
    assert fid["samples"] == 11 and fid["real"] == 7
    assert fid["split"] == f"{photos}, training"
    assert fid["resizer"] == "ddst.data's to 8; the network's bilinear to 299 (TensorFlow 1)"
    assert lines[4].endswith(
        f": 11 samples against 7 real ones ({photos}, training); ddst.data's to 8; the network's bilinear to 299 "
        "(TensorFlow 1)"
    )
    assert ": 11 samples (no real images in it); " in lines[5]
    assert held["figures"][0]["more"] == {"k": 5}
    assert 1 <= held["figures"][5]["value"] < 11

    # The same figures by hand: the generator's images as bytes, torch-fidelity's network and distance.
    generator, network = ddst.load_generator(sparse_run), Inception(weights)
    made = to_bytes(torch.cat(list(draw(generator, noise_of(generator, 11, 0)))))
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(photos.iterdir())])
    found, fake = network.features([torch.from_numpy(pixels).permute(0, 3, 1, 2)]).pool, network.features([made])
    assert fid["value"] == pytest.approx(frechet_of_moments(Moments.of(found), Moments.of(fake.pool)), rel=1e-4)
    pytest.importorskip("scipy")
    import_fidelity()
    from torch_fidelity.metric_isc import isc_features_to_metric

    score = isc_features_to_metric(fake.logits, splits=10)
    assert held["figures"][5]["value"] == pytest.approx(score["inception_score_mean"], rel=1e-6)

    # The statistics that were written give the same distance, and say what they are of.
    # Digits are beside the run's own images all the same.
    assert main([*command, "--reference", str(statistics), "--metrics", "fid,digits"]) == 0
    line, of_digits = capsys.readouterr().out.splitlines()
    *earlier, again, digits = json.loads((sparse_run / "evaluation.json").read_text())["figures"]
    assert [f["metric"] for f in earlier] == names  # Other images than the file's: FID of both is kept.
    assert "11 samples against 1,797 real ones (digits, training)" in of_digits
    assert digits["split"] == "digits, training" and again["resizer"] == fid["resizer"]
    assert again["value"] == pytest.approx(fid["value"], rel=1e-6) and again["real"] == 7
    assert f": 11 samples against 7 real ones (real.npz, of {photos}, training); ddst.data's to 8; " in line
    assert read_reference(statistics, FEATURES).images is None
    # Other people's say that they do not say how many.
    with np.load(statistics) as held:
        np.savez(tmp_path / "other.npz", mu=held["mu"], sigma=held["sigma"])
    assert main([*command, "--reference", str(tmp_path / "other.npz"), "--metrics", "fid"]) == 0
    assert "11 samples against a file's statistics (other.npz); of a file that does" in capsys.readouterr().out


def test_digits_need_no_weights(sparse_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(sparse_run), "--samples", "30"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("digits ") and "30 samples against 1,797 real ones (digits, training)" in first
    assert main(["evaluate", str(sparse_run), "--samples", "30", "--seed", "1"]) == 0
    assert capsys.readouterr().out.split()[1] != first.split()[1]
    held = json.loads((sparse_run / "evaluation.json").read_text())
    assert held["seed"] == 1 and len(held["figures"]) == 1  # Those of another seed are not beside it.


def test_the_default_metric_is_that_of_the_data(
    sparse_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, about = read_generator(sparse_run)
    colour = replace(about, settings={**about.settings, "method": "dense", "data": "shapes"}, channels=3)
    write_generator(tmp_path / "g.safetensors", Generator(8, 16, 3, 16), colour)
    assert main(["evaluate", str(tmp_path / "g.safetensors"), "--samples", "11"]) == 0
    assert capsys.readouterr().out.startswith("shapes ")


def test_images_that_lie_elsewhere_now(sparse_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator, about = read_generator(sparse_run)
    file = tmp_path / "g.safetensors"
    write_generator(file, generator, replace(about, settings={**about.settings, "data": str(tmp_path / "gone")}))
    for given, told in (([], True), (["--data", str(tmp_path / "gone")], False)):
        assert main(["evaluate", str(file), *given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "gone does not exist" in line and line.endswith("; --data PATH says where they lie now") == told
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "wnids.txt").write_text("n01\n")
    assert main(["evaluate", str(file), "--held-out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "val_annotations.txt: No such file" in line and "--data" not in line  # they lie where they were


def _forget_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch_fidelity", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_network_needs_no_torchvision(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    _forget_fidelity(monkeypatch)
    monkeypatch.syspath_prepend(tmp_path)
    found = Inception(weights).features([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
    assert found.pool.shape == (2, FEATURES)
    # Whoever wants the package gets it whole, or its own error.
    assert not [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]


def test_without_torch_fidelity_one_line_says_what_to_install(
    sparse_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _forget_fidelity(monkeypatch)
    monkeypatch.setattr("ddst.metrics.inception.find_spec", lambda name: None)
    (tmp_path / "weights.pth").write_bytes(b"")
    assert main(["evaluate", str(sparse_run), "--metrics", "fid", "--weights", str(tmp_path / "weights.pth")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "ddst evaluate: error: torch_fidelity is missing: pip install --no-deps torch-fidelity"


def test_what_is_missing_is_one_line(
    sparse_run: Path,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = tmp_path / "stats.npz"
    np.savez(pictures, mu=np.zeros(FEATURES), sigma=np.eye(FEATURES))
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    torch.save({k: v for k, v in state.items() if k != "Mixed_7c.branch1x1.conv.weight"}, tmp_path / "less.pth")
    torch.save({"net": torch.nn.ReLU()}, tmp_path / "code.pth")
    few = tmp_path / "few"
    few.mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8)).save(few / f"{i}.png")
    # All is said before an image is drawn.
    monkeypatch.setattr("ddst.runs.evaluate.draw", lambda *_: pytest.fail("images were drawn"))
    run, given = str(sparse_run), ["--weights", str(weights)]
    for arguments, message in (
        (["--metrics", "fid"], "metric fid needs the weights of Inception-v3 as a local file (--weights FILE"),
        (["--metrics", "kid"], "--metrics must be some of digits, shapes, fid, is, prdc joined by commas, got 'kid'"),
        (["--statistics", str(tmp_path / "new.npz")], "--statistics are those of the Inception network: they need"),
        (
            ["--metrics", "shapes,digits", "--statistics", str(tmp_path / "new.npz")],
            "--statistics are those of the Inception network: they need",
        ),
        (["--weights", "/nope"], "--weights has no effect with --metrics digits, only with fid, is and prdc"),
        (["--reference", "/nope"], "--reference has no effect with --metrics digits, only with fid and prdc"),
        (
            ["--metrics", "fid", *given, "--reference", str(pictures), "--statistics", str(tmp_path / "new.npz")],
            "--statistics are those of real images, and --reference stands in their place: leave one out",
        ),
        (
            ["--metrics", "fid", *given, "--reference", str(pictures), "--data", "/nope"],
            "--data has no effect with --metrics fid and --reference, which stands in the images' place",
        ),
        (["--metrics", "is,fid", *given, "--reference", str(pictures), "--held-out"], "--held-out has no effect with"),
        (["--data", str(few)], "metric fid needs the weights of Inception-v3 as a local file (--weights FILE"),
        (["--statistics", str(tmp_path / "new")], "--statistics must end in .npz, got"),
        (["--statistics", str(tmp_path / "no" / "new.npz")], f"there is no folder {tmp_path / 'no'}"),
        (["--metrics", "prdc", *given, "--data", str(few)], "metric prdc needs at least 6 real images, got 5"),
        (
            ["--metrics", "fid", *given, "--reference", str(few / "0.png")],
            "is no .npz file, damaged, or holds more than",
        ),
        (
            ["--metrics", "prdc", *given, "--reference", str(pictures)],
            "holds no images (arr_0), which metric prdc needs",
        ),
        (["--metrics", "fid", "--weights", str(tmp_path / "none")], "cannot be read: No such file"),
        (
            ["--metrics", "fid", "--weights", str(tmp_path / "other.pth")],
            "fc.weight is [1000, 2048], expected [1008, 2048]",
        ),
        (["--metrics", "fid", "--weights", str(tmp_path / "less.pth")], "Mixed_7c.branch1x1.conv.weight is missing"),
        (["--metrics", "fid", "--weights", str(tmp_path / "code.pth")], "more than tensors and plain values"),
        (["--data", str(tmp_path / "none")], "'digits' or 'shapes')"),
        (["--held-out"], "digits sets no images aside"),
    ):
        assert main(["evaluate", run, *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ddst evaluate: error: ") and message in line
