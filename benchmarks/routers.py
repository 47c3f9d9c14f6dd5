"""The shipped routers beside what costs as much: `python -m benchmarks.routers`.

Each router is compared, on the same noise, with fewer DDIM steps, with DPM-Solver++ (diffusers'
multistep solver of order 2, spaced evenly in log-SNR) at as many evaluations, and with reusing
whole evaluations, spread evenly.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import l2c
from benchmarks import results
from l2c.sampling import guide
from train.quality import Judge
from train.report import Way, compare, equal_cost, table, ways

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


def spread(share: float, evaluations: int, sites: l2c.Sites) -> l2c.Plan:
    """Reuse whole evaluations, spread evenly, so that the cost comes nearest to a share."""
    rest = sites.rest / sites.macs
    reused = min(evaluations - 1, round(evaluations * (1 - share) / (1 - rest)))
    rows = {evaluations - 1 - (i * evaluations) // reused for i in range(reused)}
    return l2c.Plan(tuple((row not in rows,) * len(sites) for row in range(evaluations)), sites)


def dpm_solver(model: Any, full: l2c.Schedule, evaluations: int, guidance_scale: float) -> Way:
    """Sampling by diffusers' DPM-Solver++ 2M without caching."""
    noise = full.noise
    from diffusers import DPMSolverMultistepScheduler

    def draw(labels: Tensor, latents: Tensor) -> Tensor:
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=noise.timesteps,
            beta_start=noise.start,
            beta_end=noise.end,
            beta_schedule=noise.betas,
            use_lu_lambdas=True,
        )
        scheduler.set_timesteps(evaluations)
        both = torch.cat([labels, torch.full_like(labels, model.null_label)])
        x = latents
        with torch.no_grad():
            for t in scheduler.timesteps:
                out = model(torch.cat([x, x]), t.expand(len(both)), both)[:, : x.shape[1]]
                x = scheduler.step(guide(out, guidance_scale), t, x).prev_sample
        return x

    return Way(evaluations / len(full), evaluations, draw)


def main() -> None:
    """Measure the shipped routers."""
    parser = argparse.ArgumentParser("python -m benchmarks.routers", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    options = parser.parse_args()
    model = l2c.load(CHECKPOINTS / "fashion_mnist_dit").to(options.device)
    judge = Judge(CHECKPOINTS / "fashion_mnist_classifier")
    figures = {}
    for path in sorted(CHECKPOINTS.glob("fashion_mnist_dit_*.safetensors")):
        router = l2c.Router.load(path, model)
        schedule = router.schedule
        plan, steps = spread(router.plan().share, len(schedule), router.sites), equal_cost(router)
        chosen = ways(model, router, options.guidance_scale)

        def draw(labels: Tensor, noise: Tensor, s: Any = schedule, p: Any = plan) -> Tensor:
            return l2c.sample(model, s, labels, options.guidance_scale, plan=p, latents=noise)

        chosen["uniform reuse"] = Way(plan.share, len(schedule), draw)
        chosen[f"DPM-Solver++ {len(steps)}"] = dpm_solver(
            model, schedule, len(steps), options.guidance_scale
        )
        measured, _ = compare(model, chosen, judge, options.samples, options.batch_size, 1234)
        figures[path.stem] = measured
        print(path.stem, table(measured), sep="\n", end="\n\n")
    results.write(
        "routers",
        options.device,
        1234,
        samples=options.samples,
        batch=options.batch_size,
        guidance_scale=options.guidance_scale,
        routers=figures,
    )


if __name__ == "__main__":
    main()
