"""Several processes train like one: the same losses and exact scores; if one stops or dies, all do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from shared_bn_on_cpu import of_one_process
from shared_fixtures import FEW
from support import ROOT, metrics, run, wait_for

from repan_cli import checkpoint, config
from repan_cli.models import repvgg_cifar
from repan_cli.session.build import prepare
from repan_cli.training.events import Epoch
from repan_cli.training.loop import fit

RUN = "--model repvgg_a0 --dataset digits data.batch_size=128 run.precision=fp32 --seed 3 --lr 0.05".split()  # noqa: SIM905
EPOCH = 10  # 1,295 images: the 15 behind the last full batch are one more


def torchrun(*arguments, restarts=0, program=("-m", "repan_cli"), **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts), *map(str, program)]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def two_ranks(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "two_ranks.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process, seconds=240):
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


class Halves:
    """A task whose network sees each half of a batch by itself, as two ranks do."""

    def __init__(self, task):
        self.task, self.prepared = task, task.prepared

    def __call__(self, model, batch):
        if not model.training or not torch.is_grad_enabled():
            return self.task(model, batch)
        halves = [batch.images.tensor_split(2)[number] for number in (0, 1)]
        logits = torch.cat([model(half) for half in halves])
        return self.task.loss(logits, batch.labels), logits


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A run of two ranks, of the network of `few_blocks`."""
    return made_by(two_ranks, tmp_path_factory.mktemp("ranks") / "run")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The same of the whole network, started by torchrun."""
    return made_by(torchrun, tmp_path_factory.mktemp("deep") / "run")


def made_by(start, folder):
    code, out = ended(start("train", *RUN, "--epochs", "2", "--out", folder))
    assert code == 0, out
    return folder, out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "depths"), [("together", FEW), pytest.param("deep", repvgg_cifar.DEPTHS_A, marks=pytest.mark.soak)]
)
def test_two_ranks_train_as_one_process_whose_bn_sees_the_same_halves(request, monkeypatch, made, depths):
    folder, _ = request.getfixturevalue(made)
    monkeypatch.setattr(repvgg_cifar, "DEPTHS_A", depths)
    given = {"model.name": "repvgg_a0", "data.name": "digits", "data.batch_size": "128", "run.precision": "fp32"}
    given |= {"run.seed": "3", "optim.lr": "0.05", "epochs": "2"}
    session = prepare("train", config.resolve("train", None, given))
    task_of = session.training.task_of
    session.training.task_of = lambda phase: Halves(task_of(phase))
    epochs = [event for event in fit(session.training) if isinstance(event, Epoch)]
    found = metrics(folder)
    assert session.training.train.steps(128) == EPOCH + 1
    assert [row["first_loss"] for row in found[:1]] == pytest.approx([epochs[0].first_loss], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(epochs[0].loss, rel=1e-5)
    weights = checkpoint.load(folder / "last.pt").weights
    for name, value in session.training.model.named_parameters():
        assert (weights[name] - value).norm() < 1e-3 * value.norm() + 1e-5, name


@pytest.mark.soak
def test_two_ranks_with_shared_statistics_train_as_one_process(few_blocks, tmp_path, monkeypatch):
    folder, program = tmp_path / "run", (ROOT / "tests" / "shared_bn_on_cpu.py",)
    words = ("train", *RUN[:-1], "0.002", "--epochs", "1", "run.sync_bn=true")
    code, out = ended(torchrun(*words, "--out", folder, program=program))
    assert code == 0, out
    given = {"model.name": "repvgg_a0", "data.name": "digits", "data.batch_size": "128"}
    given |= {"run.precision": "fp32", "run.seed": "3", "optim.lr": "0.002", "epochs": "1"}
    session = prepare("train", config.resolve("train", None, given))
    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", of_one_process)
    epoch = next(event for event in fit(session.training) if isinstance(event, Epoch))
    (found,) = metrics(folder)
    assert found["first_loss"] == pytest.approx(epoch.first_loss, rel=1e-4)
    assert found["loss"] == pytest.approx(epoch.loss, rel=1e-4)
    assert found["val_loss"] == pytest.approx(epoch.val_loss, rel=1e-4), "by running statistics"
    weights = checkpoint.load(folder / "last.pt").weights
    own = dict(session.training.model.named_parameters())
    one, other = (torch.cat([each[name].detach().flatten() for name in own]) for each in (weights, own))
    assert (one - other).norm() < 1e-4 * other.norm()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["fused"]["rel_error_fp64"] < 1e-10


def test_scores_of_two_ranks_are_those_of_one(few_blocks, together, capsys):
    folder, _ = together
    best = max(row["val_top1"] for row in metrics(folder))
    code, out, _ = run(capsys, "evaluate", folder / "best.pt", "--split", "val", "--json")
    assert code == 0
    assert json.loads(out)["top1"] == pytest.approx(best)
    assert json.loads(out)["images"] == 143


def test_one_rank_speaks_and_writes(together):
    folder, out = together
    assert out.count("repan train") == 1
    assert "cpu, 2 processes, 1 thread" in out
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert [row["epoch"] for row in metrics(folder)] == [1, 2]


def test_sample_shares_of_ranks_are_every_sample_once(digits):
    from repan_cli.data.in_memory import InMemoryLoader

    look = {"mean": digits.mean, "std": digits.std, "device": torch.device("cpu")}
    parts = [InMemoryLoader(digits.train, rank=rank, ranks=3, **look) for rank in range(3)]
    whole = InMemoryLoader(digits.train, **look)
    for batches in zip(*(part.training_batches(64, 0, 0, 1) for part in (*parts, whole)), strict=True):
        assert torch.equal(torch.cat([batch.index for batch in batches[:3]]), batches[3].index)
    looked_at = [batch.index for part in parts for batch in part.batches(50)]
    assert sorted(torch.cat(looked_at).tolist()) == list(range(whole.count))


def workers(launcher):
    """The processes of the ranks, by their parent."""
    found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    return sorted(map(int, found))


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_either_rank_stops_both_and_the_run_resumes(tmp_path, deep, rank):
    folder = tmp_path / "run"
    launcher = torchrun("train", *RUN, "--epochs", "2", "--out", folder)
    wait_for(folder / "last.pt")
    time.sleep(0.5)
    os.kill(workers(launcher)[rank], signal.SIGTERM)
    code, out = ended(launcher, 60)
    assert code == 1, out  # torchrun's own
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
    code, out = ended(torchrun("train", "--resume", folder))
    assert code == 0, out
    expected, found = (checkpoint.load(path / "last.pt").weights for path in (deep[0], folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_soon(tmp_path, rank):
    folder = tmp_path / "run"
    launcher = torchrun("train", *RUN, "--epochs", "50", "--out", folder)
    wait_for(folder / "last_previous.pt")
    os.kill(workers(launcher)[rank], signal.SIGKILL)
    began = time.monotonic()
    code, _ = ended(launcher, 60)
    assert code != 0
    assert time.monotonic() - began < 30


@pytest.mark.soak
@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_restarted_and_the_run_ends_the_same(tmp_path, deep, rank, attempt):
    folder = tmp_path / "run"
    launcher = torchrun("train", *RUN, "--epochs", "2", "--out", folder, "run.save_every=1", restarts=2)
    wait_for(folder / "last_previous.pt")
    time.sleep(0.2 * attempt)
    os.kill(workers(launcher)[rank], signal.SIGKILL)
    code, out = ended(launcher)
    assert code == 0, out
    expected, found = (checkpoint.load(path / "last.pt").weights for path in (deep[0], folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
