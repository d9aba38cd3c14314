"""Loading processes may hang: the run can be stopped, names the image it waits for, and ends."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from repan_cli.cli import dispatch
from repan_cli.data import workers
from repan_cli.data.image_files import ArrayReader
from repan_cli.data.streaming import StreamingLoader
from repan_cli.data.types import LazyImages
from repan_cli.errors import InputError, OutOfSpaceError, StoppedError, StuckLoaderError, is_out_of_memory


class Stuck(ArrayReader):
    """A reader that never comes back from one image."""

    def __call__(self, index):
        if index == 5:
            while True:
                time.sleep(60)
        return super().__call__(index)

    def name(self, index):
        return f"photos/{index}.png"


@pytest.fixture
def loader():
    images = np.zeros((8, 8, 8, 3), dtype=np.uint8)
    part = LazyImages(Stuck(images), np.arange(8), np.arange(8))
    look = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "device": torch.device("cpu")}
    return StreamingLoader(part, resized=False, size=8, workers=1, **look)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(workers, "LOOK", 0.1)


def are_gone(seconds=10):
    """Return whether all processes end within some seconds; a busy machine takes a while to end a killed one."""
    ends = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < ends:
        time.sleep(0.01)
    return not multiprocessing.active_children()


def test_a_stop_is_heard_while_an_image_hangs(loader):
    loader.stop = lambda: True
    began = time.monotonic()
    with pytest.raises(StoppedError):
        list(loader.batches(4))
    assert time.monotonic() - began < 8
    assert are_gone()


def test_the_wait_is_reported_and_ends_with_the_name_of_the_image(loader, monkeypatch, capsys):
    monkeypatch.setattr(workers, "SAID_AFTER", 0.2)
    monkeypatch.setattr(workers, "LIMIT", 0.6)
    with pytest.raises(StuckLoaderError, match=r"no images arrived for 0\.6 s; being read: photos/5\.png"):
        list(loader.batches(4))
    assert "photos/5.png" in capsys.readouterr().err
    assert are_gone()


def test_a_lost_process_is_one_line(loader):
    def kill():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        return False

    loader.stop = kill
    with pytest.raises((StuckLoaderError, RuntimeError), match=r"process that loads images has died|DataLoader worker"):
        list(loader.batches(4))
        time.sleep(1)


class Fails(ArrayReader):
    """A reader that raises an error with this text for one image."""

    text = ""

    def __call__(self, index):
        if index == 5:
            raise RuntimeError(self.text)
        return super().__call__(index)


@pytest.mark.parametrize("text", ["a bug", "the server timed out", "DefaultCPUAllocator: can't allocate memory"])
def test_an_error_within_a_process_is_neither_a_lost_process_nor_a_wait(loader, text):
    """As a wait, it would lose the batch."""
    loader.part = LazyImages(Fails(np.zeros((8, 8, 8, 3), dtype=np.uint8)), np.arange(8), np.arange(8))
    loader.part.read.text = text
    with pytest.raises(RuntimeError, match=text) as caught:
        list(loader.batches(4))
    assert not isinstance(caught.value, StuckLoaderError)
    assert is_out_of_memory(caught.value) == ("memory" in text)
    known = dispatch._as_known(caught.value)
    assert isinstance(known, OutOfSpaceError) if "memory" in text else known is None
    assert are_gone()


def test_a_small_shared_memory_is_refused_with_its_size(monkeypatch, tmp_path):
    monkeypatch.setattr(workers, "SHARED", tmp_path)
    usage = type("Usage", (), {"free": 64_000_000, "total": 64_000_000})
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: usage)
    workers.check_room(256, 3 * 224**2, 0, 10**6)
    workers.check_room(64, 3 * 224**2, 2, 10**6)
    workers.check_room(200, 3 * 224**2, 4, 300)  # there are only two batches
    with pytest.raises(InputError, match=r"has 64 MB free.*4 processes load ahead take 308 MB.*--shm-size=1g"):
        workers.check_room(256, 3 * 224**2, 4, 10**6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError, match="take 308 MB"):
        workers.check_room(64, 3 * 224**2, 2, 10**6)
