"""Images are recognized by their names: a rename within a class, which changes their order, is never silent."""

import dataclasses
import json
import shutil
import sys
import unicodedata
from types import SimpleNamespace

import pytest
from PIL import Image
from support import StopAt, one_line, run, write_flat_folders, write_folders

from repan_cli import checkpoint
from repan_cli.checkpoint.card import ModelCard
from repan_cli.data import datasets
from repan_cli.data.batches import Loader
from repan_cli.errors import OutOfReachError
from repan_cli.session import agreement, same_data

CROPS = ("auto", "resized")  # in memory, and read one by one


def load(root, **options):
    return datasets.load("folder", root, image_size=8, **options)


def rename(root):
    (root / "ant" / "0.png").rename(root / "ant" / "99.png")


def exchange(root):
    (root / "bee" / "3.png").unlink()
    Image.new("RGB", (16, 16)).save(root / "bee" / "31.png")


def change_ending(root):
    (root / "ant" / "7.png").rename(root / "ant" / "7.PNG")


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("change", [rename, exchange, change_ending])
def test_other_names_are_seen_although_the_labels_are_the_same(tmp_path, crop, change):
    root = write_flat_folders(tmp_path / "photos")
    before = load(root, crop=crop)
    change(root)
    after = load(root, crop=crop)
    assert before.names_digests.keys() == {"train", "val", "test"}
    assert (before.labels_digest, before.split_digest) == (after.labels_digest, after.split_digest)
    assert before.names_digests != after.names_digests


@pytest.mark.parametrize("crop", CROPS)
def test_a_folder_that_has_moved_holds_the_same_images(tmp_path, crop):
    root = write_folders(tmp_path / "here", parts=("train", "val", "test"))
    before = load(root, crop=crop)
    (tmp_path / "far" / "away").mkdir(parents=True)
    there = root.rename(tmp_path / "far" / "away" / "photos")
    (there / "val").rename(there / "validation")
    assert load(there, crop=crop).names_digests == before.names_digests
    assert load(there, crop="auto").names_digests == load(there, crop="resized").names_digests


def test_accents_may_be_composed_in_two_ways(tmp_path):
    found = []
    for form in ("NFC", "NFD"):
        root = write_flat_folders(tmp_path / form, ("ant", unicodedata.normalize(form, "guêpe")))
        (root / "ant" / "0.png").rename(root / "ant" / unicodedata.normalize(form, "é.png"))
        found.append(load(root).names_digests)
    assert found[0] == found[1]


def test_images_that_were_left_out_do_not_count(tmp_path):
    root = write_flat_folders(tmp_path / "photos")
    (root / "ant" / "5.png").write_bytes(b"damaged")
    before = load(root, crop="resized", on_error="skip", test_fraction=0.2)
    (root / "ant" / "5.png").unlink()
    assert load(root, crop="resized").names_digests == before.names_digests


def test_images_without_names_have_no_digest(digits):
    assert digits.names_digests == {}


def test_ranks_compare_the_names(tmp_path, monkeypatch):
    root, found = write_flat_folders(tmp_path / "photos"), []
    monkeypatch.setattr(agreement, "joined", lambda: True)
    monkeypatch.setattr(agreement, "agree", lambda facts, mend: found.append(facts))
    for change in (lambda root: None, lambda root: None, rename):
        change(root)
        agreement.agree_on_images(load(root, crop="resized"))
    assert found[0] == found[1]
    assert next(name for name in found[0] if found[0][name] != found[2][name]) == "the training names of images"


# ---------------------------------------------------------------------------------------------- timm's sets


class Values:
    """A column of a table, as far as it is asked for here."""

    type = "struct"

    def __init__(self, values):
        self.values = values

    def to_pylist(self):
        return self.values


class Table(dict):
    """A Hugging Face data set with these images, each its bytes and its path, and labels."""

    def __init__(self, rows, labels):
        super().__init__(label=labels)
        self.features = {"label": SimpleNamespace(names=["ant", "bee"])}
        self.data = SimpleNamespace(column=lambda key: Values(rows))


def hub_set(monkeypatch, rows, labels):
    kinds = SimpleNamespace(is_struct=lambda kind: kind == "struct")
    compute = SimpleNamespace(
        struct_field=lambda column, name: Values([row[name] for row in column.values]),
        binary_length=lambda column: Values([each and len(each) for each in column.values]),
    )
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(types=kinds, compute=compute))
    reader = SimpleNamespace(label_key="label", image_key="image", dataset=Table(rows, labels))
    monkeypatch.setattr("timm.data.create_dataset", lambda name, *, split, **_: SimpleNamespace(reader=reader))
    return datasets.load("hfds/someone/insects", "data", val_fraction=0.2)


def test_a_set_of_the_hub_in_another_order_is_seen(monkeypatch):
    def rows(order, paths=True):
        return [{"bytes": b"x" * (1 + n), "path": f"/cache/{n}.png" if paths else None} for n in order]

    labels = [0, 1] * 5
    first = hub_set(monkeypatch, rows(range(10)), labels)
    assert first.names_digests.keys() == {"train", "val", "test"}
    assert hub_set(monkeypatch, rows(range(10)), labels).names_digests == first.names_digests
    other = hub_set(monkeypatch, rows([2, 1, 0, *range(3, 10)]), labels)
    assert other.labels_digest == first.labels_digest
    assert other.names_digests != first.names_digests
    nameless = [hub_set(monkeypatch, rows(order, paths=False), labels) for order in (range(10), range(9, -1, -1))]
    assert nameless[0].names_digests != nameless[1].names_digests


