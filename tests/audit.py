"""`python -m tests.audit`, part of `make check`: known vulnerabilities of every pinned package, by pip-audit from PyPI's advisories.

Advisories need a network, and not everybody who checks has one. So what could not be looked up is said, with a number, and fails
nothing, unless `--strict` (`make audit`) asks for all of it; what has a known vulnerability fails always. One package is asked
about first: where even that can't be looked up, the others are not asked about one by one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.pins import pinned
from tests.process import ROOT

PROBE = "grpcio"
PLACE = ROOT / ".venv-audit"  # of its own: what pip-audit needs is none of ours
SECONDS = 300


@dataclass(frozen=True, slots=True)
class Audited:
    """Vulnerabilities, a line each; packages that were looked up, and those that could not be."""

    vulnerable: tuple[str, ...]
    asked: int
    unknown: tuple[str, ...]


def judged(report: str) -> Audited:
    """What pip-audit's JSON says. Raises ValueError where it is none."""
    vulnerable, unknown = [], []
    every = json.loads(report)["dependencies"]
    for one in every:
        if "skip_reason" in one:
            unknown.append(one["name"])
        for found in one.get("vulns", ()):
            mended = ", ".join(found["fix_versions"]) or "no release yet"
            vulnerable.append(f"{one['name']} {one['version']}: {found['id']}, mended in {mended}")
    return Audited(tuple(vulnerable), len(every) - len(unknown), tuple(unknown))


def tool() -> Path | None:
    """pip-audit, installed where it is not; None where it can't be had."""
    program = PLACE / "bin" / "pip-audit"
    if not program.exists():
        venv.create(PLACE, with_pip=True)
        command = [PLACE / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip-audit>=2.9"]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            return None
    return program


def audit(program: Path, pins: Sequence[str]) -> Audited:
    """Look these up. Raises ValueError where pip-audit gives no report, such as without a network."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        command = [program, "--requirement", file.name, "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"]
        try:
            done = subprocess.run([*command, "--timeout", "10"], capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f"pip-audit took more than {SECONDS} s") from None
    try:
        return judged(done.stdout)
    except (ValueError, KeyError):
        raise ValueError((done.stderr.strip() or "pip-audit said nothing").splitlines()[-1]) from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.audit", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--strict", action="store_true", help="fail where anything could not be looked up")
    strict = parser.parse_args(argv).strict
    versions, _ = pinned((ROOT / "constraints.txt").read_text())
    pins = [f"{name}=={version}" for name, version in versions.items()]
    program = tool()
    if program is None:
        print(f"audit: NOT DONE, pip-audit can't be installed here; 0 of {len(pins)} packages were looked up")
        return int(strict)
    try:
        found = audit(program, [f"{PROBE}=={versions[PROBE]}"])
        if found.asked or strict:
            found = audit(program, pins)
    except ValueError as e:
        print(f"audit: NOT DONE, 0 of {len(pins)} packages were looked up: {e}")
        return int(strict)
    for line in found.vulnerable:
        print(line)
    if not found.asked:
        print(f"audit: NOT DONE, no advisories can be reached from here; 0 of {len(pins)} packages were looked up")
    else:
        print(f"audit: {found.asked} of {len(pins)} packages looked up, {len(found.vulnerable)} known vulnerabilities")
        if found.unknown:
            print(f"not looked up: {', '.join(found.unknown)}")
    return int(bool(found.vulnerable) or (strict and bool(found.unknown)))


if __name__ == "__main__":
    sys.exit(main())
