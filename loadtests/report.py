"""What came out: a summary in Markdown, and which thresholds were missed. Reads locust's statistics, starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from locust.stats import RequestStats, StatsEntry

import seqserve

ROWS = 12  # of the table over time


class Named(Exception):
    """A failure as it is counted: failures of equal text are one row in locust's table."""


def spelled(fault: Exception) -> str:
    """What went wrong without numbers that differ by call."""
    return f"{type(fault).__name__} {fault.reason}" if isinstance(fault, seqserve.Error) else f"{type(fault).__name__}: {fault}"


def faults(stats: RequestStats, most_failures: float, most_p99_ms: float) -> list[str]:
    """The thresholds that were missed; a run without a request has failed too."""
    missed = [] if stats.total.num_requests else ["no request was made"]
    if stats.total.fail_ratio > most_failures:
        missed.append(f"{stats.total.fail_ratio:.2%} of requests failed; allowed are {most_failures:.2%}")
    for entry in stats.entries.values() if most_p99_ms else ():
        p99 = entry.get_response_time_percentile(0.99)
        if p99 > most_p99_ms:
            missed.append(f"{entry.name}: p99 {p99:.0f} ms; allowed are {most_p99_ms:.0f}")
    return missed


def markdown(stats: RequestStats, source: str, missed: list[str]) -> str:
    """The run in three tables: by request, over time, by failure."""
    return (
        "\n".join([*_requests(stats, source), "", *_time(stats.history), "", *_failures(stats), *(f"- missed: {m}" for m in missed)]) + "\n"
    )


def _requests(stats: RequestStats, source: str) -> Iterator[str]:
    yield f"Inputs: {source}.\n"
    yield "| request | count | failed | a second | p50 ms | p95 ms | p99 ms | longest ms |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for entry in (*sorted(stats.entries.values(), key=lambda e: str(e.name)), stats.total):
        yield _row(entry)


def _row(entry: StatsEntry) -> str:
    p50, p95, p99 = (entry.get_response_time_percentile(p) for p in (0.5, 0.95, 0.99))
    name = "all" if entry.name == "Aggregated" else entry.name
    numbers = f"{entry.num_requests:,} | {entry.num_failures:,} | {entry.total_rps:.1f} | {p50:.0f} | {p95:.0f} | {p99:.0f}"
    return f"| {name} | {numbers} | {entry.max_response_time or 0:.0f} |"


def _time(history: list[dict[str, Any]]) -> Iterator[str]:
    """Every so many seconds: what locust noted of the ten seconds before."""
    yield "| time (UTC) | users | requests a second | failed a second | p50 ms | p95 ms | p99 ms |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for note in history[:: max(1, -(-len(history) // ROWS))]:
        values = [_value(note.get(key)) for key in ("user_count", "current_rps", "current_fail_per_sec")]
        values += [_value(note.get(f"response_time_percentile_{p}")) for p in (0.5, 0.95, 0.99)]
        yield f"| {str(note['time'])[11:19]} | {' | '.join(values)} |"


def _value(noted: Any) -> str:
    """Locust notes a number, or a pair of a time and a number."""
    number = noted[1] if isinstance(noted, (tuple, list)) else noted
    return "–" if number is None else f"{number:.0f}"


def _failures(stats: RequestStats) -> Iterator[str]:
    if stats.errors:
        yield "| request | failure | count |"
        yield "|---|---|---:|"
        for error in stats.errors.values():
            yield f"| {error.name} | {error.error} | {error.occurrences:,} |"
    else:
        yield "No request failed."
