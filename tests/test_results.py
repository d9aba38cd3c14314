"""The figures of README and manual that have records are those of the records."""

import json
import statistics

import pytest
from scipy.stats import t
from support import ROOT

RECORDS = ROOT / "docs" / "results"
PAGE = (ROOT / "docs" / "experiments.md").read_text()


def figures(study, arm):
    """Test top-1 of the network that validation chose, and of the last epoch, by seed."""
    summaries = [json.loads(path.read_text())["summary"] for path in sorted((RECORDS / study / arm).glob("*.json"))]
    last = [(each["cycles"] or [each["baseline"]])[-1]["test_top1"] for each in summaries]
    return [each["test"]["top1"] for each in summaries], last


def spread(values):
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def difference(values, control):
    """The mean difference with its interval by Student's t, paired by seed."""
    apart = [a - b for a, b in zip(values, control, strict=True)]
    half = t.ppf(0.975, len(apart) - 1) * statistics.stdev(apart) / len(apart) ** 0.5
    return f"{statistics.mean(apart):+.2f} [{statistics.mean(apart) - half:+.2f}, {statistics.mean(apart) + half:+.2f}]"


def table(heading):
    """The rows of the first table below a heading, by their first cell."""
    _, _, below = PAGE.partition(f"\n{heading}\n")
    lines = iter(below.splitlines())
    rows = [line for line in lines if line.startswith("|")]
    cells = [[cell.strip(" `") for cell in row.replace("**", "").strip("|").split("|")] for row in rows]
    return {first: rest for first, *rest in cells[2 : 2 + len(list((RECORDS / STUDIES[heading]).iterdir()))]}


STUDIES = {"## A small study": "small", "## The whole of CIFAR-100, a short run": "quick"}


@pytest.mark.parametrize("heading", STUDIES)
def test_the_tables_of_the_manual(heading):
    study, rows = STUDIES[heading], table(heading)
    arms = sorted(path.name for path in (RECORDS / study).iterdir())
    assert sorted(rows) == arms
    chosen, last = figures(study, "one_cosine")
    for arm in arms:
        own, own_last = figures(study, arm)
        assert {spread(own), spread(own_last)} <= set(rows[arm]), arm
        if arm != "one_cosine":
            assert difference(own, chosen) in rows[arm], arm
            assert study == "quick" or difference(own_last, last) in rows[arm], arm


def test_the_table_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    control = figures("small", "one_cosine")
    assert f"| {spread(control[1])} | |" in readme
    for arm in ("continuous_none", "continuous_rescale", "continuous_zero"):
        last = figures("small", arm)[1]
        assert f"| {spread(last)} | {difference(last, control[1])} |" in readme.replace("**", ""), arm
    words = " ".join(readme.split())
    assert difference(figures("small", "continuous_zero")[0], control[0]) in words
    less, more = (statistics.mean(figures("quick", arm)[1]) for arm in ("continuous_zero", "one_cosine"))
    assert f"restarts cost {more - less:.1f} points: {less:.1f} % against {more:.1f} %" in words


def test_the_run_of_the_longer_study():
    (path,) = (RECORDS / "whole").rglob("*.json")
    assert (path.parent.name, path.stem) == ("one_cosine", "0")
    assert f"`one_cosine` with seed 0 has {figures('whole', 'one_cosine')[0][0]:.2f} % test top-1." in PAGE
