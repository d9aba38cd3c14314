"""Draw docs/assets/run.svg, the end of a run with its control: `python docs/picture.py [FOLDER]`, some minutes.

Runs that are in the folder already are not repeated.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

WORDS = "cycle --model repvgg --dataset digits --control --seeds 0,1,2"
WIDTH = 116
PICTURE = Path(__file__).parent / "assets" / "run.svg"


def end_of_the_runs(folder: Path) -> Text:
    """Train with three seeds, each with its control, and return the comparison as it is printed."""
    begin = (
        ["--resume", "runs/demo"] if (folder / "runs" / "demo").exists() else [*WORDS.split()[1:], "--out", "runs/demo"]
    )
    words = [sys.executable, "-m", "repan_cli", "cycle", *begin]
    colours = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    ended = subprocess.run(
        words, cwd=folder, env={**os.environ, **colours}, stderr=subprocess.PIPE, text=True, check=True
    )
    text = Text.from_ansi(ended.stderr.replace("\r", ""))
    lines = text.split("\n")
    first = max(number for number, line in enumerate(lines) if line.plain.split()[:1] == ["runs"])
    return Text("\n").join(lines[first:])


def main() -> None:
    """Draw the picture."""
    with tempfile.TemporaryDirectory() as temporary:
        end = end_of_the_runs(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(end)
    picture = console.export_svg(title=f"repan {WORDS}", unique_id="run")
    PICTURE.write_text(
        re.sub(r"@font-face \{.*?\}", "", picture, flags=re.S), encoding="utf-8"
    )  # no fonts from the net


if __name__ == "__main__":
    main()
