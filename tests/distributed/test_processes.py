"""`ddst train` as several processes, as torchrun starts them: who writes, what a killed one leaves, how it goes on."""

import signal
import socket
import time
from datetime import timedelta

import pytest
import torch

import ddst
from ddst.train import run
from ddst.train.checkpoint import load_checkpoint
from ddst.train.log import read_log
from ddst.train.options import ConfigError, flag, shown_value
from ddst.train.processes import joined, share
from helpers.programs import Program
from helpers.runs import TINY

ALWAYS_GROW = (-2000000000, -1000000000)
SETTINGS = {**TINY, "batch": 12, "d_steps": 1, "method": "ddst-relaxed", "bounds": ALWAYS_GROW, "checkpoint_every": 2}


@pytest.fixture
def started(tmp_path):
    """Starts `ddst train` as so many processes; whatever is left of them at the end is ended."""
    running = []

    def start(count, out, settings, patience=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["train", "--out", str(out)]
        for name, value in settings.items():
            parts = value if isinstance(value, tuple) and name != "block" else [value]
            words += [flag(name), *([] if value is True else map(shown_value, parts))]
        for rank in range(count):
            there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
            here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
            running.append(Program(words, there | here, tmp_path / f"said by {len(running)}", patience))
        return running[-count:]

    yield start
    for program in running:
        program.process.kill()
        program.process.join()


def wait_for_steps(out, process):
    """Until some steps are logged, with a checkpoint among them."""
    log, waited = out / "log.jsonl", time.monotonic()
    while not (log.exists() and log.read_bytes().count(b"\n") > 12):
        assert process.process.is_alive(), process.said()
        assert time.monotonic() < waited + 120
        time.sleep(0.05)


def check_ended(process):
    """That a process said that another one is gone, and ended."""
    code, said = process.ended(60), process.said()
    assert code == 1, said
    assert said.splitlines()[-1].startswith(
        "ddst train: error: another process of the run has ended, or hangs (after step"
    )
    assert "the last checkpoint stays" in said


def check_whole(out):
    """The step of the checkpoint of a run that broke off, whose folder is free."""
    step = load_checkpoint(out / "checkpoint.pt")["step"]
    assert step >= 2
    assert not (out / "lock").exists()
    return step


def check_steps(out, last):
    log_steps = [entry["step"] for entry in read_log(out / "log.jsonl") if "event" not in entry]
    assert log_steps == list(range(1, last + 1))
    assert load_checkpoint(out / "checkpoint.pt")["step"] == last


def test_a_killed_process_ends_the_others_and_one_process_goes_on(tmp_path, started):
    out = tmp_path / "run"
    writer, other = started(2, out, {**SETTINGS, "steps": 100000})
    wait_for_steps(out, writer)
    other.send(signal.SIGKILL)
    check_ended(writer)
    step = check_whole(out)
    # One process continues what two began, from the same indices and noise.
    assert run({"resume": True, "out": str(out), "stop_after": step + 1}) == 0
    check_steps(out, step + 1)


def test_a_hanging_process_ends_the_others_and_two_processes_go_on(tmp_path, started):
    out = tmp_path / "run"
    writer, other = started(2, out, {**SETTINGS, "steps": 100000}, patience=3)
    wait_for_steps(out, writer)
    other.send(signal.SIGSTOP)
    check_ended(writer)
    step = check_whole(out)
    assert other.process.is_alive()
    other.send(signal.SIGCONT)
    check_ended(other)
    processes = started(2, out, {"resume": True, "stop_after": step + 1})
    codes = [process.ended(120) for process in processes]
    said = [process.said() for process in processes]
    assert codes == [0, 0], said
    assert f"stopped after step {step + 1} of 100000" in said[0]
    assert said[1] == ""
    check_steps(out, step + 1)


def test_processes_wait_for_each_other_for_ten_minutes_at_most(monkeypatch):
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **settings: asked.append(settings))
    with joined():
        pass
    assert asked == [{"timeout": timedelta(minutes=10)}]


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr("ddst.train.processes.ranks", lambda: 3)
    monkeypatch.setattr("ddst.train.processes.rank", lambda: 1)
    assert share(12) == slice(4, 8)
    with pytest.raises(ConfigError, match="--batch must be a multiple of the number of processes, 3, got 32"):
        share(32)


def test_what_is_no_wrapper_cannot_be_watched():
    with pytest.raises(TypeError, match=r"ddp must be a torch\.nn\.parallel\.DistributedDataParallel, got Linear"):
        ddst.watch(torch.nn.Linear(2, 2))
