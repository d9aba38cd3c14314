"""Files of `repan fuse`: every format agrees, opens without repan, has the same bytes each time, and runs no code."""

import io
import json
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import timm
import torch
from support import card_of, one_line, randomize_norms, relative, run

import repan_cli
from repan_cli import checkpoint, models
from repan_cli.errors import InputError
from repan_cli.export import pt2_file
from repan_cli.models import expand
from repan_cli.session import artifact
from repan_cli.system.packages import how_to_install, missing

pytestmark = pytest.mark.usefixtures("few_blocks")
needs_onnx = pytest.mark.skipif(bool(missing("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing")
FORMATS = ["pt", "safetensors", "pt2", pytest.param("onnx", marks=needs_onnx)]
ALL = ("-f", "pt", "-f", "safetensors", "-f", "pt2") + (() if missing("onnx", "onnxruntime") else ("-f", "onnx"))


def saved_net(path, name="repvgg_a0_cifar", family="repvgg", *, seed=0):
    """A checkpoint of a network with randomised BN, as training would write it."""
    torch.manual_seed(seed)
    native = {"block": family, "branches": None} if name in models.BUILT_OF_BLOCKS else {}
    model = models.create(name, num_classes=10, in_chans=3, **native)
    expansion = models.Expansion(family, (), {})
    if not native:
        expansion = expand(model, family, images=torch.randn(2, 3, 32, 32), attach="one").repan_report
    randomize_norms(model, seed).eval()
    classes = tuple(f"class {number}" for number in range(10))
    card = card_of(model, name, expansion=expansion, classes=classes)
    checkpoint.save(checkpoint.capture(model, card), path)
    return model


@pytest.fixture
def net(few_blocks, tmp_path):
    """A checkpoint and its network."""
    path = tmp_path / "checkpoint" / "net.pt"
    path.parent.mkdir()
    return path, saved_net(path)


@pytest.fixture
def exported(few_blocks, made_once, capsys):
    """What fuse writes of the same checkpoint in every format: the files by their endings."""

    def make(folder):
        saved_net(folder / "net.pt")
        code, _, err = run(capsys, "fuse", folder / "net.pt", *ALL, "-o", folder / "fused")
        assert code == 0, err

    folder = made_once("exports", make)
    return {path.suffix[1:]: path for path in folder.glob("fused.*")}


X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


QUICK_FAMILIES = ("dbb",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in QUICK_FAMILIES else pytest.mark.soak)
        for family in ("plain", "rep", "repvgg", "acb", "dbb", "mobileone", "qarep")
    ],
)
def test_every_family_agrees_in_every_format(capsys, tmp_path, family):
    model = saved_net(tmp_path / "net.pt", family=family)
    code, out, err = run(capsys, "fuse", tmp_path / "net.pt", *ALL, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["images"] == {"random": 8, "real": 0, "why_not_real": "its data are not known"}
    assert facts["gmacs_after"] <= facts["gmacs_before"]
    for file in facts["files"]:
        assert file["rel_error"] < 1e-4
        opened = artifact.open_artifact(file["path"])
        assert relative(opened.network(X), model(X)) < 1e-4
        assert opened.card.classes[3] == "class 3"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_network_gives_the_same_bytes(capsys, net, exported, tmp_path, kind):
    assert run(capsys, "fuse", net[0], "-o", tmp_path / f"again.{kind}")[0] == 0
    content = (tmp_path / f"again.{kind}").read_bytes()
    assert content == exported[kind].read_bytes()
    for part in zipfile.ZipFile(io.BytesIO(content)).infolist() if kind == "pt2" else ():
        assert not part.compress_type  # so that what follows sees all of it
    assert str(tmp_path).encode() not in content
    assert str(exported[kind].parent).encode() not in content
    assert b".py" not in content.replace(b".pyramid", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_export_is_refused(exported, tmp_path, kind):
    path = tmp_path / f"net.{kind}"
    content = exported[kind].read_bytes()
    for place in range(len(content) // 7, len(content), len(content) // 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(InputError, match=r"damaged|cannot be opened|not written by repan"):
            artifact.open_artifact(str(path))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_the_normalisation_goes_into_the_graph(capsys, net, tmp_path, kind):
    path = tmp_path / f"net.{kind}"
    assert run(capsys, "fuse", net[0], "-o", path, "--with-normalize")[0] == 0
    opened = artifact.open_artifact(str(path))
    assert opened.preparation.std == (1.0, 1.0, 1.0)
    raw = torch.rand(3, 3, 32, 32)
    mean, std = (torch.tensor(getattr(opened.card, name)).view(1, 3, 1, 1) for name in ("mean", "std"))
    assert relative(opened.network(raw), net[1]((raw - mean) / std)) < 1e-4


ALONE = {
    "pt2": "network = torch.export.load(path).module()\nlogits = network(torch.ones(3, 3, 32, 32))",
    "onnx": "import onnxruntime\nlogits = torch.from_numpy(onnxruntime.InferenceSession(path).run("
    "None, {'images': torch.ones(3, 3, 32, 32).numpy()})[0])",
}


@pytest.mark.slow
def test_a_machine_without_repan_opens_them(exported, net, tmp_path):
    code = "import sys, torch\nsys.modules['repan_cli'] = sys.modules['timm'] = None\n"
    kinds = [kind for kind in ALONE if kind in exported]
    for kind in kinds:
        code += f"path = {str(exported[kind])!r}\n{ALONE[kind]}\n"
        code += f"torch.save(logits.detach(), {str(tmp_path / kind)!r})\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert "pt2" in kinds
    for kind in kinds:
        assert relative(torch.load(tmp_path / kind), net[1](torch.ones(3, 3, 32, 32))) < 1e-4


PLAIN = [
    *("timm:test_resnet", "timm:test_efficientnet", "timm:repvgg_a0", "timm:mobileone_s0"),
    *(pytest.param(name, marks=pytest.mark.soak) for name in ("timm:mobilenetv3_small_050", "timm:regnety_002")),
]


@pytest.mark.parametrize("name", PLAIN)
def test_conv_bn_loads_strictly_into_the_plain_network(capsys, small_timm, tmp_path, name):
    family = "own" if "rep" in name or "mobileone" in name else "acb"
    model = saved_net(tmp_path / "net.pt", name, family) if family == "acb" else saved_own(tmp_path / "net.pt", name)
    path = tmp_path / "plain.safetensors"
    code, _, err = run(capsys, "fuse", tmp_path / "net.pt", "--form", "conv-bn", "-o", path)
    assert code == 0, err
    plain = timm.create_model(name.removeprefix("timm:"), num_classes=10)
    if family == "own":
        plain = timm.utils.reparameterize_model(plain)
    plain.load_state_dict(safetensors.torch.load_file(path))
    assert relative(plain.eval()(X), model(X)) < 1e-4
    assert relative(repan_cli.load(path)(X), model(X)) < 1e-4


def saved_own(path, name):
    model = models.create(name, num_classes=10, in_chans=3)
    expansion = expand(model, images=torch.randn(2, 3, 32, 32), attach="one").repan_report
    randomize_norms(model).eval()
    checkpoint.save(checkpoint.capture(model, card_of(model, name, expansion=expansion)), path)
    return model


BRANCHES = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head((self.a(x) + self.b(x)).relu().mean((2, 3)))

def build(num_classes, in_chans):
    return Net(num_classes)
"""


def test_conv_bn_where_there_is_no_such_place(capsys, tmp_path):
    """A network that adds branches itself has a place for each of them, none for their sum."""
    (tmp_path / "net.py").write_text(BRANCHES)
    given, out = f"{tmp_path / 'net.py'}:build", tmp_path / "plain.safetensors"
    torch.save(models.create(given, num_classes=10, in_chans=3).state_dict(), tmp_path / "net.pth")
    words = ["fuse", tmp_path / "net.pth", "--model", given, "--out", out]
    assert "it keeps its branches" in one_line(capsys, *words, "--form", "conv-bn")
    assert not out.exists()
    code, text, err = run(capsys, *words)
    assert code == 0, err
    assert "merged 1 block of" in text
    found = repan_cli.load(out, given)
    assert {*found.state_dict()} == {"head.weight", "head.bias", "a.weight", "a.bias"}


@pytest.mark.soak
def test_others_weights_and_names(capsys, tmp_path, monkeypatch):
    """Weights in a file of others', and a name whose pretrained weights come from timm."""
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model("repvgg_a0", num_classes=7)).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "theirs.pth")
    assert "give --model NAME" in one_line(capsys, "fuse", tmp_path / "theirs.pth")
    code, out, err = run(capsys, "fuse", tmp_path / "theirs.pth", "--model", "repvgg_a0", "--json")
    assert code == 0, err
    opened = repan_cli.load(json.loads(out)["out"][0])
    images = torch.randn(2, 3, 64, 64)
    assert relative(opened(images), model(images)) < 1e-4

    monkeypatch.setattr(timm, "create_model", lambda name, **settings: model)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "fuse", "timm:repvgg_a0", "-f", "safetensors")[0] == 0
    assert (tmp_path / "repvgg_a0_fused.safetensors").exists()


