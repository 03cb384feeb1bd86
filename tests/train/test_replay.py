"""`ddst replay`: with the run's settings its own decisions, with others what the rule says of the same measurements."""

import json
import sys

import pytest

from ddst.cli import main
from ddst.data import load_images
from ddst.train import Trainer, resolve, train
from ddst.train.options import ConfigError
from ddst.train.replay import replay, table
from helpers.runs import TINY

SETTINGS = {**TINY, "interval_d": 3, "delta": 0.1, "br_window": 2}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The folder of a run of a method, made once."""
    made = {}

    def folder(method, **settings):
        if method not in made:
            made[method] = tmp_path_factory.mktemp(method)
            config = resolve({**SETTINGS, "method": method, **settings, "out": str(made[method])})
            train(Trainer(config, load_images("digits", 8)))
        return made[method]

    return folder


@pytest.mark.parametrize(
    ("method", "bounds"), [("ddst-relaxed", (0.09, 0.12)), ("ddst-strict", (-2e9, -1e9)), ("ddst-ada", (0.3, 0.5))]
)
def test_with_the_runs_settings_the_decisions_are_its_own(run_of, method, bounds):
    result = replay(run_of(method, bounds=bounds), {})
    assert len(result.replayed) == 4
    assert result.replayed == result.logged
    assert {d.action for d in result.replayed.values()} != {"keep"}
    assert table(result).endswith("0 of 4 decisions are not the run's")


def test_other_settings_decide_otherwise_from_the_same_measurements(run_of):
    folder = run_of("ddst-relaxed", bounds=(0.09, 0.12))
    result = replay(folder / "log.jsonl", {"bounds": (-2e9, -1e9), "delta": 0.2, "density_d_max": 0.6})
    assert [d.action for d in result.replayed.values()] == ["grow", "grow", "keep", "keep"]
    densities = [d.new_density for d in result.replayed.values()]
    assert densities[0] == pytest.approx(result.logged[3].density + 0.2)
    assert densities[1] == pytest.approx(0.6)  # D goes on from what was asked for, not from the run's
    strict = replay(folder, {"bounds": (-2e9, -1e9), "delta": 0.2}, mode="strict")
    assert [d.action for d in strict.replayed.values()] == ["grow", "exchange", "exchange", "exchange"]
    rarer = replay(folder, {"interval_d": 6})
    assert list(rarer.replayed) == [6, 12]
    # Before the run's first decision D's ends are those of that one.
    sooner = replay(folder, {"bounds": (2e9, 3e9), "delta": 0.9, "interval_d": 2})
    assert sooner.replayed[2].new_density == pytest.approx(next(iter(result.logged.values())).lowest)
    by_sign = replay(folder, {}, signal="real_sign")
    assert by_sign.rule.bounds == (0.55, 0.65)
    assert all("sign of D(x)" in d.reason for d in by_sign.replayed.values())


def test_decisions_that_do_the_same_are_the_runs_whatever_their_reasons(run_of):
    folder = run_of("ddst-strict", bounds=(-2e9, -1e9))
    result = replay(folder, {"bounds": (-3e9, -2e9)})
    assert result.replayed != result.logged  # the bounds stand in the reasons
    assert table(result).endswith("0 of 4 decisions are not the run's")


def test_a_run_that_steers_nothing_shows_what_the_rule_would_have_done(run_of):
    result = replay(run_of("static"), {"interval_d": 5, "warmup": 0, "bounds": (-2e9, -1e9)})
    assert not result.logged
    assert [d.action for d in result.replayed.values()] == ["grow", "grow"]
    assert "  -  " in table(result)


def test_the_command_writes_table_and_picture(run_of, capsys, tmp_path, monkeypatch):
    folder, picture = run_of("ddst-relaxed", bounds=(0.09, 0.12)), tmp_path / "again.png"
    assert main(["replay", str(folder), "--bounds", "0.2", "0.3", "--delta", "0.2", "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "relaxed, balance_ratio within 0.2 and 0.3, delta 0.2" in said and f"written: {picture}" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["replay", str(folder), "--out", str(tmp_path / "none.png")]) == 0
    assert "no picture: matplotlib is missing" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "cannot read nowhere: No such file or directory"),
        (["--out", "again.jpg"], "--out must end in .png, got again.jpg"),
        (["--out", "no/again.png"], "--out no/again.png cannot be written: there is no folder no"),
        (["--bounds", "0.6", "0.5"], "--bounds must be LO not above HI, got 0.6 0.5"),
        (["--br-window", "0"], "--br-window must be at least 1"),
        (["--density-d-min", "0.9", "--density-d-max", "0.5"], "--density-d-min must not be above"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(run_of, capsys, arguments, message):
    folder = [] if arguments[0] == "nowhere" else [str(run_of("ddst-relaxed", bounds=(0.09, 0.12)))]
    assert main(["replay", *folder, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ddst replay: error: {message}") and said.count("\n") == 1


def test_the_log_of_a_version_with_other_settings_is_replayed(run_of, tmp_path):
    folder = run_of("ddst-relaxed", bounds=(0.09, 0.12))
    first, *lines = (folder / "log.jsonl").read_text().splitlines()
    start, log = json.loads(first), tmp_path / "log.jsonl"

    def written(**changes):
        settings = {**start["settings"], **changes}
        settings = {name: value for name, value in settings.items() if value != "absent"}
        log.write_text("\n".join([json.dumps({**start, "settings": settings}), *lines]) + "\n")
        return log

    assert replay(written(grace="absent", connected="absent", gone=3), {}).replayed == replay(folder, {}).replayed
    with pytest.raises(ConfigError, match="setting 'br_every' is missing"):
        replay(written(br_every="absent"), {})


def test_a_log_without_settings_or_measurements_is_refused(run_of, tmp_path):
    lines = (run_of("ddst-relaxed", bounds=(0.09, 0.12)) / "log.jsonl").read_text().splitlines()
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ConfigError, match=r"log\.jsonl is no log of ddst train: none of its lines holds the settings"):
        replay(log, {})
    log.write_bytes(b"\x89PNG\r\n\0" * 9)
    with pytest.raises(ConfigError, match=r"log\.jsonl is no log of ddst train"):
        replay(log, {})
    bare = [json.dumps({**json.loads(line), "sample": None}) if '"loss_d"' in line else line for line in lines]
    log.write_text("\n".join(bare) + "\n")
    with pytest.raises(
        ConfigError, match="holds no measurement of the balance ratio: it has 14 steps, measured every 1"
    ):
        replay(log, {})
    for key, value in (("sample", {"ratio": 0.5}), ("sample", {"alpha": "x", "beta": 1, "sign": 9}), ("window", 3)):
        odd = [json.dumps({**entry, key: value}) if key in (entry := json.loads(line)) else line for line in lines]
        log.write_text("\n".join(odd) + "\n")
        with pytest.raises(ConfigError, match="holds a measurement or a decision that no run of this ddst writes"):
            replay(log, {})
