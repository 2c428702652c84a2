"""seqserve.v1.Tasks: text and series in and out. Wire in, one call, wire out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from protos import seqserve_pb2 as pb
from server.catalog import Catalog, Model
from server.engine import Engine
from server.errors import InvalidInput, NotFound, ServeError, listed
from server.inputs import Array
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.sequence import Sequence
from server.tasks.classify import Classified, Classifier
from server.tasks.forecast import Forecasted, Forecaster
from server.tasks.translate import Said, Translated, Translator, Wanted

SERVICE = "seqserve.v1.Tasks"
MOST_TEXTS = 256
MOST_LETTERS = 500_000  # of one call: vocabularies read some 3 million letters a second, and others wait meanwhile
T = TypeVar("T", Classifier, Translator, Forecaster)


class Tasks:
    def __init__(self, catalog: Catalog, ready: Callable[[], bool]) -> None:
        self._catalog = catalog
        self._ready = ready

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/Classify": desk.unary(pb.ClassifyRequest, self.classify),
            f"/{SERVICE}/Translate": desk.unary(pb.TranslateRequest, self.translate),
            f"/{SERVICE}/TranslateStream": desk.server_stream(pb.TranslateRequest, self.translate_stream),
            f"/{SERVICE}/Forecast": desk.unary(pb.ForecastRequest, self.forecast),
            f"/{SERVICE}/Models": desk.unary(pb.ModelsRequest, self.models),
        }

    def classify(self, request: pb.ClassifyRequest, answer: Answer) -> None:
        model, task = self._model("classify", request.model, Classifier)
        texts = list(request.texts)
        if not 1 <= len(texts) <= MOST_TEXTS:
            message = f"{len(texts)} texts; allowed are 1 to {MOST_TEXTS} in one call"
            raise InvalidInput("BAD_COUNT", message, expected=f"1..{MOST_TEXTS}", got=len(texts))
        letters = sum(map(len, texts))
        if letters > MOST_LETTERS:
            message = f"{letters} letters in all; at most {MOST_LETTERS} are allowed in one call: send several"
            raise InvalidInput("TOO_LONG", message, expected=f"1..{MOST_LETTERS}", got=letters)
        together = _Together(model.engine, len(texts), answer)

        def then(at: int) -> Callable[[Sequence, Classified], None]:
            def classified(sequence: Sequence, result: Classified) -> None:
                if not together.put(at, sequence, result):
                    return
                reply = pb.ClassifyReply(model=_name(model), timing=_timing(together.sequences))
                for c in together.results:
                    reply.results.append(write_classification(task.labels, c))
                answer.done(reply)

            return classified

        answer.cancel_by(together.cancel)
        try:
            for i, text in enumerate(texts):
                together.started(task.start(text, then(i), together.fail, answer.deadline))
        except ServeError as e:
            together.fail(e)

    def translate(self, request: pb.TranslateRequest, answer: Answer) -> None:
        model, task = self._translator(request)

        def then(sequence: Sequence, result: Translated) -> None:
            answer.done(_translation(model, sequence, result))

        sequence = task.start(request.text, _wanted(request), then, answer.fail, None, answer.deadline)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def translate_stream(self, request: pb.TranslateRequest, answer: Answer) -> None:
        model, task = self._translator(request)

        def said(s: Said) -> None:
            answer.send(pb.TranslatePiece(text=s.text, token=_token(s)))

        def then(sequence: Sequence, result: Translated) -> None:
            answer.send(pb.TranslatePiece(done=_translation(model, sequence, result)))
            answer.done()

        sequence = task.start(request.text, _wanted(request), then, answer.fail, said, answer.deadline)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def forecast(self, request: pb.ForecastRequest, answer: Answer) -> None:
        model, task = self._model("forecast", request.model, Forecaster)
        observations = read_series(request.observations, task.channels)

        def then(sequence: Sequence, result: Forecasted) -> None:
            reply = pb.ForecastReply(model=_name(model), channels=task.channels, mean=write_series(result.mean), timing=_timing([sequence]))
            for quantile, values in result.quantiles:
                reply.quantiles.add(quantile=quantile, series=write_series(values))
            answer.done(reply)

        sequence = task.start(observations, request.horizon, request.quantiles, then, answer.fail, answer.deadline)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def models(self, request: pb.ModelsRequest, answer: Answer) -> None:
        reply = pb.ModelsReply()
        for m in self._catalog.models():
            reply.models.add(
                name=m.name, version=m.version, kind=m.bundle.kind, ready=self._ready(), facts=_facts(m), fingerprint=m.bundle.fingerprint
            )
        answer.done(reply)

    def _model(self, kind: str, wanted: pb.Model, task: type[T]) -> tuple[Model, T]:
        """The model a request means: the one named, or the only one of its task."""
        if wanted.name:
            model = self._catalog.find(wanted.name, wanted.version)
        else:
            fitting = self._catalog.newest(kind)
            known = listed(m.name for m in fitting)
            if not fitting:
                raise NotFound("NO_MODEL", f"no model here can {kind}", task=kind)
            if len(fitting) > 1:
                raise InvalidInput("NAME_A_MODEL", f"several models can {kind}; name one of: {known}", task=kind, known=known)
            model = fitting[0]
            if wanted.version:
                model = self._catalog.find(model.name, wanted.version)
        if not isinstance(model.task, task):
            raise InvalidInput(
                "WRONG_TASK", f"model {model.name!r} can {model.bundle.kind}, not {kind}", model=model.name, task=model.bundle.kind
            )
        return model, model.task

    def _translator(self, request: pb.TranslateRequest) -> tuple[Model, Translator]:
        """The translator that a request names, or the one for its languages."""
        source, target = request.source, request.target
        if request.model.name or not (source or target):
            model, task = self._model("translate", request.model, Translator)
            fitting = [(model, task)]
        else:
            fitting = [(m, m.task) for m in self._catalog.newest("translate") if isinstance(m.task, Translator)]
        chosen = [(m, t) for m, t in fitting if source in ("", t.source) and target in ("", t.target)]
        if len(chosen) == 1:
            return chosen[0]
        pairs = listed(f"{t.source}-{t.target} ({m.name})" for m, t in fitting)
        if chosen:
            raise InvalidInput("NAME_A_MODEL", f"several translators fit; name a model: {pairs}", known=pairs)
        wish = f"{source or 'any'}-{target or 'any'}"
        raise InvalidInput("UNKNOWN_LANGUAGES", f"no translation {wish} here; there are: {pairs}", got=wish, known=pairs)


class _Together:
    """Several sequences of one call: one reply when the last is done, one error for the first that fails."""

    def __init__(self, engine: Engine, count: int, answer: Answer) -> None:
        self._engine = engine
        self._answer = answer
        self._lock = threading.Lock()  # results come from several workers
        self._missing = count
        self._over = False
        self._begun: list[Sequence] = []
        self._results: list[Classified | None] = [None] * count
        self.sequences: list[Sequence] = []

    @property
    def results(self) -> list[Classified]:
        return [r for r in self._results if r is not None]

    def started(self, sequence: Sequence) -> None:
        with self._lock:
            self._begun.append(sequence)
            over = self._over
        if over:
            self._engine.cancel(sequence)

    def put(self, at: int, sequence: Sequence, result: Classified) -> bool:
        """True for the one result that completes the call."""
        with self._lock:
            self._results[at] = result
            self.sequences.append(sequence)
            self._missing -= 1
            return self._missing == 0 and not self._over

    def fail(self, error: ServeError) -> None:
        with self._lock:
            first, self._over = not self._over, True
        if first:
            self.cancel()
            self._answer.fail(error)

    def cancel(self) -> None:
        with self._lock:
            self._over = True
            begun = list(self._begun)
        for sequence in begun:
            self._engine.cancel(sequence)


def _name(model: Model) -> pb.Model:
    return pb.Model(name=model.name, version=model.version)


def _timing(sequences: list[Sequence]) -> pb.Timing:
    """The longest of several sequences that ran side by side."""
    s = max(sequences, key=lambda s: s.queued + s.run)
    return pb.Timing(queue=s.queued, run=s.run, rounds=s.rounds)


def _wanted(request: pb.TranslateRequest) -> Wanted:
    return Wanted(request.beam, request.max_tokens, request.attention)


def _token(said: Said) -> pb.Token:
    attention = said.attention.tolist() if said.attention is not None else ()
    return pb.Token(piece=said.piece, log_probability=said.log_probability, attention=attention)


def _translation(model: Model, sequence: Sequence, result: Translated) -> pb.TranslateReply:
    return pb.TranslateReply(
        model=_name(model), text=result.text, tokens=map(_token, result.tokens), score=result.score,
        source_tokens=result.source_tokens, ended=result.ended, timing=_timing([sequence]),
    )  # fmt: skip


def write_classification(labels: tuple[str, ...], c: Classified) -> pb.Classification:
    best = int(np.argmax(c.probabilities))
    scores = [pb.LabelScore(label=n, score=p) for n, p in zip(labels, c.probabilities, strict=True)]
    return pb.Classification(label=labels[best], score=c.probabilities[best], scores=scores, tokens=c.tokens)


def read_series(series: pb.Series, channels: tuple[str, ...]) -> Array:
    """float32 [steps, channels]. Raises InvalidInput where the channels or the count of values don't fit."""
    if series.channels != len(channels):
        names = listed(channels)
        message = f"{series.channels} channels; the model takes {len(channels)}: {names}"
        raise InvalidInput("WRONG_CHANNELS", message, expected=len(channels), got=series.channels)
    values = np.array(series.values, np.float32)
    if len(values) % len(channels):
        raise InvalidInput(
            "WRONG_SIZE", f"{len(values)} values are not whole steps of {len(channels)} channels; send all channels of every step",
            expected=f"a multiple of {len(channels)}", got=len(values),
        )  # fmt: skip
    return values.reshape(-1, len(channels))


def write_series(array: Array) -> pb.Series:
    return pb.Series(channels=array.shape[1], values=array.ravel().tolist())


def _facts(model: Model) -> dict[str, str]:
    """What a caller wants to know of a model before calling it."""
    task = model.task
    if isinstance(task, Classifier):
        return {"labels": ",".join(task.labels)}
    if isinstance(task, Translator):
        return {"languages": f"{task.source}-{task.target}", "beam": str(task.beam)}
    if isinstance(task, Forecaster):
        quantiles = ",".join(f"{q:g}" for q in task.quantiles)
        return {"channels": ",".join(task.channels), "horizon": str(task.horizon), "lookback": str(task.lookback), "quantiles": quantiles}
    return {}
