"""The Open Inference Protocol's model repository: what is on disk, loaded and unloaded while the server runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from contract.bundle import BundleError
from protos import inference_pb2 as pb
from server.catalog import Catalog
from server.errors import InvalidInput
from server.metrics import Metrics
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.rpc.inference import SERVICE


class Repository:
    def __init__(self, catalog: Catalog, metrics: Metrics) -> None:
        self._catalog = catalog
        self._metrics = metrics
        self._lock = threading.Lock()  # one change at a time

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/RepositoryIndex": desk.unary(pb.RepositoryIndexRequest, self.index),
            f"/{SERVICE}/RepositoryModelLoad": desk.unary(pb.RepositoryModelLoadRequest, self.load),
            f"/{SERVICE}/RepositoryModelUnload": desk.unary(pb.RepositoryModelUnloadRequest, self.unload),
        }

    def index(self, request: pb.RepositoryIndexRequest, answer: Answer) -> None:
        response = pb.RepositoryIndexResponse()
        for model in self._catalog.models():
            response.models.add(name=model.name, version=model.version, state="READY")
        for place, faults in sorted(self._catalog.refused.items()) if not request.ready else ():
            name, _, version = place.partition("/")
            response.models.add(name=name, version=version, state="UNAVAILABLE", reason="; ".join(faults))
        answer.done(response)

    def load(self, request: pb.RepositoryModelLoadRequest, answer: Answer) -> None:
        def work() -> None:
            before = {m.engine for m in self._catalog.models()}
            try:
                self._catalog.update(request.model_name)
            except BundleError as e:
                message = f"model {request.model_name!r} can't be served: {'; '.join(e.faults)}"
                raise InvalidInput("MODEL_REFUSED", message[:2000], model=request.model_name) from None
            finally:
                for model in self._catalog.models():
                    if model.engine not in before:
                        self._metrics.watch_queue(model.engine)
            answer.done(pb.RepositoryModelLoadResponse())

        self._apart(work, answer)

    def unload(self, request: pb.RepositoryModelUnloadRequest, answer: Answer) -> None:
        def work() -> None:
            for model in self._catalog.unload(request.model_name):
                self._metrics.forget_queue(model.engine)
            answer.done(pb.RepositoryModelUnloadResponse())

        self._apart(work, answer)

    def _apart(self, work: Callable[[], None], answer: Answer) -> None:
        """In a thread of its own: reading a model takes its time, and a handler must not."""

        def run() -> None:
            try:
                with self._lock:
                    work()
                    self._metrics.models([("ready", len(self._catalog.models())), ("refused", len(self._catalog.refused))])
            except Exception as e:  # the caller is told, whatever it is
                answer.fail(e)

        threading.Thread(target=run, name="repository", daemon=True).start()
