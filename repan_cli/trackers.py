"""Where figures go while a run goes on: JSON lines and CSV, always. A tracker takes one flat record an epoch."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    def log(self, record: Mapping[str, Any]) -> None:
        """Note one epoch's figures."""

    def close(self) -> None:
        """Release files and connections."""


class JsonLines:
    """metrics.jsonl: one object an epoch, flushed, the truth about the run."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")

    def log(self, record: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Csv:
    """metrics.csv: the same for spreadsheets; its columns are the keys of the first record."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8", newline="")
        self.writer: csv.DictWriter[str] | None = None

    def log(self, record: Mapping[str, Any]) -> None:
        if self.writer is None:
            self.writer = csv.DictWriter(self.file, list(record))
            if self.file.tell() == 0:
                self.writer.writeheader()
        self.writer.writerow(record)
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut off is none."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def rewind(folder: Path, cycle: int, epoch: int) -> None:
    """Take out what metrics.jsonl and metrics.csv hold from beyond an epoch: a resumed run makes it again."""
    records = [r for r in read_metrics(folder / "metrics.jsonl") if (r["cycle"], r["epoch"]) <= (cycle, epoch)]
    for name, kind in (("metrics.jsonl", JsonLines), ("metrics.csv", Csv)):
        (folder / name).unlink(missing_ok=True)
        tracker = kind(folder / name)
        for record in records:
            tracker.log(record)
        tracker.close()
