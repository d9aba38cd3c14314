"""Unusual names of files, folders and classes: one line each, and no control character reaches the terminal."""

import errno
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image
from support import DIGITS, ROOT, card_of, one_line, run, small_net, write_folders, write_run

from repan_cli import checkpoint
from repan_cli.cli import dispatch
from repan_cli.config import files
from repan_cli.data import image_files
from repan_cli.data.image_files import UnreadableImageError
from repan_cli.display import console
from repan_cli.errors import InputError, OutOfSpaceError, RepanError
from repan_cli.system.text import shown

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt"
NO_TEXT = os.fsdecode(b"caf\xe9")


def test_control_characters_are_shown():
    assert shown(EVIL) == r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt"
    assert shown("größe 5 × 5 日本\nnext") == "größe 5 × 5 日本\nnext"
    assert shown("a\tb\r") == r"a\tb\r"


@pytest.mark.parametrize("command", ["info", "evaluate", "predict"])
def test_class_names_send_nothing_to_the_terminal(capsys, tmp_path, few_blocks, command):
    classes = tuple(f"{EVIL}{number}" for number in range(10))
    look = {"in_chans": 1, "image_size": 8, "mean": (0.3,), "std": (0.4,), "config": {"data.name": "digits"}}
    saved = checkpoint.capture(model := small_net(in_chans=1), card_of(model, classes=classes, **look))
    checkpoint.save(saved, tmp_path / "a.pt")
    words = (write_folders(tmp_path / "images"),) if command == "predict" else ()
    _, out, err = run(capsys, command, tmp_path / "a.pt", *words)
    assert r"\x1b]0;owned" in out + err
    assert not set("\x1b\x07\x9b\u202e") & set(out + err)


def test_warnings_and_errors_send_nothing_either(capsys):
    console.tell(EVIL)
    console.LOGGER.warning(EVIL)
    with pytest.raises(Exception, match="2"):
        dispatch.fail(InputError(EVIL))
    assert not set("\x1b\x07\x9b\u202e") & set("".join(capsys.readouterr()))
    assert "\x1b" not in one_line(capsys, "info", EVIL)
    assert "\x1b" not in one_line(capsys, EVIL)


def test_a_class_folder_with_such_a_name(capsys, tmp_path, few_blocks):
    folder = write_folders(tmp_path / "images", classes=("ant", "\x1b[31mbee"), size=(8, 8))
    words = ("--dataset", "folder", "--data-root", folder, "--epochs", 1, "--batch-size", 8, "--out", tmp_path / "run")
    code, out, err = run(capsys, "train", "--model", "repvgg_a0_cifar", *words)
    assert code == 0, err
    assert "\x1b[31m" not in out + err
    assert checkpoint.load(tmp_path / "run" / "last.pt").card.classes == ("\x1b[31mbee", "ant")


# ---------------------------------------------------------------------------------------------- no text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names are text")
def test_a_folder_whose_name_is_no_text(capsys, tmp_path):
    folder = write_folders(tmp_path / "images", classes=("ant", NO_TEXT))
    said = one_line(capsys, "train", *DIGITS[:2], "--dataset", "folder", "--data-root", folder)
    assert r"'caf\udce9' is not UTF-8 text" in said


@pytest.mark.parametrize("words", [("train", *DIGITS, "--out", NO_TEXT), ("info", NO_TEXT), (NO_TEXT,)])
def test_a_word_that_is_no_text(capsys, words):
    assert r"'caf\udce9' is not UTF-8 text" in one_line(capsys, *words)


