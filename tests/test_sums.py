"""Sums of branches in any forward merge into one convolution; other sums are left alone, with the reason."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from support import randomize_norms, relative
from torch import nn

from repan_cli import export, models
from repan_cli.blocks.kernel import BatchNorm
from repan_cli.checkpoint.card import Change
from repan_cli.models import sums

C = 8


def conv(inputs=C, outputs=C, kernel=3, **kwargs):
    padding = kernel // 2 if isinstance(kernel, int) else 0
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": padding, "bias": False, **kwargs})


def conv_bn(inputs=C, outputs=C, kernel=3, **kwargs):
    return nn.Sequential(conv(inputs, outputs, kernel, **kwargs), nn.BatchNorm2d(outputs))


# ---------------------------------------------------------------------------------------------- blocks that merge


class VggLike(nn.Module):
    """As RepVGG's authors write it: k x k, 1x1, and an identity BN where the shape is kept."""

    def __init__(self, inputs=C, outputs=C, stride=1, groups=1):
        super().__init__()
        self.rbr_dense = conv_bn(inputs, outputs, stride=stride, groups=groups)
        self.rbr_1x1 = conv_bn(inputs, outputs, 1, stride=stride, groups=groups)
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.nonlinearity = nn.ReLU()

    def forward(self, inputs):
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.rbr_reparam(inputs))
        other = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + other)


class Plus(nn.Module):
    """Any branches, added in several ways."""

    def __init__(self, how, *branches):
        super().__init__()
        self.paths = nn.ModuleList(branches)
        self.how = how

    def forward(self, x):
        found = [path(x) for path in self.paths]
        if self.how == "sum":
            y = sum(found)
        elif self.how == "stack":
            y = torch.stack(found).sum(dim=0)
        elif self.how == "mean":
            y = torch.stack(found, 0).mean(0)
        elif self.how == "in place":
            y = found[0]
            for other in found[1:]:
                y += other
        else:
            y = found[0] - 0.5 * found[1]
            for other in found[2:]:
                y = torch.add(y, other)
        return torch.relu(y)


