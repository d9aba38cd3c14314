"""An ONNX file that another program changed opens with a warning; a damaged one is refused."""

import hashlib
import importlib
import io
import json

import numpy as np
import pytest
from support import card_of, one_line, run
from torch import nn

from repan_cli import checkpoint
from repan_cli.checkpoint.format import CHECKSUM, DIGITS, Checkpoint, sealed
from repan_cli.errors import InputError
from repan_cli.export import onnx_file
from repan_cli.session.artifact import open_artifact
from repan_cli.system.packages import missing

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper, shape_inference, version_converter  # noqa: E402

pytestmark = pytest.mark.skipif(bool(missing("onnx", "onnxscript", "onnxruntime")), reason="the onnx extra is missing")
CHANGED = "changed since repan wrote it, by"


def built():
    """A network for 10 classes of images of 8 pixels."""
    draw = np.random.default_rng(0)
    shapes = {"kernel": (16, 3, 3, 3), "bias": (16,), "matrix": (10, 16), "shift": (10,)}
    weights = [numpy_helper.from_array(draw.normal(size=s).astype("float32"), name) for name, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["images", "kernel", "bias"], ["maps"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["active"], name="b"),
        helper.make_node("GlobalAveragePool", ["active"], ["means"], name="c"),
        helper.make_node("Flatten", ["means"], ["flat"], name="d"),
        helper.make_node("Gemm", ["flat", "matrix", "shift"], ["logits"], name="e", transB=1),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="pytorch", producer_version="2")


def described():
    card = card_of(nn.Identity(), block=None, image_size=8, config={"data.name": "digits"})
    return checkpoint.header(Checkpoint({}, card))


@pytest.fixture
def ours(tmp_path):
    path = tmp_path / "ours.onnx"
    path.write_bytes(onnx_file.seal(built(), described()))
    return path


def by(module, name):
    """A function of a module, or skip."""
    return getattr(pytest.importorskip(module), name)


def renamed(model):
    """Other names for the input and the output."""
    model.graph.input[0].name = model.graph.node[0].input[0] = "x"
    model.graph.output[0].name = model.graph.node[-1].output[0] = "y"
    return model


def with_fixed_batch(model):
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    return model


def half(model, **options):
    return by("onnxruntime.transformers.float16", "convert_float_to_float16")(model, **options)


def quantized(model):
    quantization = importlib.import_module("onnxruntime.quantization")
    return quantization.quantize_dynamic(model, "int8.onnx", op_types_to_quantize=["Gemm"]) or onnx.load("int8.onnx")


def documented(model):
    model.doc_string = "mine"
    for node in model.graph.node:
        node.name, node.doc_string = f"{node.name}_again", "a node"
    return model


def as_floats(model):
    """Weights as a list of floats, not as bytes."""
    for tensor in model.graph.initializer:
        tensor.float_data.extend(numpy_helper.to_array(tensor).ravel().tolist())
        tensor.ClearField("raw_data")
    return model


SAME = {
    "saved again": lambda model: model,
    "documented": documented,
    "shapes inferred": shape_inference.infer_shapes,
    "weights stored otherwise": as_floats,
    "onnxsim": lambda model: by("onnxsim", "simplify")(model)[0],
    "onnxslim": lambda model: by("onnxslim", "slim")(model),
}
OTHER = {
    "float16": (half, "another program"),
    "float16 inside": (lambda model: half(model, keep_io_types=True), "another program"),
    "opset 15": (lambda model: version_converter.convert_version(model, 15), "another program"),
    "opset 21": (lambda model: version_converter.convert_version(model, 21), "another program"),
    "quantized": (quantized, "onnx.quantize"),
    "renamed": (renamed, "another program"),
    "of one batch size": (with_fixed_batch, "another program"),
}


def saved(path, change, monkeypatch):
    """What a program makes of a file, in a file of another name."""
    monkeypatch.chdir(path.parent)
    onnx.save(change(onnx.load(path)), "other.onnx")
    return path.parent / "other.onnx"


def score(capsys, path):
    code, out, err = run(capsys, "evaluate", path, "--json")
    assert code == 0, err
    return json.loads(out), err


