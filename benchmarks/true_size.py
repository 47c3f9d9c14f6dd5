"""Routers of published models at true size, with random weights: predicted and measured speed-up.

`python -m benchmarks.true_size ROUTER... [--device cuda]`, where the routers come from
`l2c convert` (or from training). For each, the model of its configuration draws one image with
guidance, by the router's plan and without it. The two runs advance together, an evaluation of the
one after an evaluation of the other in changing order, so that whatever else the machine does falls
on both. Routers that are not named keep the rows of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import l2c
from benchmarks import results
from l2c.loading import BACKBONES
from l2c.sampling import guide, initial_latents
from l2c.solvers import solver
from train.seeding import generator


def built(router: l2c.Router) -> Any:
    """The router's model with random weights; none is zero, so that no arithmetic is trivial."""
    model = BACKBONES[router.identity.backbone](**router.identity.config)
    g = generator("true size")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=g)
    return model.eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """Another module with the same tensors, to be run by a plan while the first is not."""
    with torch.device("meta"):
        other = type(model)(**model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


class Run:
    """One image being drawn, evaluation by evaluation."""

    def __init__(self, model: Any, router: l2c.Router, guidance_scale: float) -> None:
        self.model = model
        self.scale = guidance_scale
        device = next(model.parameters()).device
        noise = initial_latents(model, 1, generator("true size", 1)).to(device)
        self.steps = solver(router.schedule, noise)
        self.at = next(self.steps)
        self.labels = torch.tensor([0, model.null_label], device=device)
        self.seconds: list[float] = []

    @torch.no_grad()
    def advance(self) -> None:
        """Evaluate once, and time it."""
        x, t = self.at
        times = torch.full((2,), t, device=x.device)
        start = time.perf_counter()
        out = self.model(torch.cat([x, x]), times, self.labels)[:, : x.shape[1]]
        if x.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        try:
            self.at = self.steps.send(guide(out.float(), self.scale))
        except StopIteration as finished:
            assert bool(finished.value.isfinite().all())


def measure(router: l2c.Router, device: str, guidance_scale: float) -> dict[str, Any]:
    """Draw one image both ways."""
    model = built(router).to(device)
    plan = router.plan()
    fast = twin(model)
    plain = Run(model, router, guidance_scale)
    with l2c.cached(fast, plan), torch.no_grad():
        cached = Run(fast, router, guidance_scale)
        model(*(value.to(device) for value in model.example_inputs()))  # warm up
        for row in tqdm(range(len(plan)), desc=str(router.schedule), unit="pair"):
            for run in (plain, cached) if row % 2 else (cached, plain):
                run.advance()
    full = statistics.median(plain.seconds)
    speedup = sum(plain.seconds) / sum(cached.seconds)
    reused = [s for s, row in zip(cached.seconds, plan.compute, strict=True) if not any(row)]
    return {
        "backbone": router.identity.backbone,
        "solver": router.schedule.solver,
        "evaluations": len(plan),
        "guidance_scale": guidance_scale,
        "share": plan.share,
        "predicted_speedup": plan.speedup,
        "measured_speedup": speedup,
        "measured_over_predicted": speedup / plan.speedup,
        "seconds_full_evaluation": full,
        "all_reused_over_full": statistics.median(reused) / full if reused else None,
        "macs_per_image": len(plan) * router.sites.macs,
    }


def main() -> None:
    """Measure the given routers."""
    parser = argparse.ArgumentParser("python -m benchmarks.true_size", description=__doc__)
    parser.add_argument("routers", nargs="+", type=Path, help="router files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    options = parser.parse_args()
    rows = []
    for path in options.routers:
        router = l2c.Router.load(path)
        row = measure(router, options.device, options.guidance_scale)
        rows.append({"router": path.stem, **row})
        print(
            f"{path.stem}: {row['share']:.1%} of the compute, predicted "
            f"{row['predicted_speedup']:.3f}x, measured {row['measured_speedup']:.3f}x, "
            f"{row['measured_over_predicted']:.1%} of predicted"
        )
    path = results.path_of("true_size", options.device)
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    measured = {row["router"] for row in rows}
    rows = [row for row in before if row["router"] not in measured] + rows
    results.write("true_size", options.device, 0, rows=sorted(rows, key=lambda r: r["router"]))


if __name__ == "__main__":
    main()
