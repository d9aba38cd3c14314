"""Formats of other programs: each agrees in its program, is checked before it is opened, and runs no code unasked."""

import ctypes
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from support import ROOT, card_of, one_line, randomize_norms, relative, repan, run, small_net

from repan_cli import checkpoint, models
from repan_cli.errors import InputError
from repan_cli.export import runtimes
from repan_cli.export.runtimes import coreml, openvino_files
from repan_cli.session.artifact import open_artifact
from repan_cli.system import packages, signals
from repan_cli.system.packages import RUNTIME_PACKAGES, missing

pytestmark = pytest.mark.usefixtures("few_blocks")
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def needs(kind, *marks):
    lacking = missing(*RUNTIME_PACKAGES[kind])
    skip = pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")
    return pytest.param(kind, marks=(skip, *marks))


RUN_HERE = [needs("torchscript"), needs("openvino"), needs("ncnn"), needs("tflite")]


@pytest.fixture
def saved(made_once, few_blocks):
    """A checkpoint of a small network."""

    def make(folder):
        model = small_net()
        checkpoint.save(checkpoint.capture(model, card_of(model)), folder / "net.pt")

    return made_once("runtimes_net", make) / "net.pt"


@pytest.fixture
def script(made_once, saved, capsys):
    """The folder of a TorchScript program."""

    def make(folder):
        code, _, err = run(capsys, "fuse", saved, "-f", "torchscript", "-o", folder / "net")
        assert code == 0, err

    return made_once("torchscript", make) / "net_torchscript"


@pytest.mark.parametrize("kind", RUN_HERE)
def test_it_agrees_in_its_own_program(capsys, saved, tmp_path, kind):
    code, out, err = run(capsys, "fuse", saved, "-f", kind, "-o", tmp_path / "net", "--json")
    assert code == 0, err
    (file,) = json.loads(out)["files"]
    assert file["rel_error"] < 1e-5
    assert file["opened_by"] == runtimes.KINDS[kind].title
    opened = open_artifact(str(tmp_path / f"net_{kind}"), trusted=True)
    assert opened.runtime == runtimes.KINDS[kind].title
    model = small_net()
    with torch.no_grad():
        for count in (1, 3):
            assert relative(opened.network(X[:count]), model(X[:count])) < 1e-5
    assert opened.card.classes[3] == "3"
    again = open_artifact(str(tmp_path / f"net_{kind}" / runtimes.KINDS[kind].files[0]), trusted=True)
    assert again.source == opened.source  # any of its files stands for the folder


@pytest.mark.soak
@pytest.mark.parametrize("kind", [needs("torchscript"), needs("openvino"), needs("ncnn")])
def test_the_same_network_gives_the_same_bytes(small_whole_net, tmp_path, kind):
    """In processes of their own: TorchScript and OpenVINO count the programs of a process in their names."""
    for name in ("one", "two"):
        assert repan("fuse", small_whole_net, "-f", kind, "-o", tmp_path / name).returncode == 0
    for file in (*runtimes.KINDS[kind].files, "repan.json"):
        content = (tmp_path / f"one_{kind}" / file).read_bytes()
        assert content == (tmp_path / f"two_{kind}" / file).read_bytes()
        assert str(ROOT).encode() not in content
        assert str(tmp_path).encode() not in content
        assert b"site-packages" not in content


