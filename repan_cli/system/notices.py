"""Notices for people, from rooms that do not print: records of the standard library's logging.

`display.console.show_notices` prints them; where nobody calls it, Python prints warnings on stderr by itself.
"""

from __future__ import annotations

import logging

from repan_cli.system.launcher import own_rank

LOGGER = logging.getLogger("repan_cli")


def warn(text: str) -> None:
    """Send a warning, from the first of several ranks alone."""
    if own_rank() == 0:
        LOGGER.warning("%s", text)
