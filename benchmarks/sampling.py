"""Sampling with a router against none: measured speed-up over the one that the MACs predict.

`python -m benchmarks.sampling [--device cuda]`. Both ways run in turn in one process, and each
figure is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from tqdm.auto import tqdm

import l2c
from benchmarks import results
from benchmarks.routers import CHECKPOINTS, SHIPPED
from l2c.sampling import initial_latents
from train.seeding import generator


def main() -> None:
    """Measure the shipped routers."""
    parser = argparse.ArgumentParser("python -m benchmarks.sampling", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=9, help="pairs of runs per figure")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args()
    rows = []
    for name, teacher in SHIPPED.items():
        model = l2c.load(CHECKPOINTS / teacher).to(options.device)
        router = l2c.Router.load(CHECKPOINTS / f"{name}.safetensors", model)
        for batch in options.batch_sizes:
            ratios = measure(model, router, batch, options.runs)
            plan = router.plan()
            speedup = statistics.median(ratios)
            rows.append(
                {
                    "router": name,
                    "batch": batch,
                    "guidance_scale": 1.5,
                    "share": plan.share,
                    "predicted_speedup": plan.speedup,
                    "measured_speedup": speedup,
                    "measured_over_predicted": speedup / plan.speedup,
                    "lowest": min(ratios),
                    "highest": max(ratios),
                    "runs": options.runs,
                }
            )
            print(
                f"{name} batch {batch:3d}: predicted {plan.speedup:.3f}x, measured "
                f"{speedup:.3f}x ({min(ratios):.3f} to {max(ratios):.3f}), "
                f"{speedup / plan.speedup:.1%} of predicted"
            )
    results.write("sampling", options.device, 0, rows=rows)


def measure(model: Any, router: l2c.Router, batch: int, runs: int) -> list[float]:
    """Ratios of the time without a router to the time with it, of neighbouring runs."""
    labels = torch.arange(batch) % model.num_classes
    noise = initial_latents(model, batch, generator("sampling benchmark"))
    plan = router.plan()

    def seconds(way: l2c.Plan | None) -> float:
        start = time.perf_counter()
        l2c.sample(model, router.schedule, labels, 1.5, plan=way, latents=noise)
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(None), seconds(plan)  # warm up
    rounds = tqdm(range(runs), desc=f"batch {batch}", leave=False)
    ratios = []
    for turn in rounds:  # who goes first changes, as whoever does may pay for the other
        if turn % 2:
            ratios.append(seconds(None) / seconds(plan))
        else:
            ratios.append(1 / (seconds(plan) / seconds(None)))
    return ratios


if __name__ == "__main__":
    main()
