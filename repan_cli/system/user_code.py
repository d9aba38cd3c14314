"""Load functions from a user's Python file, named `file.py:function`. A name in a checkpoint is never imported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from repan_cli.errors import InputError
from repan_cli.registry import did_you_mean
from repan_cli.system.text import first_line, quoted


def names_a_file(name: str | None) -> bool:
    """Return whether a name means a function in a file: `net.py:build`."""
    path, colon, _ = (name or "").rpartition(":")
    return bool(colon) and path.endswith(".py")


OPTIONS = {
    "model.name": "--model ",
    "block.name": "--block ",
    "teacher.model": "teacher.model=",
    "baseline.teacher.model": "baseline.teacher.model=",
}
"""The settings that may name a user's own code, in the form in which they are given again on a resume."""


def own_code(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that name a user's own code, from typed values by dotted key."""
    return {key: settings[key] for key in OPTIONS if names_a_file(settings.get(key))}


def own_code_options(settings: Mapping[str, Any]) -> str:
    """Return the command-line arguments that name a user's own code again, each after a space."""
    return "".join(f" {OPTIONS[key]}{quoted(name)}" for key, name in own_code(settings).items())


def function_of(name: str, *, what: str) -> Callable[..., Any]:
    """Return the function (or class) that `file.py:function` names; its file is run.

    `what` says in errors what the function makes. Raises InputError, in one line, if the file cannot be imported or has
    no such function.
    """
    path, _, function = name.rpartition(":")
    module = _imported(Path(path).expanduser(), what)
    found = getattr(module, function, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{path} has no function '{function}'{did_you_mean(function, own)}")
    return found


class _FromSource(importlib.machinery.SourceFileLoader):
    """Compiles a file each time. Python's cache would be written beside it, and misses an edit within a second."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _imported(path: Path, what: str) -> ModuleType:
    if not path.is_file():
        raise InputError(f"no file {path} to load {what} from")
    name = f"repan_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_FromSource(name, str(path)))
    assert spec is not None and spec.loader is not None, "every name that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look it up
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))  # so that the file can import its neighbors
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"cannot import {path}: {described(error, str(path))}") from error
    return module


def described(error: BaseException, path: str) -> str:
    """Describe an error in one line, with the last line of the user's file that it passed through."""
    line, trace = None, error.__traceback__
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == Path(path).resolve():
            line = trace.tb_lineno
        trace = trace.tb_next
    what = f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
    return what + (f" (line {line})" if line else "")
