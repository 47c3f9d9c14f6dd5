"""Error and distance over cost, of every method at every budget: `python -m benchmarks.frontier`.

Every method draws the same images from the same held-out noise as the uncached run, and as a
converged run of the same model. A row is written as soon as it is finished, and a rerun skips what
is there. Trained routers are found by their names, METHOD__SETTING__BUDGET__seedN.safetensors, in
the folder given by --routers. `--plot` draws what is there and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

import l2c
from benchmarks import curves
from benchmarks.distances import EXTRACTORS, Space, spaces
from benchmarks.results import FOLDER
from benchmarks.ways import (
    CHECKPOINTS,
    METHODS,
    SETTINGS,
    Setting,
    Task,
    Trained,
    Way,
    cache_mib,
    known,
    trained,
)
from l2c.files import replacing
from l2c.identity import Identity
from l2c.sampling import initial_latents
from l2c.schedule import Schedule
from train import machine
from train.calibration import Changes, measure
from train.quality import Judge, psnr
from train.seeding import generator

BUDGETS = (0.50, 0.35, 0.25, 0.15)
CONVERGED = 200  # DDIM evaluations after which a sample hardly changes
LOOKAHEAD = 10  # evaluations over which changes are measured: enough for the least budget
LATENCY_BATCH = 8
KEEP_EVERY = 500  # samples after which a reference is written


@dataclass(frozen=True)
class Options:
    """How samples are drawn and measured.

    Args:
        samples: Images per row.
        batch_size: Images at a time; it does not change which noise an image has.
        seed: Seed of the noise.
        runs: Pairs of runs per latency.
        work: Folder of references and calibrations.
        device: Where the model runs.
        converged: DDIM evaluations of the converged reference.
    """

    samples: int = 5000
    batch_size: int = 100
    seed: int = 0
    runs: int = 7
    work: Path = Path("runs/frontier")
    device: str = "cpu"
    converged: int = CONVERGED


class Bench:
    """One setting at work: model, noise, labels, and references that are drawn once.

    Args:
        name: Name of the setting.
        setting: The setting.
        options: How samples are drawn.
    """

    def __init__(self, name: str, setting: Setting, options: Options) -> None:
        self.name = name
        self.setting = setting
        self.options = options
        self.model = l2c.load(setting.teacher).to(options.device)
        self.schedule = setting.schedule(self.model)
        self.labels = torch.arange(options.samples) % self.model.num_classes

    @cached_property
    def noise(self) -> Tensor:
        """The noise of every image, a function of the seed and its number alone."""
        seed = self.options.seed
        draws = [generator("frontier", seed, i) for i in range(self.options.samples)]
        return initial_latents(self.model, self.options.samples, draws).cpu()

    def draw(self, way: Way, start: int = 0, end: int | None = None) -> Tensor:
        """Samples [N, C, H, W] of the images from `start` to `end`, batch by batch."""
        end = self.options.samples if end is None else end
        parts = []
        with tqdm(total=end - start, desc=str(way.schedule), unit="image", leave=False) as bar:
            for first in range(start, end, self.options.batch_size):
                here = slice(first, min(first + self.options.batch_size, end))
                noise = self.noise[here].to(self.options.device)
                scale = self.setting.guidance_scale
                drawn = way.draw(self.model, self.labels[here], noise, scale)
                parts.append(drawn.cpu())
                bar.update(len(drawn))
        return torch.cat(parts)

    @cached_property
    def uncached(self) -> Tensor:
        """Samples of the schedule with everything computed."""
        return self._kept(self.name, self.schedule)

    @cached_property
    def converged(self) -> Tensor:
        """Samples of many DDIM steps, which settings of a model and guidance share."""
        name = f"{self.setting.teacher.name}_converged_g{self.setting.guidance_scale}"
        schedule = Schedule.ddim(self.options.converged, noise=self.model.noise)
        return self._kept(name, schedule)

    def _kept(self, name: str, schedule: Schedule) -> Tensor:
        path = self.options.work / f"{name}_seed{self.options.seed}.safetensors"
        about = self._about(schedule)
        done = _read(path, about, "samples")
        samples = self.noise[:0] if done is None else done
        while len(samples) < self.options.samples:
            end = min(len(samples) + KEEP_EVERY, self.options.samples)
            samples = torch.cat([samples, self.draw(Way("", schedule), len(samples), end)])
            with replacing(path) as temporary:
                save_file({"samples": samples}, temporary, about)
        return samples[: self.options.samples].clone()

    def calibrate(self) -> Changes:
        """The changes along this setting's trajectories, measured once."""
        return self._changes

    @cached_property
    def _changes(self) -> Changes:
        path = self.options.work / f"{self.name}_changes.safetensors"
        about = {**self._about(self.schedule), "lookahead": str(LOOKAHEAD)}
        sites = l2c.sites(self.model)
        if _read(path, about, "relative") is None:
            scale = self.setting.guidance_scale
            measure(self.model, self.schedule, scale, lookahead=LOOKAHEAD).save(path, **about)
        return Changes.load(path, sites)

    def _about(self, schedule: Schedule) -> dict[str, str]:
        return {
            "weights": str(Identity.of(self.model).weights),
            "schedule": json.dumps(schedule.to_dict()),
            "guidance_scale": str(self.setting.guidance_scale),
        }

    def way(self, method: str, budget: float) -> Way:
        """A method that needs no training, at a budget.

        Raises:
            ValueError: If it has no schedule or plan of this cost.
        """
        return METHODS[method](Task(self.model, self.schedule, budget, self.calibrate))

    def latency(self, way: Way) -> list[float]:
        """Times of a way over those of the uncached run, of neighbouring runs."""
        count = LATENCY_BATCH
        labels = torch.arange(count) % self.model.num_classes
        noise = initial_latents(self.model, count, generator("frontier latency"))

        def seconds(chosen: Way) -> float:
            start = time.perf_counter()
            chosen.draw(self.model, labels, noise, self.setting.guidance_scale)
            if next(self.model.parameters()).is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        plain = Way("uncached", self.schedule)
        seconds(plain), seconds(way)  # warm up
        ratios = []
        for turn in range(self.options.runs):  # who goes first changes, as it may pay for the other
            if turn % 2:
                ratios.append(seconds(way) / seconds(plain))
            else:
                ratios.append(1 / (seconds(plain) / seconds(way)))
        return ratios

    def figures(self, way: Way, judge: Judge | None, distances: Sequence[Space]) -> dict[str, Any]:
        """Draw the samples of a way and measure everything."""
        plain = self.uncached
        drawn = plain if way.kind == "uncached" else self.draw(way)
        ratios = [1.0] if way.kind == "uncached" else self.latency(way)
        scale = self.setting.guidance_scale
        found: dict[str, Any] = {
            "schedule": str(way.schedule),
            "evaluations": len(way.schedule),
            "share": way.cost / len(self.schedule),
            "cost": way.cost,
            "latency": statistics.median(ratios),
            "latency_range": [min(ratios), max(ratios)],
            "cache_mib": cache_mib(way.plan, LATENCY_BATCH, scale),
            "mse": float((drawn - plain).square().mean()),
            "psnr": None if way.kind == "uncached" else psnr(drawn, plain),
            "mse_converged": float((drawn - self.converged).square().mean()),
            "psnr_converged": psnr(drawn, self.converged),
            "distances": {space.name: space(drawn) for space in distances},
        }
        if judge is not None:
            found["recognised"] = judge.recognised(drawn, self.labels)
            found["agreement"] = judge.recognised(drawn, self._taken_for(judge))
        return {**found, **way.about}

    @torch.no_grad()
    def _taken_for(self, judge: Judge) -> Tensor:
        parts = self.uncached.clamp(-1, 1).split(256)
        return torch.cat([judge.classifier(part).argmax(dim=1) for part in parts])


def _read(path: Path, about: Mapping[str, str], name: str) -> Tensor | None:
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor(name) if file.metadata() == about else None


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
        "--cost", choices=curves.COSTS, default="evaluations", help="of the last table and plot"
    )
    options = parser.parse_args(arguments)
    try:
        known(options.settings, SETTINGS, "setting")
        with _threads(options.threads):
            rows = Rows(options.out).rows if options.plot else _run(options)
        if not rows:
            raise ValueError(f"expected rows in {options.out}, found none; measure first")
        chosen = [row for row in rows if row["setting"] in options.settings]
        print(curves.table(chosen), curves.choice_table(chosen, options.cost), sep="\n\n")
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
