"""What a release does to the README: a package index shows it without the repository's other files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from support import ROOT

STEPS = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]["build"]["steps"]
JOB = {"GITHUB_SERVER_URL": "https://example.org", "GITHUB_REPOSITORY": "someone/repan", "GITHUB_SHA": "0a1b2c"}
PLACE = "https://example.org/someone/repan"


def targets(page: str) -> list[tuple[str, str]]:
    """Return `!` or nothing, and the target, of each link."""
    return re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", page)


def test_its_links_lead_to_the_files_of_the_commit(tmp_path):
    names = [step.get("name") for step in STEPS]
    step = STEPS[names.index("Give the README's links absolute addresses")]
    assert names.index("Build wheel and sdist") > STEPS.index(step)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/absolute_links.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", step["run"]], cwd=tmp_path, env={**os.environ, **JOB, "PATH": path}, check=True)
    before, after = (targets((folder / "README.md").read_text()) for folder in (ROOT, tmp_path))
    assert len(before) == len(after) > 20
    for (picture, old), (_, new) in zip(before, after, strict=True):
        if old.startswith(("https://", "#")):
            assert new == old
            continue
        assert (ROOT / old.partition("#")[0]).is_file()
        assert new == f"{PLACE}/{'raw' if picture else 'blob'}/0a1b2c/{old}"
    assert sum(bool(picture) for picture, _ in after) == 2
