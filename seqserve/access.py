"""How a client shows who it is, and how it knows the server: TLS files, an API key from a file. Options and environment alike.

credentials = access.tls(ca=Path("ca.pem"), cert=Path("me.pem"), key=Path("me.key"))
seqserve.Client("host:8001", credentials=credentials, metadata=access.bearer(access.read_key(Path("api.key"))))
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

OPTIONS: Mapping[str, str] = {
    "tls_ca": "PEM authority that the server's certificate must come from; with it, or --tls, calls are encrypted",
    "tls_cert": "PEM certificate to show the server (mutual TLS), with --tls-key",
    "tls_key": "PEM private key of --tls-cert",
    "api_key_file": "file that holds the key to show the server",
}

PREFIX = "SEQSERVE_CLIENT_"  # SEQSERVE_TLS_CERT is the server's


def tls(ca: Path | None = None, cert: Path | None = None, key: Path | None = None) -> grpc.ChannelCredentials:
    """For an encrypted connection: to a server whose certificate comes from `ca` (None: any authority that gRPC trusts); with
    `cert` and `key` the client has a certificate too. Raises OSError, or ValueError where one of the two is missing."""
    if (cert is None) != (key is None):
        raise ValueError("a certificate and its private key go together")
    read = [None if file is None else file.read_bytes() for file in (ca, key, cert)]
    return grpc.ssl_channel_credentials(*read)


def read_key(file: Path) -> str:
    """An API key from the file that holds it. Raises OSError, or ValueError where it holds none."""
    key = file.read_text(encoding="utf-8").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{file} holds no key: one line of printable ASCII without spaces")
    return key


def bearer(key: str) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata that shows a key; none for ""."""
    return (("authorization", f"Bearer {key}"),) if key else ()


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tls", action="store_true", help="encrypt, with the authorities that this machine trusts")
    for name, help in OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), metavar="FILE", type=Path, help=f"{help}; default: ${PREFIX}{name.upper()}")


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """What a client is to be made with. Raises OSError or ValueError."""
    files: dict[str, Path | None] = {}
    for name in OPTIONS:
        given = getattr(options, name, None) or os.environ.get(PREFIX + name.upper())
        files[name] = Path(given) if given else None
    made: dict[str, Any] = {}
    if getattr(options, "tls", False) or files["tls_ca"] is not None or files["tls_cert"] is not None:
        made["credentials"] = tls(files["tls_ca"], files["tls_cert"], files["tls_key"])
    if files["api_key_file"] is not None:
        made["metadata"] = bearer(read_key(files["api_key_file"]))
    return made
