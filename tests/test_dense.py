"""Networks that return dictionaries, lists and tuples of tensors: segmentation, detection, several heads."""

import copy
import json
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torchvision
from support import one_line, randomize_norms, relative, run
from torch import nn

from repan_cli import export, models
from repan_cli.blocks import RepBlock, rep_blocks
from repan_cli.errors import InputError, MergeError
from repan_cli.export import file_check, onnx_file
from repan_cli.export.trace import trace
from repan_cli.models.expand import expand
from repan_cli.models.outputs import all_leaves, difference, leaves

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


class Odd(Heads):
    """Returns leaves whose places read alike, complex numbers, numbers of classes."""

    def forward(self, x):
        found = super().forward(x)
        logits = found["logits"]
        return {"a.b": logits, "a": {"b": 2 * logits}, "wave": torch.fft.rfft(logits), "top": logits.argmax(1)}


def test_leaves_that_read_alike_and_complex_ones_are_compared():
    torch.manual_seed(0)
    model = randomize_norms(Odd("dict")).eval()
    fused, report = export.fuse(model, X)
    assert report.rel_error_fp64 < 1e-12
    found = leaves(fused(X))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "a.b": (2, 4),
        "a.b_2": (2, 4),
        "wave": (2, 3, 2),
    }
    network = onnx_file.OnnxNetwork(onnx_file.model_of(trace(fused, X, "it")).SerializeToString(), several=True)
    for count in (1, 2):
        assert difference(all_leaves(network(X[:count])), all_leaves(fused(X[:count]))) < 1e-5


def test_an_output_with_the_name_of_the_input_is_refused():
    class Images(Heads):
        def forward(self, x):
            return {"images": super().forward(x)["logits"]}

    torch.manual_seed(0)
    program = trace(Images("dict").eval(), X, "it")
    with pytest.raises(InputError, match="returns an output called 'images', the name of the input in ONNX files"):
        onnx_file.model_of(program)


def test_text_in_an_output_is_named():
    class Says(Heads):
        def forward(self, x):
            return {**super().forward(x), "version": "1"}

    torch.manual_seed(0)
    with pytest.raises(InputError, match="it cannot be exported as a graph: it returns text beside its tensors"):
        trace(Says("dict").eval(), X, "it")


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
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "folded 47 BNs" in out
    assert len([*tmp_path.glob("out.*")]) == 4


DETECTOR = """
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d

def build(num_classes, in_chans):
    parts = []
    for width, to in ((3, 8), (8, 16), (16, 16)):
        parts += [nn.Conv2d(width, to, 3, stride=2, padding=1, bias=False), FrozenBatchNorm2d(to), nn.ReLU()]
    backbone = nn.Sequential(*parts)
    backbone.out_channels = 16
    anchors = AnchorGenerator(((8, 16),), ((1.0,),))
    sizes = {"min_size": 64, "max_size": 64, "rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 20}
    sizes |= {"box_detections_per_img": 10, "box_score_thresh": THRESH}
    return FasterRCNN(backbone, 3, rpn_anchor_generator=anchors, **sizes)
"""


@pytest.fixture
def detector(tmp_path):
    """A file that builds a small detector, and its weights."""
    (tmp_path / "net.py").write_text(DETECTOR.replace("THRESH", "0.0"))
    name = f"{tmp_path / 'net.py'}:build"
    torch.manual_seed(0)
    model = models.create(name, num_classes=3, in_chans=3).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_var", "running_mean")):
            tensor.uniform_(0.1, 0.5)
        elif tensor.ndim > 1 and "rpn.head.bbox" not in key:
            tensor.normal_(0, (1.5 if "backbone" in key else 0.7) * tensor[0].numel() ** -0.5)  # scores lie far apart
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return name, model


