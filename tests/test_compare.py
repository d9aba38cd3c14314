"""Comparison of runs: grouping, the figures of a group, and the table, JSON, CSV and HTML page."""

import csv
import io
import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from support import one_line, page_of, run, write_run

from repan_cli import config
from repan_cli.compare import page as report_page
from repan_cli.compare import verdict
from repan_cli.compare.groups import WITHOUT_EFFECT, compare
from repan_cli.compare.page import render
from repan_cli.compare.results import find_runs, read_result
from repan_cli.compare.statistics import Spread, difference, t_bound


def as_json(capsys, *words):
    code, out, err = run(capsys, "compare", *words, "--json")
    assert code == 0, err
    return json.loads(out), err


@pytest.fixture
def runs(tmp_path):
    """Three seeds with restarts, three without: 1, 2 and 3 points above them."""
    for seed, (ours, theirs) in enumerate([(71, 70), (73, 71), (75, 72)]):
        write_run(tmp_path / f"repan_{seed}", seed, ours)
        write_run(tmp_path / f"none_{seed}", seed, theirs, cycle__restart="none")
    return tmp_path


# ---------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("freedom", "confidence", "t"),
    [
        *[(1, 0.95, 12.706), (2, 0.95, 4.303), (4, 0.95, 2.776), (9, 0.95, 2.262), (30, 0.95, 2.042)],
        *[(1, 0.99, 63.657), (3, 0.99, 5.841), (10, 0.9, 1.812), (5, 0.999, 6.869), (1e7, 0.95, 1.960)],
    ],
)
def test_t_is_that_of_printed_tables(freedom, confidence, t):
    assert t_bound(freedom, confidence) == pytest.approx(t, abs=6e-4)


