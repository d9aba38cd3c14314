"""The algebra of merging: each rule equals the convolution that it replaces."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import randomize_norms
from torch import nn

from repan_cli.blocks.kernel import conv_kernel, embed, exact, fold_norm, identity_kernel, norm_affine


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    sync=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folding_equals_convolution_then_norm(kernel, stride, dilation, groups, bias, affine, eps, sync, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 8, kernel, stride=stride, padding=2, dilation=dilation, groups=groups, bias=bias).double()
    norm = (nn.SyncBatchNorm if sync else nn.BatchNorm2d)(8, eps=eps, affine=affine).double()
    randomize_norms(norm, seed)
    norm.eval()
    weight, shift = fold_norm(conv_kernel(conv), norm)
    x = torch.randn(2, 4, 12, 13, dtype=torch.float64)
    merged = F.conv2d(x, weight, shift, stride, 2, dilation, groups)
    torch.testing.assert_close(merged, norm(conv(x)), rtol=1e-11, atol=1e-11)


def test_norm_affine_is_the_norm_in_eval_mode():
    norm = randomize_norms(nn.BatchNorm2d(6, eps=1e-2)).double().eval()
    scale, shift = norm_affine(norm)
    x = torch.randn(3, 6, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1), norm(x))


def test_a_norm_without_running_statistics_is_refused():
    with pytest.raises(ValueError, match="running statistics"):
        norm_affine(nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_identity_kernel_copies_its_input_under_groups(groups):
    weight, bias = identity_kernel(6, groups)
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    assert torch.equal(F.conv2d(x, weight, bias, groups=groups), x)


@pytest.mark.parametrize("offset", [(0, 0), (1, 2), (3, 1)])
def test_embedding_reads_the_input_at_the_offset(offset):
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 2, 2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    large, same = embed((weight, bias), (5, 5), offset)
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    shifted = x[:, :, offset[0] : offset[0] + 6, offset[1] : offset[1] + 7]
    torch.testing.assert_close(F.conv2d(x, large, same), F.conv2d(shifted, weight, bias))


def test_exact_is_a_copy():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float64))
    exact(parameter).zero_()
    assert parameter.tolist() == [1, 1]
