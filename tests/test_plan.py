"""Plans: what they cost, print, keep and refuse."""

from __future__ import annotations

import pytest
import torch

import l2c
from l2c.plan import NEVER
from l2c.reuse import Reuse
from tests.fitting import lively_uvit

KINDS = (("attn", 30), ("mlp", 50))
SITES = l2c.Sites(
    tuple(l2c.Site(f"blocks.{i}.{kind}", macs) for i in (0, 1) for kind, macs in KINDS), rest=40
)
TABLE = [[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]]


@pytest.fixture
def plan() -> l2c.Plan:
    return l2c.Plan.of(TABLE, SITES)


def test_share_is_the_share_of_macs(plan: l2c.Plan) -> None:
    assert SITES.macs == 200
    assert plan.macs == (200, 90, 120)
    assert plan.shares == (1.0, 0.45, 0.6)
    assert plan.share == pytest.approx(410 / 600)
    assert plan.speedup == pytest.approx(600 / 410)
    assert plan.reused == 5


def test_prints_as_a_grid(plan: l2c.Plan) -> None:
    assert str(plan) == (
        "3 evaluations x 4 sites (blocks.0.attn to blocks.1.mlp), 68.3% of the compute; "
        "█ computed, · reused\n"
        "0 ██ ██ 100%\n"
        "1 ·█ ··  45%\n"
        "2 █· ·█  60%"
    )


def test_holds_what_the_next_evaluation_reuses(plan: l2c.Plan) -> None:
    held = tuple(
        tuple(
            any(plan.last_read[source][site] > row for source in range(row + 1))
            for site in range(4)
        )
        for row in range(3)
    )
    assert held == (
        (True, False, True, True),
        (False, True, True, False),
        (False, False, False, False),
    )
    assert plan.last_read == ((1, NEVER, 2, 1), (NEVER, 2, NEVER, NEVER), (NEVER,) * 4)


def test_says_what_is_reused_and_how_old_it_is(plan: l2c.Plan) -> None:
    assert plan.sources == (
        ((), (), (), ()),
        ((0,), (), (0,), (0,)),
        ((), (1,), (0,), ()),
    )
    assert plan.ages == ((0, 0, 0, 0), (1, 0, 1, 1), (0, 1, 2, 0))
    assert all(
        (numbers is None) == computed
        for row, computes in zip(plan.mixtures, plan.compute, strict=True)
        for numbers, computed in zip(row, computes, strict=True)
    )


def test_rows_compute_all_or_nothing() -> None:
    plan = l2c.Plan.rows({0, 1, 4}, 6, SITES, Reuse("newton", 2))
    assert [all(row) for row in plan.compute] == [True, True, False, False, True, False]
    assert [any(row) for row in plan.compute] == [all(row) for row in plan.compute]
    assert plan == l2c.Plan.of(plan.compute, SITES, Reuse("newton", 2))
    with pytest.raises(ValueError, match="is reused in evaluation 0"):
        l2c.Plan.rows([1, 2], 3, SITES)


SHAPED = l2c.Sites(tuple(l2c.Site(s.name, s.macs, (2, 3)) for s in SITES), SITES.rest)


@pytest.mark.parametrize(
    ("reuse", "macs"),
    [
        (Reuse(), (200, 90, 120, 40)),  # copies cost nothing
        (Reuse("taylor", 1), (200, 90, 120 + 12, 40 + 12 + 12 + 0 + 12)),
        (Reuse("newton", 2), (200, 90, 120 + 12, 40 + 12 + 12 + 0 + 12)),
        (Reuse(shift=torch.zeros(4, 4, 3)), (200, 90 + 18, 120 + 12, 40 + 4 * 6)),
        (
            Reuse("taylor", 1, torch.zeros(4, 4, 2, 1)),
            (200, 90 + 18, 120 + 6 + 12, 40 + 12 + 12 + 6 + 12),
        ),
    ],
    ids=str,
)
def test_a_combination_costs_one_per_number_and_output_that_it_is_formed_from(
    reuse: Reuse, macs: tuple[int, ...]
) -> None:
    """6 numbers in an output; what is formed from one output alone, unlearned, is a copy."""
    plan = l2c.Plan.of([*TABLE, [0, 0, 0, 0]], SHAPED, reuse)
    assert plan.macs == macs
    assert plan.shares == tuple(m / 200 for m in macs)
    assert plan.share == pytest.approx(sum(macs) / 800)


def test_bytes_are_those_of_the_outputs_that_are_still_read() -> None:
    table = [[1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]]
    # Kept at evaluation 0: sites 0, 2 and 3. In evaluation 1 the first goes before another comes.
    assert l2c.Plan.of(table, SHAPED).cache_bytes() == 3 * 6 * 4
    assert l2c.Plan.of(table, SHAPED).cache_bytes(5, torch.bfloat16) == 3 * 6 * 5 * 2
    # With two outputs each, site 1's of evaluation 0 is kept as well, and its next beside it.
    assert l2c.Plan.of(table, SHAPED, Reuse("taylor", 1)).cache_bytes() == 4 * 6 * 4
    assert l2c.Plan.full(3, SHAPED).cache_bytes() == 0
    every = [l2c.Plan.every(2, 7, SHAPED, Reuse(*rule)) for rule in (("copy",), ("newton", 2))]
    assert [plan.cache_bytes() for plan in every] == [4 * 6 * 4, 3 * 4 * 6 * 4]


