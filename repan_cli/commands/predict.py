"""`repan predict`: classify images."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repan_cli.commands.early import images_in
from repan_cli.commands.options import PredictOptions
from repan_cli.data.image_files import UnreadableImageError, open_image
from repan_cli.display import pictures
from repan_cli.display.console import tell
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError
from repan_cli.export.fuse import check_finite
from repan_cli.session.artifact import Artifact, open_artifact
from repan_cli.system.device import Runtime, start_runtime
from repan_cli.system.files import to_json, write_bytes
from repan_cli.system.notices import warn
from repan_cli.system.text import count, some
from repan_cli.training.evaluation import check_logits

BATCH = 32


def run(options: PredictOptions) -> None:
    """Name the `top` most probable classes of every image; folders are searched for images.

    If some images cannot be read, they are named, the others are classified, and the exit code is 2.
    """
    if options.top < 1:
        raise InputError(f"--top must be at least 1, got {options.top}")
    files = list(images_in(options.images))
    targets = _targets(options.save, files) if options.save else {}
    artifact = open_artifact(options.checkpoint, options.model, block=options.block, trusted=options.trust_code)
    check_finite(artifact.network)
    machine = start_runtime(options.device, "fp32")
    machine.place(artifact.network)
    rows: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for start in range(0, len(files), BATCH):
        rows += _predicted(artifact, files[start : start + BATCH], options.top, machine, unreadable)
    if options.save:
        _save(options.save, rows, targets)
    if options.as_json:
        print(to_json(rows))
    elif rows:
        _report(artifact, rows)
    if unreadable:
        for line in unreadable:
            warn(line)
        named = some([line.removeprefix("cannot read the image ").partition(": ")[0] for line in unreadable])
        verb = "is" if len(rows) == 1 else "are"
        answered = f"the other {count(len(rows), 'image')} {verb} classified" if rows else "none is classified"
        raise InputError(f"{len(unreadable)} of {count(len(files), 'image')} could not be read: {named}; {answered}")


TABLE = "predictions.csv"
MOST_SAID = 10
SIDE, LETTERS, LINES = 384, 15, 3
"""The longer side of a written picture in pixels, the height of the letters below it, and the largest number of
lines.
"""


def _targets(folder: Path, files: Sequence[Path]) -> dict[Path, Path]:
    """Return the file that each picture is written to, and make the folder.

    Raises InputError if a file exists already, or if the folder cannot be made.
    """
    taken: set[str] = set()
    tried: Counter[str] = Counter()  # by stem, since many folders may hold images of one name
    targets: dict[Path, Path] = {}
    for file in files:
        stem = file.stem.lower()  # some systems do not distinguish A from a
        while True:
            number = tried[stem]
            tried[stem] += 1
            name = f"{file.stem}{f'_{number}' if number else ''}.png"
            if name.lower() not in taken:
                break
        taken.add(name.lower())
        targets[file] = folder / name
    for target in (*targets.values(), folder / TABLE):
        if target.exists():
            raise InputError(f"{target} already exists: give another --save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {folder}: {error.strerror}; give another --save") from None
    return targets


def _save(folder: Path, rows: Sequence[dict[str, Any]], targets: Mapping[Path, Path]) -> None:
    """Write each picture with its most probable classes below it, and a table of all."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", "picture", "class", "probability"])
    for row in rows:
        source, classes = Path(row["image"]), row["classes"]
        target = targets[source]
        lines = tuple(f"{each['class']} {100 * each['probability']:.1f} %" for each in classes[:LINES])
        image = pictures.resized(open_image(source, 3), SIDE)
        content = io.BytesIO()
        pictures.with_caption(pictures.Captioned(image, lines), size=LETTERS, width=SIDE // 2).save(content, "PNG")
        write_bytes(target, content.getvalue())
        table.writerow([row["image"], target.name, classes[0]["class"], classes[0]["probability"]])
    write_bytes(folder / TABLE, text.getvalue().encode())
    if boxes := pictures.lacking(each["class"] for row in rows for each in row["classes"][:LINES]):
        warn(f"no installed font has {' '.join(boxes[:MOST_SAID])}: pictures show boxes instead")
    tell(f"wrote {count(len(rows), 'picture')} and {TABLE} into {folder}")


@torch.no_grad()
def _predicted(
    artifact: Artifact, files: Sequence[Path], top: int, machine: Runtime, unreadable: list[str]
) -> list[dict[str, Any]]:
    """Return an entry for each readable file; the errors of the others go into `unreadable`."""
    prepared = artifact.preparation

    def opened(file: Path) -> Tensor | UnreadableImageError:
        try:
            return prepared.picture(open_image(file, prepared.channels))
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        found = [*pool.map(opened, files)]
    unreadable += [str(each) for each in found if isinstance(each, UnreadableImageError)]
    read = [file for file, each in zip(files, found, strict=True) if isinstance(each, Tensor)]
    if not read:
        return []
    images = prepared.normalized(torch.stack([each for each in found if isinstance(each, Tensor)]))
    batch = images.to(machine.device).contiguous(memory_format=machine.memory_format)
    logits = artifact.network(batch)
    check_logits(logits, len(batch), len(artifact.card.classes))
    logits = logits.float().cpu()
    if broken := [file for file, row in zip(read, logits, strict=True) if not row.isfinite().all()]:
        raise InputError(
            f"the network gives no finite logits for {broken[0]}: use a checkpoint from before it diverged"
        )
    probabilities = logits.softmax(dim=1)
    classes = artifact.card.classes
    shares, places = probabilities.topk(min(top, len(classes)), dim=1)
    return [
        {
            "image": str(file),
            "classes": [
                {"class": classes[place], "index": place, "probability": share}
                for place, share in zip(best.tolist(), sure.tolist(), strict=True)
            ],
        }
        for file, best, sure in zip(read, places, shares, strict=True)
    ]


def _report(artifact: Artifact, rows: list[dict[str, Any]]) -> None:
    tell(f"{artifact.source}: {artifact.card.model}, {artifact.form}, {len(artifact.card.classes)} classes")
    width = max(len(row["classes"]) for row in rows)
    print_table(
        ["image", *(f"{number}." for number in range(1, width + 1))],
        [
            (row["image"], *(f"{each['class']} {100 * each['probability']:.1f} %" for each in row["classes"]))
            for row in rows
        ],
    )
