"""Settings by their old names: users are told, files of older runs are read in silence, and two values are refused."""

import json
import re

import pytest
import torch
from support import ROOT, as_older_version, card_of, one_line, run, small_net, write_run

import repan_cli
from repan_cli import checkpoint, config, door
from repan_cli.checkpoint import ModelCard
from repan_cli.cli import completion
from repan_cli.commands import info, series
from repan_cli.commands.declaration import given_settings
from repan_cli.commands.options import CycleOptions
from repan_cli.compare.groups import compare
from repan_cli.compare.results import read_result
from repan_cli.config import renamed
from repan_cli.config.grid import read_grid
from repan_cli.config.renamed import RENAMED, Renamed, present, present_name
from repan_cli.errors import InputError
from repan_cli.runs.listing import runs_below
from repan_cli.system import notices

NOTICE = "cycle.lr is now cycle.schedule; the old name will be removed in 0.3"
TWO = "cycle.lr=restart and cycle.schedule=continuous are the same setting: give cycle.schedule alone"
NET = "--model repvgg_a0 --dataset digits --print-config".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch, tmp_path):
    monkeypatch.setattr(notices, "_SAID", set())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rate_was_renamed(monkeypatch):
    """Another entry of the table, of a setting that the baseline may have too, and that is a number."""
    monkeypatch.setitem(RENAMED, "optim.rate", Renamed("optim.lr", "0.3"))


def schedule(capsys, *words):
    """The schedule that a command line means, and what it said."""
    code, out, err = run(capsys, "cycle", *NET, *words)
    assert code == 0, err
    return config.build(config.parse_yaml(out, "")).cycle.schedule, err


def test_the_table_leads_from_old_names_to_settings():
    for old, entry in RENAMED.items():
        assert old not in config.SCHEMA and old not in config.OVERLAY
        assert entry.key in config.SCHEMA, "the present name, not one in between"


# ---------------------------------------------------------------------------------------------- what users give


def test_a_learning_rate_is_answered_with_its_option(capsys, tmp_path):
    says = "cycle.lr=0.05 is no schedule: for a learning rate give --lr (optim.lr)\n"
    assert one_line(capsys, "cycle", *NET, "cycle.lr=0.05") == f"Error: {says}"
    (tmp_path / "mine.yaml").write_text("cycle.lr: 0.05\n")
    assert one_line(capsys, "cycle", *NET, "-c", "mine.yaml") == f"Error: mine.yaml: {says}"


@pytest.mark.parametrize(
    "words",
    [
        ["cycle.lr=restart"],
        ["--cycle.lr=restart"],
        ["--cycle.lr", "restart"],
        ["cycle.lr=restart", "cycle.schedule=restart"],
        ["cycle.lr=restart", "cycle.lr_decay=0.5", "--seeds", "1,2"],
    ],
    ids=" ".join,
)
def test_an_old_name_on_the_command_line_is_read_and_said_once(capsys, words):
    assert schedule(capsys, *words) == ("restart", f"Warning: {NOTICE}\n")


def test_an_old_name_in_a_file_is_read_and_the_file_named_once(capsys, tmp_path):
    (tmp_path / "base.yaml").write_text("cycle: {lr: restart}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ncycle.lr: continuous\n")
    (tmp_path / "new.yaml").write_text("base: base.yaml\n")
    assert schedule(capsys, "-c", "base.yaml") == ("restart", f"Warning: base.yaml: {NOTICE}\n")
    assert schedule(capsys, "-c", "base.yaml") == ("restart", ""), "it was said in this process"
    assert schedule(capsys, "-c", "mine.yaml") == ("continuous", f"Warning: mine.yaml: {NOTICE}\n")
    assert schedule(capsys, "-c", "new.yaml") == ("restart", "")


def test_layers_with_both_names_are_laid_over_each_other(capsys, tmp_path):
    (tmp_path / "old.yaml").write_text("cycle: {lr: restart}\n")
    (tmp_path / "new.yaml").write_text("base: old.yaml\ncycle: {schedule: continuous}\n")
    assert schedule(capsys, "-c", "new.yaml")[0] == "continuous"
    assert schedule(capsys, "-c", "old.yaml", "cycle.schedule=continuous")[0] == "continuous"
    assert schedule(capsys, "-c", "new.yaml", "cycle.lr=restart")[0] == "restart"


