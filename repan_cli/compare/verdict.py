"""Summarize a comparison in one sentence: its result, its limits, and the settings that all runs share."""

from __future__ import annotations

from collections.abc import Sequence

from repan_cli.compare.groups import WITHOUT_EFFECT, Comparison, Group, has_setting, setting_of
from repan_cli.compare.results import Result
from repan_cli.compare.statistics import CONFIDENCE, Difference, Spread
from repan_cli.config.schema import as_text
from repan_cli.config.settings import DECLARED, SCHEMA
from repan_cli.system.sampling import is_extreme, standard_error, with_error
from repan_cli.system.text import count

ALWAYS = ("model.name", "block.name", "data.name")
"""Settings that are listed for all runs even if they have their defaults."""


def numbered(comparison: Comparison, group: Group) -> str:
    """Return the label of a group with its number in the comparison, which other texts use."""
    return f"{number_of(comparison, group)}. {group.label}"


def number_of(comparison: Comparison, group: Group) -> int:
    """Return the number of a group, counted from 1, the control."""
    return 1 + next(place for place, each in enumerate(comparison.groups) if each is group)


def verdict(comparison: Comparison) -> str:
    """Describe what the runs show about test top-1: which groups differ from the control, and which do not."""
    compared = [group for group in comparison.groups if group is not comparison.control]
    gains = [(group, gain) for group in compared if (gain := comparison.gain(group)) is not None]
    if not gains:
        return _alone(comparison.groups)
    known = [(group, gain) for group, gain in gains if gain.low is not None and gain.high is not None]
    constant = [(group, gain) for group, gain in gains if gain.constant]
    if not known and not constant:
        best, gain = max(gains, key=lambda each: each[1].mean)
        return (
            f"One seed is not enough: {_called(comparison, best)} ends {_points(gain.mean)} the control, and another "
            f"seed may reverse that. Give --seeds 0,1,2 or more."
        )
    above, below, same = _sorted(known)
    sentences = [
        *([f"{_all(comparison, above)} above the control, beyond the variation between seeds."] if above else []),
        *([f"{_all(comparison, below)} below the control, beyond the variation between seeds."] if below else []),
        *([_undecided(comparison, same)] if same else []),
        *([_constant(comparison, constant)] if constant else []),
    ]
    if len(known) > 1:
        chance = round(1 / (1 - CONFIDENCE))
        sentences.append(f"One in {chance} such intervals misses by chance; this page has {len(known)}.")
    return " ".join(sentences)


def _alone(groups: Sequence[Group]) -> str:
    """Describe the results of groups that have no control to compare with."""
    spread = Spread.of([value for group in groups[:1] for value in group.by_seed("test_top1").values()])
    over = f" over {count(len(spread.values), 'seed')}"
    figure = f"{spread.mean:.2f}" + (f" ± {spread.sd:.2f}{over}" if spread.sd is not None else " from one seed")
    if len(groups) == 1:
        return f"Test top-1 {figure}. Nothing to compare with: repan cycle --control trains the same without restarts."
    return "These configurations use different data from the control, so their differences cannot be measured."


Known = tuple[Group, Difference]


def _sorted(known: Sequence[Known]) -> tuple[list[Known], list[Known], list[Known]]:
    """Sort differences into those whose whole interval is above zero, those below, and the others."""
    above = [each for each in known if (each[1].low or 0.0) > 0]
    below = [each for each in known if (each[1].high or 0.0) < 0]
    return above, below, [each for each in known if each not in above and each not in below]


def _all(comparison: Comparison, found: Sequence[Known]) -> str:
    """Name groups with their intervals, the largest difference first."""
    largest = sorted(found, key=lambda each: -abs(each[1].mean))
    named = [f"{_called(comparison, group)} ({_interval(gain)})" for group, gain in largest]
    return f"{', '.join(named)} {'lies' if len(named) == 1 else 'lie'}"


