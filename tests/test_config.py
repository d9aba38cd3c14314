"""Settings: text is read as users mean it, all mistakes are named at once, and later layers override earlier ones."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from repan_cli import config
from repan_cli.errors import InputError


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "1e-3", 1e-3),
        ("optim.lr", "3.e-5", 3e-5),
        ("optim.lr", " 1 ", 1.0),
        ("epochs", "1e2", 100),
        ("epochs", "12", 12),
        ("optim.nesterov", "no", False),
        ("optim.nesterov", "On", True),
        ("optim.clip", "null", None),
        ("optim.clip", "~", None),
        ("optim.clip", "", None),
        ("data.root", "12:30", "12:30"),
        ("data.root", "no", "no"),
        ("run.out", "null", None),
    ],
)
def test_text_is_read_as_users_mean_it(key, text, value):
    assert config.flatten(config.build({key: text}))[key] == value


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("optim.lr", "fast", "optim.lr: 'fast' is not a finite number"),
        ("optim.lr", "nan", "optim.lr: 'nan' is not a finite number"),
        ("optim.lr", "inf", "optim.lr: 'inf' is not a finite number"),
        ("optim.lr", "-1", "optim.lr: must be above 0, got -1"),
        ("optim.lr", "", "optim.lr: '' is not a finite number"),
        ("optim.momentum", "1", "optim.momentum: must be at most 0.9999, got 1"),
        ("epochs", "2.5", "epochs: '2.5' is not a whole number"),
        ("epochs", "0", "epochs: must be at least 1, got 0"),
        ("optim.nesterov", "maybe", "optim.nesterov: 'maybe' is neither true nor false"),
        ("cycle.rule", "calibrat", "cycle.rule: 'calibrat' is not a choice; did you mean calibrate?"),
        ("cycle.rule", "xyz", "choose calibrate, running or reset"),
        ("optim.lrr", "1", "unknown setting 'optim.lrr'; did you mean optim.lr"),
        ("optim", "1", "optim is a section"),
        ("baseline.cycle.count", "1", "unknown setting 'baseline.cycle.count'"),
        ("baseline.optim.lr", "x", "baseline.optim.lr: 'x' is not"),
        ("epochs", ["1"], "epochs: expected one value"),
        ("optim.min_lr", "5", "optim.min_lr=5 is above optim.lr=0.1"),
        ("baseline.optim.min_lr", "5", "baseline: optim.min_lr=5 is above"),
    ],
)
def test_mistakes_are_named(key, text, says):
    with pytest.raises(InputError) as error:
        config.build({key: text})
    assert says in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        {"cycle.schedule": "continuous", "cycle.lr_decay": "0.5"},
        {"data.val_fraction": "0", "cycle.start_from": "best"},
    ],
)
def test_settings_that_contradict_each_other(given):
    with pytest.raises(InputError, match=r"cycle\."):
        config.build(given)
    assert config.build({next(iter(given)): next(iter(given.values()))})


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(InputError) as error:
        config.build({"optim.lr": "x", "epochs": "y", "nonsense": "z"})
    assert len(str(error.value).splitlines()) == 3


def test_later_layers_win_and_baseline_is_laid_over():
    built = config.build({"optim.lr": "1", "epochs": "5"}, {"optim.lr": "0.2", "baseline.optim.lr": "0.3"})
    assert (built.optim.lr, built.epochs) == (0.2, 5)
    baseline = config.baseline_phase(built)
    assert (baseline.optim.lr, baseline.epochs) == (0.3, 5)
    assert dataclasses.replace(baseline.optim, lr=0.2) == built.optim


def test_base_files(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 0.5, momentum: 0}\nepochs: 3\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\noptim:\n  lr: 0.7\n")
    built = config.build(config.read_file(tmp_path / "child.yaml"))
    assert (built.optim.lr, built.optim.momentum, built.epochs) == (0.7, 0.0, 3)


def test_a_base_may_be_a_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: recipes/cifar\nepochs: 3\n")
    built = config.build(config.read_file(tmp_path / "mine.yaml"))
    assert (built.epochs, built.cycle.count) == (3, 15)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epochs: 3\nepochs: 4\n", "line 2: the key 'epochs' appears twice"),
        ("optim:\n  lr: 1\n  lr: 2\n", "line 3: the key 'lr' appears twice"),
        ("- a\n- b\n", "expected 'key: value' lines"),
        ("just words", "expected 'key: value' lines"),
        ("a: [1\n", "mine.yaml"),
        ("? [1, 2]\n: x\n", "a key must be a word"),
        ("base: mine.yaml\n", "leads back to itself"),
        ("base: [a]\n", "expected the name of one file"),
        ("\x00", "mine.yaml"),
        ("&a [*a]", "mine.yaml"),
    ],
)
def test_bad_files_are_named(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        config.read_file(path)
    assert says in str(error.value)


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert config.build(config.read_file(tmp_path / "empty.yaml")) == config.Config()


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="did you mean recipes/cifar"):
        config.find_preset("recipes/cifer")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        config.read_file(binary)


def test_printed_settings_read_back_the_same(tmp_path):
    given = {
        "model.name": "repvgg",
        "optim.clip": "null",
        "optim.lr": "1e-5",
        "baseline.epochs": "7",
        "run.out": "a: b",
    }
    built = config.build(given)
    path = tmp_path / "printed.yaml"
    path.write_text(config.dump(built))
    assert config.build(config.read_file(path)) == built


def test_assignments():
    assert config.parse_assignments(["a.b=c=d", "e="]) == {"a.b": "c=d", "e": ""}
    for words in (["epochs"], ["=3"]):
        with pytest.raises(InputError, match="is not KEY=VALUE"):
            config.parse_assignments(words)
    with pytest.raises(InputError, match="given twice"):
        config.parse_assignments(["a=1", "a=2"])


def test_train_reads_the_baseline_of_a_file_of_cycles():
    resolved = config.resolve("train", None, {"data.name": "cifar100", "model.name": "repvgg"}).config
    assert (resolved.epochs, resolved.optim.lr) == (160, 0.1)
    longer = config.resolve("train", None, {"data.name": "cifar100", "model.name": "repvgg", "epochs": "3"}).config
    assert longer.epochs == 3
    with pytest.raises(InputError, match="cycle.rule has no effect in 'repan train'"):
        config.resolve("train", None, {"data.name": "digits", "model.name": "repvgg", "cycle.rule": "reset"})


def test_a_data_set_and_a_network_are_needed():
    with pytest.raises(InputError, match="--dataset"):
        config.resolve("cycle", None, {"model.name": "repvgg"})
    with pytest.raises(InputError, match="--model"):
        config.resolve("cycle", None, {"data.name": "digits"})


def test_every_setting_has_a_text_and_a_valid_default():
    for key, entry in config.SCHEMA.items():
        assert entry.text.endswith("."), key
        if entry.default is not None:
            text = str(list(entry.default)) if isinstance(entry.default, tuple) else str(entry.default)
            assert entry.parse(text) == entry.default


@pytest.mark.parametrize(
    ("text", "value"), [("[3,5]", (3, 5)), ("3, 5", (3, 5)), ("3", (3,)), ("[]", ()), ("", ()), (["3", "5"], (3, 5))]
)
def test_lists_are_read_from_yaml_and_from_words(text, value):
    assert config.SCHEMA["block.kernel"].parse(text) == value


def test_a_list_comes_back_from_its_dump():
    given = {"data.name": "digits", "block.include": "[layer1.*,layer2.*]"}
    built = config.build(given)
    assert built.block.include == ("layer1.*", "layer2.*")
    assert config.build(config.parse_yaml(config.dump(built), "dump")) == built


nested = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
known = st.dictionaries(st.sampled_from([*config.SCHEMA, *config.OVERLAY]), nested, max_size=4)


@settings(max_examples=100, deadline=None)
@given(tree=st.one_of(nested, known))
def test_no_file_brings_anything_but_input_errors(tree):
    try:
        built = config.build(config.parse_yaml(yaml.safe_dump(tree), "fuzz"))
    except InputError as error:
        assert str(error)
    else:
        assert isinstance(built, config.Config)
