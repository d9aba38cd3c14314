"""Every shipped preset loads, says what it is, and names a command that means it."""

import json
import re
import shlex

import pytest
from support import run

from repan_cli import checkpoint, config
from repan_cli.commands import dry_run
from repan_cli.commands.declaration import Option, declared
from repan_cli.commands.options import CycleOptions
from repan_cli.data import builtin
from repan_cli.session.build import prepare

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


def test_the_list_shows_the_whole_first_sentence_of_a_preset(capsys):
    _, out, _ = run(capsys, "list", "presets", "--json")
    told = json.loads(out)
    assert told["reference/cifar_cycle"].endswith("test set: here the validation part chooses that epoch.")
    assert all(text.endswith(".") for text in told.values())


@pytest.mark.parametrize("name", list(PRESETS))
def test_the_command_in_its_header_uses_it(name):
    words = shlex.split(re.search(r"^# Command +repan (.+)$", PRESETS[name].read_text(), re.M)[1])
    options = [word for word in words[1:] if "=" not in word and word != "--pretrained"]
    given = dict(zip(options[::2], options[1::2], strict=True))
    file = given.pop("-c", None)
    keys = {flag: how.setting for *_, how, _ in declared(CycleOptions) if isinstance(how, Option) for flag in how.flags}
    layer = {keys[option]: value for option, value in given.items()}
    resolved = config.resolve(words[0], file, layer)
    assert resolved.source.partition(",")[0] == name


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
        assert (settings.cycle.schedule, settings.cycle.attach, settings.cycle.rule) == ("restart", "ramp", "running")
        baseline = config.baseline_phase(settings)
        assert (baseline.epochs, baseline.optim.lr, baseline.optim.decay) == (160, 0.2, "all")
        released = RELEASED[name.replace("_cycle", "_train")]
        assert baseline.optim.weight_decay == released[3]
        assert baseline.teacher.name is None


IMAGENET = {
    "repvgg_imagenet_train": ("train", 0.2, 128, None, None),
    "repvgg_imagenet_distill": ("distill", 0.2, 128, (0.1, 1), None),
    "repvgg_imagenet_cycle": ("cycle", 0.1, 1024, (0.1, 1), ("one", 0.2)),
    "dbb_imagenet_train": ("train", 0.1, 128, None, None),
    "dbb_imagenet_distill": ("distill", 0.1, 128, (0.5, 1), None),
    "dbb_imagenet_cycle": ("cycle", 0.3, 1024, (0.1, 1), ("ramp", 0.1)),
    "acb_imagenet_train": ("train", 0.1, 128, None, None),
    "acb_imagenet_distill": ("distill", 0.1, 128, (0.5, 1), None),
}
"""Command, rate, batch, (alpha, temperature), (attach, rate of the baseline)."""


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_presets_hold_the_released_settings(name):
    command, lr, batch_size, distillation, cycles = IMAGENET[name]
    settings = config.resolve(command, f"reference/{name}", {}).config
    assert (settings.epochs, settings.optim.lr, settings.data.batch_size) == (120, lr, batch_size)
    assert (settings.optim.weight_decay, settings.optim.momentum, settings.optim.clip) == (3e-5, 0, None)
    assert (settings.optim.label_smoothing, settings.data.augment, settings.data.val_fraction) == (
        0.1,
        "autoaugment",
        0,
    )
    if distillation:
        assert settings.teacher.name == "timm:efficientnet_b4"
        assert (settings.teacher.alpha, settings.teacher.temperature) == distillation
    if cycles:
        assert (settings.cycle.count, settings.cycle.rule, settings.cycle.start_from) == (3, "running", "last")
        assert (settings.cycle.attach, config.baseline_phase(settings).optim.lr) == cycles
        assert settings.cycle.attach == "one" or settings.cycle.attach_epochs == 40
        assert config.baseline_phase(settings).epochs == 120


def small_teacher(tmp_path, classes, size):
    """A file of a teacher that knows the classes of synthetic data."""
    layer = {"data.name": "synthetic", "data.classes": str(classes), "data.image_size": str(size), "epochs": "1"}
    given = {**layer, "model.name": "repvgg_a0_cifar", "data.workers": "0", "data.val_fraction": "0"}
    session = prepare("train", config.resolve("train", None, given))
    checkpoint.save(checkpoint.capture(session.training.model, session.card(cycle=0, epoch=1, metrics={})), tmp_path)
    return str(tmp_path)


@pytest.mark.presets
@pytest.mark.parametrize("name", [*RELEASED, *IMAGENET, "recipes/imagenet", "recipes/cifar", "recipes/folder"])
def test_a_preset_builds_its_network_and_makes_steps(name, tmp_path, monkeypatch, capsys):
    """On noise of the right shape and number of classes; ImageNet's at 64 pixels, in batches of 8."""
    monkeypatch.setattr(builtin, "MOST_NOISE", 24)
    command = name.rpartition("_")[2] if "_" in name else "cycle"
    large, classes = "imagenet" in name, 1000 if "imagenet" in name else 100 if "cifar100" in name else 10
    size = 64 if large else 32
    given = {"data.name": "synthetic", "data.classes": str(classes), "data.image_size": str(size), "data.workers": "0"}
    given |= {"data.batch_size": "8", "data.val_fraction": "0", "cycle.calibration_images": "8"}
    given |= {"data.crop": "resized"} if large else {}
    if command != "cycle":
        given.pop("cycle.calibration_images")
    if "/" in name:
        given["model.name"] = "timm:resnet18" if large else "repvgg"
    if command != "train" and "/" not in name:
        given["teacher.name"] = small_teacher(tmp_path / "teacher.pt", classes, size)
    if "cifar" in name and command == "cycle" and "/" not in name:
        given["cycle.start_from"] = "last"
    file = name if "/" in name else f"reference/{name}"
    dry_run.run(command, config.resolve(command, file, given), as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["blocks"]
    assert facts["rel_error_fp64"] < 1e-10
    assert facts["steps_per_epoch"] >= 2
    if command == "cycle" and name != "repvgg_imagenet_cycle":  # where fresh branches come in at once, as released
        assert facts["logits_moved"] < 1e-3


@pytest.mark.parametrize("dataset", list(config.RECIPES))
def test_recipes_exist(dataset):
    assert config.RECIPES[dataset] in PRESETS
