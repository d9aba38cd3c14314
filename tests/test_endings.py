"""The end of a run: a run with its results is done, and a lost terminal, best.pt or log line does not end it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from support import DIGITS, ROOT, metrics, run

from repan_cli import runs
from repan_cli.display import console, plots, tables
from repan_cli.runs import trackers
from repan_cli.session import runner, summary
from repan_cli.system.signals import StopSignals

RUN = ("train", *DIGITS, "--epochs", "1", "data.batch_size=256", "data.per_class=30", "run.precision=fp32")


def state_of(folder):
    return json.loads((folder / "status.json").read_text())["state"]


@pytest.fixture
def finished(capsys, tmp_path, few_blocks):
    code, _, err = run(capsys, *RUN, "--out", tmp_path / "run")
    assert code == 0, err
    return tmp_path / "run"


def failing(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", [(plots, "draw_curves"), (summary, "_report")])
def test_a_failure_after_the_summary_is_a_warning(capsys, tmp_path, monkeypatch, few_blocks, where):
    monkeypatch.setattr(*where, failing)
    code, _, err = run(capsys, *RUN, "--out", tmp_path / "run")
    assert code == 0, err
    assert "No space left" in err
    assert state_of(tmp_path / "run") == "done"


def test_a_resume_marks_a_run_that_has_its_summary_as_done(capsys, finished):
    status = json.loads((finished / "status.json").read_text())
    (finished / "status.json").write_text(json.dumps({**status, "state": "failed"}))
    code, _, err = run(capsys, "train", "--resume", finished)
    assert code == 0
    assert "has its results and is now marked as finished" in err
    assert state_of(finished) == "done"
    code, _, err = run(capsys, "train", "--resume", finished)
    assert code == 2
    assert "is finished" in err


def test_a_stop_behind_the_summary_undoes_nothing(capsys, tmp_path, monkeypatch, few_blocks):
    conclude = runner.conclude

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        conclude(*arguments)

    monkeypatch.setattr(runner, "conclude", interrupted)
    code, _, err = run(capsys, *RUN, "--out", tmp_path / "run")
    assert code == 0, err
    assert state_of(tmp_path / "run") == "done"


def test_a_lost_best_checkpoint_is_reported_and_noted_in_the_summary(capsys, tmp_path, monkeypatch, few_blocks):
    finish = runner.finish

    def without_best(session, folder, *rest):
        (folder / "best.pt").unlink()
        finish(session, folder, *rest)

    monkeypatch.setattr(runner, "finish", without_best)
    code, _, err = run(capsys, *RUN, "--out", tmp_path / "run")
    assert code == 0, err
    assert "best.pt is missing" in err
    assert "the first with the best validation" not in err
    assert "best.pt is missing" in json.loads((tmp_path / "run" / "summary.json").read_text())["chosen"]["note"]


def test_metrics_are_replaced_as_a_whole_and_only_where_something_must_go(tmp_path, monkeypatch, capsys):
    path, table = tmp_path / "metrics.jsonl", tmp_path / "metrics.csv"
    for kind, name in ((trackers.JsonLines, path), (trackers.Csv, table)):
        tracker = kind(name)
        for epoch in (1, 2, 3):
            tracker.log("epoch", epoch, {"cycle": 0, "epoch": epoch, "loss": epoch / 7})
        tracker.close()
    before = path.stat().st_mtime_ns, table.stat().st_mtime_ns, path.stat().st_ino
    trackers.rewind(tmp_path, 0, 3)
    assert (path.stat().st_mtime_ns, table.stat().st_mtime_ns, path.stat().st_ino) == before
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"cycle": 0, "epo', *lines[2:]]) + "\n")
    assert [record["epoch"] for record in trackers.read_metrics(path)] == [1, 3]
    trackers.rewind(tmp_path, 0, 3)
    assert [record["epoch"] for record in trackers.read_metrics(path)] == [1, 3]
    assert "skipped 1 damaged line" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "write_bytes", failing)
        with pytest.raises(OSError, match="No space"):
            trackers.rewind(tmp_path, 0, 1)
    assert len(metrics(tmp_path)) == 2, "nothing is lost where the new file cannot be written"
    trackers.rewind(tmp_path, 0, 1)
    assert len(metrics(tmp_path)) == 1
    assert len(table.read_text().splitlines()) == 2


def test_leftovers_of_kills_go_when_the_run_is_taken_up_and_nothing_else(tmp_path):
    folder = runs.RunDirectory(tmp_path / "run")
    folder.__exit__()
    left = [".last.pt.abcd1234", ".best.pt.x_y_z123", ".cycle_03.pt.00000000", ".status.json.qwertyui"]
    kept = [".fused.pt.abcd1234", ".last.pt", "notes.txt", ".last.pt.backup"]
    for name in (*left, *kept):
        (folder / name).write_text("x")
    with runs.RunDirectory(folder.path, reopen=True):
        assert not any((folder / name).exists() for name in left)
        assert all((folder / name).exists() for name in kept)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_child_does_not_hold_the_lock_of_its_parent(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from repan_cli import runs\n"
        "folder = runs.RunDirectory(Path(sys.argv[1]))\n"
        "child = os.fork()\n"
        "if child == 0: print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    found = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    child = int(found.stdout.readline())
    found.kill()
    found.wait()
    try:
        with runs.RunDirectory(tmp_path / "run", reopen=True):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_hangup_asks_to_stop_unless_nohup_has_begun_the_run():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been begun by nohup
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [5, 32, 28])
def test_a_terminal_that_is_gone_ends_nothing(monkeypatch, number):
    class Gone:
        def write(self, text):
            raise OSError(number, "gone")

        def flush(self):
            raise OSError(number, "gone")

        def fileno(self):
            raise OSError("none")

        def isatty(self):
            return False

        encoding = "utf-8"

    console.on_stderr.cache_clear()
    monkeypatch.setattr(sys, "stderr", Gone())
    console.tell("hello")
    tables.print_table(["a"], [["b"]], to_stderr=True)
    console.on_stderr.cache_clear()


@pytest.mark.slow
def test_libraries_say_nothing_without_a_home(tmp_path):
    """Neither matplotlib, whose folder cannot be made, nor ONNX Runtime, which would report to its makers."""
    code = (
        "import sys; sys.argv = ['repan', '--version']\n"
        "from repan_cli.cli import app\n"
        "try: app.main()\nexcept SystemExit: pass\n"
        "from pathlib import Path; from repan_cli.display import plots\n"
        "plots.draw_confusion([[1, 0], [0, 1]], ['a', 'b'], Path('c.png'), title='t')\n"
        "import onnxruntime"
    )
    (tmp_path / "file").touch()
    nowhere = {"HOME": str(tmp_path / "file"), "MPLCONFIGDIR": str(tmp_path / "file" / "x"), "PATH": os.environ["PATH"]}
    nowhere |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "file")}
    done = subprocess.run([sys.executable, "-c", code], env=nowhere, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("out", "settings", "expected"),
    [
        ("run", (), 1),
        ("run", ("cycle.restart=none",), 0),
        ("run", ("cycle.restart=rescale",), 0),
        ("study/arm/seed_0", (), 0),  # a study's own table compares
    ],
)
def test_a_control_is_suggested_only_to_runs_that_have_none(capsys, tmp_path, few_blocks, out, settings, expected):
    (tmp_path / "study" / "arm").mkdir(parents=True)
    (tmp_path / "study" / "arm" / "arm.yaml").write_text("epochs: 1\n")
    given = ("cycle", *RUN[1:], "--baseline-epochs", "1", "--cycles", "1", *settings)
    code, _, err = run(capsys, *given, "--out", tmp_path / out)
    assert code == 0, err
    assert err.count("--control also trains without restarts") == expected
