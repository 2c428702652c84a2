"""The shipped bundles by their tasks, over a real port: answers equal the slow references, bad input is told what is allowed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from contract import bundle as contract
from contract.bundle import Bundle
from contract.text import Vocabulary
from protos import seqserve_pb2 as pb
from server.graph import OnnxGraph
from tests.process import ROOT, Served, reason, serve
from tests.test_server import metric
from training import search

TASKS = "/seqserve.v1.Tasks"
SENTENCES = [
    "A man in a blue shirt is standing on a ladder.",
    "Two dogs play in the snow.",
    "A girl reads a book on the beach.",
    "Three people are sitting at a table in front of a restaurant, talking and drinking coffee in the sun.",
    "Run!",
    "A boy with a red cap jumps over a puddle while his mother takes a picture of him.",
    "An old woman sells flowers at the market.",
    "zyx qwv 123 ü",
]


@pytest.fixture(scope="module", params=["direct", "public"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with serve(ROOT / "models", "--front", request.param) as server:
        yield server


class Loaded:
    """A shipped bundle, run by hand: the slow reference."""

    def __init__(self, name: str) -> None:
        self.directory = max((ROOT / "models" / name).iterdir(), key=lambda d: int(d.name))
        self.bundle: Bundle = contract.load(self.directory)
        self.graphs = {key: OnnxGraph(g, self.directory / g.file) for key, g in self.bundle.graphs.items()}

    def vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self.directory / self.bundle.resources[self.bundle.task["vocabulary"]])

    def whole(self, **inputs: Any) -> dict[str, Any]:
        """One bare run of the main graph from fresh states."""
        onnx = self.graphs[self.bundle.main]
        rows = next(iter(inputs.values())).shape[0]
        return dict(zip(onnx.outputs, onnx.run({**inputs, **{s.input: s.fresh(rows) for s in onnx.graph.states}}), strict=True))


def one_by_one(translator: Loaded, sentences: list[str], beam: int) -> list[str]:
    """Translations by the reference loop, each sentence alone."""
    vocabulary, task = translator.vocabulary(), translator.bundle.task
    encode, step = translator.graphs["encode"], translator.graphs["step"]
    feed = next(s for s in step.graph.states if s.input == "feed")
    found = []
    for sentence in sentences:
        source = np.append(vocabulary.encode(sentence), task["end"])
        answer = search.translate(
            lambda tokens: encode.run({"tokens": tokens, "lengths": np.full(len(tokens), tokens.shape[1], np.int32)}),
            lambda tokens, memory, row, h, c, fed: step.run(
                {"tokens": tokens, "memory": memory, "row": row, "h": h, "c": c, "feed": fed}
            ),
            [source], start=task["start"], end=task["end"], beam=beam, length_penalty=task["length_penalty"],
            max_length=task["max_length"], feed=int(feed.axes[1]),
        )[0]  # fmt: skip
        found.append(vocabulary.decode(answer.tokens))
    return found


def test_translations_together_are_translations_alone(served: Served) -> None:
    """All sentences at once, with beams 1 to 5 mixed, give exactly the reference loop's texts, whole and streamed."""
    translator = Loaded("translator")
    jobs = [(sentence, beam) for beam in (1, 2, 5) for sentence in SENTENCES]
    expected = list(itertools.chain.from_iterable(one_by_one(translator, SENTENCES, beam) for beam in (1, 2, 5)))
    whole = served.method(f"{TASKS}/Translate", pb.TranslateReply)
    stream = served.stream(f"{TASKS}/TranslateStream", pb.TranslatePiece)

    def ask(job: tuple[str, int]) -> tuple[str, str, str]:
        request = pb.TranslateRequest(text=job[0], beam=job[1])
        *pieces, last = stream(request)
        assert all(not p.HasField("done") for p in pieces)
        assert len(pieces) == len(last.done.tokens)
        return whole(request).text, "".join(p.text for p in pieces), last.done.text

    with ThreadPoolExecutor(12) as pool:
        for text, answers in zip(expected, pool.map(ask, jobs), strict=True):
            assert answers == (text, text, text)


def test_attention(served: Served) -> None:
    """On request each token comes with a weight for every source token; they sum to one."""
    reply = served.method(f"{TASKS}/Translate", pb.TranslateReply)(pb.TranslateRequest(text=SENTENCES[0], attention=True))
    assert reply.ended
    assert len(reply.source_tokens) > 5
    for token in reply.tokens:
        assert len(token.attention) == len(reply.source_tokens)
        assert sum(token.attention) == pytest.approx(1, abs=1e-5)
    plain = served.method(f"{TASKS}/Translate", pb.TranslateReply)(pb.TranslateRequest(text=SENTENCES[0]))
    assert plain.text == reply.text
    assert not plain.tokens[0].attention


