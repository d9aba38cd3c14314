"""Track a run's metrics: JSON lines and CSV always, TensorBoard and W&B on request.

A tracker is one class with a name in `TRACKERS`. `log` takes flat figures of one kind. Its library is imported only in
its constructor.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from repan_cli.errors import InputError
from repan_cli.registry import Registry
from repan_cli.system.files import flush, to_json, write_atomically, write_bytes
from repan_cli.system.notices import warn
from repan_cli.system.packages import how_to_install, missing
from repan_cli.system.text import count, first_line

KINDS = ("epoch", "cycle_end", "final", "restart")
"""The kinds of figures, in the order in which they arrive for a number of finished epochs."""


class Tracker(Protocol):
    def log(self, kind: str, epochs: int, figures: Mapping[str, Any]) -> None:
        """Record the figures of one of KINDS, after this number of epochs of the run."""

    def close(self) -> None:
        """Release files and connections."""


class Lines:
    """A text file to which a run appends its epochs."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8", newline="")

    def keep(self) -> None:
        """Write all lines to the disk, before a state is saved that counts on them: the power may fail."""
        flush(self.file)

    def close(self) -> None:
        self.file.close()


class JsonLines(Lines):
    """metrics.jsonl: one object per epoch, flushed; the authoritative record of the run."""

    def log(self, kind: str, epochs: int, figures: Mapping[str, Any]) -> None:
        if kind == "epoch":
            self.file.write(to_json(figures) + "\n")
            self.file.flush()


class Csv(Lines):
    """metrics.csv: the same for spreadsheets; its columns are the keys of the first record.

    A file that an earlier version began keeps its columns.
    """

    writer: csv.DictWriter[str] | None = None

    def __init__(self, path: Path) -> None:
        self.columns: list[str] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as begun:
                self.columns = next(csv.reader(begun), [])
        super().__init__(path)

    def log(self, kind: str, epochs: int, figures: Mapping[str, Any]) -> None:
        if kind != "epoch":
            return
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, self.columns or list(figures), extrasaction="ignore")
            if not self.columns:
                self.writer.writeheader()
        self.writer.writerow(figures)
        self.file.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl; lines that are damaged or cut off by a kill are skipped."""
    if not path.exists():
        return []
    found = (_record(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [record for record in found if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def rewind(folder: Path, cycle: int, epoch: int) -> None:
    """Remove the records after an epoch from metrics.jsonl and metrics.csv, because a resumed run writes them again.

    Each file is replaced as a whole, and only if something has to be removed.
    """
    path = folder / "metrics.jsonl"
    records = [record for record in read_metrics(path) if _place(record) <= (cycle, epoch)]
    lines = "".join(to_json(record) + "\n" for record in records).encode()
    if path.exists() and path.read_bytes() != lines:
        damaged = path.read_text(encoding="utf-8", errors="replace").splitlines()[:-1]
        if lost := sum(_record(line) is None for line in damaged):
            warn(f"{path}: skipped {count(lost, 'damaged line')}")
        write_bytes(path, lines)
    table = _as_csv(records)
    if (folder / "metrics.csv").exists() and (folder / "metrics.csv").read_bytes() != table:
        write_bytes(folder / "metrics.csv", table)


def _place(record: Mapping[str, Any]) -> tuple[int, int]:
    return record.get("cycle", 0), record.get("epoch", 0)


def _as_csv(records: list[dict[str, Any]]) -> bytes:
    if not records:
        return b""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


# ---------------------------------------------------------------------------------------------- on request


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers see it: its directory, its command, its settings by dotted key."""

    folder: Path
    command: str
    settings: Mapping[str, Any]


class OnRequest(Tracker, Protocol):
    """A tracker of `run.trackers`. `where` says in one line how to look at its figures."""

    where: str

    def __init__(self, run: TrackedRun) -> None: ...

    @staticmethod
    def problem() -> str | None:
        """Return why the tracker cannot be used, and the fix; called before anything is written."""


TRACKERS: Registry[type[OnRequest]] = Registry("tracker")


def _missing(package: str) -> str | None:
    how = f"run.trackers={package} needs the package {package}: {how_to_install(package)}"
    return how if missing(package) else None


@TRACKERS.register("tensorboard")
class TensorBoard:
    """Event files for TensorBoard, in the run directory: figures, settings as text and as hyperparameters."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        folder = run.folder / "tensorboard"
        fresh = not folder.exists()
        self.writer = EventFileWriter(str(folder))
        self.where = f"tensorboard --logdir {folder}"
        if fresh:
            self._write(0, _hyperparameters(run.settings))
            self._write(0, _settings_as_text(run))

    def log(self, kind: str, epochs: int, figures: Mapping[str, Any]) -> None:
        self._write(epochs, [self.summary.Value(tag=f"{kind}/{name}", simple_value=v) for name, v in _numbers(figures)])

    def _write(self, epochs: int, values: list[Any]) -> None:
        self.writer.add_event(self.event(wall_time=time.time(), step=epochs, summary=self.summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()

    @staticmethod
    def problem() -> str | None:
        return _missing("tensorboard")


def _hyperparameters(settings: Mapping[str, Any]) -> list[Any]:
    """Return what TensorBoard's table of hyperparameters reads."""
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for key, value in settings.items():
        if isinstance(value, bool):
            start.hparams[key].bool_value = value
        elif isinstance(value, (int, float)):
            start.hparams[key].number_value = value
        else:
            start.hparams[key].string_value = str(value)
    content = plugin_data_pb2.HParamsPluginData(session_start_info=start, version=0).SerializeToString()
    metadata = summary_pb2.SummaryMetadata(plugin_data={"plugin_name": "hparams", "content": content})
    return [summary_pb2.Summary.Value(tag="_hparams_/session_start_info", metadata=metadata)]


