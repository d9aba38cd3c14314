"""Devices, precision, and randomness that depends on position alone."""

import pytest
import torch

from repan_cli.errors import InputError
from repan_cli.system.device import Runtime, find_device, find_precision
from repan_cli.system.seeding import generator_for, seed_for


def test_keys_depend_on_every_part():
    keys = {seed_for(*parts) for parts in ((0,), (1,), (0, 0), (0, 1), (1, 0), ("0",), ("a", 0), (0, 0, 0))}
    assert len(keys) == 8
    assert all(0 <= key < 2**63 for key in keys)
    assert seed_for("weights", 0) == seed_for("weights", 0)


def test_generators_repeat():
    draws = [torch.rand(3, generator=generator_for("x", seed)).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_auto_precision_is_that_of_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    for supported, expected in ((True, "bf16"), (False, "fp32")):
        for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, probe, lambda supported=supported: supported, raising=False)
        assert find_precision("auto", cpu) == expected
    assert find_precision("fp32", cpu) == "fp32"


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_device("auto").type == "cpu"
    with pytest.raises(InputError, match="is not available: PyTorch sees 0 GPUs"):
        find_device("cuda")
    with pytest.raises(InputError, match="unknown device 'gpu'; did you mean cuda"):
        find_device("gpu")
    for name in ("xpu", "meta"):
        with pytest.raises(InputError, match="give auto, cpu, cuda"):
            find_device(name)


def test_autocast_follows_the_precision():
    cpu = torch.device("cpu")
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with Runtime(cpu, precision).autocast():
            assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype == dtype
