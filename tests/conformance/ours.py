"""The suite against our own server, started for it: `make conformance`, with EXAMPLES=DIR the published client examples too, each
on a server of its own state. Writes docs/conformance.md with --write."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path

from tests.conformance.models import write
from tests.process import ROOT, serve, web

FLAGS = ("--allow-shared-memory", "--server-name", "triton")  # a published example insists on that name


def suite(directory: Path, *more: str) -> list[tuple[str, str, str]]:
    """Name, outcome and why of every case, from a process of its own. Raises RuntimeError where the suite itself fails."""
    write(directory / "models")
    with serve(directory / "models", *FLAGS) as served, web(f"127.0.0.1:{served.port}") as face:
        asked = ["--url", f"127.0.0.1:{served.port}", "--http", f"127.0.0.1:{face.port}"]
        command = [sys.executable, "-m", "tests.conformance", *asked, "--json", *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(done.stderr[-3000:])
    found = []
    for line in done.stdout.splitlines():
        name, how, why = json.loads(line)
        found.append((str(name), str(how), str(why)))
    return found


def kserve(directory: Path, python: str) -> int:
    """KServe's REST client, which pins packages that ours are newer than, in its own environment; its exit status."""
    write(directory / "models")
    with serve(directory / "models", *FLAGS) as served, web(f"127.0.0.1:{served.port}") as face:
        return subprocess.run([python, str(ROOT / "tests" / "conformance" / "kserve_rest.py"), face.url]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="make conformance", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--examples", type=Path, help="src/python/examples of a checkout of triton-inference-server/client")
    parser.add_argument("--only", action="append", default=[], help="cases whose name contains this")
    parser.add_argument("--write", action="store_true", help="write docs/conformance.md")
    parser.add_argument("--kserve", metavar="PYTHON", help="one that has kserve: its REST client's cases, instead of ours")
    options = parser.parse_args()
    if options.kserve:
        with tempfile.TemporaryDirectory() as directory:
            return kserve(Path(directory), options.kserve)
    more = [word for part in options.only for word in ("--only", part)]
    if options.examples:
        more += ["--examples", str(options.examples.resolve())]
    with tempfile.TemporaryDirectory() as directory:
        found = suite(Path(directory), *more)
    for name, how, why in found:
        print(f"{how:12} {name}{f'   {why}' if why else ''}")
    counts = Counter(how for _, how, _ in found)
    said = " · ".join(f"{counts[how]} {how}" for how in ("PASS", "FAIL", "not offered"))
    if options.write:
        rows = [f"|{name}|{how}|{' '.join(why.split()).replace('|', chr(92) + '|')[:200]}|" for name, how, why in found]
        text = [
            "# Conformance", "", f"`make conformance EXAMPLES=DIR`, {date.today().isoformat()}, tritonclient 2.73: {said}.",
            "Models and what ONNX can't be of them: `tests/conformance/models.py`. Examples: src/python/examples of "
            "github.com/triton-inference-server/client, unchanged.", "", "|case|outcome|why|", "|---|---|---|", *rows,
        ]  # fmt: skip
        (ROOT / "docs" / "conformance.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"conformance · {said}")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