@pytest.mark.parametrize("name", SAME)
def test_a_file_that_was_saved_again_is_the_same(capsys, ours, monkeypatch, name):
    path = saved(ours, SAME[name], monkeypatch)
    assert path.read_bytes() != ours.read_bytes()
    found, err = score(capsys, path)
    assert CHANGED not in err
    assert found["loss"] == pytest.approx(score(capsys, ours)[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_file_opens_with_a_warning(capsys, ours, monkeypatch, name):
    change, producer = OTHER[name]
    path = saved(ours, change, monkeypatch)
    found, err = score(capsys, path)
    assert f"{path} was {CHANGED} {producer}" in err
    assert found["loss"] == pytest.approx(score(capsys, ours)[0]["loss"], rel=0.05)
    _, out, _ = run(capsys, "info", path, "--json")
    assert json.loads(out)["changed"].startswith(f"{CHANGED} {producer}")


def test_the_program_that_changed_it_is_named_by_its_notes(ours, monkeypatch):
    def simplified(model):
        model.metadata_props.add(key="onnxsim.removed", value="7")
        return renamed(model)

    assert onnx_file.read(saved(ours, simplified, monkeypatch)).change == f"{CHANGED} onnxsim"


def test_other_programs_are_told_something_else(ours, monkeypatch):
    def retold(model):
        next(entry for entry in model.metadata_props if entry.key == "mean").value = "[0, 0, 0]"
        return model

    change = onnx_file.read(saved(ours, retold, monkeypatch)).change
    assert change.startswith(CHANGED)
    assert change.endswith("it describes the preparation of images differently to other programs")


def test_every_flipped_bit_of_ours_is_found(ours):
    content = ours.read_bytes()
    for place in {*range(0, len(content), 7), *range(len(content) - 100, len(content))}:
        ours.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match="is damaged"):
            onnx_file.read(ours)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_flipped_weight_of_a_file_saved_again_is_found(capsys, ours, monkeypatch, place):
    def flipped(model):
        tensor = model.graph.initializer[place]
        tensor.raw_data = tensor.raw_data[:-1] + bytes([tensor.raw_data[-1] ^ 1])
        return model

    path = saved(ours, flipped, monkeypatch)
    for command in ("evaluate", "info"):
        assert "is damaged: its graph holds other weights than repan wrote" in one_line(capsys, command, path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("repan", '"digest"', "its description is not the one that repan wrote"),
        ("repan.digests", '"graph"', "its digests are invalid"),
        ("repan.digests", "{", "its digests are invalid"),
        ("repan.digests", None, "its digests are invalid"),
    ],
)
def test_a_changed_description_is_refused(ours, monkeypatch, key, value, says):
    def retold(model):
        entry = next(entry for entry in model.metadata_props if entry.key == key)
        entry.value = "[" * 100_000 if value is None else entry.value.replace(value, '"other"')
        return model

    with pytest.raises(InputError, match=f"is damaged: {says}"):
        open_artifact(str(saved(ours, retold, monkeypatch)))


def test_half_a_file_is_refused(ours):
    content = ours.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        ours.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"is damaged|was not written by repan"):
            open_artifact(str(ours))


def as_version_0_1(path):
    """A file as version 0.1 wrote it: a checksum as the last metadata, no digests."""
    model, header = built(), described()
    header.pop("preprocessing")
    entries = {"classes": "[]", "repan": json.dumps(header), "seal": CHECKSUM.decode() + "0" * DIGITS}
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
    content = model.SerializeToString(deterministic=True)
    path.write_bytes(sealed(io.BytesIO(content), len(content) - DIGITS))
    return path


def test_files_of_version_0_1(capsys, ours, tmp_path, monkeypatch):
    """They open; one that was changed by a program that leaves notes behind the checksum is said to be changed."""
    old = as_version_0_1(tmp_path / "old.onnx")
    found, err = score(capsys, old)
    assert CHANGED not in err
    assert found["loss"] == score(capsys, ours)[0]["loss"]

    def noted(model):
        model.metadata_props.add(key="onnxsim.removed", value="7")
        return model

    assert onnx_file.read(saved(old, noted, monkeypatch)).change == f"{CHANGED} onnxsim"
    content = old.read_bytes()
    old.write_bytes(content[:400] + bytes([content[400] ^ 1]) + content[401:])
    assert "its bytes do not match its checksum" in one_line(capsys, "evaluate", old)


def test_onnx_runtime_gets_the_bytes_that_were_checked(ours, monkeypatch):
    given = []
    monkeypatch.setattr(onnx_file, "OnnxNetwork", lambda content, **more: given.append(content) or nn.Identity())
    open_artifact(str(ours))
    assert [hashlib.sha256(each).hexdigest() for each in given] == [hashlib.sha256(ours.read_bytes()).hexdigest()]
