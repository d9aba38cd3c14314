"""`repan study`: run every arm of a grid with every seed, several at once, resumable, and write the comparison."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from repan_cli import config
from repan_cli.commands.declaration import given_settings
from repan_cli.commands.options import StudyOptions
from repan_cli.compare import page, table
from repan_cli.compare.groups import Comparison, as_data, compare
from repan_cli.compare.results import read_all
from repan_cli.config.conventions import ARM_FILE, CONFIG_FILE, SAME_RESULT
from repan_cli.config.grid import Arm, Grid, find_grid, parse_seeds, read_grid
from repan_cli.display.comparison import show
from repan_cli.display.console import tell
from repan_cli.display.tables import print_table
from repan_cli.errors import DivergedError, InputError, InterruptedRunError, PreemptedRunError, RepanError
from repan_cli.runs import state_of, studies
from repan_cli.runs.processes import Job, Pool
from repan_cli.system.files import to_json, write_bytes
from repan_cli.system.launcher import rank_count
from repan_cli.system.notices import warn
from repan_cli.system.signals import StopSignals
from repan_cli.system.text import count, quoted

OWN_CODE = ("model.name", "block.name")
"""Settings that may name a function in a file, `file.py:function`."""


@dataclass(frozen=True)
class Study:
    """The runs of a grid's arms below the folder `out`. The settings `given` on the command line take precedence."""

    out: Path
    arms: Sequence[Arm]
    seeds: tuple[int, ...]
    given: Mapping[str, Any]

    def jobs(self) -> list[Job]:
        """Return the runs, all arms with one seed before the next seed, so that a stopped study still compares equal
        seeds.
        """
        return [self._job(arm, seed) for seed in self.seeds for arm in self.arms]

    def _job(self, arm: Arm, seed: int) -> Job:
        folder = self.out / arm.name / f"seed_{seed}"
        words = tuple(f"{key}={text}" for key, text in arm.read_by(self.given).items())
        file = self.out / arm.name / ARM_FILE
        begin = (arm.command, "-c", str(file), "--seed", str(seed), "--out", str(folder), *words)
        own = tuple(f"{key}={name}" for key in OWN_CODE if (name := self._own(arm, key)))
        return Job(f"{arm.name} seed {seed}", folder, begin, (arm.command, "--resume", str(folder), *words, *own))

    def _own(self, arm: Arm, key: str) -> str | None:
        """Return the name of an arm's user-defined network or block, which a resume is given again."""
        name = None if key in self.given else arm.layer.get(key)
        return str(name) if name and ".py:" in str(name) else None


def run(options: StudyOptions) -> None:
    """Make the runs that are not finished, then compare all that are.

    Raises InputError for a grid, an arm or a setting that cannot be used, and RepanError if a run failed. Raises
    PreemptedRunError or InterruptedRunError if the study was stopped, and DivergedError at the end if runs diverged.
    """
    study, grid = _read(options)
    jobs = study.jobs()
    _tell_of_removed(study, grid)
    if options.dry_run:
        _preview(study, grid, jobs, as_json=options.as_json)
        return
    _write_arms(study)
    before = str(studies.status_of(study.out).get("command", ""))
    studies.note(study.out, "running", _again())
    devices = options.device.split(",") if options.device else []
    with StopSignals() as signals:
        until = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
        pool = Pool(options.jobs or max(len(devices), 1), devices, tell)
        failed = pool.make(
            [job for job in jobs if not job.is_over], should_stop=lambda: signals() or time.monotonic() >= until
        )
        received = signals.received
    left = [job for job in jobs if not job.is_over]
    _note_end(study.out, left, failed, before)
    comparison = _compare(study, jobs)
    if options.as_json:
        runs = [{"run": str(job.folder), "state": job.state} for job in jobs]
        print(to_json({"out": str(study.out), "runs": runs, "comparison": comparison and as_data(comparison)}))
    _leave(jobs, left, failed, received)


def _read(options: StudyOptions) -> tuple[Study, Grid]:
    """Check everything that can be known before a run begins."""
    grid = read_grid(find_grid(options.grid))
    given = given_settings(options)
    for key, instead in (("run.seed", "--seeds"), ("run.out", "--out"), ("run.device", "--device")):
        if key in given:
            raise InputError(f"{key} is set for each run of a study: give {instead}")
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {options.jobs}")
    if options.minutes is not None and not options.minutes > 0:
        raise InputError(f"--minutes must be above 0, got {options.minutes:g}")
    if rank_count() > 1:
        raise InputError("'repan study' starts its runs itself: call it without torchrun")
    seeds = grid.seeds if options.seeds is None else parse_seeds(options.seeds.split(","), "--seeds")
    arms = grid.matching(options.arms)
    for arm in arms:
        arm.resolve(given)
    for key in given:
        if not any(key in arm.read_by(given) for arm in arms):
            raise InputError(f"{key} has no effect: none of the chosen arms reads it")
    return Study(options.out or Path("runs/study") / grid.path.stem, arms, seeds, given), grid


