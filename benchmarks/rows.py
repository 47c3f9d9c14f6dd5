"""The frontier's rows: their file, and the tables that are made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.distances import Space
from l2c.files import replacing
from train import machine

Row = Mapping[str, Any]
COSTS = ("evaluations", "latency")
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


class Rows:
    """The rows of a file of results; each is written when it is added.

    Args:
        path: The JSON file.
    """

    KEY = ("setting", "method", "budget", "training_seed", "seed")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            try:
                self.rows = json.loads(path.read_text())["rows"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"expected the results of a frontier in {path}, found something else; name "
                    "another file by --out"
                ) from error

    def has(self, row: Mapping[str, Any], distances: Sequence[Space]) -> bool:
        """Whether this row is finished, with as many samples and these distances."""
        for done in self.rows:
            if all(done.get(key) == row.get(key) for key in (*self.KEY, "samples", "router")):
                return "unfit" in done or all(s.name in done["distances"] for s in distances)
        return False

    def add(self, row: dict[str, Any], device: str) -> None:
        """Add a row in the place of an older one, and write the file."""
        same = [all(done.get(key) == row.get(key) for key in self.KEY) for done in self.rows]
        self.rows = [done for done, old in zip(self.rows, same, strict=True) if not old] + [row]
        content = {"rows": self.rows, "machine": machine.described(device)}
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")


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
                lines.append([f"{limit} {unit(cost)}", *cells])
        blocks.append(aligned(lines))
    return "\n\n".join(blocks)


def _origin(row: Row) -> str:
    if row["kind"] == "fewer steps":
        return f"({title(row)}, {row['evaluations']})"
    return f"({title(row)} on {row['schedule'].partition(',')[0]})"


def unit(cost: str) -> str:
    """What a cost is counted in."""
    return "evaluations" if cost == "evaluations" else "evaluations' time"
