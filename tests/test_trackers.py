"""Trackers receive each record once, through stops and resumes, and a failing one does not end the run."""

import importlib.util
import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import DIGITS, ROOT, one_line, repan, run

from repan_cli.errors import InputError, OutOfSpaceError
from repan_cli.runs import RunDirectory, trackers
from repan_cli.session import recorder
from repan_cli.system.packages import how_to_install

pytestmark = pytest.mark.usefixtures("few_blocks")

SETTINGS = {"optim.lr": 0.1, "data.name": "digits", "ema.enabled": False, "teacher.name": None, "epochs": 3}


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


def tracked(folder):
    folder.mkdir(exist_ok=True)
    return trackers.TrackedRun(folder, "train", SETTINGS)


def scalars(folder):
    """What TensorBoard shows of a run: for every tag the steps and the values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False).Reload()
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}, read


def leveldb_records(data):
    """The records of a file of W&B's, a LevelDB log behind a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def history(folder):
    """The rows that W&B would be sent, of all the offline runs in a directory, and the ids of those."""
    from wandb.proto import wandb_internal_pb2

    rows, ids = [], set()
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime_ns):
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
            if record.HasField("run"):
                ids.add(record.run.run_id)
    return rows, ids


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


class Broken:
    """A tracker whose network goes away after the first figures."""

    where = "nowhere"

    def __init__(self, run):
        self.taken = []

    def log(self, kind, epochs, figures):
        if self.taken:
            raise ConnectionError("the network is gone")
        self.taken.append(epochs)

    def close(self):
        raise AssertionError("a tracker that was left is left alone")

    @staticmethod
    def problem():
        return None


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS._entries, "broken", Broken)


def test_a_tracker_that_fails_is_left_with_one_warning(tmp_path, broken, capsys):
    (once,) = trackers.open_requested(("broken",), tracked(tmp_path / "run"))
    for epochs in (1, 2, 3):
        once.log("epoch", epochs, {"loss": 1.0})
    once.close()
    err = capsys.readouterr().err
    assert err.count("Warning:") == 1
    gone = (
        "broken failed and is disabled for the rest of the run, which continues (ConnectionError: the network is gone)"
    )
    assert gone in err
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"broken": [1, 0]}


def test_a_run_survives_its_tracker(tmp_path, broken, capsys):
    words = ["train", *DIGITS, "--epochs", 2, "data.batch_size=256", "run.trackers=broken", "--out", tmp_path / "run"]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    assert err.count("the network is gone") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    def refuse(run):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(trackers.TRACKERS._entries, "refusing", refuse)
    with pytest.raises(InputError, match="^run.trackers=refusing cannot begin: no route$"):
        trackers.open_requested(("refusing",), tracked(tmp_path / "run"))


@pytest.mark.parametrize("name", list(trackers.TRACKERS))
def test_a_missing_package_is_reported_before_anything_is_written(capsys, tmp_path, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else found(package))
    line = one_line(capsys, "train", *DIGITS, f"run.trackers={name}", "--out", tmp_path / "run")
    assert line == f"Error: run.trackers={name} needs the package {name}: {how_to_install(name)}\n"
    assert not (tmp_path / "run").exists()


def test_each_has_its_extra():
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for name in trackers.TRACKERS:
        assert f'\n{name} = ["{name}>=' in extras


@pytest.mark.slow
@needs("wandb")
def test_nobody_is_logged_in(tmp_path):
    words = ["train", *DIGITS, "run.trackers=wandb", "--out", tmp_path / "run"]
    result = repan(*words, WANDB_MODE="online", WANDB_API_KEY="", NETRC=str(tmp_path / "none"), HOME=str(tmp_path))
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "Error: run.trackers=wandb: No API key configured" in line
    assert "Or set WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()


@needs("tensorboard")
def test_tensorboard_holds_figures_and_settings(tmp_path):
    tracker = trackers.TensorBoard(tracked(tmp_path / "run"))
    tracker.log("epoch", 1, {"loss": 1.5, "val_top1": None, "best": True, "first_loss": float("nan"), "cycle": 0})
    tracker.close()
    shown, read = scalars(tmp_path / "run")
    assert shown == {"epoch/loss": {1: 1.5}, "epoch/cycle": {1: 0.0}}
    (text,) = read.Tensors("settings")
    assert b"optim.lr: 0.1" in text.tensor_proto.string_val[0]
    metadata = read.SummaryMetadata("_hparams_/session_start_info")
    assert metadata.plugin_data.plugin_name == "hparams"
    assert b"optim.lr" in metadata.plugin_data.content


def ended(tracker):
    """As the end of its process leaves it: W&B's service in the background ends, too."""
    tracker.close()
    if tracker.name == "wandb":
        import wandb

        wandb.teardown()


def reopened(folder, name, epochs):
    """A tracker as a resumed run has it: the metrics were rewound to so many epochs."""
    records = [{"cycle": 0, "epoch": epoch, "loss": float(epoch)} for epoch in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return trackers.open_requested((name,), tracked(folder))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in trackers.TRACKERS])
