"""`repan train`, `distill` and `cycle`: one session from configuration to summary, which differ in their plan alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repan_cli import anneal, checkpoint, engine, export, models, plots, runs, runtime
from repan_cli.checkpoint import Checkpoint
from repan_cli.commands.network import describe_blocks
from repan_cli.commands.prepare import Session, prepare
from repan_cli.commands.record import Record, chosen_file, saves_at
from repan_cli.config import Resolved, dump
from repan_cli.console import Display, count, duration, percent, sparkline
from repan_cli.data.source import Source
from repan_cli.data.streaming import StreamedImages
from repan_cli.errors import DivergedError, InputError, InterruptedRunError, PreemptedRunError, StoppedError
from repan_cli.trackers import read_metrics

STEPS_BETWEEN_STOPS = 10
"""On GPUs, where asking the other ranks is a host-device sync."""


def run(command: str, resolved: Resolved, *, as_json: bool) -> None:
    """Prepare, train, merge, and report. Of several ranks the first does all but its share of the training."""
    session = prepare(command, resolved)
    if session.training.runtime.rank:
        follow(session)
    else:
        begin(session, resolved, as_json=as_json)


def begin(session: Session, resolved: Resolved, *, as_json: bool) -> None:
    """Make the run directory of a run that is ready, and carry it out."""
    command, config = session.command, session.config
    names = (config.model.name, config.block.name, config.data.name)
    with runs.RunDirectory(Path(config.run.out) if config.run.out else runs.default_path(command, *names)) as folder:
        session.training.task_of.folder = folder.path
        folder.write_text("config.yaml", dump(config, cycles=command == "cycle"))
        folder.write_json("env.json", {**runs.software(), **runtime.describe_machine(session.training.runtime)})
        carry_out(session, folder, resolved, as_json=as_json)


def carry_out(
    session: Session,
    folder: runs.RunDirectory,
    resolved: Resolved,
    *,
    begun: Mapping[str, Any] | None = None,
    as_json: bool,
) -> None:
    """Train and report, from the start or, with what a run had `begun`, from where it stopped.

    Raises InterruptedRunError on Ctrl-C and PreemptedRunError when another signal asks to stop, with everything saved.
    """
    training = session.training
    epochs = {phase.cycle: phase.epochs for phase in training.plan}
    steps = training.train.steps(session.config.data.batch_size)
    display = Display(epochs=epochs, steps=steps, log=folder / "log.txt", compiles=session.config.run.compile == "on")
    display.facts({**header(session, resolved), "run": str(folder.path)})
    record = Record(session, folder, begun)
    for tracker in record.requested:
        display.command(tracker.name, tracker.where)
    pulse = runs.Pulse(folder.beat, seconds=runs.HEARTBEAT)
    pulse.start()
    try:
        with runtime.StopSignals() as signals:
            try:
                _train(session, record, display, signals, fresh=begun is None)
                _finish(session, folder, display, record)
            except (KeyboardInterrupt, StoppedError) as end:
                signals.leaving = True
                raise _stopped(session, folder, display, signals, saved=isinstance(end, StoppedError)) from None
    except (InterruptedRunError, PreemptedRunError) as stop:
        display.note(str(stop))
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):  # the disk may be what failed
            folder.status("diverged" if isinstance(error, DivergedError) else "failed")
        raise
    finally:
        pulse.stop()
        record.close()
        display.close()
    if as_json:
        print(json.dumps(record.summary))


def _train(session: Session, record: Record, display: Display, signals: runtime.StopSignals, *, fresh: bool) -> None:
    """Train through the plan and note what happens. Raises StoppedError when a signal asks to, with the state saved."""
    if session.training.runtime.ranks == 1:
        session.training.stop = signals
    if fresh:
        record.open()
    if math.isfinite(session.training.progress.best_top1):  # of the weights it began with, or before a stop
        display.position.best = session.training.progress.best_top1
    told = False
    try:
        with display:
            for event in engine.fit(session.training):
                record.take(event)
                display.show(event)
                if session.training.graphs and session.training.graphs.refused and not told:
                    told = True
                    display.say(f"steps run one by one: no CUDA graph ({session.training.graphs.refused})")
                if _stops(session, event, signals):
                    raise StoppedError
    except StoppedError:
        if session.training.progress.whole:  # in the middle of a restart what the last epoch saved is the state
            record.save_last()
        raise


def follow(session: Session) -> None:
    """Train as one of several ranks, of which the first writes and speaks."""
    try:
        with runtime.StopSignals() as signals:
            for event in engine.fit(session.training):
                if isinstance(event, engine.Updated):
                    saves_at(session, event)
                if _stops(session, event, signals):
                    raise StoppedError
    except StoppedError:
        raise PreemptedRunError from None


def _stops(session: Session, event: engine.Event, signals: runtime.StopSignals) -> bool:
    """Whether the run stops here: where one rank was asked to, all stop after the same update."""
    machine = session.training.runtime
    if machine.ranks == 1:
        return signals()
    if not isinstance(event, engine.Updated):
        return False
    every = 1 if machine.device.type == "cpu" else STEPS_BETWEEN_STOPS
    if event.step // every == (event.step - session.training.accumulate) // every:
        return False
    asked = [signals.received == signal.SIGINT, signals.received not in (None, signal.SIGINT)]
    by_hand, by_others = runtime.summed(torch.tensor(asked, dtype=torch.float32, device=machine.device)).tolist()
    if not by_hand and not by_others:
        return False
    signals.received = signals.received or (signal.SIGTERM if by_others else signal.SIGINT)
    session.training.progress.totals.pool(machine.rank)
    return True


def _stopped(
    session: Session, folder: runs.RunDirectory, display: Display, signals: runtime.StopSignals, *, saved: bool
) -> InterruptedRunError | PreemptedRunError:
    """Leave the run so that it can go on, and say how."""
    asked = signals.received not in (None, signal.SIGINT)
    folder.status("preempted" if asked else "interrupted")
    _draw(session, folder, display)
    own = f" --model {session.own_network}" if session.own_network else ""
    ranks = session.training.runtime.ranks
    command = "repan" if ranks == 1 else f"torchrun --standalone --nproc-per-node {ranks} -m repan_cli"
    how = f"go on with: {command} {session.command} --resume {folder.path}{own}"
    if not saved:
        return InterruptedRunError(f"left at once; from its last save it {how.replace('go', 'goes', 1)}")
    if asked:
        return PreemptedRunError(f"stopped by {signal.Signals(signals.received).name}, everything is saved; {how}")
    return InterruptedRunError(f"interrupted, everything is saved; {how}")


def header(session: Session, resolved: Resolved) -> dict[str, str]:
    """What is about to happen, before it does."""
    config, data, training = session.config, session.dataset, session.training
    typed, name = resolved.config.model.name, config.model.name
    network = name if typed in (None, name) else f"{typed} is {name}"
    blocks = describe_blocks(training.model)
    parts = {"training": data.train, "validation": data.val, "test": data.test}
    counts = ", ".join(f"{len(part.labels):,} {which}" for which, part in parts.items() if part)
    size = f"{data.image_size}x{data.image_size}" + ("" if data.channels == 3 else " grey")
    return {
        f"repan {session.command}": f"{network}: {blocks}, {export.count_parameters(training.model):,} parameters",
        "data": f"{data.name}: {counts} images of {size}, {len(data.classes)} classes",
        **_describe_augmentation(training.train),
        "plan": _describe_plan(training.plan),
        **_describe_teacher(training),
        "device": training.runtime.describe() + (", a step is one CUDA graph" if training.graphs else ""),
        "settings": resolved.source,
    }


def _describe_augmentation(train: Source) -> dict[str, str]:
    """What is done to training images beside crop and flip, or how they come; nothing in the plainest case."""
    chosen = {name: getattr(train.augmentation, name) for name in ("policy", "cutout", "erase", "mixup", "cutmix")}
    parts = [f"{name} {value}" for name, value in chosen.items() if value]
    if isinstance(train, StreamedImages):
        parts += [f"read one by one, {count(train.workers, 'worker')}"]
    return {"images": ", ".join(parts)} if parts else {}


def _describe_teacher(training: engine.Training) -> dict[str, str]:
    """Who teaches, what images it sees, and what of the loss is its share."""
    teacher = training.plan[-1].teacher
    if teacher.name is None:
        return {}
    seen = training.task_of.described.get(teacher.name, "the network of the cycle before, merged")
    share = f"alpha {teacher.alpha:g}, temperature {teacher.temperature:g}"
    return {"teacher": f"{teacher.name}: {seen}; {share}"}


def _describe_plan(plan: tuple[anneal.Phase, ...]) -> str:
    parts = []
    cycles = [phase for phase in plan if phase.cycle]
    if plan[0].cycle == 0:
        parts.append(
            f"{count(plan[0].epochs, 'epoch')} at lr {plan[0].optim.lr:g}" + (" as baseline" if cycles else "")
        )
    if cycles:
        settings = cycles[0].settings
        what = f"restart by {settings.rule}, {settings.attach}" if cycles[0].restarts else "no restart (control)"
        parts.append(
            f"{count(len(cycles), 'cycle')} of {count(cycles[0].epochs, 'epoch')} at lr {cycles[0].optim.lr:g}, {what}"
        )
        if settings.lr == "continuous":
            parts.append("one course of the learning rate over all")
        if settings.start_from != "last":
            judge = "the test set" if settings.start_from == "best-test" else "validation"
            parts.append(f"each cycle ends with the epoch that is best on {judge}")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------- the end


def _finish(session: Session, folder: runs.RunDirectory, display: Display, record: Record) -> None:
    """Measure the network that validation chose, merge it, write summary and picture, say where everything is."""
    source, summary = chosen_file(folder.path), record.summary
    chosen = checkpoint.load(source)
    model = models.rebuild(chosen, str(source), session.own_network)
    summary["chosen"] = {"file": source.name, "cycle": chosen.meta["cycle"], "epoch": chosen.meta["epoch"]}
    summary["test"] = _score(session, model)
    try:
        summary["fused"] = _fuse(session, folder, chosen, model)
    except InputError as error:  # a network without anything to merge
        display.say(f"no fused.pt: {error}")
    summary["seconds"] = record.seconds
    record.finish()
    folder.write_json("summary.json", summary)
    folder.status("done")
    _draw(session, folder, display)
    _report(folder, display, summary, session.own_network)


def _score(session: Session, model: nn.Module) -> dict[str, Any]:
    machine = session.training.runtime
    model.to(machine.device, memory_format=machine.memory_format)
    return dataclasses.asdict(engine.evaluate(model, session.training.test.alone()))


def _fuse(session: Session, folder: runs.RunDirectory, chosen: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """Write fused.pt, proven equal on some test images, and measure its own test accuracy."""
    images = next(session.training.test.batches(export.PROOF_IMAGES)).images
    fused, report = export.fuse(model, images.cpu())
    checkpoint.save(checkpoint.capture_fused(fused, chosen), folder / "fused.pt")
    return {"out": "fused.pt", **dataclasses.asdict(report), "test_top1": _score(session, fused)["top1"]}


def _draw(session: Session, folder: runs.RunDirectory, display: Display) -> None:
    config = session.config
    title = (
        f"repan {session.command}",
        config.model.name,
        config.block.name,
        config.data.name,
        f"seed {config.run.seed}",
    )
    if not plots.available():
        display.say(f"no curves.png: {plots.HOW_TO_GET}")
    elif records := read_metrics(folder / "metrics.jsonl"):
        plots.draw_curves(records, folder / "curves.png", title=", ".join(title))


def _report(folder: runs.RunDirectory, display: Display, summary: dict[str, Any], own_network: str | None) -> None:
    """The end of a run on screen: a row a phase, what was chosen, what merging brought, where it lies."""
    test, chosen, fused = summary["test"], summary["chosen"], summary.get("fused")
    records = read_metrics(folder / "metrics.jsonl")
    validation = [record["val_top1"] for record in records if record["val_top1"] is not None]
    if summary["cycles"]:
        display.table(summary)
    rows = {"chosen": f"{chosen['file']}, cycle {chosen['cycle']} epoch {chosen['epoch']}"}
    if not chosen["epoch"]:
        start = percent(summary["baseline"]["top1"])
        rows["chosen"] = f"{chosen['file']}, the weights it started from (validation {start}): no epoch was better"
    elif validation:
        rows["chosen"] += ", the first with the best validation top-1"
        rows["validation"] = f"{sparkline(validation)}  best epoch {percent(max(validation))}"
    rows["test"] = f"top-1 {percent(test['top1'])}, top-5 {percent(test['top5'])}"
    if summary["cycles"]:
        start, base = display.name(0) if 0 in display.epochs else "start", summary["baseline"]["test_top1"]
        chosen_gain, last_gain = test["top1"] - base, summary["cycles"][-1]["test_top1"] - base
        rows["gain"] = (
            f"{chosen_gain:+.2f} points of test top-1 over the {start}; the end of the last cycle {last_gain:+.2f} "
            "(one seed)"
        )
    if fused:
        rows["merged"] = (
            f"top-1 {percent(fused['test_top1'])} from {fused['params_after']:,} parameters instead of "
            f"{fused['params_before']:,}; relative error {fused['rel_error_fp64']:.0e} in float64"
        )
    rows["time"] = duration(summary["seconds"])
    rows["files"] = str(folder.path)
    display.say()
    display.facts(rows)
    own = f" --model {own_network}" if own_network else ""
    display.command("next", f"repan evaluate {folder / (fused['out'] if fused else chosen['file'])}{own}")
