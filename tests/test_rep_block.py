"""Blocks of every family: merging is exact for any geometry, and leaves the rest of a network alone."""

import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import randomize_norms, relative, small_net
from torch import nn

from repan_cli.anneal.restart import restart
from repan_cli.blocks import FAMILIES, Geometry, RepBlock, make_block, rep_blocks, reparameterize, set_attach_rate
from repan_cli.errors import InputError

pairs = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(list(FAMILIES)),
    kernel=pairs(1, 5),
    stride=pairs(1, 3),
    padding=pairs(0, 3),
    dilation=pairs(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    widen=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    rate=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_merging_is_exact(family, kernel, stride, padding, dilation, groups, widen, padding_mode, rate, seed):
    torch.manual_seed(seed)
    geometry = Geometry(4, 8 if widen else 4, kernel, stride, padding, dilation, groups, padding_mode)
    block = randomize_norms(make_block(family, geometry), seed).double().eval()
    block.attach_rate.fill_(rate)
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64)
    expected = block(x)
    assume(expected.abs().max() > 0)
    found = block.reparameterize()(x)
    assert found.shape == expected.shape
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_branches_matter_and_the_attach_rate_scales_them(family):
    """Guards the property test: with branches that did nothing it would pass, too."""
    block = randomize_norms(make_block(family, Geometry(4, 4, (3, 3), padding=(1, 1)))).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    outputs = []
    for rate in (0.0, 0.5, 1.0):
        block.attach_rate.fill_(rate)
        outputs.append(block(x))
    torch.testing.assert_close(outputs[0], block.post_norm(block.trunk(x)))
    torch.testing.assert_close(outputs[2] - outputs[1], outputs[1] - outputs[0])
    assert (relative(outputs[2], outputs[0]) > 0.01) == (family != "plain")


@pytest.mark.parametrize(("family", "branches"), [("plain", 0), ("rep", 1), ("repvgg", 2), ("acb", 2)])
def test_families_have_their_branches(family, branches):
    assert len(make_block(family, Geometry(4, 4, (3, 3), padding=(1, 1))).branches) == branches


def test_the_identity_branch_needs_equal_shapes():
    for geometry in (Geometry(4, 8, (3, 3), padding=(1, 1)), Geometry(4, 4, (3, 3), (2, 2), (1, 1))):
        assert len(make_block("repvgg", geometry).branches) == 1


def test_an_unknown_family_is_named_with_the_closest():
    with pytest.raises(InputError, match="repvggg.*did you mean repvgg"):
        make_block("repvggg", Geometry(4, 4, (3, 3)))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_silenced_branches_are_zero_in_both_modes(family):
    block = randomize_norms(make_block(family, Geometry(4, 4, (3, 3), padding=(1, 1))))
    x = torch.randn(8, 4, 6, 6)
    for branch in block.branches:
        branch.zero_init()
        for mode in (True, False):
            assert branch.train(mode)(x).abs().max() == 0


def test_a_fused_network_equals_the_multi_branch_one():
    model = small_net().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    set_attach_rate(model, 0.3)
    expected = model(x)
    assert reparameterize(model) is model
    assert relative(model(x), expected) < 1e-12
    assert not list(rep_blocks(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_fusing_changes_nothing_else():
    model = small_net().to(torch.float32, memory_format=torch.channels_last).train()
    head = model.get_classifier()
    head.weight.requires_grad_(False)
    reparameterize(model)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert model.get_classifier() is head
    assert not head.weight.requires_grad
    assert head.bias.requires_grad
    assert all(conv.weight.requires_grad and conv.bias.requires_grad for conv in convs)
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
    assert all(conv.training and conv.weight.dtype == torch.float32 for conv in convs)


def test_a_block_that_stands_twice_in_a_network_stays_shared():
    block = make_block("repvgg", Geometry(3, 3, (3, 3), padding=(1, 1)))
    model = nn.Module()
    model.first, model.second = block, block
    reparameterize(model)
    assert model.first is model.second
    assert isinstance(model.first, nn.Conv2d)


def test_a_block_alone_is_returned_as_its_convolution():
    assert isinstance(reparameterize(make_block("acb", Geometry(3, 3, (3, 3)))), nn.Conv2d)


def test_under_autocast_a_block_stays_in_bfloat16():
    """A float32 attach rate must not promote the activations."""
    block = make_block("repvgg", Geometry(4, 4, (3, 3), padding=(1, 1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(torch.randn(2, 4, 8, 8).bfloat16()).dtype == torch.bfloat16


def test_constructing_twice_shares_nothing():
    first, second = (make_block("repvgg", Geometry(4, 4, (3, 3), padding=(1, 1))) for _ in range(2))
    storages = [{p.data_ptr() for p in (*block.parameters(), *block.buffers())} for block in (first, second)]
    assert not storages[0] & storages[1]
    assert isinstance(first, RepBlock)


def test_networks_with_synchronised_norms_merge_the_same():
    model = small_net().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert relative(reparameterize(synchronised)(x), expected) < 1e-12


@pytest.mark.parametrize("family", list(FAMILIES))
def test_shared_statistics_merge_and_restart_as_ones_own(family):
    model = small_net(family)
    images = torch.randn(8, 3, 16, 16)
    expected = model(images)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in shared.modules())
    restart(shared, rule="calibrate", images=[images], attach="ramp")
    assert relative(shared.eval()(images), expected) < 1e-5
    assert relative(reparameterize(shared)(images), expected) < 1e-5


@pytest.mark.soak
def test_a_strided_1x1_branch_on_few_channels_stays_inside_its_memory():
    """PyTorch's own gradient of such a convolution corrupts the heap of a process, channels last, on CPUs."""
    code = """
import torch
from repan_cli.blocks import Geometry, make_block
import timm
from repan_cli import expand
fresh = make_block("repvgg", Geometry(3, 24, (3, 3), stride=(2, 2), padding=(1, 1)))
adapted = expand(timm.create_model("repvgg_a0", num_classes=3), images=torch.randn(2, 3, 64, 64)).stem
for block in (fresh, adapted.train()):
    block = block.to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        block(images).square().mean().backward()
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
