"""The comparison of `make series` as Markdown and as a picture. It knows neither models nor data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from tests.figures.series import Comparison

BEGIN, END = "<!-- written by make series RUN=--write -->", "<!-- end -->"
COLOURS = {
    "seasonal naive": "tab:gray", "AR(1)": "tab:olive", "AR(p)": "tab:orange", "window perceptron": "tab:green", "forecaster": "tab:blue",
}  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) >= 30 else f"{value:.3f}"


def table(every: Sequence[Comparison]) -> str:
    """A table a data set; the best of our methods in each error in bold, published figures in italics."""
    parts = []
    for c in every:
        lines = [f"**{c.name}**: {c.task}", "", "| method | " + " | ".join(c.metrics) + " |", "|---" + "|---:" * len(c.metrics) + "|"]
        errors = [m for m in range(len(c.metrics)) if "covers" not in c.metrics[m]]
        least = {m: min(v for r in c.rows.values() if (v := r[m]) is not None) for m in errors}
        for method, row in c.rows.items():
            name = method + (f", {c.said[method]}" if c.said.get(method) else "")
            cells = [f"**{_number(v)}**" if m in least and least[m] == v else _number(v) for m, v in enumerate(row)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += [f"| *{name}* | " + " | ".join(_number(v) for v in row) + " |" for name, row in c.published.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def write(every: Sequence[Comparison], page: Path, picture: Path) -> None:
    """Put the tables between the page's marks, and draw the picture it shows."""
    text = page.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n{table(every)}\n\n{END}{tail}", encoding="utf-8")
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(every, picture)


def draw(every: Sequence[Comparison], file: Path) -> None:
    """A column a data set: one moment with the forecasts and 80 % intervals, below it the methods' errors as bars."""
    figure = Figure(figsize=(3.6 * len(every), 5.6))
    FigureCanvasAgg(figure)
    for column, c in enumerate(every):
        axes = figure.add_subplot(2, len(every), column + 1)
        ahead = range(len(c.truth))
        axes.plot(range(-len(c.past), 0), c.past, color="black", linewidth=0.8)
        axes.plot(ahead, c.truth, color="black", linewidth=0.8, linestyle=":", label="what followed")
        for method, found in c.drawn.items():
            axes.plot(ahead, found.point, color=COLOURS[method], linewidth=1.0, label=method)
            if method == "forecaster" and found.low is not None and found.high is not None:
                axes.fill_between(ahead, found.low, found.high, color=COLOURS[method], alpha=0.2, label="its 80 %", linewidth=0)
        axes.set_title(c.name, fontsize=9)
        axes.tick_params(labelsize=7)
        if column == 0:
            axes.legend(fontsize=6)
        bars = figure.add_subplot(2, len(every), len(every) + column + 1)
        values = [row[0] or 0.0 for row in c.rows.values()]
        bars.barh(list(c.rows), values, color=[COLOURS[m] for m in c.rows])
        bars.set_xlim(0, min(max(values), 3 * sorted(values)[1]) * 1.25)  # one that runs away must not hide the others
        for place, value in enumerate(values):
            bars.text(min(value, bars.get_xlim()[1] * 0.8), place, f" {value:.3g}", va="center", fontsize=7)
        bars.set_title(f"{c.metrics[0]}, less is better", fontsize=8)
        bars.tick_params(labelsize=7)
        bars.invert_yaxis()
        if column:
            bars.set_yticks([])
    figure.tight_layout()
    figure.savefig(file, dpi=100, metadata={"Software": None})
