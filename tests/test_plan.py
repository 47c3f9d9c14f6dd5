"""Plans: what they cost, print, keep and refuse."""

from __future__ import annotations

import pytest
import torch

import l2c

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
    assert plan.held == (
        (True, False, True, True),
        (False, True, True, False),
        (False, False, False, False),
    )


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
