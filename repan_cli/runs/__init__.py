"""Run directories, and where the figures of a run go."""

from repan_cli.runs.directory import (
    HEARTBEAT,
    LAST,
    PREVIOUS,
    SERIES,
    Heartbeat,
    RunDirectory,
    check_free,
    claim_default,
    find,
    read_series,
    software,
)

__all__ = [
    "HEARTBEAT",
    "LAST",
    "PREVIOUS",
    "SERIES",
    "Heartbeat",
    "RunDirectory",
    "check_free",
    "claim_default",
    "find",
    "read_series",
    "software",
]
