"""`repan fuse`: merge a network's blocks into plain convolutions, prove it, and write it in every requested format."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from repan_cli import checkpoint, export, models
from repan_cli.checkpoint.card import FUSED, PLAIN, ModelCard, Structure
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.checkpoint.published import for_others
from repan_cli.commands.early import Content, Target, fuse_targets
from repan_cli.commands.options import FuseOptions
from repan_cli.config.conventions import GRAPH_FORMATS, OPSET, RUNTIME_FORMATS, WEIGHT_FORMATS
from repan_cli.config.names import TIMM, TORCHVISION
from repan_cli.display.console import print_line
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError, MergeError
from repan_cli.export import file_check, half, model_card, onnx_file, pt2_file, runtimes, timm_folder
from repan_cli.export.conv_bn import as_plain
from repan_cli.export.fuse import check_finite, untrained_norms
from repan_cli.export.trace import Normalized, trace
from repan_cli.models import user_file
from repan_cli.models.changes import changes_of
from repan_cli.session.artifact import Artifact, open_artifact
from repan_cli.session.artifact_images import noise, real_images
from repan_cli.system.files import make_folder, to_json
from repan_cli.system.notices import warn
from repan_cli.system.text import by_reason, count, file_size, percent, quoted, short

HALF_IMAGES, HALF_NOISE, BATCH = 256, 64, 32
"""Numbers of images for the check of float16: of the network's data, of noise if there are none, and per batch."""


@dataclass(frozen=True)
class Written:
    """A written file or folder: the error of its network, the program that opened it, its use, and its images
    at once.
    """

    path: str
    format: str
    form: str
    bytes: int
    rel_error: float | None
    opened_by: str
    use: str
    images: str | None


def run(options: FuseOptions) -> None:
    """Write a merged network, once for every format. Nothing is written unless everything agrees."""
    targets = fuse_targets(options)
    _check_provable(targets, unproven=options.unproven)
    artifact = open_artifact(options.checkpoint, options.model, block=options.block)
    _check_mergeable(artifact, targets, options.form)
    images, seen = _images(artifact, options.data_root)
    fused, report = _merged(artifact, images)
    saved = artifact.checkpoint()
    if report:
        result = checkpoint.capture_fused(fused, saved, changes_of(fused))
    else:
        result = dataclasses.replace(saved, card=for_others(saved.card))
    bound = file_check.bound(report.rel_error_fp32 if report else 0.0)
    proof = dataclasses.asdict(report) if report else {}
    job = _Job(artifact, fused, result, images, options, bound, proof)
    contents = [job.content(target, options.form) for target in targets]
    written = [job.verified(*each, options.form) for each in zip(targets, contents, strict=True)]
    for target, content in zip(targets, contents, strict=True):
        make_folder(target.path)
        target.write(content)
    facts = {"out": [str(target.path) for target in targets], **proof}
    facts |= {"images": seen, "files": [dataclasses.asdict(file) for file in written]}
    facts |= {"float16": dataclasses.asdict(job.half_report)} if options.half else {}
    if options.as_json:
        print(to_json(facts))
    else:
        _report(options.checkpoint, facts, artifact, with_normalize=options.with_normalize)


# ---------------------------------------------------------------------------------------------- before anything is done


def _check_provable(targets: Sequence[Target], *, unproven: bool) -> None:
    """Raise InputError for a format that cannot be run here, unless it may be written without a proof."""
    for target in targets:
        reason = runtimes.KINDS[target.kind].why_not() if target.kind in RUNTIME_FORMATS else None
        if reason and not unproven:
            raise InputError(f"--format {target.kind} cannot be verified here: {reason}; --unproven writes it anyway")


def _check_mergeable(artifact: Artifact, targets: Sequence[Target], form: str) -> None:
    if artifact.runtime != "PyTorch":
        raise InputError(f"{artifact.source} is already exported: fuse the checkpoint that it came from")
    kinds = {target.kind for target in targets}
    if artifact.form == FUSED and kinds <= set(WEIGHT_FORMATS) and form == "conv" and "pt" in kinds:
        raise InputError(
            f"{artifact.source} is already fused; --format onnx, pt2 or safetensors writes it in another format"
        )
    check_finite(artifact.network)
    if fresh := untrained_norms(artifact.network):
        told = f"{count(len(fresh), 'BN')} of {artifact.source} never saw an image, such as {fresh[0]}"
        warn(f"{told}: the network seems to be untrained")


