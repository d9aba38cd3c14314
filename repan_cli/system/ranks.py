"""Handle the processes of torchrun: join them, compare values between them, compute sums and means over them."""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from repan_cli.errors import InputError, LostRankError
from repan_cli.system.files import to_json
from repan_cli.system.launcher import local_rank, local_ranks, own_rank, rank_count
from repan_cli.system.text import first_line

START_LIMIT, STEP_LIMIT, DATA_LIMIT = timedelta(minutes=5), timedelta(minutes=10), timedelta(hours=24)
"""The time that ranks wait for each other: to begin, within a run, and while one of them downloads a data set."""

POLL = 0.05
"""Seconds between two checks of the store."""

NAMESPACE = "repan"

Result = TypeVar("Result")


class _Ours:
    """The part of torchrun's store that only these processes use, and how often they have met there."""

    store: distributed.Store | None = None
    meetings = itertools.count()


# ---------------------------------------------------------------------------------------------- joining


def join_ranks(device: str) -> tuple[int, int]:
    """Join the processes of `torchrun`, by NCCL on GPUs, else by gloo; return the rank and the number of ranks.

    Raises InputError for more processes than GPUs, LostRankError if others do not arrive in time.
    """
    ranks = rank_count()
    if ranks == 1:
        return 0, 1
    if not distributed.is_initialized():
        gpu = own_gpu(device)
        _Ours.store, _Ours.meetings = _met(_launcher_store(), own_rank(), ranks), itertools.count()
        if gpu is not None:
            torch.cuda.set_device(gpu)
        distributed.init_process_group(
            "gloo" if gpu is None else "cpu:gloo,cuda:nccl",
            store=_Ours.store,
            rank=own_rank(),
            world_size=ranks,
            timeout=STEP_LIMIT,
            device_id=gpu,
        )
    return distributed.get_rank(), ranks


def own_gpu(device: str) -> torch.device | None:
    """Return this rank's GPU; None if ranks train on CPUs.

    Raises InputError if ranks would share a GPU.
    """
    if not device.startswith(("auto", "cuda")) or (device == "auto" and not torch.cuda.is_available()):
        return None
    if ":" in device:
        raise InputError(f"device {device} would put all {rank_count()} ranks on one GPU: give --device cuda")
    there = torch.cuda.device_count()
    if local_rank() >= there:
        raise InputError(
            f"{local_ranks()} ranks on this machine, but PyTorch sees {there} GPU{'s' * (there != 1)}: "
            f"give torchrun --nproc-per-node {max(there, 1)}, or --device cpu"
        )
    return torch.device("cuda", local_rank())


def leave_ranks() -> None:
    """Leave the other ranks, which do so at the same point."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        _Ours.store = None


def _launcher_store() -> distributed.Store:
    """Return the launcher's store.

    torchrun's own access to it uses names with a restart count, which differs between agents.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return distributed.TCPStore(host, port, None, False, START_LIMIT)
    return next(distributed.rendezvous("env://", timeout=START_LIMIT))[0]


def _met(store: distributed.Store, rank: int, ranks: int) -> distributed.Store:
    """Return a part of a store that nobody has used before, the same for all ranks that are present now.

    Lost processes may have left entries in the store. To distinguish them, each process draws a random name. The first
    rank gathers the names, sends them back with a fresh prefix, and begins when all have answered under it.
    """
    name, ends = uuid.uuid4().hex, time.monotonic() + START_LIMIT.total_seconds()
    store.set(f"{NAMESPACE}/came/{rank}", name)
    called: list[str | None] = []
    prefix = ""
    while True:
        if rank == 0:
            here = [_read(store, f"{NAMESPACE}/came/{each}") for each in range(ranks)]
            if None not in here and here != called:
                prefix, called = uuid.uuid4().hex, here
                store.set(f"{NAMESPACE}/called", to_json([prefix, *here]))
            if called and all(store.check([f"{NAMESPACE}/{prefix}/{each}"]) for each in range(1, ranks)):
                store.set(f"{NAMESPACE}/{prefix}/go", "1")
                break
        else:
            prefix, *called = json.loads(_read(store, f"{NAMESPACE}/called") or '[""]')
            if called[rank : rank + 1] == [name]:
                store.set(f"{NAMESPACE}/{prefix}/{rank}", "1")
                if store.check([f"{NAMESPACE}/{prefix}/go"]):
                    break
        if time.monotonic() > ends:
            raise LostRankError(f"not all {ranks} ranks came within {START_LIMIT.total_seconds() / 60:g} minutes")
        time.sleep(POLL)
    return distributed.PrefixStore(f"{NAMESPACE}/{prefix}", store)


