"""ONNX files that read other files, run forever, call missing functions or fill the memory are refused."""

import json

import pytest
from support import card_of, one_line, run, write_folders
from torch import nn

from repan_cli import checkpoint
from repan_cli.checkpoint.format import Checkpoint
from repan_cli.errors import InputError
from repan_cli.export import onnx_file

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

SHAPE = ["batch", 3, 32, 32]


def model(nodes, initializers=(), *, out=("batch", 10), **more):
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, SHAPE)]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, out)]
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, **more)


def write(path, built):
    """As repan would have written it: with its description and its checksum."""
    card = card_of(nn.Identity(), block=None, config={"data.name": "digits"})
    path.write_bytes(onnx_file.seal(built, checkpoint.header(Checkpoint({}, card))))
    return path


def external():
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [4], [0.0] * 4)
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    return tensor


def hidden_in_a_constant():
    return model([helper.make_node("Constant", [], ["w"], value=external()), POOL])


def endless(kind="Loop"):
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    count = helper.make_tensor("count", TensorProto.INT64, [], [2**62])
    names = [helper.make_tensor_value_info(*each, []) for each in (("i", TensorProto.INT64), ("c", TensorProto.BOOL))]
    same = helper.make_node("Identity", ["c"], ["d"])
    body = helper.make_graph([same], "body", names, [helper.make_tensor_value_info("d", TensorProto.BOOL, [])])
    return model([helper.make_node(kind, ["count", "true"], [], body=body), POOL], [true, count])


def nested():
    """In a branch of an If."""
    inner = endless().graph
    branch = helper.make_graph(inner.node[:1], "b", [], [], inner.initializer)
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    return model([helper.make_node("If", ["true"], [], then_branch=branch, else_branch=branch), POOL], [true])


POOL = helper.make_node("GlobalAveragePool", ["images"], ["logits"])
REFUSED = {
    "external": (lambda: model([POOL], [external()]), "reads weights from other files"),
    "constant": (hidden_in_a_constant, "reads weights from other files"),
    "loop": (endless, "holds the operator Loop, which may never end"),
    "scan": (lambda: endless("Scan"), "holds the operator Scan, which may never end"),
    "nested": (nested, "holds the operator Loop, which may never end"),
    "custom": (
        lambda: model([helper.make_node("Evil", ["images"], ["logits"], domain="a.stranger")]),
        "cannot be opened by ONNX Runtime",
    ),
}


@pytest.mark.parametrize("command", ["info", "evaluate", "predict"])
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(capsys, tmp_path, name, command):
    built, says = REFUSED[name]
    path = write(tmp_path / "a.onnx", built())
    images = (write_folders(tmp_path / "images"),) if command == "predict" else ()
    assert says in one_line(capsys, command, path, *images)


def test_running_out_of_memory_is_one_line(capsys, tmp_path):
    size = helper.make_tensor("size", TensorProto.INT64, [1], [10**13])
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["images", "sum"], ["logits"]),
    ]
    path = write(tmp_path / "a.onnx", model(nodes, [size], out=SHAPE))
    assert run(capsys, "info", path)[0] == 0
    code, _, err = run(capsys, "predict", path, write_folders(tmp_path / "images"))
    assert code == 2
    assert "ONNX Runtime cannot run the network" in err


def test_logits_of_another_shape(capsys, tmp_path):
    path = write(tmp_path / "a.onnx", model([POOL], out=["batch", 3, 1, 1]))
    assert "the network returns 24x3x1x1 numbers for 24 images" in one_line(
        capsys, "predict", path, write_folders(tmp_path / "images")
    )


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 100, b"\xff" * 100])
def test_files_that_are_not_onnx(tmp_path, content):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.onnx (is damaged|cannot be opened)"):
        onnx_file.open_file(tmp_path / "a.onnx")


def test_the_description_is_read_without_running_anything(tmp_path, monkeypatch):
    path = write(tmp_path / "a.onnx", model([POOL]))
    monkeypatch.setattr(onnx_file, "OnnxNetwork", None)
    assert json.loads(onnx_file.header(path))["meta"]["in_chans"] == 3
