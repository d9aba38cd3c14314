"""Read the directories of finished runs: settings, figures and validation curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repan_cli import config
from repan_cli.config.conventions import TEST_SET
from repan_cli.config.renamed import present
from repan_cli.errors import InputError
from repan_cli.runs.directory import SERIES
from repan_cli.runs.felt import KEYS, Pace
from repan_cli.runs.trackers import read_metrics
from repan_cli.system.files import read_json
from repan_cli.system.text import count


@dataclass(frozen=True)
class Result:
    """A finished run. Accuracies are in percent; `test_top1` is that of the network that validation chose.

    `classes`, `images` (of an epoch), `device`, `test_images` and `test_set` (a digest of the test images) are None for
    runs that did not record them. `records`
    holds the cycle, validation top-1, rate and losses of each epoch. Rate and losses are given as far as they were
    recorded.
    """

    path: Path
    command: str
    settings: Mapping[str, Any]
    seed: int
    dataset: str
    classes: int | None
    images: int | None
    test_top1: float
    last_test_top1: float
    val_top1: float | None
    seconds: float
    device: str | None
    test_images: int | None
    test_set: str | None
    records: list[dict[str, Any]]

    @property
    def epochs(self) -> int:
        return len(self.records)

    @property
    def folder(self) -> Path:
        return folder_of(self.path)

    @property
    def pace(self) -> Pace | None:
        """Return the size of an epoch; None if the run did not record the number of its images."""
        sizes = self.settings["data.batch_size"], self.settings["optim.accumulate"]
        return Pace(self.images, *sizes) if self.images else None

    def is_scored_as(self, other: Result) -> bool:
        """Return whether two runs were scored on the same test images, as far as both recorded them."""
        if (self.dataset, self.classes) != (other.dataset, other.classes):
            return False
        facts = (self.test_images, other.test_images), (self.test_set, other.test_set)
        return all(None in pair or pair[0] == pair[1] for pair in facts)

    @property
    def images_seen(self) -> int | None:
        return self.images * self.epochs if self.images else None


def folder_of(run: Path) -> Path:
    """Return the folder that contains a run, next to those with other seeds.

    If its name says more than the seed, like that of the control in runs/demo/control_seed_0, return the name without
    the seed: runs/demo/control.
    """
    path = run.resolve()
    return path.parent / path.name.rpartition("seed_")[0].rstrip("_")


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and not (folder / SERIES).exists()


def is_record(path: Path) -> bool:
    """Return whether a path is the record of a run: a file such as 0.json, named by the run's seed."""
    return path.suffix == ".json" and path.stem.isdecimal() and path.is_file()


def find_runs(words: Iterable[str]) -> list[Path]:
    """Find the runs that the arguments name: run directories, files in one, records, folders with those, or globs.

    Raises InputError for an argument that names none, and for a folder that cannot be read.
    """
    found: dict[Path, Path] = {}
    for word in words:
        paths = [Path(word)] if Path(word).exists() else _matching(word)
        try:
            runs = [run for path in paths for run in _runs_at(path)]
        except OSError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
        if not runs:
            raise InputError(f"no run directory {word}" if not paths else f"{word} holds no run directory")
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _matching(glob: str) -> list[Path]:
    path = Path(glob)
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _runs_at(path: Path) -> Iterator[Path]:
    if is_record(path):
        yield path
        return
    if path.is_file():
        path = path.parent
        if not is_run(path):
            return
    if is_run(path):
        yield path
        return
    for inner in sorted(path.iterdir()):
        leads_elsewhere = inner.is_symlink() and not is_run(inner)  # perhaps a cycle
        if inner.is_dir() and not inner.name.startswith(".") and not leads_elsewhere:
            yield from _runs_at(inner)
        elif is_record(inner):
            yield inner


def read_result(path: Path) -> Result:
    """Read a finished run. Raises InputError, with the reason, for one that is not finished or cannot be read."""
    if is_record(path):
        return _understood(lambda: _of_record(path))
    status = read_json(path / "status.json") if (path / "status.json").exists() else {"state": "done"}
    if status.get("state") != "done" or not (path / "summary.json").exists():
        where = f" in cycle {status['cycle']}, epoch {status['epoch']}" if "epoch" in status else ""
        raise InputError(f"not finished ({status.get('state')}{where})")
    return _understood(lambda: _of_folder(path))


def _understood(read: Callable[[], Result]) -> Result:
    """Return the result of `read`. Raises InputError instead for files that repan did not write."""
    try:
        return read()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"its files are not what repan writes ({type(error).__name__}: {error})") from None


