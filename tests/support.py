"""What tests share: small networks, images, commands in this process or in one of their own, and runs that stop."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import repan_cli.models  # noqa: F401 (registers the networks)
from repan_cli import checkpoint, config
from repan_cli.checkpoint import ModelCard
from repan_cli.cli import app
from repan_cli.config.renamed import RENAMED
from repan_cli.data.batches import Augmentation
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.types import ArrayImages
from repan_cli.models import BUILT_OF_BLOCKS, Expansion, form_of
from repan_cli.session.recorder import Record
from repan_cli.system.device import Runtime
from repan_cli.training import optim
from repan_cli.training.events import StepEnd
from repan_cli.training.plan import cycle_plan
from repan_cli.training.run import Training
from repan_cli.training.tasks import Classification

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FP32 = Runtime(CPU, "fp32")


# ---------------------------------------------------------------------------------------------- networks


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BN random statistics and affine parameters, a zero and negative gammas among them.

    With the statistics of a fresh BN a wrong merge passes.
    """
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=draw))
            module.running_var.copy_(torch.rand(shape, generator=draw) * 2 + 0.2)
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(torch.randn(shape, generator=draw))
                    if module.bias is not None:
                        module.bias.copy_(torch.randn(shape, generator=draw))
                    module.weight[0] = 0
    return model


def small_net(block: str = "repvgg", *, name: str = "repvgg_a0_cifar", seed: int = 0, **kwargs: object) -> nn.Module:
    """A network for 10 classes with randomised BN, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=10, block=block, **kwargs)
    return randomize_norms(model, seed).eval()


def card_of(
    model: nn.Module, name: str = "repvgg_a0_cifar", *, expansion: Expansion | None = None, **values: Any
) -> ModelCard:
    """What a checkpoint says of a network for images of 32 pixels, as training would write it."""
    expansion = expansion or getattr(model, "repan_report", None) or Expansion("repvgg", (), {})
    built_of_blocks = {"block": expansion.family, "branches": None} if name in BUILT_OF_BLOCKS else {}
    usual = ModelCard(
        model=name,
        block=expansion.family,
        form=form_of(model),
        structure=expansion.structure(built_of_blocks),
        classes=tuple(str(number) for number in range(10)),
        in_chans=3,
        image_size=32,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.25),
        epoch=1,
    )
    return dataclasses.replace(usual, **values)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Counted(TorchDispatchMode):
    """Counts the operators that are dispatched meanwhile."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------------------------- images

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def by_hand(image: np.ndarray, padding: int, view: int) -> torch.Tensor:
    """Pad, crop, flip and normalise one image the slow way."""
    crop, mirrored = divmod(view, 2)
    row, column = divmod(crop, 2 * padding + 1)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    cut = padded[row : row + len(image), column : column + len(image)]
    cut = cut[:, ::-1] if mirrored else cut
    return torch.from_numpy((cut / 255 - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1)


def write_folders(root, *, parts=("train", "test"), classes=("ant", "bee"), count=6, size=(8, 8), seed=0):
    draw = np.random.default_rng(seed)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def write_flat_folders(root, classes=("ant", "bee"), *, images=10, size=16):
    """Write `root/<class>/<number>.png`."""
    draw = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(images):
            picture = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / name / f"{number}.png")
    return root


def digit_loader(digits, padding=1):
    return InMemoryLoader(
        digits.train, mean=digits.mean, std=digits.std, device=CPU, augmentation=Augmentation(padding=padding)
    )


# ---------------------------------------------------------------------------------------------- commands

DIGITS = ("--model", "repvgg_a0_cifar", "--dataset", "digits")


def run(capsys, *words):
    """Run a command in this process: exit code, stdout, stderr."""
    code = _exit_code(*words)
    return code, *capsys.readouterr()


def captured(*words):
    """The same where pytest's `capsys` is not at hand: in fixtures of a whole session."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = _exit_code(*words)
    return code, out.getvalue(), err.getvalue()


def _exit_code(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["repan", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            app.main()
    torch.use_deterministic_algorithms(False)  # run.deterministic is for the rest of a process, which ends here
    return left.value.code or 0


def one_line(capsys, *words):
    """The single line of an error that exits with 2."""
    code, out, err = run(capsys, *words)
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def repan(*words: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "repan_cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **env},
        timeout=300,
    )


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "repan_cli", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, **pipes, **options)


def wait_for(path, seconds=300):
    ends = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < ends, f"no {path}"
        time.sleep(0.02)


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return {name.split(".")[0] for name in result.stdout.split()}


# ---------------------------------------------------------------------------------------------- runs

TIMES = ("images_per_second",)


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def assert_same(folder, expected):
    """Every weight, the optimizer's memory, the average, every figure: no difference at all."""
    for name in sorted(path.name for path in expected.glob("*.pt") if path.name != "last_previous.pt"):
        ours, theirs = checkpoint.load(folder / name), checkpoint.load(expected / name)
        for kind in ("weights", "state"):
            mine, others = getattr(ours, kind), getattr(theirs, kind)
            assert mine.keys() == others.keys(), name
            assert all(torch.equal(mine[key], others[key]) for key in mine), name
        runs = [saved.card.run.progress if saved.card.run else {} for saved in (ours, theirs)]
        plain = [{key: value for key, value in progress.items() if key != "seconds"} for progress in runs]
        assert plain[0] == plain[1], name
    assert metrics(folder) == metrics(expected)
    found, wanted = (json.loads((run / "summary.json").read_text()) for run in (folder, expected))
    for summary in (found, wanted):
        for row in (summary, summary["fused"], *summary["cycles"], summary["baseline"] or {}):
            for key in ("seconds", "out"):
                row.pop(key, None)
    assert found == wanted


