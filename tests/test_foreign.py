"""Weights as trainers save them: wrapped, averaged, beside other things, or not weights at all."""

import json
import os
import zipfile

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from support import one_line, randomize_norms, relative, run
from torch import nn

from repan_cli import checkpoint, models
from repan_cli.errors import InputError
from repan_cli.session.artifact import open_artifact

NAME = "timm:test_resnet"


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(1)
    return randomize_norms(timm.create_model("test_resnet", num_classes=10)).eval()


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def doubled(weights):
    return {name: value * 2 if value.is_floating_point() else value for name, value in weights.items()}


def wrong(weights):
    return {name: value + 1 for name, value in weights.items()}


FILES = {
    "lightning": lambda w: {"state_dict": under("model.", w)},
    "criterion": lambda w: {"state_dict": {**under("model.", w), "criterion.weight": torch.ones(10)}},
    "criterion-bare": lambda w: {**w, "criterion.weight": torch.ones(10), "val_acc.tp": torch.zeros(10)},
    "two-levels": lambda w: under("model.backbone.", w),
    "compiled": lambda w: {"state_dict": under("net._orig_mod.", w)},
    "learner": lambda w: {"epoch": 1, "params": under("learner.model.", w)},
    "swa": lambda w: {"n_averaged": torch.tensor(3), **under("module.", w)},
    "distilled": lambda w: {**under("student.", w), **under("teacher.", wrong(w))},
    "ema-key": lambda w: {"state_dict": wrong(w), "state_dict_ema": w},
    "model-ema": lambda w: {"model": wrong(w), "model_ema": under("module.", w)},
    "ema-prefix": lambda w: {"state_dict": {**under("model.", wrong(w)), **under("ema_model.module.", w)}},
    "optimizer": lambda w: {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "model": w},
    # made up after the rest
    "byol": lambda w: {**under("online.encoder.net.", w), "predictor.weight": torch.ones(9, 9)},
    "deepspeed": lambda w: {"module": under("module.", w), "buffer_names": [], "lr_scheduler": {"x": torch.ones(1)}},
    "shadow": lambda w: {"model": wrong(w), "ema": {"shadow": w, "decay": 0.9}},
    "five-levels": lambda w: {"a": {"b": under("trainer.module.task.encoder.trunk.", w)}},
    "head-beside": lambda w: {
        **under("backbone.", {n: v for n, v in w.items() if not n.startswith("fc.")}),
        **under("head.", {n: v for n, v in w.items() if n.startswith("fc.")}),
    },
    "averaged-optim": lambda w: {"averaged_model": w, "optim": doubled(w), "model": wrong(w)},
}


@pytest.mark.parametrize("wrapping", FILES)
def test_the_network_is_found_wherever_a_trainer_put_it(theirs, tmp_path, wrapping):
    """Also its classes and channels, which the shapes tell."""
    torch.save(FILES[wrapping](theirs.state_dict()), tmp_path / "theirs.ckpt")
    found = open_artifact(str(tmp_path / "theirs.ckpt"), NAME)
    assert len(found.card.classes) == 10
    x = torch.randn(2, 3, 64, 64)
    assert relative(found.network(x), theirs(x)) < 1e-6


