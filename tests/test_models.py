"""The networks: registered names, sizes, and the short names that users type."""

import pytest
import timm
import torch
from support import relative, small_net

from repan_cli.blocks import FAMILIES, reparameterize
from repan_cli.config import names
from repan_cli.errors import InputError
from repan_cli.models import BUILTIN, catalog, create, resolve

DEPLOYED = {"a0": 0.387, "a1": 0.644, "a2": 1.373, "b0": 0.741, "b1": 2.844, "b2": 4.434, "b3": 6.258}


@pytest.mark.parametrize(("size", "millions"), DEPLOYED.items())
def test_deployed_parameters(size, millions):
    model = reparameterize(timm.create_model(f"repvgg_{size}_cifar", num_classes=100))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("resnet18_cifar", 100, 11_220_132),
        ("resnet34_cifar", 100, 21_328_292),
        ("resnet50_cifar", 100, 23_705_252),
        ("resnet101_cifar", 100, 42_697_380),
        ("resnet110_cifar", 10, 1_727_962),
        ("mobilenetv1_cifar", 10, 3_217_226),
    ],
)
def test_parameters_are_those_of_the_field(name, classes, parameters):
    model = timm.create_model(name, num_classes=classes, in_chans=3).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[-1] == model.pretrained_cfg["pool_size"][0]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_builds_and_merges(family):
    model = small_net(family, in_chans=1).double()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = model(x)
    assert relative(reparameterize(model)(x), expected) < 1e-12


def test_the_methods_timm_models_have():
    model = small_net()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 8)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("name", "size", "full"),
    [
        ("repvgg", 32, "repvgg_a1_cifar"),
        ("repvgg", 64, "repvgg_a1_cifar"),
        ("repvgg", 65, "timm:repvgg_a1"),
        ("repvgg_b1", 32, "repvgg_b1_cifar"),
        ("repvgg_b1", 224, "timm:repvgg_b1"),
        ("repvgg_a0_cifar", 224, "repvgg_a0_cifar"),
        ("timm:repvgg_a1", 8, "timm:repvgg_a1"),
        ("resnet18", 224, "timm:resnet18"),
    ],
)
def test_short_names_resolve_by_image_size(name, size, full):
    assert resolve(name, size) == full


@pytest.mark.parametrize("name", ["repvg", "repvgg_a9_cifar", "timm:resnt18"])
def test_an_unknown_name_gets_suggestions(name):
    with pytest.raises(InputError, match="did you mean"):
        resolve(name, 32)


def test_all_are_registered_with_timm():
    assert set(BUILTIN) <= set(timm.list_models("*_cifar"))


@pytest.mark.parametrize(
    "name", ["timm:resnet18", "timm:repvit_m1", "timm:mobileone_s0", "timm:nf_resnet50", "torchvision:resnet18"]
)
def test_the_catalog_agrees_with_the_networks(name):
    listed = names.catalog()[name]
    try:
        found = catalog.look(name)
    except NotImplementedError:
        pytest.skip("the installed version does not build it on the meta device")
    assert (found.own, found.pairs) == (listed.own, listed.pairs)
    assert found == listed
    assert found.cycles == (name != "timm:nf_resnet50")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("timm:resnet18", "11.7 M parameters; 17 convolutions become blocks"),
        ("torchvision:googlenet", "6.62 M parameters; 20 convolutions become blocks"),
    ],
)
def test_the_catalog_tells_the_size_of_the_network_that_commands_build(name, says):
    """torchvision's GoogLeNet has auxiliary classifiers, unless it is told otherwise."""
    listed = names.catalog()[name]
    assert listed.describe() == says
    with torch.device("meta"):
        model = create(name, num_classes=1000, in_chans=3)
    assert listed.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_table_has_most_of_the_networks_that_are_installed():
    """One that another version of timm adds is looked at when it is asked for."""
    foreign = names.foreign()
    assert len(names.catalog().keys() & set(foreign)) > 0.8 * len(foreign)
