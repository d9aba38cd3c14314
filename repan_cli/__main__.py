"""`python -m repan_cli`: the command from a checkout, without installation."""

from repan_cli.cli import main

main()
