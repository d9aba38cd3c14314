"""Describe a run before its first step, and write its results at the end: summary.json, fused.pt, pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from repan_cli import checkpoint, export, models, runs
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.config.resolve import Resolved
from repan_cli.data.batches import Loader
from repan_cli.data.streaming import StreamingLoader
from repan_cli.display import plots
from repan_cli.display.console import Display
from repan_cli.errors import InputError
from repan_cli.models.changes import changes_of
from repan_cli.runs.listing import whole_of
from repan_cli.runs.trackers import read_metrics
from repan_cli.session.build import Session
from repan_cli.session.network import describe_blocks
from repan_cli.session.recorder import Record, chosen_file
from repan_cli.system import sampling
from repan_cli.system.notices import doing, warn
from repan_cli.system.text import count, duration, first_line, percent, quoted, some, sparkline
from repan_cli.training.evaluation import evaluate
from repan_cli.training.plan import Phase
from repan_cli.training.run import Training


def header(session: Session, resolved: Resolved) -> dict[str, str]:
    """Describe a run that is about to begin."""
    config, data, training = session.config, session.dataset, session.training
    typed, name = resolved.config.model.name, config.model.name
    network = name if typed in (None, name) else f"{typed} is {name}"
    blocks = describe_blocks(training.model)
    parts = {"training": data.train, "validation": data.val, "test": data.test}
    counts = ", ".join(f"{len(part.labels):,} {which}" for which, part in parts.items() if part)
    source = config.data.root if data.name == "folder" else data.name
    size = f"{data.image_size}x{data.image_size}" + ("" if data.channels == 3 else " gray")
    return {
        f"repan {session.command}": f"{network}: {blocks}, {export.count_parameters(training.model):,} parameters",
        "data": f"{source}: {counts} images of {size}, {len(data.classes)} classes",
        **_describe_classes(session),
        **_describe_augmentation(training.train),
        "plan": _describe_plan(training.plan),
        **_describe_teacher(training),
        "device": training.runtime.describe() + (", a step is one CUDA graph" if training.graphs else ""),
        "settings": resolved.source,
    }


def _describe_classes(session: Session) -> dict[str, str]:
    """Name the classes of image folders in their order, which is that of the network's outputs."""
    if session.dataset.name != "folder":
        return {}
    return {"classes": f"{some(list(session.dataset.classes))} (data.class_order={session.config.data.class_order})"}


def _describe_augmentation(train: Loader) -> dict[str, str]:
    """Describe the augmentation of training images besides crop and flip, and how they are loaded.

    The text is empty in the plainest case.
    """
    chosen = {name: getattr(train.augmentation, name) for name in ("policy", "cutout", "erase", "mixup", "cutmix")}
    parts = [f"{name} {value}" for name, value in chosen.items() if value]
    if isinstance(train, StreamingLoader):
        parts += [f"read one by one, {count(train.workers, 'worker')}"]
    return {"images": ", ".join(parts)} if parts else {}


def _describe_teacher(training: Training) -> dict[str, str]:
    """Describe the teacher, the images that it sees, and its share of the loss."""
    teacher = training.plan[-1].teacher
    if teacher.name is None:
        return {}
    seen = training.task_of.described.get(teacher.name, "the network of the cycle before, merged")
    share = f"alpha {teacher.alpha:g}, temperature {teacher.temperature:g}"
    return {"teacher": f"{teacher.name}: {seen}; {share}"}


def _describe_plan(plan: tuple[Phase, ...]) -> str:
    parts = []
    cycles = [phase for phase in plan if phase.cycle]
    settings = cycles[0].settings if cycles else None
    continuous = settings is not None and settings.schedule == "continuous"
    if plan[0].cycle == 0:
        rate = "" if continuous else f" at lr {plan[0].optim.lr:g}"
        parts.append(("baseline of " if cycles else "") + f"{count(plan[0].epochs, 'epoch')}{rate}")
    if settings is not None:
        what = f"each begins with a restart ({settings.rule}, {settings.attach})"
        if not cycles[0].restarts:
            what = "no restarts, trunks rescaled (control)" if cycles[0].rescales else "no restarts (control)"
        rate = "" if continuous else f" at lr {cycles[0].optim.lr:g}"
        parts.append(f"{count(len(cycles), 'cycle')} of {count(cycles[0].epochs, 'epoch')}{rate}, {what}")
        shape = f"{cycles[0].optim.schedule} schedule"
        parts.append(
            f"one {shape} over all, from lr {plan[0].optim.lr:g}" if continuous else f"a new {shape} in each cycle"
        )
        if settings.start_from != "last":
            judge = "the test set" if settings.start_from == "best-test" else "validation"
            parts.append(f"each cycle starts from the epoch that was best on {judge}")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------- the end


def finish(session: Session, folder: runs.RunDirectory, display: Display, record: Record) -> None:
    """Measure the network that validation chose, merge it, and write the summary, which completes the run's results."""
    source, summary = chosen_file(folder.path), record.summary
    chosen = checkpoint.load(source)
    model = models.rebuild(chosen, str(source), session.user_model)
    summary["chosen"] = {"file": source.name, "cycle": chosen.card.cycle, "epoch": chosen.card.epoch}
    if source.name == runs.LAST and math.isfinite(session.training.progress.best_top1):
        summary["chosen"]["note"] = "best.pt is missing: these are the last weights, not the best ones by validation"
        warn(f"{folder.path}: {summary['chosen']['note']}")
    with doing("scoring the test images"):
        summary["test"] = _score(session, model)
    try:
        with doing("merging"):
            summary["fused"] = _fuse(session, folder, chosen, model)
    except InputError as error:  # a network without anything to merge
        display.say(f"no fused.pt: {error}")
    summary["seconds"] = record.seconds
    record.finish()
    folder.write_json("summary.json", summary)


