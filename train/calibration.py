"""How much outputs change along uncached trajectories, and the plans that others make of that.

No training: SmoothCache and Block Caching measure the change once and reuse what changes least.
Each of their thresholds is found here by bisection, so that the plan keeps to a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from l2c.attach import Call, attached
from l2c.files import replacing
from l2c.plan import Plan
from l2c.reuse import Reuse
from l2c.sampling import initial_latents, sample
from l2c.schedule import Schedule
from l2c.site import Sites, sites
from train.seeding import generator

LOOKAHEAD = 3  # SmoothCache's: at most so many evaluations in a row reuse an output
BISECTIONS = 40


@dataclass(frozen=True, eq=False)
class Changes:
    """The mean relative change of every site's output over distances of 1, 2, ... evaluations.

    `relative[d - 1, t, i]` is the mean over samples of
    `|| f_i(t) - f_i(t - d) ||_1 / || f_i(t) ||_1` (Block Caching, eq. 6, for d = 1), and infinite
    where there is no evaluation `t - d`.

    Args:
        relative: [distance, evaluation, site].
        sites: The sites and their costs.

    Raises:
        ValueError: If the shape does not fit.
    """

    relative: Tensor
    sites: Sites

    def __post_init__(self) -> None:
        if self.relative.ndim != 3 or self.relative.shape[2] != len(self.sites):
            raise ValueError(
                f"expected changes [distance, evaluation, site] of {len(self.sites)} sites, got "
                f"shape {tuple(self.relative.shape)}"
            )

    @property
    def lookahead(self) -> int:
        """The largest distance."""
        return self.relative.shape[0]

    @property
    def evaluations(self) -> int:
        """Number of evaluations."""
        return self.relative.shape[1]

    def save(self, path: str | Path, **about: str) -> None:
        """Write the changes, with what they are of as metadata."""
        with replacing(path) as temporary:
            save_file({"relative": self.relative}, temporary, about)

    @classmethod
    def load(cls, path: str | Path, sites: Sites) -> Changes:
        """Read what `save` wrote."""
        return cls(load_file(path)["relative"], sites)


def measure(
    model: Any,
    schedule: Schedule,
    guidance_scale: float = 1.5,
    *,
    lookahead: int = LOOKAHEAD,
    samples: int = 64,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Changes:
    """Measure the changes along uncached trajectories from noise, with guidance.

    Args:
        model: The backbone.
        schedule: The schedule.
        guidance_scale: Of both predictions the change is counted.
        lookahead: The largest distance; the outputs of so many evaluations are kept.
        samples: Trajectories; Block Caching takes 64, SmoothCache 10.
        batch_size: Trajectories at a time.
        seed: Seed of their noise.
        progress: Show a progress bar.

    Raises:
        ValueError: If a number is below 1.
    """
    if min(lookahead, samples, batch_size) < 1:
        raise ValueError(
            "expected lookahead, samples and batch_size of at least 1, "
            f"got {lookahead}, {samples} and {batch_size}"
        )
    here = sites(model)
    lookahead = min(lookahead, max(1, len(schedule) - 1))
    sums = torch.zeros(lookahead, len(schedule), len(here), dtype=torch.float64)
    count = 0
    starts = range(0, samples, batch_size)
    total = len(starts) * len(schedule)
    with tqdm(
        total=total, desc="Calibrating", unit="evaluation", disable=not progress, leave=False
    ) as bar:
        for start in starts:
            draws = [
                generator("calibrate", seed, i)
                for i in range(start, min(start + batch_size, samples))
            ]
            noise = initial_latents(model, len(draws), draws)
            labels = torch.arange(start, start + len(draws)) % max(1, model.num_classes)
            with _recorded(model, sums) as calls:
                sample(
                    model,
                    schedule,
                    labels,
                    guidance_scale,
                    latents=noise,
                    callback=lambda *_: bar.update(),
                )
            count += calls[0]
    relative = (sums / count).float()
    for distance in range(1, lookahead + 1):
        relative[distance - 1, :distance] = torch.inf
    return Changes(relative, here)


@contextmanager
def _recorded(model: Any, sums: Tensor) -> Iterator[list[int]]:
    """Add the relative changes of every call to `sums`; yields the samples in a call."""
    kept: dict[int, list[Tensor]] = {}
    row, rows_of_call = 0, [0]

    def wrap_forward(forward: Call) -> Call:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            nonlocal row
            out = forward(*args, **kwargs)
            rows_of_call[0] = len(out)
            row += 1
            return out

        return evaluate

    def wrap_site(index: int, call: Call) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            now = out.flatten(1).float()
            size = now.abs().sum(1)
            history = kept.setdefault(index, [])
            for distance, before in enumerate(history):
                change = (now - before).abs().sum(1) / size
                sums[distance, row, index] += change.double().sum().cpu()
            kept[index] = [now, *history][: len(sums)]
            return out

        return run

    with attached(model, wrap_site, wrap_forward):
        yield rows_of_call


def smoothcache(changes: Changes, budget: float, lookahead: int = LOOKAHEAD) -> Plan:
    """The plan of SmoothCache to a budget, by bisection of its threshold.

    Args:
        changes: What was measured.
        budget: Share of the compute that the plan keeps to.
        lookahead: The most evaluations in a row that reuse.

    Raises:
        ValueError: If no threshold is within the budget, or the lookahead is beyond what was
            measured.
    """
    return _within(
        lambda threshold: smoothcache_at(changes, threshold, lookahead),
        budget,
        f"SmoothCache with lookahead {lookahead}",
    )


def smoothcache_at(changes: Changes, threshold: float, lookahead: int = LOOKAHEAD) -> Plan:
    """SmoothCache (Liu et al. 2024): per type of layer, skip as far as the error stays small.

    The change is averaged over all blocks of a type. From a computed evaluation t the longest
    distance d up to `lookahead` whose change from t to t + d is at most the threshold is skipped:
    t + 1 to t + d reuse, t + d + 1 is computed next. The first evaluation and the last compute.

    Args:
        changes: What was measured.
        threshold: The paper's alpha.
        lookahead: The most evaluations in a row that reuse.

    Raises:
        ValueError: If the changes were measured over shorter distances.
    """
    if not 1 <= lookahead <= changes.lookahead:
        raise ValueError(
            f"expected a lookahead from 1 to {changes.lookahead}, over which the changes were "
            f"measured, got {lookahead}"
        )
    kinds = [site.name.rpartition(".")[2] for site in changes.sites]
    columns = {}
    for kind in dict.fromkeys(kinds):
        mean = changes.relative[:, :, [k == kind for k in kinds]].mean(2)
        columns[kind] = _skipping(mean, threshold, lookahead)
    return Plan.of(torch.stack([columns[kind] for kind in kinds], 1), changes.sites)


def _skipping(change: Tensor, threshold: float, lookahead: int) -> Tensor:
    """Which evaluations compute, [evaluation], by the changes [distance, evaluation]."""
    count = change.shape[1]
    compute = torch.ones(count, dtype=torch.bool)
    row = 0
    while row < count:
        distances = range(min(lookahead, count - 1 - row), 0, -1)
        skipped = next((d for d in distances if change[d - 1, row + d] <= threshold), 0)
        compute[row + 1 : row + skipped + 1] = False
        row += skipped + 1
    compute[-1] = True
    return compute


def block_caching(changes: Changes, budget: float) -> Plan:
    """The plan of Block Caching to a budget, by bisection of its delta.

    Args:
        changes: What was measured.
        budget: Share of the compute that the plan keeps to.

    Raises:
        ValueError: If no delta is within the budget.
    """
    return _within(lambda delta: block_caching_at(changes, delta), budget, "Block Caching")


def block_caching_at(changes: Changes, delta: float) -> Plan:
    """Block Caching (Wimbauer et al., CVPR 2024, eq. 7): compute when the change has added up.

    What was computed at t_a is reused until `sum_t L1rel(t)`, over the evaluations t after t_a,
    exceeds delta; there it is computed anew. Each residual branch, a site, has a schedule of its
    own, as each block with its residual has in the paper.

    Args:
        changes: What was measured.
        delta: The threshold.
    """
    rows = [[True] * len(changes.sites)]
    sums = [0.0] * len(changes.sites)
    for row in changes.relative[0, 1:].tolist():
        sums = [total + change for total, change in zip(sums, row, strict=True)]
        rows.append([total > delta for total in sums])
        sums = [0.0 if total > delta else total for total in sums]
    return Plan.of(rows, changes.sites)


def per_step(changes: Changes, count: int, reuse: Reuse | None = None) -> Plan:
    """Whole evaluations, chosen so that about equally much changes between two of them.

    Computed is where the accumulated change, the mean over the sites, passes the next of `count`
    equal parts of its total.

    Args:
        changes: What was measured.
        count: How many evaluations compute.
        reuse: How reused outputs are formed.

    Raises:
        ValueError: If there are not so many evaluations.
    """
    evaluations = changes.evaluations
    if not 1 <= count <= evaluations:
        raise ValueError(f"expected from 1 to {evaluations} evaluations to compute, got {count}")
    change = changes.relative[0].mean(1)
    change[0] = 0.0
    passed = (change.double().cumsum(0) / change.double().sum().clamp_min(1e-30)).tolist()
    chosen: list[int] = []
    for part in range(count):
        first = chosen[-1] + 1 if chosen else 0
        last = evaluations - count + part  # the others need a place too
        row = next((r for r in range(first, last) if passed[r] >= part / count), last)
        chosen.append(row)
    return Plan.rows(chosen, evaluations, changes.sites, reuse)


def _within(plan: Callable[[float], Plan], budget: float, name: str) -> Plan:
    """The plan of the largest share within a budget, by bisection of a threshold."""
    if not 0 < budget <= 1:
        raise ValueError(f"expected a budget in (0, 1], got {budget}")
    low, high = 0.0, 1.0
    while plan(high).share > budget:
        low, high = high, 2 * high
        if high > 2.0**60:
            raise ValueError(
                f"{name} computes {plan(torch.inf).share:.3f} of the multiply-accumulates at "
                f"least, got a budget of {budget:.3f}; give more, or a larger lookahead"
            )
    best = plan(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = plan(middle)
        if found.share <= budget:
            high = middle
            best = max(best, found, key=lambda p: p.share)
        else:
            low = middle
    return best
