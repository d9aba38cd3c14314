"""`repan benchmark`: time a network in each of its forms, and a step of its training."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli import checkpoint, export, models, runs
from repan_cli.blocks import rep_blocks
from repan_cli.checkpoint.card import FUSED
from repan_cli.commands.early import batch_sizes
from repan_cli.commands.options import BenchmarkOptions
from repan_cli.config.conventions import ARTIFACT_ENDINGS
from repan_cli.config.names import names_a_repository
from repan_cli.display.console import print_line
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError, is_out_of_memory
from repan_cli.export import onnx_file
from repan_cli.export.runtimes.openvino_files import OpenVinoNetwork
from repan_cli.export.trace import quiet, trace
from repan_cli.models.changes import report_of
from repan_cli.models.outputs import leaves
from repan_cli.models.probe import noise
from repan_cli.models.timm_blocks import is_own_block
from repan_cli.session.artifact import Artifact, open_artifact
from repan_cli.system.device import Runtime, describe_machine, start_runtime
from repan_cli.system.files import to_json
from repan_cli.system.host import processor
from repan_cli.system.notices import warn
from repan_cli.system.packages import RUNTIME_PACKAGES, missing
from repan_cli.system.text import count, first_line, short
from repan_cli.system.timing import Timing, interleaved
from repan_cli.system.user_code import names_a_file

COMPILED, ONNX, OPENVINO = "compiled", "ONNX Runtime", "OpenVINO"

ON_DEVICES = ("PyTorch", "torch.export")
"""The programs that run on the device that is asked for; all others run on the CPU, in the precision of their file."""


def run(options: BenchmarkOptions) -> None:
    """Time a network: all forms in turn at every batch size, then a training step."""
    batches = batch_sizes(options)
    if options.training_batch < 0:
        raise InputError("--training-batch must be at least 1, or 0 to skip training")
    if options.precision == "tf32":
        raise InputError("--precision tf32 is only for training: give fp32, bf16, fp16 or auto")
    machine = start_runtime(options.device, options.precision)
    artifact = _artifact(options)
    machine = _machine_for(artifact, machine, options.device)
    size = options.image_size or artifact.card.image_size
    images = noise(2, artifact.card.in_chans, size, size)
    result = {
        "source": options.checkpoint,
        "model": artifact.card.model,
        "block": artifact.card.block,
        "image_size": size,
        **_machine(machine),
        "inference": [],
        "training": [],
    }
    forms = _forms(artifact, images, machine, compiled=options.compiled)
    result["forms"] = [form.describe() for form in forms]
    for batch in batches:
        result["inference"] += _inference(forms, images, batch, machine, options.seconds)
    if options.training_batch and artifact.runtime == "PyTorch":
        result["training"] = _training(
            forms, images, options.training_batch, len(artifact.card.classes), machine, options.seconds
        )
    if options.as_json:
        print(to_json(result))
    else:
        _report(result)


# ---------------------------------------------------------------------------------------------- what is timed


@dataclass(frozen=True)
class _Form:
    """One form of the network, on its device."""

    name: str
    network: nn.Module
    trains: bool = False
    parameters: int | None = None
    gmacs: float | None = None

    def describe(self) -> dict[str, Any]:
        return {"form": self.name, "parameters": self.parameters, "gmacs": self.gmacs}


def _artifact(options: BenchmarkOptions) -> Artifact:
    """Open the network in a file, or build the network of a name, with fresh weights, expanded."""
    source, image_size, block = options.checkpoint, options.image_size, options.block
    is_file = Path(source).exists() or Path(source).suffix in ARTIFACT_ENDINGS
    if is_file or names_a_repository(source):
        if block is not None and not names_a_file(block):
            raise InputError(
                "--block is for a network given by name, or for your own blocks: a file already contains its blocks"
            )
        return open_artifact(source, options.model, block=block, trusted=options.trust_code)
    name = models.resolve(source, image_size or models.SMALL_IMAGE)
    native = block if name in models.BUILT_OF_BLOCKS else None
    artifact = open_artifact(name, pretrained=False, block=native)
    network = artifact.network
    if name in models.BUILT_OF_BLOCKS:
        return artifact
    side = image_size or artifact.card.image_size
    images = noise(2, artifact.card.in_chans, side, side)
    try:
        models.expand(network, block, images=images, attach="one")
    except InputError as error:
        warn(str(error))
        return artifact
    report = report_of(network)
    assert report is not None, "expand has set it"
    return dataclasses.replace(artifact, card=dataclasses.replace(artifact.card, block=report.family))


def _machine_for(artifact: Artifact, machine: Runtime, asked: str) -> Runtime:
    """Return the machine that runs a network. Raises InputError for a GPU if the file's program runs on the CPU."""
    if artifact.runtime in ON_DEVICES or machine.device.type == "cpu":
        return machine
    if asked != "auto":
        raise InputError(f"{artifact.source} is run by {artifact.runtime}, on the CPU: give --device cpu")
    return dataclasses.replace(machine, device=torch.device("cpu"))


