"""Every shipped preset loads, says what it is, and names a command that means it."""

import re
import shlex

import pytest

from repan_cli import config

PRESETS = config.presets()


def test_there_are_presets():
    assert {"recipes/digits", "recipes/cifar"} <= PRESETS.keys()


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_loads_and_opens_with_its_facts(name):
    text = PRESETS[name].read_text()
    config.build(config.read_file(PRESETS[name]))
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert len(header[0]) > 20
    for fact in ("Trains", "Expect", "Time", "Command"):
        assert any(re.match(rf"# {fact} +\S", line) for line in header), fact


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_command_in_its_header_uses_it(name):
    words = shlex.split(re.search(r"^# Command +repan (.+)$", PRESETS[name].read_text(), re.M)[1])
    options = [word for word in words[1:] if "=" not in word]
    given = dict(zip(options[::2], options[1::2], strict=True))
    file = given.get("-c")
    resolved = config.resolve(words[0], file, {"model.name": given["--model"], "data.name": given["--dataset"]})
    assert resolved.source.startswith(f"{name},")


@pytest.mark.parametrize("dataset", list(config.RECIPES))
def test_recipes_exist(dataset):
    assert config.RECIPES[dataset] in PRESETS
