"""Weights with the layer names of multi-branch blocks' authors load into timm's networks, multi-branch or merged."""

import re

import pytest
import timm
import timm.utils
import torch
from support import relative, run

from repan_cli.errors import InputError
from repan_cli.export import fuse
from repan_cli.session.artifact import open_artifact


def by(*rules):
    def name_as(name):
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return lambda weights: {name_as(name): value for name, value in weights.items()}


def stage(match):
    return f"stage{int(match[1]) + 1}."


def mm_stage(match):
    return f"stage_{int(match[1]) + 1}."


STEM = (r"^stem\.", "stage0.")
REPVGG = by(
    STEM,
    (r"^stages\.(\d)\.", stage),
    (r"conv_kxk", "rbr_dense"),
    (r"conv_1x1", "rbr_1x1"),
    (r"identity", "rbr_identity"),
    (r"reparam_conv", "rbr_reparam"),
    (r"^head\.fc", "linear"),
)
MOBILEONE = by(
    STEM,
    (r"^stages\.(\d)\.", stage),
    (r"conv_kxk", "rbr_conv"),
    (r"conv_scale", "rbr_scale"),
    (r"identity", "rbr_skip"),
    (r"^head\.fc", "linear"),
)
OPENMMLAB = by(
    (r"^stages\.(\d)\.", mm_stage),
    (r"conv_kxk\.bn", "branch_3x3.norm"),
    (r"conv_kxk", "branch_3x3"),
    (r"conv_1x1\.bn", "branch_1x1.norm"),
    (r"conv_1x1", "branch_1x1"),
    (r"identity", "branch_norm"),
    (r"reparam_conv", "branch_reparam"),
    (r"^(?!head)", "backbone."),
)
OPENMMLAB_ONE = by(
    STEM,
    (r"^stages\.(\d)\.", stage),
    (r"conv_kxk\.(\d)\.bn", r"branch_conv_list.\1.norm"),
    (r"conv_kxk", "branch_conv_list"),
    (r"conv_scale\.bn", "branch_scale.norm"),
    (r"conv_scale", "branch_scale"),
    (r"identity", "branch_norm"),
    (r"reparam_conv", "branch_reparam"),
    (r"^(?!head)", "backbone."),
)


def fastvit(weights):
    found, place = {}, {}
    for name, value in weights.items():
        numbers = re.match(r"stages\.(\d)\.(blocks\.\d+|downsample)", name)
        if numbers:
            at = place.setdefault(numbers[0] if "down" in numbers[2] else f"stages.{numbers[1]}.blocks", len(place))
            inner = name[len(numbers[0]) :]
            block = numbers[2].partition(".")[2]
            name = f"network.{at}{inner}" if "down" in numbers[2] else f"network.{at}.{block}{inner}"
        name = name.replace("stem.", "patch_embed.").replace("conv_kxk", "rbr_conv").replace("conv_scale", "rbr_scale")
        name = name.replace("identity", "rbr_skip").replace("final_conv", "conv_exp").replace("mlp.", "convffn.")
        name = name.replace("large_conv", "lkb_origin").replace("se.fc1", "se.reduce").replace("se.fc2", "se.expand")
        name = name.replace("layer_scale.gamma", "layer_scale").replace("head.fc.", "head.")
        found[re.sub(r"(proj\.0\.)reparam_conv", r"\1lkb_reparam", name)] = value
    return found


def repvit(weights):
    places = []
    for name in weights:
        match = re.match(r"stages\.\d\.(downsample\.pre_block|downsample|blocks\.\d+)\.", name)
        if match and match[0] not in places:
            places.append(match[0])
    places.sort(
        key=lambda p: (int(p[7]), "blocks" in p, "pre_block" not in p, int(re.search(r"(\d+)\.$", p + "0.")[1]))
    )
    inner = [("token_mixer.", "token_mixer.0."), ("se.", "token_mixer.1.")]
    inner += [("channel_mixer.conv1.", "channel_mixer.m.0."), ("channel_mixer.conv2.", "channel_mixer.m.2.")]
    strided = [("spatial_downsample.", "token_mixer.0."), ("channel_downsample.", "token_mixer.2.")]
    strided += [("ffn.conv1.", "channel_mixer.m.0."), ("ffn.conv2.", "channel_mixer.m.2.")]
    found = {}
    for name, value in weights.items():
        for old, new in (("stem.conv1.", "features.0.0."), ("stem.conv2.", "features.0.2.")):
            name = name.replace(old, new)
        name = re.sub(r"^head\.head(_dist)?\.", r"classifier.classifier\1.", name)
        name = re.sub(r"^head\.(weight|bias)", r"classifier.\1", name)
        place = next((p for p in sorted(places, key=len, reverse=True) if name.startswith(p)), None)
        if place:
            rest = name[len(place) :]
            rules = strided if place.endswith("downsample.") else inner
            old, new = next((old, new) for old, new in rules if rest.startswith(old))
            name = f"features.{places.index(place) + 1}.{new}{rest[len(old) :]}"
        found[name] = value
    return found


