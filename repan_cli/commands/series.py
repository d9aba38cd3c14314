"""Make several runs one after the other, for `--seeds` and `--control`, in folders below one, and compare them.

Resuming a series resumes the run that was stopped and begins those that have not begun. Finished runs are kept.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from repan_cli import config, models, runs
from repan_cli.compare import page
from repan_cli.compare.groups import Comparison, as_data, compare
from repan_cli.compare.results import Result, read_all
from repan_cli.config.resolve import Resolved
from repan_cli.config.schema import Layer
from repan_cli.display.comparison import show
from repan_cli.display.console import tell
from repan_cli.errors import DivergedError, InputError, InterruptedRunError, PreemptedRunError
from repan_cli.session import control, places, resume, runner
from repan_cli.session.build import Session, prepare
from repan_cli.system.files import read_json, to_json
from repan_cli.system.launcher import own_rank, rank_count
from repan_cli.system.notices import warn
from repan_cli.system.signals import StopSignals
from repan_cli.system.text import count, percent, quoted
from repan_cli.system.user_code import names_a_file, own_code, own_code_options

MAY_CHANGE = set(resume.MAY_CHANGE) - {"cycle.count", *resume.OF_TEACHERS}
"""Settings that may change when a series is resumed, since runs that have not begun cannot be checked for them."""


class Member(NamedTuple):
    """One run of a series: the name of its folder, its seed, and whether it is a control."""

    name: str
    seed: int
    is_control: bool


@dataclass(frozen=True)
class Series:
    """The runs below the folder `path`. `resolved` holds the settings of all, except seed, folder and restarts."""

    command: str
    path: Path
    resolved: Resolved
    seeds: tuple[int, ...]
    with_control: bool

    def members(self) -> Iterator[Member]:
        for seed in self.seeds:
            yield Member(f"seed_{seed}", seed, False)
            if self.with_control:
                yield Member(f"{control.PREFIX}seed_{seed}", seed, True)

    def of(self, member: Member) -> Resolved:
        """Return the settings of one run."""
        folder = self.path / member.name
        settings = config.replace(self.resolved.config, {"run.seed": member.seed, "run.out": str(folder)})
        if member.is_control:
            settings = control.without_restarts(settings, folder)
        return dataclasses.replace(self.resolved, config=settings)


# ---------------------------------------------------------------------------------------------- to begin, to go on


def run(command: str, resolved: Resolved, *, seeds: tuple[int, ...], with_control: bool, as_json: bool) -> Path:
    """Train with each seed, with a control also without restarts, and compare; return the folder of all runs."""
    refuse()
    out = resolved.config.run.out
    runs.check_free(out)
    shared = config.replace(resolved.config, {"run.seed": seeds[0], "run.out": None})
    ready = [prepare(command, dataclasses.replace(resolved, config=shared))]  # raises errors before there is a folder
    shared = config.replace(
        shared, {"data.batch_size": ready[0].config.data.batch_size}
    )  # auto is resolved once for all runs
    resolved = dataclasses.replace(resolved, config=shared)
    path = Path(out) if out else runs.claim_default(command, *ready[0].names)
    series = Series(command, path, resolved, seeds, with_control)
    with runs.RunDirectory(series.path, reopen=not out) as folder:
        folder.write_text("config.yaml", config.dump(shared, cycles=command == "cycle"))
        about = {"command": command, "seeds": seeds, "control": with_control, "settings": resolved.source}
        about |= places.noted(shared)
        folder.write_json(runs.SERIES, about)
        _carry_out(series, folder, {}, ready, as_json=as_json)
    return path


def refuse() -> None:
    """Raise InputError for one of several processes."""
    if rank_count() > 1:
        raise InputError(
            "--seeds and --control work in one process only: start each run separately under torchrun, then use "
            "'repan compare'"
        )


def go_on(command: str, name: str, given: Layer, *, as_json: bool) -> Path | None:
    """Resume a run, or the unfinished runs of a series; return its folder, on the first rank."""
    if own_rank():  # the first of several ranks finds the run, and sends it
        return resume.run(command, name, given, as_json=as_json)
    path = runs.find(command, name)
    about = runs.read_series(path)
    if about is None:
        return resume.run(command, name, given, as_json=as_json)
    if about["command"] != command:
        raise InputError(f"{path} holds runs of 'repan {about['command']}': resume them with that command")
    resolved = _settings_of(command, path, given, about)
    resolved = dataclasses.replace(resolved, source=about["settings"])
    refuse()
    with runs.RunDirectory(path, reopen=True) as folder:
        series = Series(command, path, resolved, tuple(about["seeds"]), about["control"])
        _carry_out(series, folder, given, [], as_json=as_json)
    return path


def _settings_of(command: str, path: Path, given: Layer, about: Mapping[str, Any]) -> Resolved:
    """Return the shared settings of a series with the allowed changes. Raises InputError for others."""
    stored = config.resolve(command, str(path / "config.yaml"), {})
    before, asked = config.flatten(stored.config), config.typed(given)
    network, block = stored.config.model.name, stored.config.block.name
    may_change = MAY_CHANGE
    if names_a_file(block):
        if "block.name" not in asked:
            raise InputError(models.own_block.how_to_give(str(block), str(path), network))
        may_change = may_change | {"block.name"}
    if network and names_a_file(network):  # the file is named again, wherever it is now
        models.check_given(network, asked.get("model.name"), str(path))
        may_change = may_change | {"model.name"}
    resume.check_own_teachers(before, asked, path)
    may_change = may_change | {key for key in resume.OF_TEACHERS if names_a_file(before.get(key))}
    for key, value in asked.items():
        if key not in may_change and value != before.get(key):
            raise InputError(
                f"{key} cannot change when --seeds or --control is resumed (it was {before.get(key)}): start anew with "
                "another --out"
            )
    changed = {**before, **places.found(before, about), **asked}
    return dataclasses.replace(stored, config=config.from_flat(changed))


def _carry_out(series: Series, folder: runs.RunDirectory, given: Layer, ready: list[Session], *, as_json: bool) -> None:
    """Make the unfinished runs, compare, report. `ready` holds the first run, if it is prepared.

    A run that diverges does not stop the others. Raises InterruptedRunError and PreemptedRunError if a signal asks to
    stop, DivergedError at the end.
    """
    made = 0
    try:
        with StopSignals() as signals:
            for number, member in enumerate(series.members(), start=1):
                if runs.state_of(series.path / member.name) in ("done", "diverged"):
                    continue
                _stop_between_runs(series, signals)
                tell(f"\nrun {number} of {len([*series.members()])}: {member.name}")
                folder.status("running", run=member.name)
                _make(series, member, given, ready.pop() if ready else None)
                made += 1
    except (InterruptedRunError, PreemptedRunError) as stop:
        folder.status("preempted" if isinstance(stop, PreemptedRunError) else "interrupted")
        raise
    except BaseException:
        folder.status("failed")
        raise
    if not made:
        tell(f"all runs of {series.path} are finished already; their comparison:")
    folder.status("done")
    _finish(series, folder, as_json=as_json)


def _make(series: Series, member: Member, given: Layer, ready: Session | None) -> None:
    """Begin a run, which may be `ready`, or resume it."""
    path = series.path / member.name
    try:
        if any((path / name).exists() for name in (runs.LAST, runs.PREVIOUS)):
            if runs.state_of(path) == control.WAITING:
                tell(f"continues from the end of the baseline of {path.name.removeprefix(control.PREFIX)}")
            own = own_code(config.flatten(series.resolved.config))
            resume.run(series.command, str(path), {**given, **own}, as_json=False)
            return
        runs.discard_unsaved(path)
        resolved = series.of(member)
        if ready is None:
            ready = prepare(series.command, resolved)
        else:
            ready = dataclasses.replace(ready, config=config.replace(ready.config, {"run.out": str(path)}))
        runner.begin(ready, resolved, as_json=False)
    except DivergedError as error:
        warn(f"{member.name} diverged: {error}")
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted before {member.name} began; {_how(series)}", series.path) from None
    except (InterruptedRunError, PreemptedRunError) as stop:
        of_all = f"{member.name}: " + str(stop).replace(f"--resume {quoted(path)}", f"--resume {quoted(series.path)}")
        if isinstance(stop, InterruptedRunError):
            raise InterruptedRunError(of_all, series.path) from None
        raise PreemptedRunError(of_all) from None


def _stop_between_runs(series: Series, signals: StopSignals) -> None:
    if signals.received == signal.SIGINT:
        raise InterruptedRunError(f"interrupted between two runs; {_how(series)}", series.path)
    if signals.received:
        raise PreemptedRunError(f"stopped by {signal.Signals(signals.received).name}; {_how(series)}")


def _how(series: Series) -> str:
    own = own_code_options(config.flatten(series.resolved.config))
    return f"continue with: repan {series.command} --resume {quoted(series.path)}{own}"


# ---------------------------------------------------------------------------------------------- the end


def _finish(series: Series, folder: runs.RunDirectory, *, as_json: bool) -> None:
    """Compare the finished runs on screen and in the series' folder. Raises DivergedError if a run diverged."""
    members = list(series.members())
    results, left_out = read_all([series.path / member.name for member in members])
    made = {result.path.name: result for result in results}
    _note_gains(made, members)
    if results:
        controls = [made[member.name].path for member in members if member.is_control and member.name in made]
        comparison = compare(results, {str(series.path): controls} if controls else None)
        folder.write_json("comparison.json", as_data(comparison))
        folder.write_text("comparison.html", page.render(comparison, left_out))
        _report(series, comparison, made)
        if as_json:
            print(to_json(_as_data(series, comparison, made)))
    diverged = [member.name for member in members if runs.state_of(series.path / member.name) == "diverged"]
    if diverged:
        raise DivergedError(f"{count(len(diverged), 'run')} of {len(members)} diverged: {', '.join(diverged)}")


