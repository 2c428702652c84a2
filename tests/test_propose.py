"""What is proposed for an ONNX file from its ports alone, and from runs of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import bundle as contract
from contract.bundle import Bundle, State, Tensor
from contract.propose import Port, Proposal, propose
from server import dropin, inspect
from tests import bare

DATA = Port("data", "float32", ("b", "t", 3))
SCORE = Port("score", "float32", ("b", "t", 2))

CONVENTIONS = [
    "h hn", "h0 hn", "c0 cn", "h_0 h_n", "c cn", "h_in h_out", "hin hout", "hx hy", "state stateN", "state state_n", "state next_state",
    "state new_state", "x_in x_out", "mem mem_next", "mem next_mem", "hidden hidden_out", "hidden out_hidden", "h0 h1", "h h.1",
    "hidden_in hidden_out", "input_state output_state", "initial_state final_state", "prev_h next_h", "h_prev h", "state_in state",
    "past_key present_key", "past.0.key present.0.key", "past_key_values.0.key present.0.key",
    "past_key_values.1.value present_key_values.1.value",
    "cache_k new_cache_k", "cache cache_out", "cache_last_channel cache_last_channel_next", "stateIn stateOut", "rnn.h.in rnn.h.out",
    "r1i r1o", "encoder_state updated_encoder_state", "window next_window", "lstm_h_in lstm_h_out",
]  # fmt: skip


def states(proposal: Proposal) -> list[tuple[str, str]]:
    return [(s.input, s.output) for s in proposal.graph.states]


@pytest.mark.parametrize("names", CONVENTIONS)
def test_states_are_known_by_their_names(names: str) -> None:
    """Each habit of naming a state before and after is known, beside data that is none."""
    into, out_of = names.split()
    form = (2, "b", 8)
    proposal = propose("m.onnx", [DATA, Port(into, "float32", form)], [SCORE, Port(out_of, "float32", form)])
    assert states(proposal) == [(into, out_of)]
    assert proposal.graph.states[0].axes == (2, "batch", 8)
    assert proposal.graph.inputs[0].axes == ("batch", "time", 3)
    assert proposal.graph.outputs[0].axes == ("batch", "time", 2)
    assert not proposal.faults


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["h", "c"], ["hn", "cn"]),
        (["h0", "c0", "h1", "c1"], ["hn0", "cn0", "hn1", "cn1"]),
        (["h_0_in", "h_1_in"], ["h_0_out", "h_1_out"]),
        (["h1", "h2"], ["h1_out", "h2_out"]),
        (["r1i", "r2i", "r3i", "r4i"], ["r1o", "r2o", "r3o", "r4o"]),
        (["state", "state_2"], ["next_state", "next_state_2"]),
    ],
)
def test_layers_are_told_apart(before: list[str], after: list[str]) -> None:
    """Several states of one form each find their own next value, in whatever order the file lists them."""
    form = ("b", 8)
    inputs = [DATA, *(Port(n, "float32", form) for n in before)]
    outputs = [*(Port(n, "float32", form) for n in reversed(after)), SCORE]
    assert states(propose("m.onnx", inputs, outputs)) == list(zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ([("state", (1, "b", 8))], [("new_state", (1, "b", 8)), ("state_out", (1, "b", 8))], "might become"),
        ([("state", (1, "b", 8))], [("state_out", (1, "b", 9))], "named like a state but differ"),
        ([("hidden", (1, "b", 8))], [("output.7", (1, "b", 8))], "may be a state"),
        ([("past_key", ("b", 4, "p", 8))], [("present_key", ("b", 4, "q", 8))], "more than one open axis"),
    ],
)
def test_doubt_is_a_remark(
    inputs: list[tuple[str, tuple[int | str, ...]]], outputs: list[tuple[str, tuple[int | str, ...]]], says: str
) -> None:
    """What may be a state or not is not guessed: it stays an input, and a remark says why."""
    proposal = propose("m.onnx", [DATA, *(Port(n, "float32", d) for n, d in inputs)], [SCORE, *(Port(n, "float32", d) for n, d in outputs)])
    assert states(proposal) == []
    assert any(says in remark for remark in proposal.remarks)


def test_roles_and_constants() -> None:
    """Lengths are filled in by the server; what has no rows is a constant of the round; a fixed batch is never shared."""
    inputs = [
        Port("speech", "float32", ("n", "frames", 80)), Port("speech_lengths", "int64", ("n",)), Port("sample_rate", "int64", ()),
        Port("h", "float32", (1, "n", 4)),
    ]  # fmt: skip
    proposal = propose("m.onnx", inputs, [Port("y", "float32", ("n", "frames", 5)), Port("hn", "float32", (1, "n", 4))])
    assert proposal.faults == ()
    assert [(t.axes, t.role) for t in proposal.graph.inputs] == [(("batch", "time", 80), "data"), (("batch",), "lengths"), ((), "data")]
    fixed = propose(
        "m.onnx",
        [Port("x", "float32", (1, "t", 3)), Port("h", "float32", (2, 1, 4))],
        [Port("y", "float32", (1, "t", 5)), Port("hn", "float32", (2, 1, 4))],
    )
    assert fixed.faults == ()
    assert (fixed.graph.shared, fixed.graph.max_rows) == (False, 1)
    assert fixed.graph.states == (State("h", "hn", "float32", (2, "batch", 4)),)
    assert fixed.graph.inputs == (Tensor("x", "float32", ("batch", "time", 3)),)


def test_time_may_come_first() -> None:
    """Steps before rows, as many exporters have them: the symbol that the states share is the rows."""
    proposal = propose(
        "m.onnx",
        [Port("x", "float32", ("seq", "items", 3)), Port("h", "float32", (1, "items", 4))],
        [Port("y", "float32", ("seq", "items", 4)), Port("hn", "float32", (1, "items", 4))],
    )
    assert proposal.graph.inputs[0].axes == ("time", "batch", 3)
    assert proposal.graph.outputs[0].axes == ("time", "batch", 4)


_NAMES = st.sampled_from([w for pair in CONVENTIONS for w in pair.split()] + ["x", "y", "input", "output", "sr", "lengths", "a b", "1:0"])
_DIMS = st.lists(st.one_of(st.sampled_from([1, 2, 8, "b", "t", "batch_size", "s0 + 1", "", None]), st.integers(0, 4)), max_size=4).map(
    tuple
)
_PORTS = st.lists(
    st.builds(Port, _NAMES, st.sampled_from(["float32", "int64", "tensor(string)"]), _DIMS), max_size=5, unique_by=lambda p: p.name
)


@given(_PORTS, _PORTS, st.booleans())
def test_a_proposal_holds_or_says_why_not(inputs: list[Port], outputs: list[Port], batch_first: bool) -> None:
    """For any ports at all there is a proposal; where it has no fault it is a valid contract that names every input once."""
    proposal = propose("m.onnx", inputs, outputs, batch_first)
    if not proposal.faults:
        assert contract.validate(Bundle("model", {"model": proposal.graph}, "model")) == []
        named = [t.name for t in proposal.graph.inputs] + [s.input for s in proposal.graph.states]
        assert sorted(named) == sorted(p.name for p in inputs)


def test_runs_settle_what_names_leave_open(tmp_path: Path) -> None:
    """A mean over the whole is seen to differ when cut, and a file with a fixed batch to take one row."""
    bare.voice(tmp_path / "voice.onnx", 1)
    seen = dropin.understand(tmp_path / "voice.onnx")
    assert (seen.faults, seen.graph.cut, seen.graph.shared, seen.graph.max_rows) == ((), True, False, 1)
    assert seen.graph.outputs == (Tensor("output", "float32", ("batch", 1)),)
    bare.pooled(tmp_path / "pooled.onnx")
    pooled = dropin.understand(tmp_path / "pooled.onnx")
    assert (pooled.faults, pooled.graph.cut) == ((), False)
    assert any("'mean' would differ if a sequence were cut" in remark for remark in pooled.remarks)


def test_a_model_that_reads_windows(tmp_path: Path) -> None:
    """A file that runs with one number of steps only is served by windows of that size, and a remark says so."""
    bare.window(tmp_path / "window.onnx", 256)
    seen = dropin.understand(tmp_path / "window.onnx")
    assert seen.faults == ()
    assert (seen.graph.inputs[0].axes, seen.graph.max_time, seen.graph.cut) == (("batch", 256), 1, False)
    assert any("a turn is one window of exactly 256" in remark for remark in seen.remarks)


def test_a_window_that_is_known(tmp_path: Path) -> None:
    """Whoever knows the size of the windows says it; a size that does not run is a fault, not a guess."""
    bare.window(tmp_path / "window.onnx", 300)
    assert dropin.understand(tmp_path / "window.onnx").faults  # no size that is usual
    seen = dropin.understand(tmp_path / "window.onnx", 300)
    assert (seen.faults, seen.graph.inputs[0].axes) == ((), ("batch", 300))
    assert any("one window of exactly 300, as you say" in remark for remark in seen.remarks)
    assert dropin.understand(tmp_path / "window.onnx", 301).faults


def test_axes_without_names_are_tried_both_ways(tmp_path: Path) -> None:
    """Where a file names no axis, runs tell whether rows or steps lie first."""
    bare.nameless(tmp_path / "nameless.onnx")
    seen = dropin.understand(tmp_path / "nameless.onnx")
    assert seen.faults == ()
    assert seen.graph.inputs[0].axes == ("time", "batch", 3)
    assert seen.graph.outputs[0].axes == ("time", "batch", 4)
    assert seen.graph.states == (State("h_in", "h_out", "float32", (1, "batch", 4)),)


def test_inspect_prints_what_can_be_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table names states and remarks; the JSON beside the file is a bundle that loads, edited or not."""
    file = tmp_path / "voice" / "1" / "model.onnx"
    bare.voice(file)
    assert inspect.main([str(file)]) == 0
    shown = capsys.readouterr().out
    assert "state → stateN" in shown
    assert "remark: input 'sr' has no axis of rows" in shown
    assert inspect.main([str(file), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    written["graphs"]["model"]["max_time"] = 100
    (file.parent / contract.FILE).write_text(json.dumps(written))
    loaded = contract.load(file.parent)
    assert (loaded.name, loaded.graph.max_time) == ("voice", 100)
    assert loaded.fingerprint.startswith("sha256:")
    assert inspect.main([str(tmp_path / "none.onnx")]) == 2


def test_what_cannot_be_served_says_what_to_do(tmp_path: Path) -> None:
    """A file that fits no contract is refused with every fault and the command that prints a bundle.json to start from."""
    directory = tmp_path / "odd" / "1"
    bare.rowless(directory / "model.onnx")
    with pytest.raises(contract.BundleError) as caught:
        dropin.bundle(directory, "odd")
    assert any("no input has a batch axis" in fault for fault in caught.value.faults)
    assert f"seqserve inspect {directory / 'model.onnx'} --json" in caught.value.faults[-1]


def test_weights_beside_the_file_count(tmp_path: Path) -> None:
    """The fingerprint covers the file and what lies beside it under its name."""
    directory = tmp_path / "cell" / "1"
    bare.cell(directory / "model.onnx")
    one = dropin.bundle(directory, "cell").fingerprint
    (directory / "model.onnx.data").write_bytes(np.zeros(4, np.float32).tobytes())
    assert dropin.bundle(directory, "cell").fingerprint != one
