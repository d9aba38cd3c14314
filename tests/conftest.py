"""What tests share: networks with randomised BN, the digits, and one real run of `repan cycle`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one a core

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn

import repan_cli.models  # noqa: F401 (registers the networks)
from repan_cli.checkpoint import ModelCard
from repan_cli.data import datasets
from repan_cli.data.batches import Augmentation
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.types import Dataset
from repan_cli.display.console import show_notices
from repan_cli.models import BUILT_OF_BLOCKS, Expansion, form_of

show_notices()  # tests read warnings where a user does

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


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
                    module.bias.copy_(torch.randn(shape, generator=draw))
                    module.weight[0] = 0
    return model


def small_net(block: str = "repvgg", *, seed: int = 0, **kwargs: object) -> nn.Module:
    """repvgg_a0_cifar for 10 classes with randomised BN, in eval mode."""
    torch.manual_seed(seed)
    model = timm.create_model("repvgg_a0_cifar", num_classes=10, block=block, **kwargs)
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


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return datasets.load("digits", "data")


@pytest.fixture(scope="session")
def digit_images(digits: Dataset) -> InMemoryLoader:
    return InMemoryLoader(
        digits.train, mean=digits.mean, std=digits.std, device=CPU, augmentation=Augmentation(padding=1)
    )


class Run(NamedTuple):
    folder: Path
    summary: dict
    stderr: str


@pytest.fixture(scope="session")
def cycle_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short real run of `repan cycle` on the digits."""
    folder = tmp_path_factory.mktemp("cycle") / "run"
    words = "cycle --model repvgg_a0_cifar --dataset digits --baseline-epochs 8 --cycles 2 --epochs 2 --json --out"
    settings = "cycle.lr=restart --baseline-lr 0.1 --lr 0.05 cycle.attach=ramp cycle.attach_epochs=1 run.precision=fp32"
    result = repan(*words.split(), folder, *settings.split())
    assert result.returncode == 0, result.stderr
    return Run(folder, json.loads(result.stdout), result.stderr)