def _images(artifact: Artifact, data_root: str | None) -> tuple[Tensor, dict[str, Any]]:
    """Return images to compare on: noise with the statistics that the network expects and, if available, real
    images.
    """
    random = noise(artifact)
    real, why = real_images(artifact, data_root, export.PROOF_IMAGES)
    seen = {"random": len(random), "real": len(real) if real is not None else 0, "why_not_real": why}
    return random if real is None else torch.cat([real, random]), seen


def _merged(artifact: Artifact, images: Tensor) -> tuple[nn.Module, export.FuseReport | None]:
    """Return the merged network and its proof; an already merged network is returned unchanged, without a proof."""
    if artifact.form == FUSED:
        return artifact.network, None
    return export.fuse(artifact.network, images)


# ---------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Job:
    """A merged network that is written to files."""

    artifact: Artifact
    fused: nn.Module
    result: Checkpoint
    images: Tensor
    options: FuseOptions
    bound: float
    proof: dict[str, Any]
    measured: list[half.HalfReport] = field(default_factory=list)

    def content(self, target: Target, form: str) -> Content:
        """Return the bytes of a file, or of a folder's files.

        Raises InputError for a network that its format cannot hold.
        """
        if target.kind in WEIGHT_FORMATS:
            saved = self._plain() if form == "conv-bn" else self.result
            return checkpoint.as_bytes(saved, target.path.suffix)
        if target.kind == "timm":
            return self._for_timm()
        network, card = self.fused, self.result.card
        if self.options.with_normalize:
            network, card = Normalized(network, card.mean, card.std), dataclasses.replace(card, normalizes=True)
        if target.kind in RUNTIME_FORMATS:
            return self._for_runtime(target.kind, network, self._header(card))
        try:
            program = trace(network, self.images, self.artifact.source)
        except InputError:
            if target.kind != "onnx" or self.options.half or isinstance(self.expected[0], Tensor):
                raise
            return self._onnx_of_one_image(network, card)
        try:
            return self._onnx(program, card) if target.kind == "onnx" else pt2_file.write(program, self._header(card))
        except InputError as error:
            raise InputError(f"{self.artifact.source} {error}") from error

    def _for_runtime(self, name: str, network: nn.Module, header: dict[str, Any]) -> dict[str, bytes]:
        source = self.artifact.source
        if not isinstance(self.expected[0], Tensor):
            raise InputError(f"{source} returns several tensors: use --format onnx or pt2, which name them")
        job = runtimes.Conversion(
            network, self.images, source, lambda: onnx_file.write(trace(network, self.images, source), header)
        )
        return runtimes.contents(name, runtimes.KINDS[name].convert(job), header)

    def _for_timm(self) -> dict[str, bytes]:
        card = for_others(self.result.card, keeps_place=False)
        saved = timm_folder.network_of_timm(self.fused, card, self.options.checkpoint)
        return timm_folder.files(saved, model_card.readme(saved.card, self.options.checkpoint, proof=self.proof))

    def _onnx_of_one_image(self, network: nn.Module, card: ModelCard) -> bytes:
        try:
            return onnx_file.seal(onnx_file.model_for_one_image(network, self.images, self._opset), self._header(card))
        except InputError as error:
            raise InputError(f"{self.artifact.source} {error}") from error

    @property
    def _opset(self) -> int:
        return OPSET if self.options.opset is None else self.options.opset

    def _onnx(self, program: ExportedProgram, card: ModelCard) -> bytes:
        opset = self._opset
        if not self.options.half:
            return onnx_file.write(program, self._header(card), opset)
        _ = self.half_bound  # this refuses a network that float16 cannot hold
        model = half.as_half(onnx_file.model_of(program, opset))
        self.measured.append(self._compare_half(onnx_file.OnnxNetwork(model.SerializeToString())))
        card = dataclasses.replace(card, precision="float16", float16=dataclasses.asdict(self.half_report))
        return onnx_file.seal(model, self._header(card))

    def _header(self, card: ModelCard) -> dict[str, Any]:
        return checkpoint.header(dataclasses.replace(self.result, card=card))

    def _compare_half(self, network: nn.Module) -> half.HalfReport:
        """Compare on images of the network's data if they are available, else on noise."""
        real, _ = real_images(self.artifact, self.options.data_root, HALF_IMAGES)
        images = noise(self.artifact, HALF_NOISE) if real is None else real
        batches = ((self._given(part), part) for part in images.split(BATCH))
        return half.compare(network, self.fused, batches, real=real is not None)

    @functools.cached_property
    def half_bound(self) -> float:
        return half.bound(self.fused, self.images, self.artifact.source)

    @property
    def half_report(self) -> half.HalfReport:
        """Return the cost of float16, after such a file was made."""
        return self.measured[0]

    def _plain(self) -> Checkpoint:
        """Return the weights in the layout of the plain network."""
        card = self.result.card
        structure = card.structure
        block = "plain" if structure.native else None
        native = {"block": block, "branches": None} if block else {}
        given = self.options.model
        name = card.model if given is None or not user_file.names_a_file(card.model) else given
        blank = models.create(name, num_classes=len(card.classes), in_chans=card.in_chans, block=block)
        network = as_plain(self.fused, blank)
        own = tuple(change for change in structure.changes if change.kind in ("adapt", "merge"))
        plain = Structure(own, {}, native)
        form = FUSED if own else PLAIN
        return checkpoint.capture(network, dataclasses.replace(card, block="plain", structure=plain, form=form))

    def verified(self, target: Target, content: Content, form: str) -> Written:
        """Open a file as a reader would, and describe it. Raises MergeError if its network computes something else."""
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"copy{target.path.suffix}"
            target.write(content, copy)
            network, opened_by = self._opened(target.kind, copy)
            error = None if network is None else self._error(network)
        allowed = self.half_bound if self.options.half else self.bound
        if network is not None and error is not None and not error <= allowed:
            why = file_check.why_different(network, self.fused, self.images, allowed)
            raise MergeError(
                f"{target.path} would differ from the network: relative error {error:.1e}{why}; not written"
            )
        size = sum(map(len, content.values())) if isinstance(content, dict) else len(content)
        use = _use(target, form, dataclasses.replace(self.result.card, model=self.artifact.card.model))
        images = _images_of(target.kind, network)
        return Written(str(target.path), target.kind, form, size, error, opened_by, use, images)

    def _opened(self, kind: str, copy: Path) -> tuple[nn.Module | None, str]:
        """Open a written file as its readers would: return the network, None if it cannot run here, and the program."""
        if kind in RUNTIME_FORMATS and (reason := runtimes.KINDS[kind].why_not()):
            return None, f"nothing: {reason}"
        if kind == "timm":
            return timm_folder.open_by_timm(copy), "timm"
        model = self.options.model if user_file.names_a_file(self.result.card.model) else None
        opened = open_artifact(str(copy), model, trusted=True)
        return opened.network, opened.runtime

    def _error(self, network: nn.Module) -> float:
        return file_check.error_of(network, self._given(self.images), self.fused, self.images, self.expected)

    def _given(self, images: Tensor) -> Tensor:
        """Return normalized images as the graph takes them."""
        if not self.options.with_normalize:
            return images
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (self.result.card.mean, self.result.card.std))
        return images * std + mean

    @functools.cached_property
    @torch.no_grad()
    def expected(self) -> tuple[Any, Any]:
        """Return the outputs of the merged network for the images, and for the first of them."""
        return self.fused(self.images), self.fused(self.images[:1])


