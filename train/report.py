"""What a router is worth: `python -m train.report --router FILE --model DIR --out DIR`.

Draws the same samples without caching, with the router, and with the number of plain DDIM steps
that costs as much; writes router.png, samples.png and report.json, and prints one table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import l2c
from l2c.files import replacing
from l2c.picture import draw_router, draw_samples
from l2c.plan import Plan
from l2c.router import Router
from l2c.sampling import initial_latents, sample
from l2c.schedule import Schedule
from train import machine
from train.quality import Judge, psnr
from train.seeding import generator


@dataclass(frozen=True)
class Way:
    """One way of drawing samples.

    Args:
        share: Its share of the compute of the uncached run.
        evaluations: Its number of model evaluations.
        draw: `draw(labels, noise)` returns samples [B, C, H, W].
    """

    share: float
    evaluations: int
    draw: Callable[[Tensor, Tensor], Tensor]


def equal_cost(router: Router) -> Schedule:
    """The plain schedule of the same solver and options that costs nearest to the router's plan."""
    schedule = router.schedule
    per_step = schedule.evaluations_per_step
    steps = max(1, round(router.plan().share * len(schedule) / per_step))
    return Schedule.of(schedule.solver, steps * per_step, noise=schedule.noise, **schedule.options)


def ways(model: Any, router: Router, guidance_scale: float) -> dict[str, Way]:
    """The uncached run, the router's, and the plain one of equal cost."""
    full, plain = router.schedule, equal_cost(router)
    plan = router.plan()

    def way(schedule: Schedule, plan: Plan | None = None) -> Way:
        def draw(labels: Tensor, noise: Tensor) -> Tensor:
            return sample(model, schedule, labels, guidance_scale, plan=plan, latents=noise)

        share = len(schedule) / len(full) * (1.0 if plan is None else plan.share)
        return Way(share, len(schedule), draw)

    return {
        "uncached": way(full),
        "router": way(full, plan),
        f"{len(plain)} steps": way(plain),
    }


def compare(
    model: Any, chosen: dict[str, Way], judge: Judge | None, count: int, batch: int, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Draw the same samples in several ways, in turn for every batch, and measure them.

    Returns:
        The figures of each way, and its samples [N, C, H, W]. The speed-up is over the first way:
        the median over the batches of the ratio of times within a batch.
    """
    labels = torch.arange(count) % model.num_classes
    parts: dict[str, list[Tensor]] = {name: [] for name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    starts = range(0, count, batch)
    cuda = next(model.parameters()).is_cuda
    total = len(starts) * sum(way.evaluations for way in chosen.values())
    with tqdm(total=total, desc="Comparing samples", unit="evaluation") as bar:
        for turn, start in enumerate(starts):
            part = labels[start : start + batch]
            noise = initial_latents(model, len(part), generator("compare", seed, start))
            names = list(chosen)
            # Another way goes first in every batch: whoever follows a change of way pays for it.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                way = chosen[name]
                begun = time.perf_counter()
                drawn = way.draw(part, noise)
                if cuda:
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - begun)
                parts[name].append(drawn.cpu())
                bar.update(way.evaluations)
    samples = {name: torch.cat(drawn) for name, drawn in parts.items()}
    first = next(iter(chosen))
    figures: dict[str, dict[str, Any]] = {}
    for name, way in chosen.items():
        pairs = zip(seconds[first], seconds[name], strict=True)
        figures[name] = {
            "share": way.share,
            "predicted_speedup": 1 / way.share,
            "measured_speedup": statistics.median(a / b for a, b in pairs),
            "psnr": None if name == first else psnr(samples[name], samples[first]),
        }
        if judge is not None:
            figures[name]["frechet"] = judge.frechet(samples[name])
            figures[name]["recognised"] = judge.recognised(samples[name], labels)
    return figures, samples


LABELS = {
    "share": ("share of compute", "{:.1%}"),
    "predicted_speedup": ("predicted speed-up", "{:.2f}x"),
    "measured_speedup": ("measured speed-up", "{:.2f}x"),
    "psnr": ("PSNR to uncached, dB", "{:.2f}"),
    "frechet": ("Frechet distance", "{:.2f}"),
    "recognised": ("recognised as label", "{:.1%}"),
}


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as text, a column per way."""
    lines = [["", *figures]]
    for key, (label, form) in LABELS.items():
        if key in next(iter(figures.values())):
            values = (way[key] for way in figures.values())
            lines.append([label, *("-" if v is None else form.format(v) for v in values)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison and write its files."""
    parser = argparse.ArgumentParser("python -m train.report", description=__doc__)
    parser.add_argument("--router", required=True, help="router file")
    parser.add_argument("--model", required=True, help="the model: folder, hub id or official file")
    parser.add_argument("--judge", help="folder of a classifier with its reference statistics")
    parser.add_argument("--out", required=True, help="folder for the report")
    parser.add_argument("--samples", type=int, default=500, help="samples per way")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=1234, help="seed of the compared samples")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    model = l2c.load(options.model).to(options.device)
    router = Router.load(options.router, model)
    judge = Judge(options.judge) if options.judge else None
    router.check(guidance_scale=options.guidance_scale)
    chosen = ways(model, router, options.guidance_scale)
    figures, samples = compare(
        model, chosen, judge, options.samples, options.batch_size, options.seed
    )
    out = Path(options.out)
    draw_router(router, out / "router.png")
    if model.in_channels in (1, 3):
        shown = min(12, options.samples)
        rows = {name: images[:shown] / 2 + 0.5 for name, images in samples.items()}
        draw_samples(rows, out / "samples.png")
    report = {
        "schedule": router.schedule.to_dict(),
        "guidance_scale": options.guidance_scale,
        "samples": options.samples,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "figures": figures,
        "machine": machine.described(options.device),
    }
    with replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{router.schedule}, guidance scale {options.guidance_scale}, {options.samples} samples")
    print(table(figures))
    print(f"written to {out}: router.png, samples.png, report.json")


if __name__ == "__main__":
    main()
