"""`repan evaluate`: the accuracy of a checkpoint on a part of its data set, or of another with the same classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from repan_cli import checkpoint, engine, export, models, runtime
from repan_cli.checkpoint import FUSED, Checkpoint
from repan_cli.commands.network import check_classes
from repan_cli.console import tell, warn
from repan_cli.data import datasets
from repan_cli.data.datasets import Dataset
from repan_cli.data.resident import ResidentImages


def run(
    path: Path,
    *,
    dataset: str | None,
    data_root: str | None,
    split: str,
    fused: bool,
    model: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Score PATH in float32; `fused` merges it first, with proof."""
    saved = checkpoint.load(path)
    machine = runtime.start(device, "fp32")
    data = _load_data(path, saved, dataset, data_root)
    images = ResidentImages(data.part(split), mean=saved.meta["mean"], std=saved.meta["std"], device=machine.device)
    network, form = models.rebuild(saved, str(path), model), saved.meta["form"]
    if fused and form != FUSED:
        batch = next(images.batches(export.PROOF_IMAGES)).images
        (network, _), form = export.fuse(network, batch.cpu()), FUSED
    network.to(machine.device, memory_format=machine.memory_format)
    score = engine.evaluate(network, images)
    result = {**dataclasses.asdict(score), "form": form, "dataset": data.name, "split": split}
    if as_json:
        print(json.dumps(result))
    else:
        _report(path, result)


def _load_data(path: Path, saved: Checkpoint, dataset: str | None, root: str | None) -> Dataset:
    """The data set the checkpoint names, or the one asked for, with the same split and image size."""
    meta, settings = saved.meta, saved.meta["config"]
    data = datasets.load(
        dataset or settings["data.name"],
        root or settings["data.root"],
        image_size=meta["image_size"],
        val_fraction=settings["data.val_fraction"],
        split_seed=settings["data.split_seed"],
    )
    check_classes(path, meta["classes"], data)
    if data.split_digest != meta["split_digest"]:
        warn(f"the validation part of this data is not the one {path} was trained with")
    return data


def _report(path: Path, result: dict[str, Any]) -> None:
    tell(f"{path} ({result['form']}) on {result['images']:,} {result['split']} images of {result['dataset']}")
    tell(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}")