def _use(wanted: Target, form: str, card: ModelCard) -> str:
    """Return the line of code, or the command, that uses a file."""
    target = wanted.path
    if wanted.kind == "timm":
        return f'timm.create_model("local-dir:{target}", pretrained=True)'
    if wanted.kind in RUNTIME_FORMATS:
        return runtimes.KINDS[wanted.kind].use.format(folder=target)
    if target.suffix == ".onnx":
        return f'onnxruntime.InferenceSession("{target}").run(None, {{"{onnx_file.INPUT}": images}})'
    if target.suffix == ".pt2":
        return f'torch.export.load("{target}").module()(images)'
    own = f" --model {quoted(card.model)}" if user_file.names_a_file(card.model) else ""
    if form == "conv":
        return f"repan {'evaluate' if card.knows_its_data else 'info'} {quoted(target)}{own}"
    weights = (
        f'safetensors.torch.load_file("{target}")'
        if target.suffix == ".safetensors"
        else f'torch.load("{target}")["weights"]'
    )
    return f"{_constructor(card)}.load_state_dict({weights})"


def _constructor(card: ModelCard) -> str:
    """Return the Python code that builds the plain network."""
    name, classes, channels = card.model, len(card.classes), card.in_chans
    if name.startswith(TORCHVISION):
        return f'torchvision.models.get_model("{name.removeprefix(TORCHVISION)}", num_classes={classes})'
    if user_file.names_a_file(name):
        return f"{name.rpartition(':')[2]}(...)"
    block = ', block="plain"' if card.structure.native else ""
    shape = f"num_classes={classes}, in_chans={channels}{block}"
    made = f'timm.create_model("{name.removeprefix(TIMM)}", {shape})'
    if name in models.BUILTIN:
        made = f"import repan_cli.models; {made}"
    own = any(change[0] == "adapt" for change in card.structure.changes)
    return f"timm.utils.reparameterize_model({made})" if own else made