def test_nothing_is_doubled_or_lost_over_a_resume(tmp_path, offline, name):
    folder = tmp_path / "run"
    first = trackers.open_requested((name,), tracked(folder))[0]
    for epochs in (1, 2, 3):
        first.log("epoch", epochs, {"loss": float(epochs)})
    ended(first)
    again = reopened(folder, name, 2)  # the third was not saved: it is made again
    again.log("epoch", 3, {"loss": 3.0})
    ended(again)
    last = reopened(folder, name, 5)  # the fourth and the fifth did not reach it
    last.log("cycle_end", 5, {"test_top1": 90.0})
    last.log("epoch", 6, {"loss": 6.0})
    ended(last)
    losses = {epochs: float(epochs) for epochs in range(1, 7)}
    if name == "tensorboard":
        shown, read = scalars(folder)
        assert shown["epoch/loss"] == losses
        assert len(read.Scalars("epoch/loss")) == 6
        assert shown["cycle_end/test_top1"] == {5: 90.0}
    else:
        rows, ids = history(folder)
        found = [(row["epochs"], row["epoch/loss"]) for row in rows if "epoch/loss" in row]
        assert found == list(losses.items())
        assert ids == {(folder / "wandb_id.txt").read_text()}
        assert [row["cycle_end/test_top1"] for row in rows if "cycle_end/test_top1" in row] == [90.0]


class Killed(BaseException):
    pass


def killed_in(capsys, monkeypatch, *words, cycle, epoch):
    """Run a command that ends without a chance to save as it would note an epoch."""

    def take(self, event):
        if (event.cycle, event.epoch) == (cycle, epoch):
            raise Killed
        return whole(self, event)

    whole = recorder.Record._take_epoch
    with monkeypatch.context() as patch:
        patch.setattr(recorder.Record, "_take_epoch", take)
        with pytest.raises(Killed):
            run(capsys, *words)
    return capsys.readouterr().err


@pytest.mark.slow
@needs("tensorboard")
def test_a_run_of_cycles_is_tracked_and_so_is_its_resume(capsys, tmp_path, monkeypatch):
    words = "--baseline-epochs 1 --cycles 1 --epochs 2 data.batch_size=256 run.trackers=tensorboard,tensorboard --out"
    err = killed_in(capsys, monkeypatch, "cycle", *DIGITS, *words.split(), tmp_path / "run", cycle=1, epoch=2)
    assert f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}" in err
    code, _, err = run(capsys, "cycle", "--resume", tmp_path / "run")
    assert code == 0, err
    shown, _ = scalars(tmp_path / "run")
    records = trackers.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert shown["epoch/loss"] == {step: pytest.approx(r["loss"]) for step, r in enumerate(records, start=1)}
    assert len(records) == 3
    assert list(shown["cycle_end/test_top1"]) == [1, 3]
    assert list(shown["restart/logit_error"]) == [1]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert shown["final/test_top1"] == {3: pytest.approx(summary["test"]["top1"])}
    assert "final/fused_params_after" in shown


@pytest.mark.slow
@needs("tensorboard")
def test_a_tracker_that_is_asked_for_in_a_resume_gets_what_was_before(capsys, tmp_path, monkeypatch):
    words = "--epochs 2 data.batch_size=256 --out"
    killed_in(capsys, monkeypatch, "train", *DIGITS, *words.split(), tmp_path / "run", cycle=0, epoch=2)
    code, _, err = run(capsys, "train", "--resume", tmp_path / "run", "run.trackers=tensorboard")
    assert code == 0, err
    assert list(scalars(tmp_path / "run")[0]["epoch/loss"]) == [1, 2]


def test_lines_are_on_the_disk_before_the_state_that_counts_on_them(capsys, tmp_path, monkeypatch):
    """If the power failed, a resumed run would go on behind epochs that its metrics lack."""
    done = []
    monkeypatch.setattr(trackers, "flush", lambda file: done.append(Path(file.name).name))
    monkeypatch.setattr(RunDirectory, "replace_last", lambda self, write: done.append("state"))
    words = ("--model", "repvgg_a0_cifar", "--dataset", "digits", "data.per_class=4", "data.batch_size=32")
    run(capsys, "train", *words, "--epochs", "1", "--out", tmp_path / "run")
    assert done[:3] == ["metrics.jsonl", "metrics.csv", "state"]
    assert len(done) == 3 * done.count("state")


def test_a_table_that_an_earlier_version_began_keeps_its_columns(tmp_path):
    """Rows with more figures than the header would stand under the wrong titles."""
    path = tmp_path / "metrics.csv"
    path.write_text("cycle,epoch,loss\r\n0,1,2.5\r\n")
    table = trackers.Csv(path)
    table.log("epoch", 2, {"cycle": 0, "first_loss": 9.0, "epoch": 2, "loss": 1.5, "steps": 7})
    table.close()
    assert path.read_text().splitlines() == ["cycle,epoch,loss", "0,1,2.5", "0,2,1.5"]


def test_a_full_disk_hides_no_other_error_and_leaves_no_tracker_open(tmp_path, monkeypatch):
    closed = []

    def full(*_):
        raise OutOfSpaceError("no space left")

    monkeypatch.setattr(recorder.checkpoint, "save", full)
    record = recorder.Record.__new__(recorder.Record)
    record.best, record.folder = object(), tmp_path
    record.trackers = [SimpleNamespace(close=lambda: closed.append(True))]
    record.close()
    assert closed == [True]
