"""Every file describes the preparation of its images, and other programs that follow it get the same answers."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from PIL import Image
from support import FP32, ROOT, card_of, run, write_folders
from torch import nn

from repan_cli import checkpoint
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.checkpoint.preprocessing import as_texts, preprocessing
from repan_cli.data import build
from repan_cli.export import onnx_file
from repan_cli.session import artifact_images
from repan_cli.session.artifact import Artifact, open_artifact
from repan_cli.system.packages import missing

needs_onnx = pytest.mark.skipif(bool(missing("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing")
CLASSES = tuple(f"kind {number}" for number in range(5))


def card(size, channels=3, **more):
    stats = {"mean": (0.485, 0.456, 0.406)[:channels], "std": (0.229, 0.224, 0.225)[:channels]}
    return card_of(nn.Identity(), block=None, image_size=size, in_chans=channels, classes=CLASSES, **stats, **more)


def artifact_of(described):
    return Artifact("it", nn.Identity(), described)


# ---------------------------------------------------------------------------------------------- as timm does


def picture(width, height, mode="RGB", seed=0):
    """A picture with edges in it, on which filters and crops differ."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST).convert(mode)


@pytest.mark.parametrize("share", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("size", [96, 160, 224])
def test_large_pictures_are_resized_as_timm_does(size, share):
    described = card(size, crop_share=share)
    assert preprocessing(described)["resize_size"] == math.floor(size / share)
    theirs = timm.data.create_transform(
        (3, size, size), mean=described.mean, std=described.std, interpolation="bicubic", crop_pct=share
    )
    ready = artifact_of(described).preparation
    for image in (picture(301, 200), picture(200, 333), picture(97, 97)):
        assert torch.allclose(ready.normalized(ready.picture(image)), theirs(image), atol=1e-6)


@pytest.mark.parametrize("mode", ["squash", "border"])
@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
def test_the_other_ways_of_timm(mode, filter_name):
    described = card(96, crop_share=0.9, crop_mode=mode, interpolation=filter_name)
    stats = {"mean": described.mean, "std": described.std}
    theirs = timm.data.create_transform((3, 96, 96), interpolation=filter_name, crop_pct=0.9, crop_mode=mode, **stats)
    ready = artifact_of(described).preparation
    for image in (picture(301, 200), picture(60, 333)):
        assert torch.allclose(ready.normalized(ready.picture(image)), theirs(image), atol=1e-6)
    told = preprocessing(described)
    assert (told["crop_mode"], told["interpolation"], told["resize_size"]) == (mode, filter_name, 106)
    assert told.get("fill") == ([124, 116, 104] if mode == "border" else None)


def test_evaluation_sees_what_prediction_sees(tmp_path):
    """Squashed and bilinear, as the network of a Hub folder may want it."""
    root = write_folders(tmp_path, parts=("test",), size=(130, 110))
    described = card(96, crop_share=0.9, crop_mode="squash", interpolation="bilinear")
    described = dataclasses.replace(described, classes=("ant", "bee"))
    artifact = artifact_of(described)
    data = artifact_images.load(artifact, "folder", str(root), split="test")
    batch = next(build.eval_loader(data, "test", FP32, 0, crop=artifact.preparation.crop).batches(12))
    for image, path in zip(batch.images, sorted(root.glob("test/*/*.png")), strict=True):
        assert torch.allclose(image, artifact.preparation.file(path), atol=1e-6)


# ---------------------------------------------------------------------------------------------- in every format


def test_the_normalisation_of_the_network_itself_is_not_told():
    told = preprocessing(card(96, normalizes=True))
    assert (told["mean"], told["std"], told["value_range"]) == ([0.0] * 3, [1.0] * 3, [0.0, 1.0])
    assert "less mean" not in told["preprocessing"]
    assert "less mean" in preprocessing(card(96))["preprocessing"]


def test_small_networks_and_settings():
    small = preprocessing(card(64))
    assert (small["crop_mode"], small["resize_size"], small["interpolation_whole"]) == ("square", 64, "box")
    assert preprocessing(card(64, config={"data.crop": "resized"}))["crop_mode"] == "center"
    assert preprocessing(card(96, config={"data.crop": "square"}))["crop_mode"] == "square"
    assert preprocessing(card(32, channels=1))["color_order"] == "L"


KEYS = (
    *("input_size", "color_order", "value_range", "mean", "std", "crop_mode", "resize_size", "crop_pct"),
    *("interpolation", "classes", "preprocessing"),
)


@pytest.fixture
def hub(tmp_path):
    """A folder of the Hub with a network that wants another preparation than the usual one."""
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    images = {"input_size": [3, 96, 96], "interpolation": "bilinear", "crop_mode": "squash", "crop_pct": 0.9}
    stats = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    described = {"architecture": "test_resnet", "num_classes": 5, "label_names": list(CLASSES)}
    (folder / "config.json").write_text(json.dumps({**described, "pretrained_cfg": {**images, **stats}}))
    return folder


def told_by(path):
    """What a program without repan reads in a file."""
    if path.suffix == ".onnx":
        import onnxruntime

        return dict(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map)
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata()
    if path.suffix == ".pt2":
        extra = {"repan.json": ""}
        torch.export.load(path, extra_files=extra)
        return as_texts(json.loads(extra["repan.json"])["preprocessing"])
    return as_texts(torch.load(path, weights_only=True)["preprocessing"])


@pytest.mark.slow
def test_files_of_a_hub_folder_carry_its_preparation_in_every_format(capsys, hub, tmp_path):
    kinds = ["pt", "safetensors", "pt2"] + ([] if missing("onnx", "onnxscript", "onnxruntime") else ["onnx"])
    code, _, err = run(capsys, "fuse", hub, *(word for kind in kinds for word in ("-f", kind)), "-o", tmp_path / "net")
    assert code == 0, err
    for kind in kinds:
        path = tmp_path / f"net.{kind}"
        told = told_by(path)
        assert set(KEYS) <= told.keys()
        assert json.loads(told["input_size"]) == [3, 96, 96]
        assert (told["interpolation"], told["crop_mode"], told["crop_pct"]) == ("bilinear", "squash", "0.9")
        assert (json.loads(told["mean"]), json.loads(told["std"])) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
        assert (told["resize_size"], json.loads(told["classes"])) == ("106", list(CLASSES))
        opened = open_artifact(str(path))
        assert opened.preparation == open_artifact(str(hub)).preparation
        assert opened.preparation.crop.interpolation == "bilinear"


def test_a_name_of_timm_has_its_own_preparation(tmp_path):
    """Here with weights in a file, as no test downloads."""
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "net.pth")
    found = preprocessing(open_artifact(str(tmp_path / "net.pth"), "timm:test_resnet").card)
    assert (found["input_size"], found["interpolation"]) == ([3, 160, 160], "bilinear")
    assert (found["crop_pct"], found["resize_size"]) == (0.95, 168)


