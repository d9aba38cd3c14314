"""Any network becomes multi-branch without changing its function; the rest is left alone, with the reason."""

import copy
import functools
import itertools
import random
from collections import OrderedDict

import pytest
import timm
import torch
from support import card_of, randomize_norms, relative
from timm.layers import BatchNormAct2d, DropPath
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations

import repan_cli
from repan_cli import checkpoint, export, models
from repan_cli.anneal.restart import restart
from repan_cli.blocks import FAMILIES, make_block, rep_blocks, reparameterize, set_attach_rate
from repan_cli.errors import InputError
from repan_cli.export.conv_bn import as_plain
from repan_cli.models import mobilenet_cifar, repvgg_cifar
from repan_cli.models.changes import Change, Selection
from repan_cli.models.expand import expand, plan
from repan_cli.models.repvgg_cifar import DEPTHS_A

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def conv(inputs: int = 3, outputs: int = 8, kernel: int = 3, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **{"bias": False, **kwargs})


def net(**layers: nn.Module) -> nn.Module:
    """Layers in a row, pooled; random BN."""
    torch.manual_seed(0)
    parts = {**layers, "pool": nn.AdaptiveAvgPool2d(2), "flatten": nn.Flatten()}
    return randomize_norms(nn.Sequential(OrderedDict(parts))).double().eval()


def left(model: nn.Module, name: str, family: str = "repvgg", images: torch.Tensor = X) -> str:
    """Why a layer is left alone."""
    return plan(model, images, family=family, selection=Selection()).left[name]


# ---------------------------------------------------------------------------------------------- every geometry


def geometries(count: int) -> list[tuple]:
    """Random single layers: kernel, stride, padding, dilation, groups, C_out / C_in, mode, bias and BN, attach rate."""
    draw = random.Random(0)
    modes = ["zeros", "zeros", "reflect", "replicate", "circular"]
    rows = []
    for _ in range(count):
        kernel, padding = (draw.randint(1, 7), draw.randint(1, 7)), (draw.randint(0, 6), draw.randint(0, 6))
        if draw.random() < 0.5:
            kernel, padding = (kernel[0],) * 2, (padding[0],) * 2
        if draw.random() < 0.05:
            padding = "same"
        stride = 1 if padding == "same" else draw.randint(1, 3)
        rows.append(
            (
                kernel,
                stride,
                padding,
                draw.randint(1, 3),
                draw.choice([1, 2, 4]),
                draw.choice([1, 2]),
                draw.choice(modes),
                *draw.choice([(False, True), (True, True), (True, False), (False, False)]),
                draw.choice([0.0, 0.3, 1.0]),
            )
        )
    return rows


@pytest.mark.parametrize("count", [25, pytest.param(160, marks=pytest.mark.soak)])
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_a_grid_of_layers_is_exact_or_refused_by_name(family, count, record_property):
    """Random layers, in the long tests 160 a family, 1,120 in all: expand, restart, attach, merge.

    Each step is exact to 1e-10 in float64.
    """
    refused = 0
    for row in geometries(count):
        kernel, stride, padding, dilation, groups, widen, mode, bias, norm, rate = row
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 4 * widen, kernel, stride, padding, dilation, groups, bias, mode)
        tail = {"norm": nn.BatchNorm2d(4 * widen)} if norm else {}
        model = randomize_norms(nn.Sequential(OrderedDict(layer=layer, **tail)), 1).double().eval()
        x = torch.randn(2, 4, 20, 19, dtype=torch.float64)
        expected = model(x)
        try:
            expand(model, family, images=x, kernel=tuple(range(1, 8)))
        except InputError as error:
            assert "layer: its padding 'same'" in str(error), row
            assert relative(model(x), expected) == 0
            refused += 1
            continue
        assert relative(model(x), expected) < 1e-10, row
        randomize_norms(model, 2)
        set_attach_rate(model, rate)
        expected = model(x)
        restart(model, images=[x])
        assert relative(model(x), expected) < 1e-10, row
        randomize_norms(model, 3)
        set_attach_rate(model, rate)
        expected = model(x)
        assert relative(reparameterize(model)(x), expected) < 1e-10, row
        assert not list(rep_blocks(model))
    assert refused < 8
    record_property("refused", refused)


