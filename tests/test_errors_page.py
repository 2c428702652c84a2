"""docs/errors.md has every reason that the server can send, with the statuses it comes with, and none that it can't."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.process import ROOT
from tests.reasons import kinds, reasons

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
OURS = PAGE.partition("## What has no reason of ours")[0]
TOLD = dict(re.findall(r"^### (\w+)\n\n(.*?)(?=\n#|\Z)", OURS, re.MULTILINE | re.DOTALL))
SENT = reasons(sorted((ROOT / "server").rglob("*.py")))


def test_every_reason_is_told() -> None:
    """No reason without its entry, no entry without its reason."""
    assert {"QUEUE_FULL", "GAP", "MODEL_GONE", "RECORD_SHORT", "SESSION_MOVED", "TENANT_RATE", "STORE_UNREACHABLE"} <= SENT.keys()
    assert sorted(SENT.keys() - TOLD.keys()) == [], "docs/errors.md lacks these"
    assert sorted(TOLD.keys() - SENT.keys()) == [], "nothing in server/ sends these any more"


@pytest.mark.parametrize("reason", sorted(TOLD))
def test_statuses_and_what_to_do(reason: str) -> None:
    """An entry names just the statuses that its reason comes with, and says what to do for each way it may come."""
    told = set(re.findall(r"`([A-Z_]+)`", TOLD[reason])) & set(kinds().values())
    assert told == SENT[reason]
    assert "**Do:**" in TOLD[reason]


def test_every_mentioned_metric_and_flag_is_one() -> None:
    """Flags and metrics that the page names exist."""
    from dataclasses import fields

    from server.config import Config
    from server.metrics import TABLE

    flags = {f"--{f.name.replace('_', '-')}" for f in fields(Config)} | {"--api-key-file", "--tls-ca"}
    assert set(re.findall(r"`(--[a-z-]+)", PAGE)) <= flags
    assert set(re.findall(r"seqserve_\w+", PAGE)) <= {m.name for m in TABLE}


def test_a_reason_that_cannot_be_listed_is_told(tmp_path: Path) -> None:
    """The collector sees through functions that pass a reason on, and refuses what it can't see through."""
    file = tmp_path / "code.py"
    file.write_text(
        "def _refuse(kind: type[ServeError], reason, message):\n    return kind(reason, message)\n"
        "def _gone(reason):\n    raise Gone(reason, 'it went')\n"
        "_refuse(Conflict, 'A', '')\n_gone('B')\n"
    )
    assert reasons([file]) == {"A": {"FAILED_PRECONDITION"}, "B": {"FAILED_PRECONDITION"}}
    file.write_text("raise NotFound(str(7), 'x')\n")
    with pytest.raises(ValueError, match=r"code\.py:1: str\(7\) is no reason"):
        reasons([file])