def test_what_is_left_out_and_what_was_chosen_is_reported(capsys, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = theirs.state_dict()
    torch.save(FILES["criterion-bare"](weights), "c.pth")
    assert "skipped 2 tensors of c.pth that are not part of the network: criterion, val_acc" in told(capsys, "c.pth")
    torch.save(FILES["ema-key"](weights), "e.pth")
    assert "using 'state_dict_ema', the average, not 'state_dict'" in told(capsys, "e.pth")
    assert "several" not in told(capsys, "e.pth::state_dict")
    torch.save(FILES["distilled"](weights), "d.pth")
    assert "using 'student', not 'teacher'; d.pth::teacher selects another" in told(capsys, "d.pth")


def told(capsys, source):
    code, _, err = run(capsys, "info", source, "--model", NAME)
    assert code == 0, err
    return err


def test_a_key_chooses_among_several(theirs, tmp_path, capsys):
    weights, x = theirs.state_dict(), torch.randn(2, 3, 64, 64)
    path = tmp_path / "several.pth"
    torch.save({"net": {**under("student.", weights), **under("teacher.", doubled(weights))}, "net_ema": weights}, path)
    for key, same in (("net.student", True), ("net.teacher", False), ("student", True), ("net_ema", True)):
        found = open_artifact(f"{path}::{key}", NAME).network(x)
        assert (relative(found, theirs(x)) < 1e-6) == same
    assert "did you mean net_ema?" in one_line(capsys, "info", f"{path}::net_emma", "--model", NAME)


def test_weights_of_another_depth_are_not_mistaken_for_other_entries(theirs, tmp_path):
    torch.save(under("model.", timm.create_model("resnet14t").state_dict()), tmp_path / "deeper.pth")
    with pytest.raises(InputError, match=r"it has, unlike the network, .*layer1\.0\.bn3"):
        open_artifact(str(tmp_path / "deeper.pth"), NAME)


# ---------------------------------------------------------------------------------------------- older and other names


def test_names_with_the_tag_of_their_weights():
    assert models.resolve("timm:resnet18.a1_in1k", 224) == "timm:resnet18.a1_in1k"
    assert models.resolve("resnet18.a1_in1k", 224) == "timm:resnet18.a1_in1k"
    assert models.resolve("hf-hub:timm/resnet18.a1_in1k", 224) == "timm:resnet18.a1_in1k"
    assert models.resolve("timm:hf_hub:timm/fastvit_t8.apple_in1k", 224) == "timm:fastvit_t8.apple_in1k"
    with pytest.raises(InputError, match=r"no weights 'a9_in1k' of resnet18: it has .*a1_in1k"):
        models.resolve("timm:resnet18.a9_in1k", 224)
    with pytest.raises(InputError, match=r"give it in place of a file"):
        models.resolve("hf-hub:someone/theirs", 224)


@pytest.mark.parametrize("name", ["timm:densenet121", "torchvision:densenet121"])
def test_densenets_of_old_have_dots_in_their_names(name, tmp_path):
    torch.manual_seed(0)
    model = models.create(name, num_classes=10, in_chans=3).eval()
    old = {
        name.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2."): value
        for name, value in model.state_dict().items()
    }
    torch.save(old, tmp_path / "old.pth")
    found = open_artifact(str(tmp_path / "old.pth"), name)
    x = torch.randn(1, 3, 64, 64)
    assert relative(found.network(x), model(x)) < 1e-6


def test_auxiliary_heads_are_left_out(tmp_path, capsys):
    torch.manual_seed(0)
    model = torchvision.models.googlenet(weights=None, num_classes=10, init_weights=False).eval()
    torch.save(model.state_dict(), tmp_path / "aux.pth")
    found = open_artifact(str(tmp_path / "aux.pth"), "torchvision:googlenet")
    x = torch.randn(1, 3, 64, 64)
    assert relative(found.network(x), model(x)) < 1e-6


# ---------------------------------------------------------------------------------------------- no weights at all


def torchscript(path):
    torch.jit.trace(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8)).save(path)


def half(path):
    torch.save({"a.weight": torch.zeros(9999)}, path)
    path.write_bytes(path.read_bytes()[:9999])


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")


OTHERS = {
    "TorchScript program": torchscript,
    "object of torch.nn.modules.linear.Linear": lambda path: torch.save(nn.Linear(2, 2), path),
    "Git LFS pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"),
    "web page": lambda path: path.write_text("\n<!DOCTYPE html><html></html>"),
    "half a download": half,
    "JSON text": lambda path: path.write_text(json.dumps({"message": "Not Found"})),
    "is empty": lambda path: path.write_bytes(b""),
    "not one of torch.save's": archive,
    "HDF5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 99),
    "compressed archive": lambda path: path.write_bytes(b"\x1f\x8b\x08" + b"\0" * 99),
    "long history of losses": lambda path: torch.save({"losses": list(map(float, range(300_000)))}, path),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHERS)
def test_files_without_weights_are_called_by_name(kind, tmp_path):
    OTHERS[kind](tmp_path / "theirs.pt")
    with pytest.raises(InputError, match=kind):
        checkpoint.load_any(tmp_path / "theirs.pt")


@pytest.mark.parametrize("kind", ["Git LFS pointer", "web page", "is empty", "JSON text"])
def test_files_that_are_not_safetensors_are_named(kind, tmp_path):
    OTHERS[kind](tmp_path / "theirs.safetensors")
    with pytest.raises(InputError, match=kind):
        checkpoint.load_any(tmp_path / "theirs.safetensors")


def test_safetensors_of_fastvit_with_ten_classes(tmp_path):
    torch.manual_seed(0)
    model = randomize_norms(timm.create_model("fastvit_t8", num_classes=10)).eval()
    safetensors.torch.save_file(under("model.", model.state_dict()), tmp_path / "f.safetensors")
    assert len(open_artifact(str(tmp_path / "f.safetensors"), "timm:fastvit_t8").card.classes) == 10


class Call:
    """An object whose pickle calls a function when it is opened."""

    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("content", [Call(), {"a": Call()}, [nn.Linear(2, 2), Call()]], ids=["bare", "in", "behind"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_is_never_advised_to_be_opened(tmp_path, content, zipped):
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"refused, no code is run; save its state_dict\(\) alone") as error:
        checkpoint.load_any(tmp_path / "evil.pt")
    assert "weights_only" not in str(error.value)
    if zipped or not isinstance(content, list):  # of torch's old format only the first refused name is known
        assert f"would run {os.system.__module__}.system when it is opened" in str(error.value)
