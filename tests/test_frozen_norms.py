"""Norms with fixed statistics fold like BN, whoever wrote them; those that look at the images never do."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support import card_of, relative, run
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import repan_cli
from repan_cli import checkpoint, export, models
from repan_cli.blocks import rep_blocks
from repan_cli.errors import InputError
from repan_cli.export.conv_bn import as_plain
from repan_cli.models.expand import expand
from repan_cli.models.norms import activation_of

X = torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(0))


class AuthorsFrozen(nn.Module):
    """A frozen BN as DETR has it: its eps is in its forward alone."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self._eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = (self.weight * (self.running_var + self._eps).rsqrt()).view(1, -1, 1, 1)
        return x * scale + self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale


class AlwaysTrains(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)


class OfBatch(nn.Module):
    """Normalizes by its batch, although it keeps statistics."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        norm = self.norm
        return F.batch_norm(x, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias, True)


FIXED = {
    "torchvision": FrozenBatchNorm2d,
    "torchvision, another eps": lambda channels: FrozenBatchNorm2d(channels, eps=0.1),
    "timm": FrozenBatchNormAct2d,
    "timm, without activation": lambda channels: FrozenBatchNormAct2d(channels, apply_act=False),
    "timm, trainable": BatchNormAct2d,
    "an author's": AuthorsFrozen,
    "synchronized": nn.SyncBatchNorm,
    "lazy": lambda channels: nn.LazyBatchNorm2d(),
    "not affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "instance norm": lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
    "instance norm, not affine": lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True),
}
OF_IMAGES = {
    "no statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "instance norm": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group norm": lambda channels: nn.GroupNorm(2, channels),
    "never evaluates": AlwaysTrains,
    "by the batch": OfBatch,
}


class Net(nn.Module):
    """A convolution with one norm, a sum of two branches with another, and a BN of PyTorch's."""

    def __init__(self, make):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), make(8)
        self.wide, self.thin, self.both = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), make(8)
        self.last, self.plain = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.both(self.wide(x) + self.thin(x)))
        return self.plain(self.last(x)).mean((2, 3))


def net(make):
    torch.manual_seed(0)
    model = Net(make)
    model(X)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "norm.weight", "both.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_()
    return model.eval()


@pytest.mark.parametrize("name", FIXED)
def test_fixed_statistics_fold(name):
    model = net(FIXED[name])
    before = copy.deepcopy(model.state_dict())
    fused, report = export.fuse(model, X)
    behind_sum = len(activation_of(model.both))  # else it belongs to the sum
    assert (report.blocks, report.folded, report.left) == (1, 2 + behind_sum, {})
    assert 0 < report.rel_error_fp64 < 1e-13
    assert relative(fused(X), model(X)) < 1e-5
    names = [type(module).__name__ for module in fused.modules()]
    assert names.count("Conv2d") == 3
    assert not any("Norm" in each for each in names)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", OF_IMAGES)
def test_statistics_of_the_images_stay(name):
    model = net(OF_IMAGES[name])
    fused, report = export.fuse(model, X)
    assert report.folded == 1
    assert (fused.last.bias is not None, type(fused.plain)) == (True, nn.Identity)
    assert relative(fused(X), model(X)) < 1e-5
    assert type(fused.norm).__name__ == type(model.norm).__name__


def test_a_frozen_norm_with_a_formula_of_its_own_stays():
    model = net(lambda channels: AuthorsFrozen(channels, eps=0.1))
    fused, report = export.fuse(model, X)
    assert report.folded == 1
    assert isinstance(fused.norm, AuthorsFrozen)
    assert report.left["conv"] == "as one convolution it changes the network's function"
    assert relative(fused(X), model(X)) < 1e-5


def test_a_norm_that_has_seen_no_images_is_named():
    model = Net(lambda channels: nn.LazyBatchNorm2d())
    with pytest.raises(InputError, match="norm"):
        export.fuse(model, X)


def test_blocks_that_train_leave_frozen_norms_as_they_are():
    model = net(FrozenBatchNorm2d)
    expected = model(X)
    expand(model, images=X)
    assert len(list(rep_blocks(model))) == 2
    assert isinstance(model.norm, FrozenBatchNorm2d)
    assert relative(model(X), expected) < 1e-5
    fused, report = export.fuse(model, X)
    assert (report.blocks, report.folded, report.left) == (2, 2, {})
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in fused.modules())
    assert report.rel_error_fp64 < 1e-13
    assert relative(fused(X), expected) < 1e-5


FILE = """
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from timm.layers import BatchNormAct2d

class Frozen(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), FrozenBatchNorm2d(8)
        self.wide, self.thin, self.both = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), BatchNormAct2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.head(self.both(self.wide(x) + self.thin(x)).mean((2, 3)))

def build(num_classes, in_chans):
    return Frozen(num_classes)
"""


@pytest.mark.parametrize("block", [None, "repvgg"])
def test_a_network_of_ones_own_is_fused_and_opened_again(tmp_path, capsys, block):
    (tmp_path / "net.py").write_text(FILE)
    name = f"{tmp_path / 'net.py'}:build"
    model = models.create(name, num_classes=3, in_chans=3).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias")):
            tensor.normal_()
    given = tmp_path / "given.pt"
    if block:
        expand(model, block, images=X)
        checkpoint.save(checkpoint.capture(model, card_of(model, name, classes=("a", "b", "c"))), given)
    else:
        torch.save(model.state_dict(), given)
    code, out, err = run(capsys, "fuse", given, "--model", name, "--out", tmp_path / "out.pt", "--json")
    assert code == 0, err
    assert json.loads(out)["folded"] == 2
    back = repan_cli.load(tmp_path / "out.pt", name)
    assert relative(back(X), model(X)) < 1e-5


def test_a_frozen_network_is_merged_in_its_own_layout():
    model = net(FrozenBatchNorm2d)
    plain = nn.Sequential(model.conv, model.norm)
    fused, report = export.fuse(plain, X)
    back = as_plain(fused, copy.deepcopy(plain))
    assert report.folded == 1
    assert isinstance(back[1], FrozenBatchNorm2d)
    assert relative(back(X), plain(X)) < 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("freeze", [False, True])
def test_detectors_backbones_fold(freeze):
    torch.manual_seed(0)
    if freeze:
        backbone = freeze_batch_norm_2d(torchvision.models.resnet18(weights=None))
    else:
        backbone = torchvision.models.resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d | FrozenBatchNormAct2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.uniform_(0.5, 1.5)
    _, report = export.fuse(backbone, torch.randn(2, 3, 64, 64))
    assert (report.folded, report.left) == (20, {})
    assert report.rel_error_fp64 < 1e-12
