"""`python -m export RUN --out DIR`, also `seqserve export`: from a checkpoint to a bundle that can be served.

It knows the order of things: graphs, proof, resources, card, and the description last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export import convert

EPILOG = """
examples:
  python -m export runs/sentiment --out models/sentiment/1
  python -m export runs/sentiment --out models/sentiment/2 --precision float16-weights
  python -m export runs/sentiment --out models/sentiment/2 --scores quality.json   test figures into the model card

Each graph is run by the server's own runner and compared with PyTorch; where they differ nothing is exported.
"""


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="seqserve export", description="Export a training run as a bundle.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("run", type=Path, help="directory of a training run, with its checkpoint.pt")
    words.add_argument("--out", type=Path, required=True, help="directory of the bundle, such as models/NAME/VERSION")
    words.add_argument("--name", help="the model's name when served (default: the directory above --out, or the task)")
    words.add_argument(
        "--precision", choices=["float32", *convert.ALLOWED], default="float32", help="see seqserve convert --help (default: float32)"
    )
    words.add_argument("--scores", type=Path, help="JSON of the quality command, for the model card")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; 0 when done, 1 when something is missing or the proof fails (the reason is printed)."""
    asked = parser().parse_args(arguments)

    import torch  # seconds to import: not before the command line is known to be right

    from contract import bundle as bundles
    from export import bundling, verify

    torch.set_num_threads(1)
    name = asked.name or (asked.out.parent.name if asked.out.name.isdigit() else None)
    try:
        made = bundling.export(asked.run, asked.out, name, asked.scores, asked.precision)
    except FileNotFoundError as e:
        print(f"seqserve export: {e}; train first, see seqserve train --help", file=sys.stderr)
        return 1
    except verify.VerifyError as e:
        print(f"seqserve export: the graphs differ from PyTorch, or from float32 by too much; nothing was exported\n{e}", file=sys.stderr)
        return 1
    except (bundles.BundleError, KeyError, ValueError, OSError) as e:
        print(f"seqserve export: {e}", file=sys.stderr)
        return 1
    for graph, proof in made.verified.items():
        proof = proof if "cases" in proof else proof["float32"]
        print(f"{graph}: {proof['cases']} cases, largest error {proof['largest_error']:.1e}, " + bundling.verdict(proof))
    size = sum(f.stat().st_size for f in asked.out.iterdir()) / 1e6
    print(f"{made.name}: {asked.out} ({size:.1f} MB), {made.fingerprint[:19]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
