"""The command line: one clear line and code 2 for everything wrong, nothing overwritten, help with all defaults."""

import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from ddst import __version__, cli
from ddst.data import DataError
from ddst.train.checkpoint import load_checkpoint, save_checkpoint
from ddst.train.config import OPTIONS
from ddst.train.folder import versions
from ddst.train.options import flag, shown_value
from helpers.copies import run_copies
from helpers.runs import TINY, checkpoint_of, tiny


def words_of(settings):
    """Settings as words of the command line."""
    return [word for name, value in settings.items() for word in (flag(name), *shown_value(value).split())]


WORDS = words_of(TINY)
# What only `ddst train` needs.
TRAIN_ONLY = ["sklearn", "matplotlib", "PIL", "tqdm", "safetensors"]


def code_of(arguments):
    try:
        return cli.main([str(a) for a in arguments])
    except SystemExit as leaving:  # How argparse ends.
        return leaving.code


def assert_one_line(capsys, *contains):
    said = capsys.readouterr()
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("ddst")
    for words in contains:
        assert words in said.err
    assert "Traceback" not in said.err


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def finished(tmp_path):
    """A run stopped after its second step."""
    out = tmp_path / "finished"
    assert code_of(["train", *WORDS, "--out", out, "--stop-after", 2]) == 0
    return out


def test_whole_words_reach_the_run(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--method", "ddst-strict", "--bounds", "0.4", "0.7", "--betas", "0.1", "0.8", "--steps", "3"]
    assert code_of(["train", *WORDS, *words, "--out", out]) == 0
    said = capsys.readouterr()
    assert "ddst-strict, 3 steps" in said.out
    assert "3/3" in said.err  # The progress bar.
    config = checkpoint_of(out)["config"]
    assert (config["bounds"], config["betas"], config["block"]) == ((0.4, 0.7), (0.1, 0.8), (8, 8))
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert first["settings"]["method"] == "ddst-strict"


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (["--speed", "11"], "--speed"),
        (["--metho", "static"], "ddst train: error: unrecognized arguments: --metho static (did you mean --method?)"),
        (["--stpes=3"], "unrecognized arguments: --stpes=3 (did you mean --steps?)"),
        (["folder"], "unrecognized arguments: folder (ddst train --help lists what there is)"),
        (["--steps", "many"], "--steps: expected a whole number, got 'many'"),
        (["--steps", "-3"], "--steps must be at least 1 and at most 2147483647, got -3"),
        (["--density", "1.5"], "--density must be above 0 and at most 1, got 1.5"),
        (["--density", "0.001"], "--density 0.001: "),
        (["--density", "half"], "--density: expected a number, got 'half'"),
        (["--method", "magic"], "--method"),
        (["--block", "16"], "--block: expected ROWSxCOLUMNS such as 16x16"),
        (["--bounds", "0.5"], "--bounds"),
        (["--bounds", "0.6", "0.5"], "--bounds must be LO not above HI"),
        (["--resolution", "20"], "--resolution must be"),
        (["--density", "1"], "--density must be below 1 with --method ddst-relaxed"),
        (["--method", "sdst-rigl", "--density", "1.0"], "--density must be below 1 with --method sdst-rigl"),
        (["--method", "sdst-set", "--grown-second-moment", "score"], "--grown-second-moment score needs gradient"),
        (["--br-eps", "inf"], "--br-eps must be at least 0 and finite, got inf"),
        (["--lr", "inf"], "--lr must be above 0 and at most 1e20, got inf"),
        (["--lr", "1e300"], "--lr must be above 0 and at most 1e20, got 1e+300"),
        (["--fd-samples", "2147483647"], "--fd-samples must be at least 2 and at most 1000000, got 2147483647"),
        (["--batch", "2147483647"], "--batch, --resolution, --width-g and --width-d do not fit"),
        (["--resolution", "1073741824"], "images of this --resolution do not fit"),
        (["--drop-fraction-d", "0.5"], "--drop-fraction-d has no effect with --method ddst-relaxed"),
        (["--sn-noise", "inf"], "--sn-noise must be from 0 to 1, got inf"),
        (["--seed", "99999999999999999999"], "--seed must be at least 0 and below 2**63, got 99999999999999999999"),
        (["--br-window", "9" * 20], "--br-window must be at least 1 and at most 2147483647"),
        (["--threads", "99999"], "--threads must be at least 0 and at most 1024"),
        (["--width-g", "2000000000"], "--width-g, --width-d and --latent do not fit"),
        (["--block", "64x64"], "--density 0.3: density 0.3 cannot be met with blocks of 64x64"),
        (["--data", ""], "--data must not be empty"),  # As a path it would be the present folder.
        (["--inception", ""], "--inception must not be empty"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", "x" * 300, "--resume"], "File name too long"),
    ],
)
def test_wrong_settings_are_one_line_with_code_2(tmp_path, capsys, words, contains):
    out = tmp_path / "run"
    assert code_of(["train", *WORDS, "--out", out, *words]) == 2
    assert_one_line(capsys, contains)
    assert not out.exists()