def _forms(artifact: Artifact, images: Tensor, machine: Runtime, *, compiled: bool) -> list[_Form]:
    """Return the available forms of the network: multi-branch, fused, compiled, ONNX Runtime, OpenVINO."""
    of_file = artifact.card.precision or ("" if machine.precision == "fp32" else "fp32")
    if artifact.runtime != "PyTorch":
        name = artifact.runtime if artifact.runtime in ON_DEVICES else f"{artifact.runtime} {of_file}".rstrip()
        return [_Form(name, artifact.network.to(machine.device))]
    multi = artifact.network.eval()
    forms, fused = [], multi
    if artifact.form != FUSED and (any(rep_blocks(multi)) or any(is_own_block(module) for module in multi.modules())):
        forms.append(_measured("multi-branch", multi, images))
    if artifact.form != FUSED:
        try:
            fused, _ = export.fuse(multi, images)
        except InputError as error:
            warn(str(error))
    forms.append(_measured("fused", fused, images))
    forms = [_placed(form, machine) for form in forms]
    if compiled:
        network = torch.compile(copy.deepcopy(forms[-1].network))
        assert isinstance(network, nn.Module), "PyTorch compiles a module into a module"
        forms.append(_Form(COMPILED, network))
    if machine.device.type == "cpu" and not missing(*onnx_file.PACKAGES):
        forms += _in_other_programs(fused, artifact, images, of_file)
    return forms


def _in_other_programs(fused: nn.Module, artifact: Artifact, images: Tensor, precision: str) -> list[_Form]:
    """Return the merged network in ONNX Runtime and OpenVINO; nothing, with a warning, if it has no graph."""
    saved = checkpoint.Checkpoint({}, artifact.card)
    try:
        with quiet():
            content = onnx_file.write(trace(fused, images, artifact.source), checkpoint.header(saved))
    except InputError as error:
        warn(str(error))
        return []
    forms = [_Form(f"{ONNX} {precision}".rstrip(), onnx_file.OnnxNetwork(content))]
    if not missing(*RUNTIME_PACKAGES["openvino"]):
        forms.append(_Form(f"{OPENVINO} {precision}".rstrip(), OpenVinoNetwork(content)))
    return forms


def _measured(name: str, network: nn.Module, images: Tensor) -> _Form:
    macs = export.count_macs(network, images[:1])
    return _Form(name, network, True, export.count_parameters(network), macs / 1e9)


def _placed(form: _Form, machine: Runtime) -> _Form:
    return dataclasses.replace(form, network=machine.place(form.network))


# ---------------------------------------------------------------------------------------------- inference


@torch.no_grad()
def _inference(
    forms: list[_Form], images: Tensor, batch: int, machine: Runtime, seconds: float
) -> list[dict[str, Any]]:
    """Return a row per form: latency of a batch, images per second, and the speedup over the first form."""
    given = _batch(images, batch, machine)
    cases, rows = {}, []
    for form in forms:
        case = _forward(form, given, machine)
        try:
            with quiet():
                case()
        except Exception as error:
            if form.name != COMPILED:
                raise
            warn(f"torch.compile does not work here: {first_line(error)}")
            continue
        cases[form.name] = case
    with torch.no_grad():
        timings = interleaved(cases, seconds=seconds, device=machine.device)
    first = next(iter(timings.values())).median
    for name, timing in timings.items():
        rows.append({"form": name, "batch": batch, **_figures(timing, batch), "speedup": first / timing.median})
    return rows


