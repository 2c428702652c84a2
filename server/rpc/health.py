"""grpc.health.v1 and gRPC server reflection, in the words of their own packages."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2 as pb
from grpc_reflection.v1alpha import reflection, reflection_pb2

from server.errors import NotFound, listed
from server.rpc.answer import Answer, Desk, malformed
from server.rpc.front import Call, Method, Receiver

SERVICE = "grpc.health.v1.Health"
_REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")  # the same messages


class Health:
    """Whether the services answer: SERVING from start to drain. Watchers are told of the change."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = {"", *services}
        self._lock = threading.Lock()
        self._serving = False
        self._watchers: list[Answer] = []

    @property
    def serving(self) -> bool:
        return self._serving

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        desk = desk.anyone  # probes have no key
        return {
            f"/{SERVICE}/Check": desk.unary(pb.HealthCheckRequest, self.check),
            f"/{SERVICE}/Watch": desk.server_stream(pb.HealthCheckRequest, self.watch),
        }

    def set(self, serving: bool) -> None:
        with self._lock:
            self._serving = serving
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.send(self._status())

    def end(self) -> None:
        """End the watchers' streams, so that they don't hold a stopping server."""
        with self._lock:
            watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher.done()

    def check(self, request: pb.HealthCheckRequest, answer: Answer) -> None:
        if request.service not in self._services:
            known = listed(sorted(self._services - {""}))
            raise NotFound("UNKNOWN_SERVICE", f"there is no service {request.service!r}; there are: {known}", known=known)
        answer.done(self._status())

    def watch(self, request: pb.HealthCheckRequest, answer: Answer) -> None:
        if request.service not in self._services:
            answer.send(pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN))
            return  # the protocol keeps the stream open: the service may appear; here none ever does
        with self._lock:
            answer.send(self._status())
            self._watchers.append(answer)
        answer.cancel_by(lambda: self._forget(answer))

    def _forget(self, answer: Answer) -> None:
        with self._lock:
            if answer in self._watchers:
                self._watchers.remove(answer)

    def _status(self) -> pb.HealthCheckResponse:
        kinds = pb.HealthCheckResponse
        return kinds(status=kinds.SERVING if self._serving else kinds.NOT_SERVING)


def reflect(services: Sequence[str], desk: Desk) -> Mapping[str, Method]:
    """Server reflection, so that grpcurl and its like can list and call what is here."""
    servicer = reflection.ReflectionServicer([*services, *_REFLECTION], descriptor_pool.Default())

    class Reflected(Receiver):
        def __init__(self, call: Call, answer: Answer) -> None:
            self._call = call
            self._answer = answer
            answer.cancel_by(lambda: None)

        def on_message(self, message: bytes) -> None:
            try:
                request = reflection_pb2.ServerReflectionRequest.FromString(message)
            except DecodeError:
                self._answer.fail(malformed(reflection_pb2.ServerReflectionRequest))
                return
            for response in servicer.ServerReflectionInfo(iter([request]), None):
                self._call.reply(response.SerializeToString())

        def on_end(self) -> None:
            self._answer.done()

    return {f"/{name}/ServerReflectionInfo": desk.stream(Reflected) for name in _REFLECTION}
