"""Runs the arms of the experiments beside it, seed after seed, and writes their table; on Linux and macOS.

An arm is a preset here. Its run with seed N lies in OUT/ARM/seed_N, what that says in OUT/ARM/seed_N.log. All arms have
their turn with one seed before the next seed has: wherever it stops, OUT/results.md compares like with like. The same
command again leaves what is finished and goes on with the rest.

    python configs/experiments/run.py study --minutes 60 -- --data-root data
    python configs/experiments/run.py study --arms 'full_*' --seeds 0,1,2,3,4 -- --device cuda

What stands behind -- goes to every run that begins; settings (KEY=VALUE) of cycle, baseline and teacher to those of
`repan cycle` alone. A shorter study needs all of epochs=N baseline.epochs=N cycle.count=N, and `epochs` is the whole of
one_cosine but a cycle of the others: say it for each in a command of its own.
Exit codes: 0; 75 when stopped by --minutes, Ctrl-C or SIGTERM; 3 when runs diverged; else that of the run that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ARMS = sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"small", "full", "whole"})
CONTROLS = ("one_cosine", "continuous_none", "restart_none")
SMALL = ",".join([*CONTROLS, "continuous_*", "restart_*"])
ONLY_OF_CYCLES = ("cycle.", "baseline.", "teacher.")
REPAN = (sys.executable, "-m", "repan_cli")
DIVERGED, STOPPED = 3, 75


class Run(NamedTuple):
    """One arm with one seed, in a folder."""

    arm: str
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def state(self) -> str | None:
        return state_of(self.folder)

    def words(self, passed_on: list[str]) -> list[str]:
        """The command that begins it, or goes on with it."""
        command = re.search(r"^# Command +repan (\w+)", (FOLDER / f"{self.arm}.yaml").read_text(), re.M)[1]
        read = [word for word in passed_on if command == "cycle" or not word.startswith(ONLY_OF_CYCLES)]
        if self.folder.exists():
            return [*REPAN, command, "--resume", str(self.folder), *read]
        new = ["-c", f"experiments/{self.arm}", "--seed", str(self.seed), "--out", str(self.folder)]
        return [*REPAN, command, *new, *read]

    def outcome(self, code: int) -> str:
        """What its exit code means."""
        if code == 0:
            summary = json.loads((self.folder / "summary.json").read_text())
            return f"test top-1 {summary['test']['top1']:.2f} after {summary['seconds'] / 60:.1f} minutes"
        if code in (STOPPED, -signal.SIGTERM):
            return "stopped, to go on later"
        if code == DIVERGED:
            return "diverged"
        last = ["", *self.log.read_text(errors="replace").split("\n")][-2]
        return f"failed with exit code {code}: {last} (see {self.log})"


Children = dict[int, tuple[Run, subprocess.Popen[bytes]]]
"""Runs that are going on, by the number of the core that they have."""


def state_of(folder: Path) -> str | None:
    """Of a run: done, diverged, running, ...; None before it was begun."""
    status = folder / "status.json"
    return json.loads(status.read_text())["state"] if status.exists() else None


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def begin(run: Run, passed_on: list[str], *, core: int | None) -> subprocess.Popen[bytes]:
    """Start a run or go on with it; in a session of its own, as Ctrl-C is for the runner."""
    clear(run.folder)
    tell(f"{run}: {'goes on' if run.folder.exists() else 'begins'}")
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    threads = {} if core is None else {"OMP_NUM_THREADS": "1"}
    with run.log.open("ab") as log, on_core(core):
        return subprocess.Popen(
            run.words(passed_on), stdout=log, stderr=log, env={**os.environ, **threads}, start_new_session=True
        )


def clear(folder: Path) -> None:
    """Take away what a run left that was killed before it had saved anything."""
    if folder.exists() and not any((folder / name).exists() for name in ("last.pt", "last_previous.pt")):
        with (folder / ".lock").open("a") as lock:  # which a run holds for as long as it lives
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SystemExit(f"Error: {folder} is being written by another process: let it end first") from None
            shutil.rmtree(folder)


@contextlib.contextmanager
def on_core(number: int | None) -> Iterator[None]:
    """Bind what is started meanwhile to one of our cores, where the system can."""
    if number is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def carry_out(runs: list[Run], passed_on: list[str], *, jobs: int, until: float) -> int:
    """Make the runs, `jobs` of them at once. The exit code: 0, that of the first that failed, or 75."""
    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    waiting, children = list(runs), Children()
    try:
        while waiting or children:
            if asked or time.monotonic() >= until:
                return STOPPED
            for core in range(jobs):
                if waiting and core not in children:
                    run = waiting.pop(0)
                    children[core] = run, begin(run, passed_on, core=core if jobs > 1 else None)
            time.sleep(0.1)
            for code in ended(children):
                if code not in (0, DIVERGED):
                    return max(code, 1)
    finally:
        stop(children)
    return 0


def ended(children: Children) -> Iterator[int]:
    """The exit codes of runs that are over, which no longer are children then."""
    for core, (run, process) in [*children.items()]:
        if process.poll() is not None:
            del children[core]
            tell(f"{run}: {run.outcome(process.returncode)}")
            yield process.returncode


def stop(children: Children) -> None:
    """Let runs save what they have, and end."""
    for _, process in children.values():
        process.terminate()
    for run, process in children.values():
        tell(f"{run}: {run.outcome(process.wait())}")


def write_table(out: Path) -> None:
    """OUT/results.md, and the table on screen: the finished runs below OUT, beside the controls among them."""
    finished = {path.parent.name for path in out.glob("*/seed_*") if state_of(path) == "done"}
    controls = [arm for prefix in ("", "whole_", "full_") for name in CONTROLS if (arm := prefix + name) in finished]
    chosen = [word for arm in controls for word in ("--control", str(out / arm))]
    if finished:
        subprocess.run([*REPAN, "compare", str(out), "--by-folder", *chosen, "--markdown", str(out / "results.md")])


def arms(globs: str) -> list[str]:
    """Those that comma-separated globs name, in the order of the globs."""
    found = {glob: fnmatch.filter(ARMS, glob) for glob in globs.split(",")}
    for glob, names in found.items():
        if not names:
            raise argparse.ArgumentTypeError(f"no arm '{glob}'; there are {', '.join(ARMS)}")
    return list(dict.fromkeys(name for names in found.values() for name in names))


def seeds(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def read_words(words: list[str]) -> argparse.Namespace:
    """What stands before the --, and as `passed_on` what stands behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the runs and of their table")
    parser.add_argument("--arms", metavar="GLOBS", type=arms, default=SMALL, help=f"default {SMALL}")
    parser.add_argument("--seeds", metavar="N,N,...", type=seeds, default="0,1,2", help="default 0,1,2")
    parser.add_argument("--minutes", metavar="M", type=float, default=math.inf, help="stop after so long, all saved")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="so many runs at once, each on its own core")
    end = words.index("--") if "--" in words else len(words)
    given = parser.parse_args(words[:end], argparse.Namespace(passed_on=words[end + 1 :]))
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs} is less than 1")
    return given


def main() -> int:
    """Make the runs that are not over, write the table, and say how to go on."""
    given = read_words(sys.argv[1:])
    until = time.monotonic() + 60 * given.minutes
    os.nice(10)  # the runs with it
    runs = [Run(arm, seed, given.out / arm / f"seed_{seed}") for seed in given.seeds for arm in given.arms]
    open_ones = [run for run in runs if run.state not in ("done", "diverged")]
    code = carry_out(open_ones, given.passed_on, jobs=given.jobs, until=until)
    write_table(given.out)
    diverged = [str(run) for run in runs if run.state == "diverged"]
    if diverged:
        tell(f"diverged: {', '.join(diverged)}")
    if code == STOPPED:
        tell(f"go on with: {shlex.join(['python', *sys.argv])}")
    return code or DIVERGED * bool(diverged)


if __name__ == "__main__":
    sys.exit(main())