def test_bad_wishes(capsys, net, tmp_path, monkeypatch):
    path = net[0]
    assert "--form conv-bn writes weights" in one_line(capsys, "fuse", path, "--form", "conv-bn", "-f", "pt2")
    assert "--with-normalize puts" in one_line(capsys, "fuse", path, "--with-normalize")
    assert "--form bn is not one of conv, conv-bn" in one_line(capsys, "fuse", path, "--form", "bn")
    assert run(capsys, "fuse", path, "-o", tmp_path / "fused.pt")[0] == 0
    assert "is already fused" in one_line(capsys, "fuse", tmp_path / "fused.pt")
    assert run(capsys, "fuse", tmp_path / "fused.pt", "-f", "pt2")[0] == 0
    assert "is already exported" in one_line(capsys, "fuse", tmp_path / "fused_fused.pt2")
    with pytest.raises(InputError, match=r"is an export: torch\.export\.load opens it"):
        repan_cli.load(tmp_path / "fused_fused.pt2")
    monkeypatch.setattr("repan_cli.system.packages.missing", lambda *packages: ["onnxscript"])
    line = one_line(capsys, "fuse", path, "-o", tmp_path / "net.onnx")
    assert f"writing ONNX needs onnxscript: {how_to_install('onnxscript')}" in line


