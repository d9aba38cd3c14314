"""One update of the weights: the host sets a few numbers, the device does the rest, as it is or as a CUDA graph.

What the device does makes no host-device sync, and reads what changes from step to step from tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Sequence

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from repan_cli.blocks import attach_rates, fill_all
from repan_cli.blocks.kernel import BatchNorm
from repan_cli.data.batches import Batch
from repan_cli.system.ranks import average_buffers
from repan_cli.training import optim
from repan_cli.training.cuda_graphs import Inputs
from repan_cli.training.plan import Phase
from repan_cli.training.run import Training
from repan_cli.training.tasks import Task


def update(run: Training, phase: Phase, task: Task, group: list[Batch], elapsed: float) -> None:
    """One step of the optimizer, `elapsed` epochs into the phase, on the mean loss over the images of `group`."""
    frozen = phase.trunk_is_frozen(elapsed)
    optim.set_learning_rate(run.optimizer, phase.learning_rate(elapsed), frozen=frozen)
    if (rate := phase.attach_rate(elapsed)) is not None:
        fill_all(run.attach_rates, rate)
    work = functools.partial(_compute, run, phase, task, frozen, _images_of_all_ranks(run, group), len(group))
    inputs = tuple(part for batch in group for part in batch.computed_on())
    if run.graphs is None:
        sums = work(inputs)
    else:
        if run.trunk_live is not None:
            run.trunk_live.fill_(not frozen)
        sums = run.graphs(("update", *(part.shape for part in inputs)), work, inputs)
    assert run.progress.totals is not None, "an epoch is under way"
    run.progress.totals.add(sums, sum(len(batch.images) for batch in group))
    average_buffers(run.model)
    if run.ema:
        _average(run, run.ema, elapsed)


def recorded_as(phase: Phase, task: Task) -> Hashable:
    """Return what a recorded update fixes beside the shapes of its inputs: phases that agree share recordings."""
    settings = phase.optim
    rules = (settings.momentum, settings.nesterov, settings.weight_decay, settings.decay)
    return task.recorded_as, rules, settings.clip, settings.clip_params


def storage(run: Training) -> frozenset[int]:
    """Return where everything lies that recorded updates and evaluations read and write."""
    models = {run.model, run.scored}
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    tensors += [each for memory in run.optimizer.state.values() for each in memory.values() if torch.is_tensor(each)]
    tensors += [group["lr"] for group in run.optimizer.param_groups]
    return frozenset(each.data_ptr() for each in tensors if torch.is_tensor(each))


def _compute(
    run: Training, phase: Phase, task: Task, frozen: bool, images: int, batches: int, inputs: Inputs
) -> Tensor:
    """Do the device's part of an update, for the parts of some batches with so many images on all ranks.

    Gives sums over the group, (3,): loss, correct, and 1 if the update was skipped. A recorded step does not look at
    `frozen` but at `run.trunk_live`.
    """
    run.optimizer.zero_grad(set_to_none=True)
    count = len(inputs) // batches
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    for number in range(batches):
        batch = Batch.of(inputs[number * count : (number + 1) * count])
        alone = run.runtime.ranks > 1 and number + 1 < batches  # gradients are exchanged with the last batch
        with _without_exchange(run.called) if alone else contextlib.nullcontext(), run.runtime.training():
            with run.runtime.autocast(), _counted_at_once(run.norms):
                loss, logits = task(_called(run, batch), batch)
            share = len(batch.images) * run.runtime.ranks / images  # gradients are averaged over ranks
            run.scaler.scale(loss * share).backward()
        losses.append(loss.detach() * len(batch.images))
        correct.append((logits.detach().argmax(1) == batch.classes()).sum())
    return torch.stack([_sum(losses), _sum(correct), _step(run, phase, frozen)])


def _sum(values: list[Tensor]) -> Tensor:
    return sum(values[1:], values[0])


def _without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Leave gradients on their rank meanwhile."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.parallel.DistributedDataParallel), "several ranks train a wrapped network"
    return inner.no_sync()


def _called(run: Training, batch: Batch) -> nn.Module:
    """The network as training calls it, which for a ragged last batch is not compiled: that takes as long again as for
    all the others.
    """
    machine = run.runtime
    share = run.batch_size // machine.ranks + (machine.rank < run.batch_size % machine.ranks)  # as Tensor.tensor_split
    ragged = len(batch.images) < share
    return getattr(run.called, "_orig_mod", run.called) if ragged else run.called


def _step(run: Training, phase: Phase, frozen: bool) -> Tensor:
    """Change the weights by their gradients; gives whether that was left out, 0 or 1."""
    if run.trunk_live is not None:
        optim.mask_trunk_gradients(run.optimizer, run.trunk_live)
    elif frozen:
        optim.drop_trunk_gradients(run.optimizer)
    if run.scaler.is_enabled():
        run.scaler.unscale_(run.optimizer)
    norm = optim.clip_gradients(run.optimizer, phase.optim)
    if run.scaler.is_enabled():
        run.scaler.step(run.optimizer)
        run.scaler.update()
        return torch.zeros((), device=norm.device)
    left_out = optim.step_if_finite(run.optimizer, norm)
    if run.trunk_live is not None:
        optim.mask_trunk_momentum(run.optimizer, run.trunk_live)
    return left_out


@contextlib.contextmanager
def _counted_at_once(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Let no BN count its batches meanwhile: they all do it in one operation at the end instead of one each."""
    counting = {
        norm: norm.num_batches_tracked for norm in norms if norm.training and norm.num_batches_tracked is not None
    }
    for norm in counting:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, counter in counting.items():
            norm.num_batches_tracked = counter
    if counting:
        torch._foreach_add_(list(counting.values()), 1)


def _images_of_all_ranks(run: Training, group: list[Batch]) -> int:
    """How many images an update is made of, where ranks may have one more or less."""
    images = sum(len(batch.images) for batch in group)
    if run.runtime.ranks == 1:
        return images
    first, last = run.progress.step, run.progress.step + len(group)
    return min(last * run.batch_size, run.train.count) - first * run.batch_size


def _average(run: Training, ema: ModelEmaV3, elapsed: float) -> None:
    """Take the step into the weight average, whose blocks are attached as the network's are."""
    batches = round(elapsed * run.train.steps(run.batch_size))
    ema.update(run.model, step=batches // run.accumulate + 1)
    torch._foreach_copy_(attach_rates(ema.module), attach_rates(run.model))
