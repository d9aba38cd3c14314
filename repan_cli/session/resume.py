"""Implement `--resume`: continue a run from its newest intact state, with the same result as without the stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repan_cli import checkpoint, config, models, runs
from repan_cli.blocks import is_own
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.config.conventions import SAME_RESULT
from repan_cli.config.files import dump, read_file
from repan_cli.config.resolve import Resolved
from repan_cli.config.schema import Layer
from repan_cli.config.settings import Config, flatten
from repan_cli.display.console import tell
from repan_cli.errors import InputError
from repan_cli.models import own_block, user_file
from repan_cli.session import places, runner
from repan_cli.session.agreement import file_of_first_rank
from repan_cli.session.build import Session, prepare, surroundings
from repan_cli.session.network import state_of
from repan_cli.system.device import describe_machine
from repan_cli.system.files import read_json
from repan_cli.system.launcher import own_rank
from repan_cli.system.notices import warn
from repan_cli.system.ranks import join_ranks, joined, of_first_rank
from repan_cli.system.text import count, quoted
from repan_cli.system.user_code import names_a_file

OF_TEACHERS = ("teacher.name", "teacher.model", "baseline.teacher.name", "baseline.teacher.model")
LAST_BITS = ("run.threads", "run.deterministic")
MAY_CHANGE = (*sorted(SAME_RESULT), "cycle.count", "data.on_error", "run.patience", *LAST_BITS, *OF_TEACHERS)
"""Settings that may differ in a resumed run. They do not change the result, but for the last bits by `LAST_BITS` and
images that cannot be read any more by `data.on_error`; a teacher must be the same one."""


def run(command: str, name: str, given: Layer, *, as_json: bool) -> Path | None:
    """Resume a run of `command` and return its directory, on the first rank.

    Raises InputError if it cannot be resumed.
    """
    join_ranks(str(given.get("run.device", "auto")))
    if own_rank():
        _follow(command, given)
        return None
    path = runs.find(command, name)
    with runs.RunDirectory(path, reopen=True) as folder:
        source, saved = newest_state(path)
        if joined():
            of_first_rank(str(source).encode())
            with file_of_first_rank(source, 0):
                pass
        session, resolved = _again(command, given, path, source, saved)
        if _has_results(session, path):
            _conclude(session, folder)
            return path
        _warn_of_edits(saved, path)
        _warn_of_changes(saved, surroundings(session.training.runtime))
        _write_changes(saved, resolved.config, folder)
        folder.note_machine({**runs.software(), **describe_machine(session.training.runtime)})
        if source.name == runs.PREVIOUS:
            _set_aside(path / runs.LAST)
        runner.carry_out(session, folder, resolved, begun=state_of(saved, str(path)).begun, as_json=as_json)
    return path


def _write_changes(saved: Checkpoint, now: Config, folder: runs.RunDirectory) -> None:
    """Write config.yaml again if this resume changes what two runs are compared by, such as the number of cycles.

    The names of teachers stay: a teacher that has moved is the same one.
    """
    before = saved.card.settings
    after = {**flatten(now), **{key: before[key] for key in OF_TEACHERS if key in before}}
    if any(after.get(key) != before.get(key) for key in MAY_CHANGE if key not in SAME_RESULT):
        folder.write_text("config.yaml", dump(config.from_flat(after), cycles=saved.card.command == "cycle"))


def _follow(command: str, given: Layer) -> None:
    """Resume as one of the other ranks, from the state that the first rank sends; this machine need not see the
    folder.
    """
    source = Path(of_first_rank(None).decode())
    with file_of_first_rank(source, own_rank()) as received:
        saved = checkpoint.load(received)
    runner.follow(_again(command, given, source.parent, source, saved)[0])


def _again(command: str, given: Layer, path: Path, source: Path, saved: Checkpoint) -> tuple[Session, Resolved]:
    """Prepare the run in the folder `path`, with the state that was `saved` in the file `source`."""
    if saved.card.command != command:
        raise InputError(f"{path} is a run of 'repan {saved.card.command}': resume it with that command")
    resolved = Resolved(_changed(saved, given, path), f"{source}, from where it stopped")
    session = prepare(command, resolved, saved=saved, folder=path)
    known = (saved.card.teachers or {}).values()
    for name, digest in session.training.task_of.digests.items():
        if digest not in known:
            raise InputError(f"{name} is not the teacher that the run began with")
    return session, resolved


def _has_results(session: Session, path: Path) -> bool:
    """Return whether a run has finished its plan and written its results."""
    plan = session.training.plan
    if not (path / "summary.json").exists():
        return False
    if session.training.out_of_patience:
        return True
    if session.training.progress.phase < len(plan):
        return False
    return len(read_json(path / "summary.json").get("cycles", ())) == sum(1 for phase in plan if phase.cycle)


def _conclude(session: Session, folder: runs.RunDirectory) -> None:
    """Mark a run that has its results as done. Raises InputError if it is marked already."""
    path, cycle = folder.path, session.config.cycle
    if runs.state_of(folder.path) != "done":
        folder.status("done")
        tell(f"{path} has its results and is now marked as finished")
        return
    raise runs.is_finished(path, cycle.count if session.command == "cycle" and cycle.schedule == "restart" else None)


def newest_state(path: Path) -> tuple[Path, Checkpoint]:
    """Read the newest intact state of a run: `last.pt`, or with a warning the previous one.

    Raises InputError if there is none.
    """
    problems = []
    for file in (path / runs.LAST, path / runs.PREVIOUS):
        if not file.exists():
            problems.append(f"{file} is not there")
            continue
        try:
            saved = checkpoint.load(file)
            state_of(saved, str(file))
        except InputError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warn(f"{problem}: resuming from {file.name}")
        return file, saved
    begin = f"start a new run with -c {quoted(path / 'config.yaml')} --out NEW"
    raise InputError(f"{path} holds no state to resume from ({'; '.join(problems)}): {begin}")


def _set_aside(damaged: Path) -> None:
    """Move a damaged state out of the way, without deleting it."""
    if damaged.exists():
        damaged.replace(damaged.with_name("last_damaged.pt"))


def _changed(saved: Checkpoint, given: Layer, path: Path) -> Config:
    """Return the run's configuration with the allowed changes. Raises InputError for others."""
    stored, asked = saved.card.settings, config.typed(given)
    whole = config.from_flat(stored)
    for key, value in asked.items():
        same = _same(saved, key, value)
        if same or key in MAY_CHANGE:
            continue
        raise InputError(
            f"{key} cannot change on --resume (it was {stored.get(key)}): start a new run from its weights with "
            f"--init {quoted(path / runs.LAST)}"
        )
    begun = state_of(saved, str(path)).progress["phase"]
    _check_cycles(whole, asked.get("cycle.count", whole.cycle.count), begun)
    changed = places.found(stored, saved.card.surroundings) | {key: asked[key] for key in MAY_CHANGE if key in asked}
    check_own_teachers(stored, asked, path)
    block = asked.get("block.name", saved.card.block)
    if own_block.needed(saved.card):
        models.given_again(saved.card, asked.get("block.name"), str(path))
    own = asked.get("model.name") if user_file.names_a_file(saved.card.model) else None
    models.check_given(saved.card.model, own, str(path))
    names = {"model.name": own or saved.card.model, "block.name": block}
    return config.from_flat({**config.flatten(whole), **changed, **names, "run.out": str(path)})


