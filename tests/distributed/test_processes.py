"""`ddst train` as several processes, as torchrun starts them: who writes, what a killed one leaves, how it goes on."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import ddst
from ddst.train import run
from ddst.train.checkpoint import load_checkpoint
from ddst.train.log import read_log
from ddst.train.options import ConfigError, flag
from ddst.train.processes import share
from helpers.runs import TINY

ALWAYS_GROW = (-2000000000, -1000000000)
SETTINGS = {**TINY, "batch": 12, "d_steps": 1, "method": "ddst-relaxed", "bounds": ALWAYS_GROW, "checkpoint_every": 2}


@pytest.fixture
def started():
    """Starts `python -m ddst train` as so many processes; whatever is left of them at the end is ended."""
    running = []

    def start(count, out, settings):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = [sys.executable, "-m", "ddst", "train", "--out", str(out)]
        for name, value in settings.items():
            words.append(flag(name))
            if value is not True:
                words += (
                    ["8x8"] if name == "block" else [str(v) for v in (value if isinstance(value, tuple) else [value])]
                )
        for rank in range(count):
            there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
            here = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
            running.append(
                subprocess.Popen(
                    words,
                    env={**os.environ, **there, **here},
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        return running

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_process_ends_the_others_and_one_process_goes_on(tmp_path, started):
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    writer, other = started(2, out, {**SETTINGS, "steps": 100000})
    waited = time.monotonic()
    while not (log.exists() and log.read_bytes().count(b"\n") > 12):
        assert writer.poll() is None, writer.stdout.read()
        assert time.monotonic() < waited + 120
        time.sleep(0.05)
    other.send_signal(signal.SIGKILL)
    said, _ = writer.communicate(timeout=60)
    assert writer.returncode == 1
    assert said.splitlines()[-1].startswith(
        "ddst train: error: another process of the run has ended, or hangs (after step"
    )
    assert "the last checkpoint stays" in said
    step = load_checkpoint(out / "checkpoint.pt")["step"]
    assert step >= 2
    assert not (out / "lock").exists()
    # One process continues what two began, from the same indices and noise.
    assert run({"resume": True, "out": str(out), "stop_after": step + 1}) == 0
    log_steps = [entry["step"] for entry in read_log(log) if "event" not in entry]
    assert log_steps == list(range(1, step + 2))
    assert load_checkpoint(out / "checkpoint.pt")["step"] == step + 1


def test_two_processes_meet_the_images_and_noise_of_one(tmp_path, started):
    processes = started(2, tmp_path / "two", {**SETTINGS, "stop_after": 6})
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "stopped after step 6 of 14" in said[0]
    assert said[1] == ""
    assert run({**SETTINGS, "stop_after": 6, "out": str(tmp_path / "one")}) == 0
    two, one = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("two", "one"))
    assert torch.equal(two["noise"], one["noise"])
    assert torch.equal(two["sampler"]["generator"], one["sampler"]["generator"])
    assert two["sampler"]["used"] == one["sampler"]["used"] == 72
    # D has no batch norm: its first loss is that of one process, though G normalises each share by itself.
    first = [next(e for e in read_log(tmp_path / name / "log.jsonl") if e.get("step") == 1) for name in ("two", "one")]
    assert first[0]["loss_d"] == pytest.approx(first[1]["loss_d"], rel=0.2)
    assert [e["action"] for e in read_log(tmp_path / "two" / "log.jsonl") if e.get("event") == "decision"] == ["grow"]


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr("ddst.train.processes.ranks", lambda: 3)
    monkeypatch.setattr("ddst.train.processes.rank", lambda: 1)
    assert share(12) == slice(4, 8)
    with pytest.raises(ConfigError, match="--batch must be a multiple of the number of processes, 3, got 32"):
        share(32)


def test_python_m_ddst():
    done = subprocess.run([sys.executable, "-m", "ddst", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ddst ")


def test_what_is_no_wrapper_cannot_be_watched():
    with pytest.raises(TypeError, match=r"ddp must be a torch\.nn\.parallel\.DistributedDataParallel, got Linear"):
        ddst.watch(torch.nn.Linear(2, 2))
