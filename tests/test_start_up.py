"""Start-up: mistakes are found without importing PyTorch, and a command imports only what it needs."""

import gc
import json
import subprocess
import sys

import pytest
import timm
import timm.optim
import torchvision
from support import ROOT

from repan_cli import models
from repan_cli.blocks import FAMILIES
from repan_cli.commands import early
from repan_cli.config import names
from repan_cli.data import digits
from repan_cli.system import packages
from repan_cli.system.lean import lean_imports

MISTAKES = [
    ("info gone.pt", "no file gone.pt"),
    ("info {root}/mkdocs.yml", "holds settings, not a network"),
    ("info /dev/null", "is not a regular file"),
    ("evaluate gone.pt", "no file gone.pt"),
    ("predict gone.pt gone.png", "no such image or folder: gone.png"),
    ("fuse gone.pt -f onx", "cannot write the format 'onx'; did you mean onnx?"),
    ("benchmark resnet5x", "unknown model 'resnet5x'; did you mean"),
    ("train --model repvgg_a1x --dataset digits", "unknown model 'repvgg_a1x'; did you mean"),
    ("train --model repvgg --dataset digit", "unknown data set 'digit'; did you mean digits?"),
    ("train --model repvgg --dataset folder --data-root gone", "no folder gone"),
    ("train --model repvgg --dataset digits --block acbb", "unknown block family 'acbb'; did you mean acb?"),
    ("train --model repvgg --dataset digits optim.name=adamx", "unknown optimizer 'adamx'; did you mean"),
    ("train --model repvgg --dataset digits optim.schedule=cosin", "unknown schedule 'cosin'; did you mean cosine?"),
    ("train --model repvgg --dataset digits --out {root}", "already exists; nothing was changed"),
    ("train --model repvgg --dataset digits --init gone.pt", "no checkpoint gone.pt"),
    ("train --model gone.py:net --dataset digits", "no file gone.py"),
    ("distill --model repvgg --dataset digits --teacher gone.pt", "no file gone.pt for the teacher"),
    ("train --model repvgg --dataset digits -c cifar", "no configuration file or preset 'cifar'"),
    ("cycle --resume gone", "no run directory gone"),
    ("cycle --resume finished", "finished is finished; begin another run from its weights with --init"),
    ("train --model repvgg --dataset cifar100 --data-root cifar100", "did you mean --data-root .?"),
]

IN_ONE_PROCESS = """
import contextlib, io, shlex, sys
from repan_cli.cli import app
for line in sys.stdin.read().splitlines():
    sys.argv = ["repan", *shlex.split(line)]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            app.main()
        except SystemExit as end:
            code = end.code
    print(code, "torch" in sys.modules, said.getvalue().splitlines()[-1], sep="|")
"""


def without_torch(lines, cwd):
    """Run commands one after the other in one process: exit code, whether torch came, and last line of each."""
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "200"},
        check=True,
    )
    return [line.split("|", 2) for line in done.stdout.splitlines()]


def test_mistakes_are_told_without_pytorch(tmp_path):
    (tmp_path / "cifar100" / "train").mkdir(parents=True)
    (tmp_path / "finished").mkdir()
    facts = {"status": {"state": "done"}, "env": {"command": "cycle"}, "summary": {"cycles": [{}]}}
    for name, content in facts.items():
        (tmp_path / "finished" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "finished" / "config.yaml").write_text("cycle: {count: 1}")
    found = without_torch([line.format(root=ROOT) for line, _ in MISTAKES], tmp_path)
    for (line, expected), (code, torch_came, said) in zip(MISTAKES, found, strict=True):
        assert (code, torch_came) == ("2", "False"), f"{line}: {said}"
        assert expected in said, line


def test_every_kind_of_name_is_listed_without_pytorch(tmp_path):
    kinds = ("models", "blocks", "datasets", "optimizers", "presets", "schedules", "settings", "studies", "trackers")
    for code, torch_came, _ in without_torch([f"list {kind}" for kind in (*kinds, "models 'timm:res*'")], tmp_path):
        assert (code, torch_came) == ("0", "False")


