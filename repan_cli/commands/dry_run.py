"""`--dry-run`: try each part of a run once (restart, two steps, a batch of evaluation, merge) and write nothing."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from repan_cli import export
from repan_cli.blocks import rep_blocks
from repan_cli.config.resolve import Resolved
from repan_cli.display.console import print_line
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError
from repan_cli.session import summary
from repan_cli.session.build import Session, prepare
from repan_cli.session.network import describe_blocks
from repan_cli.system.copies import deep_copy
from repan_cli.system.device import peak_memory
from repan_cli.system.files import to_json
from repan_cli.system.notices import doing
from repan_cli.system.text import by_reason, count, duration, some
from repan_cli.system.timing import wait
from repan_cli.training.cuda_graphs import WARM_UPS
from repan_cli.training.evaluation import EVAL_BATCH
from repan_cli.training.events import CycleStart, Epoch, StepEnd
from repan_cli.training.loop import fit
from repan_cli.training.progress import Progress

TIMED = 2
"""The number of updates that are timed, after those that warm up or are recorded."""


def run(command: str, resolved: Resolved, *, runs: int = 1, as_json: bool) -> None:
    """Build a run, or the first of several, try each of its parts, and print a description and the expected time."""
    config = dataclasses.replace(resolved.config, run=dataclasses.replace(resolved.config.run, out=None))
    session = prepare(command, dataclasses.replace(resolved, config=config))
    facts = _network(session)
    parts = {"merging": _merge, "a restart": _restart, "scoring": _evaluation, "training steps": _steps}
    for name, part in parts.items():
        with doing(f"dry run: trying {name}"):
            facts |= part(session)
    facts["peak_memory_bytes"] = peak_memory(session.training.runtime.device)
    facts["estimated_seconds"] = _estimate(session, facts)
    facts["runs"] = runs
    if as_json:
        print(to_json(facts))
    else:
        _report(session, resolved, facts)


def _network(session: Session) -> dict[str, Any]:
    blocks = dict(rep_blocks(session.training.model))
    return {
        "model": session.config.model.name,
        "block": session.config.block.name,
        "parameters": export.count_parameters(session.training.model),
        "blocks": list(blocks),
        "left_alone": dict(session.network.expansion.left),
    }


def _restart(session: Session) -> dict[str, Any]:
    """Try the restart before the first cycle on a copy, on which no recording depends."""
    cycle = next((phase for phase in session.training.plan if phase.restarts), None)
    if cycle is None:
        return {}
    model = deep_copy(session.training.model)
    began = time.perf_counter()
    alone = dataclasses.replace(session.training, model=model, wrapped=None, graphs=None)
    start = next(fit(dataclasses.replace(alone, plan=(cycle,), progress=Progress())))
    assert isinstance(start, CycleStart), "a phase begins with this event"
    return {"logits_moved": start.logit_error, "restart_seconds": time.perf_counter() - began}


def _steps(session: Session) -> dict[str, Any]:
    """Time some steps of the first phase, without a restart that it may begin with."""
    phase = session.training.plan[0]
    if phase.settings is not None:  # a restart is tried separately
        phase = dataclasses.replace(phase, settings=dataclasses.replace(phase.settings, restart="none"))
    training = dataclasses.replace(session.training, plan=(phase,), progress=Progress())
    steps = training.train.steps(training.batch_size)
    untimed = 1 if training.graphs is None else WARM_UPS + 1
    events, found, began, done = fit(training), [], time.perf_counter(), 0
    for event in events:
        if not isinstance(event, (CycleStart, StepEnd, Epoch)):
            continue
        wait(training.runtime.device)
        now = time.perf_counter()
        if isinstance(event, StepEnd) and (event.step < steps or not done):  # the last batch may be smaller
            found.append((now - began) / (event.step - done))
        if len(found) >= untimed + TIMED or (isinstance(event, Epoch) and training.graphs is None):
            break
        began, done = now, event.step if isinstance(event, StepEnd) else 0
    events.close()
    step = statistics.median(found[untimed:] or found[-1:])  # with one update, there is nothing else to time
    return {"step_seconds": step, "steps_per_epoch": steps}


@torch.no_grad()
def _evaluation(session: Session) -> dict[str, Any]:
    model, images = session.training.model.eval(), session.training.val or session.training.test
    batch = next(images.batches(EVAL_BATCH)).images
    if batch.device.type != "cpu":  # kernels are loaded in a first pass
        model(batch)
        wait(batch.device)
    began = time.perf_counter()
    model(batch).sum().item()
    return {"evaluation_images_per_second": len(batch) / (time.perf_counter() - began)}


def _merge(session: Session) -> dict[str, Any]:
    images = next(session.training.test.batches(export.PROOF_IMAGES)).images
    try:
        _, report = export.fuse(session.training.model, images.cpu())
    except InputError as error:
        return {"fuse": str(error)}
    return {"params_after": report.params_after, "rel_error_fp64": report.rel_error_fp64}


def _estimate(session: Session, facts: Mapping[str, Any]) -> float:
    training, epochs = session.training, sum(phase.epochs for phase in session.training.plan)
    steps = epochs * facts["steps_per_epoch"] * facts["step_seconds"]
    restarts = sum(1 for phase in training.plan if phase.restarts) * facts.get("restart_seconds", 0.0)
    looked_at = epochs * (training.val.count if training.val else 0) + len(training.plan) * training.test.count
    return steps + restarts + looked_at / facts["evaluation_images_per_second"]


def _report(session: Session, resolved: Resolved, facts: Mapping[str, Any]) -> None:
    plan = session.training.plan
    merged = f", {facts['params_after']:,} when merged" if "params_after" in facts else ""
    peak = facts["peak_memory_bytes"]
    header = {name: text for name, text in summary.header(session, resolved).items() if not name.startswith("repan")}
    rows = {
        **header,
        "network": f"{facts['model']}, {facts['parameters']:,} parameters{merged}",
        "blocks": f"{describe_blocks(session.training.model)}: {some(facts['blocks'])}".removesuffix(": "),
        "length": f"{count(sum(phase.epochs for phase in plan), 'epoch')} of {count(facts['steps_per_epoch'], 'step')}",
        "step": f"{1000 * facts['step_seconds']:.0f} ms for {count(session.config.data.batch_size, 'image')}",
        "memory": f"peak {peak / 2**20:,.0f} MiB" if peak else "not reported by this system",
        "time": f"about {duration(facts['estimated_seconds'])}"
        + (f" for each of {facts['runs']} runs" if facts["runs"] > 1 else ""),
    }
    if "logits_moved" in facts:
        moved = f"the logits move by {facts['logits_moved']:.0e}"
        rows["restart"] = f"{duration(facts['restart_seconds'])}; {moved}"
    rows["merge"] = facts.get("fuse") or f"relative error {facts['rel_error_fp64']:.0e} in float64"
    print_line(f"dry run of repan {session.command}: nothing was written")
    print_table(["", ""], rows.items())
    if facts["left_alone"]:
        print_table(["left unchanged", "reason"], by_reason(facts["left_alone"]))
