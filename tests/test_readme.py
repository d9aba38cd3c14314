"""Every command and Python block in the README and in docs works, and their statements about the project hold."""

import json
import re
import shlex
import shutil

import pytest
import timm
import torch
from PIL import Image
from shared_fixtures import FEW, narrow_timm
from support import ROOT, captured, run

from repan_cli import config
from repan_cli.blocks import FAMILIES
from repan_cli.config.grid import read_grid
from repan_cli.models import repvgg_cifar
from repan_cli.system.packages import missing

pytestmark = pytest.mark.usefixtures("few_blocks", "small_timm")

README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES, re.M | re.S)


def commands() -> list[str]:
    """The lines that call repan, each once, continued lines joined, behind the two that set everything up."""
    text = "\n".join(blocks("bash")[2:]).replace("\\\n", " ")
    lines = [line.partition("  #")[0].strip() for line in text.splitlines() if line.startswith("repan ")]
    return list(dict.fromkeys(lines))


OPTIONAL = ("lightning", "optuna", "transformers")
"""Packages of which a page shows the use, and that need not be there."""

GENERATED = ("reference/commands.md", "reference/settings.md", "reference/presets.md")
"""Pages that docs/generate_reference.py writes."""

NET = """from torch import nn


def build(num_classes, in_chans):
    conv, norm = nn.Conv2d(in_chans, 8, 3, bias=False), nn.BatchNorm2d(8)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
"""


def own_block(folder):
    """The block of the manual in its file, and runs with it, of which one is stopped."""
    piece = next(piece for piece in blocks("python") if "def build(geometry" in piece)
    (folder / "my_block.py").write_text(piece)
    words = "--model repvgg_a0_cifar --dataset digits --baseline-epochs 1 --epochs 1 --cycles 1 cycle.schedule=restart"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(repvgg_cifar, "DEPTHS_A", FEW)
        code, *texts = captured("cycle", *words.split(), "--block", "my_block.py:build", "--out", "runs/own_block")
    assert code == 0, texts
    stop(folder / "runs" / "own_block", folder / "runs" / "twin")


def stop(finished, stopped):
    """Copy a run as it was before its last epoch."""
    shutil.copytree(finished, stopped)
    shutil.copy(stopped / "last_previous.pt", stopped / "last.pt")
    (stopped / "summary.json").unlink()
    status = json.loads((stopped / "status.json").read_text())
    (stopped / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))


@pytest.fixture(scope="module")
def workplace(small_run, tmp_path_factory):
    """A folder where the README's run has been made."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(small_run.folder, folder / "runs" / "demo")
    shutil.copy(small_run.folder / "best.pt", folder / "checkpoint.pt")
    for name in ("plain", "photos"):
        shutil.copytree(small_run.folder, folder / "runs" / name)
    (folder / "images").mkdir()
    Image.new("L", (8, 8), 200).save(folder / "images" / "one.png")
    (folder / "net.py").write_text(NET)
    own_block(folder)
    with pytest.MonkeyPatch.context() as patch:
        narrow_timm(patch)
        torch.save(timm.create_model("repvgg_a0", num_classes=3).state_dict(), folder / "theirs.pth")
    for stopped in (folder / "runs" / "stopped", folder / "runs" / "cycle" / "stopped"):
        stop(small_run.folder, stopped)
    shutil.copytree(small_run.folder, folder / "runs" / "study" / "seed_0")
    shutil.copy(small_run.folder / "config.yaml", folder / "runs" / "study")
    shutil.copytree(ROOT / "docs" / "results", folder / "docs" / "results")
    series = {"command": "cycle", "seeds": [0], "control": False, "settings": "recipes/digits"}
    (folder / "runs" / "study" / "series.json").write_text(json.dumps(series))
    return folder


def test_the_first_screen_has_the_two_commands():
    first, second = blocks("bash")[:2]
    assert "repan cycle --model repvgg --dataset digits" in first
    assert "pytest" in second
    for block in (first, second):
        assert "python3 -m venv" in block
        assert "pip install" in block
    assert README.index(second) < 3000


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_commands_work(capsys, workplace, monkeypatch, command):
    monkeypatch.chdir(workplace)
    words = shlex.split(command)[1:]
    if words[0] in ("train", "distill", "cycle") and not {"--dry-run", "--resume"} & set(words):
        words.append("--print-config")
    if words[0] == "study":
        words.append("--dry-run")
    if words[0] == "benchmark":
        words += ["--seconds", "0", "-b", "1", "--training-batch", "4"]
    code, _, err = run(capsys, *words)
    assert code == 0, err


def test_the_readme_is_short():
    assert len(README.split()) < 900


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            made = target in GENERATED
            assert made or "://" in target or (page.parent / target).exists(), (page, target)


def test_settings_that_the_pages_name_exist():
    code = [*re.findall(r"`([^`\n]+)`", PAGES), *blocks("bash")]
    sections = "|".join({key.partition(".")[0] for key in config.SCHEMA if "." in key} - {"model"})
    keys = rf"(?<![\w./-])(?:baseline\.)?(?:{sections})\.[a-z_]+"
    named = {key for text in code for key in re.findall(keys, text)} - {"run.pth"}
    assert len(named) > 50
    assert named - {*config.SCHEMA, *config.OVERLAY} == {"cycle.lr"}  # the old name of cycle.schedule


def test_files_that_the_architecture_page_names_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = [f"/{path.as_posix()}" for part in ("repan_cli", "tests") for path in (ROOT / part).rglob("*.py")]
    for name in {*re.findall(r"`([\w/]+\.py)`", page)} - {"commands/NAME.py"}:
        assert any(file.endswith(f"/{name}") for file in files), name
    for word, name in re.findall(r"`([A-Z_]+)` in `([\w/]+\.py)`", page):
        assert re.search(rf"^{word}\b", (ROOT / "repan_cli" / name).read_text(), re.M), (word, name)


def test_presets_it_names_exist():
    named = set(re.findall(r"\b((?:reference|recipes)/\w+\b)(?!\.md)", PAGES))
    assert len(named) > 5
    assert named <= set(config.presets())
    blocks, commands = ("repvgg", "acb", "dbb"), ("train", "distill", "cycle")
    offered = {f"reference/{b}_{d}_{c}" for b in blocks for d in ("cifar10", "cifar100", "imagenet") for c in commands}
    assert offered - set(config.presets()) == {"reference/repvgg_cifar10_distill", "reference/acb_imagenet_cycle"}


@pytest.mark.slow
def test_python_works(capsys, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    assert run(capsys, "fuse", "runs/demo/best.pt", "-o", "plain.onnx", "--overwrite")[0] == 0
    monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))  # a page adds a family
    pieces = blocks("python")
    assert pieces
    for piece in pieces:
        if not missing(
            *(package for package in OPTIONAL if f"import {package}" in piece or f"from {package}" in piece)
        ):
            exec(compile(piece, "README", "exec"), {"__name__": "__main__"})


def test_the_changelog_has_this_version():
    import repan_cli

    assert f"## [{repan_cli.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_grids_are_read(tmp_path):
    grids = [block for block in blocks("yaml") if "\narms:" in block]
    assert grids
    for number, text in enumerate(grids):
        (tmp_path / f"{number}.yaml").write_text(text)
        for arm in read_grid(tmp_path / f"{number}.yaml").arms.values():
            arm.resolve({})
