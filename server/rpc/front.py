"""The door of the server: what a remote call looks like to a handler, and what a front must do to carry it.

Two fronts stand behind these protocols: `direct_front` speaks HTTP/2 itself (the default), `public_front` uses grpcio's
server. This file knows neither bundles nor protobuf: handlers get bytes, give bytes and parse for themselves.

The contract of a handler: it never blocks, it may answer from any thread at any later time, and it ends every call with `reply`
(unary), `finish` (streams) or `fail`. What comes after the end, or after the caller has gone, is dropped without a word.
"""

import logging
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import grpc

logger = logging.getLogger(__name__)

Metadata = tuple[tuple[str, str | bytes], ...]


class Call(Protocol):
    """One remote call as its handler sees it; everything here may be used from any thread."""

    @property
    def method(self) -> str:
        """The full name, such as `/inference.GRPCInferenceService/ModelInfer`."""

    @property
    def metadata(self) -> Metadata:
        """What the caller sent along; values of keys that end in `-bin` are bytes."""

    @property
    def peer(self) -> str:
        """The caller's address as gRPC writes it, such as `ipv4:127.0.0.1:50412`."""

    @property
    def peer_certificate(self) -> bytes | None:
        """What the caller proved itself with, in DER, held against the authority by TLS; None without mutual TLS. To be asked for
        while the call begins."""

    @property
    def deadline(self) -> float | None:
        """When the caller stops waiting, on `time.monotonic`'s clock; None if it waits for ever."""

    @property
    def waiting(self) -> int:
        """Messages given to `reply` which the transport has not taken yet: a slow reader makes this grow."""

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        """Unary: the one answer, which ends the call. Streams: one more message; give `trailing` to `finish` instead."""

    def finish(self, trailing: Metadata = ()) -> None:
        """Streams: end well, after everything replied so far."""

    def fail(self, status: grpc.StatusCode, message: str, trailing: Metadata = ()) -> None:
        """End with a status other than OK, after everything replied so far."""

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once if the caller cancels, its deadline passes or its connection breaks before the handler ends
        the call; at once if that has happened already, never after an end of our own. It runs on the front's thread: be short."""


class Receiver(Protocol):
    """What the handler of an open stream gives to the front; its methods are called one at a time, in the caller's order."""

    def on_message(self, message: bytes) -> None:
        """One message of the caller."""

    def on_end(self) -> None:
        """The caller has sent its last message and still listens: answer what is due, then `finish`."""


Kind = Literal["unary", "server_stream", "stream"]


@dataclass(frozen=True, slots=True)
class Method:
    """How calls of one method begin; `unary`, `server_stream` and `stream` below make them with the right types."""

    kind: Kind
    start: Callable[..., Receiver | None]


def unary(start: Callable[[Call, bytes], None]) -> Method:
    """One message in, one `reply` out."""
    return Method("unary", start)


def server_stream(start: Callable[[Call, bytes], None]) -> Method:
    """One message in, any number of `reply`s out, then `finish`."""
    return Method("server_stream", start)


def stream(start: Callable[[Call], Receiver]) -> Method:
    """Messages both ways, in any order, until `finish`."""
    return Method("stream", start)


@dataclass(frozen=True, slots=True)
class Options:
    """What an operator may want to change about a front."""

    max_receive_bytes: int = 16 << 20
    """Longest message accepted; a longer one gets RESOURCE_EXHAUSTED. gRPC's own default, 4 MiB, is one series of a million floats."""

    max_send_bytes: int = -1
    """Longest message sent; -1 is no limit, since the messages are our own."""

    backlog_messages: int = 256
    """A stream is not read while more replies than this wait for its caller: a reader that is slow is asked no more questions."""

    backlog_bytes: int = 16 << 20
    """The same in bytes, for replies that are large."""

    unread_bytes: int = 64 << 20
    """Beyond so many bytes of replies, of all its calls together and beside the largest, that wait for the caller of one connection, calls
    that it begins wait until it has read half of them; beyond four times as many, unary answers are dropped (not with the public front)."""

    streams: int = 0
    """Calls of one connection at once, whatever their kind; further ones wait at the caller. 0 is no limit."""

    processes: int = 0
    """Processes that carry calls, in place of the server's own thread (relayed front only)."""

    keepalive_s: float = 30.0
    """A connection of which nothing was heard for so long is asked whether anyone is there (direct front only)."""

    keepalive_timeout_s: float = 20.0
    """And given up with its calls where nothing comes for so long after that."""


DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a certificate chain and its key; with `client_ca`, callers must prove themselves with a certificate of it."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC's own servers. Raises OSError."""
        self.context()  # it says what is wrong with the files, where gRPC only does not listen
        ca = self.client_ca.read_bytes() if self.client_ca else None
        pair = (self.key.read_bytes(), self.cert.read_bytes())
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)

    def context(self) -> ssl.SSLContext:
        """For Python's sockets. Raises OSError with the files that can't be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        try:
            context.load_cert_chain(self.cert, self.key)
        except OSError as e:  # ssl.SSLError is one; neither names a file
            raise OSError(f"--tls-cert {self.cert} and --tls-key {self.key}: no PEM certificate chain and its private key ({e})") from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except OSError as e:
                raise OSError(f"--tls-client-ca {self.client_ca}: no PEM certificate of an authority ({e})") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class Besides(Protocol):
    """Work that a front's own thread may do while nothing arrives, so that no other thread need be woken for it."""

    def attend(self) -> None:
        """The front's thread is about: it will call `brief` before it sleeps."""

    @property
    def enough(self) -> bool:
        """Whether so much was brought since the last piece that it is to be done before more is taken."""

    def brief(self) -> bool:
        """Do a piece of work of about a millisecond. False where there is none; the thread may sleep then."""


