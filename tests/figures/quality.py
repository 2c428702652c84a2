"""How good the shipped bundles are, on the full test sets: `make quality DATA=DIR`, with RUN=--served over gRPC.

Without --served the bundles run in this process through the server's own catalog, engine and graph runner; with it, in
a server of their own, asked over a real port by the client that users import. The figures must be the same.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import sacrebleu
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from contract.chain import labelled
from contract.text import of_letters
from seqserve import Client
from server.catalog import Catalog
from server.errors import ServeError
from server.metrics import Metrics
from server.rounds import Limits
from server.tasks.classify import Classifier
from server.tasks.forecast import Forecaster
from server.tasks.tag import Tagger
from server.tasks.translate import Translator, Wanted
from server.workers import Workers
from tests.process import ROOT, serve
from training import charlm
from training.data import ett, imdb, mnist, multi30k, shakespeare, wnut17

A = TypeVar("A")
B = TypeVar("B")
IN_FLIGHT = 256
LOW_F1 = 20.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. `low` and `high` are what it must lie between; None: it is told, not held."""

    model: str
    data: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    @property
    def held(self) -> bool:
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def floor(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} – {self.high:g}"
        return f"≥ {self.low:g}" if self.low is not None else f"≤ {self.high:g}" if self.high is not None else ""


class Offline:
    """Asks the engine in this process."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def label(self, text: str) -> Future[str]:
        task = self._task("classify", Classifier)
        return _later(lambda then, failed: task.start(text, then, failed), lambda c: task.labels[int(np.argmax(c.probabilities))])

    def translation(self, text: str, source: str, target: str, beam: int) -> Future[str]:
        fitting = [m.task for m in self._catalog.newest("translate") if isinstance(m.task, Translator)]
        task = next(t for t in fitting if (t.source, t.target) == (source, target))
        return _later(lambda then, failed: task.start(text, Wanted(beam), then, failed), lambda t: t.text)

    def forecast(self, observations: np.ndarray[Any, Any]) -> Future[tuple[Any, dict[float, Any]]]:
        task = self._task("forecast", Forecaster)
        return _later(lambda then, failed: task.start(observations, 0, (), then, failed), lambda f: (f.mean, dict(f.quantiles)))

    def spans(self, given: str | Sequence[str]) -> Future[list[tuple[int, int, str]]]:
        """Of a text in characters, of words in words."""
        task = self._task("tag", Tagger)
        ends = ("start", "end") if isinstance(given, str) else ("first", "last")
        return _later(lambda then, failed: task.start(given, then, failed), lambda t: _ends(t.spans, *ends))

    def tensor(self, model: str, inputs: dict[str, Any], output: str) -> Future[np.ndarray[Any, Any]]:
        tensors = self._catalog.find(model).tensors
        return _later(lambda then, failed: tensors.start(inputs, then, failed), lambda outputs: outputs[output])

    def _task(self, kind: str, form: type[A]) -> A:
        task = self._catalog.newest(kind)[0].task
        assert isinstance(task, form)
        return task


class Online:
    """Asks a server over gRPC, as users do."""

    def __init__(self, client: Client, pool: ThreadPoolExecutor) -> None:
        self._client = client
        self._pool = pool

    def label(self, text: str) -> Future[str]:
        return self._pool.submit(lambda: self._client.classify(text).label)

    def translation(self, text: str, source: str, target: str, beam: int) -> Future[str]:
        return self._pool.submit(lambda: self._client.translate(text, source, target, beam).text)

    def forecast(self, observations: np.ndarray[Any, Any]) -> Future[tuple[Any, dict[float, Any]]]:
        def ask() -> tuple[Any, dict[float, Any]]:
            f = self._client.forecast(observations)
            return f.mean, dict(f.quantiles)

        return self._pool.submit(ask)

    def spans(self, given: str | Sequence[str]) -> Future[list[tuple[int, int, str]]]:
        if isinstance(given, str):
            return self._pool.submit(lambda: _ends(self._client.tag(given).spans, "start", "end"))
        return self._pool.submit(lambda: _ends(self._client.tag([list(given)])[0].spans, "first_word", "end_word"))

    def tensor(self, model: str, inputs: dict[str, Any], output: str) -> Future[np.ndarray[Any, Any]]:
        return self._pool.submit(lambda: self._client.infer(model, inputs, [output])[output])


def _ends(spans: Sequence[Any], start: str, end: str) -> list[tuple[int, int, str]]:
    return [(getattr(s, start), getattr(s, end), s.label) for s in spans]


def _later(start: Callable[[Callable[[Any, Any], None], Callable[[ServeError], None]], object], pick: Callable[[Any], A]) -> Future[A]:
    """A task's callbacks as a future."""
    future: Future[A] = Future()
    start(lambda _, result: future.set_result(pick(result)), future.set_exception)
    return future


