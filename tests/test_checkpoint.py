"""Checkpoints: what is written comes back, damage and foreign content are refused, nothing is left half-written."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import zipfile

import pytest
import safetensors.torch
import torch
from support import card_of, small_net

import repan_cli
from repan_cli import checkpoint, models
from repan_cli.blocks import reparameterize, set_attach_rate
from repan_cli.checkpoint.card import ModelCard, RunState
from repan_cli.checkpoint.format import CHECKSUM, DIGITS, Checkpoint, digest_of, has_digest
from repan_cli.errors import InputError, OutOfSpaceError
from repan_cli.system.files import write_atomically

METRICS = {"nested": [1, 2.5, None, True, "ä"]}
ENDINGS = (".pt", ".safetensors")


@pytest.fixture
def saved() -> Checkpoint:
    model = small_net()
    set_attach_rate(model, 0.25)
    return checkpoint.capture(model, card_of(model, metrics=METRICS))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_checkpoint_comes_back_the_same(saved, tmp_path, ending):
    path = tmp_path / f"a{ending}"
    checkpoint.save(saved, path)
    back = checkpoint.load(path)
    assert back.card == saved.card
    assert back.digest() == saved.digest()
    assert all(torch.equal(back.weights[name], saved.weights[name]) for name in saved.weights)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("form", ["multi-branch", "fused"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_rebuilds_its_network(tmp_path, form, ending):
    model = small_net()
    set_attach_rate(model, 0.25)
    if form == "fused":
        reparameterize(model)
    path = tmp_path / f"a{ending}"
    checkpoint.save(checkpoint.capture(model, card_of(model, form=form)), path)
    x = torch.randn(2, 3, 32, 32)
    loaded = repan_cli.load(path)
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))


def test_the_digest_covers_names_dtypes_shapes_bytes_and_description(saved):
    digests = {saved.digest()}
    name = "head.weight"
    for weights in (
        {**saved.weights, name: saved.weights[name].half()},
        {**saved.weights, name: saved.weights[name].flatten()},
        {**saved.weights, name: -saved.weights[name]},
        {**{k: v for k, v in saved.weights.items() if k != name}, "other": saved.weights[name]},
    ):
        digests.add(dataclasses.replace(saved, weights=weights).digest())
    digests.add(dataclasses.replace(saved, card=dataclasses.replace(saved.card, image_size=31)).digest())
    assert len(digests) == 6


def test_the_digest_does_not_depend_on_memory_layout(saved):
    strided = {name: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for name, v in saved.weights.items()}
    assert dataclasses.replace(saved, weights=strided).digest() == saved.digest()


def flipped(whole: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(whole))
    return whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]


def cut(whole: bytes, draw: random.Random) -> bytes:
    return whole[: draw.randrange(len(whole))]


def page_zeroed(whole: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(0, len(whole), 4096)
    zeros = bytes(len(whole[start : start + 4096]))
    assert whole[start : start + 4096] != zeros
    return whole[:start] + zeros + whole[start + 4096 :]


def edited(whole: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(whole)), draw.randrange(1, 200)
    return whole[:start] + draw.choice((b"", draw.randbytes(length))) + whole[start + length :]


def longer(whole: bytes, draw: random.Random) -> bytes:
    return whole + draw.randbytes(draw.randrange(1, 200))


def with_another_weight(whole: bytes, ending: str) -> bytes:
    """With a weight changed by other software, which knows the container but not the checksums."""
    if ending == ".safetensors":
        weights = safetensors.torch.load(whole)
        weights["head.bias"] += 1
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        return safetensors.torch.save(weights, header["__metadata__"])
    content = torch.load(io.BytesIO(whole), weights_only=True)
    content["weights"]["head.bias"] += 1
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of one checkpoint in both formats."""
    folder = tmp_path_factory.mktemp("whole")
    for ending in ENDINGS:
        model = small_net()
        checkpoint.save(checkpoint.capture(model, card_of(model)), folder / f"a{ending}")
    return {ending: (folder / f"a{ending}").read_bytes() for ending in ENDINGS}


def assert_refused(path, damaged):
    """By both doors, in one line that names the file."""
    path.write_bytes(damaged)
    for door in (checkpoint.load, checkpoint.load_any):
        with pytest.raises(InputError) as error:
            door(path)
        assert str(path) in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("ending", ENDINGS)
