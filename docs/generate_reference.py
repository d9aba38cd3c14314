"""Write the reference pages of the manual, from the same declarations as the help texts: a hook of MkDocs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from repan_cli.cli.app import COMMANDS
from repan_cli.cli.options import text_of
from repan_cli.commands.declaration import Argument, declared
from repan_cli.config import SCHEMA, as_text, presets


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to those of the manual."""
    from mkdocs.structure.files import File

    pages = {
        "reference/commands.md": commands(),
        "reference/settings.md": settings(),
        "reference/presets.md": presets_page(),
    }
    for name, lines in pages.items():
        files.append(File.generated(config, name, content="\n".join(lines) + "\n"))
    return files


def commands() -> Iterator[str]:
    """Yield the lines of the page of all commands, with their options."""
    yield "# Commands\n"
    yield "`repan COMMAND --help` shows the same. A word in capitals stands for a value: `--epochs N` is typed as"
    yield "`--epochs 30`. [Exit codes](../exit-codes.md) tell how a command ended.\n"
    for name, command in COMMANDS.items():
        text, _, examples = command.help.partition("Examples:" if "Examples:" in command.help else "Example:")
        yield f"## repan {name}\n\n{_joined(text)}\n"
        calls = [line.strip().removeprefix("[bold]").removesuffix("[/bold]") for line in examples.splitlines()]
        yield "\n".join(["```text", *filter(None, calls), "```\n"])
        yield "| option | meaning |\n| --- | --- |"
        for _, _, how, default in declared(command.options):
            yield _option_row(how, default)
        yield ""


def _option_row(how: Any, default: Any) -> str:
    if isinstance(how, Argument):
        return f"| `{_cell(how.metavar)}` | {_cell(how.help)} |"
    flags = ", ".join(f"`{flag}`" for flag in how.flags) + (f" `{_cell(how.metavar)}`" if how.metavar else "")
    also = f" The setting `{how.setting}`." if how.setting else ""
    shown = "" if default in (None, (), False) or how.setting else f" Default: `{default}`."
    return f"| {flags} | {_cell(text_of(how))}{also}{shown} |"


def settings() -> Iterator[str]:
    """Yield the lines of the page of all settings."""
    yield "# Settings\n"
    yield "Give a setting as `KEY=VALUE` on the command line, or in a YAML file (`-c FILE`): see"
    yield "[Train](../training.md#settings). `null` means that a setting is not set.\n"
    yield "- A [recipe](presets.md) may set other values than these defaults. `--print-config` shows those of a run."
    yield "- `baseline.epochs`, `baseline.optim.*` and `baseline.teacher.*` are the settings of the baseline of"
    yield "  `repan cycle`, where they differ from those of the cycles.\n"
    section = None
    for key, entry in SCHEMA.items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            yield f"\n## {section or 'epochs'}\n\n| setting | type | default | meaning |\n| --- | --- | --- | --- |"
        facts = entry.describe()
        yield f"| `{key}` | {_cell(str(facts['type']))} | `{_cell(as_text(facts['default']))}` | {_cell(entry.text)} |"


def presets_page() -> Iterator[str]:
    """Yield the lines of the page of all presets, from the headers of their files."""
    yield "# Presets\n"
    yield "A preset is a YAML file of settings: `-c NAME` uses it. Without `-c`, the recipe of the data set is used."
    yield "`reference` holds the settings that [the method's authors released](../released.md).\n"
    yield "`repan list presets` lists them, and `--print-config` prints all settings that a command would use.\n"
    folder = None
    for name, path in presets().items():
        if name.partition("/")[0] != folder:
            folder = name.partition("/")[0]
            yield f"\n## {folder}\n"
        about, facts = _header(path.read_text(encoding="utf-8"))
        yield f"### {name}\n\n{_plain(about)}\n"
        yield f"```text\n{facts.pop('Command')}\n```\n"
        for fact, text in facts.items():
            yield f"- {fact}: {_plain(text)}"
        yield ""


def _header(text: str) -> tuple[str, dict[str, str]]:
    """Return the sentence that a preset begins with, and its facts by name."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    blank = lines.index("")
    facts = dict(line.split(None, 1) for line in lines[blank + 1 :])
    return " ".join(lines[:blank]), facts


def _joined(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    """Escape the signs that Markdown would read as emphasis or tags."""
    return text.replace("*", "\\*").replace("<", "&lt;")


def _cell(text: str) -> str:
    return _joined(text).replace("|", "\\|").replace("<", "&lt;")
