"""The processes of torchrun: joining them, sums and means over them."""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed, nn

# ---------------------------------------------------------------------------------------------- ranks


def join_ranks(device: str) -> tuple[int, int]:
    """Join the processes of `torchrun`, by NCCL on GPUs, else by gloo. Returns rank and number of processes."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return 0, 1
    if not distributed.is_initialized():
        on_gpus = device.startswith(("auto", "cuda")) and torch.cuda.is_available()
        if on_gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, ranks = next(distributed.rendezvous("env://"))
        # what a lost process left in the store would be taken for the answer of its successor
        store = distributed.PrefixStore(f"repan {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        distributed.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=ranks)
    return distributed.get_rank(), ranks


def joined() -> bool:
    """Tell whether there are other ranks."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, the same bits on each."""
    total = tensor.clone()
    if joined():
        distributed.all_reduce(total)
    return total


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics: means of means stay means, whenever it is done."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not joined() or not buffers:
        return
    flat = torch.cat([buffer.flatten().float() for buffer in buffers])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