# ---------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    "layers",
    [
        {"conv": conv(), "norm": nn.BatchNorm2d(8), "act": nn.ReLU()},
        {"conv": conv(bias=True), "norm": nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)},
        {"conv": conv(), "norm": nn.BatchNorm2d(8, affine=False)},
        {"conv": conv(), "norm": BatchNormAct2d(8)},
        {"conv": conv(), "norm": nn.SyncBatchNorm(8)},
    ],
    ids=["plain", "bias-eps-momentum", "not-affine", "with-activation", "synchronised"],
)
def test_a_conv_and_its_norm_become_a_block(layers):
    model = net(**layers)
    norm = layers["norm"]
    x, expected = X.double(), model(X.double())
    expand(model, images=X)
    block = model.conv
    assert relative(model(x), expected) < 1e-12
    assert block.trunk.conv is layers["conv"]
    assert (block.trunk.norm.eps, block.trunk.norm.momentum) == (norm.eps, norm.momentum)
    assert torch.equal(block.trunk.norm.running_mean, norm.running_mean)
    assert not isinstance(model.norm, nn.modules.batchnorm._BatchNorm)
    assert isinstance(model.norm, nn.ReLU) == isinstance(norm, BatchNormAct2d)
    assert model.repan_report.changes == (Change("expand", "conv", "norm", "repvgg"),)
    assert block.attach_rate == 1
    assert not any(branch.norm.weight.any() for branch in block.sides), "silent, and trained from the first step"
    restart(model, images=[x])
    assert relative(model(x), expected) < 1e-12


def test_a_norm_is_found_by_what_it_reads_not_by_name_or_order():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn2, self.conv2, self.bn1, self.conv1 = nn.BatchNorm2d(8), conv(8, 8), nn.BatchNorm2d(8), conv()

        def forward(self, x):
            return self.bn1(self.conv2(self.bn2(self.conv1(x)))).mean((2, 3))

    model = randomize_norms(Odd()).double().eval()
    expected = model(X.double())
    expand(model, images=X)
    assert {(change.name, change.norm) for change in model.repan_report.changes} == {("conv1", "bn2"), ("conv2", "bn1")}
    assert relative(model(X.double()), expected) < 1e-12


def test_a_conv_without_a_norm_becomes_a_block_without_one():
    for bias in (True, False):
        model = net(conv=conv(bias=bias), act=nn.GELU(), again=nn.Conv2d(8, 8, 3))
        expected = model(X.double())
        expand(model, images=X, attach="ramp")
        assert relative(model(X.double()), expected) < 1e-12
        assert not model.conv.trunk.has_norm
        set_attach_rate(model, 0.5)
        expected = model(X.double())
        restart(model)  # there is nothing to calibrate
        assert relative(model(X.double()), expected) < 1e-12


def test_trained_parameters_keep_their_storage_and_device():
    model = net(conv=conv(), norm=nn.BatchNorm2d(8)).float().to(memory_format=torch.channels_last)
    pointers = {p.data_ptr() for p in model.parameters()}
    expand(model, "dbb", images=X)
    assert pointers <= {p.data_ptr() for p in model.parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.conv.branches[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(module.training for module in model.modules())


class Shared(nn.Module):
    def __init__(self, twice: bool = False, tied: bool = False, raw: bool = False):
        super().__init__()
        self.stem, self.a, self.norm, self.b = conv(3, 8), conv(8, 8), nn.BatchNorm2d(8), conv(8, 8)
        self.twice, self.raw = twice, raw
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x):
        y = self.a(self.stem(x))
        z = self.norm(y) + (y if self.raw else 0)
        return self.b(self.a(z) if self.twice else z).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (Shared(twice=True), "a", "it is called 2 times"),
        (Shared(tied=True), "a", "it shares its weight with another layer"),
        (Shared(raw=True), "a", "as a block it changes the network's function"),
        (net(a=parametrizations.weight_norm(conv())), "a", "it is a ParametrizedConv2d"),
        (net(a=nn.ConvTranspose2d(3, 8, 3)), "a", "it is a ConvTranspose2d"),
        (net(a=nn.Conv2d(3, 8, 4, padding="same")), "a", "its padding 'same' is larger on one side"),
        (net(a=conv(), n=nn.BatchNorm2d(8, track_running_stats=False)), "a", "keeps no running statistics"),
        (net(a=conv(kernel=1)), "a", "not chosen: kernel 1x1"),
    ],
)
def test_other_convolutions_are_left_alone_with_the_reason(model, name, reason):
    model = model.double().eval()
    assert reason in left(model, name)
    expected = model(X.double())
    changes = plan(model, X, family="dbb", selection=Selection()).changes
    models.apply(model, changes)
    assert relative(model(X.double()), expected) < 1e-12
    assert name not in dict(rep_blocks(model))


