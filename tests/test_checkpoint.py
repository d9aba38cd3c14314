"""Checkpoints: what is written comes back, damage and foreign content are refused, nothing is left half-written."""

import dataclasses
import os
import pickle
import random

import pytest
import torch
from conftest import small_net

import repan_cli
from repan_cli import checkpoint, models, runs
from repan_cli.blocks import reparameterize, set_attach_rate
from repan_cli.checkpoint import Checkpoint
from repan_cli.errors import InputError

META = {
    "model": "repvgg_a0_cifar",
    "block": "repvgg",
    "form": "multi-branch",
    "classes": [str(n) for n in range(10)],
    "in_chans": 3,
    "image_size": 32,
    "structure": {"changes": [], "left": {}, "native": {"block": "repvgg"}},
    "note": {"nested": [1, 2.5, None, True, "ä"]},
}
ENDINGS = (".pt", ".safetensors")


@pytest.fixture
def saved() -> Checkpoint:
    model = small_net()
    set_attach_rate(model, 0.25)
    return checkpoint.capture(model, META)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_checkpoint_comes_back_the_same(saved, tmp_path, ending):
    path = tmp_path / f"a{ending}"
    checkpoint.save(saved, path)
    back = checkpoint.load(path)
    assert back.meta == META
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
    checkpoint.save(checkpoint.capture(model, {**META, "form": form}), path)
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
    digests.add(dataclasses.replace(saved, meta={**META, "image_size": 31}).digest())
    assert len(digests) == 6


def test_the_digest_does_not_depend_on_memory_layout(saved):
    strided = {name: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for name, v in saved.weights.items()}
    assert dataclasses.replace(saved, weights=strided).digest() == saved.digest()


@pytest.mark.parametrize("ending", ENDINGS)
def test_damage_is_refused(saved, tmp_path, ending):
    """Flipped bits anywhere, cut files, zeroed pages: refused by name, never loaded wrong."""
    path = tmp_path / f"a{ending}"
    checkpoint.save(saved, path)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = harmless = 0
    for _ in range(40):
        damaged = bytearray(whole)
        position = draw.randrange(len(whole))
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            back = checkpoint.load(path)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # a bit that carries nothing, such as a time stamp in the archive
            assert back.digest() == saved.digest()
            assert all(torch.equal(back.weights[name], saved.weights[name]) for name in saved.weights)
            harmless += 1
    assert refused >= 36
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="a" + ending):
            checkpoint.load(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(4096) + whole[middle + 4096 :])
    with pytest.raises(InputError):
        checkpoint.load(path)


def test_a_flipped_bit_anywhere_is_refused_or_carries_nothing(saved, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(Checkpoint({"head.bias": saved.weights["head.bias"]}, {"image_size": 8}), path)
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 1, 5):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                back = checkpoint.load(path)
            except InputError:
                continue
            assert back.meta == {"image_size": 8}, position
            assert torch.equal(back.weights["head.bias"], saved.weights["head.bias"])


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
        checkpoint.load_weights(small_net("acb"), saved, "a.pt")
    with pytest.raises(InputError, match=r"its 'head.weight' has the shape \(10, 160\), not \(3, 160\)"):
        wider = {**META, "classes": ["a", "b", "c"]}
        models.rebuild(Checkpoint(saved.weights, wider), "a.pt")
    fused = checkpoint.capture(reparameterize(small_net()), META)
    with pytest.raises(InputError, match="does not fit"):
        models.rebuild(fused, "a.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        runs.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
