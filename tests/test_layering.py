"""The structure that the code keeps: imports point down, start-up is light, functions are short, settings are read."""

import ast
import re

import pytest
from support import ROOT, loaded_after

from repan_cli import config

PACKAGE = ROOT / "repan_cli"
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}

ROWS = [
    ["errors"],
    ["registry"],
    ["system"],
    ["config"],
    ["blocks"],
    ["anneal", "checkpoint"],
    ["data", "models", "runs"],
    ["training", "export", "compare"],
    ["display"],
    ["session", "integrations"],
    ["commands"],
    ["cli"],
    ["door"],
]
"""From the bottom up. A room may import rooms of the rows below it, never of its own row."""

LIGHT = {"cli", "config", "registry", "errors", "runs", "display", "compare"}
"""Rooms that never import torch."""

LIGHT_FILES = {
    *(f"repan_cli.system.{name}" for name in ("files", "host", "launcher", "notices", "packages", "signals", "text")),
    *(f"repan_cli.{name}" for name in ("commands.early", "session.sources", "session.hub_folder")),
    *("repan_cli.system.lean", "repan_cli.system.weight_files", "repan_cli.training.schedules"),
    "repan_cli.system.sampling",
    "repan_cli.system.user_code",
    "repan_cli.training.events",
}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def imports(module: str) -> set[str]:
    """Every module that a file names in an import, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def height(name: str) -> int:
    return next(level for level, row in enumerate(ROWS) if name in row)


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) not in ("", "__init__", "__main__")])
def test_imports_point_down(module):
    for imported in imports(module):
        if imported.startswith("repan_cli.") and room(imported) not in ("__version__", "__init__"):
            same = room(imported) == room(module)
            assert same or height(room(imported)) < height(room(module)), f"{module} imports {imported}"


def test_the_method_can_be_read_by_itself():
    for module in MODULES:
        if room(module) in ("blocks", "anneal"):
            used = {room(name) for name in imports(module) if name.startswith("repan_cli.")}
            assert used <= {"anneal", "blocks", "system", "registry", "errors"}, module


def test_files_stay_short():
    for module, path in MODULES.items():
        assert len(path.read_text().splitlines()) < 400, module


@pytest.mark.parametrize("silent", ["data", "training", "runs", "models", "checkpoint", "anneal", "blocks", "system"])
def test_rooms_below_the_display_print_nothing(silent):
    for module, path in MODULES.items():
        if room(module) == silent:
            assert not any(name.split(".")[0] == "rich" for name in imports(module)), module
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not [call for call in calls if getattr(call.func, "id", "") == "print"], module


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) in LIGHT or name in LIGHT_FILES])
def test_light_rooms_do_without_torch(module):
    heavy = {name.split(".")[0] for name in imports(module)} & {"torch", "torchvision", "timm", "numpy"}
    assert not heavy


@pytest.mark.parametrize(
    "statement",
    [
        "import repan_cli",
        "import repan_cli.cli.app",
        "import repan_cli.commands.compare",
        "from repan_cli.commands import version; version._gpus = lambda: (); list(version.rows())",
        "from repan_cli import config; config.resolve('cycle', None, {'data.name': 'digits', 'model.name': 'repvgg'})",
    ],
)
def test_start_up_is_light(statement):
    assert not loaded_after(statement) & {"torch", "torchvision", "timm", "numpy", "matplotlib", "sklearn"}


def test_the_python_door_opens():
    import repan_cli

    assert set(repan_cli.__all__) == {"__version__", *repan_cli._DOORS}
    for name in repan_cli.__all__:
        assert getattr(repan_cli, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        repan_cli.nonsense  # noqa: B018


def test_functions_stay_short():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{module}.{node.name}"


def test_every_setting_is_read_somewhere():
    """A field that nothing reads is a promise that is not kept."""
    code = "\n".join(path.read_text() for name, path in MODULES.items() if room(name) != "config")
    code += "\n".join(re.findall(r"self\.\w+\.\w+", MODULES["repan_cli.config.settings"].read_text()))
    holders = {
        "cycle": "cycle|settings|restart",
        "data": "data|settings",
        "teacher": "teacher|settings",
        "optim": r"optim|source",
    }
    for key in config.SCHEMA:
        section, dot, name = key.rpartition(".")
        holder = holders.get(section, section) if dot else "config|phase"
        assert re.search(rf"\b({holder})\.{name}\b", code), key


def test_no_default_is_mutable_and_shared():
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
                assert not any(isinstance(d, (ast.List, ast.Dict, ast.Set)) for d in defaults), f"{module}.{node.name}"
