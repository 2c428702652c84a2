"""The stories of live sessions once more, with states in banks: on a CPU, by the code that a GPU runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import Served, serve
from tests.test_turns import (  # noqa: F401  # found by pytest under these names
    library,
    test_a_fork_goes_its_own_way,
    test_one_stream_carries_many_sessions,
    test_unary_turns_make_the_whole,
    whole,
)


@pytest.fixture(scope="module", params=["1", "64"])
def served(request: pytest.FixtureRequest, library: Path) -> Iterator[Served]:  # noqa: F811
    """With rounds of one row, and of many."""
    flags = ("--state", "device", "--max-rows", request.param, "--chunk", "5", "--max-sessions", "200", "--resident-sessions", "40")
    with serve(library, *flags) as server:
        yield server
