"""What one user does, once: each a function of a client, inputs and dice, that yields the names of the requests it makes.

A generator tells its caller when a request begins (it yields the name) and ends (it is resumed and yields the next, or returns), so
that the same users serve locust, in a closed or an open loop, and a test. It must not know locust.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from loadtests.inputs import Inputs
from seqserve import Client

Calls = Callable[[Client, Inputs, random.Random], Iterator[str]]

PIECES = 6  # turns that a text is sent in
LOOKBACK = 96  # hours that a forecast starts from
TOKENS = 64  # of a tensor call


class Wrong(Exception):
    """An answer came, and it can't be right."""


def classify(client: Client, inputs: Inputs, dice: random.Random) -> Iterator[str]:
    """One review."""
    text = dice.choice(inputs.reviews)
    yield "classify"
    answer = client.classify(text)
    _check(0.5 <= answer.score <= 1, "the best of two labels has half of the probability or more")


def translate(client: Client, inputs: Inputs, dice: random.Random) -> Iterator[str]:
    """One caption, streamed; how long the first word takes is a request of its own."""
    text = dice.choice(inputs.captions)
    yield "translate: first word"
    pieces = client.translate_stream(text, target="de")
    first = next(pieces)
    yield "translate: the rest"
    *_, last = first, *pieces
    _check(last.done is not None, "a translation ends with the whole")


def live_review(client: Client, inputs: Inputs, dice: random.Random) -> Iterator[str]:
    """A session that reads a review in pieces, then asks how far it is, and closes."""
    text = dice.choice(inputs.reviews)
    size = -(-len(text) // PIECES)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    session = client.session("sentiment", ttl=60, close=False)
    yield "session: open"
    session.open()
    for piece in pieces:
        yield "session: text"
        session.send(piece)
    yield "session: info"
    info = session.info()
    _check(info.turn == len(pieces), f"{len(pieces)} turns were answered and {info.turn} applied")
    yield "session: close"
    session.close()


def live_series(client: Client, inputs: Inputs, dice: random.Random) -> Iterator[str]:
    """A session that forecasts anew with each hour observed, turns sent ahead over one stream."""
    at = dice.randrange(len(inputs.hours) - LOOKBACK - PIECES)
    hours = np.array(inputs.hours[at : at + LOOKBACK + PIECES], np.float32)
    session = client.session("forecaster", ttl=60, close=False)
    yield "session: open"
    session.open()
    yield "session: series"
    answers = session.send_all([hours[:LOOKBACK], *(hours[i : i + 1] for i in range(LOOKBACK, len(hours)))])
    count = 0
    for _ in answers:
        count += 1
        if count <= PIECES:
            yield "session: hour"
    _check(count == PIECES + 1, f"{PIECES + 1} turns were sent and {count} answered")
    yield "session: close"
    session.close()


def tensors(client: Client, inputs: Inputs, dice: random.Random) -> Iterator[str]:
    """Token ids, by the Open Inference Protocol."""
    tokens = np.array([[dice.randrange(4, 8000) for _ in range(TOKENS)]], np.int64)
    yield "tensors"
    answer = client.infer("sentiment", {"tokens": tokens}, ["probabilities"])
    _check(abs(float(answer.outputs["probabilities"].sum()) - 1) < 1e-4, "probabilities add up to 1")


EVERY: Mapping[Calls, int] = {classify: 4, translate: 3, live_review: 1, live_series: 1, tensors: 4}
"""The mix, by weight. A session counts once and makes eight or nine requests."""


def mixed(client: Client, inputs: Inputs, dice: random.Random) -> Iterator[str]:
    """Any of these, by weight."""
    (one,) = dice.choices(list(EVERY), EVERY.values())
    yield from one(client, inputs, dice)


def _check(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)
