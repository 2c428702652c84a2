"""The workloads of `make bench`, and what is said of each beforehand: aims, and the bar of another server.

Data only. Lengths of reviews: quantiles (each fortieth) of words in the 25,000 test reviews of IMDb (Maas et al. 2011; lower
case, punctuation dropped), mean 232 uncapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.figures.bench_models import VOCABULARY

_REVIEWS = (
    6, 50, 62, 76, 90, 103, 110, 116, 120, 124, 128, 131, 135, 139, 143, 148, 152, 158, 163, 169, 175, 182, 189, 197, 205, 215, 224,
    236, 249, 264, 282, 300, 320, 345, 375, 407, 451, 510, 592, 738, 2332,
)  # fmt: skip
CAP = 400
SENTENCE = ("--sequence-length", "50")


@dataclass(frozen=True, slots=True)
class Line:
    """One workload. `bare` names what onnxruntime alone does of it; `times` is the aim as a multiple of that on one core."""

    name: str
    model: str
    callers: int
    client: str = "perf_analyzer"
    options: tuple[str, ...] = ()
    lengths: str = ""  # which input file
    bare: str = ""
    times: float | None = None
    aim: str = ""
    bar: str = ""  # NVIDIA Triton 2.51, its ONNX Runtime backend in C++, on another machine of this kind


IDLE = ("sentiment", "translator", "forecaster")  # what the idle server serves
LINES = (
    Line("a32-1", "model_a", 1, lengths="32", bare="A alone", aim="p50 ≤ 0.75 ms", bar="p50 0.78 ms"),
    Line("a32-32", "model_a", 32, lengths="32", bare="A t=32", times=1.3, aim="5,200/s", bar="4,500/s, 15 ms"),
    Line("a32-64", "model_a", 64, lengths="32", bare="A t=32", times=1.3, aim="5,200/s", bar="4,860/s, 28 ms"),
    Line("a128-32", "model_a", 32, lengths="128", bare="A t=128", times=1.7, aim="1,650/s", bar="1,500/s, 43 ms"),
    Line("a128-64", "model_a", 64, lengths="128", bare="A t=128", times=1.7, aim="1,650/s", bar="1,530/s, 85 ms"),
    Line("amix-32", "model_a", 32, lengths="1–128", bare="A 1–128", times=1.4, aim="2,600/s", bar="1,600/s, 31 ms"),
    Line("amix-64", "model_a", 64, lengths="1–128", bare="A 1–128", times=1.4, aim="2,600/s", bar="1,590/s, 63 ms"),
    Line("aimdb-32", "model_a", 32, lengths="IMDb", bare="A IMDb", times=1.7, aim="1.7 × bare"),
    Line("b-1", "model_b", 1, options=SENTENCE, bare="B alone", aim="p50 ≤ 0.38 ms", bar="p50 0.38 ms"),
    Line("b-32", "model_b", 32, options=SENTENCE, bare="B", aim="11,500/s", bar="10,400/s, 12 ms"),
    Line("b-128", "model_b", 128, options=SENTENCE, bare="B", aim="11,500/s", bar="11,150/s, 38 ms"),
    Line("b-256", "model_b", 256, options=SENTENCE, bare="B", aim="11,500/s", bar="9,700/s, 61 ms"),
    Line("b-stream-128", "model_b", 128, options=(*SENTENCE, "--streaming"), bare="B", aim="15,000/s"),
    Line("b-turns", "model_b", 256, client="turns", bare="B", aim="45,000/s"),
    Line("translate-64", "translator", 64, client="translate", bare="translate", times=0.8, aim="0.8 × bare"),
    Line("idle", "", 0, client="idle", aim="≤ 150 MB, < 1 % of a core"),
)
TITLES = {
    "a32-1": "A, 32 tokens, 1 caller", "a32-32": "A, 32 tokens, 32 callers", "a32-64": "A, 32 tokens, 64 callers",
    "a128-32": "A, 128 tokens, 32 callers", "a128-64": "A, 128 tokens, 64 callers", "amix-32": "A, 1–128 tokens, 32 callers",
    "amix-64": "A, 1–128 tokens, 64 callers", "aimdb-32": "A, IMDb lengths, 32 callers", "aimdb-32 probe": "— 10-token calls amid them",
    "b-1": "B, unary steps, 1 session", "b-32": "B, unary steps, 32 sessions", "b-128": "B, unary steps, 128 sessions",
    "b-256": "B, unary steps, 256 sessions", "b-stream-128": "B, ModelStreamInfer, 128 sessions",
    "b-turns": "B, Turns, 256 sessions, 32 turns a message", "translate-64": "translation, greedy, 64 callers",
}  # fmt: skip


def lengths(which: str, count: int) -> list[int]:
    """Lengths of sequences, as many as asked for."""
    random = np.random.default_rng(7)
    if which == "1–128":
        return [int(n) for n in random.integers(1, 129, count)]
    if which.isdecimal():
        return [int(which)] * count
    drawn = np.interp(random.uniform(0, len(_REVIEWS) - 1, count), range(len(_REVIEWS)), _REVIEWS)
    return [min(CAP, int(n)) for n in drawn]


def data(of: list[int]) -> dict[str, Any]:
    """perf_analyzer's --input-data: a call of random tokens for each length."""
    random = np.random.default_rng(8)
    return {"data": [{"tokens": {"content": random.integers(0, VOCABULARY, n).tolist(), "shape": [n]}} for n in of]}
