"""Recorded updates: the losses of updates done one by one, across cycles, without a second recording.

A tape takes the place of a CUDA graph, see `tapes`.
"""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from support import CPU, FP32, Counted, digit_loader, plan, small_net, training
from tapes import Tapes
from timm.utils import ModelEmaV3

from repan_cli import config
from repan_cli.errors import InputError
from repan_cli.session import build
from repan_cli.system.device import Runtime
from repan_cli.training import cuda_graphs
from repan_cli.training.cuda_graphs import Graphs
from repan_cli.training.events import CycleEnd, LossLog, StepEnd
from repan_cli.training.loop import fit
from repan_cli.training.optim import build_optimizer
from repan_cli.training.tasks import Classification, Distillation
from repan_cli.training.teacher import LogitCache, Teacher, View, allocate

pytestmark = pytest.mark.usefixtures("few_blocks")


@pytest.fixture(autouse=True)
def early(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "WARM_UPS", 1)


def taught(digits, how):
    """Tasks of a run whose network learns from another one, too; `how` its logits come."""
    torch.manual_seed(1)
    view = View(8, digits.mean, digits.std)
    teacher = Teacher(small_net(in_chans=1), own=view, student=view, runtime=FP32)
    data = digit_loader(digits)
    cached = LogitCache(teacher, lambda: allocate((data.count, data.view_count, 10), CPU, None), together=100)
    task = Distillation(Classification(), cached if how == "cached" else teacher, alpha=0.5, temperature=4.0)
    return lambda phase: task


SHORT = {"epochs": "2", "baseline__epochs": "1", "cycle__count": "2"}
THREE = {**SHORT, "cycle__count": "3"}
CASES = {
    "zero-gamma": {"cycle__attach": "zero-gamma"},
    "ramp": {"cycle__attach": "ramp", "cycle__attach_epochs": "2"},
    "one course": {"cycle__schedule": "continuous", "optim__warmup_epochs": "1"},
    "frozen trunk": {
        "cycle__freeze_trunk": "true",
        "cycle__attach_epochs": "1.5",
        "optim__decay": "all",
        "optim__lr": "0.005",
    },
    "best": {"cycle__start_from": "best"},
    "no momentum": {"optim__momentum": "0", "optim__clip": "null"},
    "frozen, no momentum": {"cycle__freeze_trunk": "true", "cycle__attach_epochs": "1.5", "optim__momentum": "0"},
}


QUICK = ("zero-gamma", "frozen, no momentum")


def pair(digits, make):
    """The same run twice: as it is, and recorded. BN takes on the statistics of so few batches as there are, so that a
    restart finds the network in eval mode to be the one in train mode and losses stay where rounding stays small.
    """
    runs = []
    for recorded in (False, True):
        torch.manual_seed(0)
        runs.append(make(graphs=Graphs(Tapes()) if recorded else None))
        for norm in runs[-1].norms:
            norm.momentum = 0.6
    return runs


def losses(run):
    return [event.loss for event in fit(run) if isinstance(event, LossLog)]


def agree(eager, recorded, *, rel=1e-5):
    found = losses(eager), losses(recorded)
    assert len(found[0]) == 15
    assert found[1] == pytest.approx(found[0], rel=rel)
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(recorded.model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.soak) for case in CASES]
)
def test_recorded_updates_give_the_same_losses(digits, case):
    phases = plan(**SHORT, **CASES[case])
    settings = phases[-1].optim

    def make(**options):
        return training(digits, phases, settings=settings, batch_size=80, log_every=1, **options)

    eager, recorded = pair(digits, make)
    agree(eager, recorded)
    # whole and ragged batches, by attach rates that are 1 or not, and validation; work that comes once is not recorded
    assert recorded.graphs.recorded == {"zero-gamma": 3, "ramp": 4}.get(case, 5)


