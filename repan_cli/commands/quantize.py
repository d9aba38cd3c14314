"""`repan quantize`: write a merged network in int8, and measure what that costs it, and which layers suffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from repan_cli import checkpoint, export
from repan_cli.checkpoint.card import FUSED
from repan_cli.commands.early import quantize_target
from repan_cli.commands.options import QuantizeOptions
from repan_cli.config.conventions import OPSET
from repan_cli.data.batches import Loader
from repan_cli.data.build import eval_loader
from repan_cli.display.console import print_table, tell
from repan_cli.errors import InputError
from repan_cli.export import int8, onnx_file
from repan_cli.export.fuse import check_finite
from repan_cli.export.trace import trace
from repan_cli.models.changes import changes_of
from repan_cli.session import artifact_images
from repan_cli.session.artifact import Artifact, open_artifact
from repan_cli.system.device import start_runtime
from repan_cli.system.files import make_folder, to_json, write_bytes
from repan_cli.system.text import count, percent, quoted
from repan_cli.training.scoring import agreement, examine

BATCH = 64
SHOWN = 8


def run(options: QuantizeOptions) -> None:
    """Merge a network, look at its layers, write it in int8, score both. Only training images calibrate."""
    target = quantize_target(options)
    opset = OPSET if options.opset is None else options.opset
    artifact = open_artifact(options.checkpoint, options.model, block=options.block)
    if artifact.runtime != "PyTorch":
        raise InputError(f"{artifact.source} is exported already: quantise the checkpoint that it came from")
    check_finite(artifact.network)
    machine = start_runtime("cpu", "fp32")
    data = artifact_images.load(artifact, options.dataset, options.data_root, split=None, order=options.classes)
    network, saved = _merged(artifact, artifact_images.noise(artifact))
    training = eval_loader(data, "train", machine, crop=artifact.preparation.crop)
    layers = int8.health(network, _calibration(training, options.images))
    header = checkpoint.header(saved)
    graph = onnx_file.write(trace(network, artifact_images.noise(artifact), artifact.source), header, opset)
    card = dataclasses.replace(saved.card, precision="int8")
    header = checkpoint.header(dataclasses.replace(saved, card=card))
    content = int8.quantize(graph, _calibration(training, options.images), header, per_channel=not options.per_tensor)
    scored = eval_loader(data, options.split, machine, crop=artifact.preparation.crop)
    before, _ = examine(network, scored, len(data.classes))
    after, _ = examine(onnx_file.OnnxNetwork(content), scored, len(data.classes))
    make_folder(target)
    write_bytes(target, content)
    result = {
        "out": str(target),
        "float32": {**before.score.figures(), "bytes": len(graph)},
        "int8": {**after.score.figures(), "bytes": len(content)},
        "agreement": agreement(before, after),
        "per_channel": not options.per_tensor,
        "calibration_images": min(options.images, training.count),
        "dataset": data.name,
        "split": options.split,
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
    if options.as_json:
        print(to_json(result))
    else:
        _report(options.checkpoint, result, layers)


def _merged(artifact: Artifact, images: Tensor) -> tuple[nn.Module, checkpoint.Checkpoint]:
    if artifact.form == FUSED:
        return artifact.network, artifact.checkpoint()
    network, _ = export.fuse(artifact.network, images)
    return network, checkpoint.capture_fused(network, artifact.checkpoint(), changes_of(network))


def _calibration(source: Loader, images: int) -> Iterator[Tensor]:
    """Yield training images as they are, `images` of them or all, in batches evenly spaced over the part."""
    batches = -(-source.count // BATCH)
    wanted = min(-(-images // BATCH), batches)
    chosen = {number * batches // wanted for number in range(wanted)}
    for number, batch in enumerate(source.batches(BATCH)):
        if number in chosen and images > 0:
            yield batch.images[:images]
            images -= len(batch.images)


RANKS = {"top1": "top-1 %", "top5": "top-5 %"}


def _scores(figures: Mapping[str, Any]) -> list[str]:
    return [percent(figures[name]) for name in RANKS if name in figures]


def _report(source: str, result: dict[str, Any], layers: list[int8.LayerHealth]) -> None:
    per_channel = result["per_channel"]
    worst = sorted(layers, key=lambda layer: layer.worst(per_channel=per_channel))[:SHOWN]
    tell(f"{source}: the {count(len(worst), 'layer')} of {len(layers)} that lose most in int8")
    titles = ["layer", "channel spread", "input outlier", "weights dB", "by channel dB", "input dB"]
    rows = [(layer.name, *(f"{value:.1f}" for value in dataclasses.astuple(layer)[1:])) for layer in worst]
    print_table(titles, rows, to_stderr=True)
    scales = "one scale a channel" if per_channel else "one scale a layer"
    calibrated = f"calibrated on {count(result['calibration_images'], 'training image')}, {scales}"
    tell(f"{result['int8']['images']:,} {result['split']} images of {result['dataset']}; {calibrated}")
    rows = [
        (name, *_scores(each), f"{each['loss']:.4f}", f"{each['bytes'] / 2**20:.2f} MiB")
        for name, each in (("float32", result["float32"]), ("int8", result["int8"]))
    ]
    titles = [title for name, title in RANKS.items() if name in result["int8"]]
    print_table(["", *titles, "loss", "size"], rows, to_stderr=True)
    tell(f"both name the same class for {percent(result['agreement'])} % of the images")
    tell(f"wrote            {result['out']}")
    tell(f"next             repan evaluate {quoted(result['out'])}")
