"""`python -m protos` writes the stubs anew; `--check` compares them with what is committed."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "protos/inference.proto", "protos/inside.proto", "protos/model_config.proto", "protos/seqserve.proto", "protos/sessions.proto",
)  # fmt: skip
STUBS = tuple(source.removesuffix(".proto") + end for source in SOURCES for end in ("_pb2.py", "_pb2.pyi"))


def generate(out: Path) -> None:
    """Write the stubs of all sources under `out`. Needs grpcio-tools and mypy-protobuf (the dev extra)."""
    from grpc_tools import protoc

    plugin = Path(sys.executable).with_name("protoc-gen-mypy")
    arguments = ["protoc", f"-I{ROOT}", f"--plugin=protoc-gen-mypy={plugin}", f"--python_out={out}", f"--mypy_out=quiet:{out}"]
    if protoc.main([*arguments, *SOURCES]):
        raise SystemExit("protoc failed: its message is above")


def stale() -> list[str]:
    """The committed stubs that differ from what the sources give."""
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        return [stub for stub in STUBS if (Path(directory) / stub).read_bytes() != (ROOT / stub).read_bytes()]


if __name__ == "__main__":
    if "--check" in sys.argv:
        if differing := stale():
            sys.exit(f"stale stubs: {', '.join(differing)}: run make protos")
        print("stubs are as the .proto files say")
    else:
        generate(ROOT)
