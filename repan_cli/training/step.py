"""Make one update of the weights. The host sets a few numbers; the device does the rest, directly or as a CUDA graph.

The device's part makes no host-device sync. It reads everything that changes from step to step from tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from repan_cli.blocks import fill_all, known_attached
from repan_cli.blocks.kernel import BatchNorm
from repan_cli.data.batches import Batch
from repan_cli.system.ranks import average_buffers
from repan_cli.training import casts, optim
from repan_cli.training.cuda_graphs import Inputs
from repan_cli.training.plan import Phase
from repan_cli.training.run import Training
from repan_cli.training.tasks import Task


def update(run: Training, phase: Phase, task: Task, group: list[Batch], elapsed: float) -> None:
    """Make one optimizer step, `elapsed` epochs into the phase, on the mean loss over the images of `group`."""
    how = _how(run, phase, elapsed)
    optim.set_learning_rate(run.optimizer, phase.learning_rate(elapsed), frozen=how.frozen)
    if (rate := phase.attach_rate(elapsed)) is not None:
        fill_all(run.attach_rates, rate)
    work = functools.partial(_compute, run, phase, task, how, _images_of_all_ranks(run, group), len(group))
    inputs = tuple(part for batch in group for part in batch.computed_on())
    if run.graphs is None:
        sums = work(inputs)
    else:
        if run.trunk_live is not None:
            run.trunk_live.fill_(not how.frozen)
        if run.average_share is not None:
            assert run.average is not None, "it has a share of each step"
            run.average_share.fill_(run.average.share(_steps_in(run, elapsed)))
        sums = run.graphs(("update", how.attached, *(part.shape for part in inputs)), work, inputs)
    assert run.progress.totals is not None, "an epoch is under way"
    run.progress.totals.add(sums, sum(len(batch.images) for batch in group))
    if run.runtime.ranks > 1:
        average_buffers(run.statistics)
    if run.average is not None and run.average_share is None:
        run.average.take(_steps_in(run, elapsed))


class _How(NamedTuple):
    """The kind of an update: whether trunks are frozen, and whether all branches are known to be fully attached."""

    frozen: bool
    attached: bool


def _how(run: Training, phase: Phase, elapsed: float) -> _How:
    """Return the kind of update to make. The attach rates are read from the device only in a phase's first update."""
    if run.rates_of is not phase:
        run.rates_of, run.rates_are_one = phase, run.read_attach_rates()
    steered, others = run.rates_are_one
    rate = phase.attach_rate(elapsed)
    # compiled networks fuse the rate into other work, and would have to be compiled again
    attached = others and (steered if rate is None else rate == 1) and not run.compiled
    return _How(phase.trunk_is_frozen(elapsed), attached)


def _steps_in(run: Training, elapsed: float) -> int:
    """Return the number of updates in the phase, including the one that is `elapsed` epochs into it."""
    batches = round(elapsed * run.train.steps(run.batch_size))
    return batches // run.accumulate + 1


def recorded_as(phase: Phase, task: Task) -> Hashable:
    """Return the properties that a recorded update depends on, besides the shapes of its inputs.

    Phases with the same properties share recordings.
    """
    settings = phase.optim
    rules = (settings.momentum, settings.nesterov, settings.weight_decay, settings.decay)
    return task.recorded_as, rules, settings.clip, settings.clip_params


def storage(run: Training) -> frozenset[int]:
    """Return the addresses of all tensors that recorded updates and evaluations read and write."""
    models = {run.model, run.scored}
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    tensors += [each for memory in run.optimizer.state.values() for each in memory.values() if torch.is_tensor(each)]
    tensors += [group["lr"] for group in run.optimizer.param_groups]
    return frozenset(each.data_ptr() for each in tensors if torch.is_tensor(each))


def _compute(run: Training, phase: Phase, task: Task, how: _How, images: int, batches: int, inputs: Inputs) -> Tensor:
    """Do the device's part of an update, for this rank's parts of some batches with `images` images over all ranks.

    Returns sums over the group, (3,): loss, correct, and 1 if the update was skipped. A recorded step does not read
    `how.frozen` but `run.trunk_live`.
    """
    run.optimizer.zero_grad(set_to_none=True)
    count = len(inputs) // batches
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    for number in range(batches):
        batch = Batch.of(inputs[number * count : (number + 1) * count])
        alone = run.runtime.ranks > 1 and number + 1 < batches  # gradients are exchanged with the last batch
        with _without_exchange(run.called) if alone else contextlib.nullcontext(), run.runtime.training():
            with (
                run.runtime.autocast(),
                _counted_at_once(run.norms),
                _cast(run),
                known_attached(run.blocks, how.attached),
            ):
                loss, logits = task(_called(run, batch), batch)
            share = len(batch.images) * run.runtime.ranks / images  # gradients are averaged over ranks
            run.scaler.scale(loss * share).backward()
        losses.append(loss.detach() * len(batch.images))
        correct.append((logits.detach().argmax(1) == batch.classes()).sum())
    left_out = _step(run, phase, how.frozen)
    if run.average is not None and run.average_share is not None:
        run.average.follow(run.average_share)
    return torch.stack([_sum(losses), _sum(correct), left_out])


def _sum(values: list[Tensor]) -> Tensor:
    return sum(values[1:], values[0])


def _without_exchange(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Skip the exchange of gradients within the context."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.parallel.DistributedDataParallel), "several ranks train a wrapped network"
    return inner.no_sync()


def _called(run: Training, batch: Batch) -> nn.Module:
    """Return the network as training calls it.

    It is not compiled for a smaller last batch: that would take as long again as for all the others.
    """
    machine = run.runtime
    share = run.batch_size // machine.ranks + (machine.rank < run.batch_size % machine.ranks)  # as Tensor.tensor_split
    ragged = len(batch.images) < share
    return getattr(run.called, "_orig_mod", run.called) if ragged else run.called


def _cast(run: Training) -> contextlib.AbstractContextManager[None]:
    """Cast all weights together, if autocast is on and the step is recorded; see `casts`."""
    recorded = run.graphs is not None and torch.is_autocast_enabled(run.runtime.device.type)
    return casts.at_once(run.cast) if recorded and not run.compiled else contextlib.nullcontext()


def _step(run: Training, phase: Phase, frozen: bool) -> Tensor:
    """Update the weights from their gradients; return whether that was skipped, 0 or 1."""
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
        left_out = torch.zeros((), device=norm.device)
    else:
        left_out = optim.step_if_finite(run.optimizer, norm)
    if run.trunk_live is not None:
        optim.mask_trunk_momentum(run.optimizer, run.trunk_live)
    return left_out


@contextlib.contextmanager
def _counted_at_once(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Stop BN layers from counting their batches within the context; one operation at the end counts for all."""
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
    """Return the number of images in an update over all ranks, whose parts may differ by one image."""
    images = sum(len(batch.images) for batch in group)
    if run.runtime.ranks == 1:
        return images
    first, last = run.progress.step, run.progress.step + len(group)
    return min(last * run.batch_size, run.train.count) - first * run.batch_size
