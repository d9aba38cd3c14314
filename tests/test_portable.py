"""Windows and macOS, by stand-ins: functions that these systems lack or implement differently."""

import errno
import importlib.util
import io
import os
import pickle
import signal
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from repan_cli import errors
from repan_cli.data import image_files, streaming, workers
from repan_cli.data.types import LazyImages
from repan_cli.errors import InputError
from repan_cli.runs import directory
from repan_cli.system import device, files, host, signals

UNIX_ONLY = ("resource", "fcntl", "pwd", "grp", "termios")


def imported_anew(monkeypatch, module):
    """A second copy of a module, imported under the circumstances of the test."""
    name = f"{module.__name__}_anew"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, again)
    spec.loader.exec_module(again)
    return again


@pytest.fixture
def windows(monkeypatch):
    """A Python without what only Unix has; nothing there locks, and no core can be bound."""
    monkeypatch.setattr(sys, "platform", "win32")
    for name in UNIX_ONLY:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("sysconf", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt := Msvcrt())
    return msvcrt


class Msvcrt(ModuleType):
    """Locks of bytes, which belong to an open file."""

    LK_NBLCK = 2

    def __init__(self):
        super().__init__("msvcrt")
        self.held = {}

    def locking(self, handle, mode, count):
        assert (mode, count) == (self.LK_NBLCK, 1)
        key = (os.fstat(handle).st_ino, os.lseek(handle, 0, os.SEEK_CUR))
        if self.held.setdefault(key, handle) != handle:
            raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("module", [host, device, files, directory, streaming, signals])
def test_modules_import_without_unix_only_modules(windows, monkeypatch, module):
    assert imported_anew(monkeypatch, module)


def test_windows_does_not_tell_its_memory(windows):
    assert host.peak_memory() is None
    assert device.peak_memory(torch.device("cpu")) is None
    assert host.memory_bytes() is host.memory_bytes(free=True) is None


def test_without_bound_cores_all_of_them_count(windows, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert host.usable_cores() == 6
    assert streaming.default_workers(torch.device("cuda")) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert host.usable_cores() == 1


def test_macos_reports_memory_in_bytes(monkeypatch):
    there = host.peak_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert 1024 * host.peak_memory() == pytest.approx(there, rel=0.5)


def test_memory_is_told_where_it_can_be():
    assert 0 < host.memory_bytes(free=True) <= host.memory_bytes()
    assert host.peak_memory() > 2**20


def write_group(folder, limit, used, files, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used, f"anon 5\n{names[2]} {files}"), strict=True):
        (folder / ("memory.stat" if name == names[2] else name)).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("listed", "place"),
    [
        ("0::/slurm/job_7/step_0\n", "slurm/job_7"),  # a limit of a group above one's own
        ("0::/\n", "."),  # in a container
        ("9:name=systemd:/\n4:cpu,memory:/docker/a1\n0::/\n", "memory"),  # version 1, whose own folder is not seen
        ("4:memory:/slurm/job_7\n", "memory/slurm/job_7"),
    ],
)
def test_the_limit_of_a_container_or_of_a_job_is_the_memory_there_is(tmp_path, monkeypatch, listed, place):
    """A cache of half the host's memory, or a batch that fits it, would be killed."""
    names = host.OF_GROUPS_1 if "memory" in place else host.OF_GROUPS_2
    write_group(tmp_path / "groups" / place, 1000, 700, 200, names)
    (tmp_path / "own").write_text(listed)
    monkeypatch.setattr(host, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "own")
    assert (host.memory_bytes(), host.memory_bytes(free=True)) == (1000, 500)


def test_memory_that_holds_files_is_free(tmp_path, monkeypatch):
    """A teacher's cache went to a file in the run's folder although nearly all memory could be had."""
    (tmp_path / "meminfo").write_text("MemTotal:  8000 kB\nMemFree:  10 kB\nMemAvailable:    7000 kB\n")
    monkeypatch.setattr(host, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 1024}.__getitem__)
    assert host.memory_bytes(free=True) == 7000 * 1024
    monkeypatch.setattr(host, "MEMORY", tmp_path / "none")
    assert host.memory_bytes(free=True) == 10 * 1024