def test_cut_at_max_tokens(served: Served) -> None:
    """A translation that reaches the caller's limit says that it did not end."""
    reply = served.method(f"{TASKS}/Translate", pb.TranslateReply)(pb.TranslateRequest(text=SENTENCES[3], max_tokens=3))
    assert len(reply.tokens) == 3
    assert not reply.ended


def test_a_stream_cancelled_midway(served: Served) -> None:
    """A caller who leaves in the middle of a translation frees its rows."""
    stream = served.stream(f"{TASKS}/TranslateStream", pb.TranslatePiece)
    for _ in range(20):
        call = stream(pb.TranslateRequest(text=" ".join(SENTENCES), beam=1))
        next(call)
        call.cancel()
    waiting = 1.0
    for _ in range(2000):  # each look is a real call; rows are free as soon as the round under way ends
        waiting = sum(metric(served, "seqserve_waiting"))
        if not waiting:
            break
    assert waiting == 0


def test_labels_are_those_of_a_bare_run(served: Served) -> None:
    """Many texts in few calls get exactly the probabilities of each text run alone and whole."""
    sentiment = Loaded("sentiment")
    vocabulary = sentiment.vocabulary()
    texts = [" ".join(SENTENCES[: n % 8 + 1]) * (n % 5 + 1) for n in range(40)] + ["Wonderful!", "A waste of time.<br /><br />Really."]
    classify = served.method(f"{TASKS}/Classify", pb.ClassifyReply)
    with ThreadPoolExecutor(4) as pool:
        replies = pool.map(lambda part: classify(pb.ClassifyRequest(texts=part)), [texts[i::4] for i in range(4)])
    for i, reply in enumerate(replies):
        for text, result in zip(texts[i::4], reply.results, strict=True):
            ids = vocabulary.encode(text)
            expected = sentiment.whole(tokens=ids[None])["probabilities"][0]
            assert [s.score for s in result.scores] == expected.tolist()
            assert result.label == result.scores[int(expected.argmax())].label
            assert result.tokens == len(ids)
    good, bad = classify(pb.ClassifyRequest(texts=["A wonderful, moving film. I loved it.", "Terrible. Boring and badly acted."])).results
    assert (good.label, bad.label) == ("positive", "negative")


