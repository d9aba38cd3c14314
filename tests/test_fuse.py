"""Merging proves itself: right merges pass; wrong ones are refused, and nothing is written."""

import copy

import pytest
import torch
from support import randomize_norms, relative, run, small_net
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations

from repan_cli import export, models
from repan_cli.blocks import (
    FAMILIES,
    RepBlock,
    branches,
    kernel,
    rep_block,
    rep_blocks,
    reparameterize,
    set_attach_rate,
)
from repan_cli.errors import InputError, MergeError

X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_report_of_a_right_merge(family):
    model = small_net(family).train()
    set_attach_rate(model, 0.6)
    before = sum(p.numel() for p in model.parameters())
    fused, report = export.fuse(model, X)
    assert report.rel_error_fp64 < 1e-12
    assert 0 < report.rel_error_fp32 < 1e-4
    assert report.blocks == 22
    assert (report.params_before, report.params_after) == (before, sum(p.numel() for p in fused.parameters()))
    assert not fused.training
    assert model.training
    assert len(list(rep_blocks(model))) == 22


def wrong_padding(kernel, size, offset):
    return right_embed(kernel, size, (0, 0))


right_embed = kernel.embed


WRONG = {
    "a small kernel at another tap": lambda patch: patch.setattr(branches, "embed", wrong_padding),
    "the attach rate forgotten": lambda patch: patch.setattr(
        RepBlock, "equivalent_kernel", lambda block: _sum(block, rate=1.0)
    ),
    "a branch forgotten": lambda patch: patch.setattr(
        RepBlock, "equivalent_kernel", lambda block: _sum(block, rate=block.attach_rate.item(), branches=1)
    ),
    "the bias forgotten": lambda patch: patch.setattr(
        RepBlock, "equivalent_kernel", lambda block: (_sum(block, 0.6)[0], _sum(block, 0.6)[1] * 0)
    ),
}


def _sum(block, rate, branches=99):
    weight, bias = block.trunk.equivalent_kernel()
    for side in block.branches[:branches]:
        more, extra = side.equivalent_kernel()
        weight, bias = weight + rate * more, bias + rate * extra
    return weight, bias


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_merge_is_refused(wrong, monkeypatch):
    model = small_net()
    set_attach_rate(model, 0.6)
    WRONG[wrong](monkeypatch)
    with pytest.raises(MergeError, match="merging changed the function at stages"):
        export.fuse(model, X)


def test_the_sum_that_wrong_merges_are_made_of_is_right(monkeypatch):
    model = small_net()
    set_attach_rate(model, 0.6)
    monkeypatch.setattr(RepBlock, "equivalent_kernel", lambda block: _sum(block, block.attach_rate.item()))
    assert export.fuse(model, X)[1].rel_error_fp64 < 1e-12


def test_a_network_that_is_not_finite_is_refused():
    model = small_net()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="'head.weight' holds values that are not finite"):
        export.fuse(model, X)


class Repeats(nn.Module):
    """Layers that are called twice in a pass: by a mirrored image, or in a row; the norm may differ in each."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.how = how

    def forward(self, x):
        if self.how == "mirrored":
            found = self.norm(self.conv(x)) - self.norm(self.conv(x.flip(-1))).flip(-1)
        elif self.how == "in a row":
            found = self.norm(self.conv(torch.relu(self.norm(self.conv(x)))))
        elif self.how == "two norms":
            found = self.other(self.conv(torch.relu(self.norm(self.conv(x)))))
        else:
            found = self.norm(self.conv(torch.relu(self.norm(x))))
        return found


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("mirrored", {"other": "the forward pass does not reach it"}),
        ("in a row", {"other": "the forward pass does not reach it"}),
        ("two norms", dict.fromkeys(("norm", "other"), "its convolution cannot absorb it: its BN is shared")),
        (
            "one norm elsewhere",
            {
                "norm": "its convolution cannot absorb it: its BN is shared",
                "other": "the forward pass does not reach it",
            },
        ),
    ],
)
def test_a_convolution_that_is_called_twice_absorbs_the_norm_that_always_follows(how, left):
    torch.manual_seed(0)
    model = randomize_norms(nn.Sequential(Repeats(how), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    fused, report = export.fuse(model, X)
    assert report.folded == 3 - len(left)
    assert {name.removeprefix("0."): why for name, why in report.left.items()} == left
    assert relative(fused(X), model(X)) < 1e-5


class Standardized(nn.Conv2d):
    """Its kernel has the same scale whatever its weights are, so it cannot absorb a factor."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


class Flipped(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.flip(-1), self.bias)


@pytest.mark.parametrize(
    ("conv", "folds"),
    [
        (Conv2dSame(3, 8, 3, stride=2, bias=False), True),
        (Conv2dSame(3, 8, 5, stride=3, groups=1, dilation=2), True),
        (nn.Sequential(Conv2dSame(3, 8, 1, stride=2, bias=False)), True),
        (Flipped(3, 8, (1, 3)), True),
        (Standardized(3, 8, 3), False),
    ],
)
def test_convolutions_of_other_types_absorb_a_norm_if_the_proof_says_so(conv, folds, tmp_path):
    torch.manual_seed(0)
    model = randomize_norms(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)))
    model.eval()
    fused, report = export.fuse(model, X)
    assert report.folded == 1 + folds
    assert [*report.left.values()] == ([] if folds else ["as one convolution it changes the network's function"])
    for image in (X, X[..., :31, :30]):
        assert relative(fused(image), model(image)) < 1e-5
    if folds:
        assert {type(part) for part in conv.modules()} <= {type(part) for part in fused.modules()}
        plain = copy.deepcopy(model)
        again = reparameterize(models.apply(plain, fused.repan_report.changes))  # as when a file is opened
        again.load_state_dict(fused.state_dict())
        assert torch.equal(again(X), fused(X))


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("conv", "norm", "why"),
    [
        (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), "its BN keeps no running statistics"),
        (nn.Conv2d(3, 8, 3), Own(8), "its norm is a Own"),
        (parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), "it is a ParametrizedConv2d"),
        (nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), "it is a ConvTranspose2d"),
    ],
)
def test_a_norm_that_stays_is_reported_with_the_reason(conv, norm, why):
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).eval()
    _, report = export.fuse(model, X)
    assert report.folded == 1
    assert report.left.keys() == {"1"}
    assert report.left["1"].startswith(f"its convolution cannot absorb it: {why}")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_norm_folds_whatever_the_padding(mode):
    """Padding 'same' of an even kernel is larger on one side, which rules out branches, not folding."""
    conv = nn.Conv2d(3, 8, (2, 4), padding="same", padding_mode=mode, bias=False)
    model = randomize_norms(nn.Sequential(conv, nn.BatchNorm2d(8))).eval()
    fused, report = export.fuse(model, X)
    assert (report.folded, report.left) == (1, {})
    assert relative(fused(X), model(X)) < 1e-5


def test_a_plain_network_has_nothing_to_merge():
    with pytest.raises(InputError, match="nothing to merge"):
        export.fuse(rep_block.reparameterize(small_net()), X)


def test_the_command_writes_nothing_when_the_proof_fails(capsys, few_blocks, small_run, tmp_path, monkeypatch):
    """A wrong merge: exit 1, a line that names the layer, no file."""
    out = tmp_path / "fused.pt"
    words = ["fuse", small_run.folder / "last.pt", "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(branches, "embed", wrong_padding)
        code, _, err = run(capsys, *words)
    assert code == 1
    assert "Error: merging changed the function at stages" in err
    assert not out.exists()
    code, _, err = run(capsys, *words)
    assert code == 0, err
    assert out.exists()
