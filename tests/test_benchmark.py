"""Forms of a network are timed in turns; `repan benchmark` prints and returns the figures."""

import importlib.metadata
import json
import runpy
import sys

import pytest
import torch
from support import ROOT, card_of, one_line, run
from torch import nn

from repan_cli.commands import benchmark, early
from repan_cli.commands.options import BenchmarkOptions
from repan_cli.errors import InputError
from repan_cli.session.artifact import Artifact
from repan_cli.system import timing
from repan_cli.system.device import Runtime, start_runtime
from repan_cli.system.packages import missing


def test_cases_take_turns():
    called = []
    cases = {name: lambda name=name: called.append(name) for name in ("a", "b", "c")}
    found = timing.interleaved(cases, seconds=0.0, least=5)
    assert {each.windows for each in found.values()} == {5}
    changes = [name for number, name in enumerate(called) if number == 0 or called[number - 1] != name]
    assert changes[-12:] == ["a", "b", "c"] * 4


def test_the_median_is_of_windows():
    assert timing._summary([3.0, 1.0, 2.0, 100.0, 2.5]).median == 2.5


pytestmark = pytest.mark.usefixtures("few_blocks")
QUICK = ("--seconds", "0", "-b", "1", "-b", "3", "--training-batch", "4", "--json")


@pytest.mark.slow
def test_a_network_by_its_name(capsys):
    code, out, err = run(capsys, "benchmark", "repvgg_a0", *QUICK)
    assert code == 0, err
    found = json.loads(out)
    forms = ["multi-branch", "fused"] + ([] if missing("onnx", "onnxscript", "onnxruntime") else ["ONNX Runtime"])
    forms += [] if missing("onnx", "onnxscript", "onnxruntime", "openvino") else ["OpenVINO"]
    assert [row["form"] for row in found["inference"]] == forms * 2
    assert [row["batch"] for row in found["inference"]] == [1] * len(forms) + [3] * len(forms)
    assert [row["form"] for row in found["training"]] == ["multi-branch", "fused"]
    multi, fused = found["forms"][:2]
    assert fused["parameters"] < multi["parameters"]
    assert fused["gmacs"] < multi["gmacs"]
    assert found["training"][0]["step_bytes"] > 1.5 * found["training"][1]["step_bytes"]
    assert found["model"] == "repvgg_a0_cifar"
    assert found["versions"]["torch"]
    for row in found["inference"]:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["milliseconds"])


@pytest.mark.parametrize(("runtime", "where"), [("PyTorch", "cuda"), ("torch.export", "cuda"), ("ONNX Runtime", "cpu")])
def test_a_program_that_runs_on_the_cpu_is_not_timed_as_a_gpu(runtime, where):
    artifact = Artifact("x.onnx", nn.Identity(), card_of(nn.Identity(), block=None), runtime)
    machine = Runtime(torch.device("cuda"), "fp32")
    assert benchmark._machine_for(artifact, machine, "auto").device.type == where
    if where == "cpu":
        with pytest.raises(InputError, match="x.onnx is run by ONNX Runtime, on the CPU: give --device cpu"):
            benchmark._machine_for(artifact, machine, "cuda")


class Returns(nn.Module):
    """A network that returns logits beside feature maps, or one that trains only on boxes."""

    def __init__(self, boxes):
        super().__init__()
        self.conv, self.boxes = nn.Conv2d(3, 4, 3), boxes

    def forward(self, images):
        if self.boxes and self.training:
            raise ValueError("targets should not be none")
        if self.boxes and float(images.sum()) > 1e9:  # no graph can follow this
            return {}
        found = self.conv(images)
        return {"maps": found, "logits": found.mean((2, 3))}


