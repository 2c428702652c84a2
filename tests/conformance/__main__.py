"""`python -m tests.conformance --url HOST:PORT`: every case against a running server, and with --examples DIR the protocol's
published client examples too. Ends with status 1 where one fails."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.conformance import (
    cases_errors,
    cases_http,
    cases_infer,
    cases_memory,
    cases_perf,
    cases_repository,
    cases_sequences,
    cases_server,
    cases_streams,
)
from tests.conformance.case import CASES, Case, NotOffered, Server
from tests.conformance.examples import run_examples

ORDER = [
    module.__name__
    for module in (
        cases_server, cases_infer, cases_errors, cases_sequences, cases_streams, cases_memory, cases_http, cases_perf, cases_repository,
    )
]  # fmt: skip
PASS, FAIL, ABSENT = "PASS", "FAIL", "not offered"


def outcome(case: Case, server: Server) -> tuple[str, str]:
    """PASS, FAIL or not offered, and why."""
    try:
        if missing := [model for model in case.needs if not server.has(model)]:
            return ABSENT, f"no model {', '.join(missing)}"
        case.run(server)
    except NotOffered as e:
        return ABSENT, str(e)
    except Exception as e:  # whatever a case raises is its finding
        return FAIL, f"{type(e).__name__}: {e}"
    return PASS, ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", required=True, help="HOST:PORT of a server with the models of tests.conformance.models")
    parser.add_argument("--http", default="", help="HOST:PORT of its REST face")
    parser.add_argument("--examples", type=Path, help="directory of tritonclient's published examples, to be run unchanged")
    parser.add_argument("--only", action="append", default=[], help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each outcome")
    parser.add_argument("--markdown", type=Path, help="write the outcomes here as well")
    options = parser.parse_args()

    def outcomes() -> Iterator[tuple[str, str, str, str]]:
        server = Server(options.url, options.http)
        for case in sorted(CASES, key=lambda c: ORDER.index(c.run.__module__)):
            if not options.only or any(part in case.name for part in options.only):
                yield (case.name, case.says, *outcome(case, server))
        if options.examples:
            yield from run_examples(options.examples, options.url, options.http)

    found = []
    for name, says, how, why in outcomes():
        found.append((name, says, how, why))
        print(json.dumps([name, how, why]) if options.json else f"{how:12} {name}{f'   {why}' if why else ''}", flush=True)
    counts = Counter(how for _, _, how, _ in found)
    if options.markdown:
        rows = [f"|{name}|{says}|{how}|{_flat(why)}|" for name, says, how, why in found]
        options.markdown.write_text("\n".join(["|case|what the protocol says|outcome|why|", "|---|---|---|---|", *rows]) + "\n")
    if not options.json:
        print("conformance · " + " · ".join(f"{counts[how]} {how}" for how in (PASS, FAIL, ABSENT)))
    return 1 if counts[FAIL] else 0


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


if __name__ == "__main__":
    sys.exit(main())
