"""Group runs by their settings: mean and spread over seeds, and differences with their uncertainty.

The functions depend only on finished runs. A result is a mean over seeds, never one run.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from repan_cli.compare.results import Result
from repan_cli.compare.statistics import CONFIDENCE, Difference, Spread, difference
from repan_cli.config.conventions import SAME_RESULT
from repan_cli.config.settings import DECLARED, OVERLAY
from repan_cli.errors import InputError
from repan_cli.runs.felt import HEADS, Pace, Records, loss_after

WITHOUT_EFFECT = {
    *(key for key in SAME_RESULT if key != "data.root"),
    *("run.seed", "run.out", "run.channels_last", "run.threads", "run.deterministic", "run.compile", "teacher.cache"),
}
"""Settings that may differ within a group: the seed, the output folder, the speed of computation, and the display."""

ONLY_AT_RESTARTS = {
    f"cycle.{name}"
    for name in ("rule", "calibration_images", "attach", "attach_epochs", "freeze_trunk", "branch_init", "trunk_scale")
}
"""Settings that a control, which never restarts, does not read."""


# ---------------------------------------------------------------------------------------------- groups


class Cost(NamedTuple):
    """Epochs, training images seen (None if runs did not record them), and hours."""

    epochs: float
    images: float | None
    hours: float


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing relevant but their seed, one per seed.

    `settings` distinguish the group from others.
    """

    label: str
    settings: Mapping[str, Any]
    results: tuple[Result, ...]

    @property
    def seeds(self) -> list[int]:
        return [result.seed for result in self.results]

    def result(self, seed: int) -> Result:
        return next(result for result in self.results if result.seed == seed)

    def by_seed(self, figure: str) -> dict[int, float]:
        return {result.seed: getattr(result, figure) for result in self.results}

    def spread(self, figure: str) -> Spread | None:
        """Return the mean and spread of a figure of `Result`; None if not all runs have it."""
        values = list(self.by_seed(figure).values())
        return None if None in values else Spread.of(values)

    def devices(self) -> list[str]:
        """Return the devices on which its runs were computed, as far as they recorded them."""
        return sorted({result.device for result in self.results if result.device})

    def cost(self) -> Cost:
        """Return the average cost of a run."""
        epochs, seconds, seen = (self._mean(figure) for figure in ("epochs", "seconds", "images_seen"))
        return Cost(epochs or 0.0, seen, (seconds or 0.0) / 3600)

    def _mean(self, figure: str) -> float | None:
        found = self.spread(figure)
        return found.mean if found else None


@dataclass(frozen=True)
class Comparison:
    """Groups of runs. The first `control_count` are the controls with which the others are compared."""

    groups: tuple[Group, ...]
    warnings: tuple[str, ...]
    control_count: int = 1

    @property
    def control(self) -> Group:
        return self.groups[0]

    def felt(self, group: Group) -> dict[int, float]:
        """Return, by cycle, the effect of its restart on the training loss.

        It is the mean loss of the first 200 steps divided by that of a control over the same steps, averaged over the
        seeds that both have. The control is the first one that had the same learning rate there.
        """
        ratios: dict[int, float] = {}
        for cycle in _restarts(group):
            for control in self.controls:
                common = set(group.seeds) & set(control.seeds) if control is not group else set()
                pairs = [(group.result(seed), control.result(seed)) for seed in sorted(common)]
                found = [ratio for pair in pairs if (ratio := _felt(*pair, cycle)) is not None]
                if found:
                    ratios.setdefault(cycle, statistics.fmean(found))
        return ratios

    @property
    def controls(self) -> tuple[Group, ...]:
        return self.groups[: self.control_count]

    def gain(self, group: Group, figure: str = "test_top1", *, over: Group | None = None) -> Difference | None:
        """Return the difference from a control, by default the first.

        It is None for the control itself, and for a group that was scored on other images, with which a control cannot
        be compared.
        """
        control = over or self.control
        scored = [*control.results, *group.results]
        if group is control or not all(result.is_scored_as(scored[0]) for result in scored):
            return None
        return difference(group.by_seed(figure), control.by_seed(figure))


def _restarts(group: Group) -> list[int]:
    """Return the cycles that begin with a restart."""
    first = group.results[0]
    return [] if _is_control(first) else sorted({record["cycle"] for record in first.records} - {0})


def _felt(ours: Result, theirs: Result, cycle: int) -> float | None:
    """Return the ratio of the losses in the first steps of a cycle.

    It is None if the losses are not known, or if the learning rates differ.
    """
    place = [number for number, record in enumerate(ours.records) if record["cycle"] == cycle]
    stretches = [result.records[place[0] : place[-1] + 1] if place else [] for result in (ours, theirs)]
    if not all(stretches):
        return None
    rates = [stretch[0]["lr"] for stretch in stretches]
    if None in rates or not math.isclose(*rates, rel_tol=1e-6):
        return None
    loss, control_loss = (_first_loss(s, run.pace) for s, run in zip(stretches, (ours, theirs), strict=True))
    return loss / control_loss if loss and control_loss else None


