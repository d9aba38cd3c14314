"""ACNet's and DBB's blocks, as their authors name and compute them, in the place of convolutions of any network."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support import randomize_norms, relative, run
from torch import nn

from repan_cli import models
from repan_cli.blocks import rep_blocks
from repan_cli.errors import InputError
from repan_cli.models.expand import expand
from repan_cli.models.merging import plan_merge
from repan_cli.session.artifact import open_artifact

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def gentle(model):
    randomize_norms(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


def like(conv, kernel_size=None, padding=None, **kwargs):
    shape = {"stride": conv.stride, "groups": conv.groups, "bias": False, **kwargs}
    return nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size or conv.kernel_size,
        padding=conv.padding if padding is None else padding,
        **shape,
    )


class Crossed(nn.Module):
    def __init__(self, conv):
        super().__init__()
        (height, width), (rows, columns) = conv.kernel_size, conv.padding
        self.square_conv, self.square_bn = like(conv), nn.BatchNorm2d(conv.out_channels)
        self.ver_conv = like(conv, (height, 1), (rows, columns - width // 2))
        self.hor_conv = like(conv, (1, width), (rows - height // 2, columns))
        self.ver_bn, self.hor_bn = nn.BatchNorm2d(conv.out_channels), nn.BatchNorm2d(conv.out_channels)

    def forward(self, x):
        others = self.ver_bn(self.ver_conv(x)) + self.hor_bn(self.hor_conv(x))
        return self.square_bn(self.square_conv(x)) + others


class NormThenPad(nn.Module):
    def __init__(self, channels, pixels):
        super().__init__()
        self.bn, self.pixels = nn.BatchNorm2d(channels), pixels

    def forward(self, x):
        bn = self.bn
        p, border = self.pixels, bn.bias.detach() - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        y, border = F.pad(bn(x), [p] * 4), border.view(1, -1, 1, 1)
        if p:
            y[:, :, :p, :], y[:, :, -p:, :], y[:, :, :, :p], y[:, :, :, -p:] = border, border, border, border
        return y


class Residual1x1(nn.Conv2d):
    def __init__(self, channels, groups):
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        nn.init.normal_(self.weight, std=0.05)

    def forward(self, x):
        index = torch.arange(len(self.weight))
        identity = torch.zeros_like(self.weight)
        identity[index, index % self.weight.shape[1]] = 1
        return F.conv2d(x, self.weight + identity, groups=self.groups)


class Diverse(nn.Module):
    def __init__(self, conv):
        super().__init__()
        outputs, groups, (pixels, _) = conv.out_channels, conv.groups, conv.padding
        pool, size = (conv.kernel_size, conv.stride), conv.in_channels
        full = groups < outputs
        self.dbb_origin, self.dbb_avg, self.dbb_1x1_kxk = nn.Sequential(), nn.Sequential(), nn.Sequential()
        self.dbb_origin.add_module("conv", like(conv))
        self.dbb_origin.add_module("bn", nn.BatchNorm2d(outputs))
        if full:
            self.dbb_avg.add_module("conv", like(conv, 1, 0, stride=1))
            self.dbb_avg.add_module("bn", NormThenPad(outputs, pixels))
            self.dbb_1x1 = nn.Sequential()
            self.dbb_1x1.add_module("conv", like(conv, 1, 0))
            self.dbb_1x1.add_module("bn", nn.BatchNorm2d(outputs))
        self.dbb_avg.add_module("avg", nn.AvgPool2d(*pool, 0 if full else pixels))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(outputs))
        inner = size if full else 2 * size
        first = Residual1x1(size, groups) if full else nn.Conv2d(size, inner, 1, groups=groups, bias=False)
        self.dbb_1x1_kxk.add_module("idconv1" if full else "conv1", first)
        self.dbb_1x1_kxk.add_module("bn1", NormThenPad(inner, pixels))
        second = nn.Conv2d(inner, outputs, conv.kernel_size, conv.stride, groups=groups, bias=False)
        self.dbb_1x1_kxk.add_module("conv2", second)
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)
        return y + self.dbb_1x1(x) if hasattr(self, "dbb_1x1") else y


BLOCKS = {"acb": Crossed, "dbb": Diverse}
MERGED = {"acb": "fused_conv", "dbb": "dbb_reparam"}
NETWORKS = {
    "resnet10t": {"stem_width": 8, "channels": (8, 8, 16, 16)},
    "test_efficientnet": {},
    "mobilenetv3_small_050": {},
    "regnety_002": {},
}


def plain(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **NETWORKS[name])


def with_blocks(name, family):
    """The network with a block in the place of each larger convolution and the BN behind it."""
    model = plain(name)
    pairs = models.plan(model, X, family="plain", selection=models.Selection(exclude=())).changes
    chosen = [change for change in pairs if change.norm and max(model.get_submodule(change.name).kernel_size) > 1]
    for change in chosen:
        parent, _, leaf = change.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, BLOCKS[family](model.get_submodule(change.name)))
        parent, _, leaf = change.norm.rpartition(".")
        norm = model.get_submodule(change.norm)
        setattr(model.get_submodule(parent), leaf, getattr(norm, "act", nn.Identity()))
    return gentle(model), [change.name for change in chosen]


def authors_merge(model, names, part):
    """Each block as the one convolution, with a bias, that its authors leave."""
    fused, found = models.apply(copy.deepcopy(model), plan_merge(model, X).sums), {}
    for name, value in fused.state_dict().items():
        place = next((each for each in names if name.startswith(f"{each}.")), None)
        found[f"{place}.{part}.{name.rpartition('.')[2]}" if place else name] = value
    return found


CASES = [(name, family) for name in NETWORKS for family in BLOCKS]
SLOW = ("regnety_002", "mobilenetv3_small_050")
ROWS = [pytest.param(*case, marks=pytest.mark.soak) if case[0] in SLOW else case for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "family"), ROWS)
def test_the_authors_blocks_load_into_the_plain_network(name, family):
    model, names = with_blocks(name, family)
    assert len(names) > 5
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    found = plain(name).eval()
    models.load_foreign(found, weights, "theirs")
    assert relative(found(X), model(X)) < 1e-4
    found = plain(name).eval()
    models.load_foreign(found, authors_merge(model, names, MERGED[family]), "theirs")
    assert relative(found(X), model(X)) < 1e-4


@pytest.mark.parametrize(("name", "family"), ROWS)
def test_the_authors_blocks_load_into_blocks_of_their_family(name, family):
    """All branches are there, and train on."""
    model, names = with_blocks(name, family)
    found = expand(plain(name), family, images=X)
    models.load_foreign(found, model.state_dict(), "theirs")
    found.eval()
    blocks = dict(rep_blocks(found))
    assert set(names) <= set(blocks)
    assert all(block.attach_rate == 1 for block in blocks.values())
    assert relative(found(X), model(X)) < 1e-4
    assert blocks[names[0]].trunk.conv.weight.std() > 0


@pytest.mark.parametrize(
    ("eps", "into"),
    [(1e-3, "convs"), (0.1, "convs"), (0.1, "blocks"), pytest.param(0.1, "merged", marks=pytest.mark.soak)],
)
def test_the_networks_own_epsilon_counts_behind_the_authors_blocks(eps, into):
    model, names = with_blocks("resnet10t", "acb")
    weights = authors_merge(model, names, "fused_conv") if into == "merged" else model.state_dict()
    found = plain("resnet10t").eval()
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not name.startswith(tuple(names)):
            module.eps = eps
    if into == "blocks":
        expand(found, "acb", images=X)
    models.load_foreign(found, weights, "theirs")
    assert relative(found(X), model(X)) < 1e-4


def test_a_files_own_bn_behind_a_block_is_kept():
    model = gentle(plain("resnet10t"))
    conv, norm = model.layer1[0].conv1, model.layer1[0].bn1
    block = gentle(Crossed(conv))
    model.layer1[0].conv1 = block
    found = plain("resnet10t").eval()
    models.load_foreign(found, model.state_dict(), "theirs")
    assert relative(found(X), model(X)) < 1e-4
    assert torch.equal(found.layer1[0].bn1.weight, norm.weight)


def test_the_commands_take_the_authors_blocks(tmp_path, capsys, digits):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    model.layer1[0].conv1, model.layer1[0].bn1 = Diverse(model.layer1[0].conv1), nn.Identity()
    gentle(model)
    torch.save(model.state_dict(), tmp_path / "dbb.pth")
    network = open_artifact(str(tmp_path / "dbb.pth"), "timm:test_resnet").network
    assert relative(network(X), model(X)) < 1e-4
    code, out, err = run(capsys, "info", tmp_path / "dbb.pth", "--model", "timm:test_resnet", "--json")
    assert code == 0, err
    assert '"form": "multi-branch, the DBB authors\' names"' in out


def test_a_block_without_a_place_is_named(tmp_path):
    weights = {"layer9.0.conv1.dbb_origin.conv.weight": torch.zeros(64, 64, 3, 3), "conv1.weight": torch.zeros(3)}
    torch.save(weights, tmp_path / "dbb.pth")
    with pytest.raises(InputError, match="the file is multi-branch, the DBB authors' names"):
        open_artifact(str(tmp_path / "dbb.pth"), "timm:resnet18")