def test_an_operator_that_a_graph_cannot_hold(capsys, tmp_path, monkeypatch):
    """One line, and of several formats none is written."""
    (tmp_path / "net.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    words = ["--model", "net.py:Net", "--dataset", "digits", "--epochs", "1", "optim.warmup_epochs=0", "--out", "run"]
    assert run(capsys, "train", *words)[0] == 0
    line = one_line(capsys, "fuse", "run/last.pt", "--model", "net.py:Net", "-f", "safetensors", "-f", "pt2", "-o", "x")
    assert "cannot be exported as a graph" in line
    assert not list(tmp_path.glob("x*"))
    assert run(capsys, "fuse", "run/last.pt", "--model", "net.py:Net", "-f", "safetensors", "-o", "x")[0] == 0


OWN = """
import torch
class Net(torch.nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_chans, 16, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(16)
        self.head = torch.nn.Linear(16, num_classes)
    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        if float(x.sum()) > 1e9:  # depends on the values: no graph
            x = x / 2
        return self.head(x.mean((2, 3)))
"""


def test_fresh_statistics_are_warned_of(capsys, tmp_path):
    model = models.create("repvgg_a0_cifar", num_classes=10, in_chans=3, block="repvgg")
    saved_net(tmp_path / "net.pt")
    card = checkpoint.load(tmp_path / "net.pt").card
    checkpoint.save(checkpoint.capture(model, card), tmp_path / "fresh.pt")
    _, _, err = run(capsys, "fuse", tmp_path / "fresh.pt")
    assert "never saw an image" in err
    _, _, err = run(capsys, "fuse", tmp_path / "net.pt")
    assert "never saw" not in err


# ---------------------------------------------------------------------------------------------- no code in .pt2


class Evil:
    def __reduce__(self):
        return (open, ("marker", "w"))


def graph_with(change):
    """A change of the description of the graph in a good file."""
    return lambda parts: change(parts["models/model.json"])


def nodes(graph):
    return graph["graph_module"]["graph"]["nodes"]


HOSTILE = {
    "a call of the system": graph_with(lambda graph: nodes(graph)[0].update(target="torch.os.system")),
    "a call by another name": graph_with(
        lambda graph: nodes(graph)[0].update(target="torch.ops.aten.from_file.default")
    ),
    "an extension": graph_with(lambda graph: nodes(graph)[0].update(target="#evil:call")),
    "an expression": graph_with(
        lambda graph: graph.update(range_constraints={}, extra={"expr_str": "__import__('os').system('touch marker')"})
    ),
    "guards": graph_with(lambda graph: graph.update(guards_code=["open('marker', 'w')"])),
    "named tuples": graph_with(
        lambda graph: graph["graph_module"].update(treespec_namedtuple_fields={"os.x": {"fields": ["a"]}})
    ),
    "types of its own": graph_with(
        lambda graph: graph["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec='[1, {"type": "evil.Type", "context": "x", "children_spec": []}]'
        )
    ),
    "pickled weights": lambda parts: next(
        iter(parts["data/weights/model_weights_config.json"]["config"].values())
    ).update(use_pickle=True),
    "pickled inputs": lambda parts: parts.update({"data/sample_inputs/model.pt": Evil}),
    "a library": lambda parts: parts.update({"data/aotinductor/model/evil.so": b"ELF"}),
    "a part outside": lambda parts: parts.update({"../evil.json": b"{}"}),
}


def rewritten(content, change):
    """A `.pt2` file again, with a change in its parts by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        raw = {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}
    parts = {name: json.loads(value) if name.endswith(".json") else value for name, value in raw.items()}
    change(parts)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in parts.items():
            if value is Evil:
                pickled = io.BytesIO()
                torch.save(Evil(), pickled)
                value = pickled.getvalue()
            archive.writestr(f"archive/{name}", value if isinstance(value, bytes) else json.dumps(value))
    return buffer.getvalue()


@pytest.fixture
def good_pt2(exported):
    return exported["pt2"].read_bytes()


def test_a_rewritten_file_without_code_opens(good_pt2):
    content = rewritten(good_pt2, lambda parts: None)
    assert pt2_file.Pt2Network(content)(X).shape == (5, 10)


@pytest.mark.parametrize("what", HOSTILE)
def test_no_file_runs_code(good_pt2, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt2").write_bytes(rewritten(good_pt2, HOSTILE[what]))
    with pytest.raises(InputError, match=r"refused, no code is run"):
        artifact.open_artifact("evil.pt2")
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------------------------------------- using what was written


@pytest.mark.slow
def test_predict_and_evaluate_take_every_format(capsys, small_run, tmp_path):
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for number in range(3):
        picture = (bunch.images[number] * (255 / 16)).round().astype("uint8")
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    out = tmp_path / "net"
    code, text, err = run(capsys, "fuse", small_run.folder, *ALL, "-o", out, "--json")
    assert code == 0, err
    facts = json.loads(text)
    assert facts["images"]["real"] == 8
    found = {}
    for path in (small_run.folder / "best.pt", *facts["out"]):
        _, text, _ = run(capsys, "predict", path, tmp_path, "--top", "3", "--json")
        rows = json.loads(text)
        assert [row["image"] for row in rows] == [str(tmp_path / f"{number}.png") for number in range(3)]
        assert all(len(row["classes"]) == 3 for row in rows)
        _, text, _ = run(capsys, "evaluate", path, "--json")
        found[str(path)] = rows, json.loads(text)
    first, score = next(iter(found.values()))
    assert score["top1"] == small_run.summary["test"]["top1"]
    for rows, other in found.values():
        assert other["top1"] == score["top1"]
        assert other["class_top1"] == score["class_top1"]
        for row, wanted in zip(rows, first, strict=True):
            assert [each["class"] for each in row["classes"]] == [each["class"] for each in wanted["classes"]]
            assert row["classes"][0]["probability"] == pytest.approx(wanted["classes"][0]["probability"], abs=1e-4)


def test_predict_names_what_it_cannot_read(capsys, small_run, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8), 9).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no image")
    code, out, err = run(capsys, "predict", small_run.folder / "fused.pt", tmp_path)
    assert code == 2
    assert "good.png" in out
    assert f"cannot read the image {tmp_path / 'bad.png'}" in err
    assert err.splitlines()[-1].startswith(f"Error: 1 of 2 images could not be read: {tmp_path / 'bad.png'}")
    assert "no such image" in one_line(capsys, "predict", small_run.folder / "fused.pt", tmp_path / "none.png")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in one_line(capsys, "predict", small_run.folder / "fused.pt", tmp_path / "empty")
    assert "--top must be at least 1, got 0" in one_line(
        capsys, "predict", small_run.folder / "fused.pt", tmp_path, "--top", "0"
    )


def test_info_of_every_format(capsys, small_timm, exported, tmp_path):
    assert len(exported) == len(ALL) / 2
    for path in map(str, exported.values()):
        code, text, err = run(capsys, "info", path, "--json")
        assert code == 0, err
        facts = json.loads(text)
        assert (facts["model"], facts["form"], facts["classes"][1]) == ("repvgg_a0_cifar", "fused", "class 1")
        if path.endswith(".onnx"):
            assert facts["inputs"] == {"images": ["batch", 3, 32, 32]}
            assert facts["operators"]["Conv"] == 5
    torch.save({"model": timm.create_model("repvgg_a0", num_classes=7).state_dict()}, tmp_path / "theirs.pth")
    _, text, _ = run(capsys, "info", tmp_path / "theirs.pth", "--json")
    assert json.loads(text)["form"] == "multi-branch, timm's names"
    _, text, _ = run(capsys, "info", tmp_path / "theirs.pth", "--model", "repvgg_a0", "--json")
    assert (json.loads(text)["fits"], json.loads(text)["classes"]) == ("timm:repvgg_a0", 7)
    assert "does not fit the network" in one_line(capsys, "info", tmp_path / "theirs.pth", "--model", "resnet18")
    assert "no file nothing" in one_line(capsys, "info", "nothing")


def test_others_graphs(capsys, tmp_path):
    """An ONNX file of others' is described; of their .pt2 neither classes nor images are known."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    images = (torch.randn(2, 3, 8, 8),)
    torch.export.save(torch.export.export(model, images), tmp_path / "theirs.pt2")
    assert "is not opened: such files can run code" in one_line(capsys, "info", tmp_path / "theirs.pt2")
    assert "was not written by repan fuse" in one_line(capsys, "evaluate", tmp_path / "theirs.pt2")
    if not missing("onnx", "onnxscript", "onnxruntime"):
        torch.onnx.export(model, images, tmp_path / "theirs.onnx", dynamo=True, external_data=False, verbose=False)
        _, text, _ = run(capsys, "info", tmp_path / "theirs.onnx", "--json")
        assert json.loads(text)["operators"]["Conv"] == 1
        assert "was not written by repan fuse" in one_line(capsys, "evaluate", tmp_path / "theirs.onnx")