class Crossed(nn.Module):
    """As ACNet's authors write it, with crops where the padding is smaller than the kernel's half."""

    def __init__(self, kernel=3, padding=1, **kwargs):
        super().__init__()
        self.square_conv = conv(C, C, kernel, padding=padding, **kwargs)
        self.square_bn = nn.BatchNorm2d(C)
        self.crop = max(0, kernel // 2 - padding)
        rest = max(0, padding - kernel // 2)
        self.ver_conv = conv(C, C, (kernel, 1), padding=(padding, rest), **kwargs)
        self.hor_conv = conv(C, C, (1, kernel), padding=(rest, padding), **kwargs)
        self.ver_bn, self.hor_bn = nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x):
        columns = x[:, :, :, self.crop : -self.crop] if self.crop else x
        rows = x[:, :, self.crop : -self.crop, :] if self.crop else x
        square = self.square_bn(self.square_conv(x))
        return torch.relu(square + self.ver_bn(self.ver_conv(columns)) + self.hor_bn(self.hor_conv(rows)))


class NormThenPad(nn.Module):
    """As DBB's authors write it: around the map lies what the BN makes of zeros, assigned by hand."""

    def __init__(self, channels, pixels):
        super().__init__()
        self.bn, self.pixels = nn.BatchNorm2d(channels), pixels

    def forward(self, x):
        bn, p = self.bn, self.pixels
        border = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
        y, border = F.pad(bn(x), [p] * 4), border.view(1, -1, 1, 1)
        y[:, :, :p, :], y[:, :, -p:, :], y[:, :, :, :p], y[:, :, :, -p:] = border, border, border, border
        return y


class Residual1x1(nn.Conv2d):
    """As DBB's authors write it: the identity, a plain tensor, is added to the weight."""

    def __init__(self, channels, groups=1):
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        index = torch.arange(channels)
        self.id_tensor = torch.zeros_like(self.weight.data)
        self.id_tensor[index, index % (channels // groups)] = 1

    def forward(self, x):
        assert len(self.weight) == len(self.id_tensor)  # so that it cannot be traced
        return F.conv2d(x, self.weight + self.id_tensor.to(self.weight.device), None, groups=self.groups)


class Diverse(nn.Module):
    def __init__(self, kernel=3, stride=1, groups=1):
        super().__init__()
        half, rest = kernel // 2, {"stride": stride, "groups": groups}
        self.dbb_origin = conv_bn(kernel=kernel, **rest)
        self.dbb_1x1 = conv_bn(kernel=1, **rest)
        pool = nn.AvgPool2d(kernel, stride, 0)
        self.dbb_avg = nn.Sequential(conv(kernel=1, groups=groups), NormThenPad(C, half), pool, nn.BatchNorm2d(C))
        first = [Residual1x1(C, groups), NormThenPad(C, half)]
        self.dbb_1x1_kxk = nn.Sequential(*first, *conv_bn(kernel=kernel, padding=0, **rest))

    def forward(self, x):
        y = self.dbb_origin(x)
        y += self.dbb_1x1(x)
        y += self.dbb_avg(x)
        y += self.dbb_1x1_kxk(x)
        return torch.relu(y)


class Functional(nn.Module):
    """No layer but tensors: convolution, BN, pooling and padding by functions, padding first."""

    def __init__(self, stride=1):
        super().__init__()
        self.stride = stride
        self.big = nn.Parameter(torch.randn(C, C, 3, 3) / 5)
        self.small = nn.Parameter(torch.randn(C, C, 1, 1) / 5)
        self.register_buffer("mean", torch.randn(C))
        self.register_buffer("var", torch.rand(C) + 0.5)
        self.factor = nn.Parameter(torch.randn(C, 1, 1))

    def forward(self, x):
        inner = F.batch_norm(F.conv2d(x, self.small, padding=1), self.mean, self.var)
        y = F.avg_pool2d(inner, 3, self.stride) + F.conv2d(F.pad(x, (1, 1, 1, 1)), self.big, stride=self.stride)
        return F.relu(y * self.factor if self.stride == 1 else y)


class PadFirst(nn.Module):
    """All branches read the same padded, reflected images."""

    def __init__(self, dilation=1):
        super().__init__()
        self.pad = nn.ReflectionPad2d(dilation)
        self.a = conv_bn(padding=0, dilation=dilation)
        self.b = conv_bn(padding=0, dilation=dilation)
        self.shift = nn.Parameter(torch.randn(1, C, 1, 1))

    def forward(self, x):
        x = self.pad(x)
        return (self.a(x) + self.b(x) + self.shift).clamp(0, 6)


class Mixed(nn.Module):
    """Convolutions of several numbers of groups, with biases, and one BN after the sum."""

    def __init__(self):
        super().__init__()
        self.full, self.some = conv(bias=True), conv(groups=2)
        self.each = conv(groups=C, padding=0, bias=True)
        self.norm, self.act = nn.BatchNorm2d(C), nn.Hardswish()

    def forward(self, x):
        return self.act(self.norm(self.full(x) + self.some(x) + self.each(F.pad(x, (1, 1, 1, 1))) - x / 2))


class Pooled(nn.Module):
    def __init__(self, stride=2):
        super().__init__()
        self.path = conv_bn(stride=stride)
        self.pool, self.norm = nn.AvgPool2d(3, stride, 1), nn.BatchNorm2d(C)

    def forward(self, x):
        return torch.relu(self.path(x) + self.norm(self.pool(x)))


def narrow_then_wide():
    return nn.Sequential(conv(kernel=1, padding=1), nn.BatchNorm2d(C), *conv_bn(padding=0))


MERGING = {
    "repvgg": lambda: VggLike(),
    "repvgg, strided": lambda: VggLike(stride=2),
    "repvgg, groups": lambda: VggLike(groups=4),
    "repvgg, depthwise": lambda: VggLike(groups=C),
    "sum of three": lambda: Plus("sum", conv_bn(), conv_bn(), conv_bn(kernel=1)),
    "stack": lambda: Plus("stack", conv_bn(kernel=5), conv_bn(), nn.BatchNorm2d(C)),
    "mean of a stack": lambda: Plus("mean", conv_bn(kernel=5, stride=2), conv_bn(stride=2)),
    "in place": lambda: Plus("in place", conv_bn(kernel=7, groups=C), conv_bn(groups=C), nn.Identity()),
    "difference": lambda: Plus("minus", conv_bn(), conv_bn(kernel=1), nn.BatchNorm2d(C)),
    "1x1 then kxk": lambda: Plus("sum", conv_bn(), narrow_then_wide()),
    "acb": lambda: Crossed(),
    "acb, cropped": lambda: Crossed(padding=0),
    "acb, wide": lambda: Crossed(5, 3, stride=2),
    "acb, groups": lambda: Crossed(5, 1, groups=2),
    "dbb": lambda: Diverse(),
    "dbb, strided": lambda: Diverse(5, 2),
    "dbb, groups": lambda: Diverse(groups=2),
    "functional": lambda: Functional(),
    "functional, strided": lambda: Functional(2),
    "padded first": lambda: PadFirst(),
    "padded first, dilated": lambda: PadFirst(2),
    "mixed groups": lambda: Mixed(),
    "pooled": lambda: Pooled(),
    "pooled, stride 1": lambda: Pooled(1),
}


def net(*blocks):
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * C, 5))
    return randomize_norms(model).eval()


X = torch.randn(4, 3, 13, 11, generator=torch.Generator().manual_seed(0))


def left_of(fused, kind):
    return [name for name, module in fused.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", list(MERGING))
def test_a_sum_of_branches_becomes_one_convolution(name):
    torch.manual_seed(1)
    model = net(MERGING[name]())
    expected = model(X)
    fused, report = export.fuse(model, X)
    assert (report.blocks, report.folded, report.left) == (1, 1, {})
    assert report.rel_error_fp64 < 1e-12
    assert len(left_of(fused, nn.Conv2d)) == 2
    assert not left_of(fused, (BatchNorm, nn.AvgPool2d))
    assert relative(fused(X), expected) < 1e-4
    assert sum(change.kind == "merge" for change in fused.repan_report.changes) == 1
    assert relative(copy.deepcopy(fused)(X), expected) < 1e-4


# ---------------------------------------------------------------------------------------------- what must not merge


class TwoOutputs(nn.Module):
    """The output of one branch is used again."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), conv_bn(kernel=1)

    def forward(self, x):
        a = self.a(x)
        return torch.relu(a + self.b(x)) * torch.sigmoid(a)


class OtherStride(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(stride=2), conv_bn(kernel=1)

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x).mean((2, 3), keepdim=True))


class Between(nn.Module):
    """An activation inside of a branch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), nn.Sequential(*conv_bn(), nn.ReLU(), *conv_bn())

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x))


