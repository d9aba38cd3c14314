"""The callback for Lightning: restarts keep the function, merging is exact, a resumed run is the same to the bit."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import repan_cli
from repan_cli.blocks import rep_blocks
from repan_cli.errors import InputError
from repan_cli.system.seeding import generator_for

lightning = pytest.importorskip("lightning", reason="needs the extra lightning")

from repan_cli.integrations.lightning import RepanCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's own, about workers and loggers


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
    return repan_cli.expand(model, "repvgg", images=torch.randn(2, 1, 8, 8), attach="one")


class Classifier(lightning.LightningModule):
    def __init__(self, **settings):
        super().__init__()
        self.net = network()
        self.settings = {"lr": 0.1, "momentum": 0.9, **settings}
        self.rates = []

    def training_step(self, batch, number):
        self.rates.append(float(next(rep_blocks(self.net))[1].attach_rate))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), **self.settings)


@pytest.fixture(scope="module")
def images(digits):
    look = torch.from_numpy(digits.train.images[:256]).float() / 255
    return (look.permute(0, 3, 1, 2) - digits.mean[0]) / digits.std[0], torch.from_numpy(
        digits.train.labels[:256]
    ).long()


def loader(images):
    return DataLoader(TensorDataset(*images), batch_size=64, shuffle=True)


def trainer(folder, callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    torch.manual_seed(1)
    usual = {"max_epochs": 3, "enable_checkpointing": False, "devices": 1}
    return lightning.Trainer(default_root_dir=folder, callbacks=callbacks, **quiet, **{**usual, **options})


@pytest.mark.parametrize("settings", [{}, {"attach": "compensated"}, {"attach": "ramp", "momentum": "carry"}])
def test_restarts_keep_the_function_and_merging_is_exact(tmp_path, images, settings):
    callback, model = RepanCallback([1, 2], network="net", calibration_images=128, **settings), Classifier()
    trainer(tmp_path, [callback]).fit(model, loader(images))
    assert [(each.epoch, each.blocks) for each in callback.restarts] == [(1, 1), (2, 1)]
    assert all(each.logit_error < 1e-5 for each in callback.restarts)
    assert repan_cli.fuse(model.net, images)[1].rel_error_fp64 < 1e-10
    ramp = [step / 20 for step in range(4)]
    assert model.rates == pytest.approx([1.0] * 4 + (ramp * 2 if settings.get("attach") == "ramp" else [1.0] * 8))


def test_a_callback_serves_several_runs(tmp_path, images):
    callback, model = RepanCallback([1], network="net", calibration_images=64), Classifier()
    for runs in (1, 2):
        trainer(tmp_path, [callback], max_epochs=2).fit(model, loader(images))
        assert [each.epoch for each in callback.restarts] == [1] * runs


class Look(lightning.Callback):
    """Keeps what is there as an epoch begins."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.weights = {name: value.clone() for name, value in pl_module.net.state_dict().items()}
            memory = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
            self.memory = max(float(value.abs().max()) for value in memory)
            self.draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()


def test_it_is_the_restart_of_the_package_and_draws_nothing_from_the_loop(tmp_path, images):
    callback = RepanCallback([1], network="net", momentum="zero", calibration_images=256)
    before, after = Look(), Look()
    trainer(tmp_path, [before, callback, after], max_epochs=2).fit(Classifier(), loader(images))
    again = network()
    again.load_state_dict(before.weights)
    order = torch.randperm(256, generator=generator_for("calibration", 0, 1))
    batches = images[0][order].split(64)
    repan_cli.restart(again, images=batches, attach="zero-gamma", generator=generator_for("branches", 0, 1))
    assert all(torch.equal(value, after.weights[name]) for name, value in again.state_dict().items())
    assert not all(torch.equal(value, before.weights[name]) for name, value in again.state_dict().items())
    assert before.memory > 0
    assert after.memory == 0
    assert torch.equal(before.draws[0], after.draws[0])
    assert before.draws[1:] == after.draws[1:]


class SaveAt(lightning.Callback):
    """Saves the state in the midst of an epoch."""

    def __init__(self, file, epoch, number):
        self.file, self.place = file, (epoch, number)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, number):
        if (trainer.current_epoch, number) == self.place:
            trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_that_resumes_is_the_same_to_the_bit(tmp_path, images, epochs):
    """Lightning's checkpoint at the end of an epoch: the restart that comes next is neither lost nor done twice."""
    ordered = DataLoader(TensorDataset(*images), batch_size=64)
    settings = {"network": "net", "attach": "ramp", "attach_epochs": 1.5, "momentum": "carry"}
    whole = Classifier()
    trainer(tmp_path, [RepanCallback([1, 2], **settings)]).fit(whole, ordered)
    first, part = RepanCallback([1, 2], **settings), Classifier()
    begun = trainer(tmp_path, [first], max_epochs=epochs)
    begun.fit(part, ordered)
    begun.save_checkpoint(tmp_path / "a.ckpt")
    second, rest = RepanCallback([1, 2], **settings), Classifier()
    trainer(tmp_path, [second]).fit(rest, ordered, ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert [each.epoch for each in (*first.restarts, *second.restarts)] == [1, 2]
    assert second.done == [1, 2]
    for name, value in whole.net.state_dict().items():
        assert torch.equal(rest.net.state_dict()[name], value), name


def test_a_state_from_the_midst_of_an_epoch_restarts_nothing_again(tmp_path, images):
    file, first, second = (
        tmp_path / "a.ckpt",
        RepanCallback([1, 2], network="net"),
        RepanCallback([1, 2], network="net"),
    )
    trainer(tmp_path, [first, SaveAt(file, 1, 1)], max_epochs=2).fit(Classifier(), loader(images))
    trainer(tmp_path, [second]).fit(Classifier(), loader(images), ckpt_path=file, weights_only=False)
    assert [each.epoch for each in first.restarts] == [1]
    assert [each.epoch for each in second.restarts] == [2]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rule": "calibrat"}, "rule='calibrat' is not a choice; did you mean calibrate?"),
        ({"momentum": "keep"}, "momentum='keep' is not a choice: carry, zero"),
        ({"epochs": []}, "give the epochs"),
        ({"epochs": [-1]}, "give the epochs"),
        ({"calibration_images": 1}, "calibration_images must be at least 2"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        RepanCallback(**{"epochs": [1], **settings})


def test_a_model_without_blocks_is_refused_before_the_first_step(tmp_path, images):
    model = Classifier()
    with pytest.raises(InputError, match="network='nett': the model has no such module; did you mean net"):
        trainer(tmp_path, [RepanCallback([1], network="nett")]).fit(model, loader(images))
    repan_cli.reparameterize(model.net)
    with pytest.raises(InputError, match="call repan_cli.expand on it before"):
        trainer(tmp_path, [RepanCallback([1], network="net")]).fit(model, loader(images))
    assert model.rates == []
