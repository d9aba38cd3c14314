"""`repan train`, `distill` and `cycle`: one run; the three commands differ only in its plan."""

from __future__ import annotations

from repan_cli.session.runner import run

__all__ = ["run"]
