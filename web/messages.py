"""What a page may ask over its WebSocket, and how answers are written: JSON both ways. `live.py` does it.

Every request has an `id`, and is answered by messages with that id, the last of which has `done` or `error`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from seqserve import Classification, Forecast, Tensors
from seqserve.results import Answer

Id = Annotated[int, Meta(ge=0, le=2**53)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{16,64}$")]
Turn = Annotated[int, Meta(ge=1, le=2**53)]
Text = Annotated[str, Meta(max_length=20_000)]
Line = Annotated[str, Meta(min_length=1, max_length=32)]
Row = list[float]


class Open(msgspec.Struct, tag_field="do", tag="open", forbid_unknown_fields=True):
    """A session, or the same again."""

    id: Id
    line: Line
    session: Name
    model: Annotated[str, Meta(max_length=128)]


class Turns(msgspec.Struct, tag_field="do", tag="turns", forbid_unknown_fields=True):
    """Turns from number `first` on, one for each of what one of the lists has."""

    id: Id
    line: Line
    session: Name
    first: Turn
    texts: Annotated[list[Text], Meta(max_length=256)] = []
    series: Annotated[list[list[Row]], Meta(max_length=256)] = []  # turns × steps × channels
    rows: Annotated[list[list[Annotated[int, Meta(ge=0, le=255)]]], Meta(max_length=256)] = []  # of greys
    channel: Annotated[int, Meta(ge=0, le=1000)] = 0  # of a forecast, which is shown
    have: Annotated[int, Meta(ge=0, le=2**53)] = 0  # the last turn that the page has the answer of


class Fork(msgspec.Struct, tag_field="do", tag="fork", forbid_unknown_fields=True):
    """Another session that goes on from here, or the same again."""

    id: Id
    line: Line
    session: Name
    fork: Name


class Close(msgspec.Struct, tag_field="do", tag="close", forbid_unknown_fields=True):
    id: Id
    line: Line
    sessions: Annotated[list[Name], Meta(max_length=256)]


class Translate(msgspec.Struct, tag_field="do", tag="translate", forbid_unknown_fields=True):
    id: Id
    text: Text
    beam: Annotated[int, Meta(ge=0, le=10)] = 0


class Generate(msgspec.Struct, tag_field="do", tag="generate", forbid_unknown_fields=True):
    id: Id
    text: Text
    temperature: Annotated[float, Meta(ge=0, le=5)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1000)] = 0
    seed: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    symbols: Annotated[int, Meta(ge=1, le=2000)] = 400


class Tag(msgspec.Struct, tag_field="do", tag="tag", forbid_unknown_fields=True):
    id: Id
    text: Text


class Models(msgspec.Struct, tag_field="do", tag="models", forbid_unknown_fields=True):
    id: Id


class Watch(msgspec.Struct, tag_field="do", tag="watch", forbid_unknown_fields=True):
    id: Id


class Forget(msgspec.Struct, tag_field="do", tag="forget", forbid_unknown_fields=True):
    """End what was asked with the id `of`."""

    id: Id
    of: Id


class Kill(msgspec.Struct, tag_field="do", tag="kill", forbid_unknown_fields=True):
    """End the server's process with SIGKILL; only where whoever started us has said how (demo.py)."""

    id: Id


OnLine = Open | Turns | Fork | Close
Apart = Translate | Generate | Tag | Models | Kill
decoder = msgspec.json.Decoder(Open | Turns | Fork | Close | Translate | Generate | Tag | Models | Watch | Forget | Kill)
encode = msgspec.json.Encoder().encode


class Refused(Exception):
    """What a page asked that can't be."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def pieces(asked: Turns) -> list[tuple[Any, Any]]:
    """What each turn brings: as the page says it, to compare it by, and as a session takes it. Raises Refused."""
    kinds = [kind for kind in (asked.texts, asked.series, asked.rows) if kind]
    if len(kinds) != 1:
        raise Refused("BAD_MESSAGE", "turns bring texts, series or rows")
    if asked.texts:
        return [(text, text) for text in asked.texts]
    if asked.series:
        for steps in asked.series:
            if not steps or len({len(step) for step in steps}) != 1 or not all(map(math.isfinite, (v for step in steps for v in step))):
                raise Refused("BAD_MESSAGE", "a series has steps of as many numbers each")
        return [(steps, np.asarray(steps, np.float32)) for steps in asked.series]
    if len({len(row) for row in asked.rows}) != 1 or not asked.rows[0]:
        raise Refused("BAD_MESSAGE", "rows have as many greys each")
    return [(row, {"rows": np.asarray([[row]], np.uint8)}) for row in asked.rows]


def answered(answer: Answer, channel: int) -> dict[str, Any]:
    """An answer as the page reads it."""
    match answer:
        case Classification():
            return {"scores": dict(answer.scores), "tokens": answer.tokens}
        case Forecast():
            at = min(channel, answer.mean.shape[1] - 1)
            return {"mean": shorts(answer.mean[:, at]), "quantiles": {f"{q:g}": shorts(a[:, at]) for q, a in answer.quantiles.items()}}
        case Tensors():
            return {"scores": [float(p) for p in answer["probabilities"][0]]} if "probabilities" in answer else {}
    raise Refused("BAD_MODEL", "this page does not know what such a model answers")


def short(value: float) -> float:
    return float(f"{value:.4g}")


def shorts(values: Any) -> list[float]:
    return [short(v) for v in values]


def error(reason: str, message: str, retry_after: float | None = None, turn: int | None = None) -> dict[str, Any]:
    return {"reason": reason, "message": message, "retry_after": retry_after, "turn": turn}


def id_of(text: str) -> int:
    """Of a message that could not be read, as far as it can be seen."""
    found = re.search(r'"id":\s*(\d{1,15})', text[:200])
    return int(found[1]) if found else 0