def test_what_only_the_library_refuses_is_one_line_that_names_the_option(tmp_path, capsys, monkeypatch):
    def refuses(*args, **kwargs):
        raise TypeError("drop_fraction must be\nsomething else")

    monkeypatch.setattr("ddst.train.scheduler.DDST", refuses)
    assert code_of(["train", *WORDS, "--out", tmp_path / "run"]) == 2
    assert_one_line(capsys, "error: --drop-fraction must be something else")
    assert not (tmp_path / "run").exists()


def test_what_judges_it_is_there_before_a_run_begins(tmp_path, capsys, monkeypatch):
    def missing(trainer):
        raise DataError("weights none cannot be read: No such file or directory")

    monkeypatch.setattr("ddst.train.job.Judging", missing)
    assert code_of(["train", *WORDS, "--out", tmp_path / "run"]) == 2
    assert_one_line(capsys, "weights none cannot be read")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["ddst-relaxed", "ddst-strict", "sdst-rigl"])
def test_discriminator_may_start_dense(tmp_path, method):
    """And shrinks where the method steers its density."""
    out = tmp_path / "run"
    settings = tiny(method=method, density_d=1.0, bounds=(2.0, 3.0), steps=6, fd_samples=2)
    assert code_of(["train", *words_of(settings), "--out", out, "--stop-after", "6"]) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    densities = [e["density_d"] for e in log if "loss_d" in e]
    assert densities[0] == 1
    assert densities[-1] == (1 if method == "sdst-rigl" else pytest.approx(0.95, abs=0.02))


def test_out_is_required(capsys):
    assert code_of(["train"]) == 2
    assert_one_line(capsys, "--out DIR is required")
    assert code_of(["train", "--resume"]) == 2
    assert_one_line(capsys, "--out DIR is required")
    assert code_of([]) == 2
    assert_one_line(capsys, "COMMAND")


