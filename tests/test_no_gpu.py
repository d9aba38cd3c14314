"""GPU code paths that can be tested on machines without a GPU."""

import contextlib
import json

import pytest
import timm
import torch
from support import CPU, DIGITS, FP32, StopAt, metrics, plan, randomize_norms, run, small_net, training
from tapes import Tapes
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch._subclasses import FakeTensorMode

from repan_cli.blocks.kernel import exact
from repan_cli.errors import InputError
from repan_cli.session import build
from repan_cli.system.device import Runtime, start_runtime
from repan_cli.training import cuda_graphs, loop, optim
from repan_cli.training.cuda_graphs import CudaRecorder, Graphs
from repan_cli.training.events import Epoch, LossLog
from repan_cli.training.loop import fit
from repan_cli.training.progress import Totals

pytestmark = pytest.mark.usefixtures("few_blocks")

# ---------------------------------------------------------------------------------------------- every command records

SHORT = ("run.precision=fp32", "data.batch_size=100", "data.per_class=30", "--epochs", "3")
CYCLE = ("cycle", *DIGITS, *SHORT, "--baseline-epochs", "2", "--cycles", "2")


@pytest.fixture
def recorded(monkeypatch):
    """Commands whose updates are recorded on tapes; gives the recordings of each run."""
    made = []

    def graphs(config, machine, optimizer):
        made.append(Graphs(Tapes(), demanded=True))
        return made[-1]

    monkeypatch.setattr(build, "_graphs", graphs)
    monkeypatch.setattr(cuda_graphs, "WARM_UPS", 1)
    return made


def done(capsys, *words):
    code, out, err = run(capsys, *words)
    assert code == 0, err
    return out


def test_a_dry_run_records(recorded, capsys):
    """Catches a restart of a copy that shares its recordings with the network itself, and estimates of slow steps."""
    facts = json.loads(done(capsys, *CYCLE, "--dry-run", "--json"))
    assert facts["step_seconds"] > 0
    assert recorded[0].recorded >= 1


@pytest.mark.slow
def test_a_run_that_stops_and_resumes_records(recorded, capsys, tmp_path):
    """Catches tensors that loading a saved state replaces."""
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, 8)
        code, _, err = run(capsys, *CYCLE, "--out", tmp_path / "run")
    assert code == 75, err
    done(capsys, "cycle", "--resume", tmp_path / "run")
    assert [graphs.recorded > 0 for graphs in recorded] == [True, True]


@pytest.mark.slow
def test_a_series_records(recorded, capsys, tmp_path):
    """Catches recordings that outlive their run."""
    done(capsys, "train", *DIGITS, *SHORT, "--seeds", "0,1", "--out", tmp_path / "runs")
    assert [graphs.recorded > 0 for graphs in recorded] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["views", pytest.param("none", marks=pytest.mark.soak)])
def test_distillation_records_the_losses_of_steps_that_are_not(recorded, small_run, capsys, tmp_path, cache):
    """Catches a teacher's logits, live or cached, of another batch than the one that is trained on."""
    words = ("distill", *DIGITS, *SHORT, "--teacher", small_run.folder / "best.pt", f"teacher.cache={cache}")
    done(capsys, *words, "--out", tmp_path / "recorded")
    assert recorded[0].recorded == 3, "whole and ragged batches, and validation"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_graphs", lambda *_: None)
        done(capsys, *words, "--out", tmp_path / "plain")
    found, expected = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("recorded", "plain"))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("command", ["train", "distill"])
def test_dry_runs_of_other_commands_record(recorded, small_run, capsys, command):
    teacher = ("--teacher", small_run.folder / "best.pt") if command == "distill" else ()
    facts = json.loads(done(capsys, command, *DIGITS, *SHORT, *teacher, "--dry-run", "--json"))
    assert facts["step_seconds"] > 0
    assert recorded[0].recorded >= 1


@pytest.mark.soak
def test_a_control_with_a_teacher_records(recorded, capsys, tmp_path):
    """Catches recordings that hold the teacher of the cycle before."""
    words = ("--teacher", "previous", "--control", "--cycles", "2", "--epochs", "2")
    done(capsys, *CYCLE[:-6], *words, "--baseline-epochs", "2", "--out", tmp_path / "runs")
    assert len(recorded) == 2
    assert all(graphs.recorded >= 3 and graphs.refused is None for graphs in recorded)
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert [len(summary["cycles"]) for summary in summaries] == [2, 2]


# ---------------------------------------------------------------------------------------------- a capture that fails


class Broken(Tapes):
    """Fails as CUDA does: ending a broken capture raises an error of its own."""

    def __init__(self, first, *, fits=True):
        self.first, self.enough, self.forgotten = first, fits, 0

    def fits(self):
        return self.enough

    def forget(self):
        self.forgotten += 1

    def record(self, work):
        try:
            raise self.first
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def refuse(recorder, **options):
    graphs = Graphs(recorder, **options)
    for _ in range(cuda_graphs.WARM_UPS + 1):
        assert graphs("key", lambda given: given[0] + 1, (torch.ones(1),)).item() == 2
    return graphs


def test_a_failing_capture_is_told_by_its_first_error():
    """Catches 'a previous error during capture' in the place of what went wrong."""
    broken = Broken(RuntimeError("operation not permitted: aten::nonzero"))
    assert refuse(broken).refused == "operation not permitted: aten::nonzero"
    assert broken.forgotten == 1
    with pytest.raises(InputError, match="aten::nonzero.*; set run.graph=off"):
        refuse(broken, demanded=True)


