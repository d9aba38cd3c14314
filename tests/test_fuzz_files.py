"""Files changed at random: a short part of `tests/soak/test_fuzz.py`, and every case that it has found."""

import pytest
from fuzzing import CORPUS, READERS, fuzz, outcome

pytest.importorskip("onnx")


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_or_refused(name):
    tally = fuzz(name, seconds=0.7, most=200)
    assert tally.executions > 0
    assert not tally.findings, list(tally.findings)


FOUND = sorted(path for name in READERS for path in (CORPUS / name).glob("*"))


def test_files_that_the_fuzzer_found_are_refused():
    for path in FOUND:
        assert outcome(READERS[path.parent.name], path) is None, path


def test_the_fuzzer_sees_what_must_not_happen(tmp_path):
    def broken(path):
        raise KeyError("a reader's fault")

    found = outcome(READERS["yaml"]._replace(read=broken), tmp_path / "a.yaml")
    assert found.startswith('KeyError: "a reader\'s fault" (test_fuzz_files.py:')
