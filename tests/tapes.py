"""A tape in the place of a CUDA graph, for machines without a GPU.

It keeps every operation with the very tensors that it read and wrote, and does all of it again on those. What a CUDA
graph would miss, such as a number that the host put in or a tensor that has been replaced since, it misses, too.
"""

import torch
from support import Counted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """The operations that are done meanwhile, to be done again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.played = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, tree_leaves(result)))
        return result

    @torch.no_grad()
    def replay(self):
        if self.played:  # a CUDA graph is recorded without being carried out, this one was
            self.played = False
            return
        for function, args, kwargs, places in self.calls:
            for place, value in zip(places, tree_leaves(function(*args, **kwargs)), strict=True):
                if torch.is_tensor(place) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class Tapes:
    """A recorder of tapes."""

    def aside(self, work):
        return work()

    def fits(self):
        return True

    def forget(self):
        pass

    def record(self, work):
        with Tape() as tape:
            result = work()
        return tape.replay, result


class Counts(Tapes):
    """A recorder that counts the operators of its latest recording, and whose replay does nothing.

    A tape holds on to all results, so that PyTorch copies gradients which it would otherwise take over: what a graph
    would hold is counted without one.
    """

    def record(self, work):
        with Counted() as counted:
            result = work()
        self.calls = counted.calls
        return lambda: None, result
