"""Answers as text for a terminal: tables, sparklines, attention. Pure: values in, lines out; prints nothing."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from seqserve import results

CELLS = 80  # bars of a sparkline, past and ahead together
_BARS = "▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"
_DOTS = np.array([0x01, 0x08, 0x02, 0x10, 0x04, 0x20, 0x40, 0x80])  # of a Braille character, row by row
_COLOURS = {"person": 36, "location": 32, "group": 35, "corporation": 34, "product": 33, "creative-work": 31}  # ANSI


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows as lines with aligned columns, the first row being the heading; columns in `right` end flush."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(width, column)) for column in columns]
    flush = set(right)
    lines = []
    for row in rows:
        cells = [
            " " * (w - width(cell)) + cell if i in flush else cell + " " * (w - width(cell))
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def width(text: str) -> int:
    """Columns that a text takes in a terminal: two for a wide character, none for a combining one."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def sparkline(values: NDArray[np.float32], low: float, high: float, cells: int) -> str:
    """A series as at most `cells` bars between `low` and `high`, neighbours averaged where there are more values."""
    parts = np.array_split(np.asarray(values, np.float64), min(cells, len(values))) if len(values) else []
    heights = [(float(part.mean()) - low) / (high - low) if high > low else 0.5 for part in parts]
    return "".join(_BARS[min(len(_BARS) - 1, max(0, int(h * len(_BARS))))] for h in heights)


def forecast(observations: NDArray[np.float32], answer: results.Forecast, names: Sequence[str]) -> list[str]:
    """A row per channel with some steps of the mean and the widest interval at the end, then its sparkline.

    `observations` is steps × channels, in the order of `names`: what was sent, drawn before the bar │.
    """
    ahead = len(answer.mean)
    at = sorted({1, (ahead + 1) // 2, ahead}) if ahead else []
    heading = ["", "last", *(f"+{step}" for step in at)]
    ends = [min(answer.quantiles), max(answer.quantiles)] if len(answer.quantiles) > 1 else []
    if ends:
        heading.append(f"{(ends[1] - ends[0]):.0%} interval at +{ahead}")
    rows = [heading]
    lines = []
    label = max(map(width, answer.channels), default=0)
    scale = -(-(len(observations) + ahead) // CELLS)  # steps that one bar stands for, past and ahead alike
    for i, channel in enumerate(answer.channels):
        seen = observations[:, names.index(channel) if channel in names else i]
        mean = answer.mean[:, i]
        row = [channel, f"{seen[-1]:.2f}", *(f"{mean[step - 1]:.2f}" for step in at)]
        if ends:
            row.append(" … ".join(f"{answer.quantiles[q][-1, i]:.2f}" for q in ends))
        rows.append(row)
        low, high = float(min(seen.min(), mean.min(initial=np.inf))), float(max(seen.max(), mean.max(initial=-np.inf)))
        pad = " " * (label - width(channel))
        lines.append(
            f"{channel}{pad}  {sparkline(seen, low, high, -(-len(seen) // scale))}│{sparkline(mean, low, high, -(-ahead // scale))}"
        )
    return [*table(rows, right=range(1, len(heading))), "", *lines]


def tagging(answer: results.Tagging, colour: bool) -> str:
    """The text with its spans marked: in a colour of their label, or in brackets where there is none; how sure, in percent."""
    parts: list[str] = []
    at = 0
    for span in answer.spans:
        parts.append(answer.text[at : span.start])
        note = f"{span.label} {span.score:.0%}"
        if colour:
            code = _COLOURS.get(span.label, 31 + sum(span.label.encode()) % 6)
            parts.append(f"\x1b[1;{code}m{span.text}\x1b[0m\x1b[2;{code}m {note}\x1b[0m")
        else:
            parts.append(f"[{span.text}]({note})")
        at = span.end
    return "".join([*parts, answer.text[at:]])


def turn(said: str, answer: results.Answer) -> list[str]:
    """The answer to one turn of a session: a label, the next step of each channel with its widest interval, or tensors."""
    match answer:
        case results.Classification():
            return [f"{answer.label}  {answer.score:6.1%}  {said}"]
        case results.Forecast():
            ends = [answer.quantiles[q][0] for q in (min(answer.quantiles), max(answer.quantiles))] if len(answer.quantiles) > 1 else []
            cells = []
            for i, channel in enumerate(answer.channels):
                interval = f" ({ends[0][i]:.2f} … {ends[1][i]:.2f})" if ends else ""
                cells.append(f"{channel} {answer.mean[0, i]:.2f}{interval}")
            return ["  ".join(cells)]
        case results.Generation():
            return [f"{said}{answer.text}"]
        case _:
            return list(itertools.chain.from_iterable(tensor(name, array) for name, array in answer.items()))


def picture(ink: NDArray[np.bool_]) -> list[str]:
    """A picture in dots, rows × columns, as lines of characters of 4 × 2 dots each; its sides must be multiples of that."""
    rows, columns = ink.shape
    cells = ink.reshape(rows // 4, 4, columns // 2, 2).transpose(0, 2, 1, 3).reshape(rows // 4, columns // 2, 8)
    dots = (cells * _DOTS).sum(-1)  # lines × characters
    return ["".join(chr(0x2800 + dot) for dot in line) for line in dots.tolist()]


def tensor(name: str, array: results.Array) -> list[str]:
    return [f"{name}  {array.dtype}{list(array.shape)}", np.array2string(array, precision=5, suppress_small=True)]


def attention(answer: results.Translation) -> list[str]:
    """Tokens down, source tokens across (their names written downwards), darker where a token looked harder."""
    weights = answer.attention  # tokens × source tokens
    names = [list(unicodedata.normalize("NFC", piece)[:12]) for piece in answer.source_tokens]
    label = max((width(token.piece) for token in answer.tokens), default=0)
    lines = []
    for depth in range(max(map(len, names), default=0)):
        letters = (name[depth] if depth < len(name) else " " for name in names)
        lines.append(" " * (label + 1) + "".join(letter if width(letter) == 2 else letter + " " for letter in letters).rstrip())
    for token, row in zip(answer.tokens, weights, strict=True):
        cells = "".join(_SHADES[min(4, round(float(weight) * 4.999 + 0.2))] * 2 for weight in row)
        lines.append((" " * (label - width(token.piece)) + token.piece + " " + cells).rstrip())
    return lines