def _read(store: distributed.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


# ---------------------------------------------------------------------------------------------- agreeing


def joined() -> bool:
    """Return whether there are other ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def gathered(text: str, limit: timedelta = STEP_LIMIT) -> list[str]:
    """Return the value that each rank has given here, by rank.

    Raises LostRankError if one gives none within the limit.
    """
    if _Ours.store is None:
        return [text]
    keys = _said(text)
    try:
        _Ours.store.wait(keys, limit)
        return [_Ours.store.get(key).decode() for key in keys]
    except RuntimeError:
        silent = [rank for rank, key in enumerate(keys) if not _there(key)]
        raise LostRankError(f"rank {', '.join(map(str, silent))} is lost or does not answer") from None


def _said(text: str) -> list[str]:
    """Give the others a value without waiting for theirs; return the keys of all."""
    assert _Ours.store is not None, "ranks that have joined have a store"
    number = next(_Ours.meetings)
    keys = [f"said/{number}/{rank}" for rank in range(distributed.get_world_size())]
    _Ours.store.set(keys[distributed.get_rank()], text)
    return keys


def _there(key: str) -> bool:
    try:
        return _Ours.store is not None and _Ours.store.check([key])
    except RuntimeError:  # the store itself is gone
        return False


def agree(facts: Mapping[str, str], mend: str) -> None:
    """Compare values that must be the same on all ranks.

    Raises InputError on each rank, with the first rank that differs and the difference.
    """
    if not joined():
        return
    first, *others = map(json.loads, gathered(to_json(dict(facts))))
    for rank, told in enumerate(others, start=1):
        for name in [*first, *(name for name in told if name not in first)]:
            if told.get(name) != first.get(name):
                raise InputError(
                    f"ranks differ in {name}: {told.get(name)} on rank {rank}, {first.get(name)} on rank 0; {mend}"
                )


def first_on_each_machine(work: Callable[[], Result]) -> Result:
    """Return the result of `work`, which the first rank of each machine runs before the others, since it may download
    files. Raises LostRankError, with the reason, if that failed on another machine: nobody waits there any more.
    """
    if not joined():
        return work()
    machines, rank = gathered(platform.node()), distributed.get_rank()
    done = None
    if machines.index(machines[rank]) == rank:
        try:
            done = work()
        except BaseException as error:
            _said(first_line(error))
            raise
    for other, failure in enumerate(gathered("", DATA_LIMIT)):
        if failure:
            raise LostRankError(f"rank {other} on {machines[other]} has ended: {failure}")
    return work() if done is None else done


def of_first_rank(content: bytes | None) -> bytes:
    """Return the bytes of the first rank; the others pass None."""
    if not joined():
        return content or b""
    size = torch.tensor([len(content or b"")])
    distributed.broadcast(size, 0)
    sent = torch.empty(int(size), dtype=torch.uint8)
    if content:
        sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    distributed.broadcast(sent, 0)
    return sent.numpy().tobytes()


# ---------------------------------------------------------------------------------------------- computing


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, the same bits on each."""
    total = tensor.clone()
    if joined():
        distributed.all_reduce(total)
    return total


@torch.no_grad()
def average_buffers(buffers: list[Tensor]) -> None:
    """Give every rank the mean of all ranks' running statistics.

    Means of means are means, so the moment does not matter.
    """
    if not buffers or not joined():
        return
    flat = torch.cat([buffer.flatten().float() for buffer in buffers])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
