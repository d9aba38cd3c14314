"""Folders for timm and the Hub: timm alone opens what was merged, on its own images; repan reads and uploads them."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from hub import stub_hub
from PIL import Image
from support import StopAt, card_of, one_line, randomize_norms, relative, run

from repan_cli import checkpoint, export, models
from repan_cli.data import preprocess
from repan_cli.errors import InputError
from repan_cli.export import timm_folder
from repan_cli.models import expand
from repan_cli.session import hub_folder
from repan_cli.session.artifact import Artifact, open_artifact
from repan_cli.system.files import write_folder


def saved(path, name="timm:test_efficientnet", family="acb", *, channels=3, **more):
    """A checkpoint of an expanded network, as training would write it, and the network."""
    torch.manual_seed(0)
    model = models.create(name, num_classes=10, in_chans=channels)
    expand(model, family, images=torch.randn(2, channels, 32, 32), attach="one")
    randomize_norms(model).eval()
    card = card_of(model, name, in_chans=channels, mean=(0.5, 0.4, 0.3)[:channels])
    card = checkpoint.ModelCard.from_meta({**card.as_meta(), "std": [0.2, 0.3, 0.25][:channels], **more})
    checkpoint.save(checkpoint.capture(model, card), path)
    return model


@pytest.fixture
def folder(made_once, capsys):
    """The folder that fuse writes of a small network, and where its checkpoint is."""

    def make(place):
        saved(place / "net.pt", metrics={"val_top1": 61.25})
        code, _, err = run(capsys, "fuse", place / "net.pt", "-f", "timm", "-o", place / "plain")
        assert code == 0, err

    return made_once("timm_folder", make) / "plain_timm"


def photo(path, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    image.save(path)
    return image


def test_timm_alone_computes_the_same(folder, tmp_path):
    """Its own transform and its own network, from the folder alone."""
    image = photo(tmp_path / "photo.png", (32, 32))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs), is_training=False)
    ours = open_artifact(str(folder.parent / "net.pt"))
    with torch.no_grad():
        wanted = ours.network(ours.preparation.file(tmp_path / "photo.png")[None])
        assert relative(theirs(transform(image)[None]), wanted) < 2e-6
    assert theirs.pretrained_cfg["label_names"] == [str(number) for number in range(10)]


@pytest.mark.parametrize(
    ("side", "size"), [(32, (32, 32)), (96, (150, 120)), (96, (97, 260)), (100, (300, 200)), (224, (224, 224))]
)
def test_timm_sees_what_repan_sees(tmp_path, side, size):
    image = photo(tmp_path / "photo.png", size)
    card = card_of(torch.nn.Identity(), "timm:test_efficientnet", block=None, image_size=side)
    cfg = timm_folder.config_of(card)["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg), is_training=False)
    wanted = Artifact("", torch.nn.Identity(), card).preparation.file(tmp_path / "photo.png")
    found = transform(image)
    assert found.shape == wanted.shape == (3, side, side)
    assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("name", ["repvgg_a0", pytest.param("mobileone_s0", marks=pytest.mark.soak)])
def test_timms_own_blocks_keep_silent_branches(capsys, small_timm, tmp_path, name):
    own_blocks_keep_silent_branches(capsys, tmp_path, name)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_own_blocks_of_whole_networks_keep_silent_branches(capsys, tmp_path, name):
    own_blocks_keep_silent_branches(capsys, tmp_path, name)


def own_blocks_keep_silent_branches(capsys, tmp_path, name):
    model = saved(tmp_path / "net.pt", f"timm:{name}", None)
    assert run(capsys, "fuse", tmp_path / "net.pt", "-f", "timm", "-o", tmp_path / "plain")[0] == 0
    theirs = timm.create_model(f"local-dir:{tmp_path / 'plain_timm'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(theirs(images), model(images)) < 5e-6
        assert relative(timm.utils.reparameterize_model(theirs)(images), model(images)) < 5e-6
    assert "reparameterize_model" in (tmp_path / "plain_timm" / "README.md").read_text()


def test_grey_images(tmp_path):
    model = saved(tmp_path / "net.pt", channels=1)
    card = checkpoint.load(tmp_path / "net.pt").card
    fused, _ = export.fuse(model, torch.randn(2, 1, 32, 32))
    write_folder(tmp_path / "x", timm_folder.files(timm_folder.network_of_timm(fused, card, "net.pt"), ""))
    images = torch.randn(2, 1, 32, 32).double()  # float32 would add its own rounding to that of the stored weights
    with torch.no_grad():
        assert relative(timm_folder.open_by_timm(tmp_path / "x").double()(images), model.double()(images)) < 2e-6


def test_repan_reads_the_folder(capsys, folder, tmp_path):
    wanted = open_artifact(str(folder.parent / "net.pt"))
    images = torch.randn(2, 3, 32, 32)
    ours = open_artifact(str(folder))
    assert relative(ours.network(images), wanted.network(images)) < 1e-5
    assert ours.card.classes == wanted.card.classes
    code, out, err = run(capsys, "info", folder, "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == "timm:test_efficientnet"

    again = shutil.copytree(folder, tmp_path / "again")  # as another program saves it: without our description
    safetensors.torch.save_file(safetensors.torch.load_file(folder / "model.safetensors"), again / "model.safetensors")
    theirs = open_artifact(str(again))
    assert relative(theirs.network(images), wanted.network(images)) < 1e-5
    assert theirs.card.classes == wanted.card.classes
    assert theirs.preparation.size == 32
    assert theirs.preparation.mean == wanted.preparation.mean


def test_the_card_lists_the_measured_figures(folder):
    front, text = (folder / "README.md").read_text().split("---\n")[1:3]
    assert yaml.safe_load(front)["library_name"] == "timm"
    assert "| top-1 accuracy on the validation part, % | 61.25 |" in text
    assert "repan fuse net.pt --format timm" in text
    assert str(folder.parent) not in text
    assert "parameters, merged" in text


def test_the_card_has_the_command_of_the_run(small_run, few_blocks):
    from repan_cli.export import model_card

    card = checkpoint.load(small_run.folder / "best.pt").card
    text = model_card.readme(card, str(small_run.folder / "best.pt"), proof={})
    command = next(line for line in text.splitlines() if line.startswith("repan cycle "))
    assert "model.name=repvgg_a0_cifar data.name=digits" in command
    assert "cycle.schedule=restart" in command
    assert "data.batch_size=128" in command
    assert "run.out" not in command
    top1 = small_run.summary["test"]["top1"]
    assert f"| top-1 accuracy on the test part, % | {top1:.4g} |" in text


def test_the_same_network_gives_the_same_folder(capsys, folder, tmp_path):
    assert run(capsys, "fuse", folder.parent / "net.pt", "-f", "timm", "-o", tmp_path / "plain")[0] == 0
    for file in folder.iterdir():
        assert (tmp_path / "plain_timm" / file.name).read_bytes() == file.read_bytes()
    assert "already exists" in one_line(
        capsys, "fuse", folder.parent / "net.pt", "-f", "timm", "-o", tmp_path / "plain"
    )
    (tmp_path / "plain_timm" / "notes.txt").write_text("mine")
    words = ("fuse", folder.parent / "net.pt", "-f", "timm", "-o", tmp_path / "plain", "--overwrite")
    assert run(capsys, *words)[0] == 0
    assert (tmp_path / "plain_timm" / "notes.txt").read_text() == "mine"


def test_networks_that_timm_cannot_build_are_refused(capsys, small_run, few_blocks, tmp_path):
    line = one_line(capsys, "fuse", small_run.folder / "best.pt", "-f", "timm", "-o", tmp_path / "x")
    assert "repvgg_a0_cifar is of repan's own; use --format safetensors, onnx or pt2" in line
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    from repan_cli.system import files

    def broken(path, content):
        raise InputError("no")

    monkeypatch.setattr(files, "write_bytes", broken)
    with pytest.raises(InputError, match="no"):
        files.write_folder(tmp_path / "x", {"a": b"1"})
    assert not list(tmp_path.iterdir())


def test_timms_rounding_gives_the_same_side():
    for share in (0.875, 0.95, 0.9, 1.0):
        for side in range(65, 500, 7):
            card = card_of(torch.nn.Identity(), block=None, image_size=side, crop_share=share)
            theirs = timm.data.create_transform(side, crop_pct=timm_folder.crop_share(card)).transforms[0]
            assert theirs.size == preprocess.MiddleCrop(share).transform(side).transforms[0].size, (side, share)


# ---------------------------------------------------------------------------------------------- the Hub


def test_push_and_fetch(capsys, folder, tmp_path, monkeypatch):
    with stub_hub(monkeypatch, tmp_path, token="secret") as hub:
        monkeypatch.setenv("HF_TOKEN", "secret")
        code, out, err = run(capsys, "push", folder, "someone/net", "--private", "--json")
        assert code == 0, err
        assert json.loads(out)["address"] == f"{hub.address}/someone/net"
        assert (hub.made.get("private"), hub.made.get("visibility")) in ((True, None), (None, "private"))
        assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
        code, out, err = run(capsys, "info", "hf-hub:someone/net", "--json")
        assert code == 0, err
        assert json.loads(out)["digest"] == checkpoint.load(folder / "model.safetensors").digest()
        theirs = timm.create_model("hf-hub:someone/net", pretrained=True).eval()
        line = one_line(capsys, "info", "hf-hub:someone/other@branch::key")
        assert "holds no config.json" in line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        again = open_artifact("hf-hub:someone/net").network(images)  # from the cache, as there is no Hub any more
        assert relative(theirs(images), again) < 1e-6
    assert hub_folder.file_of("hf-hub:someone/net").endswith("model.safetensors")
    assert "cannot fetch hf-hub:someone/other: the Hub cannot" in one_line(capsys, "info", "hf-hub:someone/other")


@pytest.mark.soak
@pytest.mark.parametrize("where", ["hf-hub:someone/net", "local-dir:"])
def test_runs_begin_from_the_hub_and_learn_from_it(capsys, tmp_path, monkeypatch, where):
    """`--init` and `--teacher` in every command that trains; stopped, they go on without the Hub, from the cache."""
    saved(tmp_path / "net.pt", channels=1)
    assert run(capsys, "fuse", tmp_path / "net.pt", "-f", "timm", "-o", tmp_path / "net")[0] == 0
    folder = tmp_path / "net_timm"
    source = f"{where}{folder}" if where.endswith(":") else where
    quick = ["--dataset", "digits", "data.batch_size=256", "data.workers=0", "run.precision=fp32", "--epochs", "2"]
    small = ["--model", "mobilenetv1_cifar"]
    runs = {
        "train": ["--init", source],
        "distill": [*small, "--teacher", source, "teacher.cache=none"],
        "cycle": ["--init", source, "--block", "repvgg", "--teacher", source, "--cycles", "1"],
    }
    with stub_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.files |= {file.name: file.read_bytes() for file in folder.iterdir()}
        for name, words in runs.items():
            with pytest.MonkeyPatch.context() as patch:
                StopAt(patch, 8)
                code, _, err = run(capsys, name, *words, *quick, "--out", tmp_path / name)
            assert code == 75, (name, err)
            assert "continue with" in err
            if name != "train":
                assert "timm:test_efficientnet on 32x32 images" in err
        code, _, err = run(capsys, "cycle", *runs["cycle"][:2], *runs["cycle"][4:], *quick)
        assert code == 2
        assert "is a plain network: give --block NAME" in err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in runs:
        code, _, err = run(capsys, name, "--resume", tmp_path / name)
        assert code == 0, (name, err)


def test_folders_that_push_refuses(capsys, folder, tmp_path, monkeypatch):
    with stub_hub(monkeypatch, tmp_path / "cache", token="secret") as hub:
        assert "there is no token" in one_line(capsys, "push", folder, "someone/net")
        assert "'net' is not a Hub name" in one_line(capsys, "push", folder, "net")
        assert "was not written for the Hub" in one_line(capsys, "push", folder.parent, "someone/net")
        monkeypatch.setenv("HF_TOKEN", "wrong")
        line = one_line(capsys, "push", folder, "someone/net")
        assert "cannot upload to someone/net" in line
        assert "401" in line
        assert not hub.files
        broken = shutil.copytree(folder, tmp_path / "broken")
        content = bytearray((broken / "model.safetensors").read_bytes())
        content[-5] ^= 1
        (broken / "model.safetensors").write_bytes(content)
        assert "is damaged" in one_line(capsys, "push", broken, "someone/net")
        assert "holds no config.json" in one_line(capsys, "evaluate", "hf-hub:someone/empty")
        hub.files["config.json"] = (folder / "config.json").read_bytes()
        assert "holds none of model.safetensors" in one_line(capsys, "evaluate", "hf-hub:someone/empty")