def _settings_as_text(run: TrackedRun) -> list[Any]:
    from tensorboard.compat.proto import summary_pb2, tensor_pb2, types_pb2

    rows = [f"repan {run.command}, {run.folder.name}", *(f"{key}: {value}" for key, value in run.settings.items())]
    text = "".join(f"    {row}\n" for row in rows).encode()  # indented text is verbatim in Markdown
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text])
    metadata = summary_pb2.SummaryMetadata(plugin_data={"plugin_name": "text"})
    return [summary_pb2.Summary.Value(tag="settings", tensor=tensor, metadata=metadata)]


@TRACKERS.register("wandb")
class WeightsAndBiases:
    """Weights & Biases. A resumed run continues under the id that is stored in its directory.

    WANDB_MODE, WANDB_PROJECT and its other variables apply.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        kept = run.folder / "wandb_id.txt"
        if not kept.exists():
            of_sweep = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
            own = of_sweep or uuid.uuid4().hex[:8]  # the agent of a sweep has named the run
            write_atomically(kept, lambda file: file.write(own.encode()))
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "repan"),
            name=os.environ.get("WANDB_NAME", run.folder.name),
            id=kept.read_text(),
            resume="allow",
            mode=cast("Any", os.environ.get("WANDB_MODE")),  # wandb reports which values it knows
            job_type=run.command,
            dir=run.folder,
            settings=wandb.Settings(silent=True, console="off"),  # repan uses the screen
        )
        self.run.config.update(dict(run.settings), allow_val_change=True)
        self.run.define_metric("*", step_metric="epochs")
        self.where = f"wandb sync {Path(self.run.dir).parent}" if self.run.offline else self.run.url or "disabled"

    def log(self, kind: str, epochs: int, figures: Mapping[str, Any]) -> None:
        self.run.log({"epochs": epochs, **{f"{kind}/{name}": value for name, value in _numbers(figures)}})

    def close(self) -> None:
        failed = isinstance(sys.exc_info()[1], Exception)
        self.run.finish(exit_code=int(failed))

    @staticmethod
    def problem() -> str | None:
        if missing := _missing("wandb"):
            return missing
        if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
            return None
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            return f"run.trackers=wandb: {first_line(error)} Or set WANDB_MODE=offline"
        return None


def _numbers(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Return the figures that can be plotted."""
    for name, value in figures.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield name, value


class Once:
    """A wrapper for a tracker that logs nothing twice when a resumed run repeats it, and logs later what was missed.

    It never ends a run: a tracker that fails is disabled with a warning. `trackers.json` stores the progress of each.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.name, self.marks = name, run.folder / "trackers.json"
        self.tracker: OnRequest | None = TRACKERS[name](run)
        self.where = self.tracker.where
        self.mark = _read_marks(self.marks).get(name, [-1, 0])
        for epochs, record in enumerate(read_metrics(run.folder / "metrics.jsonl"), start=1):
            self.log("epoch", epochs, record)

    def log(self, kind: str, epochs: int, figures: Mapping[str, Any]) -> None:
        mark = [epochs, KINDS.index(kind)]
        if self.tracker is None or mark <= self.mark:
            return
        try:
            self.tracker.log(kind, epochs, figures)
            self.mark = mark
            marks = to_json({**_read_marks(self.marks), self.name: mark})
            write_atomically(self.marks, lambda file: file.write(marks.encode()))
        except Exception as error:  # any error of its library or the network
            self._leave(error)

    def close(self) -> None:
        if self.tracker is None:
            return
        try:
            self.tracker.close()
        except Exception as error:
            self._leave(error)

    def _leave(self, error: Exception) -> None:
        self.tracker = None
        why = f"{type(error).__name__}: {first_line(error)}"
        warn(f"{self.name} failed and is disabled for the rest of the run, which continues ({why})")


def _read_marks(path: Path) -> dict[str, list[int]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def check(names: tuple[str, ...]) -> None:
    """Raise InputError for a tracker that does not exist or cannot be used here."""
    for name in names:
        if problem := TRACKERS[name].problem():
            raise InputError(problem)


def open_requested(names: tuple[str, ...], run: TrackedRun) -> list[Once]:
    """Open the trackers of `run.trackers`. Raises InputError for one that cannot begin."""
    opened = []
    for name in dict.fromkeys(names):
        try:
            opened.append(Once(name, run))
        except Exception as error:  # any error of its library or the network
            raise InputError(f"run.trackers={name} cannot begin: {first_line(error)}") from None
    return opened
