"""A GPU that is not there: its tensors hold nothing, and go through forward, backward and optimizer all the same.

PyTorch's fake tensors tell mixed devices and host-device syncs from shapes alone, but for the backward pass of those on
CUDA the driver is asked for streams. So C++ is told that they are on `meta`, which needs no driver, and Python that
they are on `cuda`; memory that C++ then asks for on `meta` is made on `cuda`.
"""

import contextlib
from collections import Counter
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, META = torch.device("cuda", 0), torch.device("meta")

_usual = FakeTensor.__torch_dispatch__.__func__


def _dispatched(cls, function, types, args=(), kwargs=None):
    if function is torch.ops.prim.device.default:
        return META
    return _usual(cls, function, types, args, kwargs)


class Autocast(TorchFunctionMode):
    """Casts for convolutions and products as autocast does, which C++ leaves out for tensors on `meta`."""

    LOWER = (torch.conv2d, torch.nn.functional.linear, torch.matmul)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.LOWER and torch.is_autocast_enabled("cuda"):
            lower = torch.get_autocast_dtype("cuda")
            args, kwargs = tree_map_only(torch.Tensor, lambda each: each.to(lower), (args, kwargs))
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts operators that are done meanwhile, and keeps those that move data between host and device."""

    def __init__(self):
        super().__init__()
        self.calls, self.crossings = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:
            return META
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == META:
            kwargs["device"] = GPU
        if function is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "cpu":
            return {torch.bool: True, torch.float32: 0.5, torch.float64: 0.5}.get(args[0].dtype, 0)  # no sync
        name = str(function.overloadpacket)
        self.calls[name] += 1
        if name.startswith("aten._fused_sgd"):  # changes tensors in place, and has no implementation for fakes
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
            assert {each.device for each in tensors} == {GPU}
            return None
        result = function(*args, **kwargs)
        if name in ("aten._to_copy", "aten.copy_", "aten._foreach_copy_"):
            found = {each.device.type for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor)}
            if len(found) > 1:
                self.crossings.append((name, [tuple(each.shape) for each in tree_leaves(result)]))
        return result


@contextlib.contextmanager
def fake_gpu():
    """Work meanwhile on tensors that hold nothing; a look at one on the GPU raises DataDependentOutputException."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensor, "__torch_dispatch__", classmethod(_dispatched)))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Autocast())
        yield stack.enter_context(Operators())


def on_gpu(model):
    """Put a network's tensors on the GPU, in place: `Module.to` would swap them, which fake ones do not allow."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device=GPU))
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty_like(value, device=GPU)
    return model
