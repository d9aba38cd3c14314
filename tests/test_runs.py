"""Run directories: names, files that are never half written, and existing directories that stay untouched."""

import json
import os
import platform
import shutil
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from repan_cli import runs
from repan_cli.errors import InputError
from repan_cli.runs import directory
from repan_cli.system import files
from repan_cli.system.files import write_atomically


def test_two_runs_in_one_second_get_two_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        path = runs.claim_default("cycle", "net", "rep", "digits")
        names.append(runs.RunDirectory(path, reopen=True).path.name)
    assert len(set(names)) == 3
    assert all("-net-rep-digits" in name for name in names)


def test_runs_of_one_second_do_not_refuse_each_other(tmp_path, monkeypatch):
    """Twenty at one moment, as a script starts them: each gets a folder of its own."""
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(20) as pool:
        paths = list(pool.map(lambda _: runs.claim_default("train", "net"), range(20)))
    assert len(set(paths)) == 20
    assert all(path.is_dir() for path in paths)


def test_a_default_directory_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.claim_default("train", "n" * 300).is_dir()
    shutil.rmtree("runs")
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match="cannot create the run directory runs/train"):
        runs.claim_default("train", "net")


def test_an_existing_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="already exists"):
        runs.RunDirectory(tmp_path)
    with pytest.raises(InputError, match="already exists"):
        runs.check_free(str(tmp_path))
    runs.check_free(None)


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create the run directory"):
        runs.RunDirectory(tmp_path / "file" / "run")


def test_files_are_readable_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.parametrize("linux", [True, False])
def test_threads_that_write_at_once_leave_the_umask_as_it_is(tmp_path, monkeypatch, linux):
    """The heartbeat writes from its own thread."""
    set_mask, found = os.umask, set()

    def slow(mask):
        before = set_mask(mask)
        time.sleep(0.001)  # other threads run
        return before

    monkeypatch.setattr(os, "umask", slow)
    if not linux:
        monkeypatch.setattr(files, "STATUS", tmp_path / "none", raising=False)
    old = set_mask(0o022)
    try:
        threads = [threading.Thread(target=lambda: found.update(files._umask() for _ in range(5))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        left = set_mask(old)
    assert (found, left) == ({0o022}, 0o022)


def test_status_and_software(tmp_path):
    folder = runs.RunDirectory(tmp_path / "run")
    folder.status("running", cycle=1, epoch=2)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["cycle"], status["epoch"]) == ("running", 1, 2)
    assert (status["pid"], status["host"]) == (os.getpid(), platform.node())
    assert {"repan", "torch", "timm"} <= runs.software()["versions"].keys()


def test_a_running_run_shows_that_it_is_alive(tmp_path, monkeypatch):
    folder = runs.RunDirectory(tmp_path / "run")
    folder.beat()
    assert not (folder / "status.json").exists()
    monkeypatch.setattr(directory, "now", lambda: "before")
    folder.status("running", cycle=1)
    monkeypatch.setattr(directory, "now", lambda: "after")
    pulse = runs.Heartbeat(folder.beat, seconds=0.01)
    pulse.start()
    pulse.stopped.wait(0.1)
    pulse.stop()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["cycle"], status["time"], status["heartbeat"]) == ("running", 1, "before", "after")
    folder.status("done")
    monkeypatch.setattr(directory, "now", lambda: "later")
    folder.beat()
    assert json.loads((folder / "status.json").read_text())["heartbeat"] == "after"