def test_without_a_limit_the_machine_s_memory_counts(tmp_path, monkeypatch):
    write_group(tmp_path, "max", 700, 200, host.OF_GROUPS_2)
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(host, "GROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "own")
    assert host.memory_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_processor_without_a_table_has_a_name(monkeypatch):
    def none(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(host.Path, "read_text", none)
    monkeypatch.setattr(host.platform, "processor", lambda: "")
    monkeypatch.setattr(host.platform, "machine", lambda: "arm64")
    assert host.processor() == "arm64"


def test_one_process_writes_a_run_on_windows(windows, tmp_path):
    with (
        directory.RunDirectory(tmp_path / "run"),
        pytest.raises(InputError, match=f"is being written by process {os.getpid()} on"),
    ):
        directory.RunDirectory(tmp_path / "run", reopen=True)
    windows.held.clear()  # as closing the file does there
    with directory.RunDirectory(tmp_path / "run", reopen=True):
        assert len(windows.held) == 1


def test_files_are_closed_before_they_are_renamed(tmp_path, monkeypatch):
    """Windows renames no file that is open."""
    opened, rename = [], files.Path.replace

    def fdopen(handle, mode):
        opened.append(io.open(handle, mode))  # noqa: SIM115, UP020
        return opened[-1]

    def replace(path, target):
        assert all(file.closed for file in opened)
        return rename(path, target)

    monkeypatch.setattr(os, "fdopen", fdopen)
    monkeypatch.setattr(files.Path, "replace", replace)
    files.write_atomically(tmp_path / "a.txt", lambda file: file.write(b"whole"))
    with directory.RunDirectory(tmp_path / "run") as run:
        for content in (b"first", b"second"):
            run.replace_last(lambda file, content=content: file.write(content))
    assert len(opened) >= 3
    assert (tmp_path / "a.txt").read_bytes() == b"whole"
    assert (tmp_path / "run" / directory.LAST).read_bytes() == b"second"
    assert (tmp_path / "run" / directory.PREVIOUS).read_bytes() == b"first"


def test_folders_that_cannot_be_opened_are_not_flushed(tmp_path, monkeypatch):
    opening = os.open

    def denied(path, *rest, **more):
        if os.path.isdir(path):  # noqa: PTH112
            raise PermissionError(errno.EACCES, "Permission denied")
        return opening(path, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    files.write_atomically(tmp_path / "a.txt", lambda file: file.write(b"whole"))
    assert (tmp_path / "a.txt").read_bytes() == b"whole"


def test_a_run_is_stopped_by_the_signals_that_there_are(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    there = imported_anew(monkeypatch, signals)
    assert there.STOP_SIGNALS == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with there.StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop()


def test_a_full_disk_is_known_without_every_number(monkeypatch):
    monkeypatch.delattr(errno, "EDQUOT")
    assert imported_anew(monkeypatch, errors).FULL == (errno.ENOSPC, errno.EFBIG)


def test_image_loaders_can_be_pickled(tmp_path):
    """Windows and macOS start the processes that load afresh, and send them all they need."""
    reader = image_files.ArrayReader(np.zeros((3, 8, 8, 3), dtype=np.uint8))
    part = LazyImages(reader, np.arange(3), np.arange(3))
    loader = streaming.StreamingLoader(
        part, resized=True, size=8, mean=(0.5,) * 3, std=(0.2,) * 3, device=torch.device("cpu")
    )
    for transform, position in ((loader._training_transform(), (0, 0, 0)), (loader._plain_transform(), None)):
        samples = workers.Samples(part, transform, position, skip=False)
        again = pickle.loads(pickle.dumps(samples))
        assert torch.equal(again[1].image, samples[1].image)
    for sent in (workers.collate, workers.ignore_signals):
        assert pickle.loads(pickle.dumps(sent)) is sent


# ---------------------------------------------------------------------------------------------- free cores and threads


@pytest.fixture
def cores(tmp_path, monkeypatch):
    """Lets the machine have cores that are used for these shares of the time, and a container's limit."""

    def have(*shares, nice=0.0, limit="max 100000"):
        (tmp_path / "cpu.max").write_text(limit)
        (tmp_path / "own").write_text("0::/\n")
        monkeypatch.setattr(host, "GROUPS", tmp_path)
        monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "own")
        monkeypatch.setattr(host, "PROC_STAT", tmp_path / "stat")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(len(shares))), raising=False)

        def write(ticks):
            rows = [
                f"cpu{n} {int(ticks * share)} {int(ticks * nice)} 0 {int(ticks * (1 - share - nice))} 0 0 0 0 0 0\n"
                for n, share in enumerate([*shares, 1.0])  # the last one is not ours
            ]
            (tmp_path / "stat").write_text("cpu 1 2 3 4 5 6 7 8 9 10\n" + "".join(rows) + "intr 1\n")

        write(1000)
        monkeypatch.setattr(host.time, "sleep", lambda seconds: write(2000))

    return have


@pytest.mark.parametrize(
    ("shares", "given", "free"),
    [
        ((0.0, 0.0), {}, 2),
        ((1.0, 0.0), {}, 1),
        ((1.0, 1.0), {}, 1),
        ((0.1, 0.1, 0.1, 0.1), {}, 4),
        ((0.9, 0.9, 0.1, 0.1), {}, 2),
        ((0.0, 0.0), {"nice": 1.0}, 2),
        ((0.0,) * 8, {"limit": "150000 100000"}, 2),
    ],
)
def test_free_cores_are_those_that_nobody_uses(cores, shares, given, free):
    cores(*shares, **given)
    assert host.free_cores() == free


def test_without_proc_the_load_tells_of_free_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "PROC_STAT", tmp_path / "none")
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.6, 0, 0), raising=False)
    assert host.free_cores() == 5
    monkeypatch.delattr(os, "getloadavg")
    assert host.free_cores() == 8


