"""`repan list`: list available names with their meaning."""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repan_cli.commands.options import ListOptions
from repan_cli.config import names
from repan_cli.config.files import about, presets
from repan_cli.config.grid import grids, read_grid
from repan_cli.config.renamed import as_given
from repan_cli.config.schema import as_text
from repan_cli.config.settings import OVERLAY, SCHEMA
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError
from repan_cli.registry import Registry, did_you_mean
from repan_cli.runs.listing import Run, runs_below
from repan_cli.runs.trackers import TRACKERS
from repan_cli.system.files import to_json
from repan_cli.system.text import count, duration, percent, shown
from repan_cli.training.schedules import SCHEDULES

Facts = dict[str, Any]
Rows = dict[str, str] | dict[str, Facts]
FOREIGN = ("timm:", "torchvision:")
KINDS: Registry[Callable[[], Rows]] = Registry("kind of name")


@KINDS.register("models")
def _models() -> Rows:
    known = names.catalog()
    return {**names.builtin(), **{name: known[name].describe() if name in known else "" for name in names.foreign()}}


@KINDS.register("blocks")
def _blocks() -> Rows:
    return dict(names.blocks())


@KINDS.register("datasets")
def _datasets() -> Rows:
    from repan_cli.data.types import DATASETS

    return {name: DATASETS[name].text for name in DATASETS}


@KINDS.register("schedules")
def _schedules() -> Rows:
    return {name: inspect.getdoc(SCHEDULES[name]) or "" for name in SCHEDULES}


@KINDS.register("optimizers")
def _optimizers() -> Rows:
    return dict(names.optimizers())


@KINDS.register("presets")
def _presets() -> Rows:
    return {name: about(path) for name, path in presets().items()}


@KINDS.register("studies")
def _studies() -> Rows:
    return {name: read_grid(path).about for name, path in grids().items()}


SETTINGS = "settings"


@KINDS.register(SETTINGS)
def _settings() -> dict[str, Facts]:
    rows = {key: entry.describe() for key, entry in SCHEMA.items()}
    overlay = {
        key: {**rows[entry.key], "text": f"{entry.key} of the baseline of 'repan cycle', where it differs."}
        for key, entry in OVERLAY.items()
    }
    return {**rows, **{key: {**facts, "default": None} for key, facts in overlay.items()}}


def _as_line(facts: str | Facts) -> str:
    if isinstance(facts, str):
        return facts
    return f"{facts['text']} ({facts['type']}, default {as_text(facts['default'])})"


@KINDS.register("trackers")
def _trackers() -> Rows:
    return {name: " ".join((inspect.getdoc(TRACKERS[name]) or "").split()) for name in TRACKERS}


def _look(name: str) -> str:
    """Describe what can be done with a network that is not in this version's table."""
    from repan_cli.models import catalog  # all other names are listed without PyTorch

    try:
        return catalog.look(name).describe()
    except Exception:  # a network that does not run on the meta device, or needs a package
        return "not known before it is built: try --dry-run"


RUNS = "runs"


@KINDS.register(RUNS)
def _runs() -> Rows:
    return {str(each.path): _facts(each) for each in runs_below(Path("runs"))}


def _facts(run: Run) -> Facts:
    part_of = None if run.part_of is None else str(run.part_of)
    return dataclasses.asdict(run) | {"path": str(run.path), "part_of": part_of}


def _list_runs(options: ListOptions) -> None:
    """Print the runs below `runs`, or below a folder that is given instead of a glob."""
    place = Path(options.pattern) if options.pattern and Path(options.pattern).is_dir() else None
    found = runs_below(place or Path("runs"))
    if options.pattern and place is None:
        found = [each for each in found if fnmatch.fnmatch(str(each.path), f"*{options.pattern}*")]
    if options.as_json:
        print(to_json({str(each.path): _facts(each) for each in found}))
        return
    if not found:
        which = f" match '{options.pattern}'" if options.pattern and not place else ""
        mend = "; give a folder instead of a glob to search it" if which else " yet: 'repan cycle' begins one"
        raise InputError(f"no runs below {place or 'runs'}{which}{mend}")
    titles = ["run", "command", "state", "val best", "test", "age"]
    belongs = any(each.part_of for each in found)
    print_table([*titles, "part of"] if belongs else titles, (_run_row(each, belongs=belongs) for each in found))
    for go_on in dict.fromkeys(each.go_on for each in found if each.go_on):  # whole lines, to be copied
        print(f"continue with: {shown(go_on)}")


def _run_row(run: Run, *, belongs: bool) -> tuple[str, ...]:
    row = str(run.path), run.command, run.state, percent(run.best), percent(run.test), _age(run.age)
    return (*row, str(run.part_of or "-")) if belongs else row


def _age(seconds: float) -> str:
    """Return an age in words; an age below -1 s belongs to a run whose clock was ahead."""
    if seconds < -1:
        return "in the future"
    return duration(max(0, seconds)) if seconds < DAY else count(int(seconds // DAY), "day")


DAY = 24 * 3600


def run(options: ListOptions) -> None:
    """Print the names of one kind that match a glob; without a glob, other packages' models are counted instead of
    listed.
    """
    if options.kind == RUNS:
        _list_runs(options)
        return
    rows = KINDS[options.kind]()
    pattern = options.pattern
    if pattern:
        if options.kind == SETTINGS:
            (pattern,) = as_given({pattern: ""})
        listed = {name: text for name, text in rows.items() if fnmatch.fnmatch(name, pattern)}
        if not listed:
            wider = (f"{pattern}.*", f"*{pattern.strip('*')}*")
            found = next((glob for glob in wider if fnmatch.filter(rows, glob)), None)
            hint = f"; try '{found}'" if found else did_you_mean(pattern, rows)
            raise InputError(f"no {options.kind} match '{pattern}'{hint}")
        listed = {name: text or _look(name) for name, text in listed.items()}
    else:
        listed = {name: text for name, text in rows.items() if not name.startswith(FOREIGN)}
    if options.as_json:
        print(to_json(listed))
        return
    print_table([options.kind, ""], ((name, _as_line(facts)) for name, facts in listed.items()))
    if len(rows) > len(listed) and not pattern:
        more = f"and {len(rows) - len(listed)} of timm's and torchvision's: repan list {options.kind} 'timm:*'"
        print(f"{more}; or your own, as file.py:function")
