"""Offer the training commands as functions: `repan_cli.train`, `distill` and `cycle` do what the commands do."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from repan_cli.cli import training
from repan_cli.commands import early
from repan_cli.commands.declaration import Option, declared
from repan_cli.commands.options import CycleOptions, TrainOptions
from repan_cli.config.resolve import OTHER_WORDS, SECTIONS
from repan_cli.config.schema import as_text
from repan_cli.config.settings import SCHEMA
from repan_cli.errors import InputError, InterruptedRunError
from repan_cli.registry import did_you_mean
from repan_cli.runs.trackers import read_metrics
from repan_cli.system.notices import LOGGER
from repan_cli.system.python_words import told_in_python
from repan_cli.training.events import Epoch, Event
from repan_cli.training.listeners import listening

FOR_PROCESSES = ("print_config", "dry_run", "as_json")
"""Options that print, and therefore exist only on the command line."""

RENAMED = {"config": "config_file"}
"""Options that have another name in Python."""


@dataclass(frozen=True, repr=False)
class Summary:
    """The results of a run. With `seeds` or `control` there are several runs, in `runs`.

    Attributes:
        path: the run directory, or the folder that holds the directories of several runs.
        figures: the content of summary.json, or of comparison.json for several runs; `figures["chosen"]` names the
            file, cycle and epoch that validation chose. Under torchrun only the first process has them.
        runs: the results of each of several runs; empty for one.
    """

    path: Path
    figures: Mapping[str, Any]
    runs: tuple[Summary, ...] = ()

    def __repr__(self) -> str:
        """Show where the results are, and the figures that there are."""
        if not self.figures:
            return f"Summary({str(self.path)!r})"
        val = "" if self.val_top1 is None else f", val_top1={self.val_top1:.2f}"
        runs = f", runs={len(self.runs)}" if self.runs else ""
        return f"Summary({str(self.path)!r}{val}, test_top1={self.test_top1:.2f}{runs})"

    @property
    def test_top1(self) -> float:
        """Return the test top-1, in percent, of the network that validation chose; for several runs, their mean."""
        found = [float(run.figures["test"]["top1"]) for run in self.runs or (self,)]
        return sum(found) / len(found)

    @property
    def val_top1(self) -> float | None:
        """Return the best validation top-1, in percent, or None if nothing was held out; for several runs,
        their mean.
        """
        found = [_best(run.path) for run in self.runs or (self,)]
        return None if None in found else sum(value for value in found if value is not None) / len(found)

    @property
    def best(self) -> Path:
        """Return the multi-branch checkpoint that validation chose."""
        return self.path / str(self.figures["chosen"]["file"])

    @property
    def fused(self) -> Path | None:
        """Return the merged network's file; None if there was nothing to merge."""
        return self.path / str(self.figures["fused"]["out"]) if "fused" in self.figures else None


def _best(path: Path) -> float | None:
    scores = [record["val_top1"] for record in read_metrics(path / "metrics.jsonl")]
    return max((score for score in scores if score is not None), default=None)


OnEpoch = Callable[[Epoch], None]


def train(
    model: str | None = None, dataset: str | None = None, *, on_epoch: OnEpoch | None = None, **settings: Any
) -> Summary:
    """Train a network without restarts, as `repan train` does, and return its results.

    Args:
        model: the name of the network, as on the command line; `file.py:function` for your own.
        dataset: the name of the data set.
        on_epoch: a function that receives the figures of each epoch, a `training.events.Epoch`. An exception in it ends
            the run.
        settings: options of the command by name, such as `epochs`, `lr`, `batch_size`, `seed`, `out`, `resume`,
            `seeds=[0, 1]` or `config="recipes/cifar"`. Settings can be given by key, `**{"optim.lr": 0.1}`, as a
            section, `optim={"lr": 0.1}`, or with underscores, `optim__lr=0.1`.

    Raises InputError for arguments that cannot be used, and DivergedError if the loss is not finite. An interrupt
    raises KeyboardInterrupt after everything is saved; its message has the call that resumes the run.
    """
    return _run("train", TrainOptions, on_epoch, {"model": model, "dataset": dataset, **settings})


def distill(
    model: str | None = None, dataset: str | None = None, *, on_epoch: OnEpoch | None = None, **settings: Any
) -> Summary:
    """Train a network with a teacher, as `repan distill` does. Give `teacher`; everything else is as for `train`."""
    return _run("distill", TrainOptions, on_epoch, {"model": model, "dataset": dataset, **settings})


def cycle(
    model: str | None = None, dataset: str | None = None, *, on_epoch: OnEpoch | None = None, **settings: Any
) -> Summary:
    """Train with RepAn, a baseline and annealing cycles, as `repan cycle` does.

    Everything else is as for `train`, with the options of that command: `baseline_epochs`, `cycles`, `control=True` and
    more.
    """
    return _run("cycle", CycleOptions, on_epoch, {"model": model, "dataset": dataset, **settings})


