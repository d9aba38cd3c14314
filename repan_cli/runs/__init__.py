"""Run directories and trackers of metrics."""

from repan_cli.runs.directory import (
    HEARTBEAT,
    LAST,
    MACHINE,
    PREVIOUS,
    SERIES,
    Heartbeat,
    RunDirectory,
    check_free,
    claim_default,
    command_of,
    discard_unsaved,
    find,
    is_finished,
    read_series,
    software,
    state_of,
)

__all__ = [
    "HEARTBEAT",
    "LAST",
    "MACHINE",
    "PREVIOUS",
    "SERIES",
    "Heartbeat",
    "RunDirectory",
    "check_free",
    "claim_default",
    "command_of",
    "discard_unsaved",
    "find",
    "is_finished",
    "read_series",
    "software",
    "state_of",
]
