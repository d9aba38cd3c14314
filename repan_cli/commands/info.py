"""`repan info`: describe a file that repan or another program wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from repan_cli import checkpoint, models, runs
from repan_cli.blocks import rep_blocks
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.checkpoint.preprocessing import preprocessing
from repan_cli.commands.early import info_source
from repan_cli.commands.options import InfoOptions
from repan_cli.config.conventions import GRAPH_ENDINGS
from repan_cli.config.settings import SCHEMA
from repan_cli.display.console import print_line
from repan_cli.display.tables import print_table
from repan_cli.errors import InputError
from repan_cli.export import onnx_file, pt2_file, runtimes
from repan_cli.models import own_block, user_file
from repan_cli.models.author_names import form_in
from repan_cli.session import hub_folder
from repan_cli.session.artifact import open_artifact, open_weights, written_in
from repan_cli.system.files import to_json
from repan_cli.system.text import by_reason, file_size, quoted
from repan_cli.system.weight_files import RUNTIME_DESCRIPTION


def run(options: InfoOptions) -> None:
    """Describe a file: network, form, blocks, classes, position in its run, figures, settings, digest."""
    path, key = info_source(hub_folder.fetched(options.checkpoint))
    facts = describe(path, options.model, key, options.block)
    if options.as_json:
        print(to_json(facts))
        return
    layers, left, settings = (facts.pop(name, {}) for name in ("layers", "left_alone", "config"))
    changed = {key: value for key, value in settings.items() if _is_changed(key, value)}
    print_table(["", str(path)], [(name, _fact(name, value)) for name, value in _for_people(facts).items()])
    settings = [(key, _text(value)) for key, value in changed.items()]
    for titles, rows in (
        (["convolution", "blocks"], [(what, names) for names, what in by_reason(layers)]),
        (["left unchanged", "reason"], [*by_reason(left)]),
        (["setting", "where it is not the default"], settings),
    ):
        if rows:
            print_line("")
            print_table(titles, rows)


FIGURES = {"val_top1": "val top-1", "train_top1": "train top-1", "loss": "loss", "lr": "lr"}
"""The figures of an epoch that people are shown. The others are in the run's metrics.csv, and in `--json`."""