def _first_loss(records: Records, pace: Pace | None) -> float | None:
    return None if pace is None else loss_after(records, HEADS[-1], pace)


def compare(
    results: Sequence[Result], controls: Mapping[str, Sequence[Path]] | None = None, *, by_folder: bool = False
) -> Comparison:
    """Group finished runs, and choose the controls with which they are compared.

    The controls are the groups of the runs in `controls`, else the group without restarts, else the first group. Runs
    with the same settings form a group. With `by_folder`, the runs in one folder form a group that has the folder's
    name.
    """
    if not results:
        raise InputError("no finished run to compare: 'repan list runs' shows the state of each")
    kinds: dict[Any, list[Result]] = {}
    for result in results:
        kinds.setdefault(result.folder if by_folder else _kind(result), []).append(result)
    members, warnings = [], [*_different_problems(results)]
    for runs in kinds.values():
        single = {run.seed: run for run in runs}
        if len(single) < len(runs):
            warnings.append(f"several runs of one seed ({runs[0].path} and others): the last one of each is used")
        if by_folder and (differing := _differing(runs)):
            warnings.append(f"the runs in {runs[0].folder} differ in {', '.join(differing)}")
        members.append(tuple(single[seed] for seed in sorted(single)))
    chosen, doubts = _controls(members, controls or {})
    firsts = [runs[0] for runs in members]
    keys = _differing(firsts)
    if not by_folder and (untold := sorted(set(keys) - set(_telling(firsts, keys)))):
        warnings.append(
            f"labels show only the settings that distinguish the groups; they also differ in {', '.join(untold)}"
        )
    groups = _labelled([members[number] for number in dict.fromkeys((*chosen, *range(len(members))))])
    named = _named_by_folder(groups) if by_folder else groups
    return Comparison(named, (*warnings, *doubts, *_unequal_lengths(named)), len(chosen))


def _unequal_lengths(groups: Sequence[Group]) -> list[str]:
    """Warn if runs trained for different numbers of epochs, within a group or in different ones."""
    lengths = sorted({result.epochs for group in groups for result in group.results})
    if len(lengths) < 2:
        return []
    told = " and ".join(map(str, (lengths[0], lengths[-1])))
    return [f"these runs differ in length ({told} epochs), which alone may explain a difference"]


def _kind(result: Result) -> tuple[Any, ...]:
    """Return the properties that the runs of a group share."""
    settings = sorted((key, repr(value)) for key, value in result.settings.items() if _reads(result, key))
    return result.command, result.dataset, result.classes, *settings


def _is_control(result: Result) -> bool:
    """Return whether a run has no restarts, like those of other commands than cycle."""
    return result.command != "cycle" or result.settings.get("cycle.restart") in ("none", "rescale")


def _different_problems(results: Sequence[Result]) -> list[str]:
    names = sorted({result.dataset for result in results})
    classes = sorted({result.classes for result in results if result.classes})
    if len(names) > 1:
        return [f"these runs use different data sets: {', '.join(names)}"]
    if len(classes) > 1:
        return [f"these runs have different numbers of classes: {', '.join(map(str, classes))}"]
    if not all(result.is_scored_as(each) for each in _distinct(results) for result in results):
        sizes = sorted({result.test_images for result in results if result.test_images})
        counts = f" ({' and '.join(f'{size:,}' for size in sizes)})" if len(sizes) > 1 else ""
        return [f"these runs were scored on different test images{counts}: groups that differ in them are not compared"]
    return []


def _distinct(results: Sequence[Result]) -> list[Result]:
    """Return one run for each test set."""
    return list({(result.test_images, result.test_set): result for result in results}.values())