def test_files_of_a_name_of_timm_carry_its_preparation(capsys, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **more: create(*names, **{**more, "pretrained": False}))
    code, _, err = run(capsys, "fuse", "timm:test_resnet", "-o", tmp_path / "net.safetensors")
    assert code == 0, err
    told = told_by(tmp_path / "net.safetensors")
    assert (told["interpolation"], told["crop_mode"], told["resize_size"]) == ("bilinear", "center", "168")
    assert json.loads(told["classes"])[0].startswith("tench")


def test_one_mean_stands_for_all_channels(hub):
    told = json.loads((hub / "config.json").read_text())
    told["pretrained_cfg"] |= {"mean": [0.5], "std": [0.25]}
    (hub / "config.json").write_text(json.dumps(told))
    opened = open_artifact(str(hub))
    assert (opened.card.mean, opened.card.std) == ((0.5,) * 3, (0.25,) * 3)
    assert checkpoint.card.ModelCard.from_meta(opened.card.as_meta()) == opened.card


def test_equal_checkpoints_are_equal_bytes(tmp_path):
    """The header of safetensors files too, which has many entries now."""
    saved = Checkpoint({"a": torch.arange(7.0), "b": torch.ones(2, 3).half()}, card(32))
    content = checkpoint.as_bytes(saved, ".safetensors")
    assert content == checkpoint.as_bytes(saved, ".safetensors")
    (tmp_path / "a.safetensors").write_bytes(content)
    assert all(torch.equal(saved.weights[k], v) for k, v in checkpoint.load(tmp_path / "a.safetensors").weights.items())
    assert int.from_bytes(content[:8], "little") % 8 == 0


