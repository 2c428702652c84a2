"""`seqserve inspect FILE`: what an ONNX file would be served as, and the bundle.json to start from where that is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from contract.bundle import BundleError
from contract.propose import describe
from server import dropin

EPILOG = """
examples:
  seqserve inspect model.onnx                              how it would be served, and what is in doubt
  seqserve inspect model.onnx --json > bundle.json         to be edited and put beside it
  seqserve inspect voice.onnx --window 576 --json          a turn is one window of 576 samples

A file in MODELS/NAME/1/ is served as shown here; a bundle.json beside it wins.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the proposal: 0, 1 where it can't be served as it is, 2 where there is no such file."""
    words = argparse.ArgumentParser(
        prog="seqserve inspect", description="See what an ONNX file would be served as.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("file", type=Path, help="an ONNX file")
    words.add_argument("--json", action="store_true", help="print a bundle.json")
    words.add_argument("--name", help="the model's name in bundle.json (default: the directory's or the file's)")
    words.add_argument(
        "--window", type=int, default=0, metavar="N", help="samples or frames of one turn, where a model takes fixed windows"
    )
    asked = words.parse_args(argv)
    if asked.window < 0:
        words.error("--window: a number from 1")
    if not asked.file.is_file():
        print(f"seqserve inspect: no file {str(asked.file)!r}", file=sys.stderr)
        return 2
    try:
        proposal = dropin.understand(asked.file, asked.window)
    except BundleError as e:
        print(f"seqserve inspect: {e}", file=sys.stderr)
        return 1
    if asked.json:
        print(dropin.as_bundle(asked.name or _name(asked.file), asked.file, proposal).to_json(), end="")
        for said in (*proposal.remarks, *proposal.faults):
            print(said, file=sys.stderr)
    else:
        print("\n".join(describe(proposal)))
        if proposal.faults:
            print(dropin.TODO.format(asked.file))
    return 1 if proposal.faults else 0


def _name(file: Path) -> str:
    """NAME of NAME/VERSION/model.onnx, else the file's own."""
    where = file.resolve().parent
    return where.parent.name if where.name.isdecimal() and where.parent.name else file.stem


if __name__ == "__main__":
    sys.exit(main())