@contextmanager
def offline(models: Path) -> Iterator[Offline]:
    workers = Workers(2)
    catalog = Catalog(workers, Limits(workers=2, queue=2 * IN_FLIGHT, wait=math.inf), Metrics(), 256)
    catalog.scan(models)
    if catalog.refused:
        sys.exit(f"refused bundles: {catalog.refused}")
    workers.start()
    try:
        yield Offline(catalog)
    finally:
        workers.stop()


@contextmanager
def online(models: Path) -> Iterator[Online]:
    with serve(models) as server, ThreadPoolExecutor(32) as pool, Client(f"localhost:{server.port}", timeout=600) as client:
        yield Online(client, pool)


class Asked:
    """Runs a test set through, a bounded number in flight, with a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def all(self, name: str, items: Sequence[A], ask: Callable[[A], Future[B]]) -> list[B]:
        bar = self._progress.add_task(name, total=len(items))
        futures: list[Future[B]] = []
        for i, item in enumerate(items):
            if i >= IN_FLIGHT:
                futures[i - IN_FLIGHT].result()
                self._progress.advance(bar)
            futures.append(ask(item))
        answers = [future.result() for future in futures]
        self._progress.update(bar, completed=len(items))
        return answers


def sentiment(asker: Offline | Online, asked: Asked, data: Path) -> Iterator[Figure]:
    reviews = imdb.read("test", data)
    labels = asked.all("sentiment", reviews.texts, asker.label)
    right = sum(label == imdb.LABELS[truth] for label, truth in zip(labels, reviews.labels, strict=True))
    yield Figure("sentiment", "IMDb test, 25,000 reviews", "accuracy %", 100 * right / len(labels), low=91.7)


def translator(asker: Offline | Online, asked: Asked, data: Path) -> Iterator[Figure]:
    for part, beam, low in (("test_2016_flickr", 0, 33.0), ("test_2016_flickr", 1, None), ("test_2017_flickr", 0, None)):
        sources, references = multi30k.load(part, "en", data), multi30k.load(part, "de", data)
        texts = asked.all(f"translator {part}", sources, functools.partial(asker.translation, source="en", target="de", beam=beam))
        how = f"{part}, {'beam' if beam == 0 else 'greedy'}"
        yield Figure("translator", how, "sacreBLEU", sacrebleu.corpus_bleu(texts, [references]).score, low=low)
        yield Figure("translator", how, "chrF", sacrebleu.corpus_chrf(texts, [references]).score)


def forecaster(asker: Offline | Online, asked: Asked, data: Path) -> Iterator[Figure]:
    series = ett.load("ETTh1", data)
    train = series.values[: series.train].astype(np.float64)
    mean, deviation = train.mean(0), train.std(0)
    back = ahead = 96
    starts = range(series.validation, series.test - ahead + 1)  # the first look-back reaches into the validation months
    windows = [series.values[at - back : at] for at in starts]
    answers = asked.all("forecaster", windows, asker.forecast)
    squares = absolutes = inside = 0.0
    for at, (forecast, quantiles) in zip(starts, answers, strict=True):
        truth = series.values[at : at + ahead]
        error = (forecast - truth) / deviation  # the standardised difference: the mean cancels
        squares += float((error**2).mean())
        absolutes += float(np.abs(error).mean())
        low, high = (next(v for q, v in quantiles.items() if abs(q - wanted) < 1e-4) for wanted in (0.1, 0.9))
        inside += float(((low <= truth) & (truth <= high)).mean())
    n, what = len(windows), f"ETTh1 96→96, {len(windows):,} windows"
    assert mean.shape == deviation.shape
    yield Figure("forecaster", what, "MSE", squares / n, high=0.380)
    yield Figure("forecaster", what, "MAE", absolutes / n)
    yield Figure("forecaster", what, "80 % interval covers %", 100 * inside / n, low=75, high=85)


def window_mlp(asker: Offline | Online, asked: Asked, data: Path) -> Iterator[Figure]:
    """The forecaster's task by plain tensors."""
    series = ett.load("ETTh1", data)
    deviation = series.values[: series.train].astype(np.float64).std(0)
    starts = range(series.validation, series.test - 96 + 1)
    windows = [series.values[None, at - 96 : at] for at in starts]
    answers = asked.all("window_mlp", windows, lambda window: asker.tensor("window_mlp", {"window": window}, "mean"))
    errors = [(mean[0] - series.values[at : at + 96]) / deviation for at, mean in zip(starts, answers, strict=True)]
    what = f"ETTh1 96→96, {len(windows):,} windows"
    yield Figure("window_mlp", what, "MSE", float(np.mean([(e**2).mean() for e in errors])), high=0.430)
    yield Figure("window_mlp", what, "MAE", float(np.mean([np.abs(e).mean() for e in errors])))


