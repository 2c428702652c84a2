"""Every knob of the server, with its reason. One frozen object, from flags and SEQSERVE_* in the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from server.devices import parse
from server.records import LONGEST

Count = int
"""A whole number, or in words how it is found: these two."""
AUTO, MEASURED = 0, -1

MOST = 1024  # threads or processes: of more the system may refuse some after all


def _knob(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How a server is set up. Each field is a flag (--max-rows) and a variable (SEQSERVE_MAX_ROWS); flags win."""

    models: Path = _knob(Path("models"), "directory of bundles: NAME/VERSION/bundle.json")
    host: str = _knob("127.0.0.1", "address to listen on; 0.0.0.0 to be reached from other machines")
    port: int = _knob(8001, "gRPC port; 0 takes a free one")
    port_file: Path | None = _knob(None, "write the gRPC port into this file once ready, for those who start us with --port 0")
    metrics_port: int = _knob(8002, "Prometheus port (HTTP, /metrics); 0 takes a free one, -1 turns it off")
    workers: int = _knob(min(os.cpu_count() or 1, MOST), "threads that run rounds; one per core, onnxruntime itself uses one thread each")
    device: str = _knob(
        "cpu", "where rounds run: cpu, cuda, cuda:1, cuda:0,cuda:1; auto: a GPU where there is one, else the CPU with a warning"
    )
    state: str = _knob(
        "auto", "where states lie between rounds: host, in this process's memory; device, in banks on the device; auto: device on a GPU"
    )
    device_state_mb: int = _knob(
        1024, "MiB of state that each graph keeps on its device at most; what is beyond lies in this process's memory"
    )
    row_buckets: bool = _knob(False, "with states on the device, make rounds up to few sizes, where setting up each new one shows")
    cuda_graphs: bool = _knob(False, "run rounds of one step as CUDA graphs where they can be captured; checked at load, docs/gpu.md")
    tf32: bool = _knob(False, "let a GPU round factors of float32 products to 10 bits: faster, and beyond what most bundles promise")
    max_rows: Count = _knob(
        AUTO, "rows of one round; past 32 the cost a row is flat on a CPU and rounds only get longer. auto: 64 on a CPU, measured on a GPU"
    )
    chunk: Count = _knob(
        AUTO, "time steps of one round; the most that a newcomer waits behind a long sequence. auto: 32, or measured likewise"
    )
    measure_seconds: float = _knob(0.5, "what measuring a model may take at load, where --max-rows or --chunk is measured")
    measured: Path | None = _knob(None, "file that keeps what was measured, so that the next start need not")
    max_queue: int = _knob(1024, "requests waiting or running per model; more are refused with a time to retry after")
    max_wait: float = _knob(10.0, "seconds that what waits for a model may take; more is refused with a time to retry after")
    standing_wait: float = _knob(1.0, "the same where more has waited for over a second: a burst is let in, lasting overload is not")
    max_request_rows: int = _knob(256, "rows that one tensor request may bring")
    store: str = _knob("memory", "where sessions survive: memory, lmdb:PATH, redis://HOST:PORT")
    durability: str = _knob(
        "process", "what an answered turn survives: none, process (kill -9), disk (a power cut); memory survives nothing"
    )
    max_sessions: int = _knob(100_000, "sessions open at once; one more is refused with a time to retry after")
    resident_sessions: int = _knob(20_000, "sessions in memory; those unused longest leave it for the store, unnoticed")
    session_ttl: float = _knob(3600.0, "seconds a session lives after its last turn, where its caller names none")
    move_sessions: str = _knob(
        "never", "when a new version is loaded: never, sessions finish on theirs; compatible, they go on with it if its states agree"
    )
    max_message_bytes: int = _knob(16 << 20, "size of one message; larger ones are refused")
    allow_shared_memory: bool = _knob(False, "let callers on this machine register POSIX shared memory and name it in place of bytes")
    server_name: str = _knob("seqserve", "what ServerMetadata says; clients written for another server may look for its name")
    front: str = _knob("auto", "how calls are carried: direct (our own HTTP/2, least CPU) or public (grpcio's server); auto is direct")
    rpc_processes: int = _knob(0, "processes that carry calls to this one, for machines with many cores; 0: this one does it itself")
    drain_seconds: float = _knob(30.0, "how long a stopping server waits for running requests")
    tls_cert: Path | None = _knob(None, "PEM certificate chain; with --tls-key, calls are encrypted")
    tls_key: Path | None = _knob(None, "PEM private key of --tls-cert")
    tls_client_ca: Path | None = _knob(None, "PEM authority that clients' certificates must come from (mutual TLS)")
    keys: Path | None = _knob(None, "TOML file of hashed keys, their tenants, roles, quotas (docs/security.md); without it anyone may call")
    keys_interval: float = _knob(10.0, "seconds between looks at whether --keys has changed; 0 for SIGHUP only")
    reflection: bool = _knob(True, "let callers ask which services and messages there are; health needs no key either way")
    keepalive: float = _knob(30.0, "seconds of silence after which a connection is asked whether anyone is there, and 20 s later given up")
    connection_streams: int = _knob(10_000, "calls of one connection at once, further ones wait at the caller; 0 is no limit")
    log_level: str = _knob("info", "debug, info, warning or error")
    log_format: str = _knob("text", "text for people, or json: an object a line")
    otlp: str = _knob("", "send traces to this OpenTelemetry collector, such as http://localhost:4317; needs seqserve[otel]")
    access_log: bool = _knob(False, "log a line per call: method, peer, status, times")

    def __post_init__(self) -> None:
        least: Mapping[str, int] = {
            "workers": 1, "max_rows": MEASURED, "chunk": MEASURED, "device_state_mb": 1, "max_queue": 1, "max_request_rows": 1,
            "max_sessions": 1, "resident_sessions": 1, "max_message_bytes": 1024, "port": 0, "connection_streams": 0, "rpc_processes": 0,
            "metrics_port": -1,
        }  # fmt: skip
        faults = [f"--{_flag(name)} must be at least {low}" for name, low in least.items() if getattr(self, name) < low]
        most = {"port": 65535, "metrics_port": 65535, "workers": MOST, "rpc_processes": MOST}
        faults += [f"--{_flag(name)} must be at most {high}" for name, high in most.items() if getattr(self, name) > high]
        for name in ("measure_seconds", "keepalive", "session_ttl"):
            if not 0 < getattr(self, name) <= LONGEST:
                faults.append(f"--{_flag(name)} must be above 0, and at most {LONGEST:g}")
        for name in ("keys_interval", "drain_seconds"):
            if not 0 <= getattr(self, name) <= LONGEST:
                faults.append(f"--{_flag(name)} must not be negative, and at most {LONGEST:g}")
        for name in ("max_wait", "standing_wait"):  # `inf` is as long as it takes
            if not getattr(self, name) >= 0:
                faults.append(f"--{_flag(name)} must not be negative")
        try:
            parse(self.device)
        except ValueError as e:
            faults.append(str(e))
        if self.state not in ("auto", "host", "device"):
            faults.append("--state must be auto, host or device")
        if self.move_sessions not in ("never", "compatible"):
            faults.append("--move-sessions must be never or compatible")
        if self.front not in ("auto", "direct", "public"):
            faults.append("--front must be auto, direct or public")
        if self.log_level not in ("debug", "info", "warning", "error"):
            faults.append("--log-level must be debug, info, warning or error")
        if self.log_format not in ("text", "json"):
            faults.append("--log-format must be text or json")
        if self.otlp and not _collector(self.otlp):
            faults.append(f"--otlp must be http://HOST:PORT, https://HOST:PORT or HOST:PORT, got {self.otlp!r}")
        if (self.tls_cert is None) != (self.tls_key is None):
            faults.append("--tls-cert and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            faults.append("--tls-client-ca needs --tls-cert and --tls-key")
        if faults:
            raise ValueError("; ".join(faults))

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Config:
        """From the command line and the environment; ends the process with usage help on a fault."""
        parser = argparse.ArgumentParser(
            prog="seqserve serve",
            description="Serve ONNX sequence models over gRPC.",
            epilog="example: seqserve serve --models models --port 8001",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for f in fields(cls):
            assert f.default is not MISSING
            kind = _kind(str(f.type))
            given = environment.get("SEQSERVE_" + f.name.upper())
            help = f"{f.metadata['help']} (default: {'auto' if kind is _count else f.default})"
            options: dict[str, Any] = {"default": f.default if given is None else given, "help": help}
            if kind is bool:
                options["default"] = f.default if given is None else given.lower() in ("1", "true", "yes")
                parser.add_argument(f"--{_flag(f.name)}", action=argparse.BooleanOptionalAction, **options)
            else:
                parser.add_argument(f"--{_flag(f.name)}", type=kind, **options)
        values = parser.parse_args(argv)
        try:
            return cls(**vars(values))
        except ValueError as e:
            parser.error(str(e))


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _count(text: str) -> int:
    """`auto`, `measured` or a whole number from 1 on."""
    words = {"auto": AUTO, "measured": MEASURED}
    if text in words:
        return words[text]
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be auto, measured or a whole number from 1, got {text!r}")
    return int(text)


def _collector(text: str) -> bool:
    """Whether a collector can be reached there: http://HOST:PORT, https://HOST:PORT or HOST:PORT."""
    try:
        url = urlsplit(text if "://" in text else f"https://{text}")
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port is not None or "://" in text)
    except ValueError:
        return False


def _kind(annotation: str) -> Any:
    return {"int": int, "Count": _count, "float": float, "bool": bool, "str": str}.get(annotation, Path)