def _note_gains(made: dict[str, Result], members: list[Member]) -> None:
    """Add the gain over its control to the summary of each run."""
    for member in members:
        ours, theirs = made.get(member.name), made.get(f"{control.PREFIX}{member.name}")
        if ours is None or theirs is None:
            continue
        summary = read_json(ours.path / "summary.json")
        summary["control"] = {
            "run": str(theirs.path),
            "test_top1": theirs.test_top1,
            "last_test_top1": theirs.last_test_top1,
            "gain": ours.test_top1 - theirs.test_top1,
            "last_gain": ours.last_test_top1 - theirs.last_test_top1,
        }
        with runs.RunDirectory(ours.path, reopen=True) as folder:
            folder.write_json("summary.json", summary)


def _report(series: Series, comparison: Comparison, made: dict[str, Result]) -> None:
    tell("")
    show(comparison, to_stderr=True)
    tell("")
    for result in made.values():
        noted = read_json(result.path / "summary.json").get("control")
        if noted:
            tell(
                f"seed {result.seed}: test top-1 {percent(result.test_top1)} (difference from its control "
                f"{noted['gain']:+.2f}); at the end of the last cycle {percent(result.last_test_top1)} "
                f"({noted['last_gain']:+.2f})"
            )
    tell(f"page: {series.path / 'comparison.html'}")
    tell(f"next: repan compare {quoted(series.path)}")


def _as_data(series: Series, comparison: Comparison, made: dict[str, Result]) -> dict[str, Any]:
    summaries = [{"run": str(result.path), **read_json(result.path / "summary.json")} for result in made.values()]
    return {"command": series.command, "out": str(series.path), "runs": summaries, "comparison": as_data(comparison)}