def conclude(session: Session, folder: runs.RunDirectory, display: Display, summary: dict[str, Any]) -> None:
    """Mark a run that has its summary as done, plot it, and print where its files are. Failures become warnings."""
    with warned("the run is done, but status.json does not say so; --resume fixes that"):
        folder.status("done")
    with warned("no curves.png"):
        draw(session, folder, display, summary)
    with warned("the run is done, but its report could not be shown"):
        _report(folder, display, summary, session)


@contextlib.contextmanager
def warned(what: str) -> Iterator[None]:
    """Turn an error into a warning that names the missing result and the reason."""
    try:
        yield
    except Exception as error:  # a full disk, a lost terminal, any error of a library
        warn(f"{what} ({type(error).__name__}: {first_line(error)})")


def _score(session: Session, model: nn.Module) -> dict[str, Any]:
    model = session.training.runtime.place(model)
    return evaluate(model, session.training.test.alone()).figures()


def _fuse(session: Session, folder: runs.RunDirectory, chosen: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """Write fused.pt, after a check of equality on some test images, and measure its own test accuracy."""
    images = next(session.training.test.batches(export.PROOF_IMAGES)).images
    fused, report = export.fuse(model, images.cpu())
    checkpoint.save(checkpoint.capture_fused(fused, chosen, changes_of(fused)), folder / "fused.pt")
    return {"out": "fused.pt", **dataclasses.asdict(report), "test_top1": _score(session, fused)["top1"]}


def draw(session: Session, folder: runs.RunDirectory, display: Display, summary: dict[str, Any]) -> None:
    """Plot the curves of a run, with test top-1 at the end of each finished phase."""
    title = (f"repan {session.command}", *session.names, f"seed {session.config.run.seed}")
    if not plots.available():
        display.say(f"no curves.png: {plots.how_to_get()}")
    elif records := read_metrics(folder / "metrics.jsonl"):
        plots.draw_curves(records, folder / "curves.png", title=", ".join(title), tests=_tests(summary))


def _tests(summary: dict[str, Any]) -> dict[int, float]:
    """Return test top-1 at the end of each finished phase, by cycle."""
    baseline = {0: summary["baseline"]["test_top1"]} if summary["baseline"] else {}
    return {**baseline, **{row["cycle"]: row["test_top1"] for row in summary["cycles"]}}


def _test_text(test: dict[str, Any]) -> str:
    """Describe the test accuracy with its sampling error."""
    top1, images = test["top1"], test["images"]
    kind = f"{sampling.CONFIDENCE:.0%} interval, " if sampling.is_extreme(top1, images) else ""
    top5 = f", top-5 {percent(test['top5'])}" if "top5" in test else ""
    return f"top-1 {sampling.with_error(top1, images)} ({kind}{count(images, 'image')}){top5}"


def _report(folder: runs.RunDirectory, display: Display, summary: dict[str, Any], session: Session) -> None:
    """Show the end of a run: one row per phase, the chosen weights, the merged network, the files."""
    test, chosen, fused = summary["test"], summary["chosen"], summary.get("fused")
    records = read_metrics(folder / "metrics.jsonl")
    validation = [record["val_top1"] for record in records if record["val_top1"] is not None]
    if summary["cycles"]:
        display.table(summary, records)
    rows = {"chosen": f"{chosen['file']}, {display.name(chosen['cycle'])}, epoch {chosen['epoch']}"}
    if not chosen["epoch"]:
        start = percent(summary["baseline"]["top1"])
        rows["chosen"] = f"{chosen['file']}, the weights it started from (validation {start}): no epoch was better"
    elif "note" in chosen:
        rows["chosen"] += f"; {chosen['note']}"
    elif validation:
        rows["chosen"] += ", the first with the best validation top-1"
        rows["validation"] = f"{sparkline(validation)}  best epoch {percent(max(validation))}"
    rows["test"] = _test_text(test)
    is_compared = whole_of(folder.path) is not None  # a study or a series ends with its own table
    if summary["cycles"] and session.config.cycle.restart == "repan" and not is_compared:
        rows["gain"] = "not known from one run; --control also trains without restarts, --seeds 0,1,2 repeats both"
    if fused:
        rows["merged"] = (
            f"top-1 {percent(fused['test_top1'])} from {fused['params_after']:,} parameters instead of "
            f"{fused['params_before']:,}; relative error {fused['rel_error_fp64']:.0e} in float64"
        )
    rows["time"] = duration(summary["seconds"])
    rows["files"] = str(folder.path)
    display.say()
    display.facts(rows)
    own = session.own_code if not fused else f" --model {quoted(session.user_model)}" if session.user_model else ""
    display.command("next", f"repan evaluate {quoted(folder / (fused['out'] if fused else chosen['file']))}{own}")
