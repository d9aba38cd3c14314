"""User-defined block families are checked when they are registered, and given again for files that need them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import card_of, one_line, run, small_net
from torch import nn

import repan_cli
from repan_cli import checkpoint
from repan_cli.blocks import FAMILIES, ConvBN, Geometry, is_own, make_block, use_block
from repan_cli.blocks.block_check import USUAL, _geometries, check
from repan_cli.blocks.branches import conv_bn
from repan_cli.errors import InputError
from repan_cli.models import Expansion

pytestmark = pytest.mark.usefixtures("few_blocks")

BLOCK = """from repan_cli.blocks.branches import conv_bn


def build(geometry):
    return [conv_bn(geometry), conv_bn(geometry, (1, 1))]


def other(geometry):
    return [conv_bn(geometry)]


def wrong(geometry):
    branch = conv_bn(geometry, (1, 1))
    branch.offset = (0, 0)
    return [branch]


raise_here = None
"""
FEW_IMAGES = "data.per_class=40"
QUICK = ("--epochs", 1, FEW_IMAGES, "data.batch_size=64", "run.precision=fp32", "optim.warmup_epochs=0")
NET = ("--model", "repvgg_a0_cifar", "--dataset", "digits")


@pytest.fixture(autouse=True)
def _families_of_a_test(monkeypatch):
    """Forget what a test registers."""
    monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))


@pytest.fixture
def forget(monkeypatch):
    """Forget all families of a user's own, as another process would not know them."""

    def forget():
        monkeypatch.setattr(FAMILIES, "_entries", {k: v for k, v in FAMILIES._entries.items() if not is_own(k)})

    return forget


def twin(geometry):
    """k x k and 1x1."""
    return [conv_bn(geometry), conv_bn(geometry, (1, 1))]


def test_a_registered_family_works_and_leaves_the_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    repan_cli.register_block("twin", twin)
    assert torch.equal(torch.rand(3), expected)
    assert FAMILIES["twin"].text == "k x k and 1x1."
    model = small_net("plain")
    x = torch.randn(4, 3, 32, 32)
    before = model(x)
    repan_cli.expand(model, "twin", images=x)
    assert len(make_block("twin", USUAL).branches) == 2
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert repan_cli.restart(model, images=x, attach="zero-gamma").blocks
    assert repan_cli.fuse(model, x)[1].rel_error_fp64 < 1e-10
    repan_cli.register_block("twin", lambda geometry: twin(geometry)[:1])  # as a cell of a notebook that is run again
    assert len(make_block("twin", USUAL).branches) == 1


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].branches(USUAL)])
def test_the_families_of_the_package_pass_the_check(family):
    check(family, FAMILIES[family].branches)


def test_the_check_tries_different_geometries():
    tried = list(_geometries())
    for part in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels"):
        assert len({getattr(geometry, part) for geometry in tried}) > 1, part
    assert any(geometry.depthwise for geometry in tried)
    assert any(geometry.in_channels != geometry.out_channels for geometry in tried)


class Branch(ConvBN):
    """A right one, of which each test spoils a part."""

    def __init__(self, geometry):
        right = conv_bn(geometry, (1, 1))
        super().__init__(right.conv, right.norm, canvas=right.canvas, offset=right.offset, window=right.window)


class Doubled(Branch):
    def forward(self, x):
        return 2 * super().forward(x)


class OnlyUnstrided(Branch):
    def equivalent_kernel(self):
        weight, bias = super().equivalent_kernel()
        return (weight, bias) if self.conv.stride == (1, 1) else (2 * weight, bias)


class Single(Branch):
    def equivalent_kernel(self):
        return tuple(part.float() for part in super().equivalent_kernel())


class Small(Branch):
    def equivalent_kernel(self):
        weight, bias = super().equivalent_kernel()
        return weight[..., :1, :1], bias


class DrawsElsewhere(Branch):
    def reset(self, init, generator=None):
        super().reset(init, None)


class StaysLoud(Branch):
    def zero_init(self):
        nn.init.zeros_(self.norm.weight)


class Loses(Branch):
    def forward(self, x):
        return super().forward(x)[..., 1:]


class Fails(Branch):
    def match_scale(self, kernel, spread):
        raise RuntimeError("not done yet")


SAME = Branch(USUAL)


