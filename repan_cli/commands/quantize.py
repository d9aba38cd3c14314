"""`repan quantize`: write a merged network in int8, and measure the loss of accuracy, also per layer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from repan_cli import checkpoint, export
from repan_cli.checkpoint.card import FUSED
from repan_cli.checkpoint.published import for_others
from repan_cli.commands.early import quantize_target
from repan_cli.commands.options import QuantizeOptions
from repan_cli.config.conventions import OPSET
from repan_cli.data.batches import Loader
from repan_cli.data.build import eval_loader
from repan_cli.data.types import Part
from repan_cli.display.console import print_line
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError
from repan_cli.export import int8, onnx_file
from repan_cli.export.fuse import check_finite
from repan_cli.export.runtimes.openvino_files import OpenVinoNetwork
from repan_cli.export.trace import trace
from repan_cli.models.changes import changes_of
from repan_cli.session import artifact_images
from repan_cli.session.artifact import Artifact, open_artifact
from repan_cli.system.device import start_runtime
from repan_cli.system.files import make_folder, to_json, write_bytes
from repan_cli.system.notices import warn
from repan_cli.system.text import count, file_size, percent, quoted
from repan_cli.system.timing import interleaved
from repan_cli.training.scoring import agreement, examine

BATCH = 64
SHOWN = 8

SECONDS = 0.5
"""The number of seconds for which each file is timed."""

SLOWER = 0.95
"""A speedup below this is reported as a slowdown: timings of equal networks differ by a few percent."""


def run(options: QuantizeOptions) -> None:
    """Merge a network, analyze its layers, write it in int8, and score both. Calibration uses only training images."""
    target = quantize_target(options)
    opset = OPSET if options.opset is None else options.opset
    artifact = open_artifact(options.checkpoint, options.model, block=options.block)
    if artifact.runtime != "PyTorch":
        raise InputError(f"{artifact.source} is already exported: quantize the checkpoint that it came from")
    check_finite(artifact.network)
    machine = start_runtime("cpu", "fp32")
    data = artifact_images.load(artifact, options.dataset, options.data_root, split=None, order=options.classes)
    network, saved = _merged(artifact, artifact_images.noise(artifact))
    chosen = dataclasses.replace(data, train=spread(data.train, options.images))
    training = eval_loader(chosen, "train", machine, crop=artifact.preparation.crop)
    layers = int8.health(network, _images_of(training))
    header = checkpoint.header(saved)
    graph = onnx_file.write(trace(network, artifact_images.noise(artifact), artifact.source), header, opset)
    card = dataclasses.replace(saved.card, precision="int8")
    job = _Job(options, graph, checkpoint.header(dataclasses.replace(saved, card=card)), training)
    content = job.content(())
    left_out: tuple[str, ...] = ()
    if options.max_drop is not None:
        judge = eval_loader(data, "val" if data.val is not None else "train", machine, crop=artifact.preparation.crop)
        content, left_out = job.within(options.max_drop, content, layers, network, judge, len(data.classes))
    scored = eval_loader(data, options.split, machine, crop=artifact.preparation.crop)
    before, _ = examine(network, scored, len(data.classes))
    after, _ = examine(job.opened(content), scored, len(data.classes))
    latency = job.latency(content, artifact_images.noise(artifact)[:1])
    make_folder(target)
    write_bytes(target, content)
    result = {
        "out": str(target),
        "target": options.target,
        "float32": {**before.score.figures(), "bytes": len(graph)},
        "int8": {**after.score.figures(), "bytes": len(content)},
        "agreement": agreement(before, after),
        "milliseconds": latency,
        "speedup": latency and latency["float32"] / latency["int8"],
        "left_out": list(left_out),
        "per_channel": not options.per_tensor,
        "calibration_images": training.count,
        "dataset": data.name,
        "split": options.split,
        "layers": [dataclasses.asdict(layer) for layer in layers],
    }
    if options.as_json:
        print(to_json(result))
    else:
        _report(options.checkpoint, result, layers)


@dataclass(frozen=True)
class _Job:
    """A network that is written in int8: its file in float32, the description of the new file, and the training images
    for calibration.
    """

    options: QuantizeOptions
    graph: bytes
    header: dict[str, Any]
    training: Loader

    def content(self, left_out: Sequence[str]) -> bytes:
        """Return the file in int8, with some layers in float32."""
        return int8.quantize(
            self.graph,
            _images_of(self.training),
            self.header,
            per_channel=not self.options.per_tensor,
            target=self.options.target,
            left_out=left_out,
        )

    def opened(self, content: bytes) -> nn.Module:
        """Return the network in a file, run by the program that the file is for; files for TensorRT are run by ONNX
        Runtime.
        """
        return OpenVinoNetwork(content) if self.options.target == int8.OPENVINO else onnx_file.OnnxNetwork(content)

    def within(
        self,
        most: float,
        content: bytes,
        layers: Sequence[int8.LayerHealth],
        network: nn.Module,
        judge: Loader,
        classes: int,
    ) -> tuple[bytes, tuple[str, ...]]:
        """Leave the worst layers in float32, 1, 2, 4 and so on, until top-1 falls by at most `most` points.

        `judge` has images on which the network is not scored later. Returns the file, and the names of the layers.
        """
        per_channel = not self.options.per_tensor
        worst = [each.name for each in sorted(layers, key=lambda layer: layer.worst(per_channel=per_channel))]
        wanted = examine(network, judge, classes)[0].score.figures()["top1"]
        left: tuple[str, ...] = ()
        while (drop := wanted - examine(self.opened(content), judge, classes)[0].score.figures()["top1"]) > most:
            if len(left) == len(worst):
                break
            left = tuple(worst[: max(1, 2 * len(left))])
            content = self.content(left)
        if drop > most:
            warn(f"even with every layer in float32, top-1 falls by {drop:.2f} points, more than --max-drop {most:g}")
        return content, left

    def latency(self, content: bytes, image: Tensor) -> dict[str, float] | None:
        """Time both files in turn on one image; None if the program is not installed."""
        if self.options.target == int8.TENSORRT:
            return None
        networks = {"float32": self.opened(self.graph), "int8": self.opened(content)}
        cases = {name: functools.partial(network, image) for name, network in networks.items()}
        return {name: 1000 * timing.median for name, timing in interleaved(cases, seconds=SECONDS).items()}


def _merged(artifact: Artifact, images: Tensor) -> tuple[nn.Module, checkpoint.Checkpoint]:
    if artifact.form == FUSED:
        saved = artifact.checkpoint()
        return artifact.network, dataclasses.replace(saved, card=for_others(saved.card))
    network, _ = export.fuse(artifact.network, images)
    return network, checkpoint.capture_fused(network, artifact.checkpoint(), changes_of(network))


def spread(part: Part, images: int) -> Part:
    """Return `images` of a part, or all, evenly spaced: image folders are in the order of their classes."""
    count_of = len(part.labels)
    wanted = min(images, count_of)
    chosen = np.zeros(count_of, dtype=bool)
    chosen[np.arange(wanted) * count_of // wanted] = True
    return part.take(chosen)


def _images_of(source: Loader) -> Iterator[Tensor]:
    return (batch.images for batch in source.batches(BATCH))


PROGRAMS = {int8.ORT: "ONNX Runtime", int8.TENSORRT: "TensorRT", int8.OPENVINO: "OpenVINO"}
RANKS = {"top1": "top-1 %", "top5": "top-5 %"}


def _scores(figures: Mapping[str, Any]) -> list[str]:
    return [percent(figures[name]) for name in RANKS if name in figures]


def _report(source: str, result: dict[str, Any], layers: list[int8.LayerHealth]) -> None:
    per_channel = result["per_channel"]
    worst = sorted(layers, key=lambda layer: layer.worst(per_channel=per_channel))[:SHOWN]
    print_line(f"{source}: the {count(len(worst), 'layer')} of {len(layers)} that lose most precision in int8")
    titles = ["layer", "channel spread", "input outlier", "weights dB", "by channel dB", "input dB"]
    rows = [(layer.name, *(f"{value:.1f}" for value in dataclasses.astuple(layer)[1:])) for layer in worst]
    print_table(titles, rows)
    scales = "one scale per channel" if per_channel else "one scale per layer"
    calibrated = f"calibrated on {count(result['calibration_images'], 'training image')}, {scales}"
    print_line(f"{count(result['int8']['images'], result['split'] + ' image')} of {result['dataset']}; {calibrated}")
    rows = [
        (name, *_scores(each), f"{each['loss']:.4f}", file_size(each["bytes"]))
        for name, each in (("float32", result["float32"]), ("int8", result["int8"]))
    ]
    titles = [title for name, title in RANKS.items() if name in result["int8"]]
    print_table(["", *titles, "loss", "size"], rows)
    if result["left_out"]:
        print_line(f"in float32       {count(len(result['left_out']), 'layer')}: {', '.join(result['left_out'])}")
    _report_latency(result)
    print_line(f"float32 and int8 predict the same class for {percent(result['agreement'])} % of the images")
    print_line(f"wrote            {result['out']}")
    print_line(f"next             repan evaluate {quoted(result['out'])}")


def _report_latency(result: dict[str, Any]) -> None:
    """Report the speed of both files, and warn if int8 is slower."""
    found, program = result["milliseconds"], PROGRAMS[result["target"]]
    if found is None:
        print_line(f"one image        not timed: {program} is not installed")
        return
    single, small, ratio = found["float32"], found["int8"], result["speedup"]
    print_line(f"one image        {single:.2f} ms in float32, {small:.2f} ms in int8 ({ratio:.2f}x), by {program} here")
    if ratio < SLOWER:
        warn(f"int8 is {1 / ratio:.1f}x slower than float32 by {program} on this machine: use the float32 file")