def test_wrong_folders_are_one_line_with_code_2(tmp_path, capsys):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(broken / "a.png")
    (broken / "b.jpg").write_bytes(b"no image at all")
    before = contents(tmp_path)
    given = [word for word in words_of(tiny(data="FOLDER")) if word not in ("--data", "FOLDER")]
    for folder, *words in (
        (empty, "holds no image file", str(empty)),
        (broken, "cannot read image", str(broken)),
        ("no/such/folder", "data folder no/such/folder does not exist"),
        ("no\nfolder", "data folder no\\nfolder does not exist"),
    ):
        assert code_of(["train", *given, "--data", folder, "--out", tmp_path / "run"]) == 2
        assert_one_line(capsys, *words)
    assert contents(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_existing_run_is_not_overwritten(finished, capsys):
    before = contents(finished)
    capsys.readouterr()
    assert code_of(["train", *WORDS, "--out", finished]) == 2
    assert_one_line(capsys, "already holds a run", "--resume")
    assert contents(finished) == before


def test_out_that_is_a_file_or_cannot_be_made(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for out, words in ((file, "is not a folder"), (file / "below", "--out")):
        assert code_of(["train", *WORDS, "--out", out]) == 2
        assert_one_line(capsys, words)
    assert file.read_text() == "mine"


def test_resume_with_other_settings_names_the_setting(finished, capsys):
    before = contents(finished)
    capsys.readouterr()
    for words, contains in (
        (["--density", "0.5"], "--density 0.5: the run in --out has --density 0.3"),
        (["--method", "static"], "--method static: the run in --out has --method ddst-relaxed"),
        (["--block", "4x4"], "--block 4x4: the run in --out has --block 8x8"),
    ):
        assert code_of(["train", "--resume", "--out", finished, *words]) == 2
        assert_one_line(capsys, contains)
    assert contents(finished) == before


def test_resume_without_or_with_a_damaged_checkpoint(finished, tmp_path, capsys):
    capsys.readouterr()
    assert code_of(["train", "--resume", "--out", tmp_path / "nothing"]) == 2
    assert_one_line(capsys, "no checkpoint to resume from")
    assert not (tmp_path / "nothing").exists()
    checkpoint = finished / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    before = contents(finished)
    assert code_of(["train", "--resume", "--out", finished]) == 2
    assert_one_line(capsys, "cannot read checkpoint")
    assert contents(finished) == before


def test_a_checkpoint_that_does_not_fit_is_one_line_that_names_file_and_part(finished, capsys):
    """Nothing on the disk changes, the log that would be cut included."""
    with (finished / "log.jsonl").open("a") as log:
        log.write("{}\n")
    path, state = finished / "checkpoint.pt", load_checkpoint(finished / "checkpoint.pt")
    for change, words in (
        ({"step": "2"}, "checkpoint.pt does not fit its run: step must be a whole number"),
        ({"step": 3}, "optimizer_g.0.step must be 3, got entries from 2 to 2"),
        ({"sampler": [1]}, "checkpoint.pt does not fit its run: sampler must be a dict, got a list"),
        ({"config": {**state["config"], "steps": 0}}, "checkpoint.pt does not fit any run: config: --steps must be at"),
        ({"config": {**state["config"], "density": 0.001}}, "cannot be continued here: config: --density 0.001: "),
        ({"config": 1}, "checkpoint.pt does not fit any run: config: settings must be a dict"),
        ({"log": {**state["log"], "bytes": 20}}, "log.bytes, 20, is not where the lines of step 2 end"),
        ({"images": "0"}, "cannot resume: the images of --data digits have changed"),
        ({"new": 1}, "checkpoint.pt does not fit its run: new is unknown"),
    ):
        save_checkpoint(path, {**state, **change})
        before = contents(finished)
        capsys.readouterr()
        assert code_of(["train", "--resume", "--out", finished]) == 2
        assert_one_line(capsys, words)
        assert contents(finished) == before


def test_resume_whose_log_is_gone_begins_a_new_one_and_says_so(finished, capsys):
    (finished / "log.jsonl").unlink()
    capsys.readouterr()
    assert code_of(["train", "--resume", "--out", finished, "--stop-after", 4]) == 0
    assert "log.jsonl is missing: a new one is begun after step 2" in capsys.readouterr().out
    entries = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert entries[0]["settings"]["density"] == 0.3
    assert [e["step"] for e in entries if "loss_d" in e] == [3, 4]
    assert code_of(["train", "--resume", "--out", finished]) == 0  # With a gap in the log there is a report, too.
    assert (finished / "report.png").exists()


def test_a_damaged_line_of_the_log_is_told_before_training(finished, capsys):
    log = finished / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"loss_d"', b'"lost_d"', 1))
    capsys.readouterr()
    assert code_of(["train", "--resume", "--out", finished]) == 0
    said = capsys.readouterr().out
    assert 0 < said.index("log.jsonl: line 2 is damaged, the report leaves it out") < said.index("written:")
    assert (finished / "report.png").exists()


def test_going_on_with_other_versions_is_not_silent(finished, capsys):
    state = load_checkpoint(finished / "checkpoint.pt")
    assert state["versions"] == versions()
    assert json.loads((finished / "log.jsonl").read_text().splitlines()[0])["versions"] == versions()
    assert {"ddst", "torch", "python", "numpy"} <= versions().keys()
    save_checkpoint(finished / "checkpoint.pt", {**state, "versions": {**versions(), "torch": "2.9.9"}})
    capsys.readouterr()
    assert code_of(["train", "--resume", "--out", finished, "--stop-after", 3]) == 0
    assert (
        f"warning: written with torch 2.9.9, going on with {versions()['torch']}: numbers may"
        in capsys.readouterr().out
    )


def test_loss_that_is_not_finite_ends_with_code_1(tmp_path, capsys):
    out = tmp_path / "run"
    assert code_of(["train", *WORDS, "--lr", "1e20", "--out", out]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("ddst train: error: loss is not finite at step")
    assert checkpoint_of(out)["step"] == 0  # The last whole state is still there.


def test_help_shows_every_option_with_its_default(capsys):
    assert code_of(["train", "--help"]) == 0
    # Lines are broken behind hyphens, too.
    said = "".join(capsys.readouterr().out.split())
    for name, declared in OPTIONS.items():
        assert flag(name) in said
        if declared.shown:
            assert "".join(f"(default: {declared.shown})".split()) in said
    for text in (
        "ranks them within each layer or over the network",
        "of a layer or, with --scope global and changes of D's density, of the network",
        "mean_of_ratios leaves out samples whose denominator is not above --br-eps",
    ):
        assert "".join(text.split()) in said
    for default in (
        "(default: demo 0.5 1.0, published 0.45 0.55, there dda 0.5 0.65; ddst-ada 0.55 0.65)",
        "(default: 16x16)",
        "(default: 1, ddst-strict 0.5)",
    ):
        assert "".join(default.split()) in said


def test_version_and_info(capsys):
    assert code_of(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ddst ")
    assert code_of(["info"]) == 0
    assert json.loads(capsys.readouterr().out)["ddst"] == __version__


def test_version_help_and_info_need_torch_only():
    without = f"import sys; sys.modules.update(dict.fromkeys({TRAIN_ONLY!r})); import run_ddst, torch"
    words = ("--version", "--help", "info")
    programs = [(without, f"sys.argv.append({word!r}); sys.exit(run_ddst.main())") for word in words]
    for word, done in zip(words, run_copies(programs), strict=True):
        assert (done.returncode, done.err) == (0, "")
        assert word == "--help" or __version__ in done.out


# Imported before the interrupt comes, and what it comes at the import of.
INTERRUPTED = [("", "torch"), ("import torch", "ddst.gan"), ("import ddst.cli", "PIL"), ("", "ddst.train.job")]


def test_ctrl_c_while_importing_is_one_line(tmp_path):
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests in the background have it ignored
        "class Interrupt:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "import run_ddst\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "sys.argv += {words!r}\n"
        "sys.exit(run_ddst.main())\n"
    )
    words = ["train", "--out", str(tmp_path / "run")]
    programs = [(before, code.format(module=module, words=words)) for before, module in INTERRUPTED]
    for done in run_copies(programs):
        assert done.returncode == 130
        assert done.err in ("ddst: interrupted\n", "ddst train: interrupted\n")
    assert not (tmp_path / "run").exists()


# What a program that is started so has for its standard streams.
STREAMS = {
    "closed": "os.close(1); os.close(2); sys.stdout = sys.stderr = None",
    "full": "full = os.open('/dev/full', os.O_WRONLY); os.dup2(full, 1); os.dup2(full, 2)",
    "ascii": "sys.stdout.reconfigure(encoding='ascii', errors='strict')",
}


def test_a_stream_that_is_closed_or_full_does_not_stop_a_run(tmp_path):
    imported = "import run_ddst, ddst.train.job, sklearn.datasets, matplotlib.figure, torch._dynamo"  # by optimizers
    outs = {name: tmp_path / f"{name}\n" for name in STREAMS}
    arguments = {name: ["train", *words_of({**TINY, "steps": 2}), "--out", str(out)] for name, out in outs.items()}
    programs = [
        (imported, f"{streams}\nsys.argv += {arguments[name]!r}\nsys.exit(run_ddst.main())")
        for name, streams in STREAMS.items()
    ]
    for out, done in zip(outs.values(), run_copies(programs), strict=True):
        assert done.returncode == 0, done.err
        assert (out / "summary.json").exists()
        lines = (out / "log.jsonl").read_text().splitlines()
        assert [json.loads(line).get("step") for line in lines if "loss_d" in line] == [1, 2]
    lines = done.out.splitlines()
    assert f"  {str(out)[:-1]}\\n/log.jsonl  every step and decision, one JSON object per line" in lines
    assert any(line.startswith("Fr\\xe9chet distance") for line in lines)


def test_runs_as_a_program(tmp_path, monkeypatch, capsys):
    for module in ("ddst", "ddst.cli"):
        monkeypatch.delitem(sys.modules, "ddst.cli" if module == "ddst.cli" else "ddst.__main__", raising=False)
        monkeypatch.setattr(sys, "argv", ["x", "train", "--density", "7", "--out", str(tmp_path / "x")])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert said.err == "ddst train: error: --density must be above 0 and at most 1, got 7.0\n"
        assert said.out == ""
