"""What `make bench` plans and says, without measuring anything."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.figures.bench import Results
from tests.figures.bench_bare import CHUNK, ROWS, rounds
from tests.figures.bench_lines import CAP, LINES, TITLES, data, lengths
from tests.figures.bench_report import markdown, summary
from tests.figures.bench_tools import Load, Measured


@given(st.lists(st.integers(1, 400), min_size=1, max_size=100))
def test_planned_rounds_read_every_step_once(of: list[int]) -> None:
    """Rows times steps of all rounds are the steps of all sequences; no round is larger than the server's would be."""
    planned = rounds(of)
    assert sum(rows * steps for rows, steps in planned) == sum(of)
    assert all(0 < rows <= ROWS and 0 < steps <= CHUNK for rows, steps in planned)


def test_every_line_has_a_title_and_lengths_within_bounds() -> None:
    """Lengths are drawn as their line says, and every call brings as many tokens as its shape tells."""
    assert {line.name for line in LINES if line.client != "idle"} <= TITLES.keys()
    for which, most in (("32", 32), ("1–128", 128), ("IMDb", CAP)):
        of = lengths(which, 50)
        assert 1 <= min(of) <= max(of) <= most
        assert [(len(call["tokens"]["content"]), call["tokens"]["shape"]) for call in data(of)["data"]] == [(n, [n]) for n in of]


def test_a_report_sets_servers_side_by_side() -> None:
    """Medians with their extremes, the multiple of the bare rate, and the aim scaled by it."""
    results = Results()
    for title, rates in (("seqserve", (5000.0, 6000.0, 7000.0)), ("other", (1000.0,))):
        results.passes["a32-32", title] = [Measured(rate, 5.0, 9.0, 100.0, 50.0) for rate in rates]
    results.bare["A t=32"] = [(4000.0, 8000.0)]
    ours, others = markdown(results, 3, 1.5).splitlines()[-2:]
    assert "|6,000 (5,000–7,000)|" in ours
    assert "|1.50|" in ours
    assert "1.3 × bare here: 5,200" in ours
    assert "|1,000|" in others
    assert "a32-32 6,000/s, 9 ms (1.50 × bare)" in summary(results)


def test_a_server_that_dies_is_not_waited_for() -> None:
    """perf_analyzer would wait for its answers for ever: the pass fails, and says why."""
    forever = ["tail", "-f", "/dev/null"]
    with subprocess.Popen(forever) as server:
        load = Load(forever, server.pid)
        server.kill()
        with pytest.raises(RuntimeError, match="server ended"):
            load.output()
