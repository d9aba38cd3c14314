"""The figures of README and manual that have records are those of the records."""

import itertools
import json
import re
import statistics

import pytest
from scipy.stats import t
from support import ROOT

from repan_cli.compare.results import read_result
from repan_cli.runs.felt import loss_after

RECORDS = ROOT / "docs" / "results"
PAGE = (ROOT / "docs" / "experiments.md").read_text()


def figures(study, arm):
    """Test top-1 of the network that validation chose, and of the last epoch, by seed."""
    summaries = [json.loads(path.read_text())["summary"] for path in sorted((RECORDS / study / arm).glob("*.json"))]
    last = [(each["cycles"] or [each["baseline"]])[-1]["test_top1"] for each in summaries]
    return [each["test"]["top1"] for each in summaries], last


def by_seed(study, arm):
    """Test top-1 of the network that validation chose, with its seed."""
    seeds = sorted(int(path.stem) for path in (RECORDS / study / arm).glob("*.json"))
    return list(zip(seeds, figures(study, arm)[0], strict=True))


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
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), below.splitlines())
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    cells = [[cell.strip(" `") for cell in row.replace("**", "").strip("|").split("|")] for row in rows]
    return {first: rest for first, *rest in cells[2:]}


STUDIES = {"## A small study": "small", "## The whole of CIFAR-100, a short run": "quick"}


@pytest.mark.parametrize("heading", STUDIES)
def test_the_tables_of_the_manual(heading):
    study, rows = STUDIES[heading], table(heading)
    arms = sorted(path.name for path in (RECORDS / study).iterdir() if len(list(path.iterdir())) > 1)
    assert sorted(rows) == arms
    chosen, last = figures(study, "one_cosine")
    for arm in arms:
        own, own_last = figures(study, arm)
        assert {spread(own), spread(own_last)} <= set(rows[arm]), arm
        if arm != "one_cosine":
            assert difference(own, chosen) in rows[arm], arm
            assert study == "quick" or difference(own_last, last) in rows[arm], arm


def ending(study, arm):
    """Test top-1 at the chosen and the last epoch; one seed has no spread."""
    return [spread(values) if len(values) > 1 else f"{values[0]:.2f}" for values in figures(study, arm)]


RATES = {"0.1": "small", **{rate: f"small_rate_{rate}" for rate in ("0.2", "0.4", "0.8")}}


def test_the_table_of_learning_rates():
    _, _, below = PAGE.partition("\n### The learning rate\n")
    rows = [row.replace("`", "") for row in below.partition("\n#")[0].splitlines() if row.startswith("| `")]
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    known = {(arm.name, rate) for rate, study in RATES.items() for arm in (RECORDS / study).iterdir()}
    compared = {(arm, rate) for arm, rate in known if arm in ("one_cosine", "continuous_zero", "continuous_pace")}
    assert {(arm, rate) for arm, rate, *_ in shown} == compared
    for arm, rate, seeds, *values in shown:
        assert seeds == str(len(figures(RATES[rate], arm)[0]))
        assert values == ending(RATES[rate], arm), (arm, rate)


def losses_after_restarts(arm, control):
    """The loss of 200 steps after each restart of `small`, divided by the control's; the mean over seeds."""

    def loss(name, seed, cycle):
        result = read_result(RECORDS / "small" / name / f"{seed}.json")
        return loss_after(result.records[15 * cycle : 15 * (cycle + 1)], 200, result.pace)

    return [statistics.mean(loss(arm, s, c) / loss(control, s, c) for s in range(3)) for c in (1, 2, 3)]


@pytest.mark.parametrize(
    ("arm", "control", "low", "high"),
    [
        ("continuous_rescale", "one_cosine", 1.01, 1.01),
        ("continuous_none", "one_cosine", 1.00, 1.00),
        ("continuous_zero", "continuous_none", 1.13, 1.17),
        ("continuous_pace", "continuous_none", 0.99, 0.99),
    ],
)
def test_the_losses_after_restarts(arm, control, low, high):
    ratios = losses_after_restarts(arm, control)
    assert (round(min(ratios), 2), round(max(ratios), 2)) == (low, high)
    words = " ".join(PAGE.split())
    for said in (
        "change is 1.01 times that of `one_cosine` (1.00 times with `continuous_none`)",
        "that loss is 1.13 to 1.17 times that of `continuous_none`, and 0.99 times with `continuous_pace`",
    ):
        assert said in words


def test_the_difference_in_the_picture_of_a_comparison():
    picture = (ROOT / "docs" / "assets" / "run.svg").read_text().replace("&#160;", " ")
    (gain,) = re.findall(r"([+-]\d+\.\d\d) \[", picture)
    for page in ("first-run.md", "compare.md"):
        assert f"{gain} points" in (ROOT / "docs" / page).read_text(), page


