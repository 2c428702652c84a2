"""The asyncio client: the same calls as `client.Client`, awaited.

What it sends and how replies are read is in `wire`, `sessions` and `inference`, when it tries again in `retry`; sessions are
in `aio_session`. One client belongs to one event loop: the connection is made at the first call, on the loop that runs then.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, overload

import grpc
import grpc.aio
from numpy.typing import ArrayLike

from seqserve import errors, generation, inference, inside, results, retry, sessions, turns, wire
from seqserve.aio_session import AsyncSession
from seqserve.client import OPTIONS, RETRIES, TIMEOUT

R = TypeVar("R")


class AsyncClient:
    """As `seqserve.Client`, with the same arguments, for use within asyncio.

    async with seqserve.AsyncClient() as client:
        (await client.classify("A film to remember.")).label
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
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._unary: dict[str, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {}
        self._streams: dict[str, grpc.aio.UnaryStreamMultiCallable[bytes, bytes]] = {}

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def with_metadata(self, metadata: Sequence[tuple[str, str | bytes]]) -> AsyncClient:
        """A client on the same connection that sends this metadata in place of this one's: for those who call on behalf of
        several. The connection is closed with the first of them; who closes one of the others only ends its own retries."""
        self._connected()
        twin = copy.copy(self)
        twin._metadata = tuple(metadata)
        twin._owner = False
        return twin

    async def call(self, call: wire.Call[R], *, timeout: float | None = None) -> R:
        """A call made by `wire`, `sessions` or `inference`: for those who carry calls rather than make them."""
        return await self._call(call, timeout)

    async def close(self) -> None:
        """Ends the connection; calls in flight are cancelled."""
        self._closed = True
        if self._channel is not None and self._owner:
            await self._channel.close(None)

    @overload
    async def classify(self, text: str, model: str = "", version: str = "", *, timeout: float | None = None) -> results.Classification: ...
    @overload
    async def classify(
        self, text: list[str] | tuple[str, ...], model: str = "", version: str = "", *, timeout: float | None = None
    ) -> list[results.Classification]: ...
    async def classify(
        self, text: str | list[str] | tuple[str, ...], model: str = "", version: str = "", *, timeout: float | None = None
    ) -> results.Classification | list[results.Classification]:
        """Labels a text, or each of a list (at most 256). Without `model`, by the server's only classifier."""
        return await self._call(wire.classify(text, model, version), timeout)

    async def translate(
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
        return await self._call(wire.translate(text, source, target, beam, max_tokens, attention, model, version), timeout)

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
    ) -> AsyncGenerator[results.TranslationPiece, None]:
        """The same, piece by piece as the decoder settles them; the last has the whole. Closing it ends the call."""
        call = wire.translate_stream(text, source, target, beam, max_tokens, attention, model, version)
        return self._stream(call, timeout)

    async def forecast(
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
        return await self._call(wire.forecast(observations, horizon, quantiles, model, version), timeout)

    @overload
    async def tag(self, text: str, model: str = "", version: str = "", *, timeout: float | None = None) -> results.Tagging: ...
    @overload
    async def tag(
        self, text: list[str] | list[list[str]], model: str = "", version: str = "", *, timeout: float | None = None
    ) -> list[results.Tagging]: ...
    async def tag(
        self, text: str | list[str] | list[list[str]], model: str = "", version: str = "", *, timeout: float | None = None
    ) -> results.Tagging | list[results.Tagging]:
        """Finds spans, such as names, in a text or in each of a list (at most 256). In place of a text its words may be given,
        as they were split elsewhere. Without `model`, by the server's only tagger."""
        return await self._call(wire.tag(text, model, version), timeout)

    async def generate(
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
        return await self._call(generation.generate(text, temperature, top_k, seed, max_symbols, stop, model, version), timeout)

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
    ) -> AsyncGenerator[results.GenerationPiece, None]:
        """The same, symbol by symbol; the last piece has the whole. Closing it ends the call."""
        call = generation.generate_stream(text, temperature, top_k, seed, max_symbols, stop, model, version)
        return self._stream(call, timeout)

    async def infer(
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
        return await self._call(inference.infer(model, inputs, outputs, version, id, parameters), timeout)

    def session(
        self, model: str, version: str = "", id: str = "", ttl: float = 0.0, *, close: bool = True, timeout: float | None = None
    ) -> AsyncSession:
        """A session of a model, for `with`: what is sent to it goes on from what was sent before.

        Empty choices are the server's own: the newest version, a new id, its usual time to live. `ttl` is in seconds
        after the last turn. `close` tells whether leaving the `with` block ends it; `timeout` is its calls' default.
        """
        return AsyncSession(self, sessions.opening(model, version, id, ttl), close, timeout)

    def resume(self, id: str, turn: int | None = None, *, close: bool = True, timeout: float | None = None) -> AsyncSession:
        """A session that exists, taken up again after `turn`, the last whose answer you have; without it, after the last
        turn applied. A turn that was applied beyond it is answered again when it is sent again."""
        return AsyncSession(self, sessions.resuming(id, turn), close, timeout)

    def bring(self, exported: bytes, id: str = "", *, close: bool = True, timeout: float | None = None) -> AsyncSession:
        """A session from the bytes that a session's `export` gave, here or on another server, under its own id or a new one."""
        return AsyncSession(self, sessions.bringing(exported, id), close, timeout)

    async def sessions(self, limit: int = 0, after: str = "", *, timeout: float | None = None) -> list[results.SessionInfo]:
        """The open sessions by id, at most `limit` of them (0: 1,000), from the first id after `after`."""
        return await self._call(sessions.listed(limit, after), timeout)

    def watch(self, interval: float = 0.0, rounds: int = 0, *, timeout: float | None = None) -> AsyncGenerator[inside.Picture, None]:
        """What the server is doing: a picture at once and one after every `interval` seconds (0: 0.25), each with the newest
        `rounds` that ended since the last (0: 200), until `timeout` or until it is closed. Where the server asks for keys it is
        for operators."""
        return self._stream(inside.watch(interval, rounds), timeout)

    async def models(self, *, timeout: float | None = None) -> list[results.Model]:
        """What the server serves, every version of it."""
        return await self._call(wire.models(), timeout)

    async def model_metadata(self, name: str, version: str = "", *, timeout: float | None = None) -> results.ModelMetadata:
        """The tensors that `infer` takes and gives for a model."""
        return await self._call(inference.model_metadata(name, version), timeout)

    async def metadata(self, *, timeout: float | None = None) -> results.ServerMetadata:
        """What the server says of itself."""
        return await self._call(inference.metadata(), timeout)

    async def live(self, *, timeout: float | None = None) -> bool:
        """Whether a server is there."""
        return await self._call(inference.live(), timeout)

    async def ready(self, *, timeout: float | None = None) -> bool:
        """Whether a server is there and serves all its models."""
        return await self._call(inference.ready(), timeout)

    async def model_ready(self, name: str, version: str = "", *, timeout: float | None = None) -> bool:
        """Whether a model can be called now."""
        return await self._call(inference.model_ready(name, version), timeout)

    async def health(self, service: str = "", *, timeout: float | None = None) -> str:
        """The standard health check's word: SERVING, NOT_SERVING, UNKNOWN. Raises NotFound for an unknown service."""
        return await self._call(wire.health(service), timeout)

    def _connected(self) -> grpc.aio.Channel:
        if self._channel is None:
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, OPTIONS)
        return self._channel

    async def _call(self, call: wire.Call[R], timeout: float | None) -> R:
        return await self._tried(call, self._tries(timeout))

    def _tries(self, timeout: float | None, limit: int | None = None) -> retry.Tries:
        allowed = self._retries if limit is None else limit
        return retry.Tries(allowed, self._timeout if timeout is None else timeout, closed=lambda: self._closed)

    async def _tried(self, call: wire.Call[R], tries: retry.Tries) -> R:
        if (send := self._unary.get(call.path)) is None:
            send = self._unary[call.path] = self._connected().unary_unary(call.path, bytes, bytes)
        while True:
            try:
                return call.read(await send(call.request, timeout=tries.left(), metadata=(*self._metadata, *call.metadata)))
            except grpc.aio.AioRpcError as e:
                failure = errors.from_rpc(e)
                if call.absent is not None and isinstance(failure, errors.Unavailable):
                    return call.absent
                if (wait := tries.after(failure)) is None:
                    raise failure from e
            await self._sleep(wait)

    async def _stream(self, call: wire.Call[R], timeout: float | None) -> AsyncGenerator[R, None]:
        """As `_call`, but tried again only while nothing has come: pieces given out can't be taken back."""
        if (send := self._streams.get(call.path)) is None:
            send = self._streams[call.path] = self._connected().unary_stream(call.path, bytes, bytes)
        tries = self._tries(timeout)
        begun = False
        while True:
            replies: Any = send(call.request, timeout=tries.left(), metadata=self._metadata)
            try:
                async for raw in replies:
                    begun = True
                    yield call.read(raw)
                return
            except grpc.aio.AioRpcError as e:
                failure = errors.from_rpc(e)
                if begun or (wait := tries.after(failure)) is None:
                    raise failure from e
            finally:
                replies.cancel()  # nothing where it is over; where the caller left, the server is told
            await self._sleep(wait)

    def _turns(self, messages: AsyncIterator[bytes], timeout: float, metadata: Sequence[tuple[str, str]]) -> Any:
        """One stream of turns: an iterator of replies that can be cancelled."""
        send = self._connected().stream_stream(turns.STREAM, bytes, bytes)
        return send(messages, timeout=timeout, metadata=(*self._metadata, *metadata))

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