class StopAt:
    """Sends this process a signal when a run has made so many updates, or another event comes for the nth time."""

    def __init__(self, patch, count, *, kind=StepEnd, number=signal.SIGTERM):
        self.left, self.kind, self.number = count, kind, number
        take = Record.take

        def watched(record, event):
            take(record, event)
            if isinstance(event, self.kind):
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), self.number)

        patch.setattr(Record, "take", watched)


def page_of(capsys, runs):
    code, _, err = run(capsys, "compare", runs, "--html", runs / "page.html")
    assert code == 0, err
    assert f"wrote {runs / 'page.html'}" in err
    return (runs / "page.html").read_text()


def as_older_version(folder):
    """Give the settings in the files below a folder the names that older versions wrote."""
    old = {entry.key: name for name, entry in RENAMED.items()}

    def named(settings):
        return {old.get(key, key): value for key, value in settings.items()}

    for path in folder.rglob("*.yaml"):
        path.write_text(yaml.safe_dump(named(config.read_file(path))))
    for path in folder.rglob("*.pt"):
        saved = checkpoint.load(path)
        card = dataclasses.replace(saved.card, config=named(saved.card.config))
        checkpoint.save(dataclasses.replace(saved, card=card), path)
    return folder


# ---------------------------------------------------------------------------------------------- training by itself


def part(images: ArrayImages, count: int) -> ArrayImages:
    return ArrayImages(images.images[:count], images.labels[:count])


def training(digits, plan, *, model=None, val=True, runtime=FP32, settings=None, batch_size=64, lr=0.05, **options):
    model = model or small_net(in_chans=1)
    look = {"mean": digits.mean, "std": digits.std, "device": CPU}
    return Training(
        model=model.to(memory_format=torch.channels_last),
        task_of=lambda phase: Classification(phase.optim.label_smoothing),
        optimizer=optim.build_optimizer(model, settings or config.OptimConfig(lr=lr)),
        plan=plan,
        train=InMemoryLoader(part(digits.train, 192), augmentation=Augmentation(padding=1), **look),
        val=InMemoryLoader(digits.val, **look) if val else None,
        test=InMemoryLoader(part(digits.test, 100), **look),
        runtime=runtime,
        batch_size=batch_size,
        **options,
    )


def plan(*, baseline=True, **settings):
    given = {"epochs": "2", "baseline.epochs": "2", "cycle.count": "1", "cycle.attach_epochs": "1", "optim.lr": "0.05"}
    given |= {"cycle.schedule": "restart", "cycle.attach": "ramp"}
    return cycle_plan(config.build(given, {k.replace("__", "."): v for k, v in settings.items()}), baseline=baseline)


BASE = {"model.name": "repvgg_a1_cifar", "block.name": "repvgg", "data.name": "cifar100", "epochs": "2"}


def write_run(
    folder, seed=0, test=70.0, *, last=None, val=(50.0, 60.0, 70.0, 69.0), classes=100, dataset=None, **given
):
    """A finished run of a baseline of 2 epochs and a cycle of 2, with these figures."""
    settings = {**BASE, **{key.replace("__", "."): text for key, text in given.items()}, "run.seed": str(seed)}
    if dataset:
        settings["data.name"] = dataset
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(config.build(settings)))
    records = [{"cycle": n // 2, "epoch": n % 2 + 1, "val_top1": value} for n, value in enumerate(val)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {
        "command": "cycle",
        "dataset": settings["data.name"],
        "classes": classes,
        "images": {"train": 45000},
        "baseline": {"top1": val[1], "test_top1": 55.0, "seconds": 60.0},
        "cycles": [{"cycle": 1, "top1": val[3], "test_top1": test - 1 if last is None else last, "seconds": 60.0}],
        "test": {"top1": test, "top5": 90.0},
        "seconds": 7200.0,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "status.json").write_text(json.dumps({"state": "done"}))
    return folder
