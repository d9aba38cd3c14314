"""The callback for Hugging Face's Trainer: restarts keep the function, merging is exact, a resumed run is the same."""

import pytest
import torch
from torch import nn

import repan_cli
from repan_cli.blocks import rep_blocks
from repan_cli.errors import InputError

transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
pytest.importorskip("accelerate", reason="needs the extra transformers")

from repan_cli.integrations.transformers import RepanCallback  # noqa: E402

SOAK = pytest.mark.soak
pytestmark = pytest.mark.filterwarnings("ignore")  # of the Trainer's own


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))
        repan_cli.expand(self.net, "repvgg", images=torch.randn(2, 1, 8, 8), attach="one")
        self.rates = []

    def forward(self, pixel_values, labels):
        self.rates.append(float(next(rep_blocks(self.net))[1].attach_rate))
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture(scope="module")
def rows(digits):
    look = torch.from_numpy(digits.train.images[:256]).float() / 255
    images = (look.permute(0, 3, 1, 2) - digits.mean[0]) / digits.std[0]
    labels = torch.from_numpy(digits.train.labels[:256]).long()
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def trainer(folder, model, rows, callback, **options):
    usual = {"num_train_epochs": 3, "save_strategy": "no", "learning_rate": 0.01, "optim": "adamw_torch"}
    quiet = {"disable_tqdm": True, "report_to": [], "logging_strategy": "no", "use_cpu": True}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=64, seed=1, **quiet, **{**usual, **options}
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback])


@pytest.mark.parametrize("settings", [pytest.param({}, marks=SOAK), {"attach": "ramp", "momentum": "carry"}])
def test_restarts_keep_the_function_and_merging_is_exact(tmp_path, rows, settings):
    callback, model = RepanCallback([1, 2], network="net", calibration_images=128, **settings), Classifier()
    trainer(tmp_path, model, rows, callback).train()
    assert [(each.epoch, each.blocks) for each in callback.restarts] == [(1, 1), (2, 1)]
    assert all(each.logit_error < 1e-5 for each in callback.restarts)
    images = torch.stack([row["pixel_values"] for row in rows])
    assert repan_cli.fuse(model.net, images)[1].rel_error_fp64 < 1e-10
    ramp = [step / 20 for step in range(4)]
    assert model.rates == pytest.approx([1.0] * 4 + (ramp * 2 if settings else [1.0] * 8))


@pytest.mark.parametrize(
    ("step", "restored"),
    [(6, True), *(pytest.param(*each, marks=SOAK) for each in ((4, True), (4, False), (6, False)))],
)
def test_a_run_that_resumes_is_the_same_to_the_bit(tmp_path, rows, step, restored):
    """From the end of an epoch (step 4) the restart that comes next is done, from the midst (6) none is done again."""
    settings = {"network": "net", "attach": "ramp", "attach_epochs": 1.5}
    saves = {"save_strategy": "steps", "save_steps": step}
    whole = Classifier()
    trainer(tmp_path / "a", whole, rows, RepanCallback([1, 2], **settings), **saves).train()
    rest, callback = Classifier(), RepanCallback([1, 2], **settings)
    options = {"restore_callback_states_from_checkpoint": restored}
    again = trainer(tmp_path / "b", rest, rows, callback, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    (callback,) = [each for each in again.callback_handler.callbacks if isinstance(each, RepanCallback)]
    assert [each.epoch for each in callback.restarts] == ([1, 2] if step == 4 else [2])
    for name, value in whole.net.state_dict().items():
        assert torch.equal(rest.net.state_dict()[name], value), name


def test_a_model_of_the_hub_s_library_works(tmp_path, rows):
    """Its outputs are mappings, and its images have a name."""
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=10, layer_type="basic"
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows[:8]])}
    repan_cli.expand(model, "repvgg", images=batch, attach="zero-gamma")
    callback = RepanCallback([1])
    trainer(tmp_path, model, rows, callback, num_train_epochs=2).train()
    assert callback.restarts[0].blocks > 2
    assert callback.restarts[0].logit_error < 1e-4
    expected = model.eval()(**batch).logits
    merged = repan_cli.reparameterize(model)(**batch).logits
    torch.testing.assert_close(merged, expected, rtol=1e-3, atol=1e-4)


def test_a_model_without_blocks_is_refused_before_the_first_step(tmp_path, rows):
    model = Classifier()
    repan_cli.reparameterize(model.net)
    with pytest.raises(InputError, match="call repan_cli.expand on it before"):
        trainer(tmp_path, model, rows, RepanCallback([1], network="net")).train()
