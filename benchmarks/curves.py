"""Plots of the frontier's rows: error and distance over cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import (
    GRID,
    GROUPS,
    Row,
    best,
    cost_of,
    fit,
    frechet,
    models,
    ours,
    title,
    unit,
)
from l2c.picture import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0)  # ticks of plots


def draw(rows: Sequence[Row], out: Path, cost: str = "evaluations") -> list[Path]:
    """Draw everything beside a file of results; returns what was written."""
    plots: dict[str, Callable[[], Figure | None]] = {
        "error": lambda: panels(rows, lambda row: row["mse"], "MSE to the uncached sample"),
        "frechet": lambda: panels(
            rows, lambda row: frechet(row, "classifier"), "Frechet distance, classifier"
        ),
        "frechet_lite0": lambda: panels(
            rows, lambda row: frechet(row, "efficientnet"), "Frechet distance, EfficientNet-Lite0"
        ),
        "choice": lambda: choice_figure(rows, cost),
    }
    written = []
    for name, make in plots.items():
        figure = make()
        if figure is not None:
            path = out.with_name(f"{out.stem}_{name}.png")
            write(figure, path)
            written.append(path)
    return written


def style(row: Row) -> dict[str, Any]:
    """How a method's line looks."""
    if ours(row):
        return {"color": "crimson", "lw": 2.6, "marker": "o", "ms": 6, "zorder": 5}
    if row["kind"] == "learned":
        return {"lw": 1.8, "marker": "s", "ms": 4, "zorder": 4}
    if row["kind"] == "fewer steps":
        return {"lw": 1.0, "ls": ":", "marker": "x", "ms": 4, "zorder": 2}
    return {"lw": 0.9, "marker": ".", "ms": 5, "alpha": 0.8, "zorder": 3}


def panels(rows: Sequence[Row], value: Callable[[Row], float | None], label: str) -> Figure | None:
    """A value over the share of compute, a panel per setting; None if nobody has the value.

    A point is the median over seeds, with a bar from the lowest to the highest.
    """
    from matplotlib import colormaps

    measured = [row for row in fit(rows) if value(row) is not None]
    settings = list(dict.fromkeys(row["setting"] for row in measured))
    if not settings:
        return None
    figure, axes = _grid(len(settings))
    methods = list(dict.fromkeys(row["method"] for row in measured if row["kind"] != "uncached"))
    for axis, setting in zip(axes, settings, strict=False):
        here = [row for row in measured if row["setting"] == setting]
        for number, method in enumerate(methods):
            found = [row for row in here if row["method"] == method]
            if found:
                look = {"color": colormaps["tab20"](number % 20), **style(found[0])}
                _line(axis, found, value, title(found[0]), look)
        for row in here:
            if row["kind"] == "uncached" and (value(row) or 0) > 0:
                axis.axhline(value(row), color="0.5", lw=1, ls="--", label="uncached")
        _scaled(axis, setting, SHARES, [f"{share:.0%}" for share in SHARES])
        axis.set_xlabel("share of compute")
        axis.set_ylabel(label)
    _legend(figure, axes)
    return figure


def _line(
    axis: Any, rows: Sequence[Row], value: Callable[[Row], float | None], name: str, look: Any
) -> None:
    points = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        here = [row for row in rows if row["budget"] == budget]
        values = [v for v in map(value, here) if v is not None and v > 0]
        if values:
            share = statistics.median(row["share"] for row in here)
            points.append((share, statistics.median(values), min(values), max(values)))
    if not points:
        return
    x, y, low, high = zip(*sorted(points), strict=True)
    below = [a - b for a, b in zip(y, low, strict=True)]
    above = [b - a for a, b in zip(y, high, strict=True)]
    axis.errorbar(x, y, [below, above], label=name, capsize=2, **look)


def choice_figure(rows: Sequence[Row], cost: str = "evaluations") -> Figure | None:
    """Error to the converged sample over cost, the best of each group, a panel per model."""
    found = models(rows)
    if not found:
        return None
    figure, axes = _grid(len(found))
    looks = [
        {"color": "0.3", "ls": ":"},
        {"color": "C0"},
        {"color": "C2"},
        {"color": "crimson", "lw": 2.6},
    ]
    for axis, (model, here) in zip(axes, found.items(), strict=False):
        for (name, test), look in zip(GROUPS.items(), looks, strict=True):
            group = [row for row in here if test(row)]
            front = [(at, row["mse_converged"]) for at, row in best(group, cost, here)]
            front = [point for point in front if point[1] > 0]
            if not front:
                continue
            every = [(cost_of(row, cost, here), row["mse_converged"]) for row in group]
            axis.scatter(*zip(*every, strict=True), s=6, color=look["color"], alpha=0.3)
            axis.step(*zip(*front, strict=True), where="post", marker="o", ms=4, label=name, **look)
        _scaled(axis, model, GRID, list(map(str, GRID)))
        axis.set_xlabel(f"cost in plain {unit(cost)}")
        axis.set_ylabel("MSE to the converged sample")
    _legend(figure, axes)
    return figure


def _grid(count: int) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(3, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(4.6 * columns + 2.6, 3.6 * lines + 0.4), layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False)
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def _scaled(axis: Any, name: str, ticks: Sequence[float], labels: Sequence[str]) -> None:
    axis.set(xscale="log", yscale="log", title=name)
    low, high = axis.get_xlim()
    shown = [i for i, tick in enumerate(ticks) if low <= tick <= high]
    axis.set_xticks([ticks[i] for i in shown], [labels[i] for i in shown], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.grid(True, which="major", color="0.92")


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8)
