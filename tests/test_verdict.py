"""The verdict of a comparison, the sampling error of its test set, and the settings that all its runs share."""

import json
import math
import re

import pytest
from support import page_of, write_run

from repan_cli.compare.groups import compare
from repan_cli.compare.results import read_result
from repan_cli.compare.verdict import common_settings, numbered, sampling, verdict
from repan_cli.system.sampling import interval


def arms(folder, **points):
    """Runs of arms with such test figures, a seed each; `none` is the control."""
    results = []
    for name, figures in points.items():
        given = {"cycle__restart": "none"} if name == "none" else {"optim__lr": f"0.{name[-1]}"}
        for seed, test in enumerate(figures):
            path = write_run(folder / f"{name}_{seed}", seed, test, **given)
            summary = json.loads((path / "summary.json").read_text())
            summary["test"]["images"] = 400
            (path / "summary.json").write_text(json.dumps(summary))
            results.append(read_result(path))
    return compare(results)


def test_a_decided_difference_is_named_with_its_interval(tmp_path):
    said = verdict(arms(tmp_path, none=(70, 71, 72), arm1=(75, 76, 77.1), arm2=(60, 61, 62.1)))
    first, second, last = re.split(r"(?<=\.) ", said)
    assert re.fullmatch(r"configuration 2 \(\+5\.03 points, 95% interval .*\) lies above the control, .*\.", first)
    assert "configuration 3" in second
    assert "below the control" in second
    assert last == "One in 20 such intervals misses by chance; this page has 2."


def test_an_undecided_comparison_says_how_large_a_difference_may_hide(tmp_path):
    comparison = arms(tmp_path, none=(70, 71, 72), arm1=(71, 69, 73))
    said = verdict(comparison)
    assert "configuration 2 cannot be distinguished from the control" in said
    gain = comparison.gain(comparison.groups[1])
    assert f"up to {max(abs(gain.low), abs(gain.high)):.2f} points" in said
    assert "misses by chance" not in said, "of one interval there is nothing to say"


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ({"none": (70, 72), "arm1": (70, 72)}, "configuration 2 is level with the control"),
        ({"none": (70.1, 69.8, 71.3), "arm1": (72.2, 71.9, 73.4)}, "configuration 2 is 2.10 points above the control"),
        ({"none": (70, 70), "arm1": (69, 69, 69)}, "configuration 2 is 1.00 points below the control"),
    ],
)
def test_equal_differences_give_no_estimate(capsys, tmp_path, points, says):
    comparison = arms(tmp_path, **points)
    gain = comparison.gain(comparison.groups[1])
    assert (gain.low, gain.high) == (None, None)
    said = verdict(comparison)
    assert said.startswith(f"With every seed alike, {says}.")
    assert "gives no estimate of how large a difference could go undetected." in said
    assert re.search(r"sampling error of a network's test top-1 is ± 2\.\d\d points by 400 test images\.$", said)
    assert "0.00 points" not in said
    assert "a difference that is the same with every seed has no interval" in page_of(capsys, tmp_path)


def test_equal_differences_do_not_hide_the_others(tmp_path):
    said = verdict(arms(tmp_path, none=(70, 71, 72), arm1=(75, 76, 77.1), arm2=(70, 71, 72)))
    assert "configuration 2 (+5.03 points" in said
    assert "configuration 3 is level with the control" in said
    assert "misses by chance" not in said, "of one interval there is nothing to say"


def test_one_seed_gives_no_verdict(tmp_path):
    said = verdict(arms(tmp_path, none=(70,), arm1=(72,)))
    assert said.startswith("One seed is not enough: configuration 2 ends 2.00 points above the control")


def test_a_gain_of_nothing_is_called_level(tmp_path):
    said = verdict(arms(tmp_path, none=(70,), arm1=(70,)))
    assert said.startswith("One seed is not enough: configuration 2 ends level with the control")


@pytest.mark.parametrize(("figures", "says"), [((70,), "70.00 from one seed"), ((70, 72), "71.00 ± 1.41 over 2 seeds")])
def test_a_single_configuration_is_told_alone(tmp_path, figures, says):
    assert f"Test top-1 {says}. Nothing to compare with" in verdict(arms(tmp_path, arm1=figures))


def test_other_data_are_not_judged(tmp_path):
    write_run(tmp_path / "a", 0, 70)
    write_run(tmp_path / "b", 0, 80, dataset="cifar10")
    assert "use different data" in verdict(compare([read_result(tmp_path / name) for name in "ab"]))