class Calls:
    def __init__(self):
        self.number = 0

    def __call__(self, geometry):
        self.number += 1
        return [Branch(geometry)] * (1 + self.number % 2)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda g: [Doubled(g)], r"does not merge exactly: equivalent_kernel of branch 0 \(Doubled\) is off by .*3x3"),
        (lambda g: [Branch(g), OnlyUnstrided(g)], r"branch 1 \(OnlyUnstrided\) is off by .* stride 2x2"),
        (lambda g: [Single(g)], "not in float64 on the CPU"),
        (lambda g: [Small(g)], r"gives a kernel of \(8, 8, 1, 1\) and \(8,\), not \(8, 8, 3, 3\)"),
        (lambda g: [DrawsElsewhere(g)], "uses random numbers from outside the given generator"),
        (lambda g: [StaysLoud(g)], "is not zero after zero_init"),
        (lambda g: [Loses(g)], r"returns \(2, 8, 11, 11\) from branch 0 \(Loses\), its trunk \(2, 8, 11, 12\)"),
        (lambda g: [Fails(g)], "fails: RuntimeError: not done yet"),
        (lambda g: [SAME], "returns the same branch in two calls"),
        (Calls(), "returns different weights in a second call"),
        (lambda g: conv_bn(g), "returns ConvBN, not a list of branches"),
        (lambda g: [nn.Conv2d(8, 8, 3)], r"a branch 0 \(Conv2d\) without equivalent_kernel and reset and zero_init"),
        (lambda g: [1], "returns int as branch 0, not a torch.nn.Module"),
        (lambda: [], "fails: TypeError"),
    ],
)
def test_what_is_wrong_with_a_family_is_reported_and_nothing_registered(build, says):
    with pytest.raises(InputError, match=says) as raised:
        repan_cli.register_block("mine", build)
    assert len(str(raised.value).splitlines()) == 1
    assert "mine" not in FAMILIES


@pytest.mark.parametrize(
    ("name", "says"), [("repvgg", "is part of repan"), ("own", "is part of repan"), ("", "needs a")]
)
def test_names_that_are_taken_are_refused(name, says):
    with pytest.raises(InputError, match=says):
        repan_cli.register_block(name, twin)
    with pytest.raises(InputError, match="needs a function"):
        repan_cli.register_block("mine", [conv_bn(USUAL)])


def test_a_family_may_refuse_a_geometry():
    def square(geometry):
        if geometry.kernel_size[0] != geometry.kernel_size[1]:
            raise ValueError("it takes square kernels only")
        return [conv_bn(geometry)]

    repan_cli.register_block("square", square)
    model = nn.Sequential(nn.Conv2d(3, 4, (3, 1)), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    repan_cli.expand(model, "square", images=torch.randn(2, 3, 9, 9))
    assert model.repan_report.left == {"0": "it takes square kernels only"}

    def never(geometry):
        raise ValueError("no")

    with pytest.raises(InputError, match="refuses the usual geometry: no"):
        repan_cli.register_block("never", never)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_block.py").write_text(BLOCK)
    return "my_block.py:build"


LOOK = {"in_chans": 1, "image_size": 8, "mean": (0.3,), "std": (0.4,), "config": {"data.name": "digits"}}


@pytest.fixture
def saved(file, forget):
    """A checkpoint of a network with such blocks, and its merged form, as another process finds them."""
    use_block(file)
    model = small_net(file, in_chans=1)
    plain = checkpoint.capture(model, card_of(model, expansion=Expansion(file, (), {}), **LOOK))
    checkpoint.save(plain, Path("best.pt"))
    merged, _ = repan_cli.fuse(model, torch.randn(2, 1, 8, 8))
    checkpoint.save(checkpoint.capture_fused(merged, plain, ()), Path("fused.pt"))
    forget()
    return file


def test_a_file_says_what_it_needs_and_imports_nothing(capsys, saved):
    needs = f"give --block {saved} (files are not imported automatically)"
    assert needs in one_line(capsys, "evaluate", "best.pt")
    assert needs in one_line(capsys, "train", "--init", "best.pt", "--dataset", "digits")
    with pytest.raises(InputError, match="files are not imported automatically"):
        repan_cli.load("best.pt")
    _, out, _ = run(capsys, "info", "best.pt", "--json")
    assert json.loads(out)["needs"] == f"--block {saved}"
    assert repan_cli.load("fused.pt")(torch.randn(1, 1, 8, 8)).shape == (1, 10), "merged, it needs no file"
    assert saved not in FAMILIES


def test_it_is_named_again_wherever_it_is_now(capsys, saved, forget):
    expected = repan_cli.load("fused.pt")(images := torch.randn(4, 1, 8, 8))
    shutil.move("my_block.py", "moved.py")
    code, out, err = run(capsys, "info", "best.pt", "--block", "moved.py:build", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"] > 0
    again = repan_cli.load("best.pt", block="moved.py:build")
    torch.testing.assert_close(again(images), expected, rtol=1e-3, atol=1e-4)
    forget()
    assert "does not fit the network" in one_line(capsys, "evaluate", "best.pt", "--block", "moved.py:other")


def test_another_file_needs_none(capsys, file):
    checkpoint.save(checkpoint.capture(model := small_net(in_chans=1), card_of(model, **LOOK)), Path("usual.pt"))
    assert "is for blocks of your own" in one_line(capsys, "evaluate", "usual.pt", "--block", file)


@pytest.mark.soak
def test_every_command_uses_it(capsys, file, forget):
    cycle = ("--baseline-epochs", 1, "--cycles", 1, "cycle.schedule=restart", "baseline.optim.warmup_epochs=0", *QUICK)
    code, _, err = run(capsys, "cycle", *NET, "--block", file, *cycle, "--out", "run")
    assert code == 0, err
    forget()
    needs = f"give --block {file} (files are not imported automatically)"
    assert needs in one_line(capsys, "cycle", "--resume", "run", "--cycles", 2)
    assert needs in one_line(capsys, "distill", *NET, FEW_IMAGES, "--teacher", "run/best.pt")
    assert run(capsys, "evaluate", "run/fused.pt")[0] == 0
    assert run(capsys, "distill", *NET, "--teacher", "run/fused.pt", "--dry-run")[0] == 0
    assert file not in FAMILIES, "merged, it needs no file"
    shutil.move("my_block.py", "moved.py")
    for words in (("evaluate", "run", "--fused"), ("fuse", "run/best.pt"), ("quantize", "run/best.pt")):
        code, _, err = run(capsys, *words, "--block", "moved.py:build", "--json")
        assert code == 0, err
        forget()
    code, _, err = run(capsys, "cycle", "--resume", "run", "--cycles", 2, "--block", "moved.py:build")
    assert code == 0, err
    assert checkpoint.load("run/last.pt").card.block == "moved.py:build"
    words = ("--init", "run/best.pt", "--dataset", "digits", "--block", "moved.py:build", *QUICK)
    code, _, err = run(capsys, "train", *words, "--out", "further")
    assert code == 0, err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("my_block.py:wrong", "block family my_block.py:wrong does not merge exactly"),
        ("my_block.py:bild", "my_block.py has no function 'bild'; did you mean build?"),
        ("my_block.py", "block.name=my_block.py does not name a function: give my_block.py:FUNCTION"),
        ("none.py:build", "no file none.py to load a block family from"),
    ],
)
def test_a_wrong_file_is_one_line(capsys, file, tmp_path, given, says):
    assert says in one_line(capsys, "train", *NET, "--block", given)
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["my_block.py"]