def _run(
    command: str, options: type[TrainOptions | CycleOptions], on_epoch: OnEpoch | None, given: Mapping[str, Any]
) -> Summary:
    made: list[Path | None] = []

    def call(module: str, *arguments: Any, entry: str = "run", **chosen: Any) -> None:
        console = importlib.import_module("repan_cli.display.console")
        console.show_notices()
        early.check(module, *arguments)
        found = importlib.import_module(f"repan_cli.commands.{module}")
        with console.showing_activity():
            made.append(getattr(found, entry)(*arguments, **chosen))

    with told_in_python(*_arguments(options)):
        filled = _options(command, options, given)
        with _as_before(), listening(_epochs(on_epoch)) if on_epoch else contextlib.nullcontext():
            try:
                training.train(command, filled, dispatch=call, fail=_raise)
            except InterruptedRunError as stop:
                raise KeyboardInterrupt(_how(command, stop)) from None
    path = made[-1]
    return Summary(Path(), {}) if path is None else read_summary(path)


def _raise(error: Exception) -> NoReturn:
    raise error


def _epochs(on_epoch: OnEpoch) -> Callable[[Event], None]:
    return lambda event: on_epoch(event) if isinstance(event, Epoch) else None


def _how(command: str, stop: InterruptedRunError) -> str:
    here = f"; from Python by repan_cli.{command}(resume={str(stop.path)!r})" if stop.path else ""
    return f"{stop}{here}"


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Restore the process afterward: PyTorch's generators, threads and precision, and the handler of warnings."""
    import torch

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = matmul.allow_tf32, cudnn.allow_tf32
    fixed = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    handlers, propagate = list(LOGGER.handlers), LOGGER.propagate
    try:
        yield
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        matmul.allow_tf32, cudnn.allow_tf32 = allowed
        torch.use_deterministic_algorithms(fixed, warn_only=warns)
        LOGGER.handlers[:], LOGGER.propagate = handlers, propagate


# ---------------------------------------------------------------------------------------------- what is given


def _options(
    command: str, options: type[TrainOptions | CycleOptions], given: Mapping[str, Any]
) -> TrainOptions | CycleOptions:
    """Return the options that Python's names and values stand for. Raises InputError for an unknown name."""
    names = {name for name, *_ in declared(options)} - {"settings", *FOR_PROCESSES}
    chosen: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in given.items():
        option = RENAMED.get(name, name)
        if option in names:
            chosen[option] = _option_value(name, value)
        else:
            settings |= _setting(command, name, value, sorted(names | RENAMED.keys() - RENAMED.values()))
    return options(settings=tuple(f"{key}={_text(key, value)}" for key, value in settings.items()), **chosen)


def _arguments(options: type[TrainOptions | CycleOptions]) -> tuple[dict[str, str], frozenset[str]]:
    """Return a function's arguments by the options of its command, and the options without a value."""
    ours = {option: name for name, option in RENAMED.items()}
    found: dict[str, str] = {}
    flags: set[str] = set()
    for name, kind, how, _ in declared(options):
        if isinstance(how, Option) and name not in FOR_PROCESSES:
            words = {f"--{name.replace('_', '-')}", *how.flags}
            found |= dict.fromkeys(words, ours.get(name, name))
            flags |= words if kind is bool else set()
    return found, frozenset(flags)


def _option_value(name: str, value: Any) -> Any:
    """Return the text that a user would type for an option; None and False omit it."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if isinstance(value, (str, os.PathLike, int, float)) or hasattr(value, "item"):  # NumPy's numbers too
        return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    mend = (
        "give its name; a network of your own is 'file.py:function'"
        if name == "model"
        else "give it as on the command line"
    )
    raise InputError(f"{name} cannot be a {type(value).__name__}: {mend}")


def _setting(command: str, name: str, value: Any, names: list[str]) -> dict[str, Any]:
    """Return the settings that an argument stands for: one by its key, or those of a section."""
    key = name.replace("__", ".")
    if isinstance(value, Mapping):
        inner = (_setting(command, f"{key}.{part}", each, names) for part, each in value.items())
        return {found: each for some in inner for found, each in some.items()}
    if "." in key or key in SCHEMA:
        return {key: value}
    same = [known for known in SCHEMA if known.rpartition(".")[2] == key]
    if key in OTHER_WORDS and not same:
        leaf = OTHER_WORDS[key].rpartition(".")[2]
        same = [leaf if leaf in names else OTHER_WORDS[key]]
    if key in SECTIONS:
        raise InputError(f"repan_cli.{command}: {name} is a section of settings: give a dictionary, {name}={{...}}")
    hint = f"; did you mean {' or '.join(same)}?" if same else did_you_mean(key, names)
    raise InputError(f"repan_cli.{command} has no argument '{name}'{hint or '; see repan list settings'}")


def _text(key: str, value: Any) -> str:
    if isinstance(value, (str, bool, int, float, list, tuple)) or value is None:
        return as_text(value)
    return str(value)


def read_summary(path: Path) -> Summary:
    """Read the results of a finished run, or of several in one folder."""
    if not (path / "series.json").exists():
        return Summary(path, _json(path / "summary.json"))
    members = sorted(file.parent for file in path.glob("seed_*/summary.json"))
    return Summary(path, _json(path / "comparison.json"), tuple(map(read_summary, members)))


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict), "repan has written it"
    return content