def _named_by_folder(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Label groups with their folders, relative to the folder that contains them all."""
    folders = [group.results[0].folder for group in groups]
    common = Path(os.path.commonpath(folders))
    names = [folder.relative_to(common).as_posix() if folder != common else folder.name for folder in folders]
    return tuple(replace(group, label=name) for group, name in zip(groups, names, strict=True))


def _controls(members: list[tuple[Result, ...]], controls: Mapping[str, Sequence[Path]]) -> tuple[list[int], list[str]]:
    """Choose which of the groups are the controls, and warn if that is doubtful."""
    if controls:
        return list(dict.fromkeys(_group_of(word, paths, members) for word, paths in controls.items())), []
    found = [number for number, runs in enumerate(members) if _is_control(runs[0])]
    if len(found) == len(members):  # no group restarts: plain training is no control for plain training
        found = [number for number, runs in enumerate(members) if runs[0].command == "cycle"]
    if not found:
        none = "these runs have no control: the first group takes its place; choose another with --control RUN"
        data = [(runs[0].dataset, runs[0].classes) for runs in members]
        return [0], [none] if data.count(data[0]) > 1 else []
    several = f"{len(found)} groups have no restarts: the first is the control; choose another with --control RUN"
    return found[:1], [several] if len(found) > 1 else []


def _group_of(word: str, paths: Sequence[Path], members: list[tuple[Result, ...]]) -> int:
    """Return the number of the group to which the runs named by a word belong."""
    wanted = {path.resolve() for path in paths}
    found = [number for number, runs in enumerate(members) if any(run.path.resolve() in wanted for run in runs)]
    if not found:
        raise InputError(f"the control {word} is not among the compared runs")
    if len(found) > 1:
        raise InputError(f"--control {word} matches runs of {len(found)} groups: name a run of the group you mean")
    return found[0]


def _labelled(members: list[tuple[Result, ...]]) -> tuple[Group, ...]:
    firsts = [runs[0] for runs in members]
    keys = _differing(firsts)
    telling = _telling(firsts, keys)
    commands, classes = (len({getattr(first, name) for first in firsts}) > 1 for name in ("command", "classes"))
    groups = []
    for first, runs in zip(firsts, members, strict=True):
        settings = {key: setting_of(first, key) for key in keys if _reads(first, key)}
        words = [first.command] * commands + [
            f"{key}={_shown(value)}" for key, value in settings.items() if key in telling
        ]
        words += [f"{first.classes} classes"] * classes
        groups.append(Group(" ".join(words) or _common_label(first), settings, runs))
    return tuple(groups)


LONG_LABEL = 60
"""The length of a label above which it names only the settings that distinguish the groups."""


REASONS = ("cycle.restart", "data.name")
"""Settings that decide which others a run reads. A label without them would tell a control by what it lacks."""


def _telling(firsts: Sequence[Result], keys: list[str]) -> list[str]:
    """Return the settings that labels name: all that differ or, if labels became long, just enough to distinguish all.

    Settings that tell why a group does not have others come first, then those that distinguish the most groups.
    """

    def labels(chosen: Sequence[str]) -> list[str]:
        return [" ".join(f"{k}={_shown(setting_of(each, k))}" for k in chosen if _reads(each, k)) for each in firsts]

    if max(map(len, labels(keys)), default=0) <= LONG_LABEL:
        return keys
    chosen = [key for key in keys if key in REASONS]
    while len(set(labels(chosen))) < len(set(labels(keys))):
        best = max((key for key in keys if key not in chosen), key=lambda key: len(set(labels([*chosen, key]))))
        chosen.append(best)
    return [key for key in keys if key in chosen]


def _differing(firsts: Sequence[Result]) -> list[str]:
    """Return the settings in which groups differ, in the order of their declaration."""
    present = {key for first in firsts for key in first.settings}
    order = {key: place for place, key in enumerate(DECLARED)}
    differing = []
    for key in sorted(present, key=lambda key: (order.get(key, len(order)), key)):
        values = {repr(setting_of(first, key)) for first in firsts if _reads(first, key)}
        if len(values) > 1:
            differing.append(key)
    return differing


def _reads(result: Result, key: str) -> bool:
    """Return whether a setting has an effect on a run's result."""
    if key in WITHOUT_EFFECT or (key in ONLY_AT_RESTARTS and _is_control(result)):
        return False
    if key == "data.root":  # known sets are the same wherever they are stored
        return result.dataset == "folder"
    return has_setting(result, key)


def has_setting(result: Result, key: str) -> bool:
    """Return whether a run has a setting, given or by default."""
    return key in result.settings or (key in OVERLAY and result.command == "cycle")


def setting_of(result: Result, key: str) -> Any:
    """Return a setting's value. The baseline's values default to the main ones, but without a teacher."""
    if key in result.settings or key not in OVERLAY:
        return result.settings[key]
    return None if key == "baseline.teacher.name" else result.settings[key.removeprefix("baseline.")]


def _shown(value: Any) -> str:
    """Write a value as the user would type it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _common_label(result: Result) -> str:
    names = (result.settings.get(key) for key in ("model.name", "block.name", "data.name"))
    return " ".join([result.command, *(str(name) for name in names if name)])


# ---------------------------------------------------------------------------------------------- plain data


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison in plain types, for JSON."""
    return {
        "confidence": CONFIDENCE,
        "groups": [_group_as_data(comparison, group) for group in comparison.groups],
        "warnings": list(comparison.warnings),
    }


def _group_as_data(comparison: Comparison, group: Group) -> dict[str, Any]:
    spreads = {figure: group.spread(figure) for figure in ("test_top1", "last_test_top1", "val_top1")}
    gains = {figure: comparison.gain(group, figure) for figure in ("test_top1", "last_test_top1")}
    first = group.results[0]
    return {
        "label": group.label,
        "settings": dict(group.settings),
        "control": group is comparison.control,
        "command": first.command,
        "dataset": first.dataset,
        "seeds": group.seeds,
        "runs": [str(result.path) for result in group.results],
        **{figure: spread._asdict() if spread else None for figure, spread in spreads.items()},
        "felt": comparison.felt(group),
        "devices": group.devices(),
        "difference": {figure: gain._asdict() for figure, gain in gains.items() if gain} or None,
        "differences": _differences(comparison, group),
        **group.cost()._asdict(),
    }


def _differences(comparison: Comparison, group: Group) -> dict[str, Any]:
    """Return the differences of test top-1 from each of the controls, by their labels."""
    gains = {control.label: comparison.gain(group, over=control) for control in comparison.controls}
    return {label: gain._asdict() if gain else None for label, gain in gains.items()}