@pytest.mark.soak
def test_series_name_it_again(capsys, file, forget):
    code, _, err = run(capsys, "train", *NET, "--block", file, *QUICK, "--seeds", "0,1", "--out", "series")
    assert code == 0, err
    shutil.rmtree("series/seed_1")
    forget()
    assert f"give --block {file}" in one_line(capsys, "train", "--resume", "series")
    assert run(capsys, "train", "--resume", "series", "--block", file)[0] == 0
    assert json.loads(Path("series/seed_1/summary.json").read_text())["seed"] == 1


# ---------------------------------------------------------------------------------------------- images


IMAGES, LABELS = torch.randn(6, 3, 32, 32), torch.arange(6)


@pytest.mark.parametrize(
    "images",
    [
        IMAGES,
        (IMAGES, LABELS),
        [IMAGES],
        [IMAGES, IMAGES],
        {"pixel_values": IMAGES, "labels": LABELS},
        [{"labels": LABELS, "image": IMAGES}],
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=6),
        [(IMAGES, LABELS)],
    ],
    ids=lambda images: type(images).__name__,
)
def test_images_come_as_people_have_them(images):
    model = small_net("plain")
    expected = model(IMAGES)
    repan_cli.expand(model, "rep", images=images)
    repan_cli.restart(model, images=images)
    plain, report = repan_cli.fuse(model, images)
    assert report.rel_error_fp64 < 1e-10
    torch.testing.assert_close(plain(IMAGES), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(3, 32, 32), r"a tensor of float32 \(3, 32, 32\): give images"),
        (IMAGES.to(torch.uint8), r"a tensor of uint8 \(6, 3, 32, 32\)"),
        ("photos", "'photos': give images"),
        ([LABELS], r"a tensor of int64 \(6,\) among the batches"),
        ([], "no images"),
        (7, "a int: give images"),
    ],
)
def test_other_things_are_refused(images, says):
    with pytest.raises(InputError, match=says):
        repan_cli.fuse(small_net(), images)
    with pytest.raises(InputError, match=says):
        repan_cli.expand(small_net("plain"), images=images)


def test_a_folder_and_a_file_are_alike(small_run):
    images = torch.randn(2, 1, 8, 8)
    folder, file = repan_cli.load(small_run.folder), repan_cli.load(small_run.folder / "best.pt")
    assert torch.equal(folder(images), file(images))
    assert repan_cli.fuse(small_run.folder, images)[1].rel_error_fp64 < 1e-10
    with pytest.raises(InputError, match="load it first"):
        repan_cli.restart(small_run.folder, images=images)
    with pytest.raises(InputError, match="load it first"):
        repan_cli.expand(str(small_run.folder), images=images)
    with pytest.raises(InputError, match="a folder without best.pt or last.pt"):
        repan_cli.load(small_run.folder.parent)


def test_geometries_are_described_in_words():
    from repan_cli.blocks.block_check import _described

    assert "8 to 8 channels in 1 groups" in _described(Geometry(8, 8, (3, 3)))