def check_own_teachers(stored: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """Raise InputError if a teacher uses a user's own network that was not given again.

    Files with code are never imported unless the user names them.
    """
    for key in OF_TEACHERS:
        if key not in asked and names_a_file(stored.get(key)):
            raise InputError(
                f"{path} has a teacher that is a network of your own, {stored[key]}: give {key}={stored[key]} "
                "(files are not imported automatically)"
            )


def _same(saved: Checkpoint, key: str, value: object) -> bool:
    """Return whether a given setting means the same as the run's value."""
    if key == "model.name":
        return _same_network(saved, str(value))
    if key == "block.name" and own_block.needed(saved.card):
        return is_own(str(value))  # recognized by its weights, wherever its file is now
    return bool(value == saved.card.settings.get(key))


def _same_network(saved: Checkpoint, given: str) -> bool:
    """Return whether a name means the network of the run.

    A user-defined network is recognized by its weights, wherever its file is now.
    """
    stored = saved.card.model
    if user_file.names_a_file(stored):
        return user_file.names_a_file(given)
    return models.resolve(given, saved.card.image_size) == stored


def _check_cycles(whole: Config, cycles: int, phase: int) -> None:
    if cycles == whole.cycle.count:
        return
    if whole.cycle.schedule == "continuous":
        raise InputError(
            f"cycle.count cannot change with cycle.schedule=continuous, one schedule over "
            f"{count(whole.cycle.count, 'cycle')}: begin another run from its weights with --init"
        )
    if cycles < phase:
        raise InputError(f"cycle.count={cycles} is less than the number of cycles that have begun, {phase}")


def _warn_of_edits(saved: Checkpoint, path: Path) -> None:
    """Warn about edits of config.yaml since the run began, since the settings in the state are used."""
    try:
        there = config.typed(read_file(path / "config.yaml"))
    except InputError as error:
        warn(f"{error}; the run continues with its original settings")
        return
    before, free = saved.card.settings, {*MAY_CHANGE, "run.out", "model.name"}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in there.items() if key in before}
    edited = [
        f"{key} is {value} there, {before[key]} in the run"
        for key, value in plain.items()
        if key not in free and value != before[key]
    ]
    if edited:
        warn(f"{path / 'config.yaml'} was changed, which --resume ignores: {', '.join(edited)}")


def _warn_of_changes(saved: Checkpoint, now: Mapping[str, Any]) -> None:
    """Warn about changes of the environment that may change the last bits of the results."""
    before = saved.card.surroundings or {}
    changes = [f"{name} {before[name]} is now {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if changes:
        warn(f"resumed in a different environment: {', '.join(changes)}; results may differ in their last bits")
