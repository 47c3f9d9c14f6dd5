"""The shipped routers beside what costs as much: `python -m benchmarks.routers`.

Each router is compared, on the same noise, with fewer steps of its own solver, with DDIM and
DPM-Solver++ 2M (spaced evenly in log-SNR) at as many evaluations, and with reusing whole
evaluations, spread evenly.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

import l2c
from benchmarks import results
from train.quality import Judge
from train.report import Way, compare, equal_cost, table, ways

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
SHIPPED = {
    "fashion_mnist_dit_ddim_20": "fashion_mnist_dit",
    "fashion_mnist_dit_ddim_20_quarter": "fashion_mnist_dit",
    "fashion_mnist_dit_ddim_50": "fashion_mnist_dit",
    "fashion_mnist_uvit_dpm_20": "fashion_mnist_uvit",
    "fashion_mnist_uvit_dpm_50": "fashion_mnist_uvit",
}


def spread(router: l2c.Router) -> l2c.Plan:
    """Reuse whole evaluations, spread evenly, so that the cost comes nearest to a router's.

    Of a solver with two evaluations per step only the first ones, as the two must not share.
    """
    schedule, sites = router.schedule, router.sites
    per_step, evaluations = schedule.evaluations_per_step, len(schedule)
    rows = range(per_step, evaluations) if per_step == 1 else range(per_step, evaluations, per_step)
    saved = (1 - router.plan().share) * evaluations / (1 - sites.rest / sites.macs)
    count = min(len(rows), round(saved))
    chosen = {rows[len(rows) - 1 - (i * len(rows)) // count] for i in range(count)}
    compute = tuple((row not in chosen,) * len(sites) for row in range(evaluations))
    return l2c.Plan(compute, sites)


def rivals(model: Any, router: l2c.Router, guidance_scale: float) -> dict[str, Way]:
    """What costs as much as a router."""
    full = router.schedule
    plan, evaluations = spread(router), len(equal_cost(router))

    def way(schedule: l2c.Schedule, plan: l2c.Plan | None = None) -> Way:
        def draw(labels: Tensor, noise: Tensor) -> Tensor:
            return l2c.sample(model, schedule, labels, guidance_scale, plan=plan, latents=noise)

        share = len(schedule) / len(full) * (plan.share if plan else 1.0)
        return Way(share, len(schedule), draw)

    found = {"uniform reuse": way(full, plan)}
    for solver, title in (("ddim", "DDIM"), ("dpm_solver_pp_2m", "DPM-Solver++ 2M")):
        if solver != full.solver:
            name = f"{title}, {evaluations}"
            try:
                other = l2c.Schedule.of(solver, evaluations, noise=model.noise)
            except ValueError:  # so many timesteps evenly in log-SNR would coincide
                other = l2c.Schedule.of(solver, evaluations, spacing="trailing", noise=model.noise)
                name += ", trailing"
            found[name] = way(other)
    return found


def main() -> None:
    """Measure the shipped routers."""
    parser = argparse.ArgumentParser("python -m benchmarks.routers", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument(
        "--only", nargs="+", choices=SHIPPED, help="keep the figures of the others, made alike"
    )
    options = parser.parse_args()
    judge = Judge(CHECKPOINTS / "fashion_mnist_classifier")
    settings = {
        "samples": options.samples,
        "batch": options.batch_size,
        "guidance_scale": options.guidance_scale,
    }
    figures = kept(settings, options.device) if options.only else {}
    for name, teacher in SHIPPED.items():
        if options.only and name not in options.only:
            continue
        model = l2c.load(CHECKPOINTS / teacher).to(options.device)
        router = l2c.Router.load(CHECKPOINTS / f"{name}.safetensors", model)
        chosen = ways(model, router, options.guidance_scale)
        chosen |= rivals(model, router, options.guidance_scale)
        measured, _ = compare(model, chosen, judge, options.samples, options.batch_size, 1234)
        figures[name] = measured
        print(name, table(measured), sep="\n", end="\n\n")
        # After each, so that an interrupted run leaves what it has measured.
        ordered = {name: figures[name] for name in SHIPPED if name in figures}
        results.write("routers", options.device, 1234, **settings, routers=ordered)


def kept(settings: dict[str, Any], device: str) -> dict[str, Any]:
    """The figures of an earlier run.

    Raises:
        ValueError: If it was made with other settings, or there is none.
    """
    path = results.path_of("routers", device)
    if not path.is_file():
        raise ValueError(f"expected {path} of an earlier run; leave out --only")
    before = json.loads(path.read_text())
    differing = [key for key, value in settings.items() if before[key] != value]
    if differing:
        raise ValueError(
            f"{path} was made with other {', '.join(differing)}; give the same, or leave out --only"
        )
    return dict(before["routers"])


if __name__ == "__main__":
    main()
