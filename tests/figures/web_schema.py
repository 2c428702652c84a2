"""`make web-schema`: requests made from /openapi.json by schemathesis, good ones and bad ones, against a server with the shipped models
and its HTTP face. What may come back is in the document; how it is judged, and why, in tests/schemathesis.toml."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.process import ROOT, serve, web

COMMAND = str(Path(sys.executable).with_name("schemathesis"))


@dataclass(frozen=True, slots=True)
class Outcome:
    code: int  # 0: clean
    requests: int
    said: str  # schemathesis's own words
    faults: str  # what the face logged as its own fault


def run(examples: int, phases: str, seed: int, *more: str) -> Outcome:
    """`examples` of each operation, in these phases (coverage: the edges of each schema; fuzzing: at random; stateful: in sequences)."""
    with serve(ROOT / "models", "--allow-shared-memory") as served, web(f"127.0.0.1:{served.port}") as face:
        asked = ["--max-examples", str(examples), "--phases", phases, "--seed", str(seed), "--workers", "2", "--no-color", *more]
        command = [COMMAND, "--config-file", "tests/schemathesis.toml", "run", f"{face.url}/openapi.json", *asked]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if face.process.poll() is not None or served.process.poll() is not None:
            raise RuntimeError("a process ended: " + "".join([*face.log, *served.log])[-3000:])
        faults = "".join(line for line in face.log if "ERROR" in line or "Traceback" in line)
    found = re.search(r"([\d,]+) generated", done.stdout)
    return Outcome(done.returncode, int(found[1].replace(",", "")) if found else 0, done.stdout + done.stderr, faults)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make web-schema", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phases", default="coverage,fuzzing,stateful")
    options = parser.parse_args()
    outcome = run(options.examples, options.phases, options.seed)
    if outcome.code or outcome.faults:
        print(outcome.said, outcome.faults)
    print(f"web-schema · {outcome.requests} requests · {'clean' if not outcome.code and not outcome.faults else 'FAULTS'}")
    return 1 if outcome.code or outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