def test_two_values_are_one_line(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("cycle: {lr: restart, schedule: continuous}\n")
    words = ("cycle.lr=restart", "cycle.schedule=continuous")
    assert TWO in one_line(capsys, "cycle", *NET, *words)
    assert TWO in one_line(capsys, "cycle", "--resume", "run", *words)
    assert f"mine.yaml: {TWO}" in one_line(capsys, "cycle", *NET, "-c", "mine.yaml")
    assert TWO in one_line(capsys, "study", "small", *words)


def test_python_takes_old_names_too(capsys):
    given = given_settings(door._options("cycle", CycleOptions, {"cycle": {"lr": "restart"}}))
    assert given == {"cycle.schedule": "restart"}
    assert capsys.readouterr().err == f"Warning: {NOTICE}\n"
    with pytest.raises(InputError, match="are the same setting: give cycle.schedule alone"):
        repan_cli.cycle("repvgg_a0", "digits", cycle__lr="restart", **{"cycle.schedule": "continuous"})


GRID = """
settings: {model.name: repvgg_a0, data.name: digits, cycle: {lr: restart}}
arms:
  one: {}
  two: {settings: {cycle: {lr: continuous}}}
  three: {like: two, settings: {cycle: {schedule: restart}}}
  four: {like: three, settings: {cycle.lr: continuous}}
"""


def test_a_grid_may_have_old_names(capsys, tmp_path):
    (tmp_path / "grid.yaml").write_text(GRID)
    arms = read_grid(tmp_path / "grid.yaml").arms.values()
    assert [arm.layer["cycle.schedule"] for arm in arms] == ["restart", "continuous", "restart", "continuous"]
    assert not any("cycle.lr" in arm.layer for arm in arms)
    assert capsys.readouterr().err.count("cycle.lr is now") == 1
    both = GRID.replace("two: {settings: {cycle: {", "two: {settings: {cycle: {schedule: restart, ")
    (tmp_path / "grid.yaml").write_text(both)
    with pytest.raises(InputError, match=r"grid.yaml: arm two: cycle.schedule=restart and cycle.lr=continuous are the"):
        read_grid(tmp_path / "grid.yaml")


def test_other_settings_and_those_of_the_baseline_are_found_by_the_same_table(capsys, rate_was_renamed):
    given = config.parse_assignments(["baseline.optim.rate=0.2", "optim.rate=0.1", "optim.lr=1e-1"])
    assert given == {"baseline.optim.lr": "0.2", "optim.lr": "0.1"}, "0.1 and 1e-1 are one value"
    assert "baseline.optim.rate is now baseline.optim.lr" in capsys.readouterr().err
    assert present_name("baseline.cycle.lr") == "baseline.cycle.lr", "the baseline has no such setting"
    assert "--lr and optim.lr= are the same setting" in one_line(capsys, "train", *NET, "--lr", "1", "optim.rate=1")
    assert "without a space beside the '='" in one_line(capsys, "train", *NET, "optim.rate", "=", "1")
    with pytest.raises(InputError, match=r"optim.rate=0.1 and optim.lr=x are the same setting"):
        config.parse_assignments(["optim.rate=0.1", "optim.lr=x"])


def test_old_names_are_not_offered(capsys):
    assert completion.settings("cycle.l") == completion.settings("cycle.lr_decay")
    assert completion.settings("cycle.sch")[0] == "cycle.schedule="
    code, out, err = run(capsys, "list", "settings", "cycle.lr", "--json")
    assert (code, [*json.loads(out)], err) == (0, ["cycle.schedule"], f"Warning: {NOTICE}\n")


# ---------------------------------------------------------------------------------------------- files of older runs


@pytest.fixture
def older(tmp_path):
    """A finished run of an older version, with a schedule that is not the default."""
    return as_older_version(write_run(tmp_path / "cycle" / "run", seed=1, cycle__schedule="restart"))


def test_the_settings_of_an_older_run_are_read_in_silence(capsys, older):
    assert "cycle.lr: restart" in (older / "config.yaml").read_text()
    assert schedule(capsys, "-c", older / "config.yaml") == ("restart", "")
    assert [each.state for each in runs_below(older.parent)] == ["done"]
    assert "is finished; to train more than its 4 cycles, give --cycles N" in one_line(
        capsys, "cycle", "--resume", older
    )
    (older / "config.yaml").rename(older.parent / "config.yaml")
    _, err = schedule(capsys, "-c", older.parent / "config.yaml")
    assert err.endswith(f"config.yaml: {NOTICE}\n"), "no run is beside it"


def test_an_older_series_has_its_settings(capsys, older):
    found = series._settings_of("cycle", older, config.parse_assignments([]), {}).config
    assert found.cycle.schedule == "restart"
    with pytest.raises(
        InputError, match=r"cycle.schedule cannot change when --seeds or --control is resumed \(it was restart\)"
    ):
        series._settings_of("cycle", older, {"cycle.schedule": "continuous"}, {})
    assert capsys.readouterr().err == ""


def test_runs_and_records_by_old_and_new_names_are_one_group(capsys, older, tmp_path):
    newer = write_run(tmp_path / "cycle" / "newer", seed=2, cycle__schedule="restart")
    other = write_run(tmp_path / "cycle" / "other", seed=1)
    record = {
        "command": "cycle",
        "settings": config.parse_yaml((older / "config.yaml").read_text(), "") | {"run.seed": "3"},
        "machine": {},
        "summary": json.loads((older / "summary.json").read_text()),
        "epochs": [json.loads(line) for line in (older / "metrics.jsonl").read_text().splitlines()],
    }
    (tmp_path / "3.json").write_text(json.dumps(record))
    found = compare([read_result(path) for path in (older, newer, tmp_path / "3.json", other)])
    assert [group.seeds for group in found.groups] == [[1, 2, 3], [1]]
    assert [group.settings for group in found.groups] == [
        {"cycle.schedule": "restart"},
        {"cycle.schedule": "continuous"},
    ]
    assert capsys.readouterr().err == ""


def test_the_records_that_ship_are_read_also_by_old_names():
    paths = sorted((ROOT / "docs/results").glob("*/continuous_*/*.json"))
    assert any('"cycle.lr"' in path.read_text() for path in paths)
    for path in paths:
        settings = read_result(path).settings
        assert settings["cycle.schedule"] == "continuous" and "cycle.lr" not in settings


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_an_older_checkpoint_keeps_its_digest_and_has_present_names(tmp_path, ending):
    model = small_net()
    card = card_of(model, config={"data.name": "digits", "cycle.lr": "restart"}, command="cycle")
    older = checkpoint.capture(model, card)
    checkpoint.save(older, tmp_path / f"a{ending}")
    back = checkpoint.load(tmp_path / f"a{ending}")
    assert back.digest() == older.digest(), "by which teachers and merged files know it"
    assert back.card.config["cycle.lr"] == "restart"
    assert back.card.settings == {"data.name": "digits", "cycle.schedule": "restart"}
    assert info.describe(tmp_path / f"a{ending}", None, None, None)["config"] == back.card.settings
    merged = checkpoint.capture_fused(model, back, ())
    assert merged.card.fused_from == older.digest()
    assert "cycle.lr" not in merged.card.config


def test_a_checkpoint_with_two_values_is_refused():
    meta = card_of(small_net()).as_meta()
    both = {"cycle.lr": "restart", "cycle.schedule": "restart"}
    assert ModelCard.from_meta({**meta, "config": both}).settings == {"cycle.schedule": "restart"}
    with pytest.raises(ValueError, match="a 'config' of the wrong kind"):
        ModelCard.from_meta({**meta, "config": {**both, "cycle.lr": "continuous"}})


def test_the_settings_in_a_card_are_read_by_present_names():
    for path in (ROOT / "repan_cli").rglob("*.py"):
        assert not re.search(r"\bcard\.config\b", path.read_text("utf-8")), f"{path}: read card.settings"


# ---------------------------------------------------------------------------------------------- versions to come


@pytest.mark.parametrize("version", ["0.3.0", "0.3.0.dev1", "0.10.0", "1.0.0"])
def test_a_later_version_refuses_old_names_of_users_and_reads_older_runs(monkeypatch, capsys, older, version):
    monkeypatch.setattr(repan_cli, "__version__", version)
    (older.parent / "mine.yaml").write_text("cycle: {lr: restart}\n")
    assert one_line(capsys, "cycle", *NET, "cycle.lr=restart") == "Error: cycle.lr is now cycle.schedule\n"
    assert "mine.yaml: cycle.lr is now" in one_line(capsys, "cycle", *NET, "-c", older.parent / "mine.yaml")
    assert schedule(capsys, "-c", older / "config.yaml") == ("restart", "")
    assert read_result(older).settings["cycle.schedule"] == "restart"
    assert present({"cycle.lr": torch.inf}) == {"cycle.schedule": torch.inf}
    assert renamed.as_given({"cycle.schedule": "restart"}) == {"cycle.schedule": "restart"}