def test_a_hook_may_do_anything_so_its_conv_is_left_alone():
    model = net(a=conv())
    model.a.register_forward_hook(lambda module, inputs, output: output.clamp_min(0))
    assert "it has hooks" in left(model, "a")


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_norm_with_hooks_is_no_part_of_a_block(register):
    """At attach rate 0 the hook acts as before; merged, it would be lost."""
    model = net(a=conv(), n=nn.BatchNorm2d(8))
    getattr(model.n, register)(lambda *_: None)
    assert left(model, "a") == "its BN has hooks"


class TwoNames(nn.Module):
    """A network whose layers have two names each; the forward pass uses the first, or the second."""

    def __init__(self, holder: str, first: bool):
        super().__init__()
        self.stem, self.norm = conv(), nn.BatchNorm2d(8)
        parts = [self.stem, self.norm]
        self.kept = {
            "sequential": nn.Sequential(*parts),
            "list": nn.ModuleList(parts),
            "dictionary": nn.ModuleDict(dict(zip("ab", parts, strict=True))),
        }[holder]
        self.first = first

    def forward(self, x):
        parts = [self.stem, self.norm] if self.first else self.kept.children()
        for part in parts:
            x = part(x)
        return x.mean((2, 3))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("holder", ["sequential", "list", "dictionary"])
def test_a_layer_with_two_names_becomes_one_block_under_both(holder, first):
    model = randomize_norms(TwoNames(holder, first)).double().eval()
    expected = model(X.double())
    expand(model, images=X, attach="ramp")
    block, norm = model.kept.children()
    assert model.stem is block
    assert [name for name, _ in rep_blocks(model)] == ["stem"]
    assert isinstance(norm, nn.Identity)
    assert relative(model(X.double()), expected) < 1e-12
    set_attach_rate(model, 1.0)
    assert relative(model(X.double()), expected) > 1e-3  # so the branches are used
    fused, report = export.fuse(model, X)
    assert (report.blocks, report.folded, report.left) == (1, 0, {})
    assert {*fused.state_dict()} >= {"stem.weight", "stem.bias"}
    assert fused.stem is next(fused.kept.children())
    plain = as_plain(fused, TwoNames(holder, first).double())
    assert relative(plain(X.double()), fused(X).double()) < 1e-6


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_keeps_layers_with_two_names(tmp_path, suffix):
    model = randomize_norms(TwoNames("list", first=False)).eval()
    expand(model, "dbb", images=X, attach="ramp")
    set_attach_rate(model, 0.5)
    card = card_of(model, structure=model.repan_report.structure({}))
    checkpoint.save(checkpoint.capture(model, card), tmp_path / f"a{suffix}")
    again = models.load(tmp_path / f"a{suffix}", TwoNames("list", first=False))
    assert again.stem is again.kept[0]
    assert torch.equal(again(X), model(X))


def test_layers_keep_their_mode_precision_and_gradients():
    """BN in eval mode in a network that trains, BN in float32 behind convolutions in bfloat16, and frozen weights."""
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)).train()
    model[1].eval()
    model[3].requires_grad_(False)
    randomize_norms(model)
    for each in (0, 3):
        model[each].bfloat16()
    norm, mean = model[1], model[1].running_mean.clone()
    expand(model, "dbb", images=X)
    block, last = model[0], model[3]
    assert block.trunk.norm is norm
    assert (norm.training, block.training, block.branches[1].norm.training) == (False, True, True)
    assert torch.equal(norm.running_mean, mean)
    assert {part.weight.dtype for part in block.modules() if isinstance(part, nn.Conv2d)} == {torch.bfloat16}
    assert {part.weight.dtype for part in block.modules() if isinstance(part, nn.BatchNorm2d)} == {torch.float32}
    assert (last.trunk.conv.weight.requires_grad, last.trunk.conv.bias.requires_grad) == (False, False)
    frozen = nn.Sequential(conv(), nn.BatchNorm2d(8, affine=False)).requires_grad_(False)
    expand(frozen, images=X)
    assert not any(parameter.requires_grad for parameter in frozen[0].trunk.parameters())


