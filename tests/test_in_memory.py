"""Views of images in memory: the right pixels, drawn from position alone, every image once per epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CPU, MEAN, STD, by_hand

from repan_cli.data.batches import Augmentation
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.types import ArrayImages


def resident(count: int = 40, size: int = 6, **options) -> tuple[np.ndarray, InMemoryLoader]:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    part = ArrayImages(images, np.arange(count, dtype=np.int64))
    look = {name: options.pop(name) for name in ("memory_format", "classes") if name in options}
    return images, InMemoryLoader(part, mean=MEAN, std=STD, device=CPU, augmentation=Augmentation(**options), **look)


@settings(max_examples=40, deadline=None)
@given(padding=st.integers(0, 3), seed=st.integers(0, 999))
def test_views_are_crops_flips_and_normalisation(padding, seed):
    images, data = resident(padding=padding, flip=True)
    draw = np.random.default_rng(seed)
    index = torch.from_numpy(draw.integers(0, 40, 10))
    views = torch.from_numpy(draw.integers(0, (2 * padding + 1) ** 2 * 2, 10))
    found = data.batch(index, views).images
    expected = torch.stack([by_hand(images[i], padding, v) for i, v in zip(index, views.tolist(), strict=True)])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_cutout_blanks_one_square_a_sample_and_nothing_else():
    images, data = resident(padding=0)
    _, cut = resident(cutout=4)
    plain = torch.cat([batch.images for batch in data.training_batches(16, 0, 1, 1)])
    blanked = torch.cat([batch.images for batch in cut.training_batches(16, 0, 1, 1)])
    size = images.shape[1]
    holes = cut.plan(0, 1, 1).holes[cut.plan(0, 1, 1).order]
    for before, after, hole in zip(plain, blanked, holes.tolist(), strict=True):
        row, column = divmod(hole, size)
        square = torch.zeros(size, size, dtype=torch.bool)
        square[max(0, row - 2) : row + 2, max(0, column - 2) : column + 2] = True
        assert (after[:, square] == 0).all()
        assert torch.equal(after[:, ~square], before[:, ~square])
    assert len(set(holes.tolist())) > 5
    assert torch.equal(next(cut.batches(16)).images, next(data.batches(16)).images), "not in evaluation"


def test_batches_are_the_images_themselves_in_order():
    images, data = resident(padding=2, flip=True)
    batches = list(data.batches(16))
    assert [len(labels) for _, labels, *_ in batches] == [16, 16, 8]
    found = torch.cat([batch.images for batch in batches])
    expected = torch.stack([by_hand(image, 0, 0) for image in images])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(40))


def test_an_epoch_has_every_image_once():
    _, data = resident(padding=1)
    labels = torch.cat([batch.labels for batch in data.training_batches(16, 0, 1, 2)])
    assert sorted(labels.tolist()) == list(range(40))
    assert labels.tolist() != list(range(40))


def test_a_last_batch_of_one_image_is_left_out():
    _, data = resident(count=33)
    assert [len(batch.labels) for batch in data.training_batches(16, 0, 0, 1)] == [16, 16] == [16] * data.steps(16)
    assert data.steps(11) == 3


def test_an_epoch_depends_on_its_position_alone():
    _, data = resident(padding=2, flip=True)
    torch.manual_seed(1)
    first = data.plan(0, 1, 2)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, data.plan(0, 1, 2), strict=True))
    for position in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(first.order, data.plan(*position).order)
        assert not torch.equal(first.views, data.plan(*position).views)


def test_every_view_is_drawn_equally_often():
    _, data = resident(count=18 * 400, size=2, padding=1, flip=True)
    counts = torch.bincount(data.plan(0, 0, 1).views, minlength=18)
    assert counts.min() > 320
    assert counts.max() < 480


def test_without_flip_nothing_is_mirrored():
    _, data = resident(padding=1)
    assert (data.plan(0, 0, 1).views % 2 == 0).all()


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format(memory_format):
    _, data = resident(memory_format=memory_format, padding=1)
    for batch, *_ in (next(data.batches(8)), next(data.training_batches(8, 0, 0, 1))):
        assert batch.is_contiguous(memory_format=memory_format)
        assert batch.dtype == torch.float32
