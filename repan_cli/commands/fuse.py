"""`repan fuse`: merge a checkpoint's blocks into plain convolutions, prove it, write the result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from repan_cli import checkpoint, export, models
from repan_cli.checkpoint import FUSED, Checkpoint
from repan_cli.console import count, tell
from repan_cli.errors import InputError

FORMATS = ("pt", "safetensors")


def run(path: Path, *, out: Path | None, formats: list[str], model: str | None, as_json: bool) -> None:
    """Write PATH's network merged, once for every format. Nothing is written unless the merge is proven equal."""
    targets = _targets(path, out, formats)
    saved = checkpoint.load(path)
    if saved.meta["form"] == FUSED:
        raise InputError(f"{path} is fused already")
    fused, report = export.fuse(models.rebuild(saved, str(path), model), _proof_images(saved))
    result = checkpoint.capture_fused(fused, saved)
    for target in targets:
        checkpoint.save(result, target)
    if as_json:
        print(json.dumps({"out": [str(target) for target in targets], **dataclasses.asdict(report)}))
    else:
        _report(path, targets, report, model)


def _targets(path: Path, out: Path | None, formats: list[str]) -> list[Path]:
    if out and out.is_dir():
        raise InputError(f"{out} is a folder: name a file in it")
    endings = formats or [out.suffix.removeprefix(".") if out else "pt"]
    for ending in endings:
        if ending not in FORMATS:
            raise InputError(f"cannot write the format '{ending}': choose {' or '.join(FORMATS)}")
    stem = (
        out.with_suffix("")
        if out and out.suffix.removeprefix(".") in FORMATS
        else out or path.with_name(f"{path.stem}_fused")
    )
    targets = [stem.with_name(f"{stem.name}.{ending}") for ending in dict.fromkeys(endings)]
    for target in targets:
        if not target.parent.is_dir():
            raise InputError(f"no folder {target.parent} to write {target.name} into")
        if target.resolve() == path.resolve():
            raise InputError(f"{target} is the checkpoint itself: give another --out")
        if target.exists() and not _is_fused(target):
            raise InputError(f"{target} exists already and is no fused network: give another --out")
    return targets


def _is_fused(path: Path) -> bool:
    """Whether a file is what this command wrote earlier and may write again."""
    try:
        return checkpoint.load(path).meta["form"] == FUSED
    except InputError:
        return False


def _proof_images(saved: Checkpoint) -> torch.Tensor:
    """Random images of the size and statistics that the network sees."""
    size = saved.meta["image_size"]
    shape = (export.PROOF_IMAGES, saved.meta["in_chans"], size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _report(path: Path, targets: list[Path], report: export.FuseReport, model: str | None) -> None:
    folded = f", folded {count(report.folded, 'BN')} outside of blocks" if report.folded else ""
    tell(f"merged {count(report.blocks, 'block')} of {path}{folded} in {report.seconds:.2f} s")
    bound = f"(bound {export.TOLERANCE:.0e})"
    tell(f"relative error  {report.rel_error_fp64:.1e} in float64 {bound}, {report.rel_error_fp32:.1e} in float32")
    tell(f"parameters      {report.params_before:,} before, {report.params_after:,} after")
    for target in targets:
        tell(f"wrote           {target} ({target.stat().st_size / 2**20:.2f} MiB)")
    tell(f"next            repan evaluate {targets[0]}" + (f" --model {model}" if model else ""))
