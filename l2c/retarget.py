"""A router for another schedule of the same noise, made from a trained one without training.

Evaluations are matched by their place in the run: the log-SNR of the latents, or the timestep of a
rectified flow. Around each place a site is computed every so many evaluations; the new router
computes it as often, counted in its own evaluations, and starts counting where the old one does.
So a plan keeps its ages and its share of the compute, what was spread evenly stays so, and what
was computed as a whole stays whole.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from l2c.noise import Noise
from l2c.plan import Plan
from l2c.router import Router
from l2c.schedule import Schedule
from l2c.site import Sites

# What provenance tells of samples by the old schedule.
MEASURED = (
    "measured",
    "predicted",
    "soft_error",
    "hard_error",
    "measured_error",
    "predicted_error",
)
ROUNDING = 1e-9  # of rates that were added up


def retarget(router: Router, schedule: Schedule) -> Router:
    """The router for another number of evaluations, or another solver.

    Scores, corrections and shift are interpolated linearly between the nearest evaluations before
    and after that treat the site alike, computing or reusing it. Corrections are relative to an
    extrapolation over distances, so they need no scaling. A router with a threshold gets the share
    of its plan as its budget; a budget is raised where what always computes, or forming what is
    reused, takes more than before. Evaluations that always computed are spread like computations,
    and those that were never trained count as such.

    Args:
        router: The router.
        schedule: A schedule of the same noise.

    Raises:
        ValueError: If the schedule is for another noise, one of the two has fewer than 2
            evaluations, or timesteps that do not fall.
    """
    check(router.schedule, schedule)
    plan = router.plan()
    old = _Run(router.schedule, router.streams, len(router.sites))
    new = _Run(schedule, router.streams, len(router.sites))
    decided = old.folded(router.gated & (router.updates != 0))
    before = torch.tensor(plan.compute)
    table = old.folded(_whole(before))
    always = _always(old, new, decided)
    compute = _computed(router.sites, old, new, old.folded(before), table, always)

    between = _Between(old, new, decided, always, table, compute)
    scores = old.folded(router.scores)
    opened, closed = scores[table & decided], scores[~table]
    least = float(opened.min()) if len(opened) else 1.0
    most = float(closed.max()) if len(closed) else 0.0
    moved = between(scores).clamp(0, 1)
    limited = torch.where(compute, moved.clamp(min=least), moved.clamp(max=most))

    def carried(learned: Tensor | None) -> Tensor | None:
        return None if learned is None else new.unfolded(between(old.folded(learned)))

    reuse = dataclasses.replace(
        router.reuse,
        corrections=carried(router.reuse.corrections),
        shift=carried(router.reuse.shift),
    )
    rows = new.unfolded(compute)
    needed = Plan.of(rows, router.sites, reuse, router.streams).share
    budget = plan.share if router.budget is None else router.budget
    return dataclasses.replace(
        router,
        scores=new.unfolded(torch.where(always, moved, limited)),
        gated=~new.unfolded(always)[:, 0],
        updates=new.unfolded(_updates(old, new, decided, always, router.updates))[:, 0],
        schedule=schedule,
        reuse=reuse,
        budget=max(budget, needed),
        provenance=_provenance(router),
    )


def _provenance(router: Router) -> dict[str, Any]:
    kept = {key: value for key, value in router.provenance.items() if key not in MEASURED}
    origin = {"from": router.schedule.to_dict(), "earlier": kept.get("retargeted")}
    kept["retargeted"] = {key: value for key, value in origin.items() if value is not None}
    return kept


def check(old: Schedule, new: Schedule) -> None:
    """Raise a ValueError if a router for one schedule can't be made one for the other."""
    if old.noise != new.noise:
        raise ValueError(
            f"expected a schedule of the router's noise {old.noise}, got one of {new.noise}; give "
            "noise=router.schedule.noise where the schedule is made"
        )
    for whose, schedule in (("the router's", old), ("the new", new)):
        if len(schedule) < 2:
            raise ValueError(
                f"expected at least 2 evaluations, as one has nothing to reuse, got {len(schedule)}"
                f" in {whose} schedule; take more"
            )
        for before, after in pairwise(schedule.timesteps):
            if after >= before:
                raise ValueError(
                    f"expected falling timesteps, got {before} and then {after} in {whose} "
                    "schedule; its evaluations have no place in another run, train a router for it"
                )


class _Run:
    """The evaluations of a schedule, and tables about them, a column per call of a site.

    A router of two streams has a row for each stream of an evaluation in turn; here they are
    columns [evaluation, stream x site, ...], as each has a history of its own.
    """

    def __init__(self, schedule: Schedule, streams: int, sites: int) -> None:
        self.streams = streams
        self.sites = sites
        self.first = schedule.evaluations_per_step - 1  # the first step's last evaluation
        noise, ids = schedule.noise, schedule.timesteps
        growing = [noise.half_log_snr(t) if isinstance(noise, Noise) else -t for t in ids]
        self.places = torch.tensor(growing, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.places)

    def folded(self, rows: Tensor) -> Tensor:
        """From a router's [row, site, ...], or [row] for all of its sites."""
        if rows.ndim == 1:
            rows = rows[:, None].expand(-1, self.sites)
        return rows.cpu().reshape(len(self), self.streams * self.sites, *rows.shape[2:])

    def unfolded(self, table: Tensor) -> Tensor:
        """The inverse of `folded`."""
        return table.reshape(len(self) * self.streams, self.sites, *table.shape[2:])

    def nearest(self, other: _Run) -> Tensor:
        """The nearest of these evaluations to each of another run, [evaluation]."""
        return (other.places[:, None] - self.places).abs().argmin(1)