def test_bfloat16_too(digits):
    def make(**options):
        return training(digits, plan(**SHORT), runtime=Runtime(CPU, "bf16"), batch_size=80, log_every=1, **options)

    eager, recorded = pair(digits, make)
    assert losses(recorded) == pytest.approx(losses(eager), rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "steps"),
    [("zero-gamma", 6), *(pytest.param(case, None, marks=pytest.mark.soak) for case in ("zero-gamma", "frozen trunk"))],
)
def test_float16_whose_scale_falls_and_grows_is_recorded(digits, case, steps):
    """From a scale at which gradients overflow: skipped updates, and what the scaler counts, are recorded, too."""

    def make(**options):
        phases = plan(**SHORT, **CASES[case])
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)
        half = Runtime(CPU, "fp16")
        return training(digits, phases, runtime=half, batch_size=80, log_every=1, scaler=scaler, **options)

    eager, recorded = pair(digits, make)
    scales = [[], []]
    for run, seen in zip((eager, recorded), scales, strict=True):
        ends = (event for event in fit(run) if isinstance(event, StepEnd))
        seen += [run.scaler.get_scale() for _ in itertools.islice(ends, steps)]
    assert scales[0] == scales[1]
    assert min(scales[0]) < 2.0**18
    assert any(later > earlier for earlier, later in itertools.pairwise(scales[0]))
    for name, value in eager.model.state_dict().items():
        torch.testing.assert_close(recorded.model.state_dict()[name], value, rtol=1e-2, atol=1e-2, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cached", "live"])
def test_a_teacher_is_part_of_the_recording_or_of_its_input(digits, how):
    def make(**options):
        run = training(digits, plan(**SHORT), batch_size=80, log_every=1, **options)
        run.task_of = taught(digits, how)
        return run

    agree(*pair(digits, make))


@pytest.mark.slow
def test_a_weight_average_and_accumulated_batches(digits):
    def make(**options):
        run = training(digits, plan(**SHORT), batch_size=32, log_every=1, accumulate=2, **options)
        run.ema = ModelEmaV3(run.model, decay=0.9, use_warmup=True)
        return run

    eager, recorded = pair(digits, make)
    agree(eager, recorded)
    for name, value in eager.ema.module.state_dict().items():
        torch.testing.assert_close(recorded.ema.module.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("attach", "expected"), [("zero-gamma", [1, 3, 3, 3]), ("ramp", [1, 4, 5, 5])])
def test_later_cycles_record_nothing(digits, attach, expected):
    phases = plan(**THREE, cycle__freeze_trunk="true", cycle__attach=attach)
    run = training(digits, phases, batch_size=80, graphs=Graphs(Tapes()))
    counts = [run.graphs.recorded for event in fit(run) if isinstance(event, CycleEnd)]
    assert counts == expected


def test_other_rules_are_another_recording(digits):
    rules = {"optim__weight_decay": "0.1", "baseline__optim__weight_decay": "0"}
    phases = plan(**THREE, **rules, cycle__attach="zero-gamma")
    run = training(digits, phases, batch_size=80, graphs=Graphs(Tapes()))
    counts = [run.graphs.recorded for event in fit(run) if isinstance(event, CycleEnd)]
    assert counts == [1, 4, 4, 4]


@pytest.mark.slow
def test_the_tape_notices_what_a_graph_would_miss(digits):
    """A learning rate that the host puts in stays what it was: such a run goes another way."""

    def make(**options):
        return training(digits, plan(**SHORT), batch_size=80, log_every=1, **options)

    eager, recorded = pair(digits, make)
    for group in recorded.optimizer.param_groups:
        group["lr"] = float(group["lr"])
    assert losses(recorded) != pytest.approx(losses(eager), rel=1e-3)


def test_a_tensor_that_has_moved_is_noticed_before_the_next_phase(digits):
    run = training(digits, plan(**SHORT), batch_size=80, graphs=Graphs(Tapes()))
    with pytest.raises(AssertionError, match="has moved"):
        for event in fit(run):
            if isinstance(event, CycleEnd):
                first = next(run.model.parameters())
                first.data = first.data.clone()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "cached"])
def test_a_recorded_step_never_waits_for_the_host(digits, how):
    run = training(digits, plan(**SHORT), batch_size=80, log_every=1000, graphs=Graphs(Tapes()))
    if how == "cached":
        run.task_of = taught(digits, how)
    waits = []
    with Counted() as counted:
        for event in fit(run):
            if isinstance(event, StepEnd) and event.step == 2:
                waits.append(counted.calls["aten._local_scalar_dense"])
            elif isinstance(event, StepEnd):
                counted.calls = Counter()
    assert waits
    assert not any(waits[2:]), "the first comparison of a cache with its teacher may"


class Refuses(Tapes):
    def record(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.slow
def test_work_that_cannot_be_recorded_is_done_without_recording(digits):
    def make(**options):
        return training(digits, plan(**SHORT), batch_size=80, log_every=1, **options)

    eager, refused = pair(digits, make)
    refused.graphs.recorder = Refuses()
    agree(eager, refused)
    assert refused.graphs.refused == "operation not permitted when stream is capturing"
    demanded = make(graphs=Graphs(Refuses(), demanded=True))
    with pytest.raises(InputError, match="cannot be recorded .* not permitted .*; set run.graph=off"):
        losses(demanded)


# ---------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("machine", "given", "why"),
    [
        (Runtime(CPU, "fp32"), {}, "the device is cpu"),
        (Runtime(torch.device("cuda"), "bf16", ranks=2), {}, "there are several processes"),
        (Runtime(torch.device("cuda"), "bf16"), {"optim.name": "adamw"}, "optim.name=adamw decides on the host"),
        (Runtime(torch.device("cuda"), "bf16"), {}, None),
        (Runtime(torch.device("cuda"), "fp16"), {}, None),
    ],
)
def test_where_updates_are_recorded(monkeypatch, machine, given, why):
    monkeypatch.setattr(build, "CudaRecorder", lambda device: Tapes())
    for switch in ("auto", "on", "off"):
        chosen = config.build({}, {**given, "run.graph": switch})
        optimizer = build_optimizer(small_net(), chosen.optim)
        if switch == "on" and why:
            with pytest.raises(InputError, match=f"run.graph=on, but {why}: set run.graph=auto"):
                build._graphs(chosen, machine, optimizer)
        else:
            found = build._graphs(chosen, machine, optimizer)
            assert (found is not None) == (why is None and switch != "off")


@pytest.mark.parametrize(("said", "meant"), [("true", "on"), ("no", "off"), ("on", "on"), ("auto", "auto")])
def test_switches_may_be_given_as_booleans(said, meant):
    chosen = config.build({}, {"run.graph": said, "run.compile": said})
    assert dataclasses.asdict(chosen.run) | {"graph": meant, "compile": meant} == dataclasses.asdict(chosen.run)


@pytest.mark.slow
def test_three_cycles_compile_one_graph(digits):
    """Of whole batches; ragged ones are done as they are. Attach rates and restarts change tensors in place."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    run = training(digits, plan(**THREE), batch_size=80, log_every=1)
    torch._dynamo.reset()
    run.wrapped = torch.compile(run.model, backend=backend, dynamic=False)
    counts = [len(found) for event in fit(run) if isinstance(event, CycleEnd)]
    assert counts == [1, 1, 1, 1]