def _write_arms(study: Study) -> None:
    """Write the settings of each arm. Raises InputError if its runs were made with other settings."""
    for arm in study.arms:
        whole = {**arm.layer, **arm.read_by(study.given)}
        layer = {key: text for key, text in whole.items() if key not in SAME_RESULT}
        path = study.out / arm.name / ARM_FILE
        before = config.read_file(path) if path.exists() else layer
        for key in sorted({*before, *layer}):
            if before.get(key) != layer.get(key):
                raise InputError(
                    f"arm {arm.name}: {key} is {layer.get(key, 'not set')}, but its runs in {path.parent} were made "
                    f"with {before.get(key, 'the default')}: give another --out"
                )
        header = f"# {arm.about}\n# Command  repan {arm.command} -c {quoted(path)}\n\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {path.parent}: {error.strerror}; give another --out") from None
        write_bytes(path, (header + yaml.safe_dump(layer, sort_keys=False, allow_unicode=True)).encode())


def _tell_of_removed(study: Study, grid: Grid) -> None:
    """Warn about arms that have runs in the study's folder but are no longer in the grid."""
    there = sorted(path.parent.name for path in study.out.glob(f"*/{ARM_FILE}"))
    if removed := [name for name in there if name not in grid.arms]:
        warn(f"{study.out} holds runs of {', '.join(removed)}, which are no longer arms of {grid.path}: skipped")


def _preview(study: Study, grid: Grid, jobs: Sequence[Job], *, as_json: bool) -> None:
    """Show the arms, their descriptions and the progress of their runs."""
    states = {job.folder: job.state for job in jobs}
    rows = []
    for arm in study.arms:
        own = [state for folder, state in states.items() if folder.parent.name == arm.name]
        rows.append((arm.name, ", ".join(f"{own.count(state)} {state}" for state in dict.fromkeys(own)), arm.about))
    if as_json:
        runs = [{"run": str(job.folder), "state": job.state, "command": [*job.begin]} for job in jobs]
        print(to_json({"out": str(study.out), "runs": runs}))
        return
    tell(grid.about)
    print_table(["arm", "runs", "what it is"], rows)
    tell(f"{count(len(jobs), 'run')} below {study.out}, seeds {', '.join(map(str, study.seeds))}; nothing was started")


def _compare(study: Study, jobs: Sequence[Job]) -> Comparison | None:
    """Compare the finished runs, on screen and in the study's folder; None if there are none.

    The files name the runs that are missing: a mean without a seed that diverged is better than the arm is.
    """
    results, left_out = read_all([job.folder for job in jobs if job.state == "done"])
    if not results:
        return None
    for path, why in left_out:
        warn(f"left out: {path}: {why}")
    left_out += [(str(job.folder), "its loss diverged") for job in jobs if job.state == "diverged"]
    if to_do := sum(not job.is_over for job in jobs):
        left_out.append((str(study.out), f"{count(to_do, 'run')} of {len(jobs)} not finished"))
    arms = {arm.name for arm in study.arms if arm.is_control}
    controls = {
        str(study.out / name): found
        for name in dict.fromkeys(result.path.parent.name for result in results)
        if name in arms and (found := [result.path for result in results if result.path.parent.name == name])
    }
    comparison = compare(results, controls or None, by_folder=True)
    show(comparison, to_stderr=True)
    write_bytes(study.out / "results.md", table.markdown(comparison, left_out).encode())
    write_bytes(study.out / "results.html", page.render(comparison, left_out).encode())
    tell(f"wrote {study.out / 'results.md'}, {study.out / 'results.html'}")
    return comparison


def _note_end(out: Path, left: Sequence[Job], failed: Job | None, before: str) -> None:
    """Record how the study ended. If only runs of other arms or seeds are left, the command `before` continues it."""
    begun = (path.parent for path in out.glob(f"*/*/{CONFIG_FILE}"))
    others = any(state_of(path) not in ("done", "diverged") for path in begun)
    if others and not left:
        studies.note(out, "stopped", before or _again())
    else:
        studies.note(out, "failed" if failed else "stopped" if left else "done", _again())


def _again() -> str:
    """Return the command line of this process, which continues the study."""
    return shlex.join(["repan", *sys.argv[1:]])


def _leave(jobs: Sequence[Job], left: Sequence[Job], failed: Job | None, received: int | None) -> None:
    """Finish the command according to how its runs ended."""
    again = _again()
    if failed is not None:
        raise RepanError(f"{failed.name} failed, see {failed.log}; continue the study with: {again}")
    if left and received == signal.SIGINT:
        raise InterruptedRunError(f"interrupted with {count(len(left), 'run')} to go; continue with: {again}")
    if left:
        raise PreemptedRunError(f"stopped with {count(len(left), 'run')} to go; continue with: {again}")
    diverged = [job.name for job in jobs if job.state == "diverged"]
    if diverged:
        raise DivergedError(f"{count(len(diverged), 'run')} of {len(jobs)} diverged: {', '.join(diverged)}")
