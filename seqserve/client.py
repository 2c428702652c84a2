"""The blocking client. What it sends and how replies are read is in `wire`, `sessions` and `inference`, when it tries again
in `retry`; sessions are in `session`.

Safe to use from many threads and from greenlets: it keeps no state between calls and starts no thread of its own.
`aio` is its asyncio twin; both have the same methods.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, overload

import grpc
from numpy.typing import ArrayLike

from seqserve import errors, generation, inference, inside, results, retry, sessions, turns, wire
from seqserve.session import Session

R = TypeVar("R")

TIMEOUT = 60.0  # seconds: a long text, a wide beam and a full queue together stay well below
RETRIES = 3

OPTIONS: Sequence[tuple[str, Any]] = (
    ("grpc.max_send_message_length", -1),  # what is too large is the server's to say
    ("grpc.max_receive_message_length", -1),
    # A dead connection under an open call is noticed within this time. Servers with gRPC's defaults cut off whoever
    # pings more often than every 5 minutes.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Without these a channel that found nobody fails at once for a full second, and the retries with it.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class Client:
    """Calls a server at `target`, "host:port".

    `timeout` is in seconds and bounds a call together with its retries; each method takes its own. `metadata` goes
    with every call; `credentials` (grpc.ssl_channel_credentials() for TLS) replace the plain connection. A call that
    the server was too busy for, or that found no server, is tried `retries` more times, if the deadline allows.

    Methods raise `seqserve.Error`; the tree is in `seqserve.errors`.

        with seqserve.Client() as client:
            client.classify("A film to remember.").label
    """

    def __init__(
        self,
        target: str = "localhost:8001",
        *,
        timeout: float = TIMEOUT,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str | bytes]] = (),
        retries: int = RETRIES,
    ) -> None:
        self.target = target
        self._timeout = timeout
        self._metadata = tuple(metadata)
        self._retries = retries
        self._closed = False
        self._owner = True
        if credentials is None:
            self._channel = grpc.insecure_channel(target, OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, OPTIONS)
        self._unary: dict[str, grpc.UnaryUnaryMultiCallable[bytes, bytes]] = {}
        self._streams: dict[str, grpc.UnaryStreamMultiCallable[bytes, bytes]] = {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def with_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> Client:
        """A client on the same connection that sends this metadata in place of this one's: for those who call on behalf of
        several. The connection is closed with the first of them; who closes one of the others only ends its own retries."""
        twin = copy.copy(self)
        twin._metadata = tuple(metadata)
        twin._owner = False
        return twin

    def call(self, call: wire.Call[R], *, timeout: float | None = None) -> R:
        """A call made by `wire`, `sessions` or `inference`: for those who carry calls rather than make them."""
        return self._call(call, timeout)

    def close(self) -> None:
        """Ends the connection; calls in flight are cancelled."""
        self._closed = True
        if self._owner:
            self._channel.close()

    @overload
    def classify(self, text: str, model: str = "", version: str = "", *, timeout: float | None = None) -> results.Classification: ...
    @overload
    def classify(
        self, text: list[str] | tuple[str, ...], model: str = "", version: str = "", *, timeout: float | None = None
    ) -> list[results.Classification]: ...
    def classify(
        self, text: str | list[str] | tuple[str, ...], model: str = "", version: str = "", *, timeout: float | None = None
    ) -> results.Classification | list[results.Classification]:
        """Labels a text, or each of a list (at most 256). Without `model`, by the server's only classifier."""
        return self._call(wire.classify(text, model, version), timeout)

    def translate(
        self,
        text: str,
        source: str = "",
        target: str = "",
        beam: int = 0,
        max_tokens: int = 0,
        attention: bool = False,
        model: str = "",
        version: str = "",
        *,
        timeout: float | None = None,
    ) -> results.Translation:
        """Translates a text. Languages are ISO 639-1 codes; `beam` 1 is greedy, 0 the model's own choice."""
        return self._call(wire.translate(text, source, target, beam, max_tokens, attention, model, version), timeout)

    def translate_stream(
        self,
        text: str,
        source: str = "",
        target: str = "",
        beam: int = 0,
        max_tokens: int = 0,
        attention: bool = False,
        model: str = "",
        version: str = "",
        *,
        timeout: float | None = None,
    ) -> Generator[results.TranslationPiece, None, None]:
        """The same, piece by piece as the decoder settles them; the last has the whole. Closing it ends the call."""
        call = wire.translate_stream(text, source, target, beam, max_tokens, attention, model, version)
        return self._stream(call, timeout)

    def forecast(
        self,
        observations: ArrayLike,
        horizon: int = 0,
        quantiles: Sequence[float] = (),
        model: str = "",
        version: str = "",
        *,
        timeout: float | None = None,
    ) -> results.Forecast:
        """Continues a series: steps × channels in raw units, oldest first. Empty choices are the model's own."""
        return self._call(wire.forecast(observations, horizon, quantiles, model, version), timeout)

    @overload
    def tag(self, text: str, model: str = "", version: str = "", *, timeout: float | None = None) -> results.Tagging: ...
    @overload
    def tag(
        self, text: list[str] | list[list[str]], model: str = "", version: str = "", *, timeout: float | None = None
    ) -> list[results.Tagging]: ...
    def tag(
        self, text: str | list[str] | list[list[str]], model: str = "", version: str = "", *, timeout: float | None = None
    ) -> results.Tagging | list[results.Tagging]:
        """Finds spans, such as names, in a text or in each of a list (at most 256). In place of a text its words may be given,
        as they were split elsewhere. Without `model`, by the server's only tagger."""
        return self._call(wire.tag(text, model, version), timeout)

    def generate(
        self,
        text: str = "",
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        max_symbols: int = 0,
        stop: Sequence[str] = (),
        model: str = "",
        version: str = "",
        *,
        timeout: float | None = None,
    ) -> results.Generation:
        """Goes on with a text. `temperature` 0 takes the likeliest symbol each time, `top_k` 0 draws from all; with a `seed`
        the text can be had again. It ends after `max_symbols` (0: 200), any of `stop`, or where the model ends it."""
        return self._call(generation.generate(text, temperature, top_k, seed, max_symbols, stop, model, version), timeout)

    def generate_stream(
        self,
        text: str = "",
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        max_symbols: int = 0,
        stop: Sequence[str] = (),
        model: str = "",
        version: str = "",
        *,
        timeout: float | None = None,
    ) -> Generator[results.GenerationPiece, None, None]:
        """The same, symbol by symbol; the last piece has the whole. Closing it ends the call."""
        call = generation.generate_stream(text, temperature, top_k, seed, max_symbols, stop, model, version)
        return self._stream(call, timeout)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        outputs: Iterable[str] = (),
        version: str = "",
        id: str = "",
        parameters: Mapping[str, inference.Parameter] | None = None,
        *,
        timeout: float | None = None,
    ) -> results.Inference:
        """Runs a model's main graph on arrays (Open Inference Protocol); `model_metadata` says which it takes."""
        return self._call(inference.infer(model, inputs, outputs, version, id, parameters), timeout)

    def session(
        self, model: str, version: str = "", id: str = "", ttl: float = 0.0, *, close: bool = True, timeout: float | None = None
    ) -> Session:
        """A session of a model, for `with`: what is sent to it goes on from what was sent before.

        Empty choices are the server's own: the newest version, a new id, its usual time to live. `ttl` is in seconds
        after the last turn. `close` tells whether leaving the `with` block ends it; `timeout` is its calls' default.
        """
        return Session(self, sessions.opening(model, version, id, ttl), close, timeout)

    def resume(self, id: str, turn: int | None = None, *, close: bool = True, timeout: float | None = None) -> Session:
        """A session that exists, taken up again after `turn`, the last whose answer you have; without it, after the last
        turn applied. A turn that was applied beyond it is answered again when it is sent again."""
        return Session(self, sessions.resuming(id, turn), close, timeout)

    def bring(self, exported: bytes, id: str = "", *, close: bool = True, timeout: float | None = None) -> Session:
        """A session from the bytes that a session's `export` gave, here or on another server, under its own id or a new one."""
        return Session(self, sessions.bringing(exported, id), close, timeout)

    def sessions(self, limit: int = 0, after: str = "", *, timeout: float | None = None) -> list[results.SessionInfo]:
        """The open sessions by id, at most `limit` of them (0: 1,000), from the first id after `after`."""
        return self._call(sessions.listed(limit, after), timeout)

    def watch(self, interval: float = 0.0, rounds: int = 0, *, timeout: float | None = None) -> Generator[inside.Picture, None]:
        """What the server is doing: a picture at once and one after every `interval` seconds (0: 0.25), each with the newest
        `rounds` that ended since the last (0: 200), until `timeout` or until it is closed. Where the server asks for keys it is
        for operators."""
        return self._stream(inside.watch(interval, rounds), timeout)

    def models(self, *, timeout: float | None = None) -> list[results.Model]:
        """What the server serves, every version of it."""
        return self._call(wire.models(), timeout)

    def model_metadata(self, name: str, version: str = "", *, timeout: float | None = None) -> results.ModelMetadata:
        """The tensors that `infer` takes and gives for a model."""
        return self._call(inference.model_metadata(name, version), timeout)

    def metadata(self, *, timeout: float | None = None) -> results.ServerMetadata:
        """What the server says of itself."""
        return self._call(inference.metadata(), timeout)

    def live(self, *, timeout: float | None = None) -> bool:
        """Whether a server is there."""
        return self._call(inference.live(), timeout)

    def ready(self, *, timeout: float | None = None) -> bool:
        """Whether a server is there and serves all its models."""
        return self._call(inference.ready(), timeout)

    def model_ready(self, name: str, version: str = "", *, timeout: float | None = None) -> bool:
        """Whether a model can be called now."""
        return self._call(inference.model_ready(name, version), timeout)

    def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """The standard health check's word: SERVING, NOT_SERVING, UNKNOWN. Raises NotFound for an unknown service."""
        return self._call(wire.health(service), timeout)

    def _call(self, call: wire.Call[R], timeout: float | None) -> R:
        return self._tried(call, self._tries(timeout))

    def _tries(self, timeout: float | None, limit: int | None = None) -> retry.Tries:
        allowed = self._retries if limit is None else limit
        return retry.Tries(allowed, self._timeout if timeout is None else timeout, closed=lambda: self._closed)

    def _tried(self, call: wire.Call[R], tries: retry.Tries) -> R:
        if (send := self._unary.get(call.path)) is None:
            send = self._unary[call.path] = self._channel.unary_unary(call.path, bytes, bytes)
        while True:
            try:
                return call.read(send(call.request, timeout=tries.left(), metadata=(*self._metadata, *call.metadata)))
            except grpc.RpcError as e:
                failure = errors.from_rpc(e)
                if call.absent is not None and isinstance(failure, errors.Unavailable):
                    return call.absent
                if (wait := tries.after(failure)) is None:
                    raise failure from e
            self._sleep(wait)

    def _stream(self, call: wire.Call[R], timeout: float | None) -> Generator[R, None, None]:
        """As `_call`, but tried again only while nothing has come: pieces given out can't be taken back."""
        if (send := self._streams.get(call.path)) is None:
            send = self._streams[call.path] = self._channel.unary_stream(call.path, bytes, bytes)
        tries = self._tries(timeout)
        begun = False
        while True:
            replies: Any = send(call.request, timeout=tries.left(), metadata=self._metadata)
            try:
                for raw in replies:
                    begun = True
                    yield call.read(raw)
                return
            except grpc.RpcError as e:
                failure = errors.from_rpc(e)
                if begun or (wait := tries.after(failure)) is None:
                    raise failure from e
            finally:
                replies.cancel()  # nothing where it is over; where the caller left, the server is told
            self._sleep(wait)

    def _turns(self, messages: Iterator[bytes], timeout: float, metadata: Sequence[tuple[str, str]]) -> Any:
        """One stream of turns: an iterator of replies that can be cancelled."""
        send = self._channel.stream_stream(turns.STREAM, bytes, bytes)
        return send(messages, timeout=timeout, metadata=(*self._metadata, *metadata))

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)
