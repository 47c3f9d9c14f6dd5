"""What a plan costs beside its computed sub-layers: measured time over the share of the compute.

`python -m benchmarks.executor [--device cuda] [--quick]`. All ways run in turn in one process, and
each figure is a median over rounds. Rules with learned parts have random small ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import l2c
from benchmarks import results, tables
from benchmarks.routers import CHECKPOINTS
from l2c.conditioning import prepared
from l2c.reuse import Reuse
from l2c.sampling import initial_latents
from train.seeding import generator

SHIPPED = ("fashion_mnist_dit", "fashion_mnist_uvit")
LARGE = "DiT-XL/2"
SCALE = 1.5
COMPUTED = 3  # evaluations before those that reuse all: as many as a rule of order 2 reads

Ways = Mapping[str, Callable[[], list[float]]]


def rules(rows: int, sites: l2c.Sites) -> dict[str, Reuse]:
    """A copy, an extrapolation, and one with learned corrections and shift."""
    g = generator("executor", rows)
    width = sites[0].channels
    corrections = 0.01 * torch.randn(rows, len(sites), 3, width, generator=g)
    shift = 0.01 * torch.randn(rows, len(sites), width, generator=g)
    return {
        "copy": Reuse(),
        "newton-2": Reuse("newton", 2),
        "learned": Reuse("newton", 2, corrections, shift),
    }


def plans(rows: int, sites: l2c.Sites) -> dict[str, l2c.Plan]:
    """Whole evaluations reused, and a quarter computed here and there, as routers learn it."""
    found = rules(rows, sites)
    named = {
        f"every {interval}, {name}": l2c.Plan.every(interval, rows, sites, found[name])
        for interval, name in ((2, "newton-2"), (3, "newton-2"), (4, "learned"))
    }
    table = torch.rand(rows, len(sites), generator=generator("executor", "sites")) < 0.2
    table[0] = True
    return {**named, "scattered, learned": l2c.Plan.of(table, sites, found["learned"])}


def in_turn(ways: Ways, rounds: int, name: str) -> dict[str, list[list[float]]]:
    """The seconds that each way gives, by round; the order of the ways changes."""
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for turn in tqdm(range(rounds), desc=name, leave=False):
        for way in list(ways) if turn % 2 else reversed(list(ways)):
            found[way].append(ways[way]())
    return found


def evaluations(model: Any, plan: l2c.Plan, images: int, runs: bool = True) -> list[float]:
    """Seconds of each evaluation of a plan with guidance, its conditioning computed before."""
    device = next(model.parameters()).device
    x = initial_latents(model, 2 * images, generator("executor", images)).to(device)
    labels = torch.arange(2 * images, device=device) % model.num_classes
    times = [900.0 - 10 * row for row in range(len(plan))]
    seconds = []
    with (
        torch.no_grad(),
        prepared(model, times, [labels]),
        l2c.cached(model, plan, runs=runs),
    ):
        for t in times:
            now = torch.full((len(x),), t, device=device)
            seconds.append(timed(lambda now=now: model(x, now, labels), device))
    return seconds


def clock(device: torch.device) -> str:
    """On one thread of a CPU its own time, which others on a busy machine take nothing from."""
    return "process" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call."""
    now = time.process_time if clock(device) == "process" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def reused(name: str, model: Any, images: int, rounds: int) -> list[dict[str, Any]]:
    """An evaluation that reuses everything, in shares of one that computes everything."""
    sites = l2c.sites(model)
    rows = COMPUTED + 3
    named = {
        rule: l2c.Plan.rows(range(COMPUTED), rows, sites, reuse)
        for rule, reuse in rules(rows, sites).items()
    }
    ways: dict[str, Callable[[], list[float]]] = {}
    for rule, plan in named.items():
        for runs in (True, False):
            ways[f"{rule} {runs}"] = lambda plan=plan, runs=runs: evaluations(
                model, plan, images, runs
            )
    found = in_turn(ways, rounds, f"{name}, batch {images}")

    def share(rule: str, runs: bool) -> float:
        ratios = [
            statistics.median(s[COMPUTED:]) / statistics.median(s[1:COMPUTED])
            for s in found[f"{rule} {runs}"]
        ]
        return statistics.median(ratios)

    return [
        {
            "model": name,
            "batch": images,
            "rule": rule,
            "share": plan.shares[-1],
            "reused_over_full": share(rule, True),
            "one_by_one_over_full": share(rule, False),
        }
        for rule, plan in named.items()
    ]


def sampled(name: str, model: Any, images: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Whole samplings by a plan over those without one."""
    schedule = l2c.Schedule.ddim(rows, noise=model.noise)
    sites, device = l2c.sites(model), next(model.parameters()).device
    noise: Tensor = initial_latents(model, images, generator("executor", "noise", images))
    labels = torch.arange(images) % model.num_classes
    named = {"all computed": l2c.Plan.full(rows, sites), **plans(rows, sites)}

    def way(plan: l2c.Plan | None) -> Callable[[], list[float]]:
        def run() -> None:
            l2c.sample(model, schedule, labels, SCALE, plan=plan, latents=noise)

        return lambda: [timed(run, device)]

    ways = {"uncached": way(None), **{key: way(plan) for key, plan in named.items()}}
    in_turn(ways, 1, "warm up")
    found = in_turn(ways, rounds, f"{name}, batch {images}")
    measured = []
    for key, plan in named.items():
        ratios = [s / full for (s,), (full,) in zip(found[key], found["uncached"], strict=True)]
        ratio = statistics.median(ratios)
        measured.append(
            {
                "model": name,
                "batch": images,
                "plan": key,
                "evaluations": rows,
                "share": plan.share,
                "measured": ratio,
                "efficiency": plan.share / ratio,
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        )
    return measured


def large(device: str) -> Any:
    """A DiT-XL/2 at random weights, none of them zero."""
    with torch.device("meta"):
        model = l2c.DiT.named(LARGE)
    model = model.to_empty(device=device)
    g = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=g)
    return model.eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser("python -m benchmarks.executor", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="per figure of the small models")
    parser.add_argument("--large-rounds", type=int, default=1, help=f"{LARGE}; 0 leaves it out")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a minute's look, and no large model")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.large_rounds, options.batch_sizes = 1, 0, [1]
        options.evaluations = 8
    alone, whole = [], []
    for name in SHIPPED:
        model = l2c.load(CHECKPOINTS / name).to(options.device)
        for images in options.batch_sizes:
            alone += reused(name, model, images, options.rounds)
            whole += sampled(name, model, images, options.evaluations, options.rounds)
    if options.large_rounds:
        model = large(options.device)
        for images in (1, 2):
            alone += reused(LARGE, model, images, options.large_rounds)
    path = results.write(
        "executor",
        options.device,
        0,
        reused=alone,
        sampled=whole,
        guidance_scale=SCALE,
        clock=clock(torch.device(options.device)),
        rounds=options.rounds,
        large_rounds=options.large_rounds,
    )
    print(tables.executor(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
