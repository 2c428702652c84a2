"""`python -m docs.draw_concepts` draws docs/drawings/*.svg: rounds as the server's own queue chooses them, and the words of the concepts.

SVG by hand, because a drawing here is text and boxes that must follow a reader's light or dark: as a picture (GitHub, an editor) by what
the system prefers, in the site, where it is part of the page, by the page's own switch (docs/_static/site.css sets the same colours).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from server.rounds import Limits, Rounds
from server.tickets import Ticket

HERE = Path(__file__).parent / "drawings"
ARRIVALS = (("review", 0, 23), ("one-liner", 0, 4), ("comment", 2, 9), ("letter", 3, 12), ("headline", 4, 3))
"""Sequences: name, the round before which it comes, its steps."""
COLOURS = ("#3d74b5", "#c4573a", "#2f7d5b", "#b8901c", "#8f4f98")

STYLE = """\
svg.drawing { --ink: #1f2733; --soft: #5d6876; --line: #b4bcc6; --card: #f4f6f8; font: 13px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg.drawing { --ink: #d6dde6; --soft: #8b97a6; --line: #56616f; --card: #1c232d; } }
svg.drawing text { fill: var(--ink); } svg.drawing .soft { fill: var(--soft); } svg.drawing .on { fill: #fff; }
svg.drawing .card { fill: var(--card); stroke: var(--line); } svg.drawing .band { fill: var(--line); opacity: .22; }
svg.drawing .arrow { stroke: var(--soft); fill: none; stroke-width: 1.4; } svg.drawing .tip { fill: var(--soft); }"""


class Drawing:
    """An SVG as it grows; positions in pixels from the upper left."""

    def __init__(self, title: str, width: int, height: int) -> None:
        self._title, self._size = title, (width, height)
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start", size: int = 13, bold: bool = False) -> None:
        weight = ' font-weight="600"' if bold else ""
        look = f'class="{kind}" text-anchor="{anchor}" font-size="{size}"{weight}'
        self._parts.append(f'<text x="{x:g}" y="{y:g}" {look}>{escape(text)}</text>')

    def box(self, x: float, y: float, w: float, h: float, fill: str = "", kind: str = "card", round: float = 5) -> None:
        look = f'fill="{fill}"' if fill else f'class="{kind}"'
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round:g}" {look}/>')

    def card(self, x: float, y: float, w: float, h: float, *lines: str, fill: str = "", soft: Sequence[str] = ()) -> None:
        """A box with lines in its middle, the soft ones below and smaller."""
        self.box(x, y, w, h, fill)
        top = y + h / 2 - (len(lines) * 16 + len(soft) * 14) / 2 + 12
        for line in lines:
            self.text(x + w / 2, top, line, "on" if fill else "", "middle")
            top += 16
        for line in soft:
            self.text(x + w / 2, top - 1, line, "on" if fill else "soft", "middle", 11)
            top += 14

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        line = " ".join(f"{x:g},{y:g}" for x, y in (*points[:-1], (x1 - 5 * dx, y1 - 5 * dy)))
        tip = " ".join(f"{x1 - 8 * dx + s * 4 * dy:g},{y1 - 8 * dy - s * 4 * dx:g}" for s in (1, -1))
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<polyline points="{line}" class="arrow"{dashes}/>')
        self._parts.append(f'<polygon points="{x1:g},{y1:g} {tip}" class="tip"/>')

    def svg(self) -> str:
        w, h = self._size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">'
        return "\n".join([head, f"<title>{escape(self._title)}</title>", f"<style>{STYLE}</style>", *self._parts, "</svg>", ""])


class Named(Ticket):
    """A ticket that knows whose it is."""

    __slots__ = ("name",)

    def __init__(self, name: str, steps: int) -> None:
        super().__init__("step", 1, steps)
        self.name = name


def schedule() -> list[tuple[int, list[str]]]:
    """Each round's steps and members, as `Rounds` decides them; arrivals are by round number."""
    rounds: Rounds[Named] = Rounds(Limits(chunk=5, rows=8))
    drawn: list[tuple[int, list[str]]] = []
    while True:
        for name, at, steps in ARRIVALS:
            if at == len(drawn):
                rounds.admit(Named(name, steps), 0.0)
        chosen = rounds.next(0.0)
        if chosen is None:
            return drawn
        rounds.done(chosen, 0.001)
        for ticket in chosen.tickets:
            (rounds.again if ticket.remaining else rounds.leave)(ticket)
        drawn.append((chosen.steps, [t.name for t in chosen.tickets]))


def rounds() -> str:
    """Rows are sequences, columns steps; a band is a round."""
    played, names, cell, left, top = schedule(), [name for name, _, _ in ARRIVALS], 24.2, 82, 48
    title = "Five sequences in rounds: everyone in a round advances by the same steps, nobody is padded"
    d = Drawing(title, 720, top + 30 * len(names) + 34)
    d.text(left - 8, 30, "round", "soft", "end", 12)
    x = float(left)
    for number, (steps, members) in enumerate(played, 1):
        if number % 2:
            d.box(x, 12, steps * cell, top + 30 * len(names) - 14, kind="band", round=3)
        d.text(x + steps * cell / 2, 30, str(number), "soft", "middle", 12)
        for name in members:
            row = names.index(name)
            for step in range(steps):
                d.box(x + step * cell + 1.5, top + row * 30, cell - 3, 22, COLOURS[row], round=3)
        x += steps * cell
    for row, name in enumerate(names):
        d.text(left - 8, top + row * 30 + 15, name, "", "end")
    d.text(left, top + 30 * len(names) + 20, "time steps of the graph →", "soft", size=12)
    return d.svg()


def cuts() -> str:
    """One sequence whole, and cut in three: the same bits."""
    d = Drawing("A sequence read whole, and cut anywhere with its state carried on, ends the same", 720, 214)
    words = ("A", "slow", "start,", "but", "super", "b.")
    for top, pieces, said in ((34, ((0, 6),), "one call"), (138, ((0, 2), (2, 5), (5, 6)), "three turns of a session")):
        d.text(16, top - 14, said, "soft", size=12)
        x = 62.0
        d.card(16, top, 34, 40, "h₀")
        for number, (start, end) in enumerate(pieces):
            d.arrow((x - 12, top + 20), (x + 4, top + 20))
            for word in words[start:end]:
                d.card(x + 4, top, 66, 40, word, fill=COLOURS[0])
                x += 70
            if number < len(pieces) - 1:
                d.arrow((x + 1, top + 20), (x + 15, top + 20))
                d.card(x + 15, top, 34, 40, f"h{'₂₅'[number]}")
                x += 61
        d.arrow((x + 1, top + 20), (x + 15, top + 20))
        d.card(x + 15, top, 34, 40, "h₆")
        d.arrow((x + 49, top + 20), (x + 63, top + 20))
        d.card(x + 63, top, 48, 40, "0.97", fill=COLOURS[2])
    d.text(662, 108, "equal, bit for bit", "soft", "end", 12)
    return d.svg()


def session() -> str:
    """Turns over time between caller, server and store: one is lost, one retried, the server killed, a fork."""
    d = Drawing("A session's turns: a lost reply is sent again, a killed server resumes, a fork goes its own way", 720, 430)
    caller, server, store = 90, 350, 610
    for x, name in ((caller, "caller"), (server, "server"), (store, "store")):
        d.card(x - 52, 10, 104, 28, name)
        d.arrow((x, 38), (x, 424), dashed=True)
    y = 62

    def there(text: str, *, lost: bool = False, stored: str = "", back: str = "") -> None:
        nonlocal y
        d.arrow((caller + 4, y), (server - 4, y + 10))
        d.text((caller + server) / 2, y - 3, text, "", "middle", 12)
        if stored:
            d.arrow((server + 4, y + 12), (store - 4, y + 20))
            d.text((server + store) / 2, y + 8, stored, "soft", "middle", 12)
        y += 40
        if back:
            end = (caller + server) / 2 + 10 if lost else caller + 4
            d.arrow((server - 4, y), (end, y + 10))
            d.text(end + 14 if lost else (caller + server) / 2, y + 24 if lost else y - 3, back, "soft", "start" if lost else "middle", 12)
        y += 34

    there("turn 1: “A slow start, ”", stored="state after turn 1, reply 1", back="reply 1")
    there("turn 2: “but superb.”", stored="state after turn 2, reply 2", back="reply 2 is lost", lost=True)
    d.box(server - 60, y - 6, 120, 24, COLOURS[1])
    d.text(server, y + 10, "kill -9, start again", "on", "middle", 12)
    d.arrow((store - 4, y + 8), (server + 64, y + 8))
    d.text((server + store) / 2 + 30, y + 2, "the session, as of turn 2", "soft", "middle", 12)
    y += 44
    there("turn 2 again", back="the same reply 2; nothing advances")
    there("fork", stored="a second session, as of turn 2", back="its id: both go on alone")
    return d.svg()


def engine() -> str:
    """From callers to answers: the queue, the round, the bundle it runs."""
    d = Drawing("An engine: callers' sequences queue, a round advances some of them through a graph, who is done is answered", 720, 232)
    for row, (name, colour) in enumerate((("a call", COLOURS[0]), ("a turn", COLOURS[1]), ("a translation", COLOURS[2]))):
        d.card(8, 47 + row * 46, 100, 34, name, fill=colour)
        d.arrow((108, 64 + row * 46), (136, 110))
    d.card(138, 81, 82, 58, "queue", soft=("a ticket each",))
    d.arrow((220, 110), (240, 110))
    d.box(240, 16, 348, 144)
    d.text(252, 36, "engine: a round", bold=True)
    verbs = {"choose": "who, and|k steps", "stack": "rows and|states", "run": "the|graph", "split": "outputs,|next states"}
    for at, (name, said) in enumerate(verbs.items()):
        d.card(250 + at * 84, 81, 74, 58, name, soft=said.split("|"))
        if at:
            d.arrow((240 + at * 84, 110), (250 + at * 84, 110))
    d.text(418, 58, "who is not done goes round again", "soft", "middle", 12)
    d.arrow((539, 81), (539, 66), (287, 66), (287, 81))
    d.arrow((588, 110), (606, 110))
    d.card(608, 81, 104, 58, "answer", soft=("a session's turn:", "stored first"))
    d.card(370, 188, 170, 32, "bundle.json + graphs")
    d.arrow((455, 188), (455, 139))
    return d.svg()


def fleet() -> str:
    """Replicas behind a balancer, one store."""
    d = Drawing("A fleet: the balancer sends each session's calls to one replica; all replicas share one store", 720, 214)
    d.card(10, 82, 92, 48, "callers")
    d.arrow((102, 106), (150, 106))
    d.card(152, 72, 140, 68, "balancer", soft=("hash of", "seqserve-session"))
    for row in range(3):
        y = 20 + row * 64
        d.arrow((292, 106), (378, y + 22))
        said, fill = ("killed", COLOURS[1]) if row == 1 else ("sessions in memory", "")
        d.card(380, y, 128, 44, f"replica {row + 1}", soft=(said,), fill=fill)
        d.arrow((508, y + 22), (594, 106), dashed=row == 1)
    d.card(596, 72, 114, 68, "Redis or Valkey", soft=("every turn, and", "who owns it"))
    return d.svg()


DRAWINGS = {"rounds": rounds, "cuts": cuts, "session": session, "engine": engine, "fleet": fleet}


def main() -> int:
    HERE.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (HERE / f"{name}.svg").write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
