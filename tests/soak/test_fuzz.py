"""The fuzzers for an hour in all; what they find is kept in `tests/corpus`. `REPAN_FUZZ_SECONDS` sets the time."""

import os
import subprocess
import sys
import time

import pytest
from fuzzing import READERS
from support import ROOT

SECONDS = float(os.environ.get("REPAN_FUZZ_SECONDS", "3600")) / len(READERS)

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("name", READERS)
def test_no_changed_file_does_harm(name):
    """In a process of its own: a reader in C may end it. Every run draws other changes."""
    seed = str(int(time.time()))
    command = [sys.executable, str(ROOT / "tests" / "fuzzing.py"), name, str(SECONDS), seed]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 kinds of findings" in found.stdout, found.stdout
    print(found.stdout)
