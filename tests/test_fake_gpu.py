"""A training step on a simulated GPU: no tensor stays on the host by mistake, and no step waits for the device."""

import dataclasses
import itertools
import re
import types

import numpy as np
import pytest
import timm
import torch
from fake_gpu import GPU, fake_gpu, on_gpu
from tapes import Counts
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import unset_fake_temporarily

from repan_cli import config
from repan_cli.data.batches import Augmentation
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.types import ArrayImages
from repan_cli.errors import is_out_of_memory
from repan_cli.session import batch_size
from repan_cli.system.device import Runtime
from repan_cli.training import cuda_graphs, optim
from repan_cli.training.cuda_graphs import Graphs
from repan_cli.training.plan import Phase
from repan_cli.training.progress import Totals
from repan_cli.training.run import Training
from repan_cli.training.step import update
from repan_cli.training.tasks import Classification, Distillation
from repan_cli.training.teacher import Teacher, View

VIEW = View(32, (0.5,) * 3, (0.25,) * 3)
IMAGES, BATCH = 20, 8


def loader(**augmentation):
    draw = np.random.default_rng(0)
    part = ArrayImages(draw.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8), draw.integers(0, 10, IMAGES))
    chosen = Augmentation(padding=4, flip=True, **augmentation)
    return InMemoryLoader(
        part,
        mean=VIEW.mean,
        std=VIEW.std,
        device=GPU,
        memory_format=torch.channels_last,
        augmentation=chosen,
        classes=10,
    )


def network(name):
    """A network on the GPU, and the average of its weights."""
    with unset_fake_temporarily():
        model = timm.create_model(name, num_classes=10, in_chans=3).to(memory_format=torch.channels_last).train()
        ema = ModelEmaV3(model, decay=0.99, use_warmup=True)
    on_gpu(ema.module)
    return on_gpu(model), ema


def trained(name, *, precision, recorded, everything):
    """A run on the GPU, and its task: with a teacher, mixup, cutout, a weight average and clipping, or without."""
    machine = Runtime(GPU, precision)
    settings = dataclasses.replace(config.OptimConfig(lr=0.1), clip=1.0 if everything else None)
    task = Classification(0.1)
    if everything:
        teacher = Teacher(
            network("repvgg_a0_cifar")[0], own=dataclasses.replace(VIEW, size=40), student=VIEW, runtime=machine
        )
        task = Distillation(task, teacher, alpha=0.5, temperature=4.0)
    (model, ema), data = network(name), loader(**({"mixup": 0.2, "cutout": 8, "erase": 0.5} if everything else {}))
    run = Training(
        model=model,
        task_of=lambda phase: task,
        optimizer=optim.build_optimizer(model, settings),
        plan=(Phase(0, 1, settings, None, 0, 1),),
        train=data,
        val=None,
        test=data,
        runtime=machine,
        batch_size=BATCH,
        ema=ema if everything else None,
        scaler=machine.scaler(),
        graphs=Graphs(Counts(), demanded=True) if recorded else None,
    )
    run.progress.totals = Totals.zeros(GPU)
    run.rates_of, run.rates_are_one = run.plan[0], (True, True)  # read by a first update, which may wait
    return run, task


@pytest.fixture(autouse=True)
def early(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "WARM_UPS", 1)


QUICK = {
    ("repvgg_a0_cifar", "bf16", False, False),
    ("repvgg_a0_cifar", "bf16", False, True),
    ("repvgg_a0_cifar", "fp16", False, True),
    ("repvgg_a0_cifar", "fp16", True, True),
    ("resnet18_cifar", "bf16", False, False),
}
NAMES, PRECISIONS = ("resnet18_cifar", "repvgg_a0_cifar", "mobilenetv3_small_050"), ("bf16", "fp16")
CASES = list(itertools.product(NAMES, PRECISIONS, (False, True), (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "everything", "recorded"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.soak) for case in CASES],
)
def test_a_step_stays_on_the_gpu(few_blocks, name, precision, everything, recorded):
    """Catches tensors that were made on the host, copies between both, and looks at the device."""
    with fake_gpu() as operators:
        run, task = trained(name, precision=precision, recorded=recorded, everything=everything)
        batches = run.train.training_batches(BATCH, 0, 0, 1)
        for number in range(2):
            batch = next(batches)
            operators.crossings.clear()
            update(run, run.plan[0], task, [batch], number / 3)
            assert operators.crossings == []
        tensors = [
            *run.model.state_dict().values(),
            *(p.grad for p in run.model.parameters()),
            run.progress.totals.sums,
        ]
        tensors += [value for memory in run.optimizer.state.values() for value in memory.values()]
        assert {each.device for each in tensors} == {GPU}
    assert operators.calls["aten._fused_sgd_"] > 0
    assert (operators.calls["aten._amp_update_scale_"] > 0) == (precision == "fp16")
    assert run.graphs is None or run.graphs.recorded == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda x: x * torch.ones(8), "two (different )?devices"),
        (lambda x: x * (1.0 if x.sum().item() > 0 else 2.0), "_local_scalar_dense"),
        (lambda x: x[x > 0].sum() * x, "nonzero|index"),
        (lambda x: x.cpu().to(GPU), "crossing"),
        (lambda x: x + torch.tensor([1.0]).to(x.device), "crossing"),
    ],
)
def test_the_fake_gpu_notices(fault, error):
    """Or else the test above would say nothing."""
    with fake_gpu() as operators:
        weight = torch.nn.Parameter(torch.ones(8, device=GPU))
        try:
            fault(weight).sum().backward()
        except Exception as raised:
            assert re.search(error, f"{raised}{raised.__cause__}")
        else:
            assert error == "crossing"
            assert operators.crossings
        weight.grad = None
        (weight * 2).sum().backward()
        assert weight.grad.device == GPU


# ---------------------------------------------------------------------------------------------- batch sizes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.soak)])
def test_the_batch_size_is_tried_on_the_gpu(few_blocks, monkeypatch, precision):
    """Steps run on the device alone; one that finds no memory is halved, with its memory given back."""
    step, tried, emptied, states = batch_size._step, [], [], []

    def limited(trial, images, machine):
        tried.append(len(images))
        assert {images.device, *(each.device for each in trial.parameters())} == {GPU}
        step(trial, images, machine)
        assert all(parameter.grad is None for parameter in trial.parameters())
        if len(images) > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(batch_size, "_step", limited)
    monkeypatch.setattr(
        batch_size, "_bytes_kept", lambda trial, images, machine: limited(trial, images, machine) or 2**22
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states.append(device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.append(device))
    data = types.SimpleNamespace(channels=3, image_size=32, train=types.SimpleNamespace(labels=range(50_000)))
    with fake_gpu() as operators:
        model, _ = network("repvgg_a0_cifar")
        operators.crossings.clear()
        found, free = batch_size._fitting(model, data, Runtime(GPU, precision))
        assert [name for name, _ in operators.crossings] == ["aten._to_copy"], "the images alone"
        assert all(parameter.grad is None for parameter in model.parameters())
    assert (found, free) == (64, 2**30)
    assert tried == [4, 256, 128, 64]
    assert len(emptied) == 3
    assert states == [GPU, GPU], "what is drawn afterwards is as it was"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA to enable device-side assertions.",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_the_libraries_of_the_gpu_tell_a_lack_of_memory_in_their_own_words(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