def _whole(rows: Tensor) -> Tensor:
    """Without what is left of a budget after whole evaluations, if all but one are whole."""
    partial = rows.any(1) & ~rows.all(1)
    return rows & ~partial[:, None] if int(partial.sum()) == 1 else rows


def _always(old: _Run, new: _Run, decided: Tensor) -> Tensor:
    """What always computes: the first step, and as much as before; [evaluation, column]."""
    first = torch.zeros(len(new), decided.shape[1], dtype=torch.bool)
    first[: new.first + 1] = True
    spread = _spread(_rates(~decided, old.first)[old.nearest(new)], first, new.first)
    return first | (spread & ~decided[old.first + 1 :].all(0))


def _computed(
    sites: Sites, old: _Run, new: _Run, compute: Tensor, table: Tensor, always: Tensor
) -> Tensor:
    """What is computed in the new run to keep to the old share, [evaluation, column].

    The cost of forming what is reused is left out: it must not move whole evaluations.
    """
    rates = _rates(table, old.first)
    here = rates[old.nearest(new)]

    def share(run: _Run, chosen: Tensor) -> float:
        return Plan.of(run.unfolded(chosen), sites, streams=run.streams).share

    kept = share(old, compute)

    def spread(factor: float) -> Tensor:
        return _spread((here * factor).clamp(max=1), always, new.first)

    def room(now: Tensor) -> float:
        return kept - share(new, now)

    found = spread(1.0)
    if 0 <= room(found) < 1 / len(new):
        return found
    low, high = 0.0, 1 / float(rates.min())
    found = spread(low)
    for _ in range(30):
        middle = (low + high) / 2
        tried = spread(middle)
        if room(tried) >= 0:
            low, found = middle, tried
        else:
            high = middle
    return found


def _rates(table: Tensor, first: int) -> Tensor:
    """Computations per evaluation around each, [evaluation, column]: 1 over their distance.

    Args:
        table: What is computed, [evaluation, column].
        first: The last evaluation of the first step, from which computations are counted.
    """
    rates = torch.zeros(table.shape, dtype=torch.float64)
    for index, column in enumerate(table.T.tolist()):
        rows = [row for row in range(first, len(column)) if column[row] or row == first]
        distance = 0
        for start, end in pairwise([*rows, len(column)]):
            cut = end == len(column)  # the run ended before the next one was due
            distance = max(end - start, distance) if cut else end - start
            rates[start:end, index] = 1 / distance
    rates[:first] = rates[first]
    return rates


def _spread(rates: Tensor, always: Tensor, first: int) -> Tensor:
    """Compute where the rates have added up to the next whole number, [evaluation, column].

    Args:
        rates: Computations per evaluation, at most 1, [evaluation, column].
        always: What computes anyway, [evaluation, column].
        first: The last evaluation of the first step, from which computations are counted.
    """
    compute = torch.ones(rates.shape, dtype=torch.bool)
    due = torch.ones(rates.shape[1], dtype=torch.float64)
    for row in range(first, len(rates)):
        compute[row] = (due >= 1 - ROUNDING) | always[row]
        due = due - compute[row].double() + rates[row]
    return compute


class _Between:
    """Interpolates what belongs to an evaluation and a site, among those with the same decision."""

    def __init__(
        self,
        old: _Run,
        new: _Run,
        decided: Tensor,
        always: Tensor,
        table: Tensor,
        compute: Tensor,
    ) -> None:
        nearest = torch.nn.functional.one_hot(old.nearest(new), len(old)).double()
        self.weights = nearest.repeat(table.shape[1], 1, 1)  # [column, new evaluation, old one]
        for column, weights in enumerate(self.weights):
            counts, was = decided[:, column], table[:, column]
            free, now = ~always[:, column], compute[:, column]
            for before, after in ((was, now), (~was, ~now)):
                known, rows = counts & before, free & after
                if bool(rows.any()) and bool(counts.any()):
                    known = known if bool(known.any()) else counts
                    weights[rows] = _linear(old.places, new.places[rows], known)

    def __call__(self, values: Tensor) -> Tensor:
        """From [old evaluation, column, ...] to [new evaluation, column, ...]."""
        moved = torch.einsum("cno,oc...->nc...", self.weights, values.double())
        return moved.to(values.dtype)


def _linear(old: Tensor, new: Tensor, known: Tensor) -> Tensor:
    """Weights [new, old] of linear interpolation between the known old places; constant beyond."""
    rows = known.nonzero().flatten()
    right = torch.searchsorted(old[rows], new).clamp(max=len(rows) - 1)
    left = (right - 1).clamp(min=0)
    before, after = old[rows][left], old[rows][right]
    share = torch.where(after > before, (new - before) / (after - before), 1.0).clamp(0, 1)
    weights = torch.zeros(len(new), len(old), dtype=torch.float64)
    weights.scatter_add_(1, rows[left][:, None], 1 - share[:, None])
    return weights.scatter_add_(1, rows[right][:, None], share[:, None])


def _updates(old: _Run, new: _Run, decided: Tensor, always: Tensor, updates: Tensor) -> Tensor:
    """Those of the nearest evaluation that was decided about; none for what always computes."""
    distances = (new.places[:, None, None] - old.places[:, None]).abs()
    nearest = distances.masked_fill(~decided, torch.inf).argmin(1)  # [new evaluation, column]
    return old.folded(updates).gather(0, nearest).masked_fill(always, 0)
