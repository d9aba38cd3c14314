"""A resumed run is bit-for-bit identical to an uninterrupted one: every sample once, nothing lost."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, StopAt, as_older_version, assert_same, metrics, one_line, run, start, wait_for

from repan_cli import checkpoint, config, runs
from repan_cli.compare import records
from repan_cli.compare.results import read_result
from repan_cli.data import digits
from repan_cli.data.batches import Loader
from repan_cli.data.subset import stratified
from repan_cli.session import recorder, resume
from repan_cli.session.recorder import Record
from repan_cli.system import files
from repan_cli.training import loop
from repan_cli.training.events import CycleEnd, CycleStart, Epoch

BATCH = 72
FEW_IMAGES = f"data.per_class=45 data.batch_size={BATCH}"
SMALL = f"--model repvgg_a0 --dataset digits {FEW_IMAGES} run.precision=fp32 run.log_every=2 --seed 3".split()


def words(command, folder, teacher=None):
    if command == "cycle":
        rates = "--lr 0.02 --baseline-lr 0.02 cycle.attach=ramp cycle.attach_epochs=1 --teacher previous"
        length = "--baseline-epochs 1 --cycles 2 --epochs 2 ema.enabled=true ema.decay=0.9 cycle.start_from=best"
        return [*SMALL, *length.split(), *rates.split(), "--out", folder]
    given = ["--teacher", teacher] if command == "distill" else []
    return [*SMALL, "--epochs", "3", *given, "--out", folder]


@pytest.fixture(autouse=True)
def saving_every_epoch(monkeypatch, few_blocks):
    """However short it is: what is saved must not depend on the clock here."""
    monkeypatch.setattr(recorder, "SAVING_SHARE", float("inf"))


def stopped(capsys, command, *arguments, at, **options):
    """Run until a signal comes; exit code and what was said."""
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, at, **options)
        code, _, err = run(capsys, command, *arguments)
    return code, err


def resumed(capsys, command, folder, *more):
    code, _, err = run(capsys, command, "--resume", folder, *more)
    assert code == 0, err
    return err


@pytest.fixture
def whole(made_once, capsys, saving_every_epoch):
    """Runs of each command that were never stopped."""

    def of(command):
        def make(folder):
            teacher = of("train") / "best.pt" if command == "distill" else None
            code, _, err = run(capsys, command, *words(command, folder / "run", teacher))
            assert code == 0, err

        return made_once(f"whole_{command}", make) / "run"

    return of


STEPS = {"train": 18, "distill": 18, "cycle": 30}
"""Updates of each run: 6 an epoch."""

POINTS = {
    command: sorted({1, 2, 5, 6, 7, 8, 9, 12, 13, total // 2 + 2, total - 1, total}) for command, total in STEPS.items()
}


@pytest.mark.parametrize(
    ("command", "at"),
    [(command, at) for command in STEPS for at in POINTS[command]],
)
@pytest.mark.soak
def test_a_run_stopped_after_any_update_ends_with_the_same_bits(capsys, tmp_path, whole, command, at):
    expected, folder = whole(command), tmp_path / "run"
    code, err = stopped(capsys, command, *words(command, folder, whole("train") / "best.pt"), at=at)
    assert code == 75
    assert f"continue with: repan {command} --resume {folder}" in err
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
    resumed(capsys, command, folder)
    assert_same(folder, expected)


@pytest.mark.slow
def test_a_run_with_short_epochs_saves_few_of_them_and_loses_nothing(capsys, tmp_path, whole, monkeypatch):
    """Saving takes a small share of the time; what a crash leaves out is trained again, to the same bits."""
    expected, folder = whole("cycle"), tmp_path / "run"
    take, epochs = Record.take, []

    def failing(taker, event):
        take(taker, event)
        epochs.extend([event] if isinstance(event, Epoch) else [])
        if len(epochs) == 3:
            raise RuntimeError("a crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "SAVING_SHARE", 0.0)
        patch.setattr(Record, "take", failing)
        with pytest.raises(RuntimeError, match="a crash"):
            run(capsys, "cycle", *words("cycle", folder))
    saved = checkpoint.load(folder / "last.pt").card.run.progress
    assert (saved["phase"], saved["epoch"]) == (1, 0), "the end of the baseline"
    best, kept = max(epochs, key=lambda event: event.val_top1), checkpoint.load(folder / "best.pt").card
    assert (kept.cycle, kept.epoch) == (best.cycle, best.epoch)
    resumed(capsys, "cycle", folder)
    assert_same(folder, expected)


@pytest.mark.soak
@pytest.mark.parametrize("kind", [CycleStart, Epoch, CycleEnd])
def test_a_run_stopped_around_a_restart_ends_with_the_same_bits(capsys, tmp_path, whole, kind):
    expected, folder = whole("cycle"), tmp_path / "run"
    code, _ = stopped(capsys, "cycle", *words("cycle", folder), at=2, kind=kind)
    assert code == 75
    resumed(capsys, "cycle", folder)
    assert_same(folder, expected)


@pytest.mark.soak
def test_five_stops_in_one_epoch_repeat_and_miss_no_sample(capsys, tmp_path, whole, monkeypatch):
    seen = []
    make = Loader.training_batches

    def watched(source, batch_size, *position, first=0):
        for batch in make(source, batch_size, *position, first=first):
            if position[2] == 1 and batch_size == BATCH:
                seen.append(batch.index)
            yield batch

    monkeypatch.setattr(Loader, "training_batches", watched)
    folder = tmp_path / "run"
    arguments = words("train", folder)
    for attempt in range(5):
        given = arguments if attempt == 0 else ["--resume", folder]
        code, _ = stopped(capsys, "train", *given, at=1)
        assert code == 75
    monkeypatch.undo()
    index = torch.cat(seen[:5])
    assert len(index.unique()) == len(index) == 5 * BATCH
    resumed(capsys, "train", folder)
    assert_same(folder, whole("train"))


def test_ctrl_c_saves_and_says_how_to_continue(capsys, tmp_path, whole):
    folder = tmp_path / "run"
    code, err = stopped(capsys, "train", *words("train", folder), at=8, number=signal.SIGINT)
    assert code == 130
    assert f"interrupted, everything is saved; continue with: repan train --resume {folder}" in err
    resumed(capsys, "train", folder)
    assert_same(folder, whole("train"))


# ---------------------------------------------------------------------------------------------- what may change


@pytest.fixture
def begun(capsys, tmp_path):
    """A run of `cycle` that was stopped."""
    folder = tmp_path / "run"
    short = ["--baseline-epochs", "1", "--cycles", "1", "--epochs", "1", "cycle.calibration_images=64"]
    code, _ = stopped(capsys, "cycle", *SMALL, *short, "cycle.schedule=restart", "--out", folder, at=3)
    assert code == 75
    return folder


def test_settings_that_change_the_computation_cannot_change(capsys, begun):
    for change in (
        "optim.lr=0.3",
        "--epochs=2",
        "data.batch_size=64",
        "run.seed=4",
        "baseline.epochs=2",
        "cycle.rule=reset",
    ):
        err = one_line(capsys, "cycle", "--resume", begun, change)
        assert "cannot change on --resume (it was " in err
        assert f"--init {begun / 'last.pt'}" in err
    assert "cannot be combined with --resume" in one_line(capsys, "cycle", "--resume", begun, "-c", "recipes/cifar")
    assert "cannot be combined with --resume" in one_line(capsys, "cycle", "--resume", begun, "--out", "x")
    assert "is a run of 'repan cycle'" in one_line(capsys, "train", "--resume", begun)
    assert "unknown setting 'optim.lrr'" in one_line(capsys, "cycle", "--resume", begun, "optim.lrr=1")


def test_a_run_of_an_older_version_has_its_settings(capsys, begun):
    """By the names that the settings have now: a name that is lost would mean the default."""
    _, saved = resume.newest_state(begun)
    expected = resume._changed(saved, {}, begun)
    assert expected.cycle.schedule == "restart", "not the default"
    _, older = resume.newest_state(as_older_version(begun))
    assert older.card.config["cycle.lr"] == "restart"
    assert resume._changed(older, config.parse_assignments(["cycle.lr=restart"]), begun) == expected
    resume._warn_of_edits(older, begun)
    assert "changed" not in capsys.readouterr().err
    assert "cycle.schedule cannot change on --resume (it was restart)" in one_line(
        capsys, "cycle", "--resume", begun, "cycle.schedule=continuous"
    )


@pytest.mark.soak
def test_a_run_of_an_older_version_ends_with_the_same_bits(capsys, begun, tmp_path):
    expected = tmp_path / "expected"
    shutil.copytree(begun, expected)
    resumed(capsys, "cycle", expected)
    err = resumed(capsys, "cycle", as_older_version(begun))
    assert "cycle.lr" not in err
    assert_same(begun, expected)


@pytest.mark.soak
def test_the_same_value_more_cycles_and_workers_may_be_given(capsys, begun):
    resumed(
        capsys, "cycle", begun, "--model", "repvgg_a0", f"data.batch_size={BATCH}", "data.workers=0", "--cycles", "2"
    )
    assert len(json.loads((begun / "summary.json").read_text())["cycles"]) == 2
    refused = one_line(capsys, "cycle", "--resume", begun)
    assert "is finished; to train more than its 2 cycles, give --cycles N" in refused
    resumed(capsys, "cycle", begun, "--cycles", "3")
    assert len(json.loads((begun / "summary.json").read_text())["cycles"]) == 3
    assert [(row["cycle"], row["epoch"]) for row in metrics(begun)] == [(0, 1), (1, 1), (2, 1), (3, 1)]


@pytest.mark.slow
def test_a_resume_on_another_machine_is_noted(capsys, begun):
    """Once for each change, and not for a resume in the same place."""
    file = begun / "env.json"
    first = {**json.loads(file.read_text()), "gpu": "H100"}
    file.write_text(json.dumps(first))
    for before in ({}, {"python": "3.1"}):
        for _ in range(2):
            stopped(capsys, "cycle", "--resume", begun, at=1)
        found = json.loads(file.read_text())
        assert found == {**first, "resumed": found["resumed"]}
        assert [each["gpu"] for each in found["resumed"]] == [None] * (1 + len(before))
        first["resumed"] = [{**found["resumed"][0], "python": "3.1"}]
        file.write_text(json.dumps(first))
    file.write_text("damaged")
    resumed(capsys, "cycle", begun)
    assert file.read_text() == "damaged"


def test_cycles_that_a_resume_adds_are_among_the_settings_of_the_run(capsys, begun):
    resumed(capsys, "cycle", begun, "--cycles", "2")
    written = (begun / "config.yaml").read_text()
    assert "\n  count: 2\n" in written
    (begun / "config.yaml").write_text(written.replace("\n  count: 2\n", "\n  count: 1\n"))  # as older versions left it
    assert read_result(begun).settings["cycle.count"] == 2
    (record,) = records.write([read_result(begun)], begun.parent / "kept")
    assert read_result(record).settings["cycle.count"] == 2


def test_other_data_are_refused(capsys, begun, monkeypatch):
    drawn = stratified
    monkeypatch.setattr(digits, "stratified", lambda labels, fraction, seed: drawn(labels, fraction, seed + 1))
    assert "the images of digits are not those that the run began with" in one_line(capsys, "cycle", "--resume", begun)


def test_a_run_is_found_by_name_by_file_and_as_the_latest(capsys, begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(begun, tmp_path / "runs" / "cycle" / "newest")
    assert "going on" not in resumed(capsys, "cycle", begun / "last.pt")
    (tmp_path / "runs" / "cycle" / "without-state").mkdir()
    (tmp_path / "runs" / "cycle" / "without-state" / "config.yaml").write_text("killed: before its first state")
    assert "runs/cycle/newest" in resumed(capsys, "cycle", "latest")
    shutil.copytree(begun, tmp_path / "runs" / "elsewhere")
    (tmp_path / "runs" / "cycle" / "newest" / "status.json").write_text('{"state": "done"}')
    (tmp_path / "runs" / "elsewhere" / "status.json").write_text('{"state": "preempted"}')
    (tmp_path / "runs" / "elsewhere" / "env.json").write_text('{"argv": ["cycle"]}')
    os.utime(tmp_path / "runs" / "elsewhere" / "config.yaml", (1, 1))
    assert runs.find("cycle", "latest") == Path("runs/elsewhere"), "the one that is not finished"
    assert "no run of 'repan train' under runs:" in one_line(capsys, "train", "--resume", "latest")
    assert "no run directory" in one_line(capsys, "cycle", "--resume", "nowhere")
    assert "has no config.yaml" in one_line(capsys, "cycle", "--resume", tmp_path)


def test_an_edited_configuration_is_reported_and_a_read_only_folder_is_one_line(capsys, begun, monkeypatch):
    text = (begun / "config.yaml").read_text()
    assert "seed: 3" in text
    (begun / "config.yaml").write_text(text.replace("seed: 3", "seed: 4"))
    moved = begun.rename(begun.with_name("moved"))
    begun.symlink_to(moved)
    err = resumed(capsys, "cycle", begun)
    assert "config.yaml was changed, which --resume ignores: run.seed is 4 there, 3 in the run" in err

    def read_only(path, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(moved), "open", read_only)
    assert "cannot write into the run directory" in one_line(capsys, "cycle", "--resume", moved)


# ---------------------------------------------------------------------------------------------- damage


def test_a_damaged_state_falls_back_to_the_one_before(capsys, tmp_path, whole):
    folder = tmp_path / "run"
    stopped(capsys, "train", *words("train", folder), at=8)
    content = bytearray((folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pt").write_bytes(content)
    err = resumed(capsys, "train", folder)
    assert "last.pt is damaged" in err
    assert "resuming from last_previous.pt" in err
    assert (folder / "last_damaged.pt").read_bytes() == content
    assert_same(folder, whole("train"))


def test_when_all_are_damaged_nothing_is_deleted(capsys, begun):
    for name in ("last.pt", "last_previous.pt"):
        (begun / name).write_bytes((begun / name).read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    code, _, err = run(capsys, "cycle", "--resume", begun)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "holds no state to resume from (" in err
    assert f"start a new run with -c {begun / 'config.yaml'} --out NEW" in err
    assert {path.name: path.read_bytes() for path in begun.iterdir() if path.name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }


def test_a_run_killed_in_its_last_moments_is_finished_by_a_resume(capsys, begun):
    resumed(capsys, "cycle", begun)
    for name in ("summary.json", "fused.pt"):
        (begun / name).unlink()
    resumed(capsys, "cycle", begun)
    assert (begun / "fused.pt").exists()
    assert "is finished" in one_line(capsys, "cycle", "--resume", begun)


def test_a_teacher_may_move_but_not_change(capsys, tmp_path, whole):
    teacher, folder = tmp_path / "teacher.pt", tmp_path / "run"
    shutil.copy(whole("train") / "best.pt", teacher)
    stopped(capsys, "distill", *SMALL, "--epochs", "1", "--teacher", teacher, "--out", folder, at=2)
    teacher.rename(tmp_path / "moved.pt")
    shutil.copy(whole("cycle") / "cycle_00.pt", teacher)
    assert "is not the teacher that the run began with" in one_line(capsys, "distill", "--resume", folder)
    written = (folder / "config.yaml").read_text()
    resumed(capsys, "distill", folder, "--teacher", tmp_path / "moved.pt")
    assert (folder / "config.yaml").read_text() == written, "the teacher is the same one, for comparisons too"


def test_the_log_records_the_stop(begun):
    assert "stopped by SIGTERM, everything is saved; continue with" in (begun / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------- one writer


@pytest.mark.soak
def test_a_second_writer_is_refused_until_the_first_is_killed(capsys, tmp_path):
    folder = tmp_path / "run"
    words = ["repvgg_b0" if word == "repvgg_a0" else word for word in SMALL]  # the same network in both processes
    first = start("train", *words, "--epochs", "500", "--out", folder)
    wait_for(folder / "last_previous.pt")
    for _ in range(5):
        err = one_line(capsys, "train", "--resume", folder)
        assert f"is being written by process {first.pid} on " in err
    assert "already exists; nothing was changed: continue with --resume" in one_line(
        capsys, "train", *words, "--out", folder
    )
    first.kill()
    first.wait()
    code, _ = stopped(capsys, "train", "--resume", folder, at=1)
    assert code == 75


# ---------------------------------------------------------------------------------------------- divergence


class Poisoned:
    """A task whose loss, or a gradient of it, is not finite from the nth update on."""

    def __init__(self, task, at, what):
        self.task, self.at, self.what, self.count = task, at, what, 0
        self.prepared = task.prepared

    def __call__(self, model, batch):
        loss, logits = self.task(model, batch)
        if not model.training or not torch.is_grad_enabled():
            return loss, logits
        self.count += 1
        if self.count < self.at:
            return loss, logits
        if self.what == "loss":
            return loss * torch.nan, logits
        hook = logits.register_hook if self.what == "gradient" else None
        if hook:
            hook(lambda gradient: gradient * torch.inf)
        return loss, logits


QUICK = {("loss", 1, "sgd"), ("loss", 4, "adamw"), ("loss", 8, "sgd")} | {
    *(("gradient", 1, "adamw"), ("gradient", 4, "sgd"), ("gradient", 8, "adamw"))
}


@pytest.mark.parametrize(
    ("what", "at", "optimizer"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.soak)
        for case in itertools.product(("loss", "gradient"), (1, 4, 8), ("sgd", "adamw"))
    ],
)
def test_divergence_ends_the_run_and_reaches_no_file(capsys, tmp_path, monkeypatch, what, at, optimizer):
    from repan_cli.session.teachers import PhaseTasks

    make = PhaseTasks.__call__
    monkeypatch.setattr(PhaseTasks, "__call__", lambda self, phase: Poisoned(make(self, phase), at, what))
    folder = tmp_path / "run"
    extra = ["run.save_every=1", f"optim.name={optimizer}", "--lr", "0.01", "--epochs", "2", "--out", folder]
    code, _, err = run(capsys, "train", *SMALL, *extra)
    assert code == 3, err
    assert "no longer finite; lower optim.lr" in err.splitlines()[-1]
    assert json.loads((folder / "status.json").read_text())["state"] == "diverged"
    for path in folder.glob("*.pt"):
        saved = checkpoint.load(path)
        for tensor in (*saved.weights.values(), *saved.state.values()):
            assert torch.isfinite(tensor).all(), path.name
    assert checkpoint.load(folder / "last.pt").card.run.progress["step"] == (at - 1) % 6


# ---------------------------------------------------------------------------------------------- full


def test_a_full_disk_keeps_the_state_before(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    flush, calls = files.flush, []

    def full(file):
        calls.append(file)
        if len(calls) > 8:
            raise OSError(28, "No space left on device")
        flush(file)

    monkeypatch.setattr(files, "flush", full)
    code, _, err = run(capsys, "train", *words("train", folder))
    assert code == 4
    assert f"no space left to write {folder}" in err
    assert "bytes are free" in err
    assert not [path for path in folder.iterdir() if path.name.startswith(".last") or path.suffix == ".tmp"]
    monkeypatch.undo()
    resumed(capsys, "train", folder)


def test_plain_state_survives_the_way_through_a_file(capsys, begun):
    saved = checkpoint.load(begun / "last.pt")
    assert saved.card.run.progress["step"] == 3
    assert dataclasses.replace(saved).digest() == saved.digest()


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes there")
def test_a_limit_on_file_sizes_ends_the_run_with_the_path(tmp_path):
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    process = start("train", *SMALL, "--epochs", "1", "--out", tmp_path / "run", preexec_fn=limited)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4
    assert f"no space left to write {tmp_path / 'run' / 'last.pt'}" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")  # noqa: PTH110
def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "repan_cli", "list", "settings", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 4
    assert done.stderr == "Error: cannot write to stdout: No space left on device\n"
    assert "Traceback" not in done.stderr


def test_out_of_memory_names_the_setting(capsys, tmp_path, monkeypatch):
    def too_much(run, *arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(loop, "update", too_much)
    code, _, err = run(capsys, "train", *SMALL, "--epochs", "1", "--out", tmp_path / "run")
    assert code == 4
    assert "out of memory: set a smaller --batch-size" in err.splitlines()[-1]
    assert checkpoint.load(tmp_path / "run" / "last.pt").card.run.progress["step"] == 0