def test_damage_is_refused(whole, tmp_path, ending, count):
    """Flipped bits anywhere, cut and zeroed and edited files: all are refused by name, none is loaded."""
    draw, path = random.Random(count), tmp_path / f"a{ending}"
    ways = (flipped, flipped, flipped, cut, page_zeroed, edited, longer)
    for number in range(count):
        assert_refused(path, ways[number % len(ways)](whole[ending], draw))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_weight_changed_by_other_software_is_refused(whole, tmp_path, ending):
    assert_refused(tmp_path / f"a{ending}", with_another_weight(whole[ending], ending))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_flipped_bit_is_refused_wherever_it_is(saved, tmp_path, ending):
    """Every third byte of a small file in turn, also those that carry nothing."""
    path = tmp_path / f"a{ending}"
    checkpoint.save(
        Checkpoint({"head.bias": saved.weights["head.bias"]}, dataclasses.replace(saved.card, metrics={"ä": 1e-5})),
        path,
    )
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="a" + ending):
            checkpoint.load_any(path)


def test_the_check_sum_is_that_of_all_other_bytes(whole):
    """As anybody can see: head -c -64 a.pt | sha256sum."""
    archive = zipfile.ZipFile(io.BytesIO(whole[".pt"]))
    assert archive.testzip() is None
    assert archive.comment.decode() == "repan sha256 " + hashlib.sha256(whole[".pt"][:-64]).hexdigest()
    place = whole[".safetensors"].index(b"repan sha256 ") + 13
    rest = whole[".safetensors"][:place] + whole[".safetensors"][place + 64 :]
    assert whole[".safetensors"][place : place + 64].decode() == hashlib.sha256(rest).hexdigest()


@pytest.mark.parametrize("ending", ENDINGS)
def test_equal_content_gives_equal_bytes_that_other_software_reads(whole, saved, tmp_path, ending):
    path = tmp_path / f"b{ending}"
    model = small_net()
    checkpoint.save(checkpoint.capture(model, card_of(model)), path)
    assert path.read_bytes() == whole[ending]
    read = {".pt": lambda: torch.load(path, weights_only=True)["weights"]}
    weights = read.get(ending, lambda: safetensors.torch.load_file(path))()
    assert weights.keys() == saved.weights.keys()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_without_its_check_sum_is_refused(whole, tmp_path, ending):
    """Written again by another program, with the same content: nothing shows any more what became of it on the way."""
    if ending == ".pt":
        buffer = io.BytesIO()
        torch.save(torch.load(io.BytesIO(whole[ending]), weights_only=True), buffer)
        again = buffer.getvalue()
    else:
        again = whole[ending].replace(b"repan sha256 ", b"repan-sha256 ")
    path = tmp_path / f"a{ending}"
    path.write_bytes(again)
    with pytest.raises(InputError, match="checksum of the file is missing"):
        checkpoint.load(path)


@pytest.mark.parametrize("part", ["version", "digest", "meta", "weights"])
def test_a_missing_part_is_damage(saved, tmp_path, part):
    path = tmp_path / "a.pt"
    checkpoint.save(saved, path)
    content = torch.load(path, weights_only=True)
    for broken in ({name: value for name, value in content.items() if name != part}, {**content, part: None}):
        torch.save(broken, path)
        with pytest.raises(InputError, match="parts of it are missing"):
            checkpoint.load(path)


