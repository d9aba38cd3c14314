"""Costs of a step in counts: operators and host-device syncs are exact, where timings on shared machines are noise."""

import dataclasses
import traceback
from collections import Counter

import pytest
import timm
import torch
from support import CPU, Counted
from tapes import Counts
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode

from repan_cli import config
from repan_cli.blocks import set_attach_rate
from repan_cli.system.device import Runtime
from repan_cli.system.seeding import seed_generators
from repan_cli.training import cuda_graphs, optim
from repan_cli.training.cuda_graphs import Graphs
from repan_cli.training.plan import Phase
from repan_cli.training.progress import Totals
from repan_cli.training.run import Training
from repan_cli.training.step import update
from repan_cli.training.tasks import Classification

BATCH = 64
BLOCKS, CONVS, NORMS = 22, 44, 62
"""Of repvgg_a1_cifar: a 3x3 and a 1x1 convolution a block, a BN behind each and behind 18 identities."""

WEIGHTS = CONVS + 2
"""Tensors that bfloat16 autocast casts: the kernels, and weight and bias of the classifier."""

NOTHING = (
    "empty",
    "empty_like",
    "new_empty",
    "detach",
    "view",
    "t",
    "expand",
    "as_strided",
    "permute",
    "squeeze",
    "split",
)
"""Operators that launch nothing on a device: they make memory and views."""


def launches(calls):
    """How many operators do work on a device."""
    quiet = {f"aten.{name}" for name in NOTHING}
    return sum(count for name, count in calls.items() if name.startswith("aten.") and name not in quiet)


@pytest.fixture
def step(digit_images, monkeypatch):
    """A step of training as `training.step` makes it, after a first one, or after one that is recorded.

    Gives a function that makes one more, and the run.
    """
    monkeypatch.setattr(cuda_graphs, "WARM_UPS", 1)

    def make(precision, *, rate=1.0, recorder=None, ema=False, **settings):
        model = timm.create_model("repvgg_a1_cifar", num_classes=10, in_chans=1).train()
        set_attach_rate(model, rate)
        chosen = dataclasses.replace(config.Config().optim, lr=0.01, momentum=0.9, nesterov=True, **settings)
        model = model.to(memory_format=torch.channels_last)
        run = Training(
            model=model,
            task_of=lambda phase: Classification(),
            optimizer=optim.build_optimizer(model, chosen),
            plan=(Phase(0, 9, chosen, None, 0, 9),),
            train=digit_images,
            val=None,
            test=digit_images,
            runtime=Runtime(CPU, precision),
            batch_size=BATCH,
            ema=ModelEmaV3(model, decay=0.99, use_warmup=True) if ema else None,
            graphs=Graphs(recorder) if recorder else None,
        )
        run.progress.totals = Totals.zeros(CPU)
        batches = digit_images.training_batches(BATCH, 0, 0, 1)

        def one():
            update(run, run.plan[0], Classification(), [next(batches)], 0.0)

        for _ in range(2 if recorder else 1):
            one()
        return one, run

    return make


# ---------------------------------------------------------------------------------------------- on the device


@pytest.mark.parametrize(("precision", "most"), [("fp32", 400), ("bf16", 500)])
def test_operators_of_a_step(step, precision, most):
    """Convolutions and BN forward and back, the sums of the blocks, and next to nothing else."""
    one, _ = step(precision)
    with Counted() as counted:
        one()
    calls = counted.calls
    assert calls["aten.convolution"] == calls["aten.convolution_backward"] == CONVS
    assert calls["aten.native_batch_norm"] == calls["aten.native_batch_norm_backward"] == NORMS
    assert calls["aten.addcmul"] == 1  # the normalisation of images: attach rates of 1 need no arithmetic
    assert calls["aten.mul"] <= 5
    assert calls["aten.add_"] <= 2  # no BN counts its batches by itself
    assert calls["aten._fused_sgd_"] <= 6  # one a group of parameters
    assert launches(calls) <= most


def test_an_attach_rate_that_changes_is_part_of_the_step(step):
    one, _ = step("fp32", rate=0.5)
    with Counted() as counted:
        one()
    assert counted.calls["aten.addcmul"] == BLOCKS + 1


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 390), ("bf16", 400), ("fp16", 410)])
def test_operators_of_a_recorded_step(step, precision, most, ema):
    """The same, with one cast of all weights and one of all gradients, and an average in a few operators."""
    recorder = Counts()
    step(precision, recorder=recorder, ema=ema)
    calls = recorder.calls
    assert calls["aten.convolution"] == calls["aten.convolution_backward"] == CONVS
    assert calls["aten._to_copy"] <= 5  # images and logits
    assert launches(calls) <= most + 5 * ema


@pytest.mark.parametrize("ema", [False, True])
def test_a_recorded_step_leaves_little_to_the_host(step, ema):
    """Its images, its numbers, the launch, its sums: no operator a layer."""
    one, _ = step("bf16", recorder=Counts(), ema=ema)
    with Counted() as counted:
        one()
    assert sum(counted.calls.values()) <= 14 + ema


# ---------------------------------------------------------------------------------------------- on the host


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", [None, 10.0])
def test_no_step_waits_for_the_host(step, precision, clip):
    one, _ = step(precision, clip=clip)
    with Counted() as counted:
        for _ in range(3):
            one()
    assert counted.calls["aten._local_scalar_dense"] == 0
    assert counted.calls["aten.nonzero"] == 0


def test_the_mean_loss_is_one_look_at_the_device(monkeypatch):
    looks = Counter()
    for name in ("item", "tolist", "__bool__", "__float__"):
        usual = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, usual=usual, name=name: (looks.update([name]), usual(tensor))[1]
        )
    totals = Totals(torch.tensor([6.0, 1.0, 0.0]), torch.zeros(3, 2), images=3)
    assert totals.mean_loss() == 2
    assert looks == {"tolist": 1}


def test_generators_are_seeded_as_by_pytorch_without_stack_traces(monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    monkeypatch.setattr(traceback, "format_stack", lambda *_: pytest.fail("a stack trace a step"))
    seed_generators(CPU, 7)
    assert torch.equal(torch.rand(3), expected)
    gpus = (torch.Generator(), torch.Generator())
    monkeypatch.setattr(torch.cuda, "default_generators", gpus)
    seed_generators(torch.device("cuda", 1), 7)
    assert torch.equal(torch.rand(3, generator=gpus[1]), expected)
    seed_generators(torch.device("cuda"), 7)
    assert torch.equal(torch.rand(3, generator=gpus[0]), expected)


# ---------------------------------------------------------------------------------------------- arithmetic


def test_arithmetic_of_a_step_is_three_forward_passes(step):
    """One forward, two back, but that nobody asks for the gradient of the images."""
    one, run = step("fp32")
    with FlopCounterMode(display=False) as whole:
        one()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        run.model(torch.zeros(BATCH, 1, 8, 8))
    ratio = whole.get_total_flops() / forward.get_total_flops()
    assert 2.9 < ratio < 3


def test_the_counters_count():
    with Counted() as counted:
        torch.ones(3).sum().item()
    assert counted.calls["aten._local_scalar_dense"] == 1
    assert launches(counted.calls) == 3