def test_names_from_sources_are_those_of_the_registries():
    assert set(names.of_timm()) == set(timm.list_models()) - set(models.BUILTIN)
    assert set(names.of_torchvision()) == set(torchvision.models.list_models(torchvision.models))
    assert {name: FAMILIES[name].text for name in names.blocks()} == names.blocks()
    assert tuple(names.builtin()) == models.BUILTIN
    assert set(names.optimizers()) == set(map(str, timm.optim.list_optimizers())) - set(names.UNUSABLE)
    described = {name: timm.optim.get_optimizer_info(name).description for name in names.optimizers()}
    assert described == names.optimizers()


@pytest.mark.parametrize(
    "name",
    [
        *("repvgg", "resnet110", "mobilenetv1", "repvgg_a1_cifar", "resnet18", "timm:resnet18", "torchvision:resnet18"),
        *("resnet18.a1_in1k", "timm:resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "hf_hub:someone/else"),
    ],
)
def test_no_name_that_resolves_is_refused_early(name):
    names.check_model(name)


@pytest.mark.parametrize("name", ["", "resnet", "timm:repvgg_a1_cifar", "torchvision:nothing", "cifar", "resnet_cifar"])
def test_names_that_do_not_resolve_are_refused_early(name):
    with pytest.raises(ValueError, match="unknown model"):
        names.check_model(name)


@pytest.mark.soak  # a process that imports PyTorch
def test_commands_start_without_the_compiler_and_without_loggers():
    code = (
        "import sys; from repan_cli.system.lean import lean_imports\n"
        "with lean_imports():\n"
        "    import repan_cli.commands.info, repan_cli.commands.evaluate, repan_cli.commands.predict\n"
        "print(*(name for name in ('torch._dynamo', 'wandb', 'triton', 'sympy') if name in sys.modules))\n"
        "import torch, timm, torch._dynamo.utils\n"
        "print(torch._dynamo.utils.is_compile_supported('cpu'), torch._dynamo.disable.__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    came, real = done.stdout.splitlines()
    assert not came
    assert real.endswith("torch._dynamo.decorators")


@pytest.mark.soak  # a process that imports PyTorch
def test_the_compiler_answers_while_its_import_is_deferred():
    code = (
        "import sys, torch; from repan_cli.system.lean import lean_imports\n"
        "with lean_imports():\n"
        "    import torch._dynamo as put_off\n"
        "    print(put_off.config.__name__, torch.compiler.disable(lambda: 7)())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["torch._dynamo.config", "7"]


def test_no_garbage_is_collected_while_modules_are_imported(monkeypatch):
    gc.unfreeze()
    with lean_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    monkeypatch.delitem(sys.modules, "torch")
    gc.unfreeze()
    try:
        with lean_imports():
            pass
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


def test_garbage_is_collected_again_after_an_import_that_fails():
    with pytest.raises(ImportError, match="gone"), lean_imports():
        raise ImportError("gone")
    assert gc.isenabled()


def test_digits_are_read_without_scikit_learn_being_imported():
    code = (
        "import sys, pathlib; from repan_cli.data import digits, types\n"
        "raw = digits.load(pathlib.Path('data'), types.ReadOptions())\n"
        "print(len(raw.parts['train'].labels), *(name for name in ('sklearn', 'scipy') if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["1438"]


@pytest.mark.soak  # scikit-learn takes a second
def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = digits.pixels_and_labels()
    assert (images == bunch.images).all()
    assert (labels == bunch.target).all()


def test_loaded_modules_stay_as_they_are():
    import torch._dynamo

    with lean_imports():
        assert sys.modules["torch._dynamo"] is torch._dynamo
    assert sys.modules.get("wandb", "none") is not None


def test_every_command_that_opens_a_network_is_checked_early():
    assert early.CHECKS.keys() >= {"info", "evaluate", "predict", "benchmark", "fuse", "quantize", "train", "series"}


def test_hints_name_the_interpreter_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.sys, "executable", str(tmp_path / "my env" / "bin" / "python"))
    assert packages.how_to_install("onnx", "sklearn").endswith("/my env/bin/python' -m pip install onnx scikit-learn")
    monkeypatch.chdir(tmp_path)
    assert packages.how_to_install("onnx") == "'my env/bin/python' -m pip install onnx"
    monkeypatch.setattr(packages.shutil, "which", lambda name: packages.sys.executable)
    assert packages.how_to_install("onnx") == "python -m pip install onnx"
