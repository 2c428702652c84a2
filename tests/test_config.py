"""The server's knobs: what each may be, told before anything is opened."""

from __future__ import annotations

import math

import pytest

from server.config import AUTO, MEASURED, Config

WRONG = {
    ("--session-ttl", "nan"): "--session-ttl must be above 0",
    ("--session-ttl", "inf"): "at most 1e+09",
    ("--measure-seconds", "inf"): "--measure-seconds must be above 0",
    ("--keepalive", "nan"): "--keepalive must be above 0",
    ("--keys-interval", "nan"): "--keys-interval must not be negative",
    ("--drain-seconds", "inf"): "--drain-seconds must not be negative",
    ("--max-wait", "nan"): "--max-wait must not be negative",
    ("--standing-wait", "-1"): "--standing-wait must not be negative",
    ("--workers", "100000"): "--workers must be at most 1024",
    ("--rpc-processes", "100000"): "--rpc-processes must be at most 1024",
    ("--max-rows", "foo"): "auto, measured or a whole number from 1, got 'foo'",
    ("--chunk", "0"): "auto, measured or a whole number from 1, got '0'",
    ("--otlp", "nonsense"): "--otlp must be http://HOST:PORT",
    ("--otlp", "ftp://collector:4317"): "got 'ftp://collector:4317'",
    ("--otlp", "http://"): "got 'http://'",
    ("--otlp", "collector:port"): "got 'collector:port'",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named with what is allowed; a variable says the same as its flag."""
    variable = {"SEQSERVE_" + flags[0][2:].upper().replace("-", "_"): flags[1]}
    for argv, environment in (([f"{flags[0]}={flags[1]}"], {}), ([], variable)):
        with pytest.raises(SystemExit, match="2"):
            Config.parse(argv, environment)
        assert WRONG[flags] in capsys.readouterr().err


def test_what_may_be_said() -> None:
    """Words for a size, waits without end, and the ways to name a collector."""
    found = Config.parse(["--max-rows", "measured", "--chunk", "auto", "--max-wait", "inf", "--standing-wait", "inf"], {})
    assert (found.max_rows, found.chunk, found.max_wait, found.standing_wait) == (MEASURED, AUTO, math.inf, math.inf)
    for collector in ("http://localhost:4317", "https://collector", "collector:4317", "http://[::1]:4317"):
        assert Config.parse(["--otlp", collector], {}).otlp == collector
