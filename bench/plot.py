"""The plot of a run: what is to be reached and what was, the backlog, the questions."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Results, Row

# The same figures make the same file.
mpl.rcParams.update({"svg.hashsalt": "spectrum", "svg.fonttype": "none", "font.size": 9})
MET, NOT_MET = "#2a7f62", "#c05746"


def shares(rows: list[Row]) -> list[tuple[str, float]]:
    """How far each target is reached: 1 is just there, less is better."""
    return [
        (row.what, row.value / row.most if row.most is not None else row.least / row.value)
        for row in rows
        if row.is_met is not None and row.value and row.value > 0
    ]


def draw_targets(axes: Axes, results: Results) -> None:
    named = [
        (f"{what} ({group})" if "payloads" in group else what, share)
        for group, rows in results.groups()
        for what, share in shares(rows)
    ]
    names, values = zip(*reversed(named), strict=True)
    colours = [MET if value <= 1 else NOT_MET for value in values]
    axes.barh(names, [value - 1 for value in values], left=1, color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("what it costs to what it may cost (left of 1: met)")


def draw_backlog(axes: Axes, results: Results) -> None:
    made = results.parts["sustained"].measures
    at = [one["at"] for one in made["seen"]]
    for name in ("sent", "backlog"):
        axes.plot(at, [one[name] for one in made["seen"]], label=name)
    for number, (began, spent) in enumerate(made["refreshes"]):
        axes.axvspan(began, began + spent, color="0.9", label=None if number else "refresh")
    axes.set_xlim(0, made["seconds"])
    axes.set_xlabel("seconds")
    axes.set_ylabel("events")
    axes.set_title(f"end to end, {made['rate']:,} events/s sent")
    axes.legend()


def draw_questions(axes: Axes, results: Results) -> None:
    costs = results.parts["questions"].measures
    engines = list(next(iter(costs.values())))
    width = 0.8 / len(engines)
    for place, engine in enumerate(engines):
        axes.bar(
            [number + place * width for number in range(len(costs))],
            [1000 * by_engine[engine] for by_engine in costs.values()],
            width,
            label=engine,
        )
    axes.set_xticks([number + 0.4 - width / 2 for number in range(len(costs))], list(costs),
                    rotation=20)  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.set_title("questions over all events")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def draw(results: Results) -> None:
    """Writes the plot beside the results."""
    figure = Figure(figsize=(11, 10), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    draw_targets(above.subplots(), results)
    backlog, questions = below.subplots(1, 2)
    draw_backlog(backlog, results)
    draw_questions(questions, results)
    figure.suptitle(f"{results.command}: {results.machine['cores']} cores, {results.at}")
    figure.savefig(results.path(".svg"), metadata={"Date": None})
