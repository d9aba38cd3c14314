"""Resolve the options of `train`, `distill` and `cycle` before PyTorch is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from repan_cli import config
from repan_cli.cli.dispatch import dispatch, fail, notices_shown
from repan_cli.cli.suggestions import refuse_bare_words
from repan_cli.commands.declaration import given_settings
from repan_cli.commands.options import CycleOptions, TrainOptions
from repan_cli.errors import InputError, RepanError
from repan_cli.system.launcher import rank_count, restarts


def train(
    command: str,
    options: TrainOptions | CycleOptions,
    *,
    dispatch: Callable[..., None] = dispatch,
    fail: Callable[[Exception], NoReturn] = fail,
) -> None:
    """Resolve the settings, then begin a run, several runs or a dry run, or resume one.

    `dispatch` calls a command's module, and `fail` handles errors; callers from Python pass their own.
    """
    control = isinstance(options, CycleOptions) and options.control
    resume = options.resume
    numbers: tuple[int, ...] = ()
    try:
        with notices_shown():
            refuse_bare_words(options.settings)
            given = given_settings(options)
            if resume is not None:
                _check_resume(given, options)
            else:
                numbers = _seeds(options.seeds, given)
                resolved = config.resolve(command, options.config_file, given)
                if control:
                    _check_control(resolved.config.cycle.restart)
                if rank_count() == 1 and _begun_anew(resolved.config.run.out):  # several ranks agree on it
                    resume, given = resolved.config.run.out, {}
    except RepanError as error:
        fail(error)
    as_json = options.as_json
    if resume is not None:
        dispatch("series", command, resume, given, entry="go_on", as_json=as_json)
    elif options.print_config:
        print(config.dump(resolved.config, cycles=command == "cycle"), end="")
    elif options.dry_run:
        dispatch("dry_run", command, resolved, runs=max(len(numbers), 1) * (1 + control), as_json=as_json)
    elif numbers or control:
        numbers = numbers or (resolved.config.run.seed,)
        dispatch("series", command, resolved, seeds=numbers, with_control=control, as_json=as_json)
    else:
        dispatch("train", command, resolved, as_json=as_json)


def _check_control(restart: str) -> None:
    if restart != "repan":
        raise InputError(f"cycle.restart={restart} and --control both ask for a run without restarts: give one")


def _seeds(text: str | None, given: dict[str, Any]) -> tuple[int, ...]:
    """Return the numbers in '0,1,2', and set the first as the seed in `given`. Raises InputError for other text."""
    if text is None:
        return ()
    if "run.seed" in given:
        raise InputError("--seed and --seeds cannot be combined: give one")
    try:
        numbers = tuple(config.SCHEMA["run.seed"].parse(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--seeds {text}: {error}; give numbers such as 0,1,2") from None
    if len(set(numbers)) < len(numbers):
        raise InputError(f"--seeds {text}: a seed is given twice")
    given["run.seed"] = str(numbers[0])
    return numbers


def _begun_anew(out: str | None) -> bool:
    """Return whether torchrun restarts this run after it lost a process, so that the run has to be resumed."""
    if restarts() <= 0:
        return False
    if out is None:
        raise InputError("torchrun restarted, but the run directory is unknown: give --out with --max-restarts")
    return Path(out).exists()


def _check_resume(given: dict[str, Any], options: TrainOptions | CycleOptions) -> None:
    others = {
        "-c": options.config_file,
        "--print-config": options.print_config,
        "--dry-run": options.dry_run,
        "--seeds": options.seeds,
        "--control": isinstance(options, CycleOptions) and options.control,
    }
    for option, there in others.items():
        if there:
            raise InputError(f"{option} cannot be combined with --resume: the run keeps its settings")
    if "run.out" in given:
        raise InputError("--out cannot be combined with --resume: the run continues in its own directory")
