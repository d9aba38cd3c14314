"""Files made to run code, to fill the memory or to confuse: each is refused in one line by every command that reads it.

All of them go through the commands in one process of its own, whose memory is measured.
"""

import io
import json
import multiprocessing
import os
import pickle
import resource
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import card_of, one_line, run, small_net
from torch import nn

from repan_cli import checkpoint
from repan_cli.checkpoint.card import Change, Structure
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.cli import app

COMMANDS = {
    "info": ["info", "FILE"],
    "evaluate": ["evaluate", "FILE"],
    "fuse": ["fuse", "FILE", "--out", "fused.pt"],
    "cycle": ["cycle", "--model", "repvgg_a0_cifar", "--dataset", "digits", "--init", "FILE", "--out", "run"],
}
SLOW = dict.fromkeys(("many_lists_old.pth", "deep.pt", "laughs.pt"), ("info",))
SLOW |= dict.fromkeys(("many_branches.pt", "many_changes.pt"), ("info", "cycle"))
"""Files that take a second to refuse, and the commands that they suffice for."""

MARK = "touch marker"
MOST_GROWTH = 200e6

FILES: dict[str, Callable[[Path], object]] = {}
"""How each file is made, by its name."""


def hostile(name: str) -> Callable:
    def enter(make: Callable[[Path], object]) -> Callable[[Path], object]:
        FILES[name] = make
        return make

    return enter


