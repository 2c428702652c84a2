"""The Open Inference Protocol, as tests/conformance has it, against our own server.

The suite runs in a process of its own: tritonclient brings its own messages under the names that ours have.
"""

from __future__ import annotations

from pathlib import Path

from tests.conformance.ours import suite


def test_every_case_passes_that_an_onnx_server_can_offer(tmp_path: Path) -> None:
    """No case fails, and none is left out but decoupled ONNX graphs, which there are not, and perf_analyzer where it isn't at hand."""
    found = suite(tmp_path)
    assert [(name, why) for name, how, why in found if how == "FAIL"] == []
    absent = {name for name, how, _ in found if how == "not offered" and not name.startswith("perf: ")}
    assert absent == {"streams: many responses to one request"}
    assert sum(how == "PASS" for _, how, _ in found) > 70
