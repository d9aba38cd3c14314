"""ONNX files for older runtimes: every opset that is offered computes the same in ONNX Runtime."""

import copy
import json

import pytest
import torch
from support import one_line, randomize_norms, relative, run
from torch import nn
from torch.nn import functional

from repan_cli import export, models
from repan_cli.errors import InputError
from repan_cli.export import onnx_file, opset
from repan_cli.export.trace import trace
from repan_cli.system.packages import missing

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.skipif(bool(missing("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing")
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Has the operators that changed most between the opsets."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = functional.max_pool2d(functional.hardswish(self.conv(x)), 2)
        x = functional.relu6(functional.pad(x, (1, 1, 1, 1)))
        x = x * functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        first, second = self.deep(x).chunk(2, dim=1)
        some, rest = self.deep(x).split([3, 5], dim=1)
        x = functional.silu(torch.cat([second, first], 1)) + functional.gelu(torch.cat([rest, some], 1))
        return self.head(torch.cat([functional.adaptive_avg_pool2d(x, 1).flatten(1), x.mean((2, 3))], 1))


@pytest.fixture(scope="module")
def written():
    torch.manual_seed(0)
    network = Net().eval()
    return network, onnx_file.model_of(trace(network, X, "net"))


@pytest.mark.parametrize("version", opset.OPSETS)
def test_every_opset_computes_the_same_in_onnx_runtime(written, version):
    network, model = written
    found = opset.at_opset(copy.deepcopy(model), version)
    assert [each.version for each in found.opset_import if each.domain in ("", "ai.onnx")] == [version]
    assert relative(onnx_file.OnnxNetwork(found.SerializeToString())(X), network(X)) < 1e-5
    assert relative(onnx_file.OnnxNetwork(found.SerializeToString())(X[:1]), network(X[:1])) < 1e-5


def test_older_opsets_are_older_files(written):
    """A runtime refuses a file of a newer version of ONNX, whatever its opset."""
    versions = [opset.at_opset(copy.deepcopy(written[1]), version).ir_version for version in (11, 13, 18)]
    assert versions == [6, 7, 8]


@pytest.mark.soak
@pytest.mark.parametrize(
    "name", ["timm:mobilenetv3_small_050", "timm:mobileone_s0", "timm:resnet18", "timm:densenet121"]
)
def test_known_networks(name):
    torch.manual_seed(0)
    network, _ = export.fuse(randomize_norms(models.create(name, num_classes=10, in_chans=3)).eval(), X)
    model = onnx_file.model_of(trace(network, X, name))
    for version in opset.OPSETS:
        found = opset.at_opset(copy.deepcopy(model), version)
        assert relative(onnx_file.OnnxNetwork(found.SerializeToString())(X), network(X)) < 1e-4


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(x).mean((2, 3))


def test_a_network_that_does_not_fit_is_refused_with_the_range():
    model = onnx_file.model_of(trace(Normed().eval(), X, "net"))
    with pytest.raises(
        InputError, match=r"does not fit into opset 12 \(.*LayerNormalization.*\): choose from 17 to 21$"
    ):
        opset.at_opset(model, 12)


def test_an_operator_whose_meaning_changed_is_not_relabelled():
    """Softmax of opset 12 flattens what is behind its axis."""

    class Attention(nn.Module):
        def forward(self, x):
            return x.flatten(2).softmax(2).mean(2)

    network = Attention().eval()
    model = onnx_file.model_of(trace(network, X, "net"))
    with pytest.raises(InputError, match=r"Softmax was another operator in it\): choose from 13 to 21"):
        opset.at_opset(copy.deepcopy(model), 11)
    found = onnx_file.OnnxNetwork(opset.at_opset(model, 13).SerializeToString())
    assert relative(found(X), network(X)) < 1e-5


def test_fuse_writes_the_opset_that_is_asked_for(capsys, few_blocks, small_run, tmp_path):
    path = tmp_path / "old.onnx"
    code, out, err = run(capsys, "fuse", small_run.folder, "-o", path, "--opset", "12", "--json")
    assert code == 0, err
    assert json.loads(out)["files"][0]["rel_error"] < 1e-5
    _, out, _ = run(capsys, "info", path, "--json")
    assert json.loads(out)["opset"] == {"onnx": 12}
    _, out, _ = run(capsys, "evaluate", path, "--json")
    assert json.loads(out)["top1"] == small_run.summary["test"]["top1"]


@pytest.mark.parametrize("version", [-1, 0, 10, 22, 99])
def test_opsets_that_are_not_offered(capsys, few_blocks, small_run, tmp_path, version):
    line = one_line(capsys, "fuse", small_run.folder, "-o", tmp_path / "a.onnx", "--opset", version)
    assert f"--opset {version} is not supported: choose from 11 to 21" in line


def test_opset_is_for_onnx(capsys, few_blocks, small_run, tmp_path):
    assert "--opset is for ONNX" in one_line(
        capsys, "fuse", small_run.folder, "-o", tmp_path / "a.pt2", "--opset", "13"
    )
    line = one_line(capsys, "quantize", small_run.folder, "-o", tmp_path / "a.onnx", "--opset", "12")
    assert "--opset 12 is not supported: choose from 13 to 21" in line


@pytest.mark.parametrize("version", [13, 21])
def test_quantize_writes_the_opset_that_is_asked_for(capsys, few_blocks, small_run, tmp_path, version):
    words = ["-o", tmp_path / "a.onnx", "--opset", version, "--images", "64", "--json"]
    code, out, err = run(capsys, "quantize", small_run.folder, *words)
    assert code == 0, err
    assert json.loads(out)["int8"]["top1"] > 80
    _, out, _ = run(capsys, "info", tmp_path / "a.onnx", "--json")
    assert json.loads(out)["opset"]["onnx"] == version
