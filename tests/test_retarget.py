"""Routers for other schedules: the same plan in the same place, evenly spread, at the same cost."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import l2c
from l2c.reuse import Reuse
from tests.conftest import make_router

SCHEDULES = {
    "ddim-6": l2c.Schedule.ddim(6),
    "ddim-20": l2c.Schedule.ddim(20),
    "ddim-33": l2c.Schedule.ddim(33, "trailing"),
    "2m-20": l2c.Schedule.dpm_solver_pp_2m(20),
    "2s-20": l2c.Schedule.dpm_solver_2(20, noise=l2c.Noise()),
    "2s-34": l2c.Schedule.dpm_solver_2(34, "log_snr", noise=l2c.Noise()),
}


def every(model: l2c.DiT, interval: int, schedule: l2c.Schedule, **changes: object) -> l2c.Router:
    """A router that computes whole evaluations, each `interval`-th."""
    rows = torch.arange(len(schedule))
    scores = (rows % interval == 0).float()[:, None].expand(-1, len(l2c.sites(model))).clone()
    fields = {"scores": scores, "gated": rows > 0, "updates": (rows > 0) * 9}
    return make_router(model, schedule, **{**fields, **changes})


def whole(plan: l2c.Plan) -> list[int]:
    """The evaluations that compute, of a plan in which they do so as a whole."""
    assert all(all(row) or not any(row) for row in plan.compute)
    return [row for row, computed in enumerate(plan.compute) if all(computed)]


def reuse(evaluations: int, kind: str = "taylor", channels: int = 32) -> Reuse:
    """A rule with random learned parts."""
    g = torch.Generator().manual_seed(1)
    corrections = torch.randn(evaluations, 6, 2, channels, generator=g)
    return Reuse(kind, 1, corrections, torch.randn(evaluations, 6, channels, generator=g))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("budget", [None, 0.6, 0.8])
def test_to_its_own_schedule_is_the_identity(
    dit: l2c.DiT, schedule: l2c.Schedule, budget: float | None
) -> None:
    rows = torch.arange(len(schedule))
    first = schedule.evaluations_per_step
    for gated in (rows >= first, (rows >= first) & (rows % 2 == 0)):
        updates = torch.where(gated, 3 + rows, 0)
        rule = reuse(len(schedule))
        if budget is not None and not bool(gated[first:].all()):
            budget = 0.8  # below it is what always computes
        router = make_router(dit, schedule, gated=gated, updates=updates, budget=budget, reuse=rule)
        same = router.retarget(schedule)
        assert same.plan() == router.plan()
        assert torch.equal(same.scores, router.scores)
        assert torch.equal(same.gated, gated)
        assert torch.equal(same.updates, updates)
        assert same.budget == (router.plan().share if budget is None else budget)


@pytest.mark.parametrize("interval", [2, 3, 4, 5])
@pytest.mark.parametrize("evaluations", [20, 27, 40, 50, 64, 100])
@pytest.mark.parametrize("budgeted", [False, True])
def test_whole_evaluations_stay_whole_and_even_at_the_same_share(
    dit: l2c.DiT, interval: int, evaluations: int, budgeted: bool
) -> None:
    schedule = l2c.Schedule.ddim(20)
    router = every(dit, interval, schedule)
    if budgeted:
        router = dataclasses.replace(router, budget=router.plan().share)
    retargeted = router.retarget(l2c.Schedule.ddim(evaluations))
    plan = retargeted.plan()
    chosen = whole(plan)
    # The last ones of 20 may reuse for less than the interval, as the run ends there.
    assert evaluations / interval - 1 <= len(chosen) <= evaluations * -(-20 // interval) / 20
    gaps = {after - before for before, after in itertools.pairwise([*chosen, evaluations])}
    assert gaps <= {interval, interval + 1} | {evaluations - chosen[-1]}
    assert evaluations - chosen[-1] <= interval + 1
    assert retargeted.budget == router.plan().share
    assert 0 <= router.plan().share - plan.share < 1 / evaluations
    if evaluations % 20 == 0 and 20 % interval == 0:
        assert chosen == list(range(0, evaluations, interval))
    retargeted.check(dit, l2c.Schedule.ddim(evaluations))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["copy", "taylor"])
def test_the_budget_is_kept_within_one_evaluation(
    dit: l2c.DiT, schedule: l2c.Schedule, seed: int, kind: str
) -> None:
    old = l2c.Schedule.ddim(20)
    rule = reuse(20) if kind == "taylor" else Reuse()
    gated = torch.arange(20) > 0
    for budget in (0.5, 0.75):
        router = make_router(
            dit, old, seed, gated=gated, updates=gated * 2, budget=budget, reuse=rule
        )
        retargeted = router.retarget(schedule)
        share = retargeted.plan().share
        assert budget - 1 / len(schedule) < share <= retargeted.budget
        # Forming what is reused may cost more than before: up to 2 of the 160 multiply-accumulates
        # per number of these sites.
        assert retargeted.budget == budget or retargeted.budget < budget + 0.01 * bool(rule.order)
        # and by other budgets, in either direction
        assert retargeted.plan(budget=budget + 0.1).share > share
        first = schedule.evaluations_per_step
        assert not bool(retargeted.gated[:first].any())
        assert bool(retargeted.gated[first:].all())


def test_a_budget_below_what_always_computes_is_raised(dit: l2c.DiT) -> None:
    router = every(dit, 10, l2c.Schedule.ddim(20))
    retargeted = router.retarget(l2c.Schedule.dpm_solver_2(4, noise=l2c.Noise()))
    assert whole(retargeted.plan()) == [0, 1]
    assert retargeted.budget == retargeted.plan().share > router.plan().share


@pytest.mark.parametrize("schedule", [l2c.Schedule.ddim(60), l2c.Schedule.ddim(40, "trailing")])
def test_computations_go_where_the_old_ones_were(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    """All of the second half, and the first evaluation of the ten before it."""
    rows = torch.arange(20)
    scores = ((rows == 0) | (rows >= 10)).float()[:, None].repeat(1, 6)
    old = l2c.Schedule.ddim(20)
    chosen = set(whole(every(dit, 1, old, scores=scores).retarget(schedule).plan()))
    noise = l2c.Noise()
    middle = sum(noise.half_log_snr(t) for t in old.timesteps[9:11]) / 2
    late = {row for row, t in enumerate(schedule.timesteps) if noise.half_log_snr(t) > middle}
    assert len(late - chosen) <= 1
    assert len(chosen - late) == round(len(schedule) / 20)


def test_evaluations_that_always_compute_stay_a_lattice(dit: l2c.DiT) -> None:
    """The pairs of Learning-to-Cache: every second evaluation, the first of a step of two."""
    pairs = make_router(dit, l2c.Schedule.ddim(20))
    for evaluations in (10, 30, 50):
        gated = pairs.retarget(l2c.Schedule.ddim(evaluations)).gated
        assert gated.tolist() == [row % 2 == 1 for row in range(evaluations)]
    rows = torch.arange(20)
    gated = (rows % 2 == 0) & (rows > 0)
    steps = make_router(dit, SCHEDULES["2s-20"], gated=gated, updates=torch.where(gated, 5, 0))
    for evaluations in (10, 30, 50):
        schedule = l2c.Schedule.dpm_solver_2(evaluations, noise=l2c.Noise())
        retargeted = steps.retarget(schedule)
        expected = [row % 2 == 0 and row > 0 for row in range(evaluations)]
        assert retargeted.gated.tolist() == expected
        # so that the two evaluations of a step never share a cache
        assert max(max(row) for row in retargeted.plan().ages) == 1
        assert all(all(row) for row in retargeted.plan().compute[1::2])


def linear(schedule: l2c.Schedule, like: Tensor) -> Tensor:
    """A linear function of the half log-SNR, another one in each entry, in [0, 1]."""
    acp = schedule.noise.alphas_cumprod[torch.tensor(schedule.timesteps)]
    place = (0.5 * torch.log(acp / (1 - acp)) + 6) / 12  # from 0.08 to 0.89 for DiT's noise
    slopes = torch.linspace(0.1, 1, like[0].numel()).reshape(like[0].shape)
    return (place.reshape(-1, *[1] * slopes.ndim) * slopes).float()


def test_interpolation_of_a_linear_function_is_exact(dit: l2c.DiT) -> None:
    old, new = l2c.Schedule.ddim(20), l2c.Schedule.ddim(47)
    template = reuse(20)
    rule = Reuse("taylor", 1, linear(old, template.corrections), linear(old, template.shift))
    rows = torch.arange(20)
    # Whole evaluations up to the last one, so that every new place lies between two old ones.
    scores = ((rows % 4 == 0) | (rows == 19)).float()[:, None].repeat(1, 6)
    router = every(dit, 4, old, scores=scores, reuse=rule)
    retargeted = router.retarget(new)
    inner = ~torch.tensor(retargeted.plan().compute)[:, 0]
    inner &= torch.tensor(new.timesteps) < old.timesteps[1]
    inner &= torch.tensor(new.timesteps) > old.timesteps[18]
    assert int(inner.sum()) > 25
    for name in ("corrections", "shift"):
        found = getattr(retargeted.reuse, name)
        torch.testing.assert_close(found[inner], linear(new, found)[inner])


def test_scores_between_two_evaluations_are_their_mean_by_log_snr(dit: l2c.DiT) -> None:
    noise = l2c.Noise()
    old = l2c.Schedule("ddim", (900, 500, 100), {}, noise)
    new = l2c.Schedule("ddim", (900, 500, 321, 100), {}, noise)
    scores = torch.tensor([0.0, 0.1, 0.4])[:, None].repeat(1, 6)
    gated = torch.tensor([False, True, True])
    router = make_router(dit, old, scores=scores, gated=gated, updates=gated * 4)
    low, high, here = (noise.half_log_snr(t) for t in (500, 100, 321))
    expected = 0.1 + 0.3 * (here - low) / (high - low)
    found = router.retarget(new).scores
    torch.testing.assert_close(found[1:, 0], torch.tensor([0.1, expected, 0.4]))


def test_rectified_flows_are_matched_by_their_timesteps(dit: l2c.DiT) -> None:
    router = every(dit, 5, l2c.Schedule.flow_euler(20, shift=3.0))
    assert whole(router.retarget(l2c.Schedule.flow_euler(40)).plan()) == list(range(0, 40, 5))


def test_both_streams_of_guidance_keep_their_own_plan(dit: l2c.DiT) -> None:
    old = l2c.Schedule.ddim(20)
    rows = torch.arange(40)
    evaluation, unconditional = rows // 2, rows % 2 == 1
    chosen = torch.where(unconditional, evaluation % 5 == 0, evaluation % 2 == 0)
    router = every(
        dit,
        1,
        old,
        streams=2,
        scores=chosen.float()[:, None].repeat(1, 6),
        gated=evaluation > 0,
        updates=(evaluation > 0) * 3,
    )
    assert router.retarget(old).plan() == router.plan()
    retargeted = router.retarget(l2c.Schedule.ddim(40))
    chosen = whole(retargeted.plan())
    assert [row // 2 for row in chosen if row % 2 == 0] == list(range(0, 40, 2))
    assert [row // 2 for row in chosen if row % 2 == 1] == list(range(0, 40, 5))


def test_what_is_left_of_a_budget_does_not_break_up_whole_evaluations(dit: l2c.DiT) -> None:
    """Scores that rank the sites of an evaluation, as training starts with, leave one in parts."""
    old = l2c.Schedule.ddim(20)
    rows, columns = torch.arange(20), torch.arange(6)
    rank = torch.where(rows % 4 == 0, 0.9, 0.4 - rows / 100)[:, None] - columns / 1000
    full = every(dit, 4, old).plan().share
    router = every(dit, 4, old, scores=rank, budget=full + 0.02)
    parts = [row for row, c in enumerate(router.plan().compute) if any(c) and not all(c)]
    assert parts == [1]
    assert router.retarget(old).plan() == router.plan()
    plan = router.retarget(l2c.Schedule.ddim(40)).plan()
    chosen = {row for row, c in enumerate(plan.compute) if all(c)}
    assert chosen == set(range(0, 40, 4))
    assert full < plan.share <= full + 0.02


def test_untrained_evaluations_are_computed_as_before(dit: l2c.DiT) -> None:
    rows = torch.arange(20)
    router = every(dit, 20, l2c.Schedule.ddim(20), updates=torch.where(rows % 2 == 1, 3, 0))
    with pytest.warns(UserWarning, match="were never trained"):
        retargeted = router.retarget(l2c.Schedule.ddim(30))
    assert whole(retargeted.plan()) == list(range(0, 30, 2))  # and no warning now
    assert not bool(retargeted.gated[::2].any())


def test_provenance_says_where_it_comes_from_and_drops_what_was_measured(dit: l2c.DiT) -> None:
    old = l2c.Schedule.ddim(20)
    provenance = {
        "seed": 3,
        "measured": [{"budget": 0.3, "share": 0.29, "mse": 0.01}],
        "soft_error": 0.1,
        "hard_error": 0.2,
    }
    router = every(dit, 4, old, provenance=provenance)
    retargeted = router.retarget(l2c.Schedule.ddim(30))
    assert retargeted.provenance == {"seed": 3, "retargeted": {"from": old.to_dict()}}
    again = retargeted.retarget(l2c.Schedule.ddim(10)).provenance["retargeted"]
    assert again["from"] == l2c.Schedule.ddim(30).to_dict()
    assert again["earlier"] == {"from": old.to_dict()}


def test_a_retargeted_router_samples(dit: l2c.DiT) -> None:
    """With corrections of zero as by the same plan with the plain extrapolation."""
    zeros = Reuse("taylor", 1, torch.zeros(8, 6, 2, 1))
    router = every(dit, 2, l2c.Schedule.ddim(8), reuse=zeros)
    schedule = l2c.Schedule.dpm_solver_pp_2m(10)
    retargeted = router.retarget(schedule)
    plain = l2c.Plan.every(2, schedule, retargeted.sites, Reuse("taylor", 1))
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = l2c.sample(dit, schedule, [1, 2], router=retargeted, latents=noise)
    theirs = l2c.sample(dit, schedule, [1, 2], plan=plain, latents=noise)
    torch.testing.assert_close(ours, theirs)


def test_schedules_that_a_router_can_t_be_made_for(router: l2c.Router) -> None:
    with pytest.raises(ValueError, match=r"expected a schedule of the router's noise .*scaled"):
        router.retarget(l2c.Schedule.dpm_solver_2(6))
    with pytest.raises(ValueError, match="expected at least 2 evaluations.* got 1 in the new"):
        router.retarget(l2c.Schedule.ddim(1))
    up = l2c.Schedule("ddim", (1, 500, 400))
    with pytest.raises(ValueError, match="falling timesteps, got 1 and then 500 in the new"):
        router.retarget(up)
    single = make_router(
        l2c.DiT(input_size=8, hidden_size=32, depth=3, num_heads=4),
        l2c.Schedule.ddim(1),
        gated=torch.zeros(1, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match="got 1 in the router's schedule"):
        single.retarget(l2c.Schedule.ddim(4))
