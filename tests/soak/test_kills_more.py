"""Kills at random moments of a distillation with a cache and of a series with controls; lost terminals; two resumes."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, assert_same, start, wait_for

pytestmark = pytest.mark.soak

SMALL = "--model repvgg_a0 --dataset digits data.batch_size=128 data.per_class=60 run.precision=fp32 --seed 5".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert start("train", *SMALL, "--epochs", "1", "--out", folder).wait() == 0
    return folder / "best.pt"


def words_of(kind, teacher):
    if kind == "distill":
        return ["distill", *SMALL, "--epochs", "4", "--teacher", teacher, "teacher.cache=views", "run.save_every=2"]
    given = ["--baseline-epochs", "2", "--cycles", "1", "--epochs", "2", "cycle.calibration_images=64"]
    return ["cycle", *SMALL[:-2], *given, "--seeds", "1,2", "--control", "run.save_every=2"]


@pytest.fixture(scope="module", params=["distill", "series"])
def whole(request, tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("whole") / "run"
    words = words_of(request.param, teacher)
    process = start(*words, "--out", folder)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return words, folder


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_change_nothing(tmp_path, whole, seed):
    words, expected = whole
    draw, folder = random.Random(seed), tmp_path / "run"
    for _ in range(6):
        begun = any(folder.glob("**/last.pt")) or (folder / "series.json").exists()
        process = start(words[0], "--resume", folder) if begun else start(*words, "--out", folder)
        if not begun:
            wait_for(folder / "config.yaml")
        try:
            process.wait(draw.uniform(0.1, 3) + (5 if begun else 1))
        except subprocess.TimeoutExpired:
            process.kill()
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL) or "is finished" in err, err
    ended = start(words[0], "--resume", folder)
    _, err = ended.communicate(timeout=300)
    assert ended.returncode == 0 or "is finished" in err, err
    runs = [path.parent.relative_to(expected) for path in expected.glob("**/summary.json")]
    for run in runs:
        for path in (folder / run / "summary.json", expected / run / "summary.json"):
            summary = json.loads(path.read_text())
            (summary.get("control") or {}).pop("run", None)
            path.write_text(json.dumps(summary))
        assert_same(folder / run, expected / run)
    assert not [path for path in folder.glob("**/.*") if path.name not in (".lock",)], "leftovers of kills"


def test_one_of_two_simultaneous_resumes_continues(tmp_path):
    folder = tmp_path / "run"
    process = start("train", *SMALL, "--epochs", "3", "--out", folder)
    wait_for(folder / "last.pt")
    process.kill()
    process.communicate()
    both = [start("train", "--resume", folder) for _ in range(2)]
    texts = [each.communicate(timeout=120)[1] for each in both]
    assert sorted(each.returncode for each in both) == [0, 2], texts
    assert "is being written by" in "".join(texts)


def test_a_hangup_saves_and_a_reader_that_has_seen_enough_ends_nothing(tmp_path):
    process = start("train", *SMALL, "--epochs", "40", "--out", tmp_path / "a")
    wait_for(tmp_path / "a" / "last.pt")
    time.sleep(0.5)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "Stopped: by SIGHUP" in err
    words = " ".join(["train", *SMALL, "--epochs", "2", "--out", str(tmp_path / "b")])
    command = f"set -o pipefail; {sys.executable} -m repan_cli {words} 2>&1 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done
    assert json.loads((tmp_path / "b" / "status.json").read_text())["state"] == "done"
