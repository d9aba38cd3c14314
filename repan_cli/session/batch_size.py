"""Resolve `data.batch_size=auto`: the largest power of two whose training step fits the device."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repan_cli.config.settings import AUTO_BATCH, Config, replace
from repan_cli.data.types import Dataset
from repan_cli.errors import InputError, is_out_of_memory
from repan_cli.models.probe import noise
from repan_cli.system import host
from repan_cli.system.device import Runtime
from repan_cli.system.notices import doing, warn
from repan_cli.system.ranks import joined, of_first_rank

MOST, STEPS = 4096, 16
"""The largest batch, and the fewest steps that an epoch keeps: with larger batches an epoch learns little."""

SHARE = 0.6
"""The share of free memory that a step may take. Optimizer, teacher and images need some as well."""

TRIED = 4
"""The number of images with which the memory of a step is measured."""


def resolved(config: Config, network: nn.Module, dataset: Dataset, machine: Runtime) -> Config:
    """Return the configuration with the number that `auto` stands for on this device, and report it as a warning.

    Raises InputError if not even two images per process fit.
    """
    if config.data.batch_size != AUTO_BATCH:
        return config
    with doing("trying batch sizes"):
        each, free = _fitting(network, dataset, machine)
    number = each * machine.ranks
    if joined():
        number = int(of_first_rank(None if machine.rank else str(number).encode()))
    most = _power(len(dataset.train.labels) // STEPS)
    chosen = max(2 * machine.ranks, min(number, most, MOST))
    fits = f"{number:,} images fit {SHARE:.0%} of the {free / 2**30:.1f} GiB that {machine.device} has free"
    steps = f", and {chosen} give {STEPS} steps per epoch" if chosen == most < number else ""
    warn(f"data.batch_size=auto is {chosen}: {fits}{steps}; optim.lr={config.optim.lr:g} is unchanged")
    return replace(config, {"data.batch_size": chosen})


def _fitting(network: nn.Module, dataset: Dataset, machine: Runtime) -> tuple[int, int]:
    """Return the number of images per process that fit, a power of two, and the free memory in bytes."""
    trial = copy.deepcopy(network).train()
    images = noise(TRIED, dataset.channels, dataset.image_size, dataset.image_size)
    images = images.to(machine.device).contiguous(memory_format=machine.memory_format)
    with torch.random.fork_rng(devices=[machine.device] if machine.device.type == "cuda" else []):
        kept = _bytes_kept(trial, images, machine) / len(images)
        free = _free(machine.device)
        number = _power(
            int(SHARE * free / max(2 * kept, 1))
        )  # activations kept for the backward pass, and their gradients
        if machine.device.type == "cuda":  # includes memory besides activations
            number = largest(min(number, MOST), lambda count: _fits(trial, images, machine, count))
    if number < 2:
        raise InputError(
            "not even two images fit into the device's memory: set a smaller data.image_size, or use a smaller network"
        )
    return number, free


def largest(number: int, fits: Callable[[int], bool]) -> int:
    """Return the first of `number`, its half, and so on, that fits; 0 if not even two images do."""
    while number >= 2 and not fits(number):
        number //= 2
    return number if number >= 2 else 0


def _step(trial: nn.Module, images: Tensor, machine: Runtime) -> None:
    with machine.training(), machine.autocast():
        logits = trial(images)
        loss = F.cross_entropy(logits.float(), torch.zeros(len(images), dtype=torch.long, device=images.device))
    loss.backward()
    trial.zero_grad(set_to_none=True)


def _bytes_kept(trial: nn.Module, images: Tensor, machine: Runtime) -> int:
    """Return the bytes that a step keeps for its backward pass, each storage once, without the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in trial.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _step(trial, images, machine)
    return sum(storages.values())


def _fits(trial: nn.Module, images: Tensor, machine: Runtime, number: int) -> bool:
    try:
        _step(trial, images[:1].expand(number, -1, -1, -1).contiguous(memory_format=machine.memory_format), machine)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        trial.zero_grad(set_to_none=True)  # of a step that failed
        torch.cuda.empty_cache()
    return True


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    whole = host.memory_bytes() or 2**32
    return max(host.memory_bytes(free=True) or 0, whole // 4)  # macOS does not tell what is free


def _power(number: int) -> int:
    """Return the largest power of two up to a number; 0 below 1."""
    return 1 << (number.bit_length() - 1) if number > 0 else 0
