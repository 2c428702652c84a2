"""seqserve.v1.Tasks: text and series in and out. Wire in, one call, wire out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from protos import seqserve_pb2 as pb
from server.catalog import Catalog, Model
from server.errors import InvalidInput, NotFound, ServeError, listed
from server.inputs import Array
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.rpc.generation import read_wishes, write_generated, write_piece
from server.rpc.together import Together
from server.sequence import Sequence
from server.shares import Claim
from server.tasks.classify import Classified, Classifier
from server.tasks.forecast import Forecasted, Forecaster
from server.tasks.generate import Drawn, Generated, Generator
from server.tasks.tag import Tagged, Tagger
from server.tasks.translate import Said, Translated, Translator, Wanted

SERVICE = "seqserve.v1.Tasks"
MOST_TEXTS = 256
MOST_LETTERS = 500_000  # of one call: vocabularies read some 3 million letters a second, and others wait meanwhile
T = TypeVar("T", Classifier, Translator, Forecaster, Tagger, Generator)


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
            f"/{SERVICE}/Tag": desk.unary(pb.TagRequest, self.tag),
            f"/{SERVICE}/Generate": desk.unary(pb.GenerateRequest, self.generate),
            f"/{SERVICE}/GenerateStream": desk.server_stream(pb.GenerateRequest, self.generate_stream),
            f"/{SERVICE}/Models": desk.unary(pb.ModelsRequest, self.models),
        }

    def classify(self, request: pb.ClassifyRequest, answer: Answer) -> None:
        claim = answer.claim()
        model, task = self._model("classify", request.model, Classifier, claim)
        texts = list(request.texts)
        _check_many(len(texts), sum(map(len, texts)))
        together: Together[Classified] = Together(model.engine, len(texts), answer)

        def then(at: int) -> Callable[[Sequence, Classified], None]:
            def classified(sequence: Sequence, result: Classified) -> None:
                if not together.put(at, sequence, result):
                    return
                reply = pb.ClassifyReply(model=_name(model), timing=write_timing(together.longest))
                for c in together.results:
                    reply.results.append(write_classification(task.labels, c))
                answer.done(reply)

            return classified

        answer.cancel_by(together.cancel)
        try:
            for i, text in enumerate(texts):
                together.started(task.start(text, then(i), together.fail, claim))
        except ServeError as e:
            together.fail(e)

    def translate(self, request: pb.TranslateRequest, answer: Answer) -> None:
        claim = answer.claim()
        model, task = self._translator(request, claim)

        def then(sequence: Sequence, result: Translated) -> None:
            answer.done(_translation(model, sequence, result))

        sequence = task.start(request.text, _wanted(request), then, answer.fail, None, claim)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def translate_stream(self, request: pb.TranslateRequest, answer: Answer) -> None:
        claim = answer.claim()
        model, task = self._translator(request, claim)

        def said(s: Said) -> None:
            answer.send(pb.TranslatePiece(text=s.text, token=_token(s)))

        def then(sequence: Sequence, result: Translated) -> None:
            answer.send(pb.TranslatePiece(done=_translation(model, sequence, result)))
            answer.done()

        sequence = task.start(request.text, _wanted(request), then, answer.fail, said, claim)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def forecast(self, request: pb.ForecastRequest, answer: Answer) -> None:
        claim = answer.claim()
        model, task = self._model("forecast", request.model, Forecaster, claim)
        observations = read_series(request.observations, task.channels)

        def then(sequence: Sequence, result: Forecasted) -> None:
            reply = pb.ForecastReply(
                model=_name(model), channels=task.channels, mean=write_series(result.mean), timing=write_timing(sequence)
            )
            for quantile, values in result.quantiles:
                reply.quantiles.add(quantile=quantile, series=write_series(values))
            answer.done(reply)

        sequence = task.start(observations, request.horizon, request.quantiles, then, answer.fail, claim)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def tag(self, request: pb.TagRequest, answer: Answer) -> None:
        claim = answer.claim()
        model, task = self._model("tag", request.model, Tagger, claim)
        given = [_words_or_text(f"inputs[{i}]", one) for i, one in enumerate(request.inputs)]
        _check_many(len(given), sum(len(g) if isinstance(g, str) else sum(map(len, g)) for g in given))
        together: Together[Tagged] = Together(model.engine, len(given), answer)

        def then(at: int) -> Callable[[Sequence, Tagged], None]:
            def tagged(sequence: Sequence, result: Tagged) -> None:
                if together.put(at, sequence, result):
                    found = map(_tagging, together.results)
                    answer.done(pb.TagReply(model=_name(model), results=found, timing=write_timing(together.longest)))

            return tagged

        answer.cancel_by(together.cancel)
        try:
            for i, one in enumerate(given):
                together.started(task.start(one, then(i), together.fail, claim))
        except ServeError as e:
            together.fail(e)

    def generate(self, request: pb.GenerateRequest, answer: Answer) -> None:
        claim = answer.claim()
        model, task = self._model("generate", request.model, Generator, claim)

        def then(sequence: Sequence, result: Generated) -> None:
            answer.done(_generated(model, sequence, result))

        sequence = task.start(request.text, read_wishes(request), then, answer.fail, None, claim)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def generate_stream(self, request: pb.GenerateRequest, answer: Answer) -> None:
        claim = answer.claim()
        model, task = self._model("generate", request.model, Generator, claim)

        def drawn(symbol: Drawn) -> None:
            answer.send(write_piece(symbol))

        def then(sequence: Sequence, result: Generated) -> None:
            answer.send(pb.GeneratePiece(done=_generated(model, sequence, result)))
            answer.done()

        sequence = task.start(request.text, read_wishes(request), then, answer.fail, drawn, claim)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def models(self, request: pb.ModelsRequest, answer: Answer) -> None:
        reply = pb.ModelsReply()
        for m in self._catalog.models():
            reply.models.add(
                name=m.name, version=m.version, kind=m.bundle.kind, ready=self._ready(), facts=_facts(m), fingerprint=m.bundle.fingerprint
            )
        answer.done(reply)

    def _model(self, kind: str, wanted: pb.Model, task: type[T], claim: Claim) -> tuple[Model, T]:
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
        model.engine.check(claim)  # before the text is read: that costs several times what a refusal does
        return model, model.task

    def _translator(self, request: pb.TranslateRequest, claim: Claim) -> tuple[Model, Translator]:
        """The translator that a request names, or the one for its languages."""
        source, target = request.source, request.target
        if request.model.name or not (source or target):
            model, task = self._model("translate", request.model, Translator, claim)
            fitting = [(model, task)]
        else:
            fitting = [(m, m.task) for m in self._catalog.newest("translate") if isinstance(m.task, Translator)]
        chosen = [(m, t) for m, t in fitting if source in ("", t.source) and target in ("", t.target)]
        if len(chosen) == 1:
            chosen[0][0].engine.check(claim)
            return chosen[0]
        pairs = listed(f"{t.source}-{t.target} ({m.name})" for m, t in fitting)
        if chosen:
            raise InvalidInput("NAME_A_MODEL", f"several translators fit; name a model: {pairs}", known=pairs)
        wish = f"{source or 'any'}-{target or 'any'}"
        raise InvalidInput("UNKNOWN_LANGUAGES", f"no translation {wish} here; there are: {pairs}", got=wish, known=pairs)


def _check_many(count: int, letters: int) -> None:
    """Raise InvalidInput where a call has too many texts, or too long ones."""
    if not 1 <= count <= MOST_TEXTS:
        message = f"{count} texts; allowed are 1 to {MOST_TEXTS} in one call"
        raise InvalidInput("BAD_COUNT", message, expected=f"1..{MOST_TEXTS}", got=count)
    if letters > MOST_LETTERS:
        message = f"{letters} letters in all; at most {MOST_LETTERS} are allowed in one call: send several"
        raise InvalidInput("TOO_LONG", message, expected=f"1..{MOST_LETTERS}", got=letters)


def _words_or_text(where: str, given: pb.TagInput) -> str | list[str]:
    if given.text and given.words:
        message = f"{where} has a text and words; send either, the words being the text's own"
        raise InvalidInput("TEXT_AND_WORDS", message, input=where)
    return list(given.words) or given.text


def _tagging(result: Tagged) -> pb.Tagging:
    found = (
        pb.Span(label=s.label, text=s.text, start=s.start, end=s.end, first_word=s.first, end_word=s.last, score=s.score)
        for s in result.spans
    )
    return pb.Tagging(spans=found, words=result.words)


def _name(model: Model) -> pb.Model:
    return pb.Model(name=model.name, version=model.version)


def write_timing(ran: Sequence) -> pb.Timing:
    return pb.Timing(queue=ran.queued, run=ran.run, rounds=ran.rounds)


def _wanted(request: pb.TranslateRequest) -> Wanted:
    return Wanted(request.beam, request.max_tokens, request.attention)


def _token(said: Said) -> pb.Token:
    attention = said.attention.tolist() if said.attention is not None else ()
    return pb.Token(piece=said.piece, log_probability=said.log_probability, attention=attention)


def _translation(model: Model, sequence: Sequence, result: Translated) -> pb.TranslateReply:
    return pb.TranslateReply(
        model=_name(model), text=result.text, tokens=map(_token, result.tokens), score=result.score,
        source_tokens=result.source_tokens, ended=result.ended, timing=write_timing(sequence),
    )  # fmt: skip


def _generated(model: Model, sequence: Sequence, result: Generated) -> pb.GenerateReply:
    reply = write_generated(result)
    reply.model.CopyFrom(_name(model))
    reply.timing.CopyFrom(write_timing(sequence))
    return reply


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
    if isinstance(task, Tagger):
        return {"labels": ",".join(task.labels)}
    if isinstance(task, Generator):
        return {"symbols": str(task.vocabulary.size), "longest": str(task.most)}
    if isinstance(task, Forecaster):
        quantiles = ",".join(f"{q:g}" for q in task.quantiles)
        return {"channels": ",".join(task.channels), "horizon": str(task.horizon), "lookback": str(task.lookback), "quantiles": quantiles}
    return {}
