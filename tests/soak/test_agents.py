"""The README's multi-node command, with two agents on loopback: kills, other data, other settings, no shared folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from support import ROOT, metrics, wait_for, write_folders

from repan_cli import checkpoint

pytestmark = pytest.mark.soak

RUN = "--model repvgg_a0 --dataset digits data.batch_size=128 run.precision=fp32 --seed 3 --lr 0.05".split()  # noqa: SIM905


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def agent(node, port, *arguments, restarts=0, log):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--max-restarts", str(restarts)]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    launch += ["--rdzv-conf", f"is_host={int(node == 0)}", "-m", "repan_cli"]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *map(str, arguments)]
    with log.open("w") as text:
        return subprocess.Popen(command, env=environment, stdout=text, stderr=text)


def worker_of(launcher):
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    return int(found[0])


def both(tmp_path, given, *, restarts=0):
    """Start two agents with the words of each; returns them and their logs."""
    port, logs = free_port(), [tmp_path / f"agent{node}.txt" for node in (0, 1)]
    started = [agent(node, port, *given[node], restarts=restarts, log=logs[node]) for node in (0, 1)]
    return started, logs


def ended(agents, logs, seconds=180):
    ends, codes = time.monotonic() + seconds, []
    try:
        codes = [each.wait(max(1, ends - time.monotonic())) for each in agents]
    finally:
        for each in agents:
            if each.poll() is None:
                each.send_signal(signal.SIGTERM)
    return codes, "".join(log.read_text() for log in logs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agents")
    words = ["train", *RUN, "--epochs", "2", "--out", folder / "run"]
    codes, text = ended(*both(folder, [words, words]))
    assert codes == [0, 0], text
    return folder / "run"


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_a_killed_worker_of_two_agents_is_restarted_and_the_run_ends_the_same(tmp_path, whole, killed, delay, shared):
    outs = [tmp_path / "run", tmp_path / ("run" if shared else "elsewhere")]
    given = [["train", *RUN, "--epochs", "2", "run.save_every=1", "--out", out] for out in outs]
    agents, logs = both(tmp_path, given, restarts=3)
    wait_for(tmp_path / "run" / "last_previous.pt")
    time.sleep(delay)
    os.kill(worker_of(agents[killed]), signal.SIGKILL)
    codes, text = ended(agents, logs)
    assert codes == [0, 0], text
    assert "from where it stopped" in text
    folder = next(out for out in outs if (out / "summary.json").exists())
    expected, found = (checkpoint.load(path / "last.pt").weights for path in (whole, folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours, theirs = metrics(folder), metrics(whole)  # sums over ranks are pooled at each save: their last bits move
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)


def folders(root, change):
    write_folders(root, count=8)
    if change == "labels":
        (root / "train" / "ant" / "0.png").rename(root / "train" / "bee" / "8.png")
    elif change == "names":
        (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "other.png")
    elif change == "pixels":
        write_folders(root.with_name("others"), count=8, seed=1)
        (root.with_name("others") / "train/ant/0.png").replace(root / "train/ant/0.png")
    elif change == "fewer":
        (root / "train" / "ant" / "7.png").unlink()
    return root


@pytest.mark.parametrize(
    ("change", "says"),
    [("labels", "the training labels"), ("fewer", "the training images"), ("pixels", "the training pixels")],
)
def test_other_images_on_a_node_are_refused_by_name(tmp_path, change, says):
    roots = [folders(tmp_path / "a", None), folders(tmp_path / "b", change)]
    own = "--model repvgg_a0_cifar --dataset folder data.image_size=8 data.val_fraction=0 --batch-size 4 --epochs 1"
    given = [["train", *own.split(), "--data-root", root, "--out", tmp_path / "run"] for root in roots]
    codes, text = ended(*both(tmp_path, given), 90)
    assert 0 not in codes, text
    assert f"ranks differ in {says}" in text
    assert "on rank 1" in text
    assert not (tmp_path / "run").exists()


def test_other_settings_on_a_node_are_refused_by_name(tmp_path):
    given = [["train", *RUN, "--epochs", epochs, "--out", tmp_path / "run"] for epochs in (2, 3)]
    codes, text = ended(*both(tmp_path, given), 90)
    assert 0 not in codes, text
    assert "ranks differ in setting epochs: 3 on rank 1, 2 on rank 0" in text


def test_a_signal_to_one_agent_saves_and_another_world_size_resumes(tmp_path):
    words = ["train", *RUN, "--epochs", "20", "--out", tmp_path / "run"]
    agents, logs = both(tmp_path, [words, words])
    wait_for(tmp_path / "run" / "last_previous.pt")
    agents[1].send_signal(signal.SIGTERM)
    _, text = ended(agents, logs, 90)
    state = json.loads((tmp_path / "run" / "status.json").read_text())["state"]
    assert state == "preempted", text
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    again = subprocess.Popen(
        [sys.executable, "-m", "repan_cli", "train", "--resume", tmp_path / "run"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    ends = time.monotonic() + 90
    while json.loads((tmp_path / "run" / "status.json").read_text())["state"] != "running":
        assert time.monotonic() < ends, "the run does not go on"
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 75, err
    assert "processes 2 is now 1" in err