def test_threads_are_those_asked_for_else_the_free_cores(monkeypatch, caplog):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(host, "usable_cores", lambda: 4)
    monkeypatch.setattr(host, "free_cores", lambda: 3)
    assert (device.use_threads(None), used) == (4, [])  # the tests' OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert (device.use_threads(None), used) == (3, [3])
    assert (
        "training uses 3 threads, because other processes use this machine's 4 cores; run.threads=4 uses all"
        in caplog.text
    )
    assert (device.use_threads(7), used) == (7, [3, 7])


def test_threads_that_a_container_forbids_are_not_blamed_on_others(monkeypatch, caplog):
    used = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(host, "usable_cores", lambda: 2)
    monkeypatch.setattr(host, "free_cores", lambda: 2)
    assert (device.use_threads(None), used, caplog.text) == (2, [2], "")


@pytest.mark.parametrize(
    ("listed", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/kubepods/pod_1/a\n", {"kubepods/pod_1/cpu.max": "300000 100000", "kubepods/cpu.max": "max 100000"}, 3),
        ("4:cpu,cpuacct:/docker/a1\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("0::/\n", {"cpu.max": "6400000 100000"}, 8),
        ("0::/\n", {}, 8),
    ],
)
def test_the_limit_of_a_container_counts_as_cores(monkeypatch, tmp_path, listed, files, cores):
    """64 workers read images for a process that may use two cores."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(listed)
    monkeypatch.setattr(host, "GROUPS", tmp_path)
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert host.usable_cores() == cores
    monkeypatch.setattr(streaming, "local_ranks", lambda: 1)
    assert streaming.default_workers(torch.device("cuda")) == min(cores, streaming.MOST_WORKERS)