FAMILIES = {
    "repvgg_a0": REPVGG,
    "mobileone_s0": MOBILEONE,
    "fastvit_t8": fastvit,
    "repvit_m0_9": repvit,
    "repvgg_a0 mmlab": OPENMMLAB,
    "mobileone_s0 mmlab": OPENMMLAB_ONE,
    # made up after the rest
    "mobileone_s4": MOBILEONE,
    "fastvit_s12": fastvit,
    "repvit_m1": repvit,
}


def gentle(model, seed=0):
    """Random statistics that keep the activations within float32's reach."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            shape = module.running_mean.shape
            module.running_mean.copy_(0.1 * torch.randn(shape, generator=draw))
            module.running_var.copy_(torch.rand(shape, generator=draw) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(shape, generator=draw) + 0.5)
                module.bias.copy_(0.1 * torch.randn(shape, generator=draw))
    return model.eval()


SMALL = list(FAMILIES)[:6]


@pytest.mark.slow
@pytest.mark.usefixtures("small_timm")
@pytest.mark.parametrize("form", ["multi-branch", "merged", "merged timm"])
@pytest.mark.parametrize("family", SMALL)
def test_names_of_authors_load_into_timms_network(tmp_path, family, form):
    loads_by_names_of_authors(tmp_path, family, form)


@pytest.mark.soak
@pytest.mark.parametrize("form", ["multi-branch", "merged", "merged timm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_load_into_timms_network_as_it_is(tmp_path, family, form):
    loads_by_names_of_authors(tmp_path, family, form)


def loads_by_names_of_authors(folder, family, form):
    rename, name = FAMILIES[family], family.partition(" ")[0]
    torch.manual_seed(0)
    model = gentle(timm.create_model(name, num_classes=10))
    theirs = timm.utils.reparameterize_model(model) if "merged" in form else model
    weights = theirs.state_dict() if "timm" in form else rename(theirs.state_dict())
    if form == "multi-branch":
        assert not set(weights) <= set(model.state_dict())
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, folder / "theirs.pth")
    found = open_artifact(str(folder / "theirs.pth"), f"timm:{name}").network
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(found(x), model(x)) < 1e-5


def test_fuse_counts_the_blocks_of_timms_networks(tmp_path, capsys, small_timm):
    torch.save(gentle(timm.create_model("repvgg_a0", num_classes=10)).state_dict(), tmp_path / "a0.pth")
    code, out, err = run(capsys, "fuse", tmp_path / "a0.pth", "--model", "timm:repvgg_a0", "--out", tmp_path / "f.pt")
    assert code == 0, err
    assert "merged 7 blocks" in out
    assert "outside of blocks" not in out


def test_a_family_that_cannot_be_loaded_is_named(tmp_path):
    weights = {"layer1.0.conv1.dbb_origin.conv.weight": torch.zeros(64, 64, 3, 3), "conv1.weight": torch.zeros(3)}
    torch.save(weights, tmp_path / "dbb.pth")
    with pytest.raises(InputError, match="the file is multi-branch, the DBB authors' names"):
        open_artifact(str(tmp_path / "dbb.pth"), "timm:resnet18")


def test_a_computed_weight_is_no_traceback():
    model = torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Conv2d(3, 4, 3)), torch.nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 8, 8))
    with pytest.raises(InputError, match="its weight is computed, as by the older weight_norm; remove that"):
        fuse(model, torch.randn(2, 3, 8, 8))
