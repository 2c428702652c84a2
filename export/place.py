"""Finished files take their place. It knows directories and the order of files, nothing of models."""

from __future__ import annotations

from pathlib import Path

from contract import bundle as bundles


def move(made: Path, out: Path) -> None:
    """Put finished files in place: an earlier bundle.json goes first and the new one comes last, so that at no moment the
    description in `out` speaks of files that are not all there."""
    out.mkdir(exist_ok=True)
    (out / bundles.FILE).unlink(missing_ok=True)
    for file in sorted(made.iterdir(), key=lambda f: f.name == bundles.FILE):
        file.replace(out / file.name)