class Calls:
    """What unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---------------------------------------------------------------------------------------------- code


@hostile("system.pt")
def _system(path):
    torch.save({"format": "repan", "version": 1, "digest": "", "meta": Calls(os.system, MARK), "weights": {}}, path)


@hostile("eval.pt")
def _eval(path):
    torch.save({"state_dict": {"a": Calls(eval, f"__import__('os').system('{MARK}')")}}, path)


@hostile("nested_global.pt")
def _nested_global(path):
    """os.system by way of a module that torch itself imports."""
    argument = f"X{chr(len(MARK))}\0\0\0{MARK}".encode()
    write_archive(path, b"\x80\x02ctorch.serialization\nos.system\n" + argument + b"\x85R.")


@hostile("hidden_in_a_key.pth")
def _hidden_in_a_key(path):
    torch.save({Calls(exec, f"import os; os.system('{MARK}')"): torch.ones(1)}, path)


@hostile("loads_another.pt")
def _loads_another(path):
    """torch.load of a second file, as code would be run that only the second holds."""
    (path.parent / "second.pickle").write_bytes(pickle.dumps(Calls(os.system, MARK)))
    torch.save({"weights": Calls(torch.load, str(path.parent / "second.pickle"), None, None)}, path)


@hostile("script.pt")
def _script(path):
    """An archive that torch.load hands on to torch.jit.load."""
    write_archive(path, pickle.dumps(Calls(os.system, MARK), 2), {"constants.pkl": b"\x80\x02).", "code/a.py": b"x"})


@hostile("whole_network.pt")
def _whole_network(path):
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), path)


@hostile("old_format.pth")
def _old_format(path):
    torch.save({"state_dict": Calls(os.system, MARK)}, path, _use_new_zipfile_serialization=False)


@hostile("bare.pt")
def _bare(path):
    path.write_bytes(pickle.dumps(Calls(os.system, MARK)))


@hostile("pickle_named.safetensors")
def _pickle_named(path):
    path.write_bytes(pickle.dumps(Calls(os.system, MARK)))


@hostile("user_model.pt")
def _own_network(path):
    """A description that names a file of Python beside it."""
    (path.parent / "evil.py").write_text(f"import os\nos.system('{MARK}')\ndef build(**_): return None\n")
    card = card_of(nn.Identity(), f"{path.parent / 'evil.py'}:build", block=None, config={"data.name": "digits"})
    checkpoint.save(Checkpoint({"a": torch.ones(1)}, card), path)


@hostile("climbs_out.pt")
def _climbs_out(path):
    """Names of members that lead out of any folder they were unpacked to."""
    write_archive(path, pickle_of({"a": torch.ones(1)}), {"../../marker": b"", "/tmp/../marker": b""})


# ---------------------------------------------------------------------------------------------- memory


def write_archive(path: Path, content: bytes, more: dict[str, bytes] | None = None, **options: object) -> None:
    """An archive as torch.save writes it, of any pickle, with one storage of 20 bytes."""
    members = {"data.pkl": content, "byteorder": b"little", "version": b"3\n", "data/0": bytes(20), **(more or {})}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)


def pickle_of(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little")


FIVE_NAMED = pickle_of({"weights": {"a": torch.zeros(5)}})


def with_size(content: bytes, size: bytes, stride: bytes, stored: bytes = b"K\x05") -> bytes:
    """The pickle with another size and stride of its tensor, and of what it says to be stored."""
    before, _, after = content.partition(b"cpuq")
    name, _, after = after.partition(b"K\x05tq")
    mark, _, after = after.partition(b"QK\x00K\x05\x85q")
    second, _, after = after.partition(b"K\x01\x85q")
    assert after
    parts = before, b"cpuq", name, stored, b"tq", mark, b"QK\x00", size, b"\x85q", second, stride, b"\x85q", after
    return b"".join(parts)


@hostile("zip_bomb.pt")
def _zip_bomb(path):
    zeros = bytes(300_000_000)
    write_archive(path, pickle_of({"a": torch.ones(1)}), {"data/1": zeros}, compression=zipfile.ZIP_DEFLATED)


@hostile("pickle_bomb.pt")
def _pickle_bomb(path):
    """A pickle that is small only as long as it is packed."""
    content = b"\x80\x02" + b"]" * 50_000_000 + b"."
    write_archive(path, content, compression=zipfile.ZIP_DEFLATED)


@hostile("lying_directory.pt")
def _lying_directory(path):
    """A member that says to have four thousand million bytes."""
    write_archive(path, FIVE_NAMED)
    whole = bytearray(path.read_bytes())
    at = whole.rindex(b"PK\1\2", 0, whole.rindex(b"PK\5\6"))
    whole[at + 20 : at + 28] = 2 * (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(whole)


@hostile("one_for_many.pt")
def _one_for_many(path):
    """Many members that share the same bytes of the archive."""
    write_archive(path, FIVE_NAMED, {"data/1": bytes(3_000_000)})
    whole = path.read_bytes()
    end = whole.rindex(b"PK\5\6")
    last = whole.rindex(b"PK\1\2", 0, end)
    entries = [whole[last:end].replace(b"data/1", f"data/{n}".encode()) for n in range(2, 10)]
    size, start = (int.from_bytes(whole[end + at : end + at + 4], "little") for at in (12, 16))
    counts = (5 + len(entries)).to_bytes(2, "little") * 2
    fields = counts + (size + len(b"".join(entries))).to_bytes(4, "little") + start.to_bytes(4, "little")
    path.write_bytes(whole[:end] + b"".join(entries) + b"PK\5\6\0\0\0\0" + fields + b"\0\0")


@hostile("huge_storage.pt")
def _huge_storage(path):
    huge = number(2_000_000_000)
    write_archive(path, with_size(FIVE_NAMED, huge, b"K\x01", stored=huge))


@hostile("huge_view.pt")
def _huge_view(path):
    """One number, seen as two thousand million."""
    write_archive(path, with_size(FIVE_NAMED, number(2_000_000_000), b"K\x00"))


@hostile("taken_apart.pt")
def _taken_apart(path):
    """One number, seen as two million, which are counted one by one."""
    content = with_size(FIVE_NAMED, number(2_000_000), b"K\x00")
    tensor = content[content.index(b"ctorch._utils") : content.rindex(b"R") + 1]
    write_archive(path, b"\x80\x02ccollections\nCounter\n" + tensor + b"\x85R.")


@hostile("beyond_its_storage.pt")
def _beyond(path):
    write_archive(path, with_size(FIVE_NAMED, number(2_000_000_000), b"K\x01"))


@hostile("bytearray.pt")
def _bytearray(path):
    """The one call that torch allows and that fills memory at once."""
    write_archive(path, b"\x80\x02cbuiltins\nbytearray\n" + number(2_000_000_000) + b"\x85R.")


@hostile("bytearray_old.pth")
def _bytearray_old(path):
    path.write_bytes(b"\x80\x02c__builtin__\nbytearray\n" + number(2_000_000_000) + b"\x85R.")


@hostile("many_lists_old.pth")
def _many_lists_old(path):
    path.write_bytes(b"\x80\x02" + b"]" * 20_000_000 + b".")


@hostile("deep.pt")
def _deep(path):
    write_archive(path, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


@hostile("deep_description.pt")
def _deep_description(path):
    plain = pickle_of({**OURS, "meta": {"model": "DEEP"}})
    deep = plain.replace(b"X\4\0\0\0DEEP", b"]" * 50_000 + b"a" * 49_999)
    assert deep != plain
    write_archive(path, deep)


@hostile("laughs.pt")
def _laughs(path):
    """Lists that hold the same list ten times, nine levels of them."""
    laugh: list = ["ha"]
    for _ in range(9):
        laugh = [laugh] * 10
    torch.save({**OURS, "meta": {"model": laugh}}, path)


@hostile("holds_itself.pt")
def _holds_itself(path):
    itself: dict = {}
    itself["state_dict"] = itself
    torch.save(itself, path)


OURS = {"format": "repan", "version": 1, "digest": "", "meta": {}, "weights": {}, "state": {}}
"""What calls itself repan's."""


