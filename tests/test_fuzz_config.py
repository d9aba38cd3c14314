"""Configuration files that are mistyped, mangled or hostile are read, or refused with the place of the fault."""

import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT

from repan_cli import config
from repan_cli.errors import InputError

PRESETS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").rglob("*.yaml"))]
GIVEN = {"data.name": "digits", "model.name": "repvgg_a0_cifar"}
COMMANDS = ("train", "distill", "cycle")
SECTIONS = {key.partition(".")[0] for key in [*config.SCHEMA, *config.OVERLAY]}

NUMBERS = ["nan", ".nan", "-inf", "1e999", "-1e308", "1e-400", "0x1F", "1_000", "007", "1:30", "12e+03", "+-5", "-0"]
WORDS = [
    "null",
    "~",
    "yes",
    "True",
    "'no'",
    "=",
    "<<",
    "*",
    "&",
    "! x",
    "%",
    "@",
    "`",
    "|",
    ">",
    "-",
    "?",
    ":",
    ",",
    "x",
]
SHAPES = ["[]", "{}", "[1,2]", "{a: 1}", "[[[]]]", "[1, [2]]", "[null]", "[a, {b: c}]", "{? [a] : b}", "[nan, 3]"]
TAGS = [
    "!!python/object:os.system",
    "!!binary aGk=",
    "!!map",
    "!!seq",
    "!!int x",
    "!!map [a]",
    "!!map a",
    "!!seq a",
    "!y",
]
LONG = ["9" * 5000, "1" + "0" * 400, "-" * 300, "a" * 100_000, '"a b" ' * 100]
ESCAPES = ['"\\ud800"', '"\\U00110000"', '"\\UFFFFFFFF"', '"\\0"', '"two\\nlines"', "|\n  two\n  lines", '"\\x1b[31m"']
SIGNS = ["\u00b2", "\u0663", "\u00bd", "\ud7ff", "\u2028", "\ufeff", "\U0001f600", "\t", "\u00e9", "\u202e"]
VALUES = [*NUMBERS, *WORDS, *SHAPES, *TAGS, *LONG, *ESCAPES, *SIGNS]
KEYS = ["optim.lr", "optmi", "lr", "é", "", " ", "1", "null", "<<", "[a]", "{a: b}", "? a", "a" * 5000, "a\n b", "!x"]
TEXTS = ["---", "...", "%YAML 9.9\n---", "%TAG ! tag:x:\n---", "\x00", "\x1b[31m", "\r", "\x85", "\ufffe", "# ü"]
BASES = ["recipes/cifar", "recipe/cifar", "a.yaml", "/", "..", "a" * 5000, '"\\0"', '"\\ud800"', "[a]", "{a: b}", "5"]

Mutation = Callable[[random.Random, list[str]], "list[str]"]


# ---------------------------------------------------------------------------------------------- what goes wrong


def another_value(draw: random.Random, lines: list[str]) -> list[str]:
    place = draw.randrange(len(lines))
    key, colon, _ = lines[place].partition(":")
    return [*lines[:place], f"{key}{colon} {draw.choice(VALUES)}", *lines[place + 1 :]]


def another_key(draw: random.Random, lines: list[str]) -> list[str]:
    place = draw.randrange(len(lines))
    indent = re.match(" *", lines[place])[0]
    return [*lines[:place], f"{indent}{draw.choice(KEYS)}: {draw.choice(VALUES)}", *lines[place:]]


def a_known_key(draw: random.Random, lines: list[str]) -> list[str]:
    """Any setting with any value, in the dotted way of writing."""
    return [*lines, f"{draw.choice([*config.SCHEMA, *config.OVERLAY])}: {draw.choice(VALUES)}"]


def a_section_as_value(draw: random.Random, lines: list[str]) -> list[str]:
    return [*lines, f"{draw.choice(sorted(SECTIONS))}: {draw.choice(VALUES)}"]


def a_value_as_section(draw: random.Random, lines: list[str]) -> list[str]:
    section, _, name = draw.choice([key for key in config.SCHEMA if "." in key]).partition(".")
    return [*lines, f"{section}:", f"  {name}:", f"    deeper: {draw.choice(VALUES)}"]


def a_line_gone(draw: random.Random, lines: list[str]) -> list[str]:
    place = draw.randrange(len(lines))
    return lines[:place] + lines[place + 1 :]


def a_line_twice(draw: random.Random, lines: list[str]) -> list[str]:
    place = draw.randrange(len(lines))
    return lines[:place] + lines[place : place + 1] * 2 + lines[place + 1 :]