# ---------------------------------------------------------------------------------------------- without repan


def network(size, channels):
    """An ONNX file of a small network whose answers depend on every pixel."""
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(size)
    cells = max(2, size // 16)
    shapes = {"kernel": (16, channels, cells, cells), "matrix": (5, 16)}
    scales = {"kernel": 1.5 / math.sqrt(channels * cells**2), "matrix": 0.1}
    weights = [
        numpy_helper.from_array((draw.normal(size=shape) * scales[name]).astype("float32"), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["maps"], strides=[cells // 2] * 2),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalMaxPool", ["active"], ["largest"]),
        helper.make_node("Flatten", ["largest"], ["flat"]),
        helper.make_node("Gemm", ["flat", "matrix"], ["logits"], transB=1),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", channels, size, size])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def write_pictures(folder):
    """Grey, rotated by EXIF, with alpha and with a palette; of sides that are multiples of a network's, and others."""
    folder.mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    picture(301, 200).save(folder / "color.jpg")
    picture(320, 640, seed=1).save(folder / "multiple.jpg")
    picture(301, 200, "L").save(folder / "grey.jpg")
    picture(300, 190).save(folder / "rotated.jpg", exif=rotated)
    clear = picture(210, 310)
    clear.putalpha(picture(210, 310, "L", seed=2))
    clear.save(folder / "alpha.png")
    picture(333, 200).quantize(32).save(folder / "palette.png")
    picture(45, 31).save(folder / "small.gif")
    picture(450, 310, "CMYK").save(folder / "inks.jpg")
    return folder


ALONE = (
    "import sys\nfor name in ('torch', 'torchvision', 'timm', 'repan_cli', 'scipy', 'onnx'): sys.modules[name] = None\n"
)


def script():
    """The script of the manual, for a file and images that are named on its command line."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    text = next(each for each in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "onnxruntime" in each)
    text = text.replace('"plain.onnx"', "sys.argv[1]")
    last = 'print(predict("images/one.png"))\n'
    assert text.endswith(last)
    return (
        ALONE
        + text.removesuffix(last)
        + "for p in sys.argv[2:]: print(json.dumps([*map(float, predict(p).values())]))\n"
    )


@needs_onnx
@pytest.mark.parametrize(
    ("size", "channels", "more"),
    [
        (32, 3, {}),
        (64, 3, {}),
        (96, 3, {}),
        (160, 3, {"crop_share": 0.95, "interpolation": "bilinear"}),
        (224, 3, {}),
        (32, 1, {}),
        (96, 1, {"normalizes": True}),
    ],
)
def test_a_short_script_gives_the_same_answers(capsys, tmp_path, size, channels, more):
    described = card(size, channels, **more)
    path, folder = tmp_path / "net.onnx", write_pictures(tmp_path / "pictures")
    path.write_bytes(onnx_file.seal(network(size, channels), checkpoint.header(Checkpoint({}, described))))
    code, out, err = run(capsys, "predict", path, folder, "--top", "5", "--json")
    assert code == 0, err
    expected = {
        row["image"]: sorted((each["index"], each["probability"]) for each in row["classes"]) for row in json.loads(out)
    }
    assert len(expected) == 8
    command = [sys.executable, "-c", script(), path, *expected]
    found = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout.splitlines()
    for line, (image, wanted) in zip(found, expected.items(), strict=True):
        assert json.loads(line) == pytest.approx([share for _, share in wanted], abs=1e-6), image


@needs_onnx
def test_these_networks_see_how_a_picture_was_resized(tmp_path):
    """So that the test above would fail for one pixel more, or another filter."""
    described = card(96)
    model = onnx_file.OnnxNetwork(network(96, 3).SerializeToString())
    ready = artifact_of(described).preparation
    image = picture(301, 200)
    others = [
        dataclasses.replace(ready, crop=dataclasses.replace(ready.crop, share=0.872)),
        dataclasses.replace(ready, crop=dataclasses.replace(ready.crop, interpolation="bilinear")),
        dataclasses.replace(ready, resized=False),
    ]
    first, *rest = (model(each.normalized(each.picture(image))[None]).softmax(1) for each in (ready, *others))
    assert all((first - other).abs().max() > 1e-3 for other in rest)
