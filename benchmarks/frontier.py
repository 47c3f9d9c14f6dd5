"""Error and distance over cost, of every method at every budget: `python -m benchmarks.frontier`.

Every method draws the same images from the same held-out noise as the uncached run, and as a
converged run of the same model. A row is written as soon as it is finished, and a rerun skips what
is there. Trained routers are found by their names, METHOD__SETTING__BUDGET__seedN.safetensors, in
the folder given by --routers. `--plot` draws what is there and measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks import curves
from benchmarks.bench import Bench, Options
from benchmarks.distances import EXTRACTORS, Space, spaces
from benchmarks.results import FOLDER
from benchmarks.rows import COSTS, Rows, choice_table, table
from benchmarks.ways import CHECKPOINTS, METHODS, SETTINGS, Setting, Trained, Way, known, trained
from train.quality import Judge

BUDGETS = (0.50, 0.35, 0.25, 0.15)


@dataclass(frozen=True)
class Job:
    """A row to be measured, and how to get its way."""

    row: dict[str, Any]
    way: Callable[[Bench], Way]


def jobs(
    name: str,
    setting: Setting,
    budgets: Sequence[float],
    methods: Sequence[str] | None,
    routers: Sequence[Trained],
    options: Options,
) -> Iterator[Job]:
    """The rows of a setting; trained routers after the others of their budget."""
    base = {
        "setting": name,
        "teacher": setting.teacher.name,
        "guidance_scale": setting.guidance_scale,
        "samples": options.samples,
        "seed": options.seed,
        "training_seed": None,
        "router": None,
    }

    def uncached(bench: Bench) -> Way:
        return Way("uncached", bench.schedule)

    yield Job({**base, "method": "uncached", "budget": 1.0}, uncached)
    for budget in budgets:
        for method in METHODS:
            if method == "dpm_2" and setting.solver != "dpm_solver_2":
                continue  # a rival on its own schedule alone
            if methods is None or method in methods:
                row = {**base, "method": method, "budget": budget}
                yield Job(row, partial(Bench.way, method=method, budget=budget))
        for router in routers:
            wanted = methods is None or router.method in methods
            if wanted and router.setting == name and router.budget == budget:
                row = {**base, "method": router.method, "budget": budget}
                row |= {"training_seed": router.seed, "router": router.digest}
                yield Job(row, partial(_trained_way, router))


def _trained_way(router: Trained, bench: Bench) -> Way:
    return router.way(bench.model, bench.schedule, bench.setting.guidance_scale)


def run(
    settings: Mapping[str, Setting],
    out: Path,
    options: Options,
    *,
    budgets: Sequence[float] = BUDGETS,
    methods: Sequence[str] | None = None,
    routers: Sequence[Trained] = (),
    judge: Judge | None = None,
    distances: Sequence[Space] = (),
) -> list[dict[str, Any]]:
    """Measure what is missing in a file of results, and return all of its rows.

    Args:
        settings: The settings by name.
        out: The JSON file.
        options: How samples are drawn.
        budgets: Nominal shares of the compute.
        methods: Names of methods, trained ones among them; None for all.
        routers: The trained routers.
        judge: The classifier.
        distances: The spaces in which distances to real images are measured.

    Raises:
        ValueError: If a method is unknown, or a router does not fit its setting.
    """
    if min(options.samples, options.batch_size, options.runs) < 1:
        raise ValueError(
            "expected samples, batch_size and runs of at least 1, got "
            f"{options.samples}, {options.batch_size} and {options.runs}"
        )
    if not all(0 < budget <= 1 for budget in budgets):
        raise ValueError(f"expected budgets in (0, 1], got {', '.join(map(str, budgets))}")
    known(methods or (), [*METHODS, *sorted({r.method for r in routers})], "method")
    rows = Rows(out)
    todo = {
        name: [
            job
            for job in jobs(name, setting, budgets, methods, routers, options)
            if not rows.has(job.row, distances)
        ]
        for name, setting in settings.items()
    }
    with tqdm(total=sum(map(len, todo.values())), desc="Frontier", unit="row") as bar:
        for name, missing in todo.items():
            bench = Bench(name, settings[name], options) if missing else None
            for job in missing:
                assert bench is not None
                bar.set_postfix_str(f"{name} {job.row['method']} {job.row['budget']:g}")
                rows.add(_measured(bench, job, judge, distances), options.device)
                bar.update()
    return rows.rows


def _measured(
    bench: Bench, job: Job, judge: Judge | None, distances: Sequence[Space]
) -> dict[str, Any]:
    try:
        way = job.way(bench)
    except ValueError as error:
        if job.row["router"] is not None:
            raise
        return {**job.row, "unfit": str(error)}  # e.g. a spacing that has not so many timesteps
    return {**job.row, "kind": way.kind, **bench.figures(way, judge, distances)}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the tables and draw the plots."""
    parser = argparse.ArgumentParser("python -m benchmarks.frontier", description=__doc__)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", help="default: all, trained ones too")
    parser.add_argument("--routers", type=Path, help="folder of trained routers")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the noise")
    parser.add_argument("--runs", type=int, default=7, help="pairs of runs per latency")
    parser.add_argument("--features", nargs="*", help=f"of {', '.join(EXTRACTORS)}; default: all")
    parser.add_argument("--images", help="Fashion-MNIST: hub id or folder of idx files")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--out", type=Path, default=FOLDER / "frontier.json")
    parser.add_argument("--plot", action="store_true", help="draw what is there, measure nothing")
    parser.add_argument(
        "--cost", choices=COSTS, default="evaluations", help="of the last table and plot"
    )
    options = parser.parse_args(arguments)
    try:
        known(options.settings, SETTINGS, "setting")
        with _threads(options.threads):
            rows = Rows(options.out).rows if options.plot else _run(options)
        if not rows:
            raise ValueError(f"expected rows in {options.out}, found none; measure first")
        chosen = [row for row in rows if row["setting"] in options.settings]
        print(table(chosen), choice_table(chosen, options.cost), sep="\n\n")
        for path in curves.draw(chosen, options.out, options.cost):
            print(f"wrote {path}")
    except ValueError as error:
        parser.error(str(error))


def _run(options: argparse.Namespace) -> list[dict[str, Any]]:
    classifier = CHECKPOINTS / "fashion_mnist_classifier"
    routers = trained(options.routers) if options.routers else []
    known(options.methods or (), [*METHODS, *sorted({r.method for r in routers})], "method")
    distances = spaces(options.features, classifier, images=options.images, device=options.device)
    judge = Judge(classifier)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows = run(
            {name: SETTINGS[name] for name in options.settings},
            options.out,
            Options(
                options.samples,
                options.batch_size,
                seed,
                options.runs,
                options.work,
                options.device,
            ),
            budgets=options.budgets,
            methods=options.methods,
            routers=routers,
            judge=judge,
            distances=distances,
        )
    return rows


if __name__ == "__main__":
    main()
