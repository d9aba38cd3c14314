"""Networks that return dictionaries, lists and tuples of tensors: segmentation, detection, several heads."""

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from support import randomize_norms, relative, run
from torch import nn

from repan_cli import export, models
from repan_cli.blocks import RepBlock, rep_blocks
from repan_cli.errors import MergeError
from repan_cli.export import onnx_file
from repan_cli.export.trace import trace
from repan_cli.models.expand import expand
from repan_cli.models.outputs import leaves

X = torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(0))
Found = namedtuple("Found", ["logits", "maps"])


@dataclass
class Named:
    logits: torch.Tensor
    maps: list[torch.Tensor]


FORMS = {
    "dict": lambda logits, maps: {"logits": logits, "aux": {"map": maps[0], "count": torch.tensor(3)}},
    "ordered": lambda logits, maps: OrderedDict(out=maps[0], logits=logits),
    "list": lambda logits, maps: [logits, *maps],
    "tuples": lambda logits, maps: (logits, (maps[0], [maps[1]])),
    "named tuple": Found,
    "dataclass": Named,
}


class Heads(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.thin, self.both = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        y = torch.relu(self.both(self.wide(x) + self.thin(x)))
        return FORMS[self.form](self.head(y.mean((2, 3))), [x, y])


def heads(form):
    torch.manual_seed(0)
    return randomize_norms(Heads(form)).eval()


@pytest.mark.parametrize("form", list(FORMS))
def test_every_leaf_is_compared(form):
    model = heads(form)
    fused, report = export.fuse(model, X)
    assert (report.blocks, report.folded, report.left) == (1, 1, {})
    assert 0 < report.rel_error_fp64 < 1e-12
    found, expected = leaves(fused(X)), leaves(model(X))
    assert found.keys() == expected.keys()
    assert len(found) > 1
    assert all(relative(found[name], expected[name]) < 1e-5 for name in found)
    expand(model, images=X)
    assert len(list(rep_blocks(model))) == 2
    found = leaves(model(X))
    assert all(relative(found[name], expected[name]) < 1e-5 for name in found)


class Watchful(nn.Module):
    """Returns something else where a layer was replaced."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(self.norm(self.conv(x)))
        same = any(isinstance(module, self.kind) for module in self.modules())
        return {"a": self.head(y.mean((2, 3))), "b": [y if same else y * 1.001]}


def test_a_fold_that_would_change_a_leaf_is_given_up():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), randomize_norms(Watchful(nn.BatchNorm2d))).eval()
    _, report = export.fuse(model, X)
    assert report.folded == 1
    assert report.left == {"2.conv": "as one convolution it changes the network's function"}


def test_a_wrong_leaf_is_named():
    model = expand(randomize_norms(Watchful(nn.Module)).eval(), images=X, attach="one")
    model.kind = RepBlock
    with pytest.raises(MergeError, match=r"merging changed the function at the output b\.0: relative error 1\.0e-03"):
        export.fuse(model, X)


@pytest.mark.parametrize(
    "form", ["dict", "tuples", *(pytest.param(f, marks=pytest.mark.soak) for f in ("ordered", "list"))]
)
def test_several_outputs_go_into_onnx(form):
    fused, _ = export.fuse(heads(form), X)
    model = onnx_file.model_of(trace(fused, X, "it"))
    network = onnx_file.OnnxNetwork(model.SerializeToString(), several=True)
    found, expected = leaves(network(X)), leaves(fused(X))
    assert [*found] == [*expected]
    assert all(relative(found[name], expected[name]) < 1e-5 for name in expected)


SEGMENTS = """
import torchvision

def build(num_classes, in_chans):
    return torchvision.models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=5)
"""


def gentle(model):
    model = randomize_norms(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.mark.soak
def test_a_segmenting_network_is_written_in_every_format(tmp_path, capsys):
    (tmp_path / "net.py").write_text(SEGMENTS)
    name = f"{tmp_path / 'net.py'}:build"
    torch.manual_seed(0)
    torch.save(gentle(models.create(name, num_classes=5, in_chans=3)).state_dict(), tmp_path / "w.pth")
    formats = [word for each in ("pt", "safetensors", "onnx", "pt2") for word in ("-f", each)]
    words = ["fuse", tmp_path / "w.pth", "--model", name, *formats, "--out", tmp_path / "out"]
    code, _, err = run(capsys, *words)
    assert code == 0, err
    assert "folded 47 BNs" in err
    assert len([*tmp_path.glob("out.*")]) == 4


def small(name, **kwargs):
    torch.manual_seed(0)
    return gentle(torchvision.models.get_model(name, weights=None, weights_backbone=None, **kwargs))


NETWORKS = {
    "lraspp_mobilenet_v3_large": {},
    "fcn_resnet50": {"aux_loss": True},
    "deeplabv3_mobilenet_v3_large": {},
    "deeplabv3_resnet50": {},
    "ssdlite320_mobilenet_v3_large": {},
    "fasterrcnn_mobilenet_v3_large_320_fpn": {},
}
FAST = ("lraspp_mobilenet_v3_large",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.soak) for name in NETWORKS]
)
def test_torchvisions_dense_networks_merge_and_expand(name):
    model = small(name, **NETWORKS[name])
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = torch.randn(2, 3, 64, 64)
    fused, report = export.fuse(model, x)
    assert (report.blocks, report.folded, report.left) == (0, norms, {})
    assert report.rel_error_fp64 < 1e-10
    assert report.rel_error_fp32 < 1e-3
    if "rcnn" not in name and "ssd" not in name:  # whose choices jump
        found, expected = leaves(fused(x)), leaves(model(x))
        assert all(relative(found[key], expected[key]) < 1e-3 for key in expected)
    expanded = expand(copy.deepcopy(model), images=x)
    assert len(list(rep_blocks(expanded))) > 10
