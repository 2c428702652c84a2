"""What a model takes and gives over the Open Inference Protocol, prepared once: its tensors, and its task's texts beside them.

A model that labels texts takes TEXT in place of its tokens, and gives LABEL beside its own outputs; one that generates gives
CONTINUATION; one that translates takes TEXT and gives TRANSLATION, its tensors being of no use to a caller. TEXT is BYTES
[batch, 1]: one text a row. An ONNX input of that name is the model's own, and then there is no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from contract.bundle import BATCH, Tensor
from contract.sampling import Manner
from protos import inference_pb2 as pb
from server.catalog import Model
from server.errors import InvalidInput, ServeError, listed
from server.inputs import Array, Sizes
from server.rpc.parameters import number, whole
from server.rpc.shared_memory import REGION, Place, place
from server.rpc.wire import Values
from server.sequence import Sequence
from server.shares import Claim
from server.tasks.classify import Classifier
from server.tasks.generate import Drawn, Generated, Generator
from server.tasks.generate import Wanted as Wishes
from server.tasks.translate import Said, Translated, Translator, Wanted
from server.turns import Plan

TEXT = Tensor("TEXT", "string", (BATCH, 1), "a text, UTF-8")
LABEL = Tensor("LABEL", "string", (BATCH, 1), "the most probable label")
TRANSLATION = Tensor("TRANSLATION", "string", (BATCH, 1), "the text in the other language; in a stream, a piece of it")

CONTINUATION = Tensor("CONTINUATION", "string", (BATCH, 1), "how the text goes on; in a stream, a piece of it")

Then = Callable[[Sequence, Values], None]
Failed = Callable[[ServeError], None]


class Texts(Protocol):
    """A task reached by TEXT. One text is one row: outputs are [1, ...]."""

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Of a call by texts."""

    @property
    def streams(self) -> bool:
        """Whether it answers in pieces where its caller takes them."""

    def more(self, outputs: Values) -> Values:
        """The outputs of a call by tensors, with those of the task that can be told from them."""

    def start(
        self, text: str, request: pb.ModelInferRequest, then: Then, failed: Failed, said: Callable[[Values], None] | None,
        claim: Claim,
    ) -> Sequence:  # fmt: skip
        """Queue one text; where the task streams, `said` is called with each piece. Raises InvalidInput."""

    def turn(self, text: str, rest: str, answer: Callable[[Values, Sequence], bytes]) -> Plan:
        """One piece of a sequence's text. Raises InvalidInput where the task takes no pieces."""


class _Labels:
    streams = False

    def __init__(self, model: Model, task: Classifier) -> None:
        self._model = model
        self._task = task
        self._labels = np.array(task.labels, object)
        own = model.bundle.graph.outputs
        self.outputs = (LABEL, *(t for t in own if t.time_axis is None and t.batch_axis == 0))

    def more(self, outputs: Values) -> Values:
        label = self._labels[outputs["probabilities"].argmax(1)][:, None]
        return {LABEL.name: label, **{t.name: outputs[t.name] for t in self._model.bundle.graph.outputs}}

    def start(
        self, text: str, request: pb.ModelInferRequest, then: Then, failed: Failed, said: Callable[[Values], None] | None,
        claim: Claim,
    ) -> Sequence:  # fmt: skip
        ids = self._task.ids(text)
        sequence = Sequence(
            self._model.bundle.main, {"tokens": ids[None]}, Sizes(1, len(ids)), lambda s, outputs: then(s, self.more(outputs)), failed
        )
        self._model.engine.submit(sequence, claim)
        return sequence

    def turn(self, text: str, rest: str, answer: Callable[[Values, Sequence], bytes]) -> Plan:
        read = self._task.read(text, rest)
        glance = ({"tokens": read.glance[None]}, Sizes(1, len(read.glance)))
        words = None if read.words is None else ({"tokens": read.words[None]}, Sizes(1, len(read.words)))
        return Plan(lambda outputs, ran: answer(self.more(outputs), ran), read.rest, words, glance)


class _Translations:
    streams = True
    outputs = (TRANSLATION,)

    def __init__(self, task: Translator) -> None:
        self._task = task

    def more(self, outputs: Values) -> Values:
        return outputs

    def start(
        self, text: str, request: pb.ModelInferRequest, then: Then, failed: Failed, said: Callable[[Values], None] | None,
        claim: Claim,
    ) -> Sequence:  # fmt: skip
        given = request.parameters
        beam, most = (whole(name, given[name]) if name in given else 0 for name in ("beam", "max_tokens"))

        def told(s: Said) -> None:
            assert said is not None
            said({TRANSLATION.name: _one(s.text)})

        def done(sequence: Sequence, result: Translated) -> None:
            then(sequence, {TRANSLATION.name: _one(result.text)})

        return self._task.start(text, Wanted(beam, most), done, failed, told if said is not None else None, claim)

    def turn(self, text: str, rest: str, answer: Callable[[Values, Sequence], bytes]) -> Plan:
        raise InvalidInput("NO_TURNS", "this model answers whole texts: send them without a sequence_id")


