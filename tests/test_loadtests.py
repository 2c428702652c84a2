"""What puts load on a server does what it says: inputs, users, shapes, thresholds, a run of locust against a real server."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import seqserve
from loadtests import calls, inputs
from tests.figures import abuse, watched
from tests.process import ROOT, Served, serve


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(ROOT / "models") as one:
        yield one


@pytest.mark.parametrize("what", calls.EVERY, ids=lambda what: what.__name__)
def test_users_do_what_they_say(served: Served, what: calls.Calls) -> None:
    """Each user's requests are answered by the shipped models, and leave no session behind."""
    with seqserve.Client(f"127.0.0.1:{served.port}") as client:
        names = list(what(client, inputs.read(None), random.Random(2)))
        assert names
        assert len(names) == {"live_review": calls.PIECES + 3, "live_series": calls.PIECES + 3, "translate": 2}.get(what.__name__, 1)
        assert client.sessions() == []


def test_made_up_inputs_are_repeatable() -> None:
    """Without a directory the same inputs are made up each time, of real sets' lengths."""
    made = inputs.read(None)
    assert made == inputs.read(None)
    mean = sum(len(text.split()) for text in made.reviews) / len(made.reviews)
    assert abs(mean - inputs.REVIEW_WORDS) < 0.15 * inputs.REVIEW_WORDS


def test_missing_sets_are_named(tmp_path: Path) -> None:
    """A directory without the sets is refused by the name of the first that is missing."""
    with pytest.raises(FileNotFoundError, match="imdb"):
        inputs.read(tmp_path)


SHAPES = """
from loadtests.shapes import users
for shape in ("steady", "steps", "spikes"):
    print(*(users(shape, 40, at / 20) for at in range(20)))
"""


def test_shapes() -> None:
    """Steps climb to all users in five; spikes reach all users three times and go back to a quarter."""
    # In a process of its own: importing locust patches the standard library for gevent.
    ran = subprocess.run([sys.executable, "-c", SHAPES], cwd=ROOT, capture_output=True, text=True, check=True)
    steady, steps, spikes = ([int(n) for n in line.split()] for line in ran.stdout.splitlines())
    assert set(steady) == {40}
    assert sorted(set(steps)) == [8, 16, 24, 32, 40]
    assert steps == sorted(steps)
    assert set(spikes) == {10, 40}
    assert sum(before < after for before, after in pairwise(spikes)) == 3


def locust(served: Served, directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--host", f"127.0.0.1:{served.port}", "--headless", "--users", "2",
        "--run-time", "2", "--only-summary", "--html", str(directory / "report.html"), "--summary", str(directory / "summary.md"), *flags,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_closed_loop(served: Served, tmp_path: Path) -> None:
    """A short run of the mix ends well, with a report and a summary that has no failure."""
    ran = locust(served, tmp_path, "Mix")
    assert ran.returncode == 0, ran.stderr
    assert "No request failed." in (tmp_path / "summary.md").read_text()
    assert "| all |" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_open_loop_misses_a_threshold(served: Served, tmp_path: Path) -> None:
    """Arrivals that all wait longer than allowed fail the run, and the summary says which threshold was missed."""
    ran = locust(served, tmp_path, "Arrivals", "--rate", "10", "--of", "tensors", "--most-p99", "0.001")
    assert ran.returncode == 1, ran.stderr
    assert "threshold missed: tensors: p99" in ran.stderr
    assert "missed: tensors: p99" in (tmp_path / "summary.md").read_text()


def test_abuse_is_survived(served: Served) -> None:
    """A second of every kind of abuse, and the server answers on; none of the abusers failed at being one."""
    command = [sys.executable, "-m", "tests.figures.abuse", str(served.port), "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    for what in ("calls cancelled", "streams abandoned", "connections half-open", "refused RESOURCE_EXHAUSTED", "refused INVALID_ARGUMENT"):
        assert what in ran.stdout
    assert "failed" not in ran.stdout
    with seqserve.Client(f"127.0.0.1:{served.port}") as client:
        assert client.classify("A good film.").label == "positive"
    assert abuse.STORM > 1


def test_slope() -> None:
    """The slope is that of a line, a second."""
    assert watched.slope([(t, 3 + 0.5 * t) for t in range(10)]) == pytest.approx(0.5)
    assert watched.slope([(0.0, 1.0)]) == 0