@pytest.mark.parametrize("family", ["dbb", "mobileone"])
def test_branches_share_their_norms_between_processes_as_the_network_does(family):
    group = object()
    model = nn.Sequential(conv(8, 8), nn.SyncBatchNorm(8, process_group=group), nn.ReLU()).eval()
    expand(model, family, images=torch.randn(2, 8, 16, 16))
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 4
    assert {type(norm) for norm in norms} == {nn.SyncBatchNorm}
    assert {norm.process_group for norm in norms} == {group}


def test_own_blocks_of_timm_keep_the_mode_of_their_norms(small_timm):
    model = timm.create_model("repvgg_a0", num_classes=5).train()
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    expand(model, images=torch.randn(2, 3, 32, 32))
    parts = [part for _, block in rep_blocks(model) for part in block.modules()]
    assert {part.training for part in parts if isinstance(part, nn.BatchNorm2d)} == {False}
    assert {part.training for part in parts if not isinstance(part, nn.BatchNorm2d)} == {True}


@pytest.mark.parametrize("absent", [["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("family", ["repvgg", "qarep"])
def test_a_norm_without_bias_or_factors_gets_them(absent, family):
    model = net(a=conv(), n=nn.BatchNorm2d(8, affine=len(absent) == 1))
    for name in absent:
        model.n.register_parameter(name, None)  # BatchNorm2d(bias=False), which older versions of PyTorch do not know
    expected = model(X.double())
    expand(model, family, images=X)
    assert relative(model(X.double()), expected) < 1e-12
    block = model.a
    restart(model, rule="calibrate", images=X.double(), attach="zero-gamma")
    assert (block.trunk.batch_norm or block.post_norm).bias is not None


def test_a_compiled_part_of_a_network_is_fused():
    model = net(part=nn.Sequential(conv(), nn.BatchNorm2d(8)), again=conv(8, 8), norm=nn.BatchNorm2d(8)).float()
    expected = model(X)
    model.part = torch.compile(model.part, backend="eager")
    model(X)
    fused, report = export.fuse(model, X)
    assert (report.folded, report.left) == (2, {})
    assert {*fused.state_dict()} == {"part.0.weight", "part.0.bias", "again.weight", "again.bias"}
    assert relative(fused(X), expected) < 1e-5


@pytest.mark.parametrize("act", [lambda model: expand(model, images=X), lambda model: export.fuse(model, X)])
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_by_name(act):
    model = nn.Sequential(torch.jit.script(nn.Sequential(conv(), nn.BatchNorm2d(8)).eval()), nn.ReLU())
    with pytest.raises(InputError, match="^0 is TorchScript, which cannot be changed: give what it was made of$"):
        act(model)


@pytest.mark.parametrize("wrap", [nn.DataParallel, functools.partial(torch.compile, backend="eager")])
def test_a_network_in_a_wrapper_is_expanded_and_fused_itself(wrap):
    model = net(a=conv(), n=nn.BatchNorm2d(8)).float()
    wrapped = wrap(model)
    expected = wrapped(X)
    assert expand(wrapped, images=X) is wrapped
    assert [name for name, _ in rep_blocks(model)] == ["a"]
    assert wrapped.repan_report is model.repan_report
    assert wrapped.repan_report.changes == (Change("expand", "a", "n", "repvgg"),)
    assert relative(wrapped(X), expected) < 1e-5
    fused, report = export.fuse(wrapped, X)
    assert report.blocks == 1
    assert {*fused.state_dict()} == {"a.weight", "a.bias"}
    assert relative(fused(X), expected) < 1e-5


def test_a_second_expansion_is_added_to_the_first(tmp_path):
    model = net(conv=conv(), norm=nn.BatchNorm2d(8), act=nn.ReLU(), again=conv(8, 8, 1), after=nn.BatchNorm2d(8))
    expected = model(X.double())
    expand(model, "plain", images=X)
    expand(model, "acb", images=X, kernel=(1, 3))
    assert [change[:4] for change in model.repan_report.changes] == [
        ("expand", "conv", "norm", "plain"),
        ("grow", "conv", None, "acb"),
        ("expand", "again", "after", "acb"),
    ]
    assert relative(model(X.double()), expected) < 1e-12


def test_a_norm_inside_a_block_belongs_to_the_block():
    """The identity branch of a block reads what a convolution before it returned; so does its trunk."""
    geometry = models.repvgg_cifar.Geometry(8, 8, (3, 3), padding=(1, 1))
    model = randomize_norms(net(conv=conv(), block=make_block("repvgg", geometry)))
    expand(model, "rep", images=X)
    assert model.repan_report.changes == (Change("expand", "conv", None, "rep"),)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_cannot_be_copied_is_named():
    with pytest.raises(InputError, match="a cannot be copied: its weight is computed"):
        left(net(a=nn.utils.weight_norm(conv())), "a")


def test_a_use_that_a_fresh_norm_would_hide_is_found():
    """In a fresh network a BN is nearly the identity; the probe's statistics are not fresh."""
    assert "changes the network's function" in left(Shared(raw=True).eval(), "a")


def test_an_activation_between_conv_and_norm_keeps_them_apart():
    model = net(conv=conv(), act=nn.ReLU(inplace=True), norm=nn.BatchNorm2d(8))
    expected = model(X.double())
    expand(model, images=X)
    assert model.repan_report.changes == (Change("expand", "conv", None, "repvgg"),)
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert relative(model(X.double()), expected) < 1e-12


class DropsByFunction(nn.Module):
    def forward(self, x):
        return nn.functional.dropout2d(x, 0.5, self.training)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(0.5), DropsByFunction()])
def test_what_drops_values_in_training_keeps_conv_and_norm_apart(layer):
    """As in wide residual networks: in eval mode the layer does nothing, in training the BN sees what is left."""
    model = net(a=conv(), drop=layer, norm=nn.BatchNorm2d(8))
    expected = model(X.double())
    expand(model, images=X)
    assert model.repan_report.changes == (Change("expand", "a", None, "repvgg"),)
    assert isinstance(model.norm, nn.BatchNorm2d)
    fused, report = export.fuse(model, X)
    assert (report.folded, report.left) == (1, {})
    assert relative(fused.double()(X.double()), expected) < 1e-5


def test_an_identity_keeps_nothing_apart():
    model = net(a=conv(), nothing=nn.Identity(), norm=nn.BatchNorm2d(8))
    assert plan(model, X, family="rep", selection=Selection()).changes == (Change("expand", "a", "norm", "rep"),)


def test_a_network_that_uses_its_conv_as_a_conv_is_left_alone():
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 8)

        def forward(self, x):
            return self.b(self.a(x) * self.a.weight.mean()).mean((2, 3))

    model = Peeks().eval()
    expand(model, images=X)
    assert "as a block it fails: 'RepBlock' object has no attribute 'weight'" in model.repan_report.left["a"]
    assert list(dict(rep_blocks(model))) == ["b"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(768, 4)),
            "no convolution of the network can become a block: it has none",
        ),
        (nn.Sequential(nn.Conv2d(4, 4, 3)), "does not run on images of shape 2x3x16x16 in float64"),
        (nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Dropout()), None),
    ],
)
def test_networks_without_a_block_are_refused(model, says):
    if says is None:
        expand(model, images=X)  # train mode at hand does not matter
        assert model.training
        return
    with pytest.raises(InputError, match=says):
        expand(model, images=X)


