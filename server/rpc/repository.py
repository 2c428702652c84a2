"""The Open Inference Protocol's model repository: what is on disk, loaded and unloaded while the server runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from google.protobuf import json_format

from contract.bundle import BundleError
from protos import inference_pb2 as pb
from protos import model_config_pb2 as config_pb
from server.catalog import Catalog
from server.errors import InvalidInput, ModelFailed, NotFound, listed
from server.metrics import Metrics
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.rpc.parameters import SERVICE


class Repository:
    def __init__(self, catalog: Catalog, metrics: Metrics, most_rows: int) -> None:
        self._catalog = catalog
        self._most_rows = most_rows  # of one request, where no load says otherwise
        self._metrics = metrics
        self._lock = threading.Lock()  # one change at a time

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/RepositoryIndex": desk.unary(pb.RepositoryIndexRequest, self.index),
            f"/{SERVICE}/RepositoryModelLoad": desk.unary(pb.RepositoryModelLoadRequest, self.load, operator=True),
            f"/{SERVICE}/RepositoryModelUnload": desk.unary(pb.RepositoryModelUnloadRequest, self.unload, operator=True),
        }

    def index(self, request: pb.RepositoryIndexRequest, answer: Answer) -> None:
        _one_repository(request.repository_name)

        def work() -> None:
            response = pb.RepositoryIndexResponse()
            models = self._catalog.models()
            for model in models:
                response.models.add(name=model.name, version=model.version, state="READY")
            if not request.ready:
                served = {f"{m.name}/{m.version}" for m in models}
                refused = {place: "; ".join(faults) for place, faults in list(self._catalog.refused.items())}
                there = dict.fromkeys(self._catalog.places(), "unloaded") | refused
                for place, reason in sorted(there.items()):
                    if place not in served:
                        name, _, version = place.partition("/")
                        response.models.add(name=name, version=version, state="UNAVAILABLE", reason=reason)
            answer.done(response)

        self._apart(work, answer)

    def load(self, request: pb.RepositoryModelLoadRequest, answer: Answer) -> None:
        name = request.model_name
        _one_repository(request.repository_name)
        rows = _row_limit(name, request.parameters)

        def work() -> None:
            before = {m.engine for m in self._catalog.models()}
            try:
                self._catalog.update(name)
            except NotFound as e:
                raise NotFound(e.reason, f"failed to load {name!r}: {e.message}", model=name) from None
            except BundleError as e:
                message = f"failed to load {name!r}: {'; '.join(e.faults)}"
                raise InvalidInput("MODEL_REFUSED", message[:2000], model=name) from None
            finally:
                for model in self._catalog.models():
                    if model.engine not in before:
                        self._metrics.watch_queue(model.engine)
            for model in self._catalog.models():
                if model.name == name:
                    model.tensors.most_rows = rows or self._most_rows
            answer.done(pb.RepositoryModelLoadResponse())

        self._apart(work, answer)

    def unload(self, request: pb.RepositoryModelUnloadRequest, answer: Answer) -> None:
        _one_repository(request.repository_name)
        for key, value in request.parameters.items():
            # No model here is made of others, so nothing depends on one.
            if key != "unload_dependents" or value.WhichOneof("parameter_choice") != "bool_param":
                raise InvalidInput("UNKNOWN_PARAMETER", f"parameter {key!r}: there is only unload_dependents, a bool", parameter=key)

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


def _one_repository(name: str) -> None:
    if name:
        raise NotFound("UNKNOWN_REPOSITORY", f"there is no repository {name!r}: this server has one, without a name", repository=name)


def _row_limit(name: str, parameters: Mapping[str, pb.ModelRepositoryParameter]) -> int:
    """The max_batch_size that a load asks for, in the JSON of a configuration; 0 where it asks for none.

    What else a configuration says is in the model's bundle, which its files prove; so another is refused, as other files are."""
    for key, value in parameters.items():
        if key.startswith("file:"):
            # Triton's clients look for this status and these words.
            message = f"failed to load {name!r}: failed to poll from model repository: files can't be sent; put them on the server's disk"
            raise ModelFailed("NO_FILES", message, model=name, parameter=key[:100])
        if key != "config" or value.WhichOneof("parameter_choice") != "string_param":
            message = f"failed to load {name!r}: parameter {key[:100]!r}; there is only config, a string"
            raise InvalidInput("UNKNOWN_PARAMETER", message, parameter=key[:100])
    if "config" not in parameters:
        return 0
    try:
        wanted = json_format.Parse(parameters["config"].string_param, config_pb.ModelConfig())
    except json_format.ParseError as e:
        message = f"failed to load {name!r}: the config is no JSON of a ModelConfig: {str(e)[:300]}"
        raise InvalidInput("BAD_CONFIG", message, model=name) from None
    if other := [f.name for f, _ in wanted.ListFields() if f.name != "max_batch_size"]:
        message = f"failed to load {name!r}: the config sets {listed(other)}; only max_batch_size can be set, the bundle says the rest"
        raise InvalidInput("FIXED_CONFIG", message, model=name, parameter=other[0])
    if wanted.max_batch_size < 0:
        raise InvalidInput("BAD_CONFIG", f"failed to load {name!r}: max_batch_size must be at least 1", model=name)
    return wanted.max_batch_size
