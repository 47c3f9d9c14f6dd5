"""The documents' tables, from benchmarks/results: `python -m benchmarks.tables` fills them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER
from benchmarks.rows import COLUMNS, fit, ours, title
from l2c.files import replacing
from train.report import LABELS

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "checkpoints" / "README.md")


def results(name: str) -> dict[str, Any]:
    """A measurement."""
    figures: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return figures


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def routers() -> str:
    """Every shipped router beside what costs as much."""
    measured = results("routers")
    columns = ["share", "predicted_speedup", "measured_speedup", "psnr", "frechet", "recognised"]
    rows = []
    for name, ways in measured["routers"].items():
        for way, figures in ways.items():
            title = f"**{name}**" if way == "router" else f"{_plain(name, way)}"
            cells = (
                "-" if figures[key] is None else LABELS[key][1].format(figures[key])
                for key in columns
            )
            rows.append([title, *cells])
    table = markdown(["", *(LABELS[key][0] for key in columns)], rows)
    return (
        f"{table}\n\n{measured['samples']} samples each from the same noise, guidance scale "
        f"{measured['guidance_scale']}, batches of {measured['batch']}, "
        f"{measured['machine']['device']} with {measured['machine']['threads']} threads."
    )


SOLVERS = {"ddim": "DDIM", "dpm": "DPM-Solver-2", "dpm_solver_2": "DPM-Solver-2"}


def _plain(name: str, way: str) -> str:
    _, solver, evaluations = name.removesuffix("_quarter").rsplit("_", 2)
    steps = re.fullmatch(r"(\d+) steps", way)
    if way == "uncached":
        return f"{SOLVERS[solver]}, {evaluations}, uncached"
    return f"{SOLVERS[solver]}, {steps[1]}" if steps else way


def sampling() -> str:
    """Measured speed-up over the predicted one."""
    measured = results("sampling")
    rows = [
        [
            row["router"],
            str(row["batch"]),
            f"{row['predicted_speedup']:.2f}x",
            f"{row['measured_speedup']:.2f}x",
            f"{row['measured_over_predicted']:.0%}",
        ]
        for row in measured["rows"]
    ]
    head = ["router", "batch", "predicted speed-up", "measured speed-up", "of the predicted"]
    runs = measured["rows"][0]["runs"]
    return f"{markdown(head, rows)}\n\nMedians of {runs} pairs of runs, {_device(measured)}."


def training() -> str:
    """Frozen training against the published loop."""
    measured = results("training")
    memory = measured["peak_bytes"]
    return (
        f"Against the same loop with the backbone's gradients on, as in the published code, "
        f"training takes {measured['steps_per_second_ratio']:.2f} times the steps per second and "
        f"{memory['frozen'] / 2**20:.0f} MiB of peak memory instead of "
        f"{memory['published'] / 2**20:.0f} MiB for a step (median of {measured['steps']} pairs "
        f"of steps of {measured['batch']} images, {_device(measured)})."
    )


def teacher() -> str:
    """How good the teacher is."""
    measured = results("teacher")
    rows = [
        [
            row["teacher"],
            f"{SOLVERS[row['solver']]}, {row['evaluations']}",
            f"{row['samples']:,}",
            f"{row['guidance_scale']:g}",
            f"{row['recognised']:.1%}",
            f"{row['frechet']:.2f}",
        ]
        for row in measured["rows"]
    ]
    head = [
        "teacher",
        "sampled by",
        "samples",
        "guidance",
        "recognised as label",
        "Frechet distance",
    ]
    return markdown(head, rows)


def true_size() -> str:
    """Published routers on models of their size."""
    measured = results("true_size")
    rows = [
        [
            row["router"],
            f"{row['share']:.1%}",
            f"{row['predicted_speedup']:.2f}x",
            f"{row['measured_speedup']:.2f}x",
            f"{row['measured_over_predicted']:.0%}",
            _reused(row),
        ]
        for row in measured["rows"]
    ]
    head = [
        "router",
        "share of compute",
        "predicted speed-up",
        "measured speed-up",
        "of the predicted",
        "an evaluation that reuses all",
    ]
    return (
        f"{markdown(head, rows)}\n\nOne image each with guidance, random weights, evaluation by "
        f"evaluation in turn with the uncached run, {_device(measured)}. The last column is in "
        "shares of a full evaluation's time; by multiply-accumulates it is 0.2% of a DiT-XL/2 and "
        "7.2% of a U-ViT-H/2."
    )


def frontier() -> str:
    """Every method of the frontier at a quarter of the compute."""
    rows = [row for row in fit(results("frontier")["rows"]) if row["budget"] in (0.25, 1.0)]
    samples = sorted({row["samples"] for row in rows})
    shown = SHOWN if samples[0] >= ENOUGH else [name for name in SHOWN if name != "Frechet"]
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        for row in sorted(here, key=lambda row: (row["method"] != "uncached", row["mse"])):
            name = f"**{title(row)}**" if ours(row) else title(row)
            values = ((get(row), form) for get, form in (COLUMNS[key] for key in shown))
            cells = ("-" if v is None else form.format(v) for v, form in values)
            lines.append([setting, name, *cells])
    return (
        f"{markdown(['setting', 'method', *shown], lines)}\n\n"
        f"{' and '.join(map(str, samples))} samples from the same noise in each setting "
        f"(g: guidance scale), {_device(results('frontier'))}."
    )


def _reused(row: dict[str, Any]) -> str:
    share = row["all_reused_over_full"]
    return "-" if share is None else f"{share:.1%}"


def executor(measured: dict[str, Any] | None = None) -> str:
    """What a plan's evaluations cost beside what they compute."""
    measured = measured or results("executor")
    alone = [
        [
            row["model"],
            str(row["batch"]),
            row["rule"],
            f"{row['share']:.1%}",
            f"{row['reused_over_full']:.1%}",
            f"{row['one_by_one_over_full']:.1%}",
        ]
        for row in measured["reused"]
    ]
    whole = [
        [
            row["model"],
            str(row["batch"]),
            row["plan"],
            f"{row['share']:.3f}",
            f"{row['measured']:.3f}",
            f"{row['efficiency']:.0%}",
        ]
        for row in measured["sampled"]
    ]
    alone_head = ["an evaluation that reuses all", "batch", "rule", "predicted", "measured"]
    whole_head = ["sampling", "batch", "plan", "predicted", "measured", "efficiency"]
    return (
        f"{markdown([*alone_head, 'one by one'], alone)}\n\n{markdown(whole_head, whole)}\n\n"
        "In shares of a full evaluation and of sampling without a plan, with guidance; predicted "
        "are multiply-accumulates, and efficiency is predicted over measured. Medians of "
        f"{measured['rounds']} rounds, {_device(measured)}."
    )


def _device(measured: dict[str, Any]) -> str:
    count = measured["machine"]["threads"]
    return f"{measured['machine']['device']}, {count} thread{'' if count == 1 else 's'}"


ENOUGH = 1000  # samples below which Frechet distances are mostly bias
SHOWN = ("share", "latency", "MSE", "to converged", "Frechet", "agreement")
TABLES = {
    "frontier": frontier,
    "routers": routers,
    "sampling": sampling,
    "training": training,
    "teacher": teacher,
    "true_size": true_size,
    "executor": executor,
}


def filled(text: str) -> str:
    """A document with each `<!-- NAME -->` block replaced by its table."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite the tables in the documents."""
    for path in DOCUMENTS:
        text = filled(path.read_text())
        with replacing(path) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
