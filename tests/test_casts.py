"""A recorded step casts its weights together, with the bits of autocast, and skips weights that the layer computes with
first.
"""

import pytest
import timm
import torch
from support import CPU, Counted, randomize_norms, small_net
from timm.layers import ScaledStdConv2d
from torch import nn

from repan_cli.blocks import rep_blocks
from repan_cli.system.device import Runtime
from repan_cli.training import casts
from repan_cli.training.teacher import Teacher, View

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def gradients(model, found, dtype=torch.bfloat16):
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype), casts.at_once(found):
        loss = model(IMAGES).float().square().mean()
    loss.backward()
    return loss.detach(), [each.grad.clone() for each in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", ["repvgg", "dbb"])
def test_together_as_one_by_one(few_blocks, block, dtype):
    model = small_net(block).train().to(memory_format=torch.channels_last)
    own = dict(model.named_parameters())
    (loss, expected), (found, together) = gradients(model, [], dtype), gradients(model, casts.layers(model), dtype)
    assert torch.equal(loss, found)
    assert all(torch.equal(one, other) for one, other in zip(expected, together, strict=True))
    assert all(each.dtype == torch.float32 for each in together)
    assert all(value is own[name] for name, value in model.named_parameters()), "they are put back"


def test_an_error_puts_weights_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    weight = model[0].weight
    with pytest.raises(ValueError, match="in between"), casts.at_once(casts.layers(model)):
        raise ValueError("in between")
    assert model[0].weight is weight


def test_weights_that_are_computed_with_first_stay_exact():
    """Standardised ones, those of a layer of another forward, shared ones, and those that hooks make."""
    hooked = torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 1))
    tied, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = tied.weight
    plain, double = nn.Conv2d(3, 4, 1), nn.Linear(4, 4).double()
    model = nn.ModuleList([ScaledStdConv2d(3, 4, 1), hooked, tied, other, plain, double, nn.Linear(4, 2)])
    assert casts.layers(model) == [plain, model[-1]]


def test_weights_that_are_not_trained_are_left_to_autocast():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
    model[0].requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16), casts.at_once(casts.layers(model)):
        assert [layer.weight.dtype for layer in model] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_networks_of_timm_are_cast_with_the_same_result(name):
    torch.manual_seed(0)
    size = {"img_size": 16} if name.startswith("vit") else {}
    model = randomize_norms(timm.create_model(name, num_classes=4, drop_rate=0.0, **size)).train()
    found = casts.layers(model)
    assert found
    (loss, expected), (again, together) = gradients(model, []), gradients(model, found)
    assert torch.equal(loss, again)
    assert all(torch.equal(one, other) for one, other in zip(expected, together, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_teacher_casts_its_weights_once(few_blocks, precision):
    """Its logits keep their bits, and its weights stay float32."""
    machine, view = Runtime(CPU, precision), View(16, (0.5,) * 3, (0.25,) * 3)
    model = small_net("dbb").to(memory_format=torch.channels_last)
    teacher = Teacher(model, own=view, student=view, runtime=machine)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), machine.autocast():
        expected = model(images * 1).float()
    assert torch.equal(teacher.logits(images), expected)
    with Counted() as counted:
        assert torch.equal(teacher.logits(images), expected)
    others = sum("weight" in name and "inner_conv" in name for name, _ in model.named_parameters())
    assert counted.calls["aten._to_copy"] <= 2 + 2 * others + len(list(rep_blocks(model)))
    assert {each.dtype for each in model.parameters()} == {torch.float32}