def another_indent(draw: random.Random, lines: list[str]) -> list[str]:
    place = draw.randrange(len(lines))
    return [*lines[:place], draw.choice((" ", "\t", "   ", "- ", "")) + lines[place].lstrip(), *lines[place + 1 :]]


def a_base(draw: random.Random, lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("base")] + [f"base: {draw.choice(BASES)}"]


def an_anchor(draw: random.Random, lines: list[str]) -> list[str]:
    ways = (["a: &a [1]", "b: *a"], ["a: &a {b: *a}"], ["epochs: &e 3", "seed: *e"], ["<<: *nothing"], ["a: &a [*a]"])
    return lines + list(draw.choice(ways))


def laughs(draw: random.Random, lines: list[str]) -> list[str]:
    """Each name stands for ten of the one before it: ten million million million million in all."""
    listed = draw.random() < 0.5
    many = ["a0: &a0 ha"]
    for level in range(1, 26):
        parts = ", ".join(("" if listed else f"k{n}: ") + f"*a{level - 1}" for n in range(10))
        many.append(f"a{level}: &a{level} " + (f"[{parts}]" if listed else f"{{{parts}}}"))
    return [*lines, *many, f"optim: {draw.choice(('*a25', '{lr: *a25}', '{*a25 : 1}'))}"]


def deep(draw: random.Random, lines: list[str]) -> list[str]:
    depth = draw.choice((20, 300, 5000))
    ways = ("[" * depth + "]" * depth, "{a: " * depth + "}" * depth, "[" * depth, "- " * depth)
    return [*lines, f"optim: {draw.choice(ways)}"]


def a_text_between(draw: random.Random, lines: list[str]) -> list[str]:
    place = draw.randrange(len(lines) + 1)
    return [*lines[:place], draw.choice(TEXTS), *lines[place:]]


def no_mapping(draw: random.Random, lines: list[str]) -> list[str]:
    return [draw.choice(("", "# nothing", "a", "- a", "[1, 2]", "5", "null", "---", "{}", '""', "!!set {a}"))]


MUTATIONS: tuple[Mutation, ...] = (
    another_value,
    another_key,
    a_known_key,
    a_section_as_value,
    a_value_as_section,
    a_line_gone,
    a_line_twice,
    another_indent,
    a_base,
    an_anchor,
    laughs,
    deep,
    a_text_between,
    no_mapping,
)


def mangled(data: bytes, draw: random.Random) -> bytes:
    """Random bytes in random places."""
    for _ in range(draw.randrange(1, 6)):
        place = draw.randrange(len(data) + 1)
        data = data[:place] + draw.randbytes(draw.randrange(1, 5)) + data[place + draw.randrange(3) :]
    return data


def mistaken(number: int) -> bytes:
    """The file of this number: a preset with one to three things wrong, each sixth with random bytes too."""
    draw = random.Random(number)
    lines = draw.choice(PRESETS).splitlines()
    for mutation in [MUTATIONS[number % len(MUTATIONS)], *draw.choices(MUTATIONS, k=draw.randrange(3))]:
        lines = mutation(draw, lines or [""])
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mangled(data, draw) if number % 6 == 0 else data


# ---------------------------------------------------------------------------------------------- what is said of it


def says_where(line: str, file: Path) -> bool:
    """Whether the line names the file, a setting, or the key that is none."""
    known = {*config.SCHEMA, *config.OVERLAY, *SECTIONS}
    return str(file) in line or line.startswith("unknown setting '") or bool(known & set(re.split(r"[\s:,=]+", line)))


def refusal(file: Path, command: str) -> str | None:
    given = {**GIVEN, "teacher.name": "timm:resnet18"} if command == "distill" else GIVEN
    try:
        config.resolve(command, str(file), given)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [range(150), pytest.param(range(150, 1000), marks=pytest.mark.soak)], ids=len)
def test_every_mistake_is_read_or_refused_with_its_place(tmp_path, numbers):
    refused = 0
    for number in numbers:
        file = tmp_path / f"{number}.yaml"
        file.write_bytes(mistaken(number))
        began = time.process_time()
        error = refusal(file, COMMANDS[number % 3])
        assert time.process_time() - began < 5, file.read_bytes()[:500]
        if error is not None:
            refused += 1
            assert error.strip(), number
            for line in error.splitlines():
                assert says_where(line, file), (number, line[:300])
                assert line.isprintable() and len(line) < 1000, (number, line[:300])
    assert len(numbers) / 2 < refused < len(numbers)  # some mistakes are none, such as a line that is gone


def test_the_files_are_the_same_every_time():
    assert mistaken(17) == mistaken(17) != mistaken(31)
