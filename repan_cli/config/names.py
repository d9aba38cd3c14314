"""Know names before PyTorch is loaded: read them from tables, and from the sources that register them.

A wrong name is thus reported at once, and a name is completed without a delay. Names that a program itself registers
are known only to the registries, so a name is refused here only if no source can have it.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.text import count, short
from repan_cli.system.user_code import names_a_file
from repan_cli.system.weight_files import with_an_ending

PACKAGE = Path(__file__).parents[1]

TIMM, TORCHVISION = "timm:", "torchvision:"
ALIASES = {"repvgg": "repvgg_a1", "mobilenetv1": "mobilenetv1_100"}

SMALL = {"mobilenetv1_100": "mobilenetv1"}
"""Names whose network for small images has another name."""


REPOSITORY = re.compile(
    r"(?:timm:)?hf[-_]hub:(?!timm/)(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?P<key>::.+)?"
)
"""The name of a Hub repository that is not timm's, as `hf-hub:ORG/NAME` or `hf-hub:ORG/NAME@REVISION`."""


def names_a_repository(source: str) -> bool:
    """Return whether a source is a name on the Hub that is not one of timm's own networks there."""
    return REPOSITORY.fullmatch(source) is not None


# ---------------------------------------------------------------------------------------------- networks


class Support(NamedTuple):
    """Counts that show how far a network can be expanded, and its size.

    They are the numbers of multi-branch blocks of its own, of convolutions that become blocks by default, of
    convolutions that a BN reads, and of parameters.
    """

    own: int
    convs: int
    pairs: int
    parameters: int

    @property
    def cycles(self) -> bool:
        return bool(self.own or self.convs)

    @property
    def fuses(self) -> bool:
        return bool(self.own or self.convs or self.pairs)

    def describe(self) -> str:
        return f"{short(self.parameters)} parameters; {self._use()}"

    def _use(self) -> str:
        if self.own:
            return f"has {count(self.own, 'multi-branch block')}"
        if self.convs:
            return "1 convolution becomes a block" if self.convs == 1 else f"{self.convs} convolutions become blocks"
        return f"no blocks; fuse folds {self.pairs} BN" if self.fuses else "no blocks, nothing to merge"


@cache
def catalog() -> dict[str, Support]:
    """Return the networks that were examined when this version was made."""
    with (PACKAGE / "models" / "catalog.csv").open(encoding="utf-8", newline="") as file:
        return {row[0]: Support(*map(int, row[1:])) for row in csv.reader(file)}


@cache
def builtin() -> dict[str, str]:
    """Return the networks of this package with their descriptions."""
    files = ("repvgg_cifar", "resnet_cifar", "mobilenet_cifar")
    return {
        each.name: ast.get_docstring(each) or ""
        for name in files
        for each in ast.parse((PACKAGE / "models" / f"{name}.py").read_text(encoding="utf-8")).body
        if isinstance(each, ast.FunctionDef) and "register_model" in map(_called, each.decorator_list)
    }


@cache
def of_timm() -> tuple[str, ...]:
    """Return the names of the networks of the timm that is installed, sorted."""
    folder = _package("timm", "models")
    found = [name for path in folder.glob("*.py") for name in _registered(path, TIMMS)] if folder else []
    return tuple(sorted(found))


@cache
def of_torchvision() -> tuple[str, ...]:
    """Return the names of the networks for images of the torchvision that is installed, sorted."""
    folder = _package("torchvision", "models")
    found = [name for path in folder.glob("*.py") for name in _registered(path, TORCHVISIONS)] if folder else []
    return tuple(sorted(found))


def foreign() -> list[str]:
    """Return the full names of all networks that are not repan's."""
    return [*(TIMM + name for name in of_timm()), *(TORCHVISION + name for name in of_torchvision())]


TIMMS = r"^@register_model\n(?:@.*\n)*def (\w+)"
TORCHVISIONS = r"^@register_model\(\)\n(?:@.*\n)*def (\w+)"


