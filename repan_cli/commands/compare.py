"""`repan compare`: compare runs, grouped by configuration, with their spread over seeds."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repan_cli.commands.options import CompareOptions
from repan_cli.compare import page, records, table
from repan_cli.compare.groups import as_data, compare
from repan_cli.compare.results import find_runs, folder_of, read_all
from repan_cli.display.comparison import show
from repan_cli.display.console import tell
from repan_cli.errors import InputError
from repan_cli.system.files import to_json, write_bytes
from repan_cli.system.notices import warn
from repan_cli.system.text import count


def run(options: CompareOptions) -> None:
    """Print the comparison of the runs that the arguments name, and write it as a page or a table if asked."""
    if options.as_json and options.as_csv:
        raise InputError("--json and --csv both write to stdout: give one")
    compared = find_runs(options.runs)
    controls = {word: _runs_of(word, compared, options) for word in options.control}
    results, left_out = read_all(find_runs(map(str, [*compared, *itertools.chain(*controls.values())])))
    for path, why in left_out:
        warn(f"left out: {path}: {why}")
    comparison = compare(results, controls, by_folder=options.by_folder)
    for target, text_of in ((options.html, page.render), (options.markdown, table.markdown)):
        if target:
            write_bytes(target, text_of(comparison, left_out).encode())
            tell(f"wrote {target}")
    if options.records:
        tell(f"wrote {count(len(records.write(results, options.records)), 'record')} below {options.records}")
    if options.as_json:
        unfinished = [{"run": path, "why": why} for path, why in left_out]
        print(to_json({**as_data(comparison), "left_out": unfinished}))
    elif options.as_csv:
        for warning in comparison.warnings:
            warn(warning)
        print(_as_csv(as_data(comparison)), end="")
    else:
        show(comparison)


def _runs_of(control: str, compared: Sequence[Path], options: CompareOptions) -> list[Path]:
    """Return the runs that `--control` names by a path or, with `--by-folder`, by the folder's name in the table."""
    inside = [run for run in compared if f"/{folder_of(run).as_posix()}".endswith(f"/{control}")]
    if not inside or Path(control).exists():
        return find_runs([control])
    if not options.by_folder:
        raise InputError(f"no run directory {control}: it names a group only with --by-folder")
    return inside


def _as_csv(data: Mapping[str, Any]) -> str:
    """Return the comparison as CSV, one row per group."""
    table = io.StringIO()
    flat = [_flat(group) for group in data["groups"]]
    writer = csv.DictWriter(table, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return table.getvalue()


def _flat(group: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: group[name] for name in ("label", "control", "command", "dataset")}
    row["seeds"] = " ".join(map(str, group["seeds"]))
    for figure in ("test_top1", "last_test_top1", "val_top1"):
        spread = group[figure] or {}
        row |= {figure: spread.get("mean"), f"{figure}_sd": spread.get("sd")}
    gain = (group["difference"] or {}).get("test_top1", {})
    row |= {"difference": gain.get("mean"), "low": gain.get("low"), "high": gain.get("high")}
    for label, found in group["differences"].items():
        row |= {f"over {label}": (found or {}).get("mean")} if len(group["differences"]) > 1 else {}
    row["felt"] = max(group["felt"].values(), default=None)
    return row | {name: group[name] for name in ("epochs", "images", "hours")} | {"device": " ".join(group["devices"])}
