"""Pictures: routers as heat maps, samples in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l2c.files import replacing
from l2c.router import Router

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def router_figure(router: Router) -> Figure:
    """A heat map, evaluations downwards, with each evaluation's compute beside it.

    It shows the scores, of a router with a budget, whose scores are only an order, how old the
    newest output is that a reused one is formed from. Sites are grouped by kind (all attention,
    then all MLP), in the order of the blocks. Evaluations that the router does not decide about are
    hatched; where it decides about the two predictions of guidance separately, each evaluation has
    a row for the conditional and one for the unconditional below it.
    """
    from matplotlib.figure import Figure

    kinds = [site.name.rpartition(".")[2] for site in router.sites]
    order = sorted(range(len(kinds)), key=lambda i: (kinds.index(kinds[i]), i))
    plan = router.plan()
    if router.budget is None:
        shown, highest, colours = router.scores[:, order].clone(), 1.0, "viridis"
        label = f"score (computed above {router.threshold:g})"
    else:
        shown = torch.tensor(plan.ages, dtype=torch.float32)[:, order]
        highest, colours = max(1.0, float(shown.max())), "viridis_r"
        label = "evaluations since it was computed"
    shown[~router.gated] = torch.nan
    rows, columns = shown.shape

    height = min(12.0, 1.8 + 0.22 * rows)
    figure = Figure(figsize=(min(14.0, 4.5 + 0.13 * columns), height), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    heat.set_facecolor("0.93")
    image = heat.imshow(shown.numpy(), aspect="auto", vmin=0, vmax=highest, cmap=colours)
    for row in (~router.gated).nonzero().flatten().tolist():
        heat.axhspan(row - 0.5, row + 0.5, facecolor="0.93", edgecolor="0.8", hatch="////", lw=0)
    starts = [i for i, k in enumerate(order) if i == 0 or kinds[k] != kinds[order[i - 1]]]
    ends = [*starts[1:], columns]
    every = max(1, columns // 20)
    ticks = [i for start, end in zip(starts, ends, strict=True) for i in range(start, end, every)]
    heat.set_xticks(ticks, [str(i - max(s for s in starts if s <= i)) for i in ticks], fontsize=8)
    heat.set_xlabel("block, in calling order")
    heat.set_ylabel("evaluation (first: most noise)")
    heat.yaxis.get_major_locator().set_params(integer=True)
    if router.streams > 1:
        step = max(1, len(plan) // 10)
        heat.set_yticks(
            [router.streams * e for e in range(0, len(plan), step)],
            [str(e) for e in range(0, len(plan), step)],
        )
    for start, end in zip(starts, ends, strict=True):
        heat.text((start + end - 1) / 2, -0.9, kinds[order[start]], ha="center", va="bottom")
        if start:
            heat.axvline(start - 0.5, color="white", lw=1.5)
    figure.colorbar(image, ax=heat, label=label)
    bars.barh(range(rows), [100 * share for share in plan.shares], color="0.45", height=0.8)
    bars.set_xlim(0, 100)
    bars.set_xlabel("% computed")
    bars.set_title(f"{plan.share:.0%} in all", fontsize=10)
    figure.suptitle(f"{router.identity.backbone}, {router.schedule}", fontsize=11)
    return figure


def draw_router(router: Router, path: str | Path) -> None:
    """Write the heat map of a router as a PNG."""
    write(router_figure(router), path)


def draw_samples(rows: Mapping[str, Tensor], path: str | Path, titles: Sequence[str] = ()) -> None:
    """Write images side by side as a PNG, one named row above the other.

    Args:
        rows: Name -> images [N, C, H, W] in [0, 1] with 1 or 3 channels, N the same in all rows.
        path: Where to.
        titles: A title per column.

    Raises:
        ValueError: If the rows differ in length.
    """
    from matplotlib.figure import Figure

    counts = sorted({len(images) for images in rows.values()})
    if len(counts) != 1:
        raise ValueError(f"expected rows of equal length, got {' and '.join(map(str, counts))}")
    count = counts[0]
    figure = Figure(figsize=(0.9 * count + 1.6, 1.0 * len(rows) + 0.35), layout="constrained")
    grid: Any = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, images) in enumerate(rows.items()):
        for column, image in enumerate(images.float().cpu().clamp(0, 1)):
            axes = grid[row][column]
            axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0 and column < len(titles):
                axes.set_title(titles[column], fontsize=8)
        grid[row][0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    write(figure, path)


def write(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
