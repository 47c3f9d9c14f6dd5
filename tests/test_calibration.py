"""Calibration against the definition on recorded outputs, and plans against hand-made changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import l2c
from l2c.attach import attached
from l2c.sampling import initial_latents
from train.calibration import (
    Changes,
    block_caching,
    block_caching_at,
    measure,
    per_step,
    smoothcache,
    smoothcache_at,
)
from train.seeding import generator


def recorded(model: l2c.DiT, schedule: l2c.Schedule, count: int) -> list[list[Tensor]]:
    """The outputs [evaluation][site] of guided trajectories, by a hook of its own."""
    rows: list[list[Tensor]] = [[]]

    def wrap(index: int, call: object) -> object:
        def run(*args: object) -> Tensor:
            rows[-1].append(call(*args))
            return rows[-1][-1]

        return run

    def callback(row: int, t: float, x: Tensor) -> None:
        if row:
            rows.append([])

    noise = initial_latents(model, count, [generator("calibrate", 0, i) for i in range(count)])
    with attached(model, wrap):
        l2c.sample(model, schedule, range(count), 1.5, latents=noise, callback=callback)
    return rows


def test_measures_the_relative_change_of_both_predictions(dit: l2c.DiT) -> None:
    schedule = l2c.Schedule.ddim(5)
    changes = measure(dit, schedule, lookahead=3, samples=4, progress=False)
    rows = recorded(dit, schedule, 4)
    assert changes.relative.shape == (3, 5, 6)
    for distance in (1, 2, 3):
        for row in range(5):
            for site in range(6):
                got = changes.relative[distance - 1, row, site]
                if row < distance:
                    assert got == torch.inf
                    continue
                now, before = rows[row][site], rows[row - distance][site]
                assert len(now) == 8  # conditional and unconditional
                ratios = [
                    (a - b).abs().sum() / a.abs().sum() for a, b in zip(now, before, strict=True)
                ]
                torch.testing.assert_close(got, torch.stack(ratios).mean())


def test_batches_do_not_matter(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    whole = measure(dit, schedule, samples=5, batch_size=5, progress=False)
    parts = measure(dit, schedule, samples=5, batch_size=2, progress=False)
    torch.testing.assert_close(whole.relative, parts.relative)


def test_the_model_is_as_it_was(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    inputs = dit.example_inputs()
    before = dit(*inputs)
    measure(dit, schedule, samples=2, progress=False)
    assert torch.equal(dit(*inputs), before)


def test_saved_and_read(dit: l2c.DiT, schedule: l2c.Schedule, tmp_path: Path) -> None:
    changes = measure(dit, schedule, samples=2, progress=False)
    changes.save(tmp_path / "changes.safetensors", schedule=str(schedule))
    again = Changes.load(tmp_path / "changes.safetensors", l2c.sites(dit))
    assert torch.equal(again.relative, changes.relative)


def made(rows: dict[tuple[int, str], list[float]], sites: l2c.Sites) -> Changes:
    """Changes by (distance, kind), the same in all blocks; entry t is the change up to t."""
    evaluations = len(next(iter(rows.values())))
    distances = max(distance for distance, _ in rows)
    table = torch.full((distances, evaluations, len(sites)), torch.inf)
    for (distance, kind), values in rows.items():
        for i, site in enumerate(sites):
            if site.name.endswith(kind):
                table[distance - 1, :, i] = torch.tensor(values)
    return Changes(table, sites)


INF = torch.inf


def test_smoothcache_skips_as_far_as_the_threshold_allows(dit: l2c.DiT) -> None:
    sites = l2c.sites(dit)
    changes = made(
        {
            (1, "attn"): [INF, 0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1],
            (2, "attn"): [INF, INF, 0.2, 0.2, 0.6, 0.6, 0.2, 0.2],
            (1, "mlp"): [INF, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0],
            (2, "mlp"): [INF, INF, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0],
        },
        sites,
    )
    # At a threshold of 0.2: from 0 skip two (1, 2), compute 3; to 4 it changes by 0.5 and to 5 by
    # 0.6, so 4 computes; from 4 skip two (5, 6), compute 7.
    attn = [1, 0, 0, 1, 1, 0, 0, 1]
    expected = [[bool(attn[row]) if i % 2 == 0 else True for i in range(6)] for row in range(8)]
    assert smoothcache_at(changes, 0.2, 2).compute == l2c.Plan.of(expected, sites).compute
    # One at a time: 0, 2, (0.5 up to 4:) 3, 4, 6, and the last.
    attn = [1, 0, 1, 0, 1, 0, 1, 1]
    changes.relative[0, 3, ::2], changes.relative[0, 4, ::2] = 0.1, 0.1
    expected = [[bool(attn[row]) if i % 2 == 0 else True for i in range(6)] for row in range(8)]
    assert smoothcache_at(changes, 0.1, 2).compute == l2c.Plan.of(expected, sites).compute
    with pytest.raises(ValueError, match="expected a lookahead from 1 to 2.*got 3"):
        smoothcache(changes, 0.5, 3)


def test_smoothcache_averages_over_blocks(dit: l2c.DiT) -> None:
    sites = l2c.sites(dit)
    table = torch.full((1, 3, 6), 0.9)
    table[0, 1, 0] = 0.0  # one block of attention does not change, the others do: mean 0.6
    changes = Changes(table, sites)
    plan = smoothcache(changes, 0.95, 1)
    columns = set(zip(*[[row[i] for i in (0, 2, 4)] for row in plan.compute], strict=True))
    assert len(columns) == 1  # all blocks of a type alike
    assert plan.compute[1] == (False, True) * 3


def test_smoothcache_computes_first_and_last(dit: l2c.DiT) -> None:
    changes = made(
        {(d, kind): [0.0] * 9 for d in (1, 2, 3) for kind in ("attn", "mlp")}, l2c.sites(dit)
    )
    plan = smoothcache(changes, 0.5)
    assert [all(row) for row in plan.compute] == [True, False, False, False, True] + [False] * 3 + [
        True
    ]
    with pytest.raises(ValueError, match=r"computes 0\.\d+ .* at least, got a budget of 0.200"):
        smoothcache(changes, 0.2)


def test_block_caching_computes_where_the_change_has_added_up(dit: l2c.DiT) -> None:
    sites = l2c.sites(dit)
    steps = torch.tensor([INF, 0.2, 0.2, 0.2, 0.5, 0.1, 0.1, 0.3])
    table = steps[None, :, None].repeat(1, 1, 6)
    table[:, :, 1] *= 0.5  # another site changes half as much
    table[:, 0] = INF
    # Sums with delta 0.47: 0.2, 0.4, 0.6! -> 0.5! -> 0.1, 0.2, 0.5!; of the other site
    # 0.1, 0.2, 0.3, 0.55! -> 0.05, 0.1, 0.25.
    one, other = [1, 0, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0, 0, 0]
    wanted = l2c.Plan.of(
        [[bool(other[row] if i == 1 else one[row]) for i in range(6)] for row in range(8)], sites
    )
    assert block_caching_at(Changes(table, sites), 0.47).compute == wanted.compute


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 1.0])
def test_plans_keep_to_the_budget_and_use_it(dit: l2c.DiT, budget: float) -> None:
    changes = measure(dit, l2c.Schedule.ddim(20), samples=4, lookahead=4, progress=False)
    site = max(site.macs for site in changes.sites) / changes.sites.macs
    plan = block_caching(changes, budget)
    assert budget - 6 * site / 20 < plan.share <= budget  # sites seldom tie
    assert smoothcache(changes, max(budget, 0.32), 4).share <= max(budget, 0.32)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 19, 20])
def test_per_step_computes_so_many_whole_evaluations(dit: l2c.DiT, count: int) -> None:
    changes = measure(dit, l2c.Schedule.ddim(20), samples=2, progress=False)
    plan = per_step(changes, count, l2c.reuse.Reuse.named("taylor-2"))
    chosen = [row for row, computed in enumerate(plan.compute) if all(computed)]
    assert len(chosen) == count and chosen[0] == 0
    assert plan.reused == (20 - count) * 6
    assert plan.reuse.name == "taylor-2"


def test_per_step_follows_the_accumulated_change(dit: l2c.DiT) -> None:
    sites = l2c.sites(dit)
    even = Changes(torch.ones(1, 12, len(sites)), sites)
    chosen = [row for row, computed in enumerate(per_step(even, 4).compute) if all(computed)]
    assert chosen == [0, 3, 6, 9]
    late = torch.ones(1, 12, len(sites))
    late[:, 8:] = 10.0  # nearly all change at the end
    chosen = [row for row, c in enumerate(per_step(Changes(late, sites), 4).compute) if all(c)]
    assert chosen == [0, 8, 9, 10]  # where 17, 27 and 37 of 47 pass the quarters
    with pytest.raises(ValueError, match="expected from 1 to 12 evaluations to compute, got 13"):
        per_step(even, 13)


def test_wrong_numbers_are_refused(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    with pytest.raises(ValueError, match="expected lookahead, samples and batch_size of at least"):
        measure(dit, schedule, samples=0)
    with pytest.raises(ValueError, match=r"expected changes .* of 6 sites, got shape \(2, 3\)"):
        Changes(torch.zeros(2, 3), l2c.sites(dit))
    changes = measure(dit, schedule, samples=1, progress=False)
    with pytest.raises(ValueError, match=r"expected a budget in \(0, 1\], got 0"):
        block_caching(changes, 0)