@pytest.mark.soak
def test_a_detector_goes_into_onnx_for_one_image_at_a_time(detector, tmp_path, capsys):
    name, model = detector
    words = ["fuse", tmp_path / "w.pth", "--model", name, "-o", tmp_path / "out"]
    code, out, err = run(capsys, *words, "-f", "onnx", "--opset", "17", "--json")
    assert code == 0, err
    (file,) = json.loads(out)["files"]
    assert file["images"] == "one at a time"
    assert file["rel_error"] < 1e-4
    network = onnx_file.open_file(tmp_path / "out.onnx")
    assert network.outputs == ["0.boxes", "0.labels", "0.scores"]
    assert onnx_file.graph(tmp_path / "out.onnx").opset_import[0].version == 17
    image = torch.randn(1, 3, *given_size(network))
    found, (expected,) = network(image), model(image)
    assert 0 < len(expected["boxes"]) <= 10
    for key, value in expected.items():
        assert found[f"0.{key}"].shape == value.shape
        assert torch.allclose(found[f"0.{key}"].to(value), value, rtol=1e-4, atol=1e-4)
    code, out, err = run(capsys, *words[:-1], tmp_path / "raw", "-f", "onnx", "--with-normalize", "--json")
    assert code == 0, err
    assert json.loads(out)["files"][0]["rel_error"] < 1e-4
    (tmp_path / "out.onnx").unlink()
    for more in (("-f", "pt2"), ("-f", "onnx", "--half")):
        assert "cannot be exported as a graph" in one_line(capsys, *words, *more)


@pytest.mark.slow
def test_a_detector_that_finds_nothing_is_not_written(detector, tmp_path, capsys):
    name, _ = detector
    (tmp_path / "net.py").write_text(DETECTOR.replace("THRESH", "2.0"))
    words = ["fuse", tmp_path / "w.pth", "--model", name, "-o", tmp_path / "out", "-f", "onnx"]
    line = one_line(capsys, *words)
    assert "w.pth cannot be written as ONNX: it finds nothing in the images that it was tried on" in line
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("side", [64, pytest.param(41, marks=pytest.mark.soak), 97])
def test_a_detector_resizes_in_onnx_runtime_to_the_size_of_pytorch(detector, side):
    """For 41 and 97 pixels, 64 * (1 / side) in float32 is just too small, and gives 63."""
    _, model = detector
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    content = onnx_file.model_for_one_image(model, image).SerializeToString()
    assert model.transform.fixed_size is None
    network = onnx_file.OnnxNetwork(content, several=True)
    assert difference(all_leaves(network(image)), all_leaves(model(image))) < 1e-4


class Detector(nn.Module):
    """Returns the places of the largest values, which tie if the images have few values."""

    one_by_one = True

    def forward(self, images):
        found = images.flatten().topk(5)
        return {"scores": found.values, "places": found.indices}


@pytest.mark.parametrize("spread", [1.0, 1e-7])
def test_results_that_jump_with_rounding_are_told_from_a_wrong_file(spread):
    torch.manual_seed(0)
    images = 1 + spread * torch.randn(2, 3, 8, 8)
    why = file_check.why_different(Detector(), Detector(), images, 1e-4)
    assert why.endswith("raise its score threshold)") == (spread < 1e-6)
    assert file_check.error_of(Detector(), images, Detector(), images, (None, None)) == 0
    assert not file_check.why_different(nn.Identity(), nn.Identity(), images, 0.0)


@pytest.mark.parametrize(
    ("own", "bound"), [(0.0, 1e-4), (1e-6, 1e-4), (5e-4, 5e-3), (0.3, 1e-2), (float("inf"), 1e-4), (float("nan"), 1e-4)]
)
def test_no_rounding_of_its_own_lets_a_wrong_file_pass(own, bound):
    assert file_check.bound(own) == bound


def given_size(network):
    return network.session.get_inputs()[0].shape[2:]


@pytest.mark.soak
@pytest.mark.parametrize("side", [320, 640, 800])
def test_torchvisions_faster_rcnn_agrees_in_onnx_runtime(side):
    model = small("fasterrcnn_mobilenet_v3_large_320_fpn", num_classes=5)
    images = torch.rand(2, 3, side, side)
    fused, report = export.fuse(model, images)
    assert (report.folded, report.left) == (46, {})
    network = onnx_file.OnnxNetwork(onnx_file.model_for_one_image(fused, images[:1]).SerializeToString(), several=True)
    for image in (*images.split(1), torch.zeros_like(images[:1])):
        assert difference(all_leaves(network(image)), all_leaves(fused(image))) < 1e-4


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


@pytest.mark.slow
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
