"""repan with `run.sync_bn` on CPUs, for which PyTorch has no such BN: its CUDA functions written out, ranks by gloo.

Everything around them is what several GPUs run: the conversion, SyncBatchNorm's own forward and backward with what it
exchanges, gradients averaged over ranks, and the merge at the end.
"""

import dataclasses
from unittest import mock

import torch
from shared_fixtures import FEW
from torch import nn

from repan_cli.cli import app
from repan_cli.models import repvgg_cifar
from repan_cli.session import build

DIMS = (0, 2, 3)


def _as(channels):
    return channels.view(1, -1, 1, 1)


def stats(x, eps):
    return x.mean(DIMS), (x.var(DIMS, unbiased=False) + eps).rsqrt()


def gathered(x, means, inverses, running_mean, running_var, momentum, eps, counts):
    counts, whole = counts.view(-1, 1), counts.sum()
    mean = (counts * means).sum(0) / whole
    var = (counts * (inverses**-2 - eps + (means - mean) ** 2)).sum(0) / whole
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * whole / (whole - 1), momentum)
    return mean, (var + eps).rsqrt()


def applied(x, weight, bias, mean, inverse, eps):
    return (x - _as(mean)) * _as(inverse * weight) + _as(bias)


def reduced(grad, x, mean, inverse, weight, *wanted):
    total, moment = grad.sum(DIMS), (grad * (x - _as(mean))).sum(DIMS)
    return total, moment, moment * inverse, total


def back(grad, x, mean, inverse, weight, total, moment, counts):
    whole = counts.sum()
    centred = grad - _as(total / whole) - (x - _as(mean)) * _as(inverse**2 * moment / whole)
    return centred * _as(inverse * weight)


def of_one_process(layer, x):
    """The same arithmetic for one process: PyTorch's own on CPUs rounds so differently that losses part soon."""
    if not layer.training:
        return _alone(layer, x)
    mean, inverse = stats(x, layer.eps)
    with torch.no_grad():
        count = torch.tensor([float(x.numel() // x.shape[1])])
        gathered(x, mean[None], inverse[None], layer.running_mean, layer.running_var, layer.momentum, layer.eps, count)
    return applied(x, layer.weight, layer.bias, mean, inverse, layer.eps)


_forward, _alone = nn.SyncBatchNorm.forward, nn.BatchNorm2d.forward


def forward(layer, x):
    with mock.patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu"):
        return _forward(layer, x)


def shared(network, dataset, machine):
    return dataclasses.replace(network, model=build.share_statistics(network.model, build.noise(dataset)))


if __name__ == "__main__":
    repvgg_cifar.DEPTHS_A = FEW
    torch.batch_norm_stats, torch.batch_norm_gather_stats_with_counts = stats, gathered
    torch.batch_norm_elemt, torch.batch_norm_backward_reduce, torch.batch_norm_backward_elemt = applied, reduced, back
    nn.SyncBatchNorm.forward = forward
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None  # which refuses CPUs
    build._with_shared_statistics = shared
    app.main()