@pytest.mark.parametrize("freedom", [0.7, 1.0, 1.8971, 2.5, 7.3, 44.4])
def test_t_holds_the_share_of_the_density_that_it_should(freedom):
    """By Simpson's rule, also for the broken degrees of freedom that Welch's method gives."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    bound, steps = t_bound(freedom), 20000
    points = [(1 + (bound * n / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for n in range(steps + 1)]
    total = points[0] + points[-1] + 4 * sum(points[1:-1:2]) + 2 * sum(points[2:-1:2])
    assert 2 * scale * total * bound / steps / 3 == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize(
    ("freedom", "confidence", "t"),
    [
        *[(1, 0.95, 12.7062047364), (2, 0.95, 4.3026527297), (10, 0.95, 2.2281388520), (30, 0.99, 2.7499956536)],
        *[(1.8971, 0.95, 4.5342211419), (44.4, 0.95, 2.0148548823)],
    ],
)
def test_t_is_known_to_nine_digits(freedom, confidence, t):
    assert t_bound(freedom, confidence) == pytest.approx(t, rel=1e-9, abs=1e-10)


def test_the_spread_is_that_of_a_sample():
    assert Spread.of([1, 2, 3, 4])[:2] == (2.5, pytest.approx(math.sqrt(5 / 3)))
    assert Spread.of([2.0]) == (2.0, None, (2.0,))


def test_the_same_seeds_are_paired():
    gain = difference({0: 71, 1: 73, 2: 75}, {2: 72, 0: 70, 1: 71})
    assert (gain.mean, gain.method, gain.freedom) == (2, "paired", 2)
    assert gain.high - gain.mean == pytest.approx(4.3026527 / math.sqrt(3))
    assert gain.mean - gain.low == pytest.approx(4.3026527 / math.sqrt(3))


def test_other_seeds_are_compared_by_welch():
    gain = difference({0: 1, 1: 2, 2: 3, 3: 4}, {7: 2, 8: 4})
    assert (gain.mean, gain.method) == (-0.5, "welch")
    error = math.sqrt(5 / 12 + 1)
    assert gain.freedom == pytest.approx(error**4 / ((5 / 12) ** 2 / 3 + 1))
    assert gain.high - gain.mean == pytest.approx(t_bound(gain.freedom) * error)


@pytest.mark.parametrize(("ours", "theirs"), [({0: 71}, {0: 70}), ({0: 71}, {1: 70}), ({0: 71}, {0: 70, 1: 70})])
def test_one_seed_has_no_interval(ours, theirs):
    assert difference(ours, theirs) == (1, None, None, None, None)


def test_figures_without_any_spread_have_no_interval():
    assert difference({0: 2, 1: 2}, {5: 1, 6: 1}) == (1, None, None, "welch", 2)
    assert difference({0: 2, 1: 3}, {0: 1, 1: 2}) == (1, None, None, "paired", 1)
    assert difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.00001}).low is not None


# ---------------------------------------------------------------------------------------------- groups


def test_runs_that_differ_in_their_seed_are_one_group(capsys, runs):
    found, err = as_json(capsys, runs)
    control, repan = found["groups"]
    assert (control["label"], control["control"], control["difference"]) == ("cycle.restart=none", True, None)
    assert (repan["label"], repan["settings"]) == ("cycle.restart=repan", {"cycle.restart": "repan"})
    assert repan["seeds"] == control["seeds"] == [0, 1, 2]
    assert repan["test_top1"] == {"mean": 73, "sd": 2, "values": [71, 73, 75]}
    assert repan["last_test_top1"]["mean"] == 72
    assert repan["val_top1"] == {"mean": 70, "sd": 0, "values": [70, 70, 70]}
    assert repan["difference"]["test_top1"]["low"] == pytest.approx(2 - 2.484138, abs=1e-6)
    assert (repan["epochs"], repan["images"], repan["hours"]) == (4, 180000, 2)
    assert err == ""


def test_settings_without_effect_on_the_result_do_not_split_a_group(tmp_path):
    assert WITHOUT_EFFECT - {"run.trackers"} <= set(config.SCHEMA)
    write_run(tmp_path / "a")
    quiet = {"data__workers": "3", "run__device": "cpu", "data__root": "elsewhere", "run__log_every": "7"}
    write_run(tmp_path / "b", seed=1, run__out="x", **quiet)
    (group,) = compare([read_result(path) for path in find_runs([str(tmp_path)])]).groups
    assert group.seeds == [0, 1]
    assert group.label == "cycle repvgg_a1_cifar repvgg cifar100"


def test_settings_of_restarts_do_not_part_controls(tmp_path):
    write_run(tmp_path / "a", cycle__restart="none", cycle__attach="ramp")
    write_run(tmp_path / "b", seed=1, cycle__restart="none", cycle__attach="zero-gamma")
    write_run(tmp_path / "c", cycle__attach="zero-gamma")
    write_run(tmp_path / "d", cycle__attach="ramp")
    groups = compare([read_result(path) for path in find_runs([str(tmp_path)])]).groups
    labels = [group.label for group in groups]
    attached = [f"cycle.restart=repan cycle.attach={attach}" for attach in ("zero-gamma", "ramp")]
    assert labels == ["cycle.restart=none", *attached]


def test_labels_name_what_differs(tmp_path):
    write_run(tmp_path / "a", optim__clip="null", block__kernel="[3,5]")
    write_run(tmp_path / "b", optim__clip="2.5", baseline__optim__lr="0.3", block__exclude="[]")
    groups = compare([read_result(path) for path in find_runs([str(tmp_path)])]).groups
    assert [group.label for group in groups] == [
        "block.kernel=[3,5] optim.clip=null baseline.optim.lr=0.1",
        "block.kernel=[] optim.clip=2.5 baseline.optim.lr=0.3",
    ]


def test_settings_of_the_machine_part_no_seeds(tmp_path):
    for seed, hours in enumerate(("null", "8", "24")):
        write_run(tmp_path / str(seed), seed=seed, run__max_hours=hours, data__workers=str(seed))
    assert [group.seeds for group in compare([read_result(path) for path in find_runs([str(tmp_path)])]).groups] == [
        [0, 1, 2]
    ]


def test_a_long_label_of_a_control_says_that_it_has_no_restart(tmp_path):
    """It does not read how branches attach, but a label that only lacks that setting says nothing."""
    others = {"optim__weight_decay": "0.0005", "cycle__start_from": "best", "optim__label_smoothing": "0.1"}
    write_run(tmp_path / "control", cycle__restart="none", **others)
    for attach in ("zero-gamma", "ramp"):
        write_run(tmp_path / attach, cycle__attach=attach)
    groups = compare([read_result(path) for path in find_runs([str(tmp_path)])]).groups
    assert [group.label for group in groups] == [
        "cycle.restart=none",
        "cycle.restart=repan cycle.attach=ramp",
        "cycle.restart=repan cycle.attach=zero-gamma",
    ]


def test_a_run_without_cycles_is_compared_with_one_that_has_them(capsys, runs):
    folder = write_run(runs / "plain", test=69)
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    start = lines.index("cycle:\n")
    end = next(n for n, line in enumerate(lines[start + 1 :], start + 1) if not line.startswith(" "))
    (folder / "config.yaml").write_text("".join(lines[:start] + lines[end:]))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "command": "train", "cycles": []}))
    found, _ = as_json(capsys, runs)
    labels = [group["label"] for group in found["groups"]]
    assert labels == ["cycle cycle.restart=none", "train", "cycle cycle.restart=repan"]
    assert found["groups"][1]["last_test_top1"]["mean"] == 55


def test_the_control_can_be_chosen(capsys, runs):
    found, _ = as_json(capsys, runs / "none_0", "--control", runs / "repan_0")
    assert [group["label"] for group in found["groups"]] == ["cycle.restart=repan", "cycle.restart=none"]
    assert found["groups"][1]["difference"]["test_top1"]["mean"] == -1
    assert "matches runs of 2 groups: name a run" in one_line(capsys, "compare", runs, "--control", runs)
    write_run(runs / "stopped")
    (runs / "stopped" / "summary.json").unlink()
    code, _, err = run(capsys, "compare", runs, "--control", runs / "stopped")
    assert code == 2
    assert "is not among the compared runs" in err


def test_without_a_control_the_first_group_is_compared_with(capsys, tmp_path):
    write_run(tmp_path / "b", test=70, block__name="acb")
    write_run(tmp_path / "a", test=72)
    found, _ = as_json(capsys, tmp_path / "b", tmp_path / "a")
    assert [(g["label"], g["control"]) for g in found["groups"]] == [
        ("block.name=acb", True),
        ("block.name=repvgg", False),
    ]


@pytest.fixture
def arms(tmp_path):
    """Three arms of two seeds, each in a folder, of which two are set alike; with one run that was stopped."""
    for name, gain, given in (("cosine", 0, {"cycle__restart": "none"}), ("repan", 2, {}), ("same", 3, {})):
        for seed in (0, 1):
            write_run(tmp_path / name / f"seed_{seed}", seed, 70 + gain + seed * (gain + 1), **given)
            (tmp_path / name / f"seed_{seed}" / "env.json").write_text('{"device": "cpu", "gpu": null}')
    (write_run(tmp_path / "same" / "seed_2", 2) / "summary.json").unlink()
    return tmp_path


def test_runs_can_be_grouped_and_named_by_their_folders(capsys, arms):
    found, _ = as_json(capsys, arms, "--by-folder")
    assert [(group["label"], group["seeds"], group["devices"]) for group in found["groups"]] == [
        ("cosine", [0, 1], ["cpu"]),
        ("repan", [0, 1], ["cpu"]),
        ("same", [0, 1], ["cpu"]),
    ]
    assert found["warnings"] == []
    assert [group["label"] for group in as_json(capsys, arms / "repan", "--by-folder")[0]["groups"]] == ["repan"]
    write_run(arms / "repan" / "other", 5, block__name="acb")
    found, _ = as_json(capsys, arms, "--by-folder")
    assert found["warnings"] == [f"the runs in {arms / 'repan'} differ in block.name"]


def test_controls_of_a_series_are_a_group_of_their_own_and_have_records(capsys, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "demo" / f"seed_{seed}", seed, 72)
        write_run(tmp_path / "demo" / f"control_seed_{seed}", seed, 70, cycle__restart="none")
    found, _ = as_json(capsys, tmp_path / "demo", "--by-folder")
    assert [(group["label"], group["seeds"], group["control"]) for group in found["groups"]] == [
        ("control", [0, 1], True),
        ("demo", [0, 1], False),
    ]
    assert found["warnings"] == []
    assert run(capsys, "compare", tmp_path / "demo", "--records", tmp_path / "kept")[0] == 0
    kept = sorted(path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("*.json"))
    assert kept == ["control/0.json", "control/1.json", "demo/0.json", "demo/1.json"]


def test_a_control_is_named_by_its_folder_as_the_table_names_it(capsys, arms):
    found, _ = as_json(capsys, arms, "--by-folder", "--control", "same")
    assert (found["groups"][0]["label"], found["groups"][0]["control"]) == ("same", True)
    code, _, err = run(capsys, "compare", arms, "--control", "same")
    assert (code, "no run directory same: it names a group only with --by-folder" in err) == (2, True)
    code, _, err = run(capsys, "compare", arms, "--by-folder", "--control", "ame")
    assert (code, "no run directory ame" in err) == (2, True)


def test_there_can_be_several_controls(capsys, arms, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = ("compare", arms, "--by-folder", "--control", arms / "repan", "--control", arms / "cosine")
    code, out, err = run(capsys, *words, "--markdown", arms / "results.md")
    assert code == 0, err
    title, first, second, third = out.splitlines()
    assert "over repan" in title
    assert "over cosine" in title
    assert re.search(r"repan .* control +\+3.00 \[-9.71, \+15.71\]", first)
    assert re.search(r"cosine .* -3.00 .* control", second)
    assert re.search(r"same .* \+1.50 .* \+4.50", third)
    _, out, _ = run(capsys, *words, "--csv")
    assert [row["over cosine"] for row in csv.DictReader(io.StringIO(out))] == ["3.0", "", "4.5"]
    lines = (arms / "results.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")][6:8] == ["over repan", "over cosine"]
    assert lines[1].count("|") == lines[2].count("|") == 12
    assert lines[2].startswith("| repan | 2 | 73.50 ± 2.12 |")
    assert lines[2].endswith("| 4 | 180 k | 2 h 00 min | cpu |")
    assert lines[6].startswith("6 runs on cifar100 (100 classes)")
    assert "mean ± standard deviation over seeds" in lines[6]
    assert lines[8] == f"- left out: {arms / 'same' / 'seed_2'}: not finished (done)"


def test_two_kinds_of_control_are_reported(capsys, runs):
    write_run(runs / "other", cycle__restart="none", block__name="acb")
    code, _, err = run(capsys, "compare", runs)
    assert code == 0
    assert "Warning: 2 groups have no restarts: the first is the control" in err


def test_a_seed_that_was_run_twice_counts_once(capsys, runs):
    write_run(runs / "repan_again", 0, 72)
    found, _ = as_json(capsys, runs)
    assert found["groups"][1]["test_top1"]["values"] == [72, 73, 75]
    assert "several runs of one seed" in found["warnings"][0]


def test_other_data_and_other_classes_are_warned_of(capsys, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", classes=20)
    assert as_json(capsys, tmp_path)[0]["warnings"] == ["these runs have different numbers of classes: 20, 100"]
    assert [group["label"] for group in as_json(capsys, tmp_path)[0]["groups"]] == ["100 classes", "20 classes"]
    write_run(tmp_path / "c", dataset="cifar10", classes=10)
    assert as_json(capsys, tmp_path)[0]["warnings"] == ["these runs use different data sets: cifar10, cifar100"]
    assert "Warning: these runs use different data sets" in run(capsys, "compare", tmp_path)[2]


def test_folders_of_images_are_told_apart_by_where_they_lie(tmp_path):
    write_run(tmp_path / "a", dataset="folder", data__root="cats")
    write_run(tmp_path / "b", seed=1, dataset="folder", data__root="dogs")
    groups = compare([read_result(path) for path in find_runs([str(tmp_path)])]).groups
    assert [group.label for group in groups] == ["data.root=cats", "data.root=dogs"]


def test_a_run_that_noted_less_is_still_compared(capsys, tmp_path):
    folder = write_run(tmp_path / "a", val=(None, None, None, None))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(
        json.dumps({k: v for k, v in summary.items() if k not in ("images", "classes")})
    )
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "later:\n  setting: [1, [2]]\n")
    found, _ = as_json(capsys, tmp_path)
    assert (found["groups"][0]["val_top1"], found["groups"][0]["images"]) == (None, None)
    code, out, _ = run(capsys, "compare", tmp_path, "--html", tmp_path / "page.html")
    assert code == 0
    assert " - " in out


# ---------------------------------------------------------------------------------------------- finding runs


def test_runs_are_found_by_name_file_folder_and_glob(runs, monkeypatch):
    (runs / "notes.txt").touch()
    (runs / "empty").mkdir()
    monkeypatch.chdir(runs)
    assert len(find_runs(["."])) == 6
    assert len(find_runs([str(runs.parent)])) >= 6
    assert [path.name for path in find_runs(["none_*", "none_0", str(runs / "none_1" / "summary.json")])] == [
        "none_0",
        "none_1",
        "none_2",
    ]
    assert len(find_runs(["*"])) == 6
    assert len(find_runs([str(runs / "repan_[01]")])) == 2


def test_a_folder_that_is_not_a_run_is_one_line(capsys, tmp_path):
    assert f"no run directory {tmp_path / 'nothing'}" in one_line(capsys, "compare", tmp_path / "nothing")
    assert f"{tmp_path} holds no run directory" in one_line(capsys, "compare", tmp_path)
    write_run(tmp_path / "a")
    assert "give one" in one_line(capsys, "compare", tmp_path, "--json", "--csv")
    assert "cannot write" in one_line(capsys, "compare", tmp_path, "--html", tmp_path / "no" / "page.html")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "status.json",
            '{"state": "preempted", "cycle": 1, "epoch": 2}',
            "not finished (preempted in cycle 1, epoch 2)",
        ),
        ("status.json", '{"state": "running"}', "not finished (running)"),
        ("status.json", "{", "status.json cannot be read"),
        ("summary.json", "[1]", "summary.json cannot be read"),
        ("summary.json", "{}", "not what repan writes (KeyError: 'command')"),
        ("metrics.jsonl", '{"cycle": 1}\n', "not what repan writes (KeyError: 'val_top1')"),
        ("metrics.jsonl", "7\n", "not what repan writes"),
        ("config.yaml", "run: {seed: many}", "not what repan writes"),
        ("config.yaml", "a: [", "config.yaml line"),
    ],
)
def test_unfinished_and_damaged_runs_are_listed_and_skipped(capsys, runs, name, content, says):
    (runs / "repan_1" / name).write_text(content)
    found, err = as_json(capsys, runs)
    assert found["groups"][1]["seeds"] == [0, 2]
    assert found["groups"][1]["difference"]["test_top1"]["method"] == "welch"
    assert found["left_out"][0]["run"] == str(runs / "repan_1")
    assert says in found["left_out"][0]["why"]
    assert f"Warning: left out: {runs / 'repan_1'}" in err


def places(tree, path=()):
    """The way to every value in a tree of JSON."""
    yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[key], (*path, key))


ODD = (None, "x", -1, [7], {"x": 7}, 1e400)


@pytest.mark.parametrize("values", [2, pytest.param(len(ODD), marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["summary.json", "status.json", "metrics.jsonl"])
def test_no_value_in_a_file_of_figures_breaks_the_comparison(capsys, runs, name, values):
    """Each place of the file has so many of the odd values, the next place the next ones."""
    turn = itertools.cycle(ODD)
    file = runs / "repan_1" / name
    text = file.read_text()
    whole = json.loads(text.splitlines()[0] if name == "metrics.jsonl" else text)
    for way in places(whole):
        for value in itertools.islice(turn, values):
            tree = changed = json.loads(json.dumps({"": whole}))
            for key in ("", *way)[:-1]:
                changed = changed[key]
            changed[("", *way)[-1]] = value
            file.write_text(json.dumps(tree[""]) + "\n")
            code, _, err = run(capsys, "compare", runs, "--html", runs / "page.html")
            assert code == 0, (way, value, err)


def test_links_lead_nowhere_twice(runs):
    (runs / "again").symlink_to(runs)
    (runs / "linked").symlink_to(runs / "none_0")
    assert len(find_runs([str(runs)])) == 6


def test_nothing_finished_is_an_error(capsys, tmp_path):
    (write_run(tmp_path / "a") / "summary.json").unlink()
    code, out, err = run(capsys, "compare", tmp_path)
    assert (code, out) == (2, "")
    assert "Error: no finished run to compare" in err


# ---------------------------------------------------------------------------------------------- on screen, as a page


def test_the_table_is_on_stdout_and_its_legend_on_stderr(capsys, runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, err = run(capsys, "compare", runs)
    assert code == 0
    title, control, repan = out.splitlines()
    assert title.split("  ")[0] == "runs"
    assert re.search(
        r"cycle.restart=none +3 +71.00 ± 1.00 +70.00 ± 1.00 +70.00 ± 0.00 +control +4 +180 k +2 h 00", control
    )
    assert "73.00 ± 2.00" in repan
    assert "+2.00 [-0.48, +4.48]" in repan
    assert "95% confidence interval, paired by seed" in err
    assert "one seed" not in err


def test_on_a_narrow_terminal_names_have_their_own_lines(capsys, runs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "compare", runs)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "2  cycle.restart=repan" in out


def test_one_seed_is_reported(capsys, runs):
    _, out, err = run(capsys, "compare", runs / "repan_0", runs / "none_0")
    assert "±" not in out
    assert "[" not in out
    assert "one seed gives no spread" in err


def test_csv_has_a_row_a_group(capsys, runs):
    code, out, _ = run(capsys, "compare", runs, "--csv")
    assert code == 0
    control, repan = csv.DictReader(io.StringIO(out))
    assert (repan["label"], repan["seeds"], float(repan["test_top1"])) == ("cycle.restart=repan", "0 1 2", 73)
    assert float(repan["difference"]) == 2
    assert (control["control"], control["difference"]) == ("True", "")


class Page(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.words.append(data)

    def paths(self, name):
        return [value for _, attribute, value in self.attributes if attribute == "class" and name in value.split()]


def test_the_page_needs_nothing_beside_itself(capsys, runs):
    text = page_of(capsys, runs)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onclick", "onload"} & {name for _, name, _ in page.attributes}
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_curves_bands_restarts_and_seeds(capsys, runs):
    page = Page(page_of(capsys, runs))
    assert page.paths("band") == ["band control", "band c0"]
    assert "cycle 1" in page.words
    assert len(page.paths("start")) == 1
    assert len(page.paths("dot")) == 6
    assert "+2.00 [-0.48, +4.48]" in page.words
    assert str(runs / "none_0").rpartition("/")[2] in page.words
    single = [read_result(path) for path in find_runs([str(runs / "none_0"), str(runs / "repan_0")])]
    assert not Page(render(compare(single))).paths("band")


def test_a_curve_is_the_mean_between_least_and_greatest(tmp_path):
    write_run(tmp_path / "a", 0, val=(10, 20, 30, 40))
    write_run(tmp_path / "b", 1, val=(20, 40, 60, 50))
    (group,) = compare([read_result(path) for path in find_runs([str(tmp_path)])]).groups
    assert report_page.curve(group) == ([15, 30, 45, 45], [10, 20, 30, 40], [20, 40, 60, 50])
    assert report_page.cycle_starts(group) == {1: 2}


def test_names_are_text_on_the_page(capsys, tmp_path):
    name = "<script>alert('x')</script>&.py:build"
    write_run(tmp_path / "a", model__name=name)
    write_run(tmp_path / "b", model__name="other")
    text = page_of(capsys, tmp_path)
    assert "<script" not in text
    assert any(name in words for words in Page(text).words)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(scheme):
    """WCAG: 4.5 for text, 3 for what is drawn."""
    light, dark = report_page.STYLE.split("@media", 1)
    colors = dict(re.findall(r"--(\w+): (#\w{6})", light if scheme == "light" else dark))

    def luminance(color):
        parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(colors["ink"], colors["paper"]) > 7
    assert contrast(colors["ink"], colors["note"]) > 7
    assert contrast(colors["soft"], colors["paper"]) > 4.5
    for number in range(report_page.COLORS):
        assert contrast(colors[f"c{number}"], colors["paper"]) > 4.5


@pytest.mark.parametrize(("low", "high"), [(0, 1), (47.3, 75.1), (98, 98), (-3, 250), (69.99, 70.01)])
def test_ticks_are_round_and_few(low, high):
    ticks = report_page.Scale(low, high, 0, 100).ticks()
    assert 1 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_a_real_run_is_compared_with_itself(capsys, small_run, tmp_path):
    shutil.copytree(small_run.folder, tmp_path / "run")
    found, err = as_json(capsys, tmp_path)
    assert err == ""
    (group,) = found["groups"]
    assert group["test_top1"] == {
        "mean": small_run.summary["test"]["top1"],
        "sd": None,
        "values": [group["test_top1"]["mean"]],
    }
    assert (group["epochs"], group["images"]) == (8, 8 * small_run.summary["images"]["train"])
    assert group["dataset"] == "digits"
    assert small_run.summary["classes"] == 10
    assert "svg" in page_of(capsys, tmp_path)


# ---------------------------------------------------------------------------------------------- records


def test_records_compare_like_the_runs_they_were_made_of(capsys, arms, tmp_path):
    (arms / "repan" / "seed_0" / "env.json").write_text(
        json.dumps({"gpu": "H100", "device": "cuda", "argv": ["/home"]})
    )
    kept = tmp_path / "kept"
    words = ["compare", "--by-folder", "--control", arms / "cosine", "--json"]
    code, out, err = run(capsys, *words, arms, "--records", kept)
    assert code == 0, err
    written = sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*.*"))
    assert f"wrote {len(written)} records below {kept}" in err
    assert written[:2] == ["cosine/0.json", "cosine/1.json"]
    assert "/home" not in (kept / "repan" / "0.json").read_text()
    code, again, err = run(capsys, "compare", "--by-folder", "--control", kept / "cosine", "--json", kept)
    assert code == 0, err

    def figures(text):
        groups = json.loads(text)["groups"]
        return [{key: value for key, value in group.items() if key not in ("runs", "differences")} for group in groups]

    assert figures(again) == figures(out)
    assert run(capsys, "compare", kept, "--by-folder", "--records", tmp_path / "copy")[0] == 0
    for name in written:
        assert (tmp_path / "copy" / name).read_bytes() == (kept / name).read_bytes()


def test_a_run_that_was_resumed_on_another_device_names_both(capsys, arms, tmp_path):
    began = {"gpu": "H100", "device": "cuda", "cwd": "/home"}
    later = [{"gpu": None, "device": "cpu", "threads": threads, "cwd": "/home"} for threads in (1, 2)]
    (arms / "repan" / "seed_0" / "env.json").write_text(json.dumps({**began, "resumed": later}))
    code, _, err = run(capsys, "compare", "--by-folder", arms, "--records", tmp_path / "kept")
    assert code == 0, err
    assert "/home" not in (tmp_path / "kept" / "repan" / "0.json").read_text()
    for place in (arms, tmp_path / "kept"):
        groups = {each["label"]: each["devices"] for each in as_json(capsys, place, "--by-folder")[0]["groups"]}
        assert groups["repan"] == ["H100, then cpu", "cpu"]


def test_a_record_tells_no_folder_of_its_author(capsys, tmp_path):
    paths = {
        "teacher__name": "/home/someone/t.pt",
        "model__init": "/home/someone/w.pt::ema",
        "data__class_order": "text",
    }
    run_of = write_run(tmp_path / "arm" / "a", 0, **paths)
    code, _, err = run(capsys, "compare", run_of, "--records", tmp_path / "kept")
    assert code == 0, err
    text = (tmp_path / "kept" / "arm" / "0.json").read_text()
    assert "/home" not in text
    settings = json.loads(text)["settings"]
    assert (settings["teacher.name"], settings["model.init"]) == ("t.pt", "w.pt::ema")


def test_two_runs_cannot_be_one_record(capsys, arms, tmp_path):
    write_run(arms / "repan" / "again", 0)
    code, _, err = run(capsys, "compare", arms, "--by-folder", "--records", tmp_path / "kept")
    assert code == 2
    assert "would both be written to the record" in err
    assert not (tmp_path / "kept").exists()


def test_a_damaged_record_is_left_out(capsys, tmp_path):
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / "0.json").write_text('{"command": "cycle"}')
    code, _, err = run(capsys, "compare", tmp_path)
    assert code == 2
    assert "left out" in err and "not what repan writes (KeyError: 'settings')" in err


# ---------------------------------------------------------------------------------------------- the same test images


def note(folder, **facts):
    """Change the summary of a run."""
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.mark.parametrize("facts", [{"images": {"train": 45000, "test": 360}}, {"test_set": "b" * 16}])
def test_runs_that_were_scored_on_other_images_are_not_compared(capsys, runs, facts):
    for seed in range(3):
        note(runs / f"none_{seed}", images={"train": 45000, "test": 297}, test_set="a" * 16)
        note(runs / f"repan_{seed}", images={"train": 45000, "test": 297}, test_set="a" * 16)
    whole, _ = as_json(capsys, runs)
    assert whole["groups"][1]["difference"]["test_top1"]["mean"] == 2
    assert whole["warnings"] == []
    note(runs / "repan_1", **facts)
    found, _ = as_json(capsys, runs)
    assert found["groups"][1]["difference"] is None
    counts = " (297 and 360)" if "images" in facts else ""
    assert found["warnings"] == [
        f"these runs were scored on different test images{counts}: groups that differ in them are not compared"
    ]


def test_runs_that_did_not_record_their_test_images_are_compared_as_before(capsys, runs):
    note(runs / "repan_1", images={"train": 45000, "test": 297}, test_set="a" * 16)
    found, _ = as_json(capsys, runs)
    assert (found["groups"][1]["difference"]["test_top1"]["mean"], found["warnings"]) == (2, [])


def test_a_page_says_that_runs_share_their_images_only_if_they_do(runs):
    def told(*test_sets):
        for name, known in zip(("repan_0", "none_0"), test_sets, strict=True):
            note(runs / name, images={"train": 45000, "test": 297}, test_set=known)
        return verdict.sampling(compare([read_result(runs / name) for name in ("repan_0", "none_0")]))

    assert "All runs share these images" in told("a", "a")
    assert "All runs share these images" not in told("a", "b")


def test_runs_of_unequal_length_within_a_group_are_told_of(capsys, tmp_path):
    """The means of both groups are alike."""
    for seed, val in enumerate([(50.0, 60.0, 70.0, 69.0, 70.0), (50.0, 60.0, 70.0, 69.0)]):
        write_run(tmp_path / f"ours_{seed}", seed, 71, val=val)
        write_run(tmp_path / f"none_{seed}", seed, 70, cycle__restart="none")
    records = (tmp_path / "ours_1" / "metrics.jsonl").read_text().splitlines()[:3]
    (tmp_path / "ours_1" / "metrics.jsonl").write_text("\n".join(records) + "\n")
    found, _ = as_json(capsys, tmp_path)
    assert found["groups"][0]["epochs"] == found["groups"][1]["epochs"] == 4
    assert "these runs differ in length (3 and 5 epochs), which alone may explain a difference" in found["warnings"]