def _forward(form: _Form, given: Tensor, machine: Runtime) -> Callable[[], object]:
    def forward() -> Tensor:
        with machine.autocast():
            return form.network(given)

    return forward


def _batch(images: Tensor, count: int, machine: Runtime) -> Tensor:
    many = images[:1].expand(count, -1, -1, -1).contiguous(memory_format=machine.memory_format)
    return many.to(machine.device)


def _figures(timing: Timing, images: int) -> dict[str, Any]:
    return {
        "milliseconds": 1000 * timing.median,
        "milliseconds_quartiles": [1000 * timing.low, 1000 * timing.high],
        "images_per_second": images / timing.median,
        "windows": timing.windows,
    }


# ---------------------------------------------------------------------------------------------- training


def _training(
    forms: list[_Form], images: Tensor, batch: int, classes: int, machine: Runtime, seconds: float
) -> list[dict[str, Any]]:
    """Return a row for each form that can be trained: the time of a step (forward, backward, SGD), and its memory."""
    given, labels = _batch(images, batch, machine), torch.arange(batch, device=machine.device) % classes
    steps, memory = {}, {}
    for form in forms:
        if form.trains:
            network = copy.deepcopy(form.network).train().requires_grad_(True)
            optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, fused=True)
            step = _step(network, optimizer, given, labels, machine)
            try:
                memory[form.name] = _memory(network, step, machine)
            except Exception as error:  # a detector wants boxes to train
                if is_out_of_memory(error):
                    raise
                warn(f"a training step of the form {form.name} is not timed: {first_line(error)}")
                continue
            steps[form.name] = step
    if not steps:
        return []
    timings = interleaved(steps, seconds=seconds, device=machine.device)
    return [
        {"form": name, "batch": batch, **_figures(timing, batch), "step_bytes": memory[name]}
        for name, timing in timings.items()
    ]


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, given: Tensor, labels: Tensor, machine: Runtime
) -> Callable[[], object]:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with machine.autocast():
            loss = _loss(network(given), labels)
        loss.backward()
        optimizer.step()

    return step


def _loss(output: Any, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits (N, classes), or for other outputs a loss that depends on every number."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return F.cross_entropy(output, labels)
    return torch.stack([part.float().square().mean() for part in leaves(output).values()]).sum()


def _memory(network: nn.Module, step: Callable[[], object], machine: Runtime) -> int:
    """Return the bytes that a step needs.

    On a GPU they are measured. On a CPU they are the bytes of the tensors kept for the backward pass, the weights, the
    gradients and the momentum.
    """
    if machine.device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats(machine.device)
        step()
        return torch.cuda.max_memory_allocated(machine.device)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    for parameter in network.parameters():  # most layers keep their weights, which count below
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values()) + 3 * sum(p.numel() * p.element_size() for p in network.parameters())


# ---------------------------------------------------------------------------------------------- saying it


def _machine(machine: Runtime) -> dict[str, Any]:
    return {**describe_machine(machine), "processor": processor(), **runs.software()}


def _report(result: dict[str, Any]) -> None:
    print_line(f"{result['model']}, {result['block']} blocks, images of {result['image_size']}x{result['image_size']}")
    gpu = result["gpu"] or result["processor"]
    print_line(
        f"{gpu}, {count(result['threads'], 'thread')}, {result['precision']}; PyTorch {result['versions']['torch']}"
    )
    sizes = [
        (each["form"], f"{each['parameters']:,}", short(1e9 * each["gmacs"]))
        for each in result["forms"]
        if each["parameters"] is not None
    ]
    if sizes:
        print_table(["form", "parameters", "MACs"], sizes)
    rows = [(str(row["batch"]), row["form"], *_cells(row), f"{row['speedup']:.2f}x") for row in result["inference"]]
    print_table(["batch", "inference", "ms", "quartiles", "images/s", "against the first"], rows)
    rows = [
        (str(row["batch"]), row["form"], *_cells(row), f"{row['step_bytes'] / 2**20:,.0f} MiB")
        for row in result["training"]
    ]
    if rows:
        print_table(["batch", "training", "ms", "quartiles", "images/s", "step memory"], rows)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    low, high = row["milliseconds_quartiles"]
    return f"{row['milliseconds']:.2f}", f"{low:.2f}-{high:.2f}", f"{row['images_per_second']:,.0f}"
