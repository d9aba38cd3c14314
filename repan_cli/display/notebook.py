"""The live display of a run in a notebook: one output of the cell, redrawn once per second."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console, RenderableType

from repan_cli.runs.directory import Heartbeat

SECONDS = 1.0
WIDTH = 100
PRE = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;margin:0">{code}</pre>'


class NotebookLive:
    """Shows a renderable below the cell between `start` and `stop`."""

    def __init__(self, view: RenderableType) -> None:
        self.view = view
        self.handle: Any = None
        self.pulse = Heartbeat(self.refresh, seconds=SECONDS)

    def start(self) -> None:
        from IPython.display import display  # installed with every notebook

        self.handle = display(_html(self.view), display_id=True)
        self.pulse.start()

    def refresh(self) -> None:
        """Draw the renderable as it is now."""
        self.handle.update(_html(self.view))

    def stop(self) -> None:
        """Erase the renderable."""
        from IPython.display import HTML

        self.pulse.stop()
        self.handle.update(HTML(""))


def _html(view: RenderableType) -> Any:
    from IPython.display import HTML

    console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False, force_terminal=True)
    console.print(view)
    return HTML(console.export_html(inline_styles=True, code_format=PRE))