def _undecided(comparison: Comparison, same: Sequence[Known]) -> str:
    """Name the groups that do not differ measurably from the control, and the size of a difference that may have been
    missed.
    """
    named = ", ".join(_called(comparison, group) for group, _ in same)
    widest = max(max(abs(gain.low or 0.0), abs(gain.high or 0.0)) for _, gain in same)
    return (
        f"{named} cannot be distinguished from the control: with this many seeds, a difference of up to "
        f"{widest:.2f} points could go undetected."
    )


def _constant(comparison: Comparison, found: Sequence[Known]) -> str:
    """Name the groups that differ from the control by the same amount with every seed."""
    named = ", ".join(f"{_called(comparison, group)} is {_points(gain.mean)} the control" for group, gain in found)
    errors = _errors(comparison)
    images = f" The sampling error of a network's test top-1 is {'; '.join(errors)}." if errors else ""
    return (
        f"With every seed alike, {named}. A difference that does not vary between seeds gives no estimate of how large "
        f"a difference could go undetected.{images}"
    )


def _called(comparison: Comparison, group: Group) -> str:
    return f"configuration {number_of(comparison, group)}"


def _points(mean: float) -> str:
    """Return a distance in percentage points from a value that follows."""
    if abs(mean) < 0.005:
        return "level with"
    return f"{abs(mean):.2f} points {'above' if mean >= 0 else 'below'}"


def _interval(gain: Difference) -> str:
    return f"{gain.mean:+.2f} points, {CONFIDENCE:.0%} interval {gain.low:+.2f} to {gain.high:+.2f}"


# ---------------------------------------------------------------------------------------------- what all share


def sampling(comparison: Comparison) -> str | None:
    """Describe the number of test images, and how precisely they measure the accuracy of one network.

    It is None if runs did not record it.
    """
    errors = _errors(comparison)
    if not errors:
        return None
    is_one = len(errors) == 1 and len({result.test_set for result in _results(comparison)}) == 1
    shared = " All runs share these images, so differences are known more precisely." if is_one else ""
    kind = ", one standard deviation" if any("±" in error for error in errors) else ""
    return f"Sampling error{kind} of a network's test top-1: {'; '.join(errors)}.{shared}"


def _errors(comparison: Comparison) -> list[str]:
    """Return the largest sampling error for each number of test images, and the widest interval near 0 and 100 %."""
    results = _results(comparison)
    errors = []
    for size in sorted({result.test_images for result in results if result.test_images}):
        shares = {result.test_top1 for result in results if result.test_images == size}
        extreme = {share for share in shares if is_extreme(share, size)}
        told = []
        if usual := shares - extreme:
            told.append(f"± {max(standard_error(share, size) for share in usual):.2f} points")
        if extreme:
            widest = min(extreme, key=lambda share: abs(share - 50))
            told.append(f"{with_error(widest, size)} as a {CONFIDENCE:.0%} interval")
        errors.append(f"{' and '.join(told)} by {count(size, 'test image')}")
    return errors


def common_settings(comparison: Comparison) -> dict[str, str]:
    """Return the settings that all runs share, as typed: network, block, data, and everything that is not the default.

    It includes the baseline's own settings, and settings that this version does not know.
    """
    results = _results(comparison)
    present = {key for result in results for key in result.settings} - WITHOUT_EFFECT - {"data.root"}
    ordered = [*DECLARED, *sorted(present - DECLARED.keys())]
    shared: dict[str, str] = {}
    for key in ordered:
        if key not in present or not all(has_setting(result, key) for result in results):
            continue
        values = [setting_of(result, key) for result in results]
        usual = key in SCHEMA and values[0] == SCHEMA[key].default
        if len(set(map(repr, values))) == 1 and (key in ALWAYS or not usual):
            shared[key] = as_text(values[0])
    return shared


def _results(comparison: Comparison) -> list[Result]:
    return [result for group in comparison.groups for result in group.results]
