"""`python -m repan_cli`: the command from a checkout, without installation."""

from __future__ import annotations

from repan_cli.cli.app import main

main()