def test_a_network_that_rolls_dice_in_eval_mode_is_refused():
    class Dice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return self.conv(x) + torch.rand(())

    with pytest.raises(InputError, match="gives two outputs for the same images"):
        expand(Dice(), images=X)


def test_planning_leaves_the_network_and_the_generator_alone():
    model = net(conv=conv(), norm=nn.BatchNorm2d(8)).train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    plan(model, X, family="dbb", selection=Selection())
    assert torch.rand(()) == expected
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------------------------------- selection


@functools.cache
def resnet() -> nn.Module:
    return timm.create_model("resnet18_cifar", num_classes=10)


def chosen(**settings: object) -> set[str]:
    selection, x = Selection(**settings), X[:2, :, :8, :8]
    return {change.name for change in plan(resnet(), x, family="rep", selection=selection).changes}


@pytest.mark.slow
def test_selection():
    everything = chosen()
    assert len(everything) == 16
    assert "conv1" not in everything, "the stem is plain by the network's definition"
    assert chosen(include=("conv1",)) == {"conv1"}
    assert chosen(kernel=(1,)) == {f"layer{n}.0.downsample.0" for n in (2, 3, 4)}
    assert chosen(include=("layer1.*",)) == {name for name in everything if name.startswith("layer1.")}
    assert chosen(exclude=("layer1.*",)) == {name for name in everything if not name.startswith("layer1.")}
    assert chosen(limit=3) == {"layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"}


