"""Archives that two readers would understand differently: none reaches PyTorch, and genuine ones all load.

The attacks are built here from a genuine file, each with what a second reader would find: a pickle that makes a marker.
"""

import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import card_of

from repan_cli import checkpoint
from repan_cli.checkpoint import archive, reading
from repan_cli.checkpoint.archive import CENTRAL, END, END64, LOCAL, LOCATOR, Archive
from repan_cli.checkpoint.format import CHECKSUM, DIGITS, Checkpoint
from repan_cli.errors import InputError
from repan_cli.export import pt2_file

WEIGHTS = {"a": torch.arange(40.0), "b": torch.ones(3, dtype=torch.int64), "c": torch.zeros(0)}


def saved(content=WEIGHTS, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("marker",)


def evil_pickle():
    return pickle.dumps({"a": Evil()}, 2)


def end_of(whole):
    """The file without its end records, the directory's start and its size."""
    place = whole.rindex(b"PK\5\6")
    size, start = struct.unpack_from("<2I", whole, place + 12)
    return whole[: start + size], start, size


def end_record(count, size, start, comment=b""):
    return END.pack(b"PK\5\6", 0, 0, count, count, size, start, len(comment)) + comment


def narrow(content=WEIGHTS):
    """A genuine file with a 32-bit end record only, its number of entries, directory start and size."""
    body, start, size = end_of(saved(content))
    count = len(zipfile.ZipFile(io.BytesIO(saved(content))).namelist())
    return body, count, start, size


def edited(offset, value, *, mark=b"PK\1\2", which=0):
    """A genuine file with bytes changed in the header number `which` of a kind."""
    whole = bytearray(saved())
    place = [found.start() for found in re.finditer(re.escape(mark), bytes(whole))][which]
    whole[place + offset : place + offset + len(value)] = value
    return bytes(whole)


def stored(parts, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return buffer.getvalue()


def parts_of(whole):
    archive = zipfile.ZipFile(io.BytesIO(whole))
    return [(name, archive.read(name)) for name in archive.namelist()]


# ---------------------------------------------------------------------------------------------- attacks


def in_two_ways(content, entry="data.pkl"):
    """The archive for zipfile, in front of the end record; for PyTorch, at the recorded offset, one with evil in it."""
    plain = parts_of(content)
    evil = [(name, evil_pickle() if name.endswith(f"/{entry}") else part) for name, part in plain]
    hidden, start, _ = end_of(stored(evil))
    shown, _, size = end_of(stored(plain))
    return hidden + shown + end_record(len(plain), size, start)


def two_directories():
    return in_two_ways(saved())


def two_directories_in_front():
    """A directory more behind the one that is used: zipfile takes the last bytes, PyTorch those at the offset."""
    body, count, start, size = narrow()
    return body + body[start : start + size] + end_record(count, size, start)


def an_entry_between():
    """Bytes between the last entry and the directory, which no entry owns."""
    body, count, start, size = narrow()
    return body[:start] + evil_pickle() + body[start:] + end_record(count, size, start + len(evil_pickle()))


def gap_between_entries():
    """A local header of evil content, hidden between two entries of the directory."""
    whole = stored([("archive/data.pkl", b"x"), ("archive/data/0", evil_pickle()), ("archive/version", b"3")])
    body, start, _ = end_of(whole)
    entries = re.split(rb"(?=PK\x01\x02)", body[start:])[1:]
    directory = entries[0] + entries[2]
    return body[:start] + directory + end_record(2, len(directory), start)


def overlap():
    whole = stored([("archive/data.pkl", b"x" * 100), ("archive/data/0", b"y" * 100)])
    body, start, _ = end_of(whole)
    entries = re.split(rb"(?=PK\x01\x02)", body[start:])[1:]
    directory = entries[0] + entries[1] + entries[1].replace(b"data/0", b"data/1")
    return body[:start] + directory + end_record(3, len(directory), start)


def duplicate(second="archive/data.pkl"):
    """PyTorch finds one by binary search, zipfile the last."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the duplicate
        return stored([*parts_of(saved()), (second, evil_pickle())])


def disagreeing_wide_record(at, value):
    """The 64-bit end record, which PyTorch believes, says another thing than the 32-bit one."""
    whole = bytearray(saved())
    place = whole.rindex(b"PK\6\6")
    whole[place + at : place + at + 8] = value.to_bytes(8, "little")
    return bytes(whole)


def locator_elsewhere():
    whole = bytearray(saved())
    other = END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 60, 0)
    place = whole.rindex(b"PK\6\7")
    moved = whole[:place] + other + whole[place:]
    return bytes(moved)


def wide_size_without_need():
    """An entry with a small 32-bit size and a 64-bit one beside it."""
    body, count, start, _ = narrow()
    fields = list(CENTRAL.unpack_from(body, start))
    name = body[start + 46 : start + 46 + fields[10]]
    fields[11] = 20
    entry = CENTRAL.pack(*fields) + name + struct.pack("<2H2Q", 1, 16, 7, 7)
    directory = entry + body[start + 46 + len(name) :]
    return body[:start] + directory + end_record(count, len(directory), start)


def many_small_entries():
    """A directory that takes more memory than the file."""
    body = b""
    entry = CENTRAL.pack(b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * 100_000
    return body + directory + end_record(65534, len(directory), 0)


ATTACKS = {
    "two directories": (two_directories, "a directory that is not where its end record says"),
    "two directories, the other way": (two_directories_in_front, "a directory that is not where its end record says"),
    "prefix": (lambda: evil_pickle() + saved(), "misplaced|not a checkpoint|more than tensors"),
    "prefix of an archive": (lambda: saved()[:200] + saved(), "misplaced|not where its end record says"),
    "bytes before the directory": (an_entry_between, "bytes that belong to no entry"),
    "bytes behind the end": (lambda: saved() + b"\0", "something was added"),
    "a second archive behind": (lambda: saved() + stored([("archive/data.pkl", b"x")]), "misplaced|not where"),
    "comment": (lambda: saved()[:-2] + b"\5\0hello", "something was added"),
    "comment as long as a seal": (lambda: saved()[:-2] + b"\x4d\0" + b"x" * 77, "a comment that repan did not write"),
    "seal with an end record in it": (
        lambda: saved()[:-2] + b"\x4d\0" + b"repan sha256 " + end_record(0, 0, 0) + b"0" * 42,
        "a comment that repan did not write|do not match its checksum",
    ),
    "deflated": (lambda: stored(parts_of(saved()), zipfile.ZIP_DEFLATED), "compressed entries"),
    "packed by the local header": (lambda: edited(8, b"\x08\0", mark=b"PK\3\4", which=4), "disagrees with"),
    "another name in the local header": (lambda: edited(38, b"X", mark=b"PK\3\4"), "disagrees with"),
    "another size in the local header": (lambda: edited(22, b"\1\0\0\0", mark=b"PK\3\4"), "disagrees with"),
    "another size in the descriptor": (lambda: edited(12, b"\1\0\0\0", mark=b"PK\7\b"), "disagrees with"),
    "flags that differ": (lambda: edited(6, b"\x09", mark=b"PK\3\4"), "disagrees with"),
    "encrypted": (lambda: edited(8, b"\x09"), "encrypted or patched"),
    "an entry on another disk": (lambda: edited(34, b"\1\0"), "directory that is damaged"),
    "an entry marked as a folder": (lambda: edited(38, b"\x10"), "marked as folders"),
    "a long extra field": (lambda: edited(28, b"\xff\xff", mark=b"PK\3\4"), "damaged|disagrees|extra"),
    "gap": (gap_between_entries, "gaps between its entries"),
    "overlap": (overlap, "gaps between its entries, or entries that overlap"),
    "duplicate": (duplicate, "two entries of one name"),
    "duplicate in capitals": (lambda: duplicate("archive/DATA.pkl"), "two entries of one name"),
    "two folders": (lambda: duplicate("other/data.pkl"), "outside its folder"),
    "TorchScript": (lambda: duplicate("archive/constants.pkl"), "is a TorchScript program"),
    "terminal codes": (lambda: duplicate("archive/\x1b[2J"), r"holds '\?\[2J'"),
    "64-bit: another start": (lambda: disagreeing_wide_record(48, 0), "two end records that disagree"),
    "64-bit: another size": (lambda: disagreeing_wide_record(40, 60), "two end records that disagree"),
    "64-bit: another count": (lambda: disagreeing_wide_record(32, 1), "two end records that disagree"),
    "64-bit: an extended record": (lambda: disagreeing_wide_record(4, 48), "an invalid 64-bit end record"),
    "64-bit: elsewhere": (locator_elsewhere, "not where its end record says|two end records|misplaced"),
    "64-bit: sizes beside others": (wide_size_without_need, "64-bit sizes that disagree"),
    "64-bit: a lacking record": (lambda: edited(10, b"\xff\xff", mark=b"PK\5\6"), "disagree|lacks its 64-bit"),
    "a long directory": (many_small_entries, "would fill the memory|not a checkpoint|more than tensors"),
    "cut off": (lambda: saved()[:-30], "cut off"),
    "a directory of nothing": (lambda: saved()[:4] + end_record(0, 0, 4), "belong to no entry|holds nothing"),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("suffix", [".pt", ".pt2"])
def test_an_ambiguous_archive_is_refused(tmp_path, monkeypatch, attack, suffix):
    monkeypatch.chdir(tmp_path)
    make, says = ATTACKS[attack]
    path = tmp_path / f"evil{suffix}"
    path.write_bytes(make())
    with pytest.raises(InputError, match=rf"evil\{suffix}") as error:
        checkpoint.load_any(path) if suffix == ".pt" else pt2_file.open_file(path)
    message = str(error.value)
    assert re.search(says if suffix == ".pt" else f"{says}|damaged|not where|which a graph does not", message), message
    assert "\n" not in message
    assert message.isprintable()
    assert not (tmp_path / "marker").exists()


def test_the_two_directories_are_a_trap(tmp_path, monkeypatch):
    """Python's reader finds the plain archive, PyTorch's the evil one."""
    monkeypatch.chdir(tmp_path)
    content = two_directories()
    assert "archive/data/0" in zipfile.ZipFile(io.BytesIO(content)).namelist()
    assert torch._C.PyTorchFileReader(io.BytesIO(content)).get_record("data.pkl") == evil_pickle()


def test_a_storage_that_claims_more_than_its_bytes_is_refused(tmp_path):
    """A tensor beyond its storage would read what else is in memory."""
    content = saved({"a": torch.zeros(5)})
    claimed = content.replace(b"K\x05tq", b"K\x06tq", 1)
    assert claimed != content
    (tmp_path / "beyond.pt").write_bytes(claimed)
    with pytest.raises(InputError, match=r"beyond.pt is damaged"):
        checkpoint.load_any(tmp_path / "beyond.pt")


# ---------------------------------------------------------------------------------------------- genuine files

LIGHTNING = {
    "epoch": 3,
    "pytorch-lightning_version": "2.4.0",
    "state_dict": {f"model.{name}": tensor for name, tensor in WEIGHTS.items()},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
    "hyper_parameters": {"lr": np.float64(0.1)},
}


def without(whole, *names):
    return stored([part for part in parts_of(whole) if part[0].partition("/")[2] not in names])


GENUINE = {
    "torch.save": saved,
    "old format": lambda: saved(_use_new_zipfile_serialization=False),
    "Lightning": lambda: saved(LIGHTNING),
    "stored anew by zipfile": lambda: stored(parts_of(saved())),
    "PyTorch 1.6": lambda: without(
        saved(), "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"
    ),
    "no tensors of bytes": lambda: saved({"a": torch.zeros(0), "b": torch.zeros(0)}),
}


@pytest.mark.parametrize("name", GENUINE)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_genuine_files_load(tmp_path, name):
    path = tmp_path / "genuine.ckpt"
    path.write_bytes(GENUINE[name]())
    loaded = checkpoint.load_any(path)
    expected = torch.load(path, weights_only=name != "Lightning")
    expected = expected.get("state_dict", expected)
    expected = {key.removeprefix("module."): value for key, value in expected.items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_any_alignment_and_no_check_sums(tmp_path, alignment):
    from torch.utils.serialization import config

    with config.patch({"save.storage_alignment": alignment, "save.compute_crc32": False}):
        torch.save(WEIGHTS, tmp_path / "a.b c.pt")
    assert torch.equal(checkpoint.load_any(tmp_path / "a.b c.pt")["a"], WEIGHTS["a"])


class Sparse(io.RawIOBase):
    """A file that skips long parts instead of writing them."""

    def __init__(self, file):
        self.file = file

    def write(self, part):
        part = memoryview(part).cast("B")
        self.file.seek(len(part), 1) if len(part) > 2**20 else self.file.write(part)
        return len(part)


def test_an_archive_above_4_gib_is_parsed_as_pytorch_writes_it(tmp_path):
    """64-bit sizes and offsets: a storage of 4 GiB, which is never in memory nor on the disk, and one behind it."""
    from torch.utils.serialization import config

    with (tmp_path / "large.pt").open("wb") as file, config.patch({"save.compute_crc32": False}):
        torch.save({"a": torch.empty(2**32 + 100, dtype=torch.uint8), "b": torch.arange(4.0)}, Sparse(file))
    with (tmp_path / "large.pt").open("rb") as file:
        archive = Archive(file, "large.pt", "")
        archive.refuse_unless(reading.RECORDS, "a checkpoint")
        assert archive.entries["data/0"].size == 2**32 + 100
        anew = archive.rewritten(reading.STORAGE)
        again = Archive(anew, "anew.pt", "")
        assert {name: entry.size for name, entry in again.entries.items()} == {
            name: entry.size for name, entry in archive.entries.items()
        }
        anew.seek(0)
        reader = torch._C.PyTorchFileReader(anew)
        assert reader.get_record("data/1") == torch.arange(4.0).numpy().tobytes()
        if hasattr(reader, "get_record_size"):  # since PyTorch 2.12
            assert reader.get_record_size("data/0") == 2**32 + 100


def test_torch_gets_the_bytes_that_were_checked(tmp_path):
    """A file that changes behind the check changes numbers at most."""
    path = tmp_path / "changing.pt"
    path.write_bytes(saved())
    with path.open("r+b") as file:
        source = reading._checked(file, path)
        file.seek(0)
        file.write(b"\0" * 400)  # data.pkl and its header
        file.flush()
        assert torch.equal(torch.load(source, weights_only=True)["a"], WEIGHTS["a"])


def test_a_file_cut_off_behind_the_check_is_noticed(tmp_path):
    path = tmp_path / "shorter.pt"
    path.write_bytes(saved({"a": torch.zeros(100_000)}))
    with path.open("r+b") as file:
        source = reading._checked(file, path)
        file.truncate(5_000)
        with pytest.raises(RuntimeError):
            torch.load(source, weights_only=True)


def test_the_archive_that_torch_gets_is_in_the_same_form():
    archive = Archive(io.BytesIO(saved()), "a.pt", "")
    anew = archive.rewritten(reading.STORAGE).read()
    assert zipfile.ZipFile(io.BytesIO(anew)).testzip() is None
    again = Archive(io.BytesIO(anew), "a.pt", "")
    assert {name: again.read(name) for name in again.entries} == {name: archive.read(name) for name in archive.entries}


def test_a_flipped_bit_in_others_pickles_is_noticed(tmp_path):
    whole = bytearray(saved())
    whole[whole.index(b"storage") + 1] ^= 1
    (tmp_path / "flipped.pt").write_bytes(whole)
    with pytest.raises(InputError, match=r"flipped.pt is damaged"):
        checkpoint.load_any(tmp_path / "flipped.pt")


def test_the_records_have_their_lengths():
    assert (LOCAL.size, CENTRAL.size, END.size, END64.size, LOCATOR.size) == (30, 46, 22, 56, 20)
    assert len(CHECKSUM) + DIGITS == archive.COMMENT_BYTES


# ---------------------------------------------------------------------------------------------- fuzzing

OURS = checkpoint.as_bytes(Checkpoint(WEIGHTS, card_of(torch.nn.Identity(), "a")), ".pt")
WIDE_AND_NARROW = [saved(), stored(parts_of(saved())), OURS]
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]


@st.composite
def damaged(draw):
    """A genuine file with bytes set, parts moved, doubled or taken away, mostly in its headers."""
    whole = bytearray(draw(st.sampled_from(WIDE_AND_NARROW)))
    headers = [found.start() for found in re.finditer(rb"PK[\x01-\x07][\x02-\x08]", bytes(whole))]
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.sampled_from([*headers, 0]))
        place = min(near + draw(st.integers(0, 60)), len(whole) - 1)
        kind = draw(st.sampled_from(["set", "set", "set", "insert", "delete", "copy"]))
        length = draw(st.sampled_from([1, 2, 4, 8, 22, 46]))
        if kind == "set":
            whole[place] = draw(st.one_of(st.sampled_from(INTERESTING), st.integers(0, 255)))
        elif kind == "insert":
            whole[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "delete":
            del whole[place : place + length]
        else:
            other = draw(st.sampled_from(headers))
            whole[place : place + length] = whole[other : other + length]
        if len(whole) < 100:
            break
    return bytes(whole)


@settings(max_examples=int(os.environ.get("REPAN_FUZZ", "150")), deadline=None, suppress_health_check=list(HealthCheck))
@given(content=damaged())
def test_a_damaged_archive_is_refused_or_the_same(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    path.write_bytes(content)
    try:
        loaded = checkpoint.load_any(path)
    except InputError as error:
        assert "fuzzed.pt" in str(error)
        assert "\n" not in str(error)
        return
    weights = loaded.weights if isinstance(loaded, Checkpoint) else loaded
    assert weights.keys() == WEIGHTS.keys()
    for name, tensor in weights.items():  # of others' files the numbers themselves are not checked
        assert torch.equal(tensor, WEIGHTS[name]) or tensor.numpy().tobytes() in content
        assert (tensor.dtype, tensor.shape) == (WEIGHTS[name].dtype, WEIGHTS[name].shape)
    assert not isinstance(loaded, Checkpoint) or all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


# ---------------------------------------------------------------------------------------------- graphs


@pytest.fixture(scope="module")
def graph():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 3)
            self.register_buffer("scale", torch.ones(4, 1, 1))

        def forward(self, images):
            return self.fc((images * self.scale).mean((2, 3)))

    net = Net().eval()
    program = torch.export.export(net, (torch.ones(2, 4, 2, 2),))
    return pt2_file.write(program, {"meta": {}}), net


def test_a_graph_opens_and_its_description_is_read(tmp_path, graph):
    content, net = graph
    path = tmp_path / "net.pt2"
    path.write_bytes(content)
    images = torch.rand(2, 4, 2, 2)
    assert torch.allclose(pt2_file.open_file(path)(images), net(images))
    assert json.loads(pt2_file.header(path)) == {"meta": {}}


def test_hidden_sample_inputs_are_not_run(tmp_path, monkeypatch, graph):
    monkeypatch.chdir(tmp_path)
    content = in_two_ways(graph[0], "sample_inputs/model.pt")
    seen = torch._C.PyTorchFileReader(io.BytesIO(content)).get_record("data/sample_inputs/model.pt")
    assert seen == evil_pickle()
    shown = zipfile.ZipFile(io.BytesIO(content)).getinfo("archive/data/sample_inputs/model.pt")
    assert shown.file_size > 2 * len(evil_pickle())  # the harmless tensor
    (tmp_path / "evil.pt2").write_bytes(content)
    with pytest.raises(InputError, match="refused, no code is run"):
        pt2_file.open_file(tmp_path / "evil.pt2")
    assert pt2_file.header(tmp_path / "evil.pt2") is None
    assert not (tmp_path / "marker").exists()


def changed_config(content, change):
    parts = dict(parts_of(content))
    name = next(name for name in parts if name.endswith("model_weights_config.json"))
    config = json.loads(parts[name])
    change(parts, next(payload for payload in config["config"].values() if payload["path_name"] == "weight_0"))
    parts[name] = json.dumps(config)
    return stored(parts.items())


def _no_bytes(parts, payload):
    payload["tensor_meta"]["sizes"] = [{"as_int": 10**12}]
    parts[next(name for name in parts if name.endswith("weight_0"))] = b""


def _one_number(parts, payload):
    payload["tensor_meta"] |= {"sizes": [{"as_int": 10**10}], "strides": [{"as_int": 0}]}


def _elsewhere(parts, payload):
    payload["path_name"] = "../../models/model.json"


@pytest.mark.parametrize("change", [_no_bytes, _one_number, _elsewhere])
def test_a_tensor_of_a_graph_has_its_bytes(tmp_path, graph, change):
    (tmp_path / "evil.pt2").write_bytes(changed_config(graph[0], change))
    with pytest.raises(InputError, match=r"evil.pt2 (holds the tensor|is damaged)"):
        pt2_file.open_file(tmp_path / "evil.pt2")


def test_the_check_sum_of_a_graphs_parts_is_looked_at(tmp_path, graph):
    whole = bytearray(stored(parts_of(graph[0])))
    place = whole.index(b'"schema_version"')
    whole[place + 2] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(whole)
    assert zlib.crc32(whole)
    with pytest.raises(InputError, match=r"flipped.pt2 is damaged"):
        pt2_file.open_file(tmp_path / "flipped.pt2")