@hostile("sparse.pt")
def _sparse(path):
    """Three numbers that would be a million million as a dense tensor."""
    few = torch.sparse_coo_tensor(torch.tensor([[0, 1, 2]]), torch.ones(3), (10**12,), check_invariants=True)
    torch.save({**OURS, "weights": {"a": few}}, path)


@hostile("no_storage.pt")
def _no_storage(path):
    torch.save({**OURS, "weights": {"a": torch.empty(10**12, device="meta")}}, path)


@hostile("no_tensors.pt")
def _no_tensors(path):
    torch.save({**OURS, "weights": {1: "a"}, "state": {"b": None}}, path)


@hostile("shared.pt")
def _shared(path):
    """A thousand tensors of the same megabyte."""
    one = torch.ones(2**18)
    torch.save({**OURS, "weights": {str(number): one for number in range(1000)}}, path)


@hostile("shared_by_others.pth")
def _shared_by_others(path):
    one = torch.ones(2**18)
    torch.save({str(number): one for number in range(1000)}, path)


@hostile("endless_and_empty.pth")
def _endless_and_empty(path):
    torch.save({"fc.weight": torch.empty(10**12, 0)}, path)


@hostile("quantized.pt")
def _quantized(path):
    torch.save({"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, path)


def describe(path: Path, name: str, **values: object) -> None:
    """A file of some bytes that says to hold a network."""
    card = card_of(nn.Identity(), name, block=None, config={"data.name": "digits"}, **values)
    checkpoint.save(Checkpoint({"a": torch.ones(1)}, card), path)


@hostile("giant.pt")
def _giant(path):
    describe(path, "timm:vit_gigantic_patch14_clip_224")


@hostile("giant.safetensors")
def _giant_in_safetensors(path):
    describe(path, "torchvision:regnet_y_128gf")


@hostile("many_classes.pt")
def _many_classes(path):
    describe(path, "timm:resnet18", classes=tuple(map(str, range(200_000))))


@hostile("many_channels.pt")
def _many_channels(path):
    many = 4096
    describe(path, "timm:vgg11", in_chans=many, mean=(0.0,) * many, std=(1.0,) * many)


@hostile("many_branches.pt")
def _many_branches(path):
    native = {"block": "mobileone", "branches": 1024}
    describe(path, "repvgg_b3_cifar", structure=Structure((), {}, native))


@hostile("many_changes.pt")
def _many_changes(path):
    changes = tuple(Change("expand", "conv1", None, "mobileone", 1024) for _ in range(1000))
    describe(path, "timm:resnet18", structure=Structure(changes, {}, {}))


# ---------------------------------------------------------------------------------------------- safetensors


def write_header(path: Path, header: bytes, data: bytes = bytes(8), length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


@hostile("beyond_the_file.safetensors")
def _beyond_the_file(path):
    write_header(path, b'{"a":{"dtype":"F32","shape":[2000000000],"data_offsets":[0,8000000000]}}')


@hostile("endless_header.safetensors")
def _endless_header(path):
    write_header(path, b"{}", length=2**63)


@hostile("long_header.safetensors")
def _long_header(path):
    """Half a million tensors without content."""
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    write_header(path, b"{" + b",".join(one % n for n in range(500_000)) + b"}", b"")


@hostile("deep_header.safetensors")
def _deep_header(path):
    write_header(path, b'{"a":' + b"[" * 1_000_000)


@hostile("deep_description.safetensors")
def _deep_in_safetensors(path):
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, {"repan": "[" * 1_000_000}))


@hostile("wide_description.safetensors")
def _wide_in_safetensors(path):
    wide = '{"version": 1, "digest": "", "meta": {"model": [' + "{}," * 3_000_000 + "{}]}}"
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, {"repan": wide}))


@hostile("no_object.safetensors")
def _no_object(path):
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}, {"repan": "[1]"}))


# ---------------------------------------------------------------------------------------------- the commands


