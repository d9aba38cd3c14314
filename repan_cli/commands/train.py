"""`repan train`, `distill` and `cycle`: one run; the three commands differ only in its plan."""

from __future__ import annotations

from pathlib import Path

from repan_cli.config.resolve import Resolved
from repan_cli.errors import InputError
from repan_cli.session import resume, runner
from repan_cli.system.launcher import rank_count, restarts
from repan_cli.system.ranks import gathered, join_ranks


def run(command: str, resolved: Resolved, *, as_json: bool) -> Path | None:
    """Begin a run, or resume it if torchrun has restarted its ranks; return the run directory."""
    out = resolved.config.run.out
    if rank_count() > 1:
        join_ranks(resolved.config.run.device)
        if _begun_before(out):
            assert out is not None, "a run without a folder cannot be begun anew"
            return resume.run(command, out, {}, as_json=as_json)
    return runner.run(command, resolved, as_json=as_json)


def _begun_before(out: str | None) -> bool:
    """Return whether all ranks resume a run that some of them had begun.

    Each machine counts its restarts separately, and only the first rank needs to see the folder.
    """
    if not any(int(count) for count in gathered(str(restarts()))):
        return False
    if out is None:
        raise InputError("torchrun restarted, but the run directory is unknown: give --out with --max-restarts")
    return gathered(str(Path(out).exists()))[0] == "True"
