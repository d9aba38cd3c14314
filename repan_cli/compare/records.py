"""Keep a finished run as one small JSON file, `STUDY/ARM/SEED.json`, that `repan compare` reads like the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repan_cli import config
from repan_cli.compare.results import Result, is_record
from repan_cli.errors import InputError
from repan_cli.runs import MACHINE
from repan_cli.runs.felt import KEYS
from repan_cli.runs.trackers import read_metrics
from repan_cli.system.files import read_json, to_json, write_bytes
from repan_cli.system.text import last_part

KEPT = ("cycle", "epoch", "loss", "train_top1", "val_top1", "lr", "steps", *KEYS)
"""The figures of an epoch that a record keeps."""

PRIVATE = ("run.out", "data.root")
"""Settings that are folders of the machine that made the run. Other absolute paths are cut to their last part."""

DIGITS = 6
"""The number of significant digits of an epoch's figures."""


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write a record of each run below `folder`, named by the run's parent folder and its seed. Return the files.

    Raises InputError for two runs that would share a file.
    """
    targets: dict[Path, Result] = {}
    for result in results:
        path = folder / result.folder.name / f"{result.seed}.json"
        if path in targets:
            raise InputError(
                f"{result.path} and {targets[path].path} would both be written to the record {path}: name one of them"
            )
        targets[path] = result
    for path, result in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = to_json(_record(result), compact=True).replace('{"cycle"', '\n{"cycle"')
        write_bytes(path, (text + "\n").encode())
    return [*targets]


def _record(result: Result) -> dict[str, Any]:
    if is_record(result.path):
        return dict(read_json(result.path))
    layer = config.read_file(result.path / "config.yaml")
    if "cycle.count" in layer:  # a resume may have added some
        layer["cycle.count"] = config.as_text(result.settings["cycle.count"])
    machine = read_json(result.path / "env.json") if (result.path / "env.json").exists() else {}
    summary = {key: value for key, value in read_json(result.path / "summary.json").items() if key != "control"}
    return {
        "command": result.command,
        "settings": {key: last_part(value) for key, value in layer.items() if key not in PRIVATE},
        "machine": _machine(machine),
        "summary": summary,
        "epochs": [_epoch(record) for record in read_metrics(result.path / "metrics.jsonl")],
    }


def _machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: facts[key] for key in MACHINE if key in facts}
    resumed = [_machine(each) for each in facts.get("resumed", [])]
    return {**kept, "resumed": resumed} if resumed else kept


def _epoch(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _short(value) for key, value in record.items() if key in KEPT}


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