def test_the_table_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    control = figures("whole_h200", "one_cosine")[1]
    assert f"| {spread(control)} | | " in readme
    for arm in ("continuous_zero", "continuous_pace"):
        own = figures("whole_h200", arm)[1]
        assert f"| {spread(own)} | {difference(own, control)} |" in readme, arm
    gain = difference(*(figures("small", arm)[1] for arm in ("continuous_zero", "one_cosine")))
    assert f"gained {gain[1:].replace(' [', ' points [')} at a rate of 0.1" in " ".join(readme.split())


@pytest.mark.parametrize("arm", ["one_cosine", "continuous_zero"])
def test_the_times_of_the_readme(arm):
    files = (RECORDS / "whole_h200" / arm).glob("*.json")
    minutes = statistics.mean(json.loads(file.read_text())["summary"]["seconds"] / 60 for file in files)
    assert f"| {minutes:.1f} min on an NVIDIA H200 |" in (ROOT / "README.md").read_text()


LONGER = {"whole": "one CPU core", "whole_h200": "NVIDIA H200"}


@pytest.mark.parametrize(("study", "device"), LONGER.items())
def test_the_runs_of_the_longer_study(study, device):
    control, seen = dict(by_seed(study, "one_cosine")), 0
    for arm in (path.name for path in (RECORDS / study).iterdir()):
        own = dict(by_seed(study, arm))
        pairs = [own[seed] for seed in own], [control[seed] for seed in own]
        over = difference(*pairs) if len(own) > 1 else f"{pairs[0][0] - pairs[1][0]:+.2f}"
        over = "control" if arm == "one_cosine" else over
        place = f"{device}, then CPU" if (study, arm) == ("whole_h200", "continuous_pace") else device
        row = f"| {place} | `{arm}` | {len(own)} | {' | '.join(ending(study, arm))} | {over} |"
        assert row in PAGE.replace("**", ""), row
        seen += 1
    _, _, below = PAGE.partition("a longer run\n")
    assert below.count(f"| {device}") == seen


def test_the_default_restart_at_the_end_of_the_longer_study():
    last = {arm: figures("whole_h200", arm)[1] for arm in ("continuous_pace", "one_cosine")}
    apart = difference(last["continuous_pace"], last["one_cosine"])
    assert f"the difference is {apart}, below zero with every seed" in " ".join(PAGE.split())


def test_three_seeds_of_the_longer_study():
    for arm in ("one_cosine", "continuous_zero", "continuous_pace"):
        assert [seed for seed, _ in by_seed("whole_h200", arm)] == [0, 1, 2]


def mean_felt(study, arm, cycle, key):
    files = sorted((RECORDS / study / arm).glob("*.json"))
    return statistics.mean(json.loads(file.read_text())["summary"]["cycles"][cycle]["felt"][key] for file in files)


@pytest.mark.parametrize(
    ("study", "arm", "said"),
    [
        ("whole_h200", "continuous_zero", "from {} (the 200 steps before) to {} (the 200 steps after); guessing"),
        ("whole_h200", "continuous_zero", "from {2} to {3}, and from {4} to {5}."),
        ("whole_h200", "continuous_pace", "{} before its first restart and {} after it, {} and {}, {} and {}."),
    ],
)
def test_the_losses_around_restarts_of_the_longer_study(study, arm, said):
    losses = [f"{mean_felt(study, arm, cycle, key):.2f}" for cycle in range(3) for key in ("before_200", "first_200")]
    assert said.format(*losses) in " ".join(PAGE.split())


def test_the_training_accuracy_at_the_end_of_the_longer_study():
    with_restarts, without, paced = (
        statistics.mean(
            json.loads(file.read_text())["epochs"][-1]["train_top1"]
            for file in (RECORDS / "whole_h200" / arm).glob("*.json")
        )
        for arm in ("continuous_zero", "one_cosine", "continuous_pace")
    )
    assert f"its training accuracy has caught up ({paced:.1f} %)" in " ".join(PAGE.split())
    assert f"its accuracy is {with_restarts:.1f} %, against {without:.1f} % without" in " ".join(PAGE.split())


def test_the_speed_on_a_gpu():
    page = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    found = json.loads((RECORDS / "speed" / "h200.json").read_text())
    first, *others = found["step"].values()
    assert f"{first['images_per_second']:,.0f} | |" in page
    for row in others:
        assert f"| {row['images_per_second']:,.0f} | {row['ratio']:.1f}x |" in page
    alone, taught = (each["seconds_an_epoch"] for each in found["epoch"].values())
    assert f"An epoch of 50,000 images takes {alone:.2f} s, and {taught:.2f} s with a cached teacher" in page
    assert f"has {found['counts']['launched']} kernels" in page
    product, copy = found["ceilings"]["matmul bf16 TFLOP/s"], found["ceilings"]["copy GB/s"]
    assert f"did {product:.0f} TFLOP/s in a large bfloat16 matrix product, and copied {copy:,.0f} GB/s" in page


def test_the_first_run_of_the_smooth_restart_on_all_classes():
    assert f"`continuous_pace` with seed 0 has {ending('quick', 'continuous_pace')[1]} % at the last epoch" in PAGE
