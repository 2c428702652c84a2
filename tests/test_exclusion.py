"""Who records a CUDA graph has its device alone. No sleeps: threads meet at barriers, and a thread that must not get in is seen waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.bundle import BundleError
from server import graph, trial
from server.bound import BoundGraph
from server.devices import CPU, Device, Placement
from server.exclusion import Exclusion
from tests import models

WAIT_S = 30


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_together() -> None:
    """Three at once: each is inside when the others are."""
    exclusion, meeting = Exclusion(), threading.Barrier(3)

    def work() -> None:
        with exclusion.together():
            meeting.wait(WAIT_S)

    threads = [started(work) for _ in range(3)]
    for thread in threads:
        thread.join(WAIT_S)
    assert not meeting.broken


def test_alone() -> None:
    """One who is inside together keeps out who wants it alone; who comes later waits behind that one."""
    exclusion = Exclusion()
    order: list[str] = []

    def alone() -> None:
        with exclusion.alone():
            order.append("alone")
            assert not exclusion._together

    def late() -> None:
        with exclusion.together():
            order.append("late")

    with exclusion.together():
        first = started(alone)
        while not exclusion._alone:
            first.join(0.01)
        second = started(late)
        assert order == []
    first.join(WAIT_S)
    second.join(WAIT_S)
    assert order == ["alone", "late"]


def test_it_is_left_where_something_fails() -> None:
    exclusion = Exclusion()
    for held in (exclusion.together, exclusion.alone):
        with pytest.raises(ZeroDivisionError), held():
            raise ZeroDivisionError
    with exclusion.alone():
        pass


def test_each_thread_captures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime keeps captured graphs by thread: the first replay in each records, whatever others have recorded."""
    bundle = models.reader(tmp_path / "reader" / "1")
    monkeypatch.setattr(graph, "_exclusions", {})
    bound = BoundGraph(bundle.graph, tmp_path / "reader" / "1" / bundle.graph.file, CPU, Placement(banks=True, captured=True), 8)
    alone: list[str] = []
    whole = Exclusion.alone

    def noted(exclusion: Exclusion) -> object:
        alone.append(threading.current_thread().name)
        return whole(exclusion)

    monkeypatch.setattr(Exclusion, "alone", noted)
    assert bound.check_captured(trial.drawing(bound.graph)) is None
    here = threading.current_thread().name
    assert alone == [here] * 2, "to and fro"
    failed: list[object] = []
    other = threading.Thread(target=lambda: failed.append(bound.check_captured(trial.drawing(bound.graph))), name="another", daemon=True)
    other.start()
    other.join(WAIT_S)
    assert failed == [None]
    assert set(alone[2:]) <= {"another", here}
    assert "another" in alone


def test_a_model_that_cannot_be_captured_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime refuses to load it so at all; then it is loaded otherwise."""
    bundle = models.reader(tmp_path / "reader" / "1")
    file = tmp_path / "reader" / "1" / bundle.graph.file
    monkeypatch.setattr(graph, "_exclusions", {})
    make = graph._session

    def session(source: Path | bytes, device: Device, placement: Placement) -> object:
        if placement.captured:
            raise BundleError(str(source), ["it has control flow"])
        return make(source, device, placement)

    monkeypatch.setattr(graph, "_session", session)
    bound = BoundGraph(bundle.graph, file, CPU, Placement(banks=True, captured=True), 8)
    assert not bound.loaded.captured
    assert not bound._captures
    assert bound.loaded.options is None
    assert bound.check_captured(trial.drawing(bound.graph)) is None
    with pytest.raises(BundleError):
        graph.Loaded(tmp_path / "nothing.onnx")
