"""What a bundle may say, and that every fault of one is told at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import bundle as contract
from contract.bundle import Bundle, BundleError, Graph, State, Tensor
from tests import models


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    models.reader(tmp_path / "reader")
    return tmp_path / "reader"


def test_what_is_saved_is_what_is_loaded(reader: Path) -> None:
    """load gives back what save was given, with its fingerprint."""
    bundle = contract.load(reader)
    assert contract.save(bundle, reader) == bundle == contract.load(reader)
    assert bundle.fingerprint.startswith("sha256:")
    assert bundle.graph.states[0] == State("h", "h_next", "float32", (1, "batch", 8))


def test_notes_do_not_change_the_fingerprint(reader: Path) -> None:
    """The fingerprint covers what decides an answer, not how the model was made."""
    bundle = contract.load(reader)
    noted = contract.save(replace(bundle, made_from={"seed": 7}, verified={"max_abs_error": 1e-6}), reader)
    assert noted.fingerprint == bundle.fingerprint
    longer = contract.save(replace(bundle, graphs={"step": replace(bundle.graph, max_time=401)}), reader)
    assert longer.fingerprint != bundle.fingerprint


def test_every_byte_counts(reader: Path) -> None:
    """A file that differs from the export is refused, wherever the byte lies."""
    file = reader / "step.onnx"
    data = file.read_bytes()
    for at in range(0, len(data), 101):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BundleError, match="fingerprint"):
            contract.load(reader)


def test_half_written_is_refused(reader: Path) -> None:
    """bundle.json cut at any byte, a file missing, or no bundle.json at all: refused with a reason, never half served."""
    whole = (reader / contract.FILE).read_bytes()
    for cut in range(0, len(whole) - 2, 37):
        (reader / contract.FILE).write_bytes(whole[:cut])
        with pytest.raises(BundleError, match="is not JSON"):
            contract.load(reader)
    (reader / contract.FILE).write_bytes(whole)
    (reader / "step.onnx").rename(reader / "gone")
    with pytest.raises(BundleError, match=r"'step.onnx' is missing"):
        contract.load(reader)
    (reader / contract.FILE).unlink()
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        contract.load(reader)


def test_all_faults_at_once() -> None:
    """validate lists every fault, each with what to do."""
    graph = Graph(
        "../step.onnx",
        (
            Tensor("x", "float99", ("batch", "time", 0)),
            Tensor("x", "float32", ("batch", "batch")),
            Tensor("n", "int64", ("batch",), low=3, high=1),
            Tensor("row", "int64", ("batch",), role="row"),
            Tensor("who", "int64", ("batch",), role="guess"),
        ),
        (Tensor("y", "float32", (3,)),),
        (State("h", "h", "float32", (1, "time", 8), initial=float("inf")),),
        max_time=0,
    )
    faults = "\n".join(contract.validate(Bundle("no/name", {"step": graph}, "main", {"kind": "guess"}, format=9)))
    for fault in (
        "format 9", "name 'no/name'", "task kind 'guess'", "main graph 'main'", "'../step.onnx': must be a plain name", "dtype 'float99'",
        "axis 0", "axis name is there twice", "low 3 is above high 1", "role 'row' needs one ragged axis", "role 'guess'",
        "output 'y': needs a batch axis", "axes [1, 'time', 8]", "initial must be a finite", "max_time 0", "'x' is named 2 times",
    ):  # fmt: skip
        assert fault in faults


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": 2}, "format 2"),
        ({"graphs": {}}, "at least one graph"),
        ({"graphs": {"step": 3}}, "graphs.step: must be an object"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"name": 7}, "name: must be str, got 7"),
        (
            {"graphs": {"step": {"file": "a", "inputs": [{"name": "x", "dtype": "int64", "axes": ["batch", True]}]}}},
            "must be a name or a number",
        ),
        ({"graphs": {"step": {"inputs": {}, "outputs": [4]}}}, "inputs: must be a list"),
    ],
)
def test_ill_formed_json(reader: Path, change: dict[str, object], fault: str) -> None:
    """A bundle.json of the wrong form is refused by key."""
    document = json.loads((reader / contract.FILE).read_text())
    (reader / contract.FILE).write_text(json.dumps({**document, **change}))
    with pytest.raises(BundleError) as caught:
        contract.load(reader)
    assert any(fault in f for f in caught.value.faults), caught.value.faults


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.sampled_from(["batch", "time", "float32", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["format", "name", "graphs", "main", "file", "inputs", "outputs", "states", "axes", "dtype"]), inner, max_size=5
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_no_json_breaks_parsing(document: object) -> None:
    """Whatever JSON holds, parsing gives a bundle or faults, never an exception."""
    if isinstance(document, dict):
        document = {**document, "format": 1}
    bundle, faults = contract.parse(document)
    assert (bundle is None) == bool(faults)
    if bundle is not None:
        contract.validate(bundle)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "no bundle.json and no ONNX file"),
        (("model.onnx",), "model.onnx --json` prints one"),
        (("a.onnx", "b.onnx"), "2 ONNX files (a.onnx, b.onnx): leave one"),
    ],
)
def test_what_is_there_in_place_of_a_bundle(files: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """A directory without bundle.json is refused by what it has, with what to do about that."""
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BundleError) as refused:
        contract.load(tmp_path)
    assert said in str(refused.value)