@pytest.mark.parametrize("boxes", [False, True])
def test_networks_that_return_several_tensors_are_timed(boxes, capsys):
    network, machine, images = Returns(boxes), start_runtime("cpu", "fp32"), torch.randn(2, 3, 16, 16)
    forms = [benchmark._Form("fused", network, trains=True)]
    rows = benchmark._training(forms, images, 2, 5, machine, 0.0)
    assert [row["form"] for row in rows] == ([] if boxes else ["fused"])
    if boxes and not missing("onnx", "onnxscript", "onnxruntime"):
        artifact = Artifact("x.pt", network, card_of(nn.Identity(), block=None))
        assert benchmark._in_other_programs(network.eval(), artifact, images, "") == []


@pytest.mark.soak
@pytest.mark.skipif(bool(missing("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing")
def test_a_program_in_another_precision_says_so(capsys):
    code, out, err = run(capsys, "benchmark", "repvgg_a0", *QUICK, "--precision", "bf16")
    assert code == 0, err
    assert "ONNX Runtime fp32" in [row["form"] for row in json.loads(out)["inference"]]


def test_the_memory_of_a_step_counts_weights_once():
    """Weights, gradients and momentum are three times the weights, which the layers also keep for the backward pass."""
    network = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 64))
    images, labels = torch.randn(1, 64, 3, 3), torch.zeros(1, dtype=torch.long)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    machine = start_runtime("cpu", "fp32")
    step = benchmark._step(network, optimizer, images, labels, machine)
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert 3 * weights < benchmark._memory(network, step, machine) < 3 * weights + 8 * images.nbytes


@pytest.mark.soak
def test_files(capsys, small_run):
    _, out, _ = run(capsys, "benchmark", small_run.folder / "fused.pt", *QUICK)
    assert json.loads(out)["inference"][0]["form"] == "fused"
    code, out, _ = run(capsys, "benchmark", small_run.folder / "best.pt", *QUICK[:-1])
    assert code == 0
    assert "against the first" in out


def test_bad_words(capsys, small_run):
    assert "unknown model 'repvg'; did you mean" in one_line(capsys, "benchmark", "repvg")
    assert "no file x.pt" in one_line(capsys, "benchmark", "x.pt")
    assert "--block is for a network given by name" in one_line(
        capsys, "benchmark", small_run.folder / "best.pt", "--block", "acb"
    )
    for wrong in ("0", "1,x", "-3", "1,,2"):
        assert "is not a batch size: give whole" in one_line(capsys, "benchmark", "repvgg", "-b", wrong)
    assert early.batch_sizes(BenchmarkOptions("repvgg", batches=("1,4", "16"))) == (1, 4, 16)
    assert early.batch_sizes(BenchmarkOptions("repvgg")) == early.BATCHES


# ---------------------------------------------------------------------------------------------- the suite

SUITE = ROOT / "tests" / "benchmark" / "suite.py"


def suite(capsys, *words):
    """Run the suite in this process: exit code, stdout, stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SUITE), *words])
        patch.setattr(sys, "path", list(sys.path))
        try:
            runpy.run_path(str(SUITE), run_name="__main__")
        except SystemExit as left:
            return left.code, *capsys.readouterr()
    return 0, *capsys.readouterr()


@pytest.mark.slow
def test_the_suite_measures_against_the_targets(capsys):
    code, out, err = suite(
        capsys, "--quick", "--device", "cpu", "--only", "ceilings,losses,step,loader,inference,start"
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["quick"], found["device"]) == (True, "cpu")
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert min(found["ceilings"].values()) > 0
    assert found["losses"]["float32, channels last"]["first step"] < 1e-5
    assert all(difference["first step"] < 1e-2 for difference in found["losses"].values())
    assert {row["work"].split(",")[0] for row in found["targets"]} > {"loader", "repan --help"}


def test_the_suite_names_unknown_cases(capsys):
    code, _, err = suite(capsys, "--only", "step,stop")
    assert code == 2
    assert "--only: no stop; there are ceilings, losses, step" in err


@pytest.mark.soak
def test_every_measurement_runs(capsys):
    code, out, err = suite(capsys, "--quick", "--device", "cpu")
    assert code == 0, err
    assert {"distill", "teacher", "fuse", "epoch", "overhead"} < set(json.loads(out))