@pytest.fixture
def small_whole_net(tmp_path):
    """A checkpoint that another process opens, which knows nothing of `few_blocks`."""
    model = models.create("mobilenetv1_cifar", num_classes=10, in_chans=3)
    randomize_norms(model).eval()
    card = card_of(model, "mobilenetv1_cifar", expansion=models.Expansion("plain", (), {}))
    checkpoint.save(checkpoint.capture(model, card), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize("kind", [needs("torchscript"), needs("openvino", pytest.mark.soak)])
def test_the_normalisation_goes_into_the_graph(capsys, saved, tmp_path, kind):
    assert run(capsys, "fuse", saved, "-f", kind, "-o", tmp_path / "net", "--with-normalize")[0] == 0
    opened = open_artifact(str(tmp_path / f"net_{kind}"), trusted=True)
    assert opened.preparation.std == (1.0, 1.0, 1.0)
    raw = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(getattr(opened.card, name)).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        assert relative(opened.network(raw), small_net()((raw - mean) / std)) < 1e-5


@pytest.mark.parametrize("kind", RUN_HERE)
def test_evaluate_and_predict_open_it(capsys, small_run, tmp_path, kind):
    code, _, err = run(capsys, "fuse", small_run.folder / "best.pt", "-f", kind, "-o", tmp_path / "net")
    assert code == 0, err
    words = ("--trust-code",) if kind == "torchscript" else ()
    code, out, err = run(capsys, "evaluate", tmp_path / f"net_{kind}", "--json", *words)
    assert code == 0, err
    assert json.loads(out)["top1"] == small_run.summary["test"]["top1"]
    Image.new("L", (8, 8), 200).save(tmp_path / "one.png")
    wanted, found = (
        json.loads(run(capsys, "predict", source, tmp_path / "one.png", "--json", *more)[1])
        for source, more in ((small_run.folder / "best.pt", ()), (tmp_path / f"net_{kind}", words))
    )
    assert [each["class"] for each in found[0]["classes"]] == [each["class"] for each in wanted[0]["classes"]]


# ---------------------------------------------------------------------------------------------- no code unasked


@pytest.mark.parametrize("words", [("evaluate",), ("benchmark",), ("predict", "image"), ("fuse",), ("quantize",)])
def test_a_program_is_not_run_unless_it_is_trusted(capsys, script, tmp_path, monkeypatch, words):
    Image.new("L", (8, 8), 200).save(tmp_path / "one.png")
    monkeypatch.setattr(torch.jit, "load", None)
    more = [tmp_path / "one.png"] if "image" in words else []
    line = one_line(capsys, words[0], script, *more)
    assert "holds a TorchScript program, which is code: if you trust it, give --trust-code" in line


def test_info_runs_nothing(capsys, script, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", None)
    code, out, err = run(capsys, "info", script, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["format"] == "torchscript"
    assert found["files"] == {"model.torchscript": (script / "model.torchscript").stat().st_size}


@pytest.mark.slow
def test_libtorch_alone_opens_it(script, tmp_path):
    code = (
        "import sys, torch\nsys.modules['repan_cli'] = sys.modules['timm'] = None\n"
        f"program = torch.jit.load({str(script / 'model.torchscript')!r})\n"
        f"torch.save([program(torch.ones(n, 3, 32, 32)) for n in (1, 4)], {str(tmp_path / 'logits')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    model = small_net()
    with torch.no_grad():
        for logits in torch.load(tmp_path / "logits"):
            assert relative(logits, model(torch.ones(len(logits), 3, 32, 32))) < 1e-5


# ---------------------------------------------------------------------------------------------- damage


def changed(change):
    """A change of the description in a folder."""

    def make(folder):
        told = json.loads((folder / "repan.json").read_text())
        change(told)
        (folder / "repan.json").write_text(json.dumps(told))

    return make


def flipped(folder):
    content = bytearray((folder / "model.torchscript").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.torchscript").write_bytes(content)


DAMAGED = {
    "is damaged: its bytes do not match": flipped,
    "lacks model.torchscript": lambda folder: (folder / "model.torchscript").unlink(),
    "names files that TorchScript does not have": changed(lambda told: told["files"].update({"../x": "0"})),
    "names files that TorchScript does not": changed(lambda told: told.update(files={})),
    "has a format that this version of repan does not know": changed(lambda told: told.update(runtime="other")),
    "has a format that this version of repan does": changed(lambda told: told.update(runtime=["a"])),
    "was not written by repan fuse": changed(lambda told: told.pop("files")),
    "was not written by repan": lambda folder: (folder / "repan.json").write_text("[1]"),
    "so its classes and images are not known": changed(lambda told: told["meta"].update(evil=1)),
}


@pytest.mark.parametrize("says", DAMAGED)
def test_a_folder_that_is_not_whole_is_refused(script, tmp_path, says):
    folder = shutil.copytree(script, tmp_path / "net")
    DAMAGED[says](folder)
    with pytest.raises(InputError, match=says):
        open_artifact(str(folder), trusted=True)


@pytest.mark.parametrize("kind", [needs("openvino")])
def test_a_model_that_may_never_end_is_refused(tmp_path, kind):
    (tmp_path / "model.xml").write_text('<net><layers><layer id="0" type="Loop"/></layers></net>')
    with pytest.raises(InputError, match="holds a loop"):
        openvino_files.OpenVinoNetwork(tmp_path / "model.xml")


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are Linux's")
def test_a_thread_has_its_signal_stack_again_after_another_was_set():
    buffers = [ctypes.create_string_buffer(65536) for _ in range(2)]

    def in_a_thread():
        own, other = (signals._SignalStack(ctypes.addressof(buffer), 0, 65536) for buffer in buffers)
        libc = ctypes.CDLL(None)
        assert libc.sigaltstack(ctypes.byref(own), None) == 0
        with signals.kept_signal_stack():
            assert libc.sigaltstack(ctypes.byref(other), None) == 0
            assert signal_stack() == (other.address, 0, 65536)
        found = signal_stack()
        libc.sigaltstack(ctypes.byref(signals._SignalStack(None, 2, 0)), None)  # none, before the buffers go
        return found

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(in_a_thread).result() == (ctypes.addressof(buffers[0]), 0, 65536)


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are Linux's")
@pytest.mark.parametrize("kind", [needs("openvino")])
def test_networks_of_openvino_leave_no_freed_signal_stack(capsys, saved, tmp_path, kind):
    """OpenVINO frees the signal stacks that it sets; a process that keeps a freed one dies of its next signal."""
    assert run(capsys, "fuse", saved, "-f", kind, "-o", tmp_path / "net")[0] == 0
    before = signal_stack()
    networks = [openvino_files.OpenVinoNetwork(tmp_path / "net_openvino" / "model.xml") for _ in range(2)]
    while networks:
        assert signal_stack() == before
        del networks[0]
    assert signal_stack() == before


def signal_stack():
    stack = signals._SignalStack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.address, stack.flags, stack.size


# ---------------------------------------------------------------------------------------------- what is missing


def test_a_missing_package_is_named_with_its_extra(capsys, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda *names: [name for name in names if name in ("openvino", "pnnx")])
    line = one_line(capsys, "fuse", saved, "-f", "openvino", "-o", tmp_path / "x")
    assert "the format openvino needs openvino: " in line
    assert "-m pip install" in one_line(capsys, "fuse", saved, "-f", "ncnn", "-o", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_unproven_file_is_not_written(capsys, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda *names: [])
    monkeypatch.setattr(coreml.platform, "system", lambda: "Linux")
    line = one_line(capsys, "fuse", saved, "-f", "coreml", "-o", tmp_path / "x")
    assert "--format coreml cannot be verified here: Core ML runs only on macOS; --unproven writes it" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(bool(missing("coremltools")), reason="not installed: coremltools")
def test_core_ml_is_written_unproven(capsys, saved, tmp_path):
    code, out, err = run(capsys, "fuse", saved, "-f", "coreml", "-o", tmp_path / "x", "--unproven", "--json")
    assert code == 0, err
    assert sys.platform == "darwin" or json.loads(out)["files"][0]["rel_error"] is None
    import coremltools

    spec = coremltools.utils.load_spec(str(tmp_path / "x_coreml" / "model.mlpackage"))
    assert [each.name for each in spec.description.input] == ["images"]


OWN = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(in_chans, 8, 3), nn.BatchNorm2d(8)
        self.head, self.more = nn.Linear(8, num_classes), nn.Linear(8, 2)
    def forward(self, x):
        x = self.bn(self.conv(x)).mean((2, 3))
        return {"logits": self.head(x), "more": self.more(x)}
"""


@pytest.mark.parametrize("kind", ["torchscript", needs("openvino")])
def test_several_outputs_are_refused(capsys, tmp_path, monkeypatch, kind):
    (tmp_path / "several.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    model = randomize_norms(models.create("several.py:Net", num_classes=10, in_chans=3))
    model.bn.num_batches_tracked += 1
    card = card_of(model, "several.py:Net", expansion=models.Expansion("plain", (), {}))
    checkpoint.save(checkpoint.capture(model, card), tmp_path / "net.pt")
    line = one_line(capsys, "fuse", "net.pt", "--model", "several.py:Net", "-f", kind, "-o", "x")
    assert "net.pt returns several tensors: use --format onnx or pt2" in line
    assert not list(tmp_path.glob("x*"))


def test_every_format_is_declared_once():
    from repan_cli.config.conventions import RUNTIME_FORMATS

    assert tuple(runtimes.KINDS) == RUNTIME_FORMATS == tuple(RUNTIME_PACKAGES)
