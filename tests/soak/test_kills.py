"""Runs that are killed and stopped at any moment, again and again: nothing is lost, and the end is the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from support import ROOT, metrics, start, wait_for

from repan_cli import checkpoint
from repan_cli.errors import InputError

pytestmark = pytest.mark.soak

RUN = "--model repvgg_a0 --dataset digits data.batch_size=128 run.precision=fp32 --seed 5 --lr 0.05".split()  # noqa: SIM905
SAVES = ["run.save_every=2"]

KILLED_INSIDE = """
import os, signal, sys
from pathlib import Path
from repan_cli.cli import app
from repan_cli.system import files

left, moment = int(sys.argv.pop(1)), sys.argv.pop(1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(function, when):
    def watched(*arguments):
        global left
        saving = "last.pt" in str(arguments[0] if when != "write" else arguments[0].name)
        left -= saving
        if saving and left == 0 and when == "before":
            die()
        if saving and left == 0 and when == "write":
            arguments[0].write(b"half of it")
            arguments[0].flush()
            die()
        result = function(*arguments)
        if saving and left == 0 and when == "after":
            die()
        return result
    return watched

if moment == "write":
    files.flush = counted(files.flush, "write")
else:
    Path.replace = counted(Path.replace, moment)
app.main()
"""
MOMENTS = ("before", "after", "write")
"""Of a rename, the older state's or the newer one's; or with half of a file written."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start("train", *RUN, "--epochs", "4", "--out", folder)
    assert process.wait() == 0
    return folder


def readable(folder):
    """How many states of a run can be read."""
    count = 0
    for name in ("last.pt", "last_previous.pt"):
        try:
            checkpoint.load(folder / name)
            count += 1
        except InputError:
            assert not (folder / name).exists(), f"{name} is there and cannot be read"
    return count


def assert_same(folder, whole):
    for name in ("last.pt", "best.pt", "fused.pt"):
        found, expected = checkpoint.load(folder / name), checkpoint.load(whole / name)
        assert all(torch.equal(found.weights[key], expected.weights[key]) for key in expected.weights)
        assert all(torch.equal(found.state[key], expected.state[key]) for key in expected.state)
    assert metrics(folder) == metrics(whole)


def kill_until_done(folder, kills, launch):
    """Begin or go on with a run and kill it, so many times; then let it end."""
    for _ in range(kills):
        begun = (folder / "last.pt").exists() or (folder / "last_previous.pt").exists()
        process = launch("--resume" if begun else "--out", folder)
        if process is None:
            break
    ended = start("train", "--resume", folder)
    _, err = ended.communicate(timeout=300)
    assert ended.returncode == 0 or "is finished" in err, err


@pytest.mark.parametrize("seed", range(10))
def test_five_kills_at_random_moments_lose_nothing(tmp_path, whole, seed):
    draw, folder = random.Random(seed), tmp_path / "run"

    def launch(option, path):
        given = [*RUN, "--epochs", "4", *SAVES] if option == "--out" else []
        process = start("train", *given, option, path)
        wait_for(path / "last.pt" if option == "--out" else path / ".lock")
        time.sleep(draw.uniform(0, 0.6) + (2.5 if option == "--resume" else 0))
        process.kill()
        process.communicate()
        assert readable(path) >= 1
        return process

    kill_until_done(folder, 5, launch)
    assert_same(folder, whole)


@pytest.mark.parametrize("seed", range(10))
def test_five_kills_inside_a_save_lose_nothing(tmp_path, whole, seed):
    draw, folder = random.Random(seed), tmp_path / "run"

    def launch(option, path):
        given = [*RUN, "--epochs", "4", *SAVES] if option == "--out" else []
        nth = draw.randint(3, 9) if option == "--out" else draw.randint(1, 6)
        command = [
            sys.executable,
            "-c",
            KILLED_INSIDE,
            str(nth),
            draw.choice(MOMENTS),
            "train",
            *given,
            option,
            str(path),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode in (-signal.SIGKILL, 0) or "is finished" in done.stderr, done.stderr
        assert readable(path) >= 1
        return done if done.returncode == -signal.SIGKILL else None

    kill_until_done(folder, 5, launch)
    assert_same(folder, whole)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=["SIGTERM", "SIGINT", "SIGUSR1"]
)
@pytest.mark.parametrize("moment", [0.0, 0.4, 1.1])
def test_signals_are_honoured_at_any_moment(tmp_path, number, to_group, workers, moment):
    folder = tmp_path / "run"
    images = [f"data.workers={workers}", "data.augment=randaugment"] if workers else []
    process = start("train", *RUN, "--epochs", "60", *images, "--out", folder, start_new_session=True)
    wait_for(folder / "last.pt")
    time.sleep(moment)
    began = time.monotonic()
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == (130 if number == signal.SIGINT else 75), err
    state = "interrupted" if number == signal.SIGINT else "preempted"
    assert json.loads((folder / "status.json").read_text())["state"] == state
    assert readable(folder) >= 1
    assert "Traceback" not in err