def test_the_sampling_error_is_that_of_the_binomial(tmp_path):
    said = sampling(arms(tmp_path, none=(70,), arm1=(72,)))
    assert f"± {100 * math.sqrt(0.7 * 0.3 / 400):.2f} points by 400 test images. All runs share these" in said
    write_run(tmp_path / "old", 0, 70)
    assert sampling(compare([read_result(tmp_path / "old")])) is None, "of a run that did not note it"


def test_shares_near_the_ends_have_an_interval(tmp_path):
    said = sampling(arms(tmp_path, none=(100, 99.75), arm1=(100, 99.5)))
    low, high = interval(99.5, 400)
    assert said.startswith("Sampling error of a network's test top-1: 99.50 [")
    assert f"99.50 [{low:.2f}, {high:.2f}] as a 95% interval by 400 test images. All runs" in said
    assert "± " not in said
    both = sampling(arms(tmp_path / "both", none=(70, 100), arm1=(70, 100)))
    assert f"± 2.29 points and 100.00 [{interval(100, 400)[0]:.2f}, 100.00] as a 95% interval by 400 test" in both


@pytest.mark.parametrize("images", [0, -3, None])
def test_a_missing_number_of_images_is_left_out(tmp_path, images):
    path = write_run(tmp_path / "a", 0, 70)
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "test": {"top1": 70.0, "images": images}}))
    assert read_result(path).test_images is None


def test_shared_settings_are_shown_once(tmp_path):
    results = [
        read_result(write_run(tmp_path / str(n), n, 70, optim__lr=f"0.{n + 1}", data__cutout="4")) for n in (0, 1)
    ]
    shared = common_settings(compare(results))
    assert shared["data.cutout"] == "4"
    assert {"model.name", "block.name", "data.name"} <= shared.keys()
    assert not {"optim.lr", "run.seed", "run.out", "data.root"} & shared.keys()
    assert "optim.momentum" not in shared, "a default"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{"baseline__epochs": "7"}] * 2, {"baseline.epochs": "7"}),
        ([{"baseline__optim__lr": "0.3"}] * 2, {"baseline.optim.lr": "0.3"}),
        ([{"baseline__teacher__name": "null"}] * 2, {"baseline.teacher.name": "null"}),
        ([{"optim__clip": "null"}] * 2, {"optim.clip": "null"}),
        ([{"baseline__epochs": "3"}, {"epochs": "3"}], {"baseline.epochs": "3"}),
        ([{"baseline__epochs": "3"}, {"baseline__epochs": "4"}], {"baseline.epochs": None}),
    ],
)
def test_shared_settings_beyond_the_plain_ones_are_shown(tmp_path, given, says):
    results = [read_result(write_run(tmp_path / str(n), n, 70, **each)) for n, each in enumerate(given)]
    shared = common_settings(compare(results))
    assert {key: shared.get(key) for key in says} == says


@pytest.mark.parametrize(("lines", "says"), [(("a: 4", "a: 4"), "4"), (("a: 4", "a: 5"), None), (("a: 4", ""), None)])
def test_a_shared_setting_of_another_version_is_shown(tmp_path, lines, says):
    for n, line in enumerate(lines):
        file = write_run(tmp_path / str(n), n, 70) / "config.yaml"
        file.write_text(f"{file.read_text()}later: {{{line}}}\n")
    shared = common_settings(compare([read_result(tmp_path / name) for name in "01"]))
    assert shared.get("later.a") == says


def test_the_page_has_all_of_it(capsys, tmp_path):
    comparison = arms(tmp_path, none=(70, 71, 72), arm1=(75, 76, 77.1))
    page = page_of(capsys, tmp_path)
    assert "lies above the control" in page
    assert "400 test images" in page
    assert page.count("data.name=cifar100") == 1
    assert page.count("2 configurations compared") == 1
    assert "<title>repan on cifar100</title>" in page
    for group in comparison.groups:
        assert numbered(comparison, group) in page
    assert [numbered(comparison, group)[:2] for group in comparison.groups] == ["1.", "2."]


def test_unequal_epochs_are_warned_of_on_the_page(capsys, tmp_path):
    write_run(tmp_path / "a", 0, 70, cycle__restart="none")
    write_run(tmp_path / "b", 0, 72, val=(50.0, 60.0, 70.0, 69.0, 71.0))
    assert "differ in length" in page_of(capsys, tmp_path)