def test_a_terminal_with_few_letters():
    """LANG=C, no HOME, a dumb terminal: what it lacks is spelled out."""
    poor = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [sys.executable, "-m", "repan_cli", "list", "blocks"]
    found = subprocess.run(command, env={**poor, "TERM": "dumb"}, capture_output=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.isascii()


# ---------------------------------------------------------------------------------------------- long, special, too many


def test_a_name_as_long_as_the_system_allows(tmp_path):
    """The temporary file beside it needs a shorter one."""
    path = tmp_path / ("n" * 252 + ".pt")
    checkpoint.save(checkpoint.capture(model := small_net(), card_of(model)), path)
    assert [path.name] == [each.name for each in tmp_path.iterdir()]


@pytest.mark.parametrize(
    "words",
    [
        ("info", "n" * 300 + ".pt"),
        ("evaluate", "n" * 300 + ".onnx"),
        ("train", *DIGITS, "--out", "n" * 300),
        ("train", *DIGITS, "-c", "n" * 300),
        ("train", *DIGITS, "--init", "n" * 300),
        ("train", "--model", "repvgg", "--dataset", "folder", "--data-root", "n" * 300),
        ("train", *DIGITS, "--out", "/"),
        ("train", *DIGITS, "--out", "/dev/null/run"),
        ("compare", "n" * 300),
        ("train", "--resume", "n" * 300),
    ],
)
def test_names_that_cannot_be(capsys, words):
    one_line(capsys, *words)


@pytest.fixture
def desk(tmp_path, monkeypatch, few_blocks):
    """A checkpoint, a run, a folder that is called a file, and links: to a file, to nothing, to itself."""
    monkeypatch.chdir(tmp_path)
    look = {"in_chans": 1, "image_size": 8, "mean": (0.3,), "std": (0.4,), "config": {"data.name": "digits"}}
    checkpoint.save(checkpoint.capture(model := small_net(in_chans=1), card_of(model, **look)), Path("a.pt"))
    write_run(Path("runs/a"))
    Path("mine.pt").write_text("mine")
    Path("folder.pt").mkdir()
    for name, target in (("link.pt", "mine.pt"), ("nothing.pt", "nowhere.pt"), ("loop.pt", "loop.pt")):
        Path(name).symlink_to(target)
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize(
    "words",
    [
        *(f"fuse a.pt --out {out}" for out in ("link.pt", "loop.pt", "folder.pt", "/", ".", "mine.pt/a.pt")),
        *(f"quantize a.pt --out {out}" for out in ("/", "folder.pt", "mine.pt/a.onnx")),
        *(f"evaluate a.pt --out {out}" for out in ("mine.pt", "loop.pt")),
        *(f"train --model repvgg --dataset digits --out {out}" for out in ("link.pt", "loop.pt", "nothing.pt", "/")),
        *(f"compare runs --html {out}" for out in ("/", "folder.pt", "/proc/no/a.html")),
        *(f"compare runs --markdown {out}" for out in ("/", "folder.pt")),
    ],
)
def test_places_where_nothing_can_be_written(capsys, desk, words):
    before = sorted(desk.rglob("*"))
    said = one_line(capsys, *words.split())
    assert ".." not in said.partition(":")[2]  # the name of a temporary file is nobody's
    assert sorted(desk.rglob("*")) == before
    assert Path("mine.pt").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    ["fuse a.pt --out b.pt", "evaluate a.pt --out tables", "compare runs --html b.html"],
)
def test_ctrl_c_while_a_file_is_written_leaves_none(capsys, desk, monkeypatch, words):
    def pressed(handle):
        raise KeyboardInterrupt

    before = {path for path in desk.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "fsync", pressed)
    assert run(capsys, *words.split())[0] == 130
    assert {path for path in desk.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="only Unix has such files")
def test_a_pipe_that_is_called_an_image_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (image_files.open_image, lambda path: image_files.check(path, whole=True)):
        with pytest.raises(UnreadableImageError, match="it is not a regular file"):
            read(tmp_path / "x.png")


def test_a_preset_of_many_megabytes(capsys, tmp_path):
    (tmp_path / "big.yaml").write_bytes(b"# nothing\n" * 1_000_000)
    assert "is not a preset: 10,000,000 bytes" in one_line(capsys, "train", *DIGITS, "-c", tmp_path / "big.yaml")
    assert files.MOST_TEXT > 2**19


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files(error):
    known = dispatch._as_known(OSError(error, "Too many open files"))
    assert isinstance(known, OutOfSpaceError)
    assert "ulimit -n" in str(known)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        MemoryError(),
    ],
)
def test_too_little_memory(error):
    """As under `ulimit -v` and `ulimit -u`."""
    known = dispatch._as_known(error)
    assert isinstance(known, OutOfSpaceError)
    assert str(known).startswith("out of memory")


def test_a_loader_that_was_killed():
    known = dispatch._as_known(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."))
    assert isinstance(known, RepanError)
    assert "--resume" in str(known)


def test_two_images_for_three_processes(capsys, monkeypatch):
    from repan_cli.session import build

    real = build.start_runtime

    def three(*args, **kwargs):
        import dataclasses

        return dataclasses.replace(real(*args, **kwargs), ranks=3)

    monkeypatch.setattr(build, "start_runtime", three)
    said = one_line(capsys, "train", *DIGITS, "--batch-size", 2)
    assert "data.batch_size=2 is too small for 3 processes" in said


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_wide_image_is_read_and_a_bomb_is_one_line(tmp_path):
    Image.new("RGB", (100_000, 1)).save(tmp_path / "wide.png")
    assert image_files.square(image_files.open_image(tmp_path / "wide.png"), 8).size == (8, 8)
    for side in (10_000, 60_000):
        head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        body = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body + struct.pack(">I", 9) + b"IDAT")
        with pytest.raises(UnreadableImageError, match=r"cannot read the image .*bomb\.png"):
            image_files.open_image(tmp_path / "bomb.png")
