"""Draws docs/rounds.png from the server's own queue: which sequences run in which round, and by how much.

`python docs/draw_rounds.py`, with the train extra installed.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from server.rounds import Limits, Rounds, Ticket

mpl.use("Agg")

ARRIVALS = (("review", 0, 23), ("one-liner", 0, 4), ("comment", 2, 9), ("letter", 3, 12), ("headline", 4, 3))
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377")


def schedule() -> list[list[tuple[str, int]]]:
    """Who advances by how many steps in each round, as `Rounds` decides it; arrivals are by round number."""
    rounds = Rounds(Limits(chunk=5, rows=8))
    drawn: list[list[tuple[str, int]]] = []
    while True:
        for name, at, steps in ARRIVALS:
            if at == len(drawn):
                rounds.admit(Ticket("step", 1, steps, name=name), 0.0)
        chosen = rounds.next()
        if chosen is None:
            return drawn
        rounds.done(chosen, 0.001)
        for ticket in chosen.tickets:
            if ticket.remaining:
                rounds.again(ticket)
            else:
                rounds.leave(ticket)
        drawn.append([(t.name, chosen.steps) for t in chosen.tickets])


def main() -> None:
    figure, axes = plt.subplots(figsize=(9, 2.9), dpi=150)
    names = [name for name, _, _ in ARRIVALS]
    left = 0.0
    for number, members in enumerate(schedule(), 1):
        width = members[0][1]
        axes.axvspan(left, left + width, color="black", alpha=0.04 if number % 2 else 0.09, lw=0)
        axes.text(left + width / 2, -0.85, f"{number}", ha="center", va="center", fontsize=8, color="#444444")
        for name, steps in members:
            row = names.index(name)
            for step in range(steps):
                axes.add_patch(plt.Rectangle((left + step + 0.08, row - 0.34), 0.84, 0.68, color=COLOURS[row], lw=0))
        left += width
    axes.set_xlim(0, left)
    axes.set_ylim(len(names) - 0.4, -1.3)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks([])
    axes.set_title("Rounds: everyone in a round advances by the same steps; nobody is padded, nobody waits for a batch", fontsize=9)
    axes.text(-0.3, -0.85, "round", ha="right", va="center", fontsize=8, color="#444444")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("rounds.png"))


if __name__ == "__main__":
    main()