class Front(Protocol):
    """Carries calls between the network and handlers. Life: construct, `listen` (once per address), `start`, `drain`, `stop`."""

    def __init__(self, methods: Mapping[str, Method], options: Options = DEFAULTS, besides: Besides | None = None) -> None:
        """`methods` is keyed by full name; a call of any other name gets UNIMPLEMENTED and a list of what there is. `besides` is
        done by the front's thread where it has one of its own to lend."""

    @property
    def live(self) -> int:
        """Calls that have begun and are not over."""

    def listen(self, address: str, tls: Tls | None = None) -> int:
        """Bind `host:port` (port 0: any free one) and give the port bound; OSError if it is taken or a file of `tls` can't be read."""

    def start(self) -> None:
        """Accept calls."""

    def drain(self) -> None:
        """Accept no more calls and ask callers to reconnect elsewhere (GOAWAY); running calls go on. Returns at once.

        A new call gets UNAVAILABLE, or CANCELLED if it crosses the GOAWAY on the wire: gRPC drops such calls unseen."""

    def stop(self, grace_s: float) -> None:
        """Drain, wait up to `grace_s` seconds for running calls, cancel the rest, and end the front's threads. Never call it
        from a handler."""


def choose_front(which: str = "auto", processes: int = 0) -> type[Front]:
    """The front called "direct" or "public"; with "auto" the first. With `processes` to carry calls, the relayed one."""
    from server.rpc import direct_front, public_front, relay_front

    if which not in ("auto", "direct", "public"):
        raise ValueError(f"no front is called {which!r}; there are auto, direct and public")
    if which == "public":
        return public_front.PublicFront
    return relay_front.RelayFront if processes else direct_front.DirectFront


# ---- What both fronts must say and do alike ----

HANDLER_FAILED = "the server failed while it handled this call; its log has the reason"
DRAINING = "the server is shutting down; send the request again"
NO_REQUEST = "the call ended without the one message this method takes"
BAD_TRAILING = "the server tried to answer with metadata that gRPC cannot carry; its log has the reason"

_STATUS_BYTES = 2048  # sent percent-encoded, up to three times as long; clients refuse headers over 8 KiB and lose the status
_KEY = re.compile(r"[0-9a-z_.\-]+")
_TEXT = re.compile(r"[ -~]*")


def channel_arguments(options: Options) -> list[tuple[str, int]]:
    """gRPC's own settings of a server."""
    return [
        ("grpc.so_reuseport", 0),  # or a second server on the same port would silently take half of the calls
        ("grpc.max_receive_message_length", options.max_receive_bytes),
        ("grpc.max_send_message_length", options.max_send_bytes),
        # gRPC counts a ping more often than every 300 s as an attack and cuts the connection; usual clients ping every 10 to 60 s.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        *([("grpc.max_concurrent_streams", options.streams)] if options.streams else []),
    ]


def certificate(context: Mapping[Any, Iterable[bytes]] | None) -> bytes | None:
    """A caller's certificate in DER, from what gRPC knows of its connection; some of its layers have names as bytes."""
    for key in ("x509_pem_cert", b"x509_pem_cert"):
        for pem in (context or {}).get(key, ()):
            return ssl.PEM_cert_to_DER_cert(pem.decode())
    return None


def status_text(message: str) -> str:
    """The message as a status can carry it: valid UTF-8 of bounded length."""
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= _STATUS_BYTES:
        return encoded.decode()
    return encoded[:_STATUS_BYTES].decode("utf-8", "ignore") + "…"


def metadata_fault(metadata: Metadata) -> str | None:
    """Why gRPC would refuse to carry this metadata; None if it would not."""
    for key, value in metadata:
        if not _KEY.fullmatch(key):
            return f"metadata key {key!r} may hold only 0-9 a-z _ . -"
        if key.endswith("-bin"):
            if not isinstance(value, bytes):
                return f"metadata {key!r} ends in -bin and must be bytes, not {type(value).__name__}"
        elif not (isinstance(value, str) and _TEXT.fullmatch(value)):
            return f"metadata {key!r} must be printable ASCII text (name it {key}-bin to send bytes), not {value!r}"
    return None


def cannot_listen(address: str) -> str:
    """What to tell an operator whose address could not be bound."""
    return f"cannot listen on {address}: the port is taken, or the address is not one of this machine, or needs more rights"


def no_such_method(name: str, methods: Iterable[str]) -> str:
    """What to tell the caller of a method that nobody serves."""
    service = name.rpartition("/")[0]
    methods = list(methods)
    siblings = sorted(known.rpartition("/")[2] for known in methods if known.rpartition("/")[0] == service)
    if siblings:
        return f"no method {name}; {service[1:]} has {', '.join(siblings)}"
    services = sorted({known.rpartition("/")[0][1:] for known in methods})
    return f"no method {name}; this server has the services {', '.join(services)}"
