"""Every shipped preset loads, says what it is, and names a command that means it."""

import re
import shlex

import pytest

from repan_cli import cli, config

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
    file = given.pop("-c", None)
    layer = {cli.SHORTCUTS[option.removeprefix("--").replace("-", "_")]: value for option, value in given.items()}
    resolved = config.resolve(words[0], file, layer)
    assert resolved.source.startswith(f"{name},")


RELEASED = {
    "repvgg_cifar100_train": ("train", 160, 0.2, 2e-4, None, None),
    "repvgg_cifar10_train": ("train", 160, 0.2, 1e-4, None, None),
    "repvgg_cifar100_distill": ("distill", 160, 0.2, 2e-4, (0.1, 4), None),
    "repvgg_cifar100_cycle": ("cycle", 30, 0.75, 2e-4, (0.9, 10), (15, 5, True)),
    "repvgg_cifar10_cycle": ("cycle", 30, 0.75, 2e-4, (0.9, 10), (15, 20, True)),
    **{
        f"{block}_{data}_{command}": (command, *rest)
        for block in ("acb", "dbb")
        for data in ("cifar10", "cifar100")
        for command, *rest in (
            ("train", 160, 0.2, 1e-4, None, None),
            ("distill", 160, 0.2, 1e-4, (0.1, 4), None),
            ("cycle", 40, 0.2, 1e-4, (0.5, 4), (15, 20, False)),
        )
    },
}
"""Command, epochs, rate, decay, (alpha, temperature), (cycles, ramp, frozen trunk) as the method was released."""


@pytest.mark.parametrize("name", RELEASED)
def test_reference_presets_hold_the_released_settings(name):
    command, epochs, lr, decay, distillation, cycles = RELEASED[name]
    given = {"teacher.name": "teacher.pt"} if distillation else {}
    settings = config.resolve(command, f"reference/{name}", given).config
    assert (settings.epochs, settings.optim.lr, settings.optim.weight_decay) == (epochs, lr, decay)
    assert (settings.optim.momentum, settings.optim.min_lr, settings.optim.clip) == (0, 0, 10)
    assert (settings.optim.warmup_epochs, settings.optim.schedule, settings.data.batch_size) == (0, "cosine", 128)
    assert settings.optim.decay == ("weights" if cycles else "all")
    assert settings.optim.clip_params == ("convs" if cycles else "all")
    if distillation:
        assert (settings.teacher.alpha, settings.teacher.temperature) == distillation
    if cycles:
        assert (settings.cycle.count, settings.cycle.attach_epochs, settings.cycle.freeze_trunk) == cycles
        baseline = config.baseline_phase(settings)
        assert (baseline.epochs, baseline.optim.lr, baseline.optim.decay) == (160, 0.2, "all")
        released = RELEASED[name.replace("_cycle", "_train")]
        assert baseline.optim.weight_decay == released[3]
        assert baseline.teacher.name is None


@pytest.mark.parametrize("dataset", list(config.RECIPES))
def test_recipes_exist(dataset):
    assert config.RECIPES[dataset] in PRESETS