def _of_folder(path: Path) -> Result:
    summary, records = read_json(path / "summary.json"), read_metrics(path / "metrics.jsonl")
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    if damaged := len(lines) - len(records):
        raise InputError(f"metrics.jsonl is not what repan writes: {count(damaged, 'line')} of {len(lines)} damaged")
    settings = _with_added_cycles(read_settings(path / "config.yaml", summary["command"]), summary)
    machine = read_json(path / "env.json") if (path / "env.json").exists() else {}
    return _result(path, summary, records, settings, machine)


def _with_added_cycles(settings: dict[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with the number of cycles that were run, to which a resume of an older version added."""
    known, run = settings.get("cycle.count"), len(summary["cycles"])
    return {**settings, "cycle.count": run} if known is not None and run > known else settings


def _of_record(path: Path) -> Result:
    record = read_json(path)
    settings = _typed(record["settings"], record["command"])
    return _result(path, record["summary"], record["epochs"], settings, record["machine"])


def _result(
    path: Path,
    summary: Mapping[str, Any],
    records: list[dict[str, Any]],
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> Result:
    phases = [row for row in (summary["baseline"], *summary["cycles"]) if row]
    start = summary["baseline"] if records and records[0]["cycle"] else None
    course = [_record(record) for record in records]
    validation = [record["val_top1"] for record in course] + ([_number(start["top1"])] if start else [])
    images = summary.get("images", {}).get("train")
    return Result(
        path=path,
        command=str(summary["command"]),
        settings=settings,
        seed=int(settings["run.seed"]),
        dataset=str(summary["dataset"]),
        classes=int(summary["classes"]) if "classes" in summary else None,
        images=None if images is None else int(images),
        test_top1=_finite(float(summary["test"]["top1"])),
        last_test_top1=_finite(float(phases[-1]["test_top1"])),
        val_top1=max((value for value in validation if value is not None), default=None),
        seconds=_finite(float(summary["seconds"])),
        device=_device(machine),
        test_images=_test_images(summary),
        test_set=str(summary[TEST_SET]) if summary.get(TEST_SET) else None,
        records=course,
    )


def _test_images(summary: Mapping[str, Any]) -> int | None:
    """Return the number of test images, if a run recorded it."""
    found = summary["test"].get("images") or summary.get("images", {}).get("test")
    return int(found) if found and int(found) > 0 else None


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the needed part of an epoch's record, with None for values that its run did not record."""
    figures = {name: _number(record.get(name)) for name in ("lr", "loss", *KEYS)}
    steps = record.get("steps")
    return {
        "cycle": int(record["cycle"]),
        "val_top1": _number(record["val_top1"]),
        "steps": None if steps is None else int(steps),
        **figures,
    }


def _device(machine: Mapping[str, Any]) -> str | None:
    """Return the device of a run: a GPU's name, or cpu. If it was resumed on others, they follow in their order."""
    facts = [machine, *machine.get("resumed", [])]
    names = [str(name) for each in facts if (name := each.get("gpu") or each.get("device"))]
    changes = [name for name, _ in itertools.groupby(names)]
    return ", then ".join(changes) or None


def _number(value: Any) -> float | None:
    """Return a finite number, or None. Raises ValueError or TypeError for anything else."""
    return None if value is None else _finite(value)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    return float(value)


def read_settings(path: Path, command: str) -> dict[str, Any]:
    """Read every setting of a run of `command`, by its dotted key.

    Settings that this version knows are typed, and have their present names. A setting that the file omits has its
    default.
    """
    return _typed(config.parse_yaml(path.read_text(encoding="utf-8"), str(path)), command)


def _typed(layer: Mapping[str, Any], command: str) -> dict[str, Any]:
    cycles = command == "cycle"
    settings = {key: entry.default for key, entry in config.SCHEMA.items() if cycles or not key.startswith("cycle.")}
    for key, text in present(layer).items():
        entry = config.DECLARED.get(key)
        try:
            settings[key] = entry.parse(text) if entry else _frozen(text)
        except ValueError:  # a choice that another version knows
            settings[key] = _frozen(text)
    return settings


def _frozen(text: Any) -> Any:
    return tuple(map(_frozen, text)) if isinstance(text, list) else text


def read_all(paths: Sequence[Path]) -> tuple[list[Result], list[tuple[str, str]]]:
    """Read the finished runs, and name each of the others with the reason."""
    results, left_out = [], []
    for path in paths:
        try:
            results.append(read_result(path))
        except InputError as error:
            left_out.append((str(path), str(error)))
    return results, left_out
