"""The common part of the callbacks: images from any loader, and the same restart in every process."""

import subprocess
import sys

import pytest
import torch
from support import ROOT
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import repan_cli
from repan_cli.errors import InputError
from repan_cli.integrations.restarts import Restarts
from repan_cli.system import packages

IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    return repan_cli.expand(model, "acb", images=IMAGES, attach="one")


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield IMAGES[0], 1


@pytest.mark.parametrize(
    ("loader", "found"),
    [
        (DataLoader(TensorDataset(IMAGES, torch.zeros(40)), batch_size=16), [16, 4]),
        (DataLoader(TensorDataset(IMAGES), batch_size=50), [20]),
        (DataLoader(Endless(), batch_size=8), [8, 8, 4]),
        ([{"pixel_values": IMAGES[:15]}, {"pixel_values": IMAGES[15:]}], [15, 5]),
        (IMAGES, [20]),
    ],
)
def test_calibration_images_come_from_any_loader(loader, found):
    settings = Restarts((1,), calibration_images=20)
    first, again = ([*settings._images(loader, 1)] for _ in range(2))
    assert [len(batch) for batch in first] == found
    assert all(map(torch.equal, first, again))


def test_each_restart_looks_at_other_images():
    loader = DataLoader(TensorDataset(IMAGES), batch_size=40)
    settings = Restarts((1,), calibration_images=40)
    first, second = (next(settings._images(loader, number)) for number in (1, 2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_a_loader_without_images_is_refused():
    with pytest.raises(InputError, match="a tensor of int64"):
        Restarts((0,)).before_epoch(0, network(), [], [torch.arange(3)])


def test_modes_are_kept_and_other_epochs_do_nothing():
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    assert Restarts((3,)).before_epoch(2, model, [], IMAGES) is None
    assert Restarts((3,)).before_epoch(3, model, [], IMAGES).logit_error < 1e-5
    assert [module.training for module in model.modules()] == modes


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr(packages, "missing", lambda *names: list(names))
    for name in ("lightning", "transformers"):
        monkeypatch.delitem(sys.modules, f"repan_cli.integrations.{name}", raising=False)
        with pytest.raises(InputError, match=rf"needs {name}.*: .*python.* -m pip install .*{name}"):
            __import__(f"repan_cli.integrations.{name}")
        monkeypatch.delitem(sys.modules, f"repan_cli.integrations.{name}", raising=False)


TWO = """
import sys, torch
from torch import distributed
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
sys.path.insert(0, "tests")
from test_restarts import IMAGES, network
from torch.utils.data import DataLoader, TensorDataset
from repan_cli.integrations.restarts import Restarts
model = network().train()
model(IMAGES[20 * rank : 20 * rank + 20])  # statistics that differ, as those of DDP do
wrapped = torch.nn.parallel.DistributedDataParallel(model)
loader = DataLoader(TensorDataset(IMAGES), batch_size=8)
done = Restarts((1,), calibration_images=40).before_epoch(1, wrapped, [], loader)
mine = torch.cat([value.flatten().float() for value in model.state_dict().values()])
both = [torch.empty_like(mine) for _ in range(2)]
distributed.all_gather(both, mine)
assert torch.equal(*both), (both[0] - both[1]).abs().max()
assert done.logit_error < 1e-5, done
print("same")
"""


@pytest.mark.soak
def test_two_processes_restart_alike(tmp_path):
    words = [sys.executable, "-c", TWO]
    started = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, cwd=ROOT, text=True)
        for rank in (0, 1)
    ]
    assert [process.communicate(timeout=120)[0] for process in started] == ["same\n", "same\n"]