class _Continuations:
    streams = True
    outputs = (CONTINUATION,)

    def __init__(self, task: Generator) -> None:
        self._task = task

    def more(self, outputs: Values) -> Values:
        return outputs

    def start(
        self, text: str, request: pb.ModelInferRequest, then: Then, failed: Failed, said: Callable[[Values], None] | None,
        claim: Claim,
    ) -> Sequence:  # fmt: skip
        given = request.parameters
        top_k, most = (whole(name, given[name]) if name in given else 0 for name in ("top_k", "max_symbols"))
        heat = number("temperature", given["temperature"]) if "temperature" in given else 1.0
        seed = whole("seed", given["seed"]) if "seed" in given else None
        stop = (given["stop"].string_param,) if "stop" in given else ()

        def drawn(d: Drawn) -> None:
            assert said is not None
            said({CONTINUATION.name: _one(d.text)})

        def done(sequence: Sequence, result: Generated) -> None:
            then(sequence, {CONTINUATION.name: _one(result.text)})

        wishes = Wishes(Manner(heat, top_k), seed, most, stop)
        return self._task.start(text, wishes, done, failed, drawn if said is not None else None, claim)

    def turn(self, text: str, rest: str, answer: Callable[[Values, Sequence], bytes]) -> Plan:
        raise InvalidInput("NO_TURNS", "over this protocol TEXT is gone on with at once: send it without a sequence_id")


class Face:
    """One model as callers of the protocol see it."""

    __slots__ = ("_known", "head", "inputs", "model", "outputs", "own", "texts")

    def __init__(self, model: Model) -> None:
        graph = model.bundle.graph
        self.model = model
        self.head = pb.ModelInferResponse(model_name=model.name, model_version=model.version).SerializeToString()
        self.texts = _texts(model)
        self.own = graph.outputs if not graph.ragged else ()  # of a call by tensors that names none
        extra = self.texts.outputs if self.texts is not None else ()
        self.inputs = (*(graph.data if not graph.ragged else ()), *((TEXT,) if self.texts is not None else ()))
        self.outputs = (*(t for t in extra if t not in self.own), *self.own)
        self._known: Mapping[str, Tensor] = {t.name: t for t in self.outputs}

    @property
    def batched(self) -> bool:
        """Whether rows lie along the first axis of every tensor."""
        return all(t.axes[:1] == (BATCH,) for t in (*self.inputs, *self.outputs))

    @property
    def most_rows(self) -> int:
        """Of one request."""
        return min(self.model.tensors.most_rows, self.model.bundle.graph.max_rows) if self.own else self.model.tensors.most_rows

    def chosen(self, request: pb.ModelInferRequest) -> tuple[list[Tensor], dict[str, Place]]:
        """The outputs that a request asks for by name, and where in shared memory those go that go there. Raises InvalidInput."""
        tensors: dict[str, Tensor] = {}
        places = {}
        for output in request.outputs:
            name = output.name
            tensor = self._known.get(name)
            if tensor is None:
                known = listed(self._known)
                message = f"output {name!r} is not one of the model's: {known}"
                raise InvalidInput("UNKNOWN_OUTPUT", message, tensor=name, expected=known)
            if name in tensors:  # its bytes would be made and sent once for each time
                raise InvalidInput("REPEATED_OUTPUT", f"output {name!r} is asked for twice; ask for it once", tensor=name)
            tensors[name] = tensor
            if output.parameters and REGION in output.parameters:
                places[name] = place(name, output.parameters)
        return list(tensors.values()), places

    def rows(self, inputs: Mapping[str, Array]) -> list[str]:
        """The texts of a request that brings TEXT. Raises InvalidInput."""
        if len(inputs) > 1:
            others = listed(name for name in inputs if name != TEXT.name)
            raise InvalidInput("TWO_INPUTS", f"TEXT and {others} say the same: send one of them", got=others)
        array = inputs[TEXT.name]
        if array.dtype != object:
            raise InvalidInput("WRONG_DTYPE", "input 'TEXT' is BYTES [batch, 1]", tensor=TEXT.name, expected="BYTES", got=array.dtype.name)
        if array.ndim not in (1, 2) or array.shape[1:] not in ((), (1,)):
            got = list(array.shape)
            raise InvalidInput("WRONG_SHAPE", f"input 'TEXT' is BYTES [batch, 1], one text a row; got {got}", tensor=TEXT.name, got=got)
        most = self.most_rows
        if not 1 <= len(array) <= most:
            message = f"{len(array)} texts in one request; allowed are 1 to {most}"
            raise InvalidInput("BAD_ROWS", message, expected=f"1..{most}", got=len(array))
        texts: list[str] = array.ravel().tolist()
        return texts


def _texts(model: Model) -> Texts | None:
    graph = model.bundle.graph
    if not graph.ragged and TEXT.name in graph.expected:
        return None  # the model's own
    if isinstance(model.task, Classifier):
        return _Labels(model, model.task)
    if isinstance(model.task, Translator):
        return _Translations(model.task)
    if isinstance(model.task, Generator):
        return _Continuations(model.task)
    return None


def _one(text: str) -> Array:
    """[1, 1]"""
    array = np.empty((1, 1), object)
    array[0, 0] = text
    return array