class TrainOnly(nn.Module):
    """The second branch is there in train mode alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), conv_bn(kernel=1)

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x) if self.training else self.a(x))


class PaddedNorm(nn.Module):
    """Zeros around what a BN returned: no convolution of the images."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), nn.Sequential(*conv_bn(kernel=1), *conv_bn())

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x))


class BatchStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), nn.BatchNorm2d(C, track_running_stats=False)

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x))


class Larger(nn.Module):
    """Depthwise k x k and a full 1x1: one convolution would be nine times the work."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(groups=C), conv_bn(kernel=1)

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x))


class OtherPadding(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(padding_mode="reflect"), conv_bn()

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x))


class BySize(nn.Module):
    """Decides by the size of the images, so that it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv_bn(), conv_bn(kernel=1)

    def forward(self, x):
        return torch.relu(self.a(x) + self.b(x)) if x.shape[-1] > 2 else x


LEFT = {
    "used twice": (TwoOutputs, {"3.a.0": "its sum stays: the output of one of its branches is also used elsewhere"}),
    "other stride": (OtherStride, {}),
    "activation between": (Between, {}),
    "train only": (TrainOnly, {"3.b.1": "the forward pass does not reach it"}),
    "zeros around a BN": (PaddedNorm, {}),
    "larger": (Larger, {"3.a.0": "its sum stays: one convolution would be larger (576 weights, not"}),
    "two paddings": (
        OtherPadding,
        {"3.a.0": "its sum stays: its branches pad in different ways: reflect, zeros"},
    ),
    "by size": (BySize, {"3": "a sum of branches stays: its forward cannot be traced: symbolically traced"}),
    "batch statistics": (BatchStatistics, {"3.b": "its input is not the output of a single convolution"}),
}


