"""Networks of every family in timm: expand, restart and fuse keep their function. Run by `pytest -m survey`."""

import copy
import logging
import warnings
from pathlib import Path

import pytest
import timm
import torch
from support import relative
from torch.nn.modules.batchnorm import _BatchNorm

from repan_cli.anneal.restart import restart
from repan_cli.blocks import reparameterize, set_attach_rate
from repan_cli.errors import InputError
from repan_cli.models.changes import Expansion
from repan_cli.models.expand import expand
from repan_cli.models.probe import watch
from repan_cli.models.timm_blocks import is_own_block

SIZE = 96
BLOCKS = ("repvgg", "dbb", "acb", "mobileone", "qarep", "rep")
NETWORKS = (Path(__file__).parent / "survey_networks.txt").read_text().split()
"""Up to four of each of timm's architecture files, spread over its names, of at most 30 M parameters."""


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network in float64 and images: of 96 pixels, or of the size that it insists on."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).double().eval()
    channels, size, _ = timm.get_pretrained_cfg(name).input_size
    draw = torch.Generator().manual_seed(0)
    small, own = (torch.randn(2, channels, s, s, dtype=torch.float64, generator=draw) for s in (min(size, SIZE), size))
    try:
        model(small)
    except Exception:
        return model, own
    return model, small


def randomize(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Random BN statistics and affine parameters, negative gammas among them, near the scale of the activations, so
    that the images still reach the output of a deep network; nothing that is zero at first stays so.
    """
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))

    def disturb(norm, inputs):
        shape = norm.running_mean.shape
        var, mean = torch.var_mean(inputs[0].transpose(0, 1).flatten(1), dim=1, correction=0)
        norm.running_mean.copy_(mean + 0.3 * torch.randn(shape, generator=draw))
        norm.running_var.copy_((var + 0.1) * (0.5 + torch.rand(shape, generator=draw)))
        if norm.weight is not None:
            sign = torch.where(torch.rand(shape, generator=draw) < 0.2, -1.0, 1.0)
            norm.weight.copy_(sign * (0.5 + torch.rand(shape, generator=draw)))
            norm.bias.copy_(0.3 * torch.randn(shape, generator=draw))

    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    hooks = [norm.register_forward_pre_hook(disturb) for norm in norms]
    model(images)
    for hook in hooks:
        hook.remove()


def has_pair(model: torch.nn.Module, images: torch.Tensor) -> bool:
    """Whether a BN of the network reads exactly what a convolution returned."""
    return any(watch(model, images).norms.values())


def folded_parameters(model: torch.nn.Module, report: Expansion) -> int:
    """What the plain network has once the BN of every pair is folded: a bias for each BN, for each convolution."""
    count = sum(p.numel() for p in model.parameters())
    for change in report.changes:
        conv = model.get_submodule(change.name)
        count += 0 if conv.bias is not None else conv.out_channels
        count -= sum(p.numel() for p in model.get_submodule(change.norm).parameters()) if change.norm else 0
    return count


def bound_of(model: torch.nn.Module, images: torch.Tensor) -> float:
    """1e-10, or what a change of the images by 1e-13 does to a network that amplifies rounding."""
    return max(1e-10, relative(model(images * (1 + 1e-13)), model(images)))


@pytest.mark.survey
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_expand_restart_and_fuse_keep_the_function(name, record_property):
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    model, images = build(name)
    randomize(model, images)
    expected = model(images)
    bound = bound_of(model, images)
    plain = copy.deepcopy(model)
    paired = has_pair(model, images)
    record_property("pair", paired)
    own = any(is_own_block(module) for module in model.modules())
    try:
        expand(model, None if own else BLOCKS[NETWORKS.index(name) % len(BLOCKS)], images=images, attach="ramp")
    except InputError as error:
        record_property("refused", str(error))
        pytest.skip(f"refused ({'has' if paired else 'no'} conv + BN pair): {error}")
    report = model.repan_report
    record_property("blocks", len(report.changes))
    assert relative(model(images), expected) < bound
    if not own:
        set_attach_rate(model, 0.3)
        expected, bound = model(images), bound_of(model, images)
    restart(model, images=[images], attach="ramp")
    assert relative(model(images), expected) < bound
    set_attach_rate(model, 0.3)
    attached, bound = model(images), bound_of(model, images)
    record_property("bound", bound)
    assert relative(attached, expected) > 1e-9, "the branches do nothing, so the next line would prove nothing"
    reparameterize(model)
    assert relative(model(images), attached) < bound
    if not own:
        assert sum(p.numel() for p in model.parameters()) == folded_parameters(plain, report)
