"""Pickles of data sets: genuine ones are read, and nothing that a file names is called."""

import os
import pickle
import pickletools
import resource

import numpy as np
import pytest
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from repan_cli.data import builtin, datasets, pickled_arrays
from repan_cli.errors import InputError

PIXELS = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)

PYTHON_2 = (
    b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(K\x06K\teU\x04dataq\x06"
    b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01K\x02M\x00\x0c\x86"
    b"cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    b"T" + PIXELS.nbytes.to_bytes(4, "little") + PIXELS.tobytes() + b"tbU\tfilenamesq\x0c]q\r(U\x05a.pngU\x05b.pngeu."
)
"""A batch of CIFAR-10 as Python 2 wrote it."""

PROTOCOL_0 = (
    b"(dp1\nS'num_cases_per_batch'\np2\nI10000\nsS'label_names'\np3\n(lp4\nS'airplane'\np5\naS'automobile'\np6\nas"
    b"S'num_vis'\np7\nI3072\ns."
)
"""The names of CIFAR-10's classes, batches.meta, in the oldest form."""


def test_a_batch_of_python_2_is_read():
    batch = pickled_arrays.parse(PYTHON_2, "batch")
    assert np.array_equal(batch["data"], PIXELS)
    assert (batch["labels"], batch["filenames"]) == ([6, 9], ["a.png", "b.png"])
    assert pickled_arrays.images_in(batch, "batch", 32).shape == (2, 32, 32, 3)


def test_the_oldest_form_is_read():
    found = pickled_arrays.parse(PROTOCOL_0, "meta")
    assert found == {"num_cases_per_batch": 10000, "label_names": ["airplane", "automobile"], "num_vis": 3072}


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_python_3_is_read(protocol):
    content = {
        "data": PIXELS,
        "labels": [1, 1000],
        "mean": np.linspace(0, 1, 5),
        "columns": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "number": np.int64(7),
        "texts": ["ä", b"b"],
        "nothing": None,
        "true": True,
    }
    found = pickled_arrays.parse(pickle.dumps(content, protocol), "batch")
    assert found.keys() == content.keys()
    for name, value in content.items():
        assert np.array_equal(found[name], value), name
    assert found["data"].dtype == np.uint8
    assert found["big"].tolist() == [0, 1, 2]


def test_the_old_name_of_numpys_module_is_read():
    content = pickle.dumps({"data": PIXELS}, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert np.array_equal(pickled_arrays.parse(content, "batch")["data"], PIXELS)


# ---------------------------------------------------------------------------------------------- attacks


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_state(state):
    """The batch with another state of its dtype."""
    genuine = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    assert genuine in PYTHON_2
    return PYTHON_2.replace(genuine, state + b"b")


def laughs():
    nested: list = [1]
    for _ in range(9):
        nested = [nested] * 10
    return nested


MINUS = b"J\xff\xff\xff\xff"
ATTACKS = {
    "a call": pickle.dumps({"data": Calls(os.mkdir, "marker")}),
    "a call, oldest form": b"cos\nmkdir\n(S'marker'\ntR.",
    "a call by way of an instance": b"(S'marker'\nios\nmkdir\n.",
    "an object": b"\x80\x02cos\nPathLike\n)\x81.",
    "numpy's loader": b"\x80\x02cnumpy\nload\nU\x01a\x85R.",
    "an array of objects": pickle.dumps({"data": np.array([Calls(os.mkdir, "marker")], dtype=object)}),
    "a dtype of objects": PYTHON_2.replace(b"U\x02u1", b"U\x02O8"),
    "a dtype with a pointer": with_state(b"(K\x03U\x01|NNN" + MINUS * 2 + b"K\x3ft"),
    "a dtype with another size": with_state(b"(K\x03U\x01|NNNJ\xff\xff\xff\x7fK\x01K\x00t"),
    "a dtype with fields": with_state(b"(K\x03U\x01|NU\x01a\x85}" + MINUS * 2 + b"K\x00t"),
    "a dtype with a sub-array": with_state(b"(K\x03U\x01|U\x01aNN" + MINUS * 2 + b"K\x00t"),
    "a dtype with metadata": with_state(b"(K\x04U\x01|NNN" + MINUS * 2 + b"K\x00}t"),
    "a dtype of another order": with_state(b"(K\x03U\x01=NNN" + MINUS * 2 + b"K\x00t"),
    "a dtype that is copied": PYTHON_2.replace(b"K\x00K\x01\x87R", b"K\x00K\x02\x87R"),
    "a dtype by name": PYTHON_2.replace(b"U\x02u1", b"U\x02V9"),
    "an array beyond its bytes": PYTHON_2.replace(b"K\x02M\x00\x0c", b"K\x03M\x00\x0c"),
    "an array of negative size": PYTHON_2.replace(b"K\x02M\x00\x0c", b"K\x02" + MINUS),
    "a large empty array": PYTHON_2.replace(b"K\x02M\x00\x0c", b"K\x00J\xff\xff\xff\x7f"),
    "an array of another size at first": PYTHON_2.replace(b"K\x00\x85U\x01b\x87R", b"J\xff\xff\xff\x7f\x85U\x01b\x87R"),
    "a state for a list": b"\x80\x02]}b.",
    "an attribute": b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
    "a persistent name": b"\x80\x02}U\x04dataU\x01aQs.",
    "a registered name": b"\x80\x02\x82\x01.",
    "an out-of-band buffer": b"\x80\x05\x97.",
    "a long number": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "a memo that is huge": b"\x80\x02}r\xff\xff\xff\x7f" + b"cos\nmkdir\n.",
    "a length without bytes": b"\x80\x02T\xff\xff\xff\x7fa.",
    "an array of a length": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "many lists": b"\x80\x02" + b"]" * 300_000 + b".",
    "a name made of lists": pickle.dumps(laughs(), 2)[:-1] + b"U\x01a\x93.",
    "keys that are lists": b"\x80\x02}]K\x01s.",
    "an empty stack": b"\x80\x02s.",
    "a mark too few": b"\x80\x02t.",
    "no dictionary": b"\x80\x02].",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_called_and_memory_is_bounded(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickled_arrays, "MOST_STEPS", 200_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="^the batch (holds|is damaged)") as error:
        pickled_arrays.images_in(pickled_arrays.parse(ATTACKS[attack], "the batch"), "the batch", 32)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_the_trap_does_snap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(ATTACKS["a call, oldest form"])
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "batch",
    [
        {"data": laughs(), "labels": [1]},
        {"data": PIXELS, "labels": laughs()},
        {"data": PIXELS, "labels": [True, 2]},
        {"data": PIXELS, "labels": np.ones(2)},
        {"data": PIXELS.astype(np.int64), "labels": [1, 2]},
        {},
    ],
)
def test_only_pixels_and_numbers_are_taken(batch):
    with pytest.raises(InputError, match="batch holds no"):
        pickled_arrays.images_in(batch, "batch", 32)
        pickled_arrays.labels_in(batch, "labels", "batch")


def test_all_instructions_are_known_to_pickletools():
    assert pickled_arrays.STEPS.keys() <= {opcode.name for opcode in pickletools.opcodes}
    assert not pickled_arrays.STEPS.keys() & {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


# ---------------------------------------------------------------------------------------------- torchvision


def test_torchvision_unpickles_nothing(tmp_path, monkeypatch):
    """Not even where the MD5 that it compares is that of the hostile file."""
    import hashlib

    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / "cifar10" / kind.base_folder
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps({"data": PIXELS, "labels": Calls(os.mkdir, "marker")})
    (folder / "data_batch_1").write_bytes(evil)
    listed = ["data_batch_1", hashlib.md5(evil).hexdigest()]
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(kind, name, [listed])
    with pytest.raises(InputError, match=r"data_batch_1 holds a call of 'posix.mkdir'"):
        datasets.load("cifar10", tmp_path)
    assert not (tmp_path / "marker").exists()


def test_a_file_that_changes_behind_torchvisions_check_is_refused(tmp_path, monkeypatch):
    kind = torchvision.datasets.CIFAR100
    folder = tmp_path / "cifar100" / kind.base_folder
    folder.mkdir(parents=True)
    (folder / "train").write_bytes(PYTHON_2)
    monkeypatch.setattr(kind, "download", lambda self: None)
    with pytest.raises(InputError, match=r"train is damaged or not the original"):
        datasets.load("cifar100", tmp_path)


def test_the_old_form_of_mnist_is_not_looked_at(tmp_path, monkeypatch):
    """`processed/training.pt` would be given to torch.load."""
    folder = tmp_path / "mnist" / "MNIST" / "processed"
    folder.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (folder / name).write_bytes(b"PK\3\4")
    monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: None)
    with pytest.raises(InputError, match="Dataset not found"):
        datasets.load("mnist", tmp_path)
    assert builtin._without_unpickling(torchvision.datasets.SVHN) is torchvision.datasets.SVHN


# ---------------------------------------------------------------------------------------------- fuzzing


@settings(max_examples=int(os.environ.get("REPAN_FUZZ", "200")), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    genuine=st.sampled_from([PYTHON_2[:300] + b"tbu.", PYTHON_2, PROTOCOL_0, pickle.dumps({"data": PIXELS}, 4)]),
    changes=st.lists(st.tuples(st.integers(0, 320), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 400),
)
def test_a_damaged_pickle_is_refused_or_plain(genuine, changes, cut):
    content = bytearray(genuine)
    for place, value in changes:
        content[place % len(content)] = value
    del content[len(content) - cut % 7 :]
    try:
        found = pickled_arrays.parse(bytes(content), "the batch")
    except InputError as error:
        assert str(error).startswith("the batch ")
        return
    plain = (str, bytes, int, float, list, tuple, dict, np.ndarray, type(None), bytearray)
    for value in found.values():
        assert isinstance(value, plain) or type(value).__module__ == pickled_arrays.__name__
        assert not isinstance(value, np.ndarray) or value.dtype.kind in "iuf"