def outcome(words: list[str]) -> dict[str, object]:
    """Exit code, stderr and the process's peak of memory after a command."""
    sys.argv, sys.stdout, sys.stderr = ["repan", *words], io.StringIO(), io.StringIO()
    code = 0
    try:
        app.main()
    except SystemExit as left:
        code = left.code or 0
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    stderr, sys.stdout, sys.stderr = sys.stderr.getvalue(), sys.__stdout__, sys.__stderr__
    return {"code": code, "stderr": stderr, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def drive(folder: Path, whole: bool) -> None:
    """In a process of its own: commands on every file of a folder, after one that is merely no checkpoint.

    `whole`: every command on every file, also on those that take a second to refuse.
    """
    os.chdir(folder)
    Path("text.pt").write_text("no checkpoint")
    outcomes = {}
    for name in ("text.pt", *sorted(FILES)):
        for command in COMMANDS if whole else SLOW.get(name, COMMANDS):
            words = [name if word == "FILE" else word for word in COMMANDS[command]]
            outcomes[f"{name} {command}"] = outcome(words)
    Path("outcomes.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.soak)], ids=["some", "all"])
def outcomes(request, tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("hostile")
    for name, make in FILES.items():
        make(folder / name)
    assert not (folder / "marker").exists()
    child = multiprocessing.get_context("fork").Process(target=drive, args=(folder, request.param))
    child.start()  # everything is imported in it
    child.join(600)
    child.kill()
    outcomes = json.loads((folder / "outcomes.json").read_text())
    return {**outcomes, "folder": {"names": [path.name for path in folder.iterdir()]}}


@pytest.mark.parametrize("name", FILES)
def test_it_is_refused_in_one_line(outcomes, name):
    for command in COMMANDS:
        if (found := outcomes.get(f"{name} {command}")) is None:
            assert command not in SLOW[name]
            continue
        if (name, command) == ("user_model.pt", "info"):  # it says what is in it, and imports nothing
            assert found["code"] == 0
            continue
        assert found["code"] == 2, (command, found)
        lines = [line for line in found["stderr"].splitlines() if not line.startswith("Warning: ")]
        assert len(lines) == 1, (command, found["stderr"])
        assert lines[0].startswith("Error: ")
        assert name in found["stderr"] or "evil.py" in found["stderr"]


def test_no_code_was_run_and_nothing_written(outcomes):
    assert not {"marker", "fused.pt", "run", "runs"} & set(outcomes["folder"]["names"])


def test_memory_hardly_grew(outcomes):
    """Peaks only rise, so that the last one bounds them all; the first is of a file without content."""
    before = outcomes["text.pt cycle"]["peak"]
    grown = {step: found["peak"] - before for step, found in outcomes.items() if "peak" in found}
    assert max(grown.values()) < MOST_GROWTH, {step: size for step, size in grown.items() if size > MOST_GROWTH / 4}


def test_the_traps_do_snap(tmp_path, monkeypatch):
    """Read without care, the files do run their code: the marker would be seen."""
    monkeypatch.chdir(tmp_path)
    FILES["bare.pt"](tmp_path / "bare.pt")
    pickle.loads((tmp_path / "bare.pt").read_bytes())
    assert (tmp_path / "marker").exists()


# ---------------------------------------------------------------------------------------------- a stranger only reads


@pytest.mark.parametrize("name", ["cifar100", "svhn", "mnist", "torch/cifar10", "hfds/someone/something"])
def test_a_file_makes_no_folder_and_fetches_nothing(capsys, tmp_path, monkeypatch, few_blocks, name):
    """Its settings name a data set and a place; both are only looked at, unless the user names the set."""

    def reached(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", reached)
    monkeypatch.setattr("urllib.request.urlopen", reached)
    model, place = small_net(), tmp_path / "made"
    settings = {"data.name": name, "data.root": str(place)}
    checkpoint.save(checkpoint.capture(model, card_of(model, config=settings)), tmp_path / "a.pt")
    said = one_line(capsys, "evaluate", tmp_path / "a.pt")
    assert f"--dataset {name}" in said
    code, _, err = run(capsys, "fuse", tmp_path / "a.pt")
    assert code == 0, err
    assert not place.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data.name": "digits", "data.evil": 1}, "describes its data with unknown setting 'data.evil'"),
        ({"data.name": "digits", "data.image_size": "x"}, "describes its data with data.image_size: 'x' is not"),
        (
            {"data.name": "digits", "data.split_seed": -1},
            "describes its data with data.split_seed: must be at least 0, got -1",
        ),
    ],
)
def test_settings_in_a_file_are_checked_as_those_of_a_user(capsys, tmp_path, few_blocks, settings, says):
    model = small_net()
    checkpoint.save(checkpoint.capture(model, card_of(model, config=settings)), tmp_path / "a.pt")
    assert says in one_line(capsys, "evaluate", tmp_path / "a.pt")
