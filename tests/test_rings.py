"""What a call or a turn makes is freed when it is over. Rings of objects live until they are searched for, and to search takes the longer
the more is in memory: with 10,000 sessions it was a tenth of all CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from google.protobuf.message import Message

from protos import inference_pb2 as inference
from protos import seqserve_pb2 as tasks
from protos import sessions_pb2 as pb
from server.app import App
from server.config import Config
from tests.figures.turn_cost import _Call
from tests.played import Wire, run
from tests.process import ROOT

TIMES = 10
SERIES = tasks.Series(channels=7, values=np.ones(96 * 7, np.float32))


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    """A server of the shipped models without port or threads."""
    app = App(Config(models=ROOT / "models", workers=1, port=0, metrics_port=-1))
    app.catalog.scan(ROOT / "models")
    yield app
    app.store.close()


def left_behind(work: Callable[[], None]) -> int:
    """Objects that only the garbage collector finds, once whatever is made once was made: the fewest of three times, since other
    threads of this process may leave some."""
    work()
    fewest = 1 << 30
    for _ in range(3):
        gc.collect()
        gc.disable()
        try:
            work()
            fewest = min(fewest, gc.collect())
        finally:
            gc.enable()
    return fewest


def step(number: int, turn: int, known: bool) -> inference.ModelInferRequest:
    """A unary step of a sequence, parsed (it has a turn's number) or of a known form."""
    asked = inference.ModelInferRequest(model_name="sentiment", raw_input_contents=[np.array([5], np.int64).tobytes()])
    asked.inputs.add(name="tokens", datatype="INT64", shape=(1, 1))
    asked.parameters["sequence_id"].string_param = f"{number}-{known}"
    if turn == 1:
        asked.parameters["sequence_start"].bool_param = True
    if not known:
        asked.parameters["turn"].int64_param = turn
    return asked


ASKED: dict[str, tuple[str, Message]] = {
    "classify": ("seqserve.v1.Tasks/Classify", tasks.ClassifyRequest(texts=["A good film.", "A bad one."])),
    "translate": ("seqserve.v1.Tasks/Translate", tasks.TranslateRequest(text="A dog runs.", beam=2)),
    "translate in pieces": ("seqserve.v1.Tasks/TranslateStream", tasks.TranslateRequest(text="A dog runs.", beam=1)),
    "tag": ("seqserve.v1.Tasks/Tag", tasks.TagRequest(inputs=[tasks.TagInput(text="Anna lives in Paris.")])),
    "generate": ("seqserve.v1.Tasks/Generate", tasks.GenerateRequest(text="ROMEO:", max_symbols=3)),
    "forecast": ("seqserve.v1.Tasks/Forecast", tasks.ForecastRequest(observations=SERIES, horizon=24)),
}


@pytest.mark.parametrize("what", ASKED)
def test_calls(app: App, what: str) -> None:
    method, request = ASKED[what]
    start = app.methods[f"/{method}"].start

    def work() -> None:
        for _ in range(TIMES):
            start(_Call(), request.SerializeToString())
            run(app)

    assert left_behind(work) < TIMES


@pytest.mark.parametrize("known", [False, True])
def test_steps_of_sequences(app: App, known: bool) -> None:
    start = app.methods["/inference.GRPCInferenceService/ModelInfer"].start
    turn = 0

    def work() -> None:
        nonlocal turn
        for _ in range(TIMES):
            turn += 1
            app.workers.attend()
            for number in range(5):
                start(_Call(), step(number, turn, known).SerializeToString())
            run(app)

    assert left_behind(work) < TIMES


def tensors(id: str, turn: int) -> pb.TurnRequest:
    tensor = pb.Tensor(name="tokens", datatype="INT64", shape=(1, 1), data=np.array([5], np.int64).tobytes())
    return pb.TurnRequest(session=id, turn=turn, acknowledged=turn - 1, tensors=pb.Tensors(tensors=[tensor]))


def text(id: str, turn: int) -> pb.TurnRequest:
    return pb.TurnRequest(session=id, turn=turn, acknowledged=turn - 1, text="a good ")


def generated(id: str, turn: int) -> pb.TurnRequest:
    return pb.TurnRequest(session=id, turn=turn, acknowledged=turn - 1, generate=tasks.GenerateRequest(text="x", max_symbols=3))


@pytest.mark.parametrize(("model", "made"), [("sentiment", tensors), ("sentiment", text), ("shakespeare", generated)])
def test_turns(app: App, model: str, made: Callable[[str, int], pb.TurnRequest]) -> None:
    wire, turn = Wire(app), 0
    ids = [app.shelf.open(model, "").id for _ in range(5)]

    def work() -> None:
        nonlocal turn
        for _ in range(TIMES):
            turn += 1
            app.workers.attend()
            wire.send(*(made(id, turn) for id in ids))
            run(app)
        assert not any(r.refusal.code for r in wire.replies)
        wire.replies.clear()

    assert left_behind(work) < TIMES