@pytest.mark.parametrize(
    ("include", "says"),
    [
        ("layer9.*", "no convolution is named 'layer9.\\*'"),
        ("layer1.0.conv3", "did you mean layer1.0.conv2"),
    ],
)
def test_names_that_are_not_there(include, says):
    with pytest.raises(InputError, match=says):
        chosen(include=(include,))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"attach": "zero_gamma"},
            "attach='zero_gamma' is not a choice; did you mean zero-gamma?: ramp, zero-gamma, one",
        ),
        ({"attach": "compensated"}, "attach='compensated' is not a choice: ramp, zero-gamma, one"),
        ({"block": "mobileone", "branches": 0}, "block.branches=0: give at least 1"),
    ],
)
def test_a_wrong_word_is_not_taken_for_another(given, says):
    """A misspelled attach would start the branches at rate 1, which changes the function."""
    model = net(a=conv(), n=nn.BatchNorm2d(8))
    with pytest.raises(InputError) as error:
        expand(model, images=X, **given)
    assert str(error.value) == says
    assert isinstance(model.a, nn.Conv2d)


@pytest.mark.parametrize(
    "given", [{"kernel": 3}, {"include": "b*"}, {"exclude": "a"}, {"include": ["b"], "kernel": [3]}]
)
def test_one_size_or_glob_needs_no_tuple(given):
    model = net(a=conv(kernel=5), b=conv(8, 8))
    expand(model, images=X, **given)
    assert [name for name, _ in rep_blocks(model)] == ["b"]


def test_a_layer_that_was_asked_for_and_cannot_be_had_is_an_error():
    model = net(a=conv(), b=parametrizations.weight_norm(conv(8, 8)))
    with pytest.raises(InputError, match="b cannot become a block: it is a ParametrizedConv2d"):
        expand(model, images=X, include=("b",))


def test_blocks_without_branches_grow_those_of_a_family():
    model = randomize_norms(timm.create_model("repvgg_a0_cifar", num_classes=10, block="plain")).double().eval()
    expected = model(X.double())
    expand(model, "dbb", images=X)
    assert relative(model(X.double()), expected) < 1e-12
    assert {block.family for _, block in rep_blocks(model)} == {"dbb"}


