"""What a step costs, in counts: timings on shared machines are noise, operators and host syncs are not."""

import dataclasses

import pytest
import timm
import torch
from support import CPU, Counted
from torch.utils.flop_counter import FlopCounterMode

from repan_cli import config
from repan_cli.system.device import Runtime
from repan_cli.training import optim
from repan_cli.training.plan import Phase
from repan_cli.training.progress import Totals
from repan_cli.training.run import Training
from repan_cli.training.step import update
from repan_cli.training.tasks import Classification

BATCH = 64
BLOCKS, CONVS, NORMS = 22, 44, 62
"""Of repvgg_a1_cifar: a 3x3 and a 1x1 convolution a block, a BN behind each and behind 18 identities."""


@pytest.fixture
def step(digit_images):
    """A step of training as `training.step` makes it, after a first one."""

    def make(precision, **settings):
        model = timm.create_model("repvgg_a1_cifar", num_classes=10, in_chans=1).train()
        chosen = dataclasses.replace(config.Config().optim, lr=0.01, momentum=0.9, nesterov=True, **settings)
        run = Training(
            model=model.to(memory_format=torch.channels_last),
            task_of=lambda phase: Classification(),
            optimizer=optim.build_optimizer(model, chosen),
            plan=(Phase(0, 9, chosen, None, 0, 9),),
            train=digit_images,
            val=None,
            test=digit_images,
            runtime=Runtime(CPU, precision),
            batch_size=BATCH,
        )
        run.progress.totals = Totals.zeros(CPU)
        batches = digit_images.training_batches(BATCH, 0, 0, 1)

        def one():
            update(run, run.plan[0], Classification(), [next(batches)], 0.0)

        one()
        return one, model

    return make


@pytest.mark.parametrize(("precision", "most"), [("fp32", 740), ("bf16", 860)])
def test_operators_of_a_step(step, precision, most):
    """Convolutions and BN forward and back, the sums of the blocks, and next to nothing else."""
    one, _ = step(precision)
    with Counted() as counted:
        one()
    calls = counted.calls
    assert calls["aten.convolution"] == calls["aten.convolution_backward"] == CONVS
    assert calls["aten.native_batch_norm"] == calls["aten.native_batch_norm_backward"] == NORMS
    assert calls["aten.addcmul"] == BLOCKS + 1  # a sum a block, and the normalisation of images
    assert calls["aten.add_"] <= 2  # no BN counts its batches by itself
    assert calls["aten._fused_sgd_"] <= 6  # one a group of parameters
    assert sum(calls.values()) <= most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", [None, 10.0])
def test_no_step_waits_for_the_host(step, precision, clip):
    one, _ = step(precision, clip=clip)
    with Counted() as counted:
        for _ in range(3):
            one()
    assert counted.calls["aten._local_scalar_dense"] == 0
    assert counted.calls["aten.nonzero"] == 0


def test_arithmetic_of_a_step_is_three_forward_passes(step):
    """One forward, two back, but that nobody asks for the gradient of the images."""
    one, model = step("fp32")
    with FlopCounterMode(display=False) as whole:
        one()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(torch.zeros(BATCH, 1, 8, 8))
    ratio = whole.get_total_flops() / forward.get_total_flops()
    assert 2.9 < ratio < 3


def test_the_counters_count():
    with Counted() as counted:
        torch.ones(3).sum().item()
    assert counted.calls["aten._local_scalar_dense"] == 1
