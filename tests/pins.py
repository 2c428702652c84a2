"""`python -m tests.pins`, part of `make check`: every installed package is one of constraints.txt, at that version, and so is every
package that pyproject.toml names. So what `make audit` looks up is what is run, and nothing comes in unseen."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from tests.process import ROOT

OWN = {"seqserve", "pip", "setuptools", "wheel"}  # this project, and what puts packages there
EXCLUDED = {"onnxruntime-gpu"}  # in place of onnxruntime, on machines with a GPU; the same release
_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)(\s*;.*)?")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> tuple[dict[str, str], list[str]]:
    """Versions by name, and the lines that pin nothing."""
    pins, faults = {}, []
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        if found := _PIN.fullmatch(line):
            pins[plain(found[1])] = found[2]
        else:
            faults.append(f"constraints.txt: {line!r} is no NAME==VERSION")
    return pins, faults


def wanted(project: Mapping[str, Any]) -> set[str]:
    """Every package that the project names, in any extra."""
    about: dict[str, list[str]] = {"": project["dependencies"], **project["optional-dependencies"]}
    return {plain(found[0]) for listed in about.values() for line in listed if (found := _NAME.match(line))}


def faults(installed: Iterable[tuple[str, str]], constraints: str, project: Mapping[str, Any]) -> list[str]:
    pins, found = pinned(constraints)
    for name in sorted(wanted(project) - pins.keys() - EXCLUDED):
        found.append(f"pyproject.toml names {name}, constraints.txt does not: add it, and what it pulls in, at the version tested")
    for name, version in sorted((plain(n), v) for n, v in installed):
        if name not in OWN and pins.get(name) is None:
            found.append(f"{name} {version} is installed and not in constraints.txt")
        elif name not in OWN and pins[name] != version.partition("+")[0] and pins[name] != version:
            found.append(f"{name} {version} is installed, constraints.txt has {pins[name]}")
    return found


def main() -> int:
    installed = {(d.metadata["Name"], d.version) for d in metadata.distributions()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = faults(installed, (ROOT / "constraints.txt").read_text(encoding="utf-8"), project)
    print("\n".join(found) or f"{len(installed)} installed packages, all pinned")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