def unknown_model(name: str, choices: list[str]) -> InputError:
    hint = _in_a_file(name) or with_an_ending(name) or did_you_mean(name, choices) or "; repan list models shows all"
    return InputError(f"unknown model '{name}'{hint}")


def _in_a_file(name: str) -> str:
    """Return the end of an error message for `net:build` or `net.build`, if there is a file net.py."""
    module, _, function = name.replace(":", ".").rpartition(".")
    file = Path(*module.split(".")).with_suffix(".py") if module else None
    return f"; did you mean {file}:{function}?" if file and file.is_file() else ""


def check_model(name: str) -> None:
    """Raise InputError for a network that no package has, and for a user's own network whose file is missing."""
    if names_a_file(name):
        path = Path(name.rpartition(":")[0]).expanduser()
        if not path.is_file():
            raise InputError(f"no file {path} to load a network from")
        return
    if name.startswith(TORCHVISION):
        known = [TORCHVISION + each for each in of_torchvision()]
        if known and name not in known:
            raise unknown_model(name, known)
        return
    plain = re.sub(rf"^(?:{TIMM})?hf[-_]hub:timm/", TIMM, name)
    plain = plain if plain.removeprefix(TIMM).startswith(("hf-hub:", "hf_hub:")) else plain.partition(".")[0]
    theirs = of_timm()
    if not theirs or plain.removeprefix(TIMM) in theirs or plain.startswith((TIMM + "hf", "hf-hub:", "hf_hub:")):
        return
    if name.startswith(TIMM):
        raise unknown_model(name, [TIMM + each for each in theirs])
    full = ALIASES.get(name, name)
    if full not in builtin() and f"{SMALL.get(full, full)}_cifar" not in builtin():
        raise unknown_model(name, list(dict.fromkeys([*ALIASES, *builtin(), *theirs])))


# ---------------------------------------------------------------------------------------------- other names


@cache
def blocks() -> dict[str, str]:
    """Return the block families of this package with their descriptions."""
    tree = ast.parse((PACKAGE / "blocks" / "families.py").read_text(encoding="utf-8"))
    return {
        call.args[0].value: " ".join((ast.get_docstring(each) or "").split())
        for each in tree.body
        if isinstance(each, ast.FunctionDef)
        for call in each.decorator_list
        if isinstance(call, ast.Call)
        and _called(call) == "family"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


UNUSABLE = ("adahessian", "kron", "kronc", "kronw")
"""timm's optimizers that need second derivatives, or whose state no checkpoint holds."""


@cache
def optimizers() -> dict[str, str]:
    """Return the usable optimizers of the installed timm with their descriptions."""
    folder = _package("timm", "optim")
    source = folder / "_optim_factory.py" if folder else None
    if source is None or not source.is_file():
        return {}
    found: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for call in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and _called(call) == "OptimInfo":
            words = {word.arg: word.value for word in call.keywords}
            first = call.args[0] if call.args else words.get("name")
            found[_text_of(first)] = _text_of(words.get("description"))
        elif isinstance(call, ast.Call) and _called(call) == "register_alias" and len(call.args) > 1:
            aliases[_text_of(call.args[0])] = _text_of(call.args[1])
    found |= {alias: found[name] for alias, name in aliases.items() if name in found}
    return dict(sorted((name, text) for name, text in found.items() if name and name not in UNUSABLE))


def _text_of(node: ast.expr | None) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


def unknown_optimizer(name: str, known: list[str]) -> InputError:
    return InputError(f"unknown optimizer '{name}'{did_you_mean(name, known) or '; see repan list optimizers'}")


def _called(node: ast.expr) -> str:
    """Return the name of a decorator, or of the function that it calls."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _package(name: str, *parts: str) -> Path | None:
    """Return a folder of an installed package, without importing it."""
    found = importlib.util.find_spec(name)
    return Path(found.origin).parent.joinpath(*parts) if found and found.origin else None


def _registered(path: Path, pattern: str) -> Iterator[str]:
    yield from re.findall(pattern, path.read_text(encoding="utf-8"), re.M)
