"""Every knob of the web process, with its reason. One frozen object, from flags and SEQSERVE_WEB_* in the environment."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from seqserve import access

LONGEST = 1e9  # seconds of anything: beyond, what waits can't count them


def _knob(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How the web process is set up. Each field is a flag (--max-body-bytes) and a variable (SEQSERVE_WEB_MAX_BODY_BYTES); flags win."""

    target: str = _knob("localhost:8001", "the server behind, HOST:PORT of its gRPC port")
    host: str = _knob("127.0.0.1", "address to listen on; 0.0.0.0 to be reached from other machines")
    port: int = _knob(8000, "HTTP port; 0 takes a free one")
    port_file: Path | None = _knob(None, "write the HTTP port into this file once ready, for those who start us with --port 0")
    timeout: float = _knob(60.0, "seconds that a call to the server may take, where its caller names none (x-request-timeout)")
    max_timeout: float = _knob(600.0, "the longest that a caller may name, in seconds")
    max_body_bytes: int = _knob(16 << 20, "size of a request's body, also after it is decompressed; larger ones are refused")
    max_head_bytes: int = _knob(32 << 10, "size of a request's line and headers together, and of its trailers")
    head_seconds: float = _knob(10.0, "how long a request's headers may take to arrive")
    body_seconds: float = _knob(30.0, "how long a request's body may take to arrive")
    idle_seconds: float = _knob(75.0, "how long a connection may stay open between requests")
    write_seconds: float = _knob(30.0, "how long a reader may leave what was sent unread before its connection is cut")
    max_connections: int = _knob(2048, "connections at once; further ones are told to come back")
    allow_origin: str = _knob("", "origins, separated by commas, whose pages may call from a browser, beside our own; * is all")
    allow_host: str = _knob(
        "", "hosts, separated by commas, that requests may name; *: any; empty: any, or ours alone on a loopback --host"
    )
    drain_seconds: float = _knob(20.0, "how long a stopping process waits for running requests")
    tls_cert: Path | None = _knob(None, "PEM certificate chain to be served with (HTTPS), with --tls-key")
    tls_key: Path | None = _knob(None, "PEM private key of --tls-cert")
    target_tls: bool = _knob(False, "encrypt calls to the server, with the authorities that this machine trusts")
    target_ca: Path | None = _knob(None, "PEM authority that the server's certificate must come from; calls are encrypted")
    target_cert: Path | None = _knob(None, "PEM certificate to show the server (mutual TLS), with --target-key")
    target_key: Path | None = _knob(None, "PEM private key of --target-cert")
    api_key_file: Path | None = _knob(None, "key to show the server for callers that bring none: they all are its tenant then")
    docs: bool = _knob(True, "serve /openapi.json")
    log_level: str = _knob("info", "debug, info, warning or error")
    access_log: bool = _knob(False, "log a line per request")

    def __post_init__(self) -> None:
        least = {"port": 0, "max_body_bytes": 1024, "max_head_bytes": 1024, "max_connections": 1}
        faults = [f"--{_flag(name)} must be at least {low}" for name, low in least.items() if getattr(self, name) < low]
        if self.port > 65535:
            faults.append("--port must be at most 65535")
        spans = ("timeout", "max_timeout", "head_seconds", "body_seconds", "idle_seconds", "write_seconds")
        faults += [f"--{_flag(name)} must be above 0, and at most {LONGEST:g}" for name in spans if not 0 < getattr(self, name) <= LONGEST]
        if not 0 <= self.drain_seconds <= LONGEST:
            faults.append(f"--drain-seconds must not be negative, and at most {LONGEST:g}")
        if self.log_level not in ("debug", "info", "warning", "error"):
            faults.append("--log-level must be debug, info, warning or error")
        if (self.tls_cert is None) != (self.tls_key is None):
            faults.append("--tls-cert and --tls-key go together")
        if (self.target_cert is None) != (self.target_key is None):
            faults.append("--target-cert and --target-key go together")
        for origin in self.origins - {"*"}:
            scheme, separator, rest = origin.partition("://")
            if not separator or scheme not in ("http", "https") or not rest or "/" in rest or origin != origin.lower():
                faults.append(f"--allow-origin: {origin!r} is no origin: scheme://host or scheme://host:port, in lower case")
        if faults:
            raise ValueError("; ".join(faults))

    @property
    def origins(self) -> frozenset[str]:
        return frozenset(o.strip() for o in self.allow_origin.split(",") if o.strip())

    @property
    def hosts(self) -> frozenset[str]:
        """What a request's Host may be, without port; empty: anything."""
        named = {h.strip().lower() for h in self.allow_host.split(",") if h.strip()}
        if "*" in named or not (named or _loopback(self.host)):
            return frozenset()
        return frozenset({*named, "localhost", "127.0.0.1", "::1", self.host.lower()})

    def shown(self) -> dict[str, Any]:
        """How the server is to be called: credentials and metadata. Raises OSError or ValueError for files that are none."""
        made: dict[str, Any] = {}
        if self.target_tls or self.target_ca is not None or self.target_cert is not None:
            made["credentials"] = access.tls(self.target_ca, self.target_cert, self.target_key)
        if self.api_key_file is not None:
            made["metadata"] = access.bearer(access.read_key(self.api_key_file))
        return made

    @classmethod
    def parse(cls, argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> Config:
        """From the command line and the environment; ends the process with usage help on a fault."""
        parser = argparse.ArgumentParser(
            prog="seqserve web",
            description="The HTTP face and the page of a running server.",
            epilog="example: seqserve web --target localhost:8001 --port 8000",
        )
        for f in fields(cls):
            assert f.default is not MISSING
            kind = _kind(str(f.type))
            given = environment.get("SEQSERVE_WEB_" + f.name.upper())
            options: dict[str, Any] = {"default": f.default if given is None else given}
            options["help"] = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
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


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _kind(annotation: str) -> Any:
    return {"int": int, "float": float, "bool": bool, "str": str}.get(annotation, Path)
