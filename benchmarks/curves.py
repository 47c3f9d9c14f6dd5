"""Tables and plots of the frontier's rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2c.picture import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
COSTS = ("evaluations", "latency")
SHARES = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0)  # ticks of plots
GRID = (2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50)

TITLES = {
    "uncached": "uncached",
    "ddim": "DDIM",
    "dpm_pp_log_snr": "DPM-Solver++ 2M, log-SNR",
    "dpm_pp_trailing": "DPM-Solver++ 2M, trailing",
    "unipc_log_snr": "UniPC, log-SNR",
    "unipc_trailing": "UniPC, trailing",
    "dpm_2": "DPM-Solver-2",
    "fora": "uniform copy (FORA)",
    "taylorseer_1": "TaylorSeer 1",
    "taylorseer_2": "TaylorSeer 2",
    "taylorseer_3": "TaylorSeer 3",
    "newton_1": "uniform Newton 1",
    "newton_2": "uniform Newton 2",
    "per_step_copy": "calibrated evaluations, copy",
    "per_step_taylor_2": "calibrated evaluations, Taylor 2",
    "smoothcache": "SmoothCache",
    "block_caching": "Block Caching",
}

COLUMNS: dict[str, tuple[Callable[[Row], Any], str]] = {
    "share": (lambda row: row["share"], "{:.1%}"),
    "latency": (lambda row: row["latency"], "{:.2f}"),
    "MSE": (lambda row: row["mse"], "{:.2e}"),
    "PSNR": (lambda row: row["psnr"], "{:.1f}"),
    "to converged": (lambda row: row["mse_converged"], "{:.2e}"),
    "Frechet": (lambda row: frechet(row, "classifier"), "{:.2f}"),
    "kernel": (lambda row: row["distances"].get("classifier", {}).get("kernel"), "{:.4f}"),
    "precision": (lambda row: row["distances"].get("classifier", {}).get("precision"), "{:.3f}"),
    "recall": (lambda row: row["distances"].get("classifier", {}).get("recall"), "{:.3f}"),
    "Frechet, Lite0": (lambda row: frechet(row, "efficientnet"), "{:.2f}"),
    "recognised": (lambda row: row.get("recognised"), "{:.1%}"),
    "agreement": (lambda row: row.get("agreement"), "{:.1%}"),
    "cache MiB": (lambda row: row["cache_mib"], "{:.1f}"),
    "training s": (lambda row: row.get("training_seconds"), "{:.0f}"),
}


def frechet(row: Row, space: str) -> float | None:
    """The Frechet distance of a row in a space; None if it was not measured."""
    found: float | None = row["distances"].get(space, {}).get("frechet")
    return found


def title(row: Row) -> str:
    """What a method is called."""
    name: str = TITLES.get(row["method"], row["method"])
    return name


def ours(row: Row) -> bool:
    """Whether a row is of this project's own objective."""
    return bool(row["kind"] == "learned" and row["method"].startswith("l2c"))


def fit(rows: Iterable[Row]) -> list[Row]:
    """The rows that were measured."""
    return [row for row in rows if "unfit" not in row]


def table(rows: Sequence[Row]) -> str:
    """All figures as text, a block for each setting."""
    blocks = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = sorted((row for row in rows if row["setting"] == setting), key=_place)
        lines = [[setting, "budget", *COLUMNS]]
        for row in here:
            seeds = {"seed": row["training_seed"], "noise": row["seed"] or None}
            numbered = [f"{what} {seed}" for what, seed in seeds.items() if seed is not None]
            name = ", ".join([title(row), *numbered])
            budget = f"{row['budget']:g}"
            if "unfit" in row:
                lines.append([name, budget, "-", *[""] * (len(COLUMNS) - 1)])
                continue
            values = ((get(row), form) for get, form in COLUMNS.values())
            lines.append([name, budget, *("-" if v is None else f.format(v) for v, f in values)])
        blocks.append(aligned(lines))
    return "\n\n".join(blocks)


def _place(row: Row) -> tuple[Any, ...]:
    known = list(TITLES)
    order = known.index(row["method"]) if row["method"] in known else len(known)
    return -row["budget"], order, row["method"], row["training_seed"] or 0, row["seed"]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# --- what to choose at a cost, over all schedules of a model ---

GROUPS: dict[str, Callable[[Row], bool]] = {
    "fewer steps": lambda row: row["kind"] in ("uncached", "fewer steps"),
    "caching, not trained": lambda row: row["kind"] == "caching",
    "caching, trained by others' objectives": lambda row: (
        row["kind"] == "learned" and not ours(row)
    ),
    "l2c": ours,
}


def cost_of(row: Row, cost: str, rows: Sequence[Row]) -> float:
    """Cost in plain evaluations of the model, by multiply-accumulates or by measured time."""
    if cost == "evaluations":
        return float(row["cost"])
    plain = next(
        other
        for other in rows
        if other["setting"] == row["setting"] and other["method"] == "uncached"
    )
    return float(row["latency"] * plain["evaluations"])


def models(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Measured rows by model and guidance."""
    found: dict[str, list[Row]] = {}
    for row in fit(rows):
        name = f"{row['teacher']}, guidance {row['guidance_scale']:g}"
        found.setdefault(name, []).append(row)
    return found


def best(rows: Sequence[Row], cost: str, every: Sequence[Row]) -> list[tuple[float, Row]]:
    """The rows that no cheaper one beats in error to the converged sample, by cost."""
    ordered = sorted(
        ((cost_of(row, cost, every), row) for row in rows),
        key=lambda pair: (pair[0], pair[1]["mse_converged"]),
    )
    found: list[tuple[float, Row]] = []
    for at, row in ordered:
        if not found or row["mse_converged"] < found[-1][1]["mse_converged"]:
            found.append((at, row))
    return found


def choice_table(rows: Sequence[Row], cost: str = "evaluations") -> str:
    """The least error to the converged sample at a cost, of each group, over all schedules."""
    blocks = []
    for model, here in models(rows).items():
        groups = {name: [row for row in here if test(row)] for name, test in GROUPS.items()}
        fronts = {name: best(found, cost, here) for name, found in groups.items() if found}
        lines = [[f"{model}: MSE to the converged sample at a cost of", *fronts]]
        for limit in GRID:
            within = [[row for at, row in front if at <= 1.02 * limit] for front in fronts.values()]
            cells = [
                f"{found[-1]['mse_converged']:.2e} {_origin(found[-1])}" if found else "-"
                for found in within
            ]
            if any(within) and cells != lines[-1][1:]:
                lines.append([f"{limit} {_unit(cost)}", *cells])
        blocks.append(aligned(lines))
    return "\n\n".join(blocks)


def _origin(row: Row) -> str:
    if row["kind"] == "fewer steps":
        return f"({title(row)}, {row['evaluations']})"
    return f"({title(row)} on {row['schedule'].partition(',')[0]})"


def _unit(cost: str) -> str:
    return "evaluations" if cost == "evaluations" else "evaluations' time"


# --- plots ---


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
        axis.set_xlabel(f"cost in plain {_unit(cost)}")
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
