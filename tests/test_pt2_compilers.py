"""`.pt2` files as compilers take them: functional, the input called `images`, an example of it that is no code."""

import io
import pickle
import zipfile

import pytest
import torch
from support import relative, small_net

from repan_cli.blocks import reparameterize
from repan_cli.errors import InputError
from repan_cli.export import pt2_file
from repan_cli.export.trace import trace

pytestmark = [pytest.mark.usefixtures("few_blocks"), pytest.mark.filterwarnings("ignore")]
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
INPUTS = "data/sample_inputs/model.pt"


@pytest.fixture
def network(few_blocks):
    return reparameterize(small_net())


@pytest.fixture
def content(made_once, network):
    """A file of the network; its bytes, since tests change them."""

    def make(folder):
        (folder / "net.pt2").write_bytes(pt2_file.write(trace(network, X, "net"), {"meta": {}}))

    return (made_once("pt2", make) / "net.pt2").read_bytes()


def program(content):
    return torch.export.load(io.BytesIO(content))


def test_the_graph_has_the_form_that_compilers_require(content, network, caplog):
    found = program(content)
    assert not caplog.records
    assert found.graph_signature.user_inputs == ("images",)
    assert not [node for node in found.graph.nodes if str(node.target).split(".")[1:2] and "_." in str(node.target)]
    (example,), more = found.example_inputs
    assert example.equal(torch.zeros(2, 3, 32, 32))
    assert more == {}
    for count in (1, 3):
        assert relative(found.module()(X[:count]), network(X[:count])) < 1e-5


def test_the_input_may_be_called_images_already(network):
    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images)

    content = pt2_file.write(trace(Images(), X, "net"), {"meta": {}})
    assert program(content).graph_signature.user_inputs == ("images",)


# ---------------------------------------------------------------------------------------------- no code in the example


def with_example(content, example):
    """The file with other bytes for its example input."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            name = entry.filename.partition("/")[2]
            new.writestr(f"archive/{name}", example if name == INPUTS else old.read(entry))
    return buffer.getvalue()


def pickled(thing, **more):
    buffer = io.BytesIO()
    torch.save(thing, buffer, **more)
    return buffer.getvalue()


class Evil:
    def __reduce__(self):
        return (open, ("marker", "w"))


def archive(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for name, value in entries.items():
            new.writestr(f"archive/{name.replace('__', '.')}", value)
    return buffer.getvalue()


HOSTILE = {
    "an object": pickled(((Evil(),), {})),
    "by another protocol": pickled(((Evil(),), {}), pickle_protocol=4),
    "the old form": pickled(((Evil(),), {}), _use_new_zipfile_serialization=False),
    "a pickle alone": pickle.dumps(Evil()),
    "a module": pickled(((torch.nn.Linear(1, 1),), {})),
    "code": archive(data__pkl=pickle.dumps(((), {}), protocol=2), code=b"import os"),
    "an extension code": archive(data__pkl=b"\x80\x02\x82\x01."),
    "text": b"hello",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_example_that_is_more_than_tensors_is_refused(content, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        pt2_file.Pt2Network(with_example(content, HOSTILE[kind]))
    assert not (tmp_path / "marker").exists()


def test_other_tensors_are_no_code(content, network):
    for example in (((X,), {}), ((X, X[:, :1]), {}), (X,)):
        assert relative(pt2_file.Pt2Network(with_example(content, pickled(example)))(X), network(X)) < 1e-5
    assert pt2_file.Pt2Network(with_example(content, b""))(X).shape == (3, 10)


def test_pytorch_never_gets_the_example_from_here(content, monkeypatch):
    seen = []
    load = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda file: seen.append(file.read()) or load(io.BytesIO(seen[0])))
    pt2_file.Pt2Network(content)
    with zipfile.ZipFile(io.BytesIO(seen[0])) as given:
        assert given.read(f"archive/{INPUTS}") == b""


# ---------------------------------------------------------------------------------------------- compilers


@pytest.mark.soak
def test_aotinductor_packages_it(content, network, tmp_path):
    pytest.importorskip("torch._inductor")
    path = torch._inductor.aoti_compile_and_package(program(content), package_path=str(tmp_path / "net_aoti.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    assert relative(compiled(X), network(X)) < 1e-5
    assert relative(compiled(X[:1]), network(X[:1])) < 1e-5


@pytest.mark.soak
def test_coremltools_converts_it_unchanged(content):
    coremltools = pytest.importorskip("coremltools", reason="coremltools is not installed")
    spec = coremltools.convert(program(content)).get_spec()
    assert [each.name for each in spec.description.input] == ["images"]


@pytest.mark.soak
def test_executorch_runs_it_by_xnnpack(content, network, tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(program(content), partitioner=[XnnpackPartitioner()]).to_executorch()
    (tmp_path / "net.pte").write_bytes(lowered.buffer)
    method = Runtime.get().load_program(tmp_path / "net.pte").load_method("forward")
    assert relative(method.execute([X[:2]])[0], network(X[:2])) < 1e-5


@pytest.mark.soak
def test_litert_runs_it(content, network):
    litert_torch = pytest.importorskip("litert_torch", reason="litert-torch is not installed")
    converted = litert_torch.convert(program(content).module(), (X[:1],))
    assert relative(torch.tensor(converted(X[:1].numpy())), network(X[:1])) < 1e-5
