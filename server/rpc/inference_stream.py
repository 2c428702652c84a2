"""ModelStreamInfer: many requests of one caller under way at once over one stream, their answers as they come.

An error is told in the stream, which lives on; a caller that sends the metadata `triton_grpc_error: true` has the stream end with
it instead. A model that gives its answer in pieces sends one response for each; with `triton_enable_empty_final_response` every
response says whether it is the last, and an empty one follows the pieces.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping

from google.protobuf.message import Message

from protos import inference_pb2 as pb
from server.errors import ServeError
from server.quotas import Caller
from server.rpc import gate
from server.rpc.answer import Answer, Desk, brief
from server.rpc.front import Call, Method, Receiver
from server.rpc.inference import Inference
from server.rpc.parameters import FINAL, NONE, SERVICE, Parameters
from server.rpc.wire import varint

log = logging.getLogger(__name__)


def methods(inference: Inference, desk: Desk) -> Mapping[str, Method]:
    return {f"/{SERVICE}/ModelStreamInfer": desk.stream(lambda call, answer: _Stream(inference, call, answer))}


class _Stream(Receiver):
    """One ModelStreamInfer: requests in, responses and errors out."""

    def __init__(self, inference: Inference, call: Call, answer: Answer) -> None:
        self.call = call
        self._inference = inference
        self._answer = answer
        self.caller = answer.caller
        self.flow = answer.flow
        self._lock = threading.Lock()
        self._asked: set[_InStream] = set()  # requests not yet answered; workers and the front's thread come and go
        self._ended = False
        self._strict = any(key == "triton_grpc_error" and value == "true" for key, value in call.metadata)
        answer.cancel_by(self._gone)

    def on_message(self, message: bytes) -> None:
        asked = _InStream(self)
        with self._lock:
            self._asked.add(asked)
        try:
            if self.caller is not None:
                self.caller.spend()
            self._inference.take(message, asked, asked)
        except Exception as e:  # one request's fault must not end the stream
            asked.fail(e)

    def on_end(self) -> None:
        with self._lock:
            self._ended = True
            over = not self._asked
        if over:
            self._answer.done()

    def send(self, response: bytes, error: str = "") -> None:
        """A ModelStreamInferResponse, put together around a serialised ModelInferResponse: no second copy of its tensors."""
        head = pb.ModelStreamInferResponse(error_message=error).SerializeToString() if error else b""
        self.call.reply(b"".join((head, _INFER_RESPONSE, varint(len(response)), response)))

    def over(self, asked: _InStream) -> None:
        """A request was answered; with the last one that is due, the stream ends."""
        with self._lock:
            if asked not in self._asked:
                return
            self._asked.remove(asked)
            over = self._ended and not self._asked
        if over:
            self._answer.done()

    def refuse(self, error: Exception) -> bool:
        """Whether an error ends the stream, as its caller wished."""
        if self._strict:
            self._answer.fail(error)  # first, or the caller's own end of the stream could end it well in between
            self._gone()
        return self._strict

    def _gone(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, set()
        for a in asked:
            a.cancel()


class _InStream:
    """One request of a stream, to be answered once, or in pieces. Satisfies Asked and Pieces."""

    __slots__ = ("_of", "cancel", "given", "id")

    def __init__(self, of: _Stream) -> None:
        self._of = of
        self.id = ""
        self.given: Parameters = NONE
        self.cancel: Callable[[], None] = _nothing

    @property
    def deadline(self) -> float | None:
        return self._of.call.deadline

    @property
    def caller(self) -> Caller | None:
        return self._of.caller

    @property
    def flow(self) -> Hashable:
        return self._of.flow

    def asked(self, request: Message) -> None:
        """Calls are logged, not their messages."""

    def read(self, id: str, given: Parameters) -> None:
        self.id, self.given = id, given

    def cancel_by(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel

    def send(self, response: bytes) -> None:
        self._of.send(response + _NOT_LAST)

    def last(self) -> None:
        if self.given.final:
            self._of.send(pb.ModelInferResponse(id=self.id).SerializeToString() + _LAST)
        self._of.over(self)

    def done(self, message: Message) -> None:
        self.done_bytes(message.SerializeToString())

    def done_bytes(self, message: bytes) -> None:
        self._of.send(message + _LAST if self.given.final else message)
        self._of.over(self)

    def fail(self, error: Exception) -> None:
        if self._of.refuse(error):
            return
        if isinstance(error, ServeError):
            error = brief(gate.told(self._of.caller, error))
        if not isinstance(error, ServeError):
            log.exception("a request of a stream failed", exc_info=error)
        message = (
            error.message if isinstance(error, ServeError) else "the server failed while it handled this request; its log has the reason"
        )
        response = pb.ModelInferResponse(id=self.id).SerializeToString()
        self._of.send(response + _LAST if self.given.final else response, message)
        self._of.over(self)


def _nothing() -> None:
    pass


def _marked(final: bool) -> bytes:
    """The parameter that says whether a response is the last; appended to a serialised response it becomes part of it."""
    response = pb.ModelInferResponse()
    response.parameters[FINAL].bool_param = final
    return response.SerializeToString()


_LAST, _NOT_LAST = _marked(True), _marked(False)
_INFER_RESPONSE = b"\x12"  # the tag of ModelStreamInferResponse.infer_response: field 2, a length follows