def test_full_and_every() -> None:
    assert l2c.Plan.full(3, SITES).share == 1
    every = l2c.Plan.every(3, 7, SITES)
    assert [all(row) for row in every.compute] == [True, False, False] * 2 + [True]
    assert [any(row) for row in every.compute] == [True, False, False] * 2 + [True]
    with pytest.raises(ValueError, match="got 0 and 5"):
        l2c.Plan.every(0, 5, SITES)


def test_equal_tables_are_equal_plans(plan: l2c.Plan) -> None:
    assert plan == l2c.Plan.of(torch.tensor(TABLE), SITES)
    assert plan != l2c.Plan.full(3, SITES)
    assert hash(plan) == hash(l2c.Plan.of(TABLE, SITES))
    extrapolated = [l2c.Plan.of(TABLE, SITES, Reuse(kind, 1)) for kind in ("taylor", "newton")]
    assert len({plan, *extrapolated}) == 3


def test_reuse_before_the_first_computation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1\.attn is reused in evaluation 0"):
        l2c.Plan.of([[1, 1, 0, 1], [1, 1, 1, 1]], SITES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[1, 1, 1, 1], [1, 1, 1]], "expected 4 sites .*got 3 in evaluation 1"),
        ([], "at least one evaluation"),
    ],
)
def test_tables_of_the_wrong_size(table: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        l2c.Plan(tuple(tuple(map(bool, row)) for row in table), SITES)


def test_a_flat_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[evaluation, site\], got shape \(4,\)"):
        l2c.Plan.of(torch.ones(4), SITES)


def test_many_sites_print_without_gaps_and_rows_line_up() -> None:
    sites = l2c.Sites(tuple(l2c.Site(f"blocks.{i}.attn", 1) for i in range(41)), rest=0)
    lines = str(l2c.Plan.every(10, 11, sites)).splitlines()
    assert lines[1] == f" 0 {'█' * 41} 100%"
    assert lines[2] == f" 1 {'·' * 41}   0%"
    assert lines[11] == f"10 {'█' * 41} 100%"


def test_full_needs_an_evaluation() -> None:
    with pytest.raises(ValueError, match="at least 1, got 1 and 0"):
        l2c.Plan.full(0, SITES)


# --- two evaluations per step ---


@pytest.mark.parametrize("evaluations", [2, 4, 10, 20, 50])
def test_no_two_evaluations_of_a_step_share_a_cache(evaluations: int) -> None:
    """Learning-to-Cache, appendix B.1: evaluations 3, 5, 7, ... reuse, counted from 1."""
    plan = l2c.Plan.every(2, l2c.Schedule.dpm_solver_2(evaluations), SITES)
    reusing = [row for row, computed in enumerate(plan.compute) if not any(computed)]
    computing = [row for row, computed in enumerate(plan.compute) if all(computed)]
    assert reusing == list(range(2, evaluations, 2))
    assert sorted(reusing + computing) == list(range(evaluations))


def test_with_one_evaluation_per_step_a_schedule_is_its_length() -> None:
    for schedule in (
        l2c.Schedule.ddim(9),
        l2c.Schedule.dpm_solver_pp_2m(9),
        l2c.Schedule.flow_euler(9),
    ):
        for interval in (1, 2, 3, 20):
            assert l2c.Plan.every(interval, schedule, SITES) == l2c.Plan.every(interval, 9, SITES)


def test_longer_intervals_are_refused_where_a_step_would_share_a_cache() -> None:
    schedule = l2c.Schedule.dpm_solver_2(10)
    assert l2c.Plan.every(1, schedule, SITES) == l2c.Plan.full(10, SITES)
    for interval in (3, 4, 10):
        with pytest.raises(ValueError, match=f"interval of {interval} makes the two of a step"):
            l2c.Plan.every(interval, schedule, SITES)
        assert len(l2c.Plan.every(interval, len(schedule), SITES)) == 10
    with pytest.raises(ValueError, match="interval and evaluations of at least 1, got 0 and 10"):
        l2c.Plan.every(0, schedule, SITES)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("evaluations", [10, 20])
@pytest.mark.parametrize("spacing", ["time", "log_snr"])
def test_the_shift_keeps_samples_closer_to_the_uncached_ones(
    seed: int, evaluations: int, spacing: str
) -> None:
    """Reuse within a step makes it one of order 1; with the shift the order stays 2."""
    model = lively_uvit(seed)
    schedule, sites = l2c.Schedule.dpm_solver_2(evaluations, spacing), l2c.sites(model)
    noise = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    plans = (None, l2c.Plan.every(2, schedule, sites), l2c.Plan.every(2, evaluations, sites))
    plain, shifted, unshifted = (
        l2c.sample(model, schedule, range(8), latents=noise, plan=plan) for plan in plans
    )
    errors = [float((x - plain).square().mean().sqrt()) for x in (shifted, unshifted)]
    assert errors[1] > 1e-3 * float(plain.std())
    # Over 60 cases with other seeds, depths and counts the ratio was 0.04 to 0.16.
    assert errors[0] < 0.25 * errors[1]