def test_folders_that_torchvision_reads_are_known_by_name(tmp_path, monkeypatch):
    def of(root, names):
        samples = [(f"{root}/train/{'ab'[n % 2]}/{name}", n % 2) for n, name in enumerate(names)]
        part = SimpleNamespace(samples=samples, classes=["a", "b"], targets=[label for _, label in samples])
        monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: part)
        return datasets.load("torch/image_folder", tmp_path).names_digests

    first = of("/here", "qwertyuiop")
    assert first == of("/there", "qwertyuiop") != of("/here", "qwertyuipo")


@pytest.mark.parametrize("error", [ConnectionError("no route"), TimeoutError("late"), OSError(113, "No route to host")])
def test_a_part_that_cannot_be_fetched_now_is_no_part_that_is_not_there(tmp_path, monkeypatch, error):
    """Another part would silently take the place of the test part."""

    def create(name, *, split, **_):
        if split == "test":
            raise error
        return SimpleNamespace(classes=["a", "b"], targets=[0, 1] * 5)

    monkeypatch.setattr("timm.data.create_dataset", create)
    with pytest.raises(OutOfReachError, match="the test part of hfds/someone/insects cannot be fetched .*: try again"):
        datasets.load("hfds/someone/insects", tmp_path)
    error = ValueError('Unknown split "test"')
    assert len(datasets.load("hfds/someone/insects", tmp_path).test.labels) == 10  # that of validation


def test_labels_that_are_no_numbers_are_refused_in_one_line(tmp_path, monkeypatch):
    part = SimpleNamespace(classes=["a", "b"], targets=["a", "b"])
    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: part)
    with pytest.raises(ValueError, match="has labels that are not class numbers, such as 'a': unpack it into class"):
        datasets.load("hfds/someone/insects", tmp_path)


# ---------------------------------------------------------------------------------------------- runs and files

TRAIN = ("train", "--model", "repvgg_a0_cifar", "--epochs", "2", "data.batch_size=8", "optim.lr=0.01", "--dataset")


def forget_names(folder):
    """Make a run look like one of a version that did not record names."""
    for path in folder.glob("*.pt"):
        saved = checkpoint.load(path)
        card = dataclasses.replace(saved.card, names_digests=None)
        checkpoint.save(dataclasses.replace(saved, card=card), path)


def test_a_run_goes_on_with_the_images_that_it_began_with_only(tmp_path, capsys, few_blocks):
    root = write_flat_folders(tmp_path / "photos")
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, 2)
        assert run(capsys, *TRAIN, root, "--out", tmp_path / "run", "data.image_size=8")[0] == 75
    older = shutil.copytree(tmp_path / "run", tmp_path / "older")
    forget_names(older)
    rename(root)
    refused = one_line(capsys, "train", "--resume", tmp_path / "run")
    assert "images of folder have other names than when the run began" in refused
    assert f"give them their names back, or begin another run from its weights with --init {tmp_path}/run/last.pt" in (
        refused
    )
    (root / "bee" / "extra.png").write_bytes((root / "bee" / "1.png").read_bytes())
    refused = run(capsys, "train", "--resume", older)[2].splitlines()[-1]  # is still checked as before
    assert "some were added, removed or moved; bring them back, or begin another run" in refused
    (root / "bee" / "extra.png").unlink()
    assert run(capsys, "train", "--resume", older)[0] == 0
    (root / "ant" / "99.png").rename(root / "ant" / "0.png")
    moved = root.rename(tmp_path / "moved")
    assert run(capsys, "train", "--resume", tmp_path / "run", "--data-root", moved)[0] == 0
    test_set = json.loads((tmp_path / "run" / "summary.json").read_text())["test_set"]
    assert test_set == load(moved).digest_of("test"), "by which runs are compared only if they share it"
    assert "are not those held out for" not in run(capsys, "evaluate", tmp_path / "run", "--data-root", moved)[2]
    rename(moved)
    assert "are not those held out for" in run(capsys, "evaluate", tmp_path / "run", "--data-root", moved)[2]


def test_too_few_images_for_the_ranks_are_told_before_the_first_step(tmp_path, capsys, monkeypatch, few_blocks):
    """An epoch without a step divided by zero."""
    root = write_folders(tmp_path / "photos", count=1)
    monkeypatch.setattr(Loader, "steps", lambda loader, batch_size: 0)  # as with 2 images for 2 ranks
    words = (*TRAIN, root, "data.val_fraction=0", "--out", tmp_path / "run")
    assert "2 training images do not give each of 1 processes two" in one_line(capsys, *words)
    assert not (tmp_path / "run").exists()


def card_of(data):
    shape = {"model": "net", "block": None, "form": "plain", "structure": None, "classes": data.classes}
    return ModelCard(
        **shape, in_chans=3, image_size=8, mean=data.mean, std=data.std, split_digest=data.split_digest,
        names_digests=data.names_digests,
    )  # fmt: skip


def test_only_training_images_that_moved_matter_to_what_was_held_out(tmp_path):
    root = write_folders(tmp_path, parts=("train", "test"))
    card = card_of(load(root))
    assert not same_data.is_split_otherwise(card, load(root))
    (root / "test" / "ant" / "0.png").rename(root / "test" / "ant" / "9.png")
    assert not same_data.is_split_otherwise(card, load(root))
    rename(root / "train")
    assert same_data.is_split_otherwise(card, load(root))
    assert not same_data.is_split_otherwise(dataclasses.replace(card, names_digests=None), load(root))
    own = write_folders(tmp_path / "own", parts=("train", "val", "test"))
    card = card_of(load(own))
    rename(own / "train")
    assert not same_data.is_split_otherwise(card, load(own)), "nothing was drawn"
