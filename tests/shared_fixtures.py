"""Fixtures that test files share: the digits, and one real run of `repan cycle`, made once for all workers."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

gc.disable()  # until everything is imported

import pytest
import typer
from filelock import FileLock
from support import CPU, captured
from timm.models import byobnet, fastvit, repvit
from torch import nn

from repan_cli.blocks import FAMILIES
from repan_cli.commands import quantize
from repan_cli.data import datasets
from repan_cli.data.batches import Augmentation
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.types import Dataset
from repan_cli.display import plots
from repan_cli.display.console import show_notices
from repan_cli.models import repvgg_cifar
from repan_cli.system import timing
from repan_cli.system.packages import missing

FEW = (1, 1, 1, 1, 1)
"""Blocks a stage."""

DRAW_CURVES = plots.draw_curves

MadeOnce = Callable[[str, Callable[[Path], None]], Path]

show_notices()  # tests read warnings where a user does


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays to the end, half a million objects, and let it run less often: by default
    it takes a tenth of the time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Fill a folder by a function, once for all workers of pytest-xdist; who comes later finds it filled.

    Tests that change anything in such a folder take a copy of it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, make: Callable[[Path], None]) -> Path:
        folder, complete = shared / f"shared_{name}", shared / f"shared_{name}.complete"
        with FileLock(shared / f"shared_{name}.lock"):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                complete.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session", autouse=True)
def _no_curves() -> Iterator[None]:
    """Leave curves.png undrawn by commands in this process: Matplotlib takes as long as a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw_curves", lambda records, target, **options: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _commands_once() -> Iterator[None]:
    """Let Typer build the commands once and not for every call of `main` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_call_a_window() -> Iterator[None]:
    """Time as little as possible in `benchmark` and `quantize`: no test depends on how long anything takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "WINDOW", 0.0)
        patch.setattr(quantize, "SECONDS", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """Leave files in the memory of the system, where tests that end processes find them too; no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _operators_once() -> Iterator[None]:
    """Let PyTorch read its tables of operators once and not for every file, of whose time it is half."""
    if missing("onnx", "onnxscript"):
        yield
        return
    from torch._export import utils
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_materialize_cpp_cia_ops", cache(utils._materialize_cpp_cia_ops))
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="module", autouse=True)
def _families() -> Iterator[None]:
    """Forget the block families that the tests of a file register: the next file may run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))
        yield


@pytest.fixture
def few_blocks() -> Iterator[None]:
    """Build RepVGG-A networks with 5 blocks in place of 22, where a test is not about the network.

    Files of these cannot be read without it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repvgg_cifar, "DEPTHS_A", FEW)
        yield


@pytest.fixture
def small_timm() -> Iterator[None]:
    """Build timm's RepVGG-A0, MobileOne-S0, FastViT and RepViT with few and narrow blocks of the same kinds.

    For tests that are about names and kinds of layers. Files of these cannot be read without it.
    """
    with pytest.MonkeyPatch.context() as patch:
        narrow_timm(patch)
        yield


def narrow_timm(patch: pytest.MonkeyPatch) -> None:
    """Make timm's networks small as `small_timm` has them."""
    few = {
        "repvgg_a0": byobnet._rep_vgg_bcfg(d=(2, 1, 2, 1), wf=(0.25,) * 4),
        "mobileone_s0": byobnet._mobileone_bcfg(d=(1, 2, 1, 1), wf=(0.25,) * 4, num_conv_branches=4),
    }
    for name, blocks in few.items():
        narrow = dataclasses.replace(byobnet.model_cfgs[name], blocks=blocks, stem_chs=16)
        patch.setitem(byobnet.model_cfgs, name, narrow)
    widths = (16, 32, 32, 64)
    vit = partial(_made_with, fastvit._create_fastvit, {"layers": (1, 1, 2, 1), "embed_dims": widths})
    patch.setattr(fastvit, "_create_fastvit", vit)
    patch.setattr(
        repvit,
        "_create_repvit",
        partial(_made_with, repvit._create_repvit, {"depth": (1, 1, 2, 1), "embed_dim": widths}),
    )


def _made_with(make: Callable[..., nn.Module], settings: dict, *words: object, **others: object) -> nn.Module:
    return make(*words, **{**others, **settings})


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
def small_run(made_once: MadeOnce) -> Run:
    """A real run of `repan cycle` of the network of `few_blocks`, which tests that read it ask for, too."""
    words = "cycle --model repvgg_a0_cifar --dataset digits --baseline-epochs 4 --cycles 2 --epochs 2 --json --out"
    settings = "cycle.schedule=restart data.batch_size=128 run.precision=fp32"

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repvgg_cifar, "DEPTHS_A", FEW)
            patch.setattr(plots, "draw_curves", DRAW_CURVES)
            code, *texts = captured(*words.split(), folder / "run", *settings.split())
        assert code == 0, texts
        for name, text in zip(("stdout", "stderr"), texts, strict=True):
            (folder / name).write_text(text)

    return _finished(made_once("small", make))


def _finished(folder: Path) -> Run:
    """A run whose directory and whose words lie in a folder."""
    texts = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return Run(folder / "run", json.loads(texts[0]), texts[1])
