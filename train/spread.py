"""Where whole evaluations go before anything is learned: spread evenly, or searched for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from l2c.site import Sites

LOW, HIGH, STEP = -2.0, 2.0, 1e-3  # logits of reused and computed gates; step between two sites
UNCONDITIONAL = 0.3  # share of the calls that the second stream gets to start with


def evenly(count: int, evaluations: int) -> list[int]:
    """`count` of so many evaluations, the first among them, evenly spread."""
    return sorted({round(i * evaluations / count) for i in range(count)})


def spread(count: int, rows: int, streams: int = 1) -> list[int]:
    """`count` rows of a plan, the first of each stream among them, evenly spread.

    Of two streams the second, whose error counts less and which is predicted by its difference to
    the first, gets fewer, at some of the evaluations at which the first is computed.
    """
    if streams == 1:
        return evenly(count, rows)
    second = max(1, round(UNCONDITIONAL * count))
    first = min(count - second, rows // 2)
    conditional = evenly(first, rows // 2)
    chosen = [conditional[i] for i in evenly(min(count - first, first), first)]
    return sorted([2 * e for e in conditional] + [2 * e + 1 for e in chosen])


def fitting(budget: float, rows: int, costs: Sites, streams: int = 1) -> int:
    """How many whole rows of a plan a budget allows.

    Raises:
        ValueError: If it is less than the first evaluation.
    """
    reused = costs.rest / costs.macs
    count = int((budget - reused) / (1 - reused) * rows + 1e-6)
    if count < streams:
        least = reused + (1 - reused) * streams / rows
        raise ValueError(
            f"a budget of {budget:.3f} is below {least:.3f} of the compute, which the first of "
            f"{rows // streams} evaluations and the parts outside of all sites take; give more"
        )
    return min(count, rows)


def logits(chosen: Iterable[int], rows: int, sites: Sites, streams: int = 1) -> Tensor:
    """Logits that order gates: chosen rows first, then what a larger budget should add.

    Further rows come in the order in which each is farthest from those of its stream before it,
    later ones first where they tie, as errors grow towards the end; chosen ones are given up in the
    inverse order. Within a row the first blocks come first, which is where part of an evaluation
    does the least harm.

    Returns:
        [row, site].
    """
    first = list(range(streams))
    chosen = sorted({*chosen, *first})
    order = _filled(first, chosen, streams)
    order += _filled(order, range(rows), streams)[len(order) :]
    rank = torch.empty(rows)
    rank[torch.tensor(order)] = torch.arange(rows, dtype=torch.float32)
    high = HIGH - rank / max(1, len(chosen))
    low = LOW - (rank - len(chosen)) / max(1, rows - len(chosen))
    within = -STEP * torch.arange(len(sites)) / len(sites)
    return torch.where(rank < len(chosen), high, low)[:, None] + within[None]


def _filled(start: Iterable[int], candidates: Iterable[int], streams: int) -> list[int]:
    found = list(start)
    left = [row for row in candidates if row not in found]

    def gap(row: int) -> float:
        nearest = min(abs(row - f) for f in found if f % streams == row % streams)
        return nearest * (UNCONDITIONAL if row % streams else 1.0)

    while left:
        farthest = max(left, key=lambda row: (gap(row), row))
        found.append(farthest)
        left.remove(farthest)
    return found


def searched(
    chosen: list[int],
    rows: int,
    error: Callable[[list[int]], float],
    streams: int = 1,
    report: Callable[[str], None] = lambda _: None,
) -> list[int]:
    """Move whole rows, one at a time, as long as that lowers an error.

    A row moves by one or two evaluations, or to the other stream.

    Args:
        chosen: The rows to start from; the first of each stream stays.
        rows: Number of rows.
        error: The error of a choice; tried once for each.
        streams: Streams of the plan.
        report: Told of every improvement.
    """
    known = {tuple(chosen): error(chosen)}
    best = tuple(chosen)
    improved = True
    while improved:
        improved = False
        for index in range(len(best) - 1, streams - 1, -1):
            moved = [best[index] + move * streams for move in (1, -1, 2, -2)]
            if streams == 2:
                moved.append(best[index] ^ 1)
            for row in moved:
                if not streams <= row < rows or row in best:
                    continue
                other = tuple(sorted({*best[:index], *best[index + 1 :], row}))
                if other in known:
                    continue
                known[other] = error(list(other))
                if known[other] < known[best]:
                    best, improved = other, True
                    report(f"{list(best)}: {known[best]:.5f}")
                    break
    return list(best)
