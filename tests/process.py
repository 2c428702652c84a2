"""A real server in a process of its own, on a real port."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

ROOT = Path(__file__).resolve().parent.parent
FRONTS = {"direct": ("--front", "direct"), "public": ("--front", "public"), "relayed": ("--rpc-processes", "1")}
"""How calls may be carried, as flags: whatever it is, callers must not see a difference."""


class Served:
    """A running server: where it listens, what it logged, and plain calls to it."""

    def __init__(self, process: subprocess.Popen[str], port: int, metrics_port: int, log: list[str]) -> None:
        self.process = process
        self.port = port
        self.metrics_port = metrics_port
        self.log = log
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.max_receive_message_length", -1)])

    def method(self, name: str, answer: type[Message] | None = None) -> grpc.UnaryUnaryMultiCallable:
        """A unary method by its full name; requests are messages, or bytes to send as they are."""
        return self.channel.unary_unary(name, _bytes, answer.FromString if answer else None)

    def stream(self, name: str, answer: type[Message]) -> grpc.UnaryStreamMultiCallable:
        return self.channel.unary_stream(name, _bytes, answer.FromString)

    def terminate(self) -> int:
        """SIGTERM, and wait for the end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def _bytes(request: Message | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


@contextmanager
def running(command: list[str], root: Path, ready: str) -> Iterator[tuple[subprocess.Popen[str], re.Match[str], list[str]]]:
    """Start a process and wait until its log has a line like `ready`: the process, that line, and its log as it grows; end it
    afterwards, whatever happened."""
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    log: list[str] = []
    found = None
    for line in process.stderr:
        log.append(line)
        if found := re.search(ready, line):
            break
    if found is None:
        process.stderr.close()
        process.wait()
        raise AssertionError(f"{' '.join(command[1:3])} did not start: {''.join(log)}")
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        yield process, found, log
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


@contextmanager
def serve(models: Path, *flags: str, root: Path = ROOT) -> Iterator[Served]:
    """`python -m server` of this checkout, or of another at `root`, once it serves."""
    command = [sys.executable, "-m", "server", "--models", str(models), "--port", "0", "--metrics-port", "0", "--workers", "2", *flags]
    with running(command, root, r"serving \d+ models on \S+:(\d+) \(metrics (\S+)\)") as (process, found, log):
        served = Served(process, int(found[1]), int(found[2]), log)
        try:
            yield served
        finally:
            served.channel.close()


class Web:
    """A running HTTP face: where it listens, and what it logged."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: list[str]) -> None:
        self.process, self.port, self.log = process, port, log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def terminate(self) -> int:
        """SIGTERM, and wait for the end; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def web(target: str, *flags: str) -> Iterator[Web]:
    """`python -m web` before the server at `target`, once it listens."""
    command = [sys.executable, "-m", "web", "--target", target, "--port", "0", *flags]
    with running(command, ROOT, r"serving \S+ on https?://\S+:(\d+)") as (process, found, log):
        yield Web(process, int(found[1]), log)


def reason(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, dict[str, str], float | None]:
    """An error's status, reason, facts and the delay to retry after, from its google.rpc.Status."""
    trailing = dict(error.trailing_metadata() or ())
    status = Status.FromString(trailing["grpc-status-details-bin"])
    assert status.message == error.details()
    assert status.code == error.code().value[0]
    info, retry = ErrorInfo(), RetryInfo()
    delay = None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            delay = retry.retry_delay.ToNanoseconds() / 1e9
    assert info.domain == "seqserve"
    return error.code(), info.reason, dict(info.metadata), delay