@pytest.mark.parametrize("name", list(LEFT))
def test_other_sums_are_left_alone_with_the_reason(name):
    make, left = LEFT[name]
    model = net(make())
    expected = model(X)
    fused, report = export.fuse(model, X)
    assert report.blocks == 0
    assert report.left.keys() == left.keys()
    for place, reason in left.items():
        assert report.left[place].startswith(reason)
    assert report.rel_error_fp64 < 1e-12
    assert relative(fused(X), expected) < 1e-4
    assert report.folded == sum(isinstance(m, BatchNorm) for m in model.modules()) - len(left_of(fused, BatchNorm))


# ---------------------------------------------------------------------------------------------- whole networks


class Flat(nn.Module):
    """A network that adds branches in its own forward, more than once."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = conv_bn(3), conv_bn(3, kernel=1), conv_bn(), nn.BatchNorm2d(C)
        self.head = nn.Linear(C, 5)

    def forward(self, x):
        x = torch.relu(self.a(x) + self.b(x))
        skip = x
        x = torch.relu(self.c(x) + self.d(x)) + skip
        return self.head(x.mean((2, 3)))


def test_a_network_that_adds_by_itself_is_returned_merged():
    torch.manual_seed(0)
    model = randomize_norms(Flat()).eval()
    fused, report = export.fuse(model, X)
    assert (report.blocks, report.folded, report.left) == (2, 0, {})
    assert {*fused.state_dict()} == {"a.0.weight", "a.0.bias", "c.0.weight", "c.0.bias", "head.weight", "head.bias"}
    assert fused.repan_report.changes == (Change("merge", "", "a.0"), Change("merge", "", "c.0"))
    assert relative(pickle.loads(pickle.dumps(fused))(X), model(X)) < 1e-5


class Asked(nn.Module):
    """A network that asks a part for an attribute, for something of a type of its own, or for a method."""

    def __init__(self, what):
        super().__init__()
        self.part, self.what, self.head = VggLike(3), what, nn.Linear(C, 5)
        self.part.width, self.part.sizes, self.part.loss = C, {"out": [C, 1.0]}, nn.MSELoss
        self.part.double_width = self.doubled
        self.other = VggLike()

    def doubled(self):
        return 2 * C

    def forward(self, x):
        found = self.other(self.part(x)).mean((2, 3))
        if self.what == "method":
            return self.head(found) * self.part.double_width()
        return self.head(found) * (self.part.sizes["out"][0] if self.what == "sizes" else self.part.width)


@pytest.mark.parametrize("what", ["width", "sizes", "method"])
def test_what_a_network_asks_of_its_parts_stays(what):
    torch.manual_seed(0)
    model = randomize_norms(Asked(what)).eval()
    fused, report = export.fuse(model, X)
    assert report.left.keys() == ({"part"} if what == "method" else set())
    assert all("has no attribute 'double_width'" in why for why in report.left.values())
    assert report.blocks == (1 if what == "method" else 2)
    assert relative(copy.deepcopy(fused)(X), model(X)) < 1e-5


class Chain(nn.Module):
    """Sums one directly after another, which are no sum together, because the later ones pad."""

    def __init__(self, length, norm):
        super().__init__()
        self.first = nn.ModuleList([conv(3 if not number else C) for number in range(length)])
        self.second = nn.ModuleList([conv(3 if not number else C, kernel=1) for number in range(length)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(C) if norm else nn.Identity() for _ in range(length)])

    def forward(self, x):
        for first, second, norm in zip(self.first, self.second, self.norms, strict=True):
            x = norm(first(x) + second(x))
        return x


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("length", [2, 3])
def test_sums_in_a_row_merge_one_by_one(length, norm):
    torch.manual_seed(0)
    model = randomize_norms(Chain(length, norm)).eval()
    fused, report = export.fuse(model, X)
    assert (report.blocks, report.left) == (length, {})
    assert len(fused.state_dict()) == 2 * length
    assert relative(fused(X), model(X)) < 1e-5


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = VggLike(3)

    def forward(self, x):
        return self.part(x) * self.part(x.flip(-1)).mean((2, 3), keepdim=True)


def test_a_sum_in_a_module_that_is_called_twice_merges():
    torch.manual_seed(0)
    model = randomize_norms(Twice()).eval()
    fused, report = export.fuse(model, X)
    assert (report.blocks, report.left) == (1, {})
    assert relative(fused(X), model(X)) < 1e-5


class Stacked(nn.Module):
    """A sum over a stack; with `keepdim` it has one dimension more, which is no sum of images."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.a, self.b, self.c, self.d = conv(), conv(), conv(), conv()
        self.args, self.kwargs = args, kwargs

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return torch.stack([self.d(y), self.c(y)]).sum(*self.args, **self.kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "merges"),
    [((0,), {}, 1), ((0, False), {}, 1), ((0, True), {}, 0), ((0,), {"keepdim": True}, 0), ((), {"dim": 0}, 1)],
)
def test_a_sum_over_a_stack_keeps_its_dimensions(args, kwargs, merges):
    module = Stacked(*args, **kwargs).eval()
    places = [each.place for each in sums.find(module, sums.trace(module))[0]]
    assert len(places) == 1 + merges


