"""perf_analyzer runs unchanged. Not offered where its binary is not at hand; `make bench` fetches it."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.conformance.case import NotOffered, Server, case, same


def _run(server: Server, model: str, *options: str) -> None:
    """Forty calls a window, however long that takes on a busy machine, and a report that counts them."""
    binary, environment = _binary()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "report.csv"
        command = [
            binary, "-m", model, "-u", server.url, "-i", "grpc", "-f", str(file), "--measurement-mode", "count_windows",
            "--measurement-request-count", "40", "--max-trials", "3", "--stability-percentage", "999", *options,
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100)
        if done.returncode or not file.exists():
            raise AssertionError(done.stdout[-500:])
        with file.open() as lines:
            same(float(next(csv.DictReader(lines))["Inferences/Second"]) > 0, True)


def _binary() -> tuple[str, dict[str, str]]:
    venv = Path(__file__).resolve().parents[2] / ".venv-bench"
    if (venv / "done").exists():
        libraries = [*venv.glob("lib/python3*/site-packages/nvidia/cuda_runtime/lib"), *(p.parent for p in venv.rglob("libb64.so.0d"))]
        path = ":".join([*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")])
        return str(venv / "bin" / "perf_analyzer"), {**os.environ, "LD_LIBRARY_PATH": path}
    if found := shutil.which("perf_analyzer"):
        return found, dict(os.environ)
    raise NotOffered("perf_analyzer is not at hand")


@case("simple")
def unary_calls(server: Server) -> None:
    """Asynchronous unary calls of several callers."""
    _run(server, "simple", "--async", "--concurrency-range", "4")


@case("simple")
def calls_on_streams(server: Server) -> None:
    """The same through ModelStreamInfer."""
    _run(server, "simple", "--async", "--streaming", "--concurrency-range", "4")


@case("simple")
def batches(server: Server) -> None:
    """Several rows a call."""
    _run(server, "simple", "-b", "4", "--concurrency-range", "2")


@case("simple_string")
def texts(server: Server) -> None:
    """BYTES, as texts of a number."""
    _run(server, "simple_string", "--string-data", "7", "--concurrency-range", "2")


@case("simple_sequence")
def sequences(server: Server) -> None:
    """Sequences over unary calls."""
    _run(server, "simple_sequence", "--concurrency-range", "4")


@case("simple_sequence")
def sequences_on_streams(server: Server) -> None:
    """Sequences over ModelStreamInfer."""
    _run(server, "simple_sequence", "--async", "--streaming", "--concurrency-range", "4")
