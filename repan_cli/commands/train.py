"""`repan train`, `distill` and `cycle`: one run, which the three commands differ in by its plan alone."""

from __future__ import annotations

from repan_cli.session.runner import run

__all__ = ["run"]