def test_too_little_memory_is_told_as_that():
    assert refuse(Broken(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"))).refused.startswith("out of memory")
    assert refuse(Broken(AssertionError, fits=False)).refused.startswith("out of memory")


def test_a_failing_capture_leaves_the_usual_stream_current(monkeypatch):
    """Catches work that goes on on the stream of the capture, and a graph that holds its pool."""
    current, resets = ["usual"], []

    class Graph:
        def reset(self):
            resets.append(self)

    @contextlib.contextmanager
    def graph(*args, **options):
        current[0] = "aside"
        try:
            yield
        finally:
            raise RuntimeError("capture failed")

    for name, mock in {
        "Stream": lambda device: "aside",
        "graph_pool_handle": object,
        "CUDAGraph": Graph,
        "current_stream": lambda device: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, mock)
    recorder = CudaRecorder(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="capture failed"):
        recorder.record(lambda: torch.ones(1))
    assert current == ["usual"]
    assert len(resets) == 1


def test_dropped_recordings_take_their_memory_with_them():
    """Catches a recording into a pool whose graphs are all gone."""
    recorder = Broken(RuntimeError())
    graphs = Graphs(recorder)
    graphs.enter("one", frozenset())
    graphs.recordings["key"] = None
    graphs.enter("one", frozenset())
    assert not recorder.forgotten
    graphs.enter("other", frozenset())
    assert recorder.forgotten == 1


# ---------------------------------------------------------------------------------------------- other devices


def test_gradients_are_clipped_on_mps():
    """Catches foreach operations that are demanded of a device that has none."""
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.ones(2, 2, device="mps"))
        weight.grad = torch.ones_like(weight)
        optimizer = torch.optim.SGD([{"params": [weight], "role": "weight", "trunk": False}], lr=0.1)
        settings = plan()[0].optim
        assert optim.clip_gradients(optimizer, settings).device.type == "mps"


def test_float64_is_asked_for_on_the_cpu_alone():
    """Catches a conversion that MPS refuses."""
    asked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if (kwargs or {}).get("dtype") == torch.float64:
                asked.append(args[0].device.type)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        exact(torch.ones(2, device="mps"))
    assert asked == ["cpu"]


def test_speed_counts_finished_work(digits, monkeypatch):
    """Catches a clock that is read before the device is done: reading the loss is what waits for it."""
    clock, mean = [0.0], Totals.mean_loss

    def waits(totals):
        clock[0] += 100.0
        return mean(totals)

    monkeypatch.setattr(Totals, "mean_loss", waits)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0] + 1e-3)
    speeds = []
    for event in loop.fit(training(digits, plan(baseline__epochs="1"), runtime=FP32, log_every=1)):
        if isinstance(event, LossLog):
            speeds.append(event.images_per_second)
        if isinstance(event, Epoch):
            break
    assert max(speeds) <= 1


# ---------------------------------------------------------------------------------------------- numbers


def test_float32_is_true_except_in_training_that_asks_for_tf32():
    """Catches evaluation, calibration and restarts in TF32, PyTorch's default for convolutions."""

    def allowed():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    torch.backends.cudnn.allow_tf32 = True
    start_runtime("cpu", "fp32")
    assert allowed() == (False, False)
    for precision, meanwhile in (("tf32", True), ("fp32", False), ("bf16", False)):
        with Runtime(torch.device("cuda"), precision).training():
            assert allowed() == (meanwhile, meanwhile)
        assert allowed() == (False, False)
    with pytest.raises(InputError, match="tf32 is for NVIDIA GPUs, the device is cpu: give fp32"):
        start_runtime("cpu", "tf32")


def test_training_alone_is_in_tf32(digits):
    seen = set()
    start_runtime("cpu", "fp32")
    run = training(digits, plan(baseline__epochs="1"), runtime=Runtime(CPU, "tf32"))
    run.model.register_forward_hook(lambda model, *_: seen.add((model.training, torch.backends.cudnn.allow_tf32)))
    for event in fit(run):
        if isinstance(event, Epoch):
            break
    assert seen == {(True, True), (False, False)}


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "repvgg_a0_cifar"])
def test_shared_statistics_keep_the_function(name):
    """Catches timm's layers of BN and activation that lose the activation."""
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model(name, num_classes=10)).train()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model.eval()(images)
        shared = build.share_statistics(model.train(), images)
        assert all(module.training for module in shared.modules())
        torch.testing.assert_close(shared.eval()(images), before)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in shared.modules())


def test_shared_statistics_that_change_the_function_are_refused(monkeypatch):
    model = timm.create_model("mobilenetv3_small_050", num_classes=10)
    monkeypatch.setattr(build, "convert_sync_batchnorm", nn.SyncBatchNorm.convert_sync_batchnorm)
    with pytest.raises(InputError, match="set run.sync_bn=false"):
        build.share_statistics(randomize_norms(model), torch.randn(2, 3, 32, 32))


def test_shared_statistics_count_their_batches(digits):
    """Catches a counter that is taken away from a layer that refuses to be without it."""
    run = training(digits, plan(), model=convert_sync_batchnorm(small_net(in_chans=1)))
    assert run.norms == []