def _report(source: str, facts: dict[str, Any], artifact: Artifact, *, with_normalize: bool) -> None:
    seen = facts["images"]
    real = f"{seen['real']} real" if seen["real"] else f"no real ({seen['why_not_real']})"
    if "blocks" in facts:
        folded = f", folded {count(facts['folded'], 'BN')} outside of blocks" if facts["folded"] else ""
        print_line(f"merged {count(facts['blocks'], 'block')} of {source}{folded} in {facts['seconds']:.2f} s")
        for names, reason in by_reason(facts["left"]):
            print_line(f"left unchanged  {names}: {reason}")
        double, single = facts["rel_error_fp64"], facts["rel_error_fp32"]
        print_line(f"relative error  {double:.1e} in float64 (bound {export.TOLERANCE:.0e}), {single:.1e} in float32")
        print_line(f"parameters      {facts['params_before']:,} before, {facts['params_after']:,} after")
        before, after = (short(1e9 * facts[name]) for name in ("gmacs_before", "gmacs_after"))
        print_line(f"MACs            {before} before, {after} after, for one image")
    else:
        print_line(f"{source} is merged already")
    print_line(f"compared on     {seen['random']} random images and {real}")
    rows = [
        (file["path"], file_size(file["bytes"]), _agreement(file["rel_error"]), file["opened_by"])
        for file in facts["files"]
    ]
    print_table(["wrote", "size", "agrees", "opened by"], rows)
    if "float16" in facts:
        print_line(f"float16         {_cost(facts['float16'])}")
    for file in facts["files"]:
        print_line(f"use             {file['use']}", whole=True)
    for count_of in dict.fromkeys(filter(None, (file["images"] for file in facts["files"]))):
        print_line(f"images          {_input(artifact, count_of, with_normalize=with_normalize)}")


def _images_of(kind: str, network: nn.Module | None) -> str | None:
    """Return the number of images that a graph takes at once; None for a format that is not a graph."""
    if network is not None and file_check.takes_one(network):
        return "one at a time"
    if kind in RUNTIME_FORMATS:
        return "any N" if runtimes.KINDS[kind].any_batch else "one at a time"
    return "any N" if kind in GRAPH_FORMATS else None


def _cost(facts: dict[str, Any]) -> str:
    """Describe the cost of float16."""
    seen = f"{facts['images']} {'real images' if facts['real'] else 'noise images'}"
    same = percent(100 * facts["top1_agreement"])
    return f"relative error {facts['rel_error']:.1e}, the same class for {same} % of {seen}"


def _agreement(error: float | None) -> str:
    if error is None:
        return "not proven"
    return "to the bit" if error == 0 else f"to {error:.0e}"


def _input(artifact: Artifact, batch: str, *, with_normalize: bool) -> str:
    """Describe the images that a graph takes."""
    card = artifact.card
    shape = f"float32 (N, {card.in_chans}, {card.image_size}, {card.image_size}), {batch}"
    if with_normalize:
        return f"{shape}, values from 0 to 1"
    mean, std = ("/".join(f"{value:.4g}" for value in each) for each in (card.mean, card.std))
    return f"{shape}, values from 0 to 1 less mean {mean}, over std {std}"
