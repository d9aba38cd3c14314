"""Run training runs as processes of their own: several at once, each stopped and continued like any run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from repan_cli.errors import DivergedError, PreemptedRunError
from repan_cli.runs.directory import discard_unsaved, state_of
from repan_cli.system.files import read_json
from repan_cli.system.text import duration

REPAN = (sys.executable, "-m", "repan_cli")
"""The command line that starts repan in another process."""

POLL = 0.1
"""Seconds between two checks of the processes."""


class Job(NamedTuple):
    """A run to make: its name, its folder, and the arguments that start it and that continue it."""

    name: str
    folder: Path
    begin: tuple[str, ...]
    resume: tuple[str, ...]

    @property
    def log(self) -> Path:
        """Return the file that takes the run's output."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def state(self) -> str:
        """Return the run's state from status.json, such as 'done'; 'to do' before the run has begun."""
        return state_of(self.folder) or "to do"

    @property
    def is_over(self) -> bool:
        """Return whether nothing is left to do: the run is finished, or its loss diverged."""
        return self.state in ("done", "diverged")


@dataclass
class Pool:
    """Processes that run jobs, `size` at once, each with its share of the cores and with one of `devices`.

    `tell` receives a line for each run that begins or ends.
    """

    size: int
    devices: Sequence[str]
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self._running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}

    def make(self, jobs: Sequence[Job], *, should_stop: Callable[[], bool]) -> Job | None:
        """Run the jobs in order. Return the job that failed, if any; the others are saved first.

        When `should_stop` returns true, the runs are asked to save their state and end, and no other begins.
        """
        waiting, failed = [*jobs], None
        try:
            while (waiting or self._running) and failed is None and not should_stop():
                for slot in range(self.size):
                    if waiting and slot not in self._running:
                        job = waiting.pop(0)
                        self._running[slot] = job, self._start(job, slot)
                time.sleep(POLL)
                failed = self._collect()
        finally:
            self._stop()
        return failed

    def _start(self, job: Job, slot: int) -> subprocess.Popen[bytes]:
        discard_unsaved(job.folder)
        goes_on = job.folder.exists()
        self.tell(f"{job.name}: {'continues' if goes_on else 'begins'}, log in {job.log}")
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        words = [*REPAN, *(job.resume if goes_on else job.begin)]
        if self.devices:
            words += ["--device", self.devices[slot % len(self.devices)]]
        cores, environment = self._share(slot), dict(os.environ)
        if cores is not None:
            environment.setdefault("OMP_NUM_THREADS", str(len(cores)))
        with job.log.open("ab") as log:  # in a new session: Ctrl-C is for this process, which then stops the run
            process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        if cores is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, cores)
        return process

    def _share(self, slot: int) -> set[int] | None:
        """Return the cores of a slot: every `size`-th one; None if one run has the whole machine."""
        if self.size == 1 or not hasattr(os, "sched_getaffinity"):
            return None
        cores = sorted(os.sched_getaffinity(0))
        return set(cores[slot % len(cores) :: self.size])

    def _collect(self) -> Job | None:
        """Record the runs that have ended; return the first that failed."""
        failed = None
        for slot, (job, process) in [*self._running.items()]:
            if process.poll() is None:
                continue
            del self._running[slot]
            self.tell(f"{job.name}: {outcome(job, process.returncode)}")
            if process.returncode not in (0, DivergedError.exit_code, PreemptedRunError.exit_code):
                failed = failed or job
        return failed

    def _stop(self) -> None:
        """Let the runs save their state, and wait until they have ended."""
        for _, process in self._running.values():
            process.terminate()
        for job, process in self._running.values():
            self.tell(f"{job.name}: {outcome(job, process.wait())}")
        self._running.clear()


def outcome(job: Job, code: int) -> str:
    """Describe how a run ended, from its exit code and its files."""
    if code == 0:
        summary = read_json(job.folder / "summary.json")
        return f"test top-1 {summary['test']['top1']:.2f} after {duration(summary['seconds'])}"
    if code in (PreemptedRunError.exit_code, -signal.SIGTERM):
        return "stopped, can be continued"
    if code == DivergedError.exit_code:
        return "diverged"
    lines = [line for line in job.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"failed with exit code {code}: {lines[-1] if lines else 'it printed nothing'}"
