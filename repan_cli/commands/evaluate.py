"""`repan evaluate`: the accuracy of a checkpoint on a part of its data set, or of another with the same classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from repan_cli import checkpoint, config, engine, export, models, runtime
from repan_cli.checkpoint import FUSED, Checkpoint
from repan_cli.commands.network import check_classes
from repan_cli.console import tell, warn
from repan_cli.data import datasets
from repan_cli.data.datasets import Dataset
from repan_cli.data.sources import plain_source


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
    images = plain_source(data, split, machine)
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
    asked = {"name": dataset, "root": root, "image_size": meta["image_size"], "channels": meta["in_chans"]}
    stored = config.replace(config.Config(), {key: value for key, value in settings.items() if key.startswith("data.")})
    arguments = datasets.settings_of(stored.data)
    if dataset is not None:
        arguments["classes"] = None
    data = datasets.load(**{**arguments, **{name: value for name, value in asked.items() if value is not None}})
    data = dataclasses.replace(data, mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    check_classes(path, meta["classes"], data)
    if data.split_digest != meta["split_digest"]:
        warn(f"the validation part of this data is not the one {path} was trained with")
    return data


def _report(path: Path, result: dict[str, Any]) -> None:
    tell(f"{path} ({result['form']}) on {result['images']:,} {result['split']} images of {result['dataset']}")
    tell(f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}")