def test_the_same_module_merges_the_same_way_again():
    """As when a merged file is opened: the structure alone decides, whatever the weights are."""
    model = net(Diverse(), VggLike(), Functional())
    fused, _ = export.fuse(model, X)
    fresh = net(Diverse(), VggLike(), Functional())
    again = models.apply(randomize_norms(fresh, 7).eval(), fused.repan_report.changes)
    again = export.fuse(again, X)[0]
    again.load_state_dict(fused.state_dict())
    assert relative(again(X), fused(X)) == 0


def test_fastvits_token_mixers_merge_as_timm_merges_them(small_timm):
    token_mixers_merge_as_timm_merges_them("fastvit_t8")


@pytest.mark.soak
@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_s12"])
def test_token_mixers_of_whole_fastvits_merge_as_timm_merges_them(name):
    token_mixers_merge_as_timm_merges_them(name)


def token_mixers_merge_as_timm_merges_them(name):
    model = randomize_norms(timm.create_model(name, num_classes=10)).eval()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(2, 3, 64, 64)
    fused, report = export.fuse(model, x)
    assert report.left == {}
    assert not left_of(fused, BatchNorm)
    theirs = timm.utils.reparameterize_model(model)
    mixers = [key for key in theirs.state_dict() if "token_mixer.reparam_conv" in key]
    assert mixers
    for key in mixers:
        assert relative(fused.state_dict()[key], theirs.state_dict()[key]) < 1e-5