def test_a_start_at_zero_is_kept():
    """timm's residual branches begin at zero by the last gamma; blocks that are let in at once must not undo that."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, zero_init_last=True).eval()
    expected = model(X)
    expand(model, images=X, attach="one", include=("*.conv2",))
    assert relative(model(X), expected) < 1e-5
    assert all(block.attach_rate == 1 for _, block in rep_blocks(model))


# ---------------------------------------------------------------------------------------------- timm's own blocks

OWN_BLOCKS = {
    "repvgg_a0": 22,
    "mobileone_s1": 43,
    "fastvit_t8": 20,
    "repvit_m0_9": 23,
    "repvit_m1": 23,
    "repghostnet_050": 32,
    "lcnetv2_base": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, pytest.param(64, marks=pytest.mark.soak)])
def test_own_blocks_are_kept_on_small_images_too(size):
    """Fresh MobileOne on 1x1 maps amplifies rounding; that is no change of its function."""
    model = timm.create_model("mobileone_s0", num_classes=10).eval()
    assert len(plan(model, torch.randn(2, 3, size, size), family=None, selection=Selection()).changes) == 43


SMALL_OWN_BLOCKS = {
    "repvgg_a0": 7,
    "mobileone_s0": 11,
    "fastvit_t8": 15,
    "repvit_m0_9": 8,
    "repghostnet_050": 32,
}
"""With the networks of `small_timm`."""


@pytest.mark.usefixtures("small_timm")
@pytest.mark.parametrize(("name", "blocks"), SMALL_OWN_BLOCKS.items())
def test_own_blocks_of_timm_are_adapted(name, blocks):
    own_blocks_are_adapted(name, blocks)


@pytest.mark.soak
@pytest.mark.parametrize(("name", "blocks"), OWN_BLOCKS.items())
def test_own_blocks_of_whole_networks_of_timm_are_adapted(name, blocks):
    own_blocks_are_adapted(name, blocks)


@torch.no_grad()
def own_blocks_are_adapted(name, blocks):
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = randomize_norms(timm.create_model(name, num_classes=10)).double().eval()
    original, expected = copy.deepcopy(model), model(x)
    expand(model, images=x)
    assert model.repan_report.family == "own"
    assert len(list(rep_blocks(model))) == blocks
    assert relative(model(x), expected) < 1e-12
    restart(model, images=[torch.randn(8, 3, 64, 64, dtype=torch.float64)], attach="ramp")
    assert relative(model(x), expected) < 1e-10
    set_attach_rate(model, 0.4)
    attached = model(x)
    assert relative(attached, expected) > 1e-6
    assert relative(reparameterize(model)(x), attached) < 1e-10
    merged_by_timm = reparameterize_model(original).state_dict()
    blocks_of_timm = {key: value.shape for key, value in merged_by_timm.items() if "reparam_conv" in key}
    ours = {key: value.shape for key, value in model.state_dict().items()}
    mixers = {key for key in blocks_of_timm if ".token_mixer." in key and name.startswith("fastvit")}
    assert {key: shape for key, shape in blocks_of_timm.items() if key not in mixers}.items() <= ours.items()


def test_a_family_can_be_asked_for_beside_own_blocks(small_timm):
    model = timm.create_model("repvit_m0_9", num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    expand(model, "acb", images=x)
    assert {block.family for _, block in rep_blocks(model)} == {"own", "acb"}
    assert relative(model(x), expected) < 1e-4


def test_stochastic_depth_inside_a_block_keeps_it_as_it_is(small_timm):
    model = timm.create_model("repvgg_a0", num_classes=10, drop_path_rate=0.1).eval()
    assert "drop_path" in left(model, "stages.0.1", family=None, images=torch.randn(2, 3, 32, 32))


# ---------------------------------------------------------------------------------------------- what survives


def small() -> nn.Module:
    return expand(
        randomize_norms(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8), nn.BatchNorm2d(8))), images=X
    )


def test_a_compiled_network_survives_a_restart_without_a_second_compilation():
    model, compiled_graphs = small().eval(), []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for rate in (0.5, 0.7):
            set_attach_rate(compiled, rate)
            expected = compiled(X)
            restart(compiled, images=[X], attach="ramp")
            assert relative(compiled(X), expected) < 1e-5
    assert len(compiled_graphs) == 1
    assert compiled._orig_mod is model


def test_a_data_parallel_network_survives_a_restart(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(small())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
        for _ in range(3):
            before = wrapped.eval()(X).detach()
            restart(wrapped, images=[X], attach="ramp")
            assert relative(wrapped(X), before) < 1e-5
            set_attach_rate(wrapped, 1)
            weight = wrapped.module[0].branches[0].conv.weight
            old = weight.detach().clone()
            wrapped.train()(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert not torch.equal(weight, old), "gradients still reach the parameters of the optimizer"
    finally:
        torch.distributed.destroy_process_group()


def test_averaged_copies_and_optimizers_survive_a_restart():
    model = small()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model.train()(X).square().mean().backward()
    optimizer.step()
    pointers = [tensor.data_ptr() for tensor in itertools.chain(model.parameters(), average.parameters())]
    state = [optimizer.state[p]["momentum_buffer"].data_ptr() for p in model.parameters() if p in optimizer.state]
    before = average.eval()(X)
    restart(model, images=[X])
    restart(average, images=[X])
    assert relative(average(X), before) < 1e-5
    average.update_parameters(model)
    assert [tensor.data_ptr() for tensor in itertools.chain(model.parameters(), average.parameters())] == pointers
    assert [
        optimizer.state[p]["momentum_buffer"].data_ptr() for p in model.parameters() if p in optimizer.state
    ] == state


@pytest.mark.parametrize(
    ("family", "depths"),
    [
        ("repvgg", (1,) * 5),
        *(pytest.param(name, DEPTHS_A, marks=pytest.mark.soak) for name in ("repvgg", "dbb", "qarep")),
    ],
)
@torch.no_grad()
def test_twenty_restarts_drift_less_than_a_hundred_thousandth(family, depths, monkeypatch):
    """In float32, branches let in before each restart."""
    monkeypatch.setattr(repvgg_cifar, "DEPTHS_A", depths)
    x = X[:, :, :8, :8]
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model("repvgg_a0_cifar", num_classes=10, block="plain")).eval()
    expand(model, family, images=x)
    for _ in range(20):
        before = model(x)
        restart(model, images=[x], attach="zero-gamma")
        assert relative(model(x), before) < 1e-5
    start = copy.deepcopy(model).double()(x.double())
    for _ in range(20):
        restart(model, images=[x])
    assert relative(model(x), start) < 1e-5


def test_only_the_blocks_that_are_named_restart():
    model = small()
    names = list(dict(rep_blocks(model)))
    set_attach_rate(model, 0.5)
    kept = copy.deepcopy(model[3].state_dict())
    restart(model, images=[X], only=names[:1])
    assert model[0].attach_rate == 1
    assert all(torch.equal(value, kept[name]) for name, value in model[3].state_dict().items())
    set_attach_rate(model, 1.0, only=names[:1])
    assert (model[0].attach_rate, model[3].attach_rate) == (1.0, 0.5)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("form", ["multi-branch", "fused"])
@pytest.mark.parametrize(
    ("name", "block"), [("timm:test_resnet", "dbb"), ("timm:repvgg_a0", None), ("mobilenetv1_cifar", "mobileone")]
)
def test_a_file_rebuilds_an_expanded_network(tmp_path, small_timm, monkeypatch, name, block, form):
    monkeypatch.setattr(mobilenet_cifar, "LAYERS", mobilenet_cifar.LAYERS[:4])
    x = torch.randn(2, 3, 32, 32)
    model = models.create(name, num_classes=10, in_chans=3)
    expand(model, block, images=x, branches=2 if block == "mobileone" else None)
    randomize_norms(model).eval()
    set_attach_rate(model, 0.3)
    saved = checkpoint.capture(model, card_of(model, name))
    if form == "fused":
        model, report = export.fuse(model, x)
        assert report.rel_error_fp64 < 1e-12
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        saved = checkpoint.capture_fused(model, saved, model.repan_report.changes)
    checkpoint.save(saved, tmp_path / "a.safetensors")
    loaded = repan_cli.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training


def test_a_plain_network_is_fused_by_folding_its_norms():
    model = randomize_norms(timm.create_model("resnet18", num_classes=10)).eval()
    fused, report = export.fuse(model, X)
    assert (report.blocks, report.folded) == (0, 20)
    assert relative(fused(X), model(X)) < 1e-4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def test_the_own_network_of_a_person_is_given_again(tmp_path):
    model = expand(net(conv=conv(), norm=nn.BatchNorm2d(8)).float(), images=X)
    card = card_of(model, "net.py:build", classes=tuple("abcdefgh"))
    checkpoint.save(checkpoint.capture(model, card), tmp_path / "a.pt")
    with pytest.raises(InputError, match="a network of your own, net.py:build: give model=.net.py:build."):
        repan_cli.load(tmp_path / "a.pt")
    loaded = repan_cli.load(tmp_path / "a.pt", net(conv=conv(), norm=nn.BatchNorm2d(8)).float())
    assert torch.equal(loaded(X), model(X))
    with pytest.raises(InputError, match="does not fit the network"):
        repan_cli.load(tmp_path / "a.pt", net(other=conv()).float())


def test_make_block_with_a_number_of_branches():
    geometry = make_block("plain", models.repvgg_cifar.Geometry(4, 4, (3, 3), padding=(1, 1))).trunk.conv
    assert geometry.kernel_size == (3, 3)
    block = make_block("mobileone", models.repvgg_cifar.Geometry(4, 4, (3, 3), padding=(1, 1)), copies=1)
    assert len(block.branches) == 3
    with pytest.raises(InputError, match="block.branches=2: the block family acb has a fixed number"):
        make_block("acb", models.repvgg_cifar.Geometry(4, 4, (3, 3)), copies=2)