def test_a_weight_changed_behind_the_digest_is_noticed(saved, tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(saved, path)
    content = torch.load(path, weights_only=True)
    content["weights"]["head.bias"][0] += 1
    torch.save(content, path)
    with pytest.raises(InputError, match="does not match its digest"):
        checkpoint.load(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch marker",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "repan", "version": 1, "digest": "", "meta": Evil(), "weights": {}}, "evil.pt")
    (tmp_path / "evil.pickle").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil.pickle", "evil.safetensors"):
        with pytest.raises(InputError, match=name):
            checkpoint.load(name)
    assert not (tmp_path / "marker").exists()


def test_files_of_others_are_named(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other.pt was not written by repan"):
        checkpoint.load(tmp_path / "other.pt")
    torch.save({"format": "repan", "version": 99, "digest": "", "meta": {}, "weights": {}}, tmp_path / "newer.pt")
    with pytest.raises(InputError, match="newer repan"):
        checkpoint.load(tmp_path / "newer.pt")
    with pytest.raises(InputError, match="no checkpoint .*missing.pt"):
        checkpoint.load(tmp_path / "missing.pt")
    with pytest.raises(InputError, match="is a folder"):
        checkpoint.load(tmp_path)


def test_weights_that_do_not_fit_are_named(saved):
    with pytest.raises(InputError, match=r"a.pt does not fit the network: it lacks .*branches"):
        checkpoint.load_weights(small_net("acb"), saved.weights, "a.pt")
    with pytest.raises(InputError, match=r"its 'head.weight' has the shape \(10, 160\), not \(3, 160\)"):
        other = dataclasses.replace(saved.card, classes=("a", "b", "c"))
        models.rebuild(Checkpoint(saved.weights, other), "a.pt")
    fused = checkpoint.capture(reparameterize(small_net()), saved.card)
    with pytest.raises(InputError, match="does not fit"):
        models.rebuild(fused, "a.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutOfSpaceError, match="no space left to write"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------- the card


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("note", 1, "the unknown key 'note'"),
        ("structure", {"changes": [], "left": {}, "native": {"pretrained": True}}, "a 'structure' of the wrong kind"),
        ("structure", {"changes": [["run", "a", None, None, None]], "left": {}, "native": {}}, "a 'structure' of"),
        ("structure", {"changes": [], "left": {}, "native": {}, "more": 1}, "a 'structure' of the wrong kind"),
        ("classes", "abc", "a 'classes' of the wrong kind"),
        ("classes", [1, 2], "a 'classes' of the wrong kind"),
        ("in_chans", 10**9, "a 'in_chans' of the wrong kind"),
        ("in_chans", True, "a 'in_chans' of the wrong kind"),
        ("in_chans", 4, "a mean or std for another number of channels"),
        ("image_size", 0, "a 'image_size' of the wrong kind"),
        ("mean", [float("nan")] * 3, "a 'mean' of the wrong kind"),
        ("std", [0.0] * 3, "a 'std' of the wrong kind"),
        ("form", "half", "a 'form' of the wrong kind"),
        ("config", [], "a 'config' of the wrong kind"),
        ("progress", {"phase": 0}, "only a part of what a resume needs"),
    ],
)
def test_a_description_is_a_closed_schema(saved, tmp_path, key, value, says):
    meta = {**saved.card.as_meta(), key: value}
    content = {"format": "repan", "version": 1, "digest": digest_of(saved.weights, meta), "meta": meta}
    torch.save({**content, "weights": saved.weights, "state": {}}, tmp_path / "plain.pt")
    sealed_as_ours(tmp_path / "plain.pt")
    with pytest.raises(InputError, match=f"plain.pt describes its network with {says}"):
        checkpoint.load(tmp_path / "plain.pt")


def sealed_as_ours(path):
    """Give an archive the checksum that repan writes, as somebody may who means harm."""
    buffer = io.BytesIO(path.read_bytes())
    buffer.seek(-2, io.SEEK_END)
    buffer.write((len(CHECKSUM) + DIGITS).to_bytes(2, "little") + CHECKSUM)
    path.write_bytes(checkpoint.sealed(buffer, buffer.tell()))


def test_missing_keys_of_a_description_are_named(saved):
    meta = saved.card.as_meta()
    for key in ("model", "block", "form", "structure", "classes", "in_chans", "image_size", "mean", "std"):
        with pytest.raises(ValueError, match=f"no '{key}'"):
            ModelCard.from_meta({name: value for name, value in meta.items() if name != key})


def test_a_card_comes_back_the_same_with_everything_in_it(saved):
    card = dataclasses.replace(
        saved.card,
        crop_share=0.9,
        normalizes=True,
        precision="int8",
        fused_from="abc",
        teachers={"a.pt": "digest"},
        run=RunState({"phase": 1}, {"summary": {}, "start": {}, "epoch": {}, "seconds": 1.5}, finished=False),
    )
    assert ModelCard.from_meta(json.loads(json.dumps(card.as_meta()))) == card


@pytest.mark.parametrize(("kind", "dtype"), [("complex64", torch.complex64), ("uint8", torch.uint8)])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_that_are_no_real_numbers_are_refused(tmp_path, few_blocks, kind, dtype, ending):
    """PyTorch would drop imaginary parts, and take packed integers for the weights themselves."""
    saved = checkpoint.capture(model := small_net(), card_of(model))
    saved.weights["head.bias"] = saved.weights["head.bias"].to(dtype)
    checkpoint.save(saved, tmp_path / f"a.{ending}")
    with pytest.raises(InputError, match=f"its 'head.bias' holds {kind}, not real numbers"):
        models.load(tmp_path / f"a.{ending}")


def test_files_of_version_0_1_are_read_whatever_their_figures():
    """Their digest was taken with the names of numbers that are not finite, today's with null."""
    weights, meta = {"a": torch.ones(2)}, {"best_top1": float("-inf"), "b": [1, 0.5, None]}
    tensor = b"a torch.float32 (2,)" + torch.ones(2).numpy().tobytes()
    for best in ("-Infinity", "null"):
        text = f'{{"b": [1, 0.5, null], "best_top1": {best}}}'
        digest = hashlib.sha256(text.encode() + tensor).hexdigest()
        assert has_digest(digest, weights, meta, {})
        assert not has_digest(digest, weights, {**meta, "b": 2}, {})
        assert not has_digest(digest, {"a": torch.zeros(2)}, meta, {})
