"""`repan evaluate`: score a network on a part of its data, or on other data with the same classes."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from repan_cli import export
from repan_cli.checkpoint.card import FUSED
from repan_cli.commands.options import EvaluateOptions
from repan_cli.data.build import eval_loader
from repan_cli.display import plots
from repan_cli.display.console import print_line, tell
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError
from repan_cli.export.fuse import check_finite
from repan_cli.session import artifact_images
from repan_cli.session.artifact import open_artifact
from repan_cli.system.device import start_runtime
from repan_cli.system.files import to_json, write_bytes
from repan_cli.system.notices import doing, warn
from repan_cli.system.text import count, percent
from repan_cli.training.evaluation import eval_batch
from repan_cli.training.scoring import Details, agreement, examine, worst_confusions

WORST = 5
PICTURE = "confusion.png"
WRITTEN = ("confusion.csv", "classes.csv", PICTURE)
MOST_IN_A_TABLE = 2000
"""The largest number of classes for tables; above it a table would have millions of fields, nearly all of them 0."""


def run(options: EvaluateOptions) -> None:
    """Score a network in float32; `fused` merges it, with proof, and scores both forms side by side."""
    if options.out:
        _make_folder(options.out)
    artifact = open_artifact(options.checkpoint, options.model, block=options.block, trusted=options.trust_code)
    check_finite(artifact.network)
    machine = start_runtime(options.device, "fp32")
    with doing("reading the data"):
        data = artifact_images.load(
            artifact, options.dataset, options.data_root, split=options.split, order=options.classes
        )
    images = eval_loader(data, options.split, machine, crop=artifact.preparation.crop)
    networks = {artifact.form: artifact.network}
    if options.fused and artifact.form != FUSED:
        batch = next(images.batches(export.PROOF_IMAGES)).images
        networks[FUSED] = export.fuse(artifact.network, batch.cpu())[0]
    found = {}
    for form, network in networks.items():
        with doing(f"scoring {count(images.count, 'image')}, {form}"):
            found[form], size = examine(machine.place(network), images, len(data.classes))
        if size < eval_batch(images):
            warn(f"only batches of {size} images fit in memory, so scoring took longer")
    how = {"runtime": artifact.runtime, "precision": artifact.card.precision or "float32"}
    result = _result(found, data.classes) | {"dataset": data.name, "split": options.split, **how}
    if options.out:
        title = _title(options.checkpoint, result)
        result["out"] = _write(options.out, found[result["form"]], data.classes, title)
    if options.as_json:
        print(to_json(result))
    else:
        _report(options.checkpoint, result, found, data.classes)


def _make_folder(out: Path) -> None:
    """Make the folder of the tables before anything is scored. Raises InputError if it cannot be made."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: name a folder for the tables")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {out}: {error.strerror}; give another --out") from None


def _result(found: dict[str, Details], classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the figures of the last form, with those of the form before it."""
    (form, details), *_ = reversed(found.items())
    result = {**_figures(details), "form": form}
    result["class_top1"] = dict(zip(classes, details.class_accuracy(), strict=True))
    if len(found) > 1:
        first = next(iter(found))
        result |= {"compared": {"form": first, **_figures(found[first])}, "agreement": agreement(*found.values())}
    return result


def _figures(details: Details) -> dict[str, Any]:
    return {**details.score.figures(), "calibration_error": details.calibration_error}


def _title(source: str, result: dict[str, Any]) -> str:
    """Describe the content of a picture: the network, the images, their number, and the accuracy."""
    images = f"{count(result['images'], result['split'] + ' image')} of {result['dataset']}"
    return f"{source} ({result['form']}) on {images}: top-1 {percent(result['top1'])} %"


def _write(folder: Path, details: Details, classes: tuple[str, ...], title: str) -> list[str]:
    """Write tables and picture, in place of earlier ones; return the names of the files."""
    if replaced := [name for name in WRITTEN if (folder / name).exists()]:
        tell(f"replacing {', '.join(replaced)} of an earlier evaluation in {folder}")
    (folder / PICTURE).unlink(missing_ok=True)  # it may not be drawn again, and would show another network
    many = len(classes) > MOST_IN_A_TABLE
    if many:
        counts = []
        pairs, numbers = (part.tolist() for part in details.pairs())
        listed = ([classes[true], classes[taken], number] for (true, taken), number in zip(pairs, numbers, strict=True))
        confusion = [["true", "predicted", "images"], *listed]
    else:
        counts = details.confusion().tolist()
        named = ([name, *row] for name, row in zip(classes, counts, strict=True))
        confusion = [["true \\ predicted", *classes], *named]
    accuracy = [
        [name, number, "" if top1 is None else top1]
        for name, number, top1 in zip(classes, details.class_images(), details.class_accuracy(), strict=True)
    ]
    tables: dict[str, list[list[Any]]] = {
        "confusion.csv": confusion,
        "classes.csv": [["class", "images", "top1"], *accuracy],
    }
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_bytes(folder / name, text.getvalue().encode())
    written = [str(folder / name) for name in tables]
    if many:
        tell(
            f"confusion.csv has one line per pair of classes, and {PICTURE} is not written: "
            f"{len(classes):,} classes are too many"
        )
        return written
    if plots.available():
        lacking = plots.draw_confusion(counts, classes, folder / PICTURE, title=title)
        if lacking:
            warn(f"{PICTURE}: no installed font has {' '.join(lacking[:10])}: it is drawn as a box")
        return [*written, str(folder / PICTURE)]
    tell(f"no {PICTURE}: {plots.how_to_get()}")
    return written


def _report(source: str, result: dict[str, Any], found: dict[str, Details], classes: tuple[str, ...]) -> None:
    by = f"{result['runtime']}, {result['precision']}"
    print_line(f"{source} ({by}) on {count(result['images'], result['split'] + ' image')} of {result['dataset']}")
    names = {"top1": "top-1 %", "top5": "top-5 %", "loss": "loss", "calibration_error": "calibration error %"}
    names = {name: title for name, title in names.items() if name in result}
    rows = []
    for form, details in found.items():
        figures = _figures(details)
        rows.append((form, *(f"{figures[name]:.4f}" if name == "loss" else percent(figures[name]) for name in names)))
    print_table(["form", *names.values()], rows)
    if "agreement" in result:
        print_line(f"both forms predict the same class for {percent(result['agreement'])} % of the images")
    details = found[result["form"]]
    scored = [(top1, name) for name, top1 in result["class_top1"].items() if top1 is not None]
    if len(scored) > 2:
        print_line("weakest classes  " + ", ".join(f"{name} {percent(top1)}" for top1, name in sorted(scored)[:WORST]))
    mistakes = worst_confusions(details, WORST)
    if taken := [f"{classes[one]} for {classes[other]} ({times})" for one, other, times in mistakes]:
        print_line("mostly mistaken  " + ", ".join(taken))
    for path in result.get("out", ()):
        print_line(f"wrote            {path}")