def generator(asker: Offline | Online, asked: Asked, data: Path) -> Iterator[Figure]:
    """Nats a character: the test text in a few stretches, each read from its beginning, all 111,540 characters foretold."""
    text = shakespeare.load(data)
    vocabulary = of_letters(text.train)
    stretches = shakespeare.stretches(text.test, charlm.LONGEST)
    ids = [vocabulary.encode(stretch) for stretch in stretches]
    given = [np.concatenate([[charlm.START_ID], i[:-1]])[None] for i in ids]
    logits = asked.all("shakespeare", given, lambda tokens: asker.tensor("shakespeare", {"tokens": tokens}, "logits"))
    nats = sum(float(_nats(scores[0], wanted).sum()) for scores, wanted in zip(logits, ids, strict=True))
    what = f"tiny Shakespeare, last tenth, {sum(map(len, ids)):,} characters"
    yield Figure("shakespeare", what, "nats a character", nats / sum(map(len, ids)), high=1.60)


def tagger(asker: Offline | Online, asked: Asked, data: Path) -> Iterator[Figure]:
    posts = wnut17.read("test", data)
    truth = [labelled(p.tags) for p in posts]
    found = asked.all("tagger", [p.words for p in posts], asker.spans)
    what = f"WNUT-17 test, {len(posts):,} posts"
    score, surface = wnut17.entity_score(truth, found), wnut17.surface_score(posts, found)
    yield Figure("tagger", what, "entity F1 %", 100 * score.f1, low=LOW_F1)
    yield Figure("tagger", what, "precision %", 100 * score.precision)
    yield Figure("tagger", what, "recall %", 100 * score.recall)
    yield Figure("tagger", what, "surface form F1 %", 100 * surface.f1)
    # As a user would send them: not split yet, compared by characters.
    read = asked.all("tagger, texts", [" ".join(p.words) for p in posts], asker.spans)
    places = [list(itertools.accumulate((len(w) + 1 for w in p.words), initial=0)) for p in posts]
    there = [[(at[a], at[b] - 1, kind) for a, b, kind in spans] for at, spans in zip(places, truth, strict=True)]
    yield Figure("tagger", f"{what}, split by the server", "entity F1 %", 100 * wnut17.entity_score(there, read).f1)


def digits(asker: Offline | Online, asked: Asked, data: Path) -> Iterator[Figure]:
    found = mnist.load("test", data)
    answers = asked.all("digits", list(found.images), lambda image: asker.tensor("digits", {"rows": image[None]}, "by_row"))
    right = np.mean([by_row[0].argmax(-1) == label for by_row, label in zip(answers, found.labels, strict=True)], 0)  # [rows]
    what = f"MNIST test, {len(answers):,} images"
    yield Figure("digits", what, "accuracy %", 100 * float(right[-1]), low=98.9)
    yield Figure("digits", f"{what}, their upper half", "accuracy %", 100 * float(right[mnist.SIDE // 2 - 1]))


def _nats(logits: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """-log p of each symbol wanted [time], from logits [time, vocabulary]."""
    scores = logits.astype(np.float64)
    highest = scores.max(1)
    total = np.log(np.exp(scores - highest[:, None]).sum(1)) + highest
    nats: np.ndarray[Any, Any] = total - scores[np.arange(len(wanted)), wanted]
    return nats


MODELS = {
    "sentiment": sentiment,
    "translator": translator,
    "forecaster": forecaster,
    "window_mlp": window_mlp,
    "shakespeare": generator,
    "tagger": tagger,
    "digits": digits,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make quality", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets: imdb/, multi30k/, ett/")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="directory of bundles")
    parser.add_argument("--served", action="store_true", help="ask a server over gRPC instead of the engine in this process")
    parser.add_argument("--only", choices=MODELS, action="append", help="only this model; may be given again")
    parser.add_argument("--json", type=Path, help="write the figures into this file too, for model cards")
    options = parser.parse_args()
    console = Console()
    began = time.monotonic()
    figures: list[Figure] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (online if options.served else offline)(options.models) as asker, Progress(*columns, console=console) as progress:
        for name in options.only or MODELS:
            figures += MODELS[name](asker, Asked(progress), options.data)
    how = "served over gRPC" if options.served else "offline"
    table = Table("model", "data", "metric", "value", "floor", "", title=f"Quality, {how}")
    for f in figures:
        digits = 3 if f.metric in ("MSE", "MAE", "nats a character") else 2
        table.add_row(f.model, f.data, f.metric, f"{f.value:.{digits}f}", f.floor, "" if f.held else "MISSED")
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(f) for f in figures], indent=1) + "\n")
    missed = [f for f in figures if not f.held]
    head = " · ".join(f"{f.model} {f.metric} {f.value:.3f}" for f in figures if f.floor)
    print(f"quality: {len(missed)} of {len([f for f in figures if f.floor])} floors missed in {time.monotonic() - began:.0f} s · {head}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
