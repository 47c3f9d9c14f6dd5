"""Starts: evenly spread, ordered for every budget, and searched for."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import l2c
from l2c.identity import Identity
from l2c.site import Site, Sites
from tests.conftest import tiny_dit
from train.spread import evenly, fitting, logits, searched, spread

SITES = Sites((Site("blocks.0.attn", 30, (4, 8)), Site("blocks.0.mlp", 60, (4, 8))), rest=10)


# --- evenly ---


@pytest.mark.parametrize(("count", "evaluations"), [(1, 7), (3, 10), (5, 20), (7, 20), (20, 20)])
def test_evenly_spread_evaluations_begin_with_the_first_and_lie_alike(
    count: int, evaluations: int
) -> None:
    chosen = evenly(count, evaluations)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen[0] == 0
    assert chosen == sorted(chosen)
    gaps = [b - a for a, b in itertools.pairwise([*chosen, evaluations])]
    assert max(gaps) - min(gaps) <= 1


def test_every_second_evaluation_is_evenly_spread() -> None:
    assert evenly(5, 10) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("count", range(2, 21))
def test_two_streams_share_the_rows_and_both_begin_with_the_first(count: int) -> None:
    chosen = spread(count, 20, streams=2)
    assert len(set(chosen)) == len(chosen) <= count
    assert {0, 1} <= set(chosen) <= set(range(20))
    conditional = {row // 2 for row in chosen if row % 2 == 0}
    unconditional = {row // 2 for row in chosen if row % 2 == 1}
    assert unconditional <= conditional  # predicted by its difference to what was computed


def test_one_stream_is_spread_evenly() -> None:
    assert spread(4, 12) == evenly(4, 12)


# --- fitting ---


@pytest.mark.parametrize("budget", [0.2, 0.25, 0.3, 0.55, 0.9, 1.0])
def test_as_many_whole_evaluations_as_fit_a_budget(budget: float) -> None:
    sites = l2c.sites(tiny_dit())
    count = fitting(budget, 20, sites)

    def share(count: int) -> float:
        return l2c.Plan.rows(range(count), 20, sites).share  # of copies, which cost nothing

    assert share(count) <= budget
    assert count == 20 or share(count + 1) > budget


def test_a_budget_that_is_met_exactly_counts_as_met() -> None:
    for count in range(1, 21):
        budget = l2c.Plan.rows(range(count), 20, SITES).share
        assert fitting(budget, 20, SITES) == count


def test_a_budget_below_the_first_evaluation_names_the_least() -> None:
    least = l2c.Plan.rows([0], 5, SITES).share  # 0.28
    assert fitting(least, 5, SITES) == 1
    with pytest.raises(ValueError, match=r"budget of 0\.270 is below 0\.280 .*5 evaluations"):
        fitting(0.27, 5, SITES)
    with pytest.raises(ValueError, match=r"below 0\.280 of the compute"):
        fitting(0.27, 10, SITES, streams=2)


# --- logits ---


def order_by(table: torch.Tensor) -> list[int]:
    """Evaluations from the highest to the lowest; refuses tables in which they overlap."""
    low, high = table.min(1).values, table.max(1).values
    order = table[:, 0].argsort(descending=True).tolist()
    assert all(low[a] > high[b] for a, b in itertools.pairwise(order))
    return order


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        # 0 and 4, then 7 (3 away), 2 (2 away), and the rest, all next to others, later ones first
        ([0, 4], [0, 4, 7, 2, 6, 5, 3, 1]),
        # of the chosen 7 is the farthest from 0, then 2 and 5 tie at 2, and 5 is later
        ([0, 2, 5, 7], [0, 7, 5, 2, 6, 4, 3, 1]),
        # of nothing chosen the first evaluation remains
        ([], [0, 7, 4, 2, 6, 5, 3, 1]),
    ],
)
def test_logits_order_evaluations_by_their_distance(chosen: list[int], expected: list[int]) -> None:
    assert order_by(logits(chosen, 8, SITES)) == expected


def test_logits_are_positive_where_chosen_alone() -> None:
    table = logits([0, 3, 9], 12, SITES)
    assert torch.equal((table > 0).all(1).nonzero().flatten(), torch.tensor([0, 3, 9]))
    assert torch.equal((table > 0).any(1), (table > 0).all(1))


@pytest.mark.parametrize("chosen", [evenly(5, 20), [0, 1, 8, 15, 19]])
def test_for_every_budget_the_highest_scores_are_the_expected_evaluations(
    chosen: list[int],
) -> None:
    dit, schedule = tiny_dit(), l2c.Schedule.ddim(20)
    sites = l2c.sites(dit)
    rows = torch.arange(20)
    router = l2c.Router(
        logits(chosen, 20, sites).sigmoid(),
        rows > 0,
        (rows > 0).long(),
        sites,
        schedule,
        Identity.of(dit),
    )
    before: set[int] = set()
    for count in range(1, 21):
        plan = router.plan(budget=min(1.0, l2c.Plan.rows(range(count), 20, sites).share + 1e-9))
        computed = {row for row, sites_of in enumerate(plan.compute) if all(sites_of)}
        assert plan.reused == (20 - count) * len(sites)  # whole evaluations
        assert before < computed
        assert computed <= set(chosen) or set(chosen) <= computed
        if count == len(chosen):
            assert computed == set(chosen)
        before = computed


def test_within_an_evaluation_the_first_sites_come_first() -> None:
    sites = l2c.sites(tiny_dit())
    table = logits([0, 2], 6, sites)
    assert bool((table[:, :-1] > table[:, 1:]).all())
    scores = table.sigmoid()  # which are what is stored
    assert bool((scores[:, :-1] > scores[:, 1:]).all())


def test_two_streams_are_ordered_after_their_first_rows() -> None:
    order = order_by(logits([0, 1, 4], 10, SITES, streams=2))
    assert set(order[:2]) == {0, 1}
    assert order[2] == 4
    assert sorted(order) == list(range(10))
    # far from its own stream's first row alone: the last conditional row
    assert order[3] == 8


# --- searched ---


def noted(target: list[int], tried: list[tuple[int, ...]]) -> Callable[[list[int]], float]:
    """The squared distance to a target, which notes what was tried."""

    def measure(chosen: list[int]) -> float:
        assert chosen == sorted(set(chosen))
        tried.append(tuple(chosen))
        return sum((a - b) ** 2 for a, b in zip(chosen, target, strict=True))

    return measure


@pytest.mark.parametrize(
    ("start", "target"),
    [
        ([0, 5, 10, 15], [0, 2, 3, 17]),
        ([0, 5, 10, 15], [0, 17, 18, 19]),
        ([0, 1, 2, 3], [0, 8, 9, 13]),
        ([0, 4, 9], [0, 4, 9]),
    ],
)
def test_searching_finds_the_minimum_and_tries_nothing_twice(
    start: list[int], target: list[int]
) -> None:
    tried: list[tuple[int, ...]] = []
    reports: list[str] = []
    found = searched(start, 20, noted(target, tried), report=reports.append)
    assert found == target
    assert len(tried) == len(set(tried))
    assert tried[0] == tuple(start)
    assert all(chosen[0] == 0 and chosen[-1] < 20 for chosen in tried)
    assert bool(reports) == (start != target)
    if reports:
        assert reports[-1].startswith(str(target))


def test_searching_ends_where_no_single_move_helps() -> None:
    rng = torch.Generator().manual_seed(0)
    table = {
        (0, *rest): float(torch.rand((), generator=rng))
        for rest in itertools.combinations(range(1, 9), 3)
    }
    start = [0, 2, 4, 6]
    found = tuple(searched(start, 9, lambda chosen: table[tuple(chosen)]))
    assert table[found] < table[tuple(start)]
    for index in range(1, 4):
        for move in (-2, -1, 1, 2):
            row = found[index] + move
            if 0 < row < 9 and row not in found:
                other = tuple(sorted({*found[:index], *found[index + 1 :], row}))
                assert table[found] <= table[other]


def test_searching_moves_rows_between_two_streams() -> None:
    target = {0, 1, 4, 7}  # conditional 0 and 2, unconditional 0 and 3

    def error(chosen: list[int]) -> float:
        wrong = len(set(chosen) ^ target)
        return wrong + 0.01 * abs(sum(chosen) - sum(target))

    found = searched([0, 1, 2, 4], 12, error, streams=2)  # one more unconditional row
    assert set(found) == target