def observations(steps: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    daily = np.sin(np.arange(steps)[:, None] * np.pi / 12 + np.arange(7))
    return (10 + 5 * daily + rng.normal(size=(steps, 7))).astype(np.float32)


def forecast_request(values: np.ndarray, **fields: Any) -> pb.ForecastRequest:
    return pb.ForecastRequest(observations=pb.Series(channels=values.shape[1], values=values.ravel()), **fields)


def test_forecasts_are_those_of_a_bare_run(served: Served) -> None:
    """Series of all lengths at once get exactly the forecast of each run alone and whole; horizon and quantiles as asked."""
    forecaster = Loaded("forecaster")
    quantiles = forecaster.bundle.task["quantiles"]
    forecast = served.method(f"{TASKS}/Forecast", pb.ForecastReply)
    series = [observations(steps, steps) for steps in (1, 5, 50, 96, 97, 200, 300)]
    with ThreadPoolExecutor(7) as pool:
        replies = list(pool.map(lambda values: forecast(forecast_request(values)), series))
    for values, reply in zip(series, replies, strict=True):
        expected = forecaster.whole(**{forecaster.bundle.graph.data[0].name: values[None]})
        assert list(reply.mean.values) == expected["mean"].ravel().tolist()
        for i, q in enumerate(reply.quantiles):
            assert q.quantile == pytest.approx(quantiles[i])
            assert list(q.series.values) == expected["quantiles"][..., i].ravel().tolist()
    part = forecast(forecast_request(series[3], horizon=12, quantiles=[0.9, 0.1]))
    assert [round(q.quantile, 6) for q in part.quantiles] == [0.9, 0.1]
    assert list(part.mean.values) == list(replies[3].mean.values[: 12 * 7])
    high, low = (np.array(q.series.values) for q in part.quantiles)
    assert (high >= low).all()


NAN = observations(4)
NAN[2, 3] = np.nan


def named(name: str, version: str = "") -> pb.Model:
    return pb.Model(name=name, version=version)


C, T = pb.ClassifyRequest, pb.TranslateRequest
BAD: list[tuple[str, str, Any, str, str]] = [
    ("no texts", "Classify", C(), "BAD_COUNT", "allowed are 1 to 256"),
    ("too many texts", "Classify", C(texts=["a"] * 257), "BAD_COUNT", "allowed are 1 to 256"),
    ("an empty text", "Classify", C(texts=["fine", " \n "]), "EMPTY_TEXT", "send at least one"),
    ("a long text", "Classify", C(texts=["so " * 33_000]), "TOO_LONG", "tokens; at most"),
    ("a longer text", "Classify", C(texts=["so " * 70_000]), "TOO_LONG", "210000 letters; at most 100000"),
    ("long texts", "Classify", C(texts=["so " * 30_000] * 6), "TOO_LONG", "540000 letters in all; at most 500000"),
    ("unknown model", "Classify", C(model=named("no"), texts=["a"]), "UNKNOWN_MODEL", "forecaster, sentiment, "),
    ("unknown version", "Classify", C(model=named("sentiment", "99"), texts=["a"]), "UNKNOWN_VERSION", "it has: 1"),
    ("another task's model", "Classify", C(model=named("translator"), texts=["a"]), "WRONG_TASK", "can translate, not classify"),
    ("invalid UTF-8", "Classify", b"\x12\x02\xc3\x28", "NOT_PROTOBUF", "must be UTF-8"),
    ("nothing to translate", "Translate", T(text="  "), "EMPTY_TEXT", "send at least one"),
    ("too long to translate", "Translate", T(text="so " * 5000), "TOO_LONG", "tokens; at most"),
    ("languages", "Translate", T(text="a", source="en", target="fr"), "UNKNOWN_LANGUAGES", "there are: en-de (translator)"),
    ("a model's languages", "Translate", T(text="a", source="de", model=named("translator")), "UNKNOWN_LANGUAGES", "en-de"),
    ("beam", "Translate", T(text="a", beam=11), "BAD_BEAM", "allowed are 1 to 10"),
    ("limit", "Translate", T(text="a", max_tokens=100_000), "BAD_LIMIT", "allowed are 1 to"),
    ("no observations", "Forecast", forecast_request(observations(0)), "EMPTY_SEQUENCE", "send at least one"),
    ("channels", "Forecast", forecast_request(observations(4)[:, :3]), "WRONG_CHANNELS", "takes 7: HUFL"),
    ("half a step", "Forecast", pb.ForecastRequest(observations=pb.Series(channels=7, values=[1.0] * 8)), "WRONG_SIZE", "steps of 7"),
    ("NaN", "Forecast", forecast_request(NAN), "NOT_FINITE", "only finite numbers"),
    ("horizon", "Forecast", forecast_request(observations(4), horizon=97), "BAD_HORIZON", "allowed are 1 to 96"),
    ("quantile", "Forecast", forecast_request(observations(4), quantiles=[0.123]), "UNKNOWN_QUANTILE", "not one of the model's: 0.1"),
    (
        "quantile twice",
        "Forecast",
        forecast_request(observations(4), quantiles=[0.1, 0.9, 0.1]),
        "REPEATED_QUANTILE",
        "0.1 is asked for twice",
    ),
    ("many quantiles", "Forecast", forecast_request(observations(4), quantiles=[0.5] * 100_000), "REPEATED_QUANTILE", "0.5 is asked for"),
    ("NaN quantile", "Forecast", forecast_request(observations(4), quantiles=[float("nan")]), "UNKNOWN_QUANTILE", "is not one of"),
]


@pytest.mark.parametrize(("method", "request_", "expected", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(served: Served, method: str, request_: Any, expected: str, says: str) -> None:
    """Each fault gets its typed error, and a good call made at the same time is answered as ever."""
    classify = served.method(f"{TASKS}/Classify", pb.ClassifyReply)
    neighbour = classify.future(pb.ClassifyRequest(texts=["A good film."]))
    with pytest.raises(grpc.RpcError) as caught:
        served.method(f"{TASKS}/{method}")(request_)
    code, why, _, _ = reason(caught.value)
    status = "NOT_FOUND" if expected.startswith("UNKNOWN_MODEL") or expected == "UNKNOWN_VERSION" else "INVALID_ARGUMENT"
    assert (code.name, why) == (status, expected)
    assert says in caught.value.details()
    assert neighbour.result().results[0].label == "positive"


def test_models_are_described(served: Served) -> None:
    """Models lists what is here with what a caller wants to know."""
    reply = served.method(f"{TASKS}/Models", pb.ModelsReply)(pb.ModelsRequest())
    facts = {m.kind: m.facts for m in reply.models}
    assert facts["classify"]["labels"] == "negative,positive"
    assert facts["translate"]["languages"] == "en-de"
    assert facts["forecast"]["channels"].startswith("HUFL,")
    assert all(m.ready and m.fingerprint.startswith("sha256:") for m in reply.models)