def _for_people(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts without those that say nothing, with digests at the end."""
    figures = facts.get("metrics") or {}
    seen = {text: figures[name] for name, text in FIGURES.items() if figures.get(name) is not None}
    known = {name: seen if name == "metrics" else value for name, value in facts.items()}
    known = {name: value for name, value in known.items() if value not in (None, "", [], {})}
    if known.get("attach_rate") == 1:
        del known["attach_rate"]
    return dict(sorted(known.items(), key=lambda fact: "digest" in fact[0] or fact[0] == "fused_from"))


def _fact(name: str, value: Any) -> str:
    """Return a fact as text, with large numbers in readable form."""
    if isinstance(value, int) and name == "bytes":
        return f"{value:,} ({file_size(value)})"
    if isinstance(value, int) and name == "parameters":
        return f"{value:,}"
    return _text(value)


def _is_changed(key: str, value: Any) -> bool:
    default = SCHEMA[key].default if key in SCHEMA else None
    return key not in SCHEMA or value != (list(default) if isinstance(default, tuple) else default)


def describe(
    path: Path, network: str | None = None, key: str | None = None, block: str | None = None
) -> dict[str, Any]:
    """Return the facts in plain types. Raises InputError for a file that is damaged or holds no network."""
    if path.suffix in GRAPH_ENDINGS:
        return _exported(path)
    if path.name == RUNTIME_DESCRIPTION:
        return _of_runtime(path)
    source = str(path) if key is None else f"{path}::{key}"
    content = checkpoint.load_any(source)
    if isinstance(content, Checkpoint):
        return _ours(path, content, network, block)
    return _theirs(path, content, network)


def _ours(path: Path, saved: Checkpoint, network: str | None, block: str | None) -> dict[str, Any]:
    """Describe a checkpoint of repan.

    `layers` maps the name of each block to its family and shape. `left_alone` maps the name of each other convolution
    to the reason why it is not a block.
    """
    needs = _needs(saved, network, block)  # a user's file is not imported
    model = None if needs else models.rebuild(saved, str(path), network, block)
    blocks = dict(rep_blocks(model)) if model else {}
    broken = _not_finite(saved.weights)
    layers = {name: f"{block.family}, {_describe(block.trunk.conv)}" for name, block in blocks.items()}
    inner = ("config", "structure", "progress", "begun")  # the last two are what a resume needs
    meta = {key: value for key, value in saved.card.as_meta().items() if key not in inner}
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved.weights.values())
    return {
        **meta,
        "preprocessing": preprocessing(saved.card)["preprocessing"],
        **({"needs": " ".join(needs)} if needs else {}),
        **_state_of_run(path),
        "parameters": sum(p.numel() for p in model.parameters()) if model else None,
        "bytes": size,
        "attach_rate": max((float(block.attach_rate) for block in blocks.values()), default=None),
        "digest": saved.digest(),
        **({"not finite": broken} if broken else {}),
        "layers": layers,
        "left_alone": dict(saved.card.structure.left),
        "config": dict(saved.card.settings),
    }


def _needs(saved: Checkpoint, network: str | None, block: str | None) -> list[str]:
    """Return the options that are needed to open a file and were not given."""
    own = [f"--model {saved.card.model}"] if network is None and user_file.names_a_file(saved.card.model) else []
    return own + ([f"--block {name}" for name in own_block.missing(saved.card)] if block is None else [])


def _state_of_run(path: Path) -> dict[str, str]:
    """Describe whether the run that a file belongs to is finished, and how to resume it; empty outside of runs."""
    state = runs.state_of(path.parent)
    if state is None:
        return {}
    return {"run": state if state == "done" else f"{state}; --resume {quoted(path.parent)} continues it"}


def _describe(conv: nn.Conv2d) -> str:
    size, stride = ("x".join(map(str, pair)) for pair in (conv.kernel_size, conv.stride))
    return f"{size}, {conv.in_channels} to {conv.out_channels} channels, stride {stride}"


def _of_runtime(description: Path) -> dict[str, Any]:
    """Describe the folder of another program's files, which are not run."""
    name, text = runtimes.opened(description, runtimes.KINDS)
    written = written_in(text)
    if written is None:
        raise InputError(f"{description} is damaged, or was not written by repan fuse; use another copy")
    card, digest = written
    more = {key: value for key, value in card.as_meta().items() if key not in ("config", "structure")}
    files = {file: (description.parent / file).stat().st_size for file in json.loads(text)["files"]}
    return {"format": name, "files": files, **more, "digest": digest, "config": dict(card.settings)}


def _exported(path: Path) -> dict[str, Any]:
    """Describe an `.onnx` or `.pt2` file. Of other programs' files only `.onnx` files are described."""
    onnx = onnx_file.read(path) if path.suffix == ".onnx" else None
    if onnx is None:
        checkpoint.check_seal(path)
    written = written_in(onnx.header if onnx else pt2_file.header(path))
    facts: dict[str, Any] = {"format": path.suffix.removeprefix("."), "bytes": path.stat().st_size}
    if written is not None:
        card, digest = written
        more = {key: value for key, value in card.as_meta().items() if key not in ("config", "structure")}
        more["preprocessing"] = preprocessing(card)["preprocessing"]
        facts |= {**more, "digest": digest, "config": dict(card.settings)}
    if onnx is not None:
        return facts | ({"changed": onnx.change} if onnx.change else {}) | _graph(onnx)
    if written is None:
        raise InputError(f"{path} was not written by repan fuse, and is not opened: such files can run code")
    open_artifact(str(path))
    return facts


def _graph(file: onnx_file.OnnxFile) -> dict[str, Any]:
    """Return the facts in an ONNX graph."""
    session, model = file.network().session, file.model
    operators = Counter(node.op_type for node in model.graph.node)
    return {
        "opset": {each.domain or "onnx": each.version for each in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": {each.name: list(each.shape) for each in session.get_inputs()},
        "outputs": {each.name: list(each.shape) for each in session.get_outputs()},
        "operators": dict(operators.most_common()),
    }


def _theirs(path: Path, weights: Mapping[str, Tensor], network: str | None) -> dict[str, Any]:
    """Describe weights that repan did not write. If a network is named, check that they fit it."""
    matrices = [name for name, value in weights.items() if value.ndim in (2, 4) and name.endswith("weight")]
    facts: dict[str, Any] = {
        "written by": "another program",
        "tensors": len(weights),
        "parameters": sum(value.numel() for name, value in weights.items() if "running_" not in name),
        "bytes": sum(value.numel() * value.element_size() for value in weights.values()),
        "types": dict(Counter(str(value.dtype).removeprefix("torch.") for value in weights.values())),
        "convolutions": sum(value.ndim == 4 for value in weights.values()),
        "form": form_in(weights) or "not known",
        "not finite": _not_finite(weights),
    }
    if matrices:
        first, last = weights[matrices[0]], weights[matrices[-1]]
        facts |= {
            "first layer": f"{matrices[0]} {tuple(first.shape)}",
            "last layer": f"{matrices[-1]} {tuple(last.shape)}",
        }
    if network is not None:
        card = open_weights(path, weights, network).card
        facts |= {"fits": card.model, "classes": len(card.classes), "in_chans": card.in_chans}
    return facts


def _not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name, value in weights.items() if not value.isfinite().all()]


def _text(value: Any) -> str:
    if isinstance(value, (list, dict)) and not value:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        shown = ", ".join(_text(inner) for inner in value[:10])
        return f"{len(value)}: {shown}, ..." if len(value) > 10 else shown
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None or value == "" else str(value)
