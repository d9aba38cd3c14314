"""The words of docstrings and messages: no relative clauses, and functions begin with an imperative verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import repan_cli

ROOT = Path(repan_cli.__file__).parent
RELATIVE = {"What", "Whether", "Of", "Where", "How", "Which", "That", "Whose", "When", "Who"}
NOT_VERBS = RELATIVE | {
    *("The", "A", "An", "Every", "All", "Each", "Some", "Any", "No", "None", "One", "This", "These", "Its", "Their"),
    *("In", "On", "At", "By", "For", "From", "With", "Without", "Within", "After", "Before", "Until", "Over"),
    *("As", "If"),
}
SHOWN = ("register", "family", "_adapts", "callback")
"""Decorators that put the docstring into a list for users, where it describes a thing."""

TELLING = ("InputError", "ValueError", "RuntimeError", "warn", "warn_once", "tell", "say", "doing", "fail")
"""Functions and errors whose first argument users read."""


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def docstrings() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every string that stands by itself: docstrings, and texts below constants."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text.strip()


def functions() -> Iterator[tuple[str, str]]:
    """Yield the place and the docstring of every public function and method that is no property and in no list."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            text = ast.get_docstring(node)
            if text and not any("property" in each or any(word in each for word in SHOWN) for each in decorators):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", text


def first_word(text: str) -> str:
    return text.split(None, 1)[0].rstrip(",:.;")


def imperative(word: str) -> bool:
    """Return whether a word may be an imperative: a capitalised word, neither an article nor in the third person."""
    if not (word.isascii() and word.isalpha() and word[0].isupper() and word[1:].islower()) or word in NOT_VERBS:
        return False
    return not word.endswith("s") or word.endswith("ss")


def test_no_docstring_begins_with_a_relative_clause() -> None:
    found = list(docstrings())
    assert len(found) > 900
    assert [place for place, text in found if text and first_word(text) in RELATIVE] == []


def test_docstrings_of_public_functions_begin_with_an_imperative() -> None:
    found = list(functions())
    assert len(found) > 400
    assert [f"{place}: {text.splitlines()[0]}" for place, text in found if not imperative(first_word(text))] == []


def test_the_check_finds_words_that_are_not_imperatives() -> None:
    wrong = ("The", "A", "Raises", "What", "uint8", "(N", "`auto`", "1x1", "None", "Seconds")
    assert [word for word in wrong if imperative(word)] == []
    assert all(map(imperative, ("Return", "Raise", "Pass", "Build")))


BRITISH = re.compile(
    r"\b(\w*(colour|behaviour|favour|neighbour)\w*|grey|centre[ds]?|(re)?labell\w+|cancelled|towards|licence|analyse[ds]?"
    r"|\w*(normal|synchron|initial|optim|serial|random|summar|visual|general|regular|quant|util|organ|recogn|minim|maxim)"
    r"is(e|ed|er|es|ing|ation))\b",
    re.I,
)
"""Forms of words in British spelling: prose, help and messages are in that of the US."""


def test_prose_has_us_spelling() -> None:
    texts = [path.read_text("utf-8") for path in (*ROOT.parent.glob("*.md"), *ROOT.parent.glob("docs/**/*.md"))]
    constants = (node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.Constant))
    texts += [node.value for node in constants if isinstance(node.value, str)]
    assert len(texts) > 3000
    assert [found[0] for text in texts for found in BRITISH.finditer(text)] == []
    assert all(map(BRITISH.search, ("Normalised images", "a grey one", "recolours", "labelled")))


def messages() -> Iterator[tuple[str, str]]:
    """Yield the place and the beginning of every literal text that is raised, warned of, or printed."""
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and _called(node) in TELLING:
                text = node.args[0]
                part = text.values[0] if isinstance(text, ast.JoinedStr) and text.values else text
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.strip():
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", part.value.strip()


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", None) or getattr(node.func, "attr", "")


def test_no_message_begins_with_a_relative_clause() -> None:
    found = list(messages())
    assert len(found) > 250
    assert [place for place, text in found if first_word(text).capitalize() in RELATIVE] == []
