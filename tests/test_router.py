"""Routers: thresholds, refusals, and the fingerprint of a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import l2c
from l2c.identity import Identity, fingerprint
from l2c.reuse import Reuse
from tests.conftest import make_router, tiny_dit


def test_plan_computes_what_scores_above_the_threshold(router: l2c.Router) -> None:
    for threshold in (0.0, 0.25, 0.5, 0.9, 1.0):
        table = torch.tensor(router.plan(threshold).compute)
        assert bool(table[~router.gated].all())
        assert torch.equal(table[router.gated], router.scores[router.gated] > threshold)
    assert router.plan() == router.plan(router.threshold)
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\], got 1.5"):
        router.plan(1.5)


def test_a_score_at_the_threshold_is_reused(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    router = make_router(dit, schedule, scores=torch.full((6, 6), 0.25))
    assert router.plan(0.25).reused == 18
    assert router.plan(0.2).reused == 0


def test_untrained_gates_compute_and_warn(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    updates = torch.tensor([0, 7, 0, 0, 0, 7])
    router = make_router(dit, schedule, updates=updates)
    with pytest.warns(UserWarning, match="evaluations 3 were never trained"):
        plan = router.plan(1.0)
    assert [all(row) for row in plan.compute] == [True, False, True, True, True, False]


# --- budgets ---

RULES = [
    Reuse(),
    Reuse("taylor", 2),
    Reuse("newton", 1, torch.zeros(6, 6, 2, 1)),
    Reuse(shift=torch.zeros(6, 6, 32)),
]


def candidates(router: l2c.Router) -> list[l2c.Plan]:
    """All plans that compute what scores highest, ties together, the cheapest first."""
    scores = sorted({*router.scores[router.gated].flatten().tolist(), 2.0}, reverse=True)
    return [
        l2c.Plan.of(~router.gated[:, None] | (router.scores >= s), router.sites, router.reuse)
        for s in scores
    ]


@pytest.mark.parametrize("reuse", RULES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_budget_is_kept_to_and_used(
    dit: l2c.DiT, schedule: l2c.Schedule, reuse: Reuse, tied: bool
) -> None:
    router = make_router(dit, schedule, reuse=reuse)
    if tied:
        router = dataclasses.replace(router, scores=(router.scores * 4).round() / 4)
    plans = candidates(router)
    assert len(plans) == (6 if tied else 19)
    least = plans[0].share
    for budget in (least, *torch.linspace(least + 1e-3, 1, 40).tolist(), 1.0):
        plan = router.plan(budget=budget)
        assert plan.share <= budget
        assert plan == [candidate for candidate in plans if candidate.share <= budget][-1]
        assert plan.reuse == reuse
    for plan in plans:
        assert router.plan(budget=plan.share) == plan  # to the last bit
    assert router.plan(budget=1.0) == l2c.Plan.of(torch.ones(6, 6), router.sites, reuse)
    with pytest.raises(
        ValueError, match=f"budget of 0.010 is below {least:.3f} of the compute.*give more"
    ):
        router.plan(budget=0.01)


def test_one_expensive_output_ends_it_whatever_cheaper_ones_follow(
    dit: l2c.DiT, schedule: l2c.Schedule
) -> None:
    """An MLP costs more than attention: the next in order waits, it is not skipped."""
    scores = torch.zeros(6, 6)
    scores[1] = torch.tensor([0.2, 0.9, 0.3, 0.8, 0.4, 0.7])
    router = make_router(dit, schedule, scores=scores)
    attention, mlp = (router.sites[i].macs for i in (0, 1))
    assert attention < mlp
    needed = router.plan(1.0).share
    whole = 6 * router.sites.macs
    plan = router.plan(budget=needed + (2.5 * mlp) / whole)
    assert attention < 0.5 * mlp + attention
    assert plan.compute[1] == (False, True, False, True, False, False)
    assert plan.reused == 16


def test_the_budget_that_it_was_trained_to_is_kept_to(router: l2c.Router) -> None:
    trained = dataclasses.replace(router, budget=0.8)
    assert trained.plan() == router.plan(budget=0.8) != router.plan()
    assert trained.plan(budget=0.9) == router.plan(budget=0.9) != trained.plan()
    assert trained.plan(0.3) == router.plan(0.3)
    assert trained.plan(threshold=0.3) == router.plan(0.3)
    with pytest.raises(ValueError, match="a threshold or a budget, got both"):
        trained.plan(0.5, budget=0.5)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.1, float("nan")])
def test_budgets_without_meaning(router: l2c.Router, budget: float) -> None:
    with pytest.raises(ValueError, match=r"budget in \(0, 1\], got"):
        router.plan(budget=budget)
    with pytest.raises(ValueError, match=r"budget in \(0, 1\], got"):
        dataclasses.replace(router, budget=budget)


@pytest.mark.parametrize("reuse", RULES, ids=str)
def test_a_budget_of_other_costs(dit: l2c.DiT, schedule: l2c.Schedule, reuse: Reuse) -> None:
    """As of a device on which attention takes ten times the MLP; there reuse is free."""
    router = make_router(dit, schedule, reuse=reuse)
    prices = [1000, 100] * 3
    listed = [
        dataclasses.replace(site, macs=price)
        for site, price in zip(router.sites, prices, strict=True)
    ]
    costs = l2c.Sites(tuple(listed), rest=50)

    def share(plan: l2c.Plan) -> float:
        spent = (torch.tensor(plan.compute) * torch.tensor(prices)).sum()
        return float(spent + 6 * 50) / (6 * 3350)

    plans = candidates(router)
    for budget in torch.linspace(0.55, 1, 30).tolist():
        plan = router.plan(budget=budget, costs=costs)
        assert plan == [candidate for candidate in plans if share(candidate) <= budget][-1]
        assert plan.sites == router.sites
    assert any(router.plan(budget=b, costs=costs) != router.plan(budget=b) for b in (0.6, 0.7, 0.8))
    stored = dataclasses.replace(router, budget=0.7)
    assert stored.plan(costs=costs) == router.plan(budget=0.7, costs=costs)
    with pytest.raises(ValueError, match="budget of 0.500 is below 0.507 of the compute"):
        router.plan(budget=0.5, costs=costs)
    with pytest.raises(ValueError, match="costs of the router's 6 sites, got 2 others"):
        router.plan(budget=0.5, costs=l2c.Sites(costs.sites[:2], 50))


def test_untrained_gates_compute_within_a_budget_too(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    router = make_router(dit, schedule, updates=torch.tensor([0, 7, 0, 0, 0, 7]), budget=0.8)
    with pytest.warns(UserWarning, match="evaluations 3 were never trained.*whatever the budget"):
        plan = router.plan()
    assert all(plan.compute[3])
    assert plan.share <= 0.8
    assert plan.reused > 0


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        (Reuse("taylor", 1, torch.zeros(5, 6, 2, 32)), "corrections for 6 evaluations and 6 sites"),
        (Reuse("taylor", 1, torch.zeros(6, 6, 2, 31)), r"corrections of 1 channel or .*got 31"),
        (Reuse(shift=torch.zeros(6, 5, 32)), r"shift for 6 .*got \(6, 5\)"),
    ],
)
def test_learned_parts_of_another_shape(router: l2c.Router, reuse: Reuse, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(router, reuse=reuse)


def test_check_accepts_what_it_was_trained_for(router: l2c.Router, dit: l2c.DiT) -> None:
    router.check(dit, router.schedule, 1.5)
    router.check(dit.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 4}, "depth: expected 3, got 4"),
        ({"num_classes": 7}, "num_classes: expected 10, got 7"),
        ({"seed": 1}, r"weights: expected \w+, got \w+\. .*router\.rebind"),
    ],
)
def test_check_names_what_differs_in_the_model(
    router: l2c.Router, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        router.check(tiny_dit(**change))


def test_check_refuses_another_class(router: l2c.Router, dit: l2c.DiT) -> None:
    identity = dataclasses.replace(router.identity, backbone="UViT")
    with pytest.raises(ValueError, match="backbone: expected UViT, got DiT"):
        dataclasses.replace(router, identity=identity).check(dit)


def test_check_refuses_another_list_of_sites(router: l2c.Router, dit: l2c.DiT) -> None:
    names = ["blocks.0.attention", *router.sites.names[1:]]
    renamed = tuple(
        dataclasses.replace(site, name=name) for site, name in zip(router.sites, names, strict=True)
    )
    other = dataclasses.replace(router, sites=l2c.Sites(renamed, router.sites.rest))
    with pytest.raises(ValueError, match=r"only one has blocks\.0\.attention, blocks\.0\.attn"):
        other.check(dit)
    dearer = l2c.Sites(router.sites.sites, router.sites.rest + 1)
    with pytest.raises(ValueError, match="other costs"):
        dataclasses.replace(router, sites=dearer).check(dit)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (l2c.Schedule.ddim(7), "number of evaluations: expected 6, got 7"),
        (l2c.Schedule.ddim(6, "trailing"), "spacing.*linspace.*got.*trailing"),
        (l2c.Schedule("euler", l2c.Schedule.ddim(6).timesteps), "solver: expected ddim, got euler"),
    ],
)
def test_check_names_what_differs_in_the_schedule(
    router: l2c.Router, other: l2c.Schedule, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        router.check(schedule=other)


def test_check_refuses_another_guidance(router: l2c.Router) -> None:
    guided = dataclasses.replace(router, guidance_scale=1.5)
    guided.check(guidance_scale=1.5)
    with pytest.raises(ValueError, match=r"trained at guidance scale 1\.5, got 4\.0"):
        guided.check(guidance_scale=4.0)


def test_weights_that_nobody_recorded_fit_any_with_a_warning(
    router: l2c.Router, dit: l2c.DiT
) -> None:
    unknown = dataclasses.replace(router.identity, weights=None)
    given = dataclasses.replace(router, identity=unknown)
    with pytest.warns(UserWarning, match="does not say for which weights .* router.rebind"):
        given.check(tiny_dit(seed=1))
    assert unknown.brief == "unknown"
    assert unknown.differences(router.identity) == router.identity.differences(unknown) == []
    with pytest.raises(ValueError, match="depth: expected 3, got 4"):
        given.check(tiny_dit(depth=4))
    assert given.rebind(dit).identity == router.identity
    with torch.device("meta"):
        assert Identity.of(l2c.DiT(**dit.config)) == unknown


def test_given_scores_are_not_untrained_ones(
    router: l2c.Router, recwarn: pytest.WarningsRecorder
) -> None:
    given = dataclasses.replace(router, updates=torch.where(router.gated, -1, 0))
    assert given.plan() == router.plan()
    assert not recwarn


def test_rebind_takes_other_weights_and_nothing_else(router: l2c.Router) -> None:
    other = tiny_dit(seed=1)
    router.rebind(other).check(other, router.schedule)
    with pytest.raises(ValueError, match="depth: expected 3, got 4"):
        router.rebind(tiny_dit(depth=4))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scores", torch.rand(5, 6), r"scores of shape \(6, 6\).*got \(5, 6\)"),
        ("scores", torch.rand(6, 5), r"got \(6, 5\)"),
        ("scores", torch.full((6, 6), torch.nan), "NaN"),
        ("scores", torch.full((6, 6), 1.1), "values outside"),
        ("gated", torch.ones(6, dtype=torch.bool), "evaluation 0 has nothing to reuse"),
        ("gated", torch.zeros(3, dtype=torch.bool), "gated of shape"),
        ("updates", torch.zeros(3), "updates of shape"),
        ("updates", torch.full((6,), -2), "updates from -1 .* on, got -2"),
        ("threshold", 2.0, "threshold in"),
    ],
)
def test_fields_that_make_no_router(
    router: l2c.Router, field: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(router, **{field: value})


def test_fingerprint_depends_on_values_alone(dit: l2c.DiT) -> None:
    first = fingerprint(dit)
    assert fingerprint(tiny_dit()) == first
    assert fingerprint(tiny_dit().bfloat16()) == first
    assert fingerprint(tiny_dit(seed=1)) != first


def test_fingerprint_sees_changes_in_place(dit: l2c.DiT) -> None:
    first = fingerprint(dit)
    weight = dit.blocks[1].mlp.fc1.weight
    before = weight[0, 0].item()
    weight.data[0, 0] += 1.0  # .data tells nobody
    assert fingerprint(dit) != first
    weight.data[0, 0] = before
    assert fingerprint(dit) == first
    dit.load_state_dict(tiny_dit(seed=1).state_dict(), assign=True)
    assert fingerprint(dit) == fingerprint(tiny_dit(seed=1))


def test_fingerprint_sees_values_that_change_places(dit: l2c.DiT) -> None:
    fingerprint(dit)
    table = dit.y_embedder.embedding_table.weight
    with torch.no_grad():
        table[[0, 1]] = table[[1, 0]]  # the same sum and norm, another model
    fresh = tiny_dit()
    fresh.load_state_dict(dit.state_dict())
    assert fingerprint(dit) == fingerprint(fresh)


def test_check_refuses_what_is_no_backbone(router: l2c.Router) -> None:
    with pytest.raises(ValueError, match="expected DiT, got Linear"):
        router.check(torch.nn.Linear(2, 2))


def test_identity_is_plain(dit: l2c.DiT) -> None:
    identity = Identity.of(dit)
    assert identity.backbone == "DiT"
    assert identity.config == dit.config
    assert identity.differences(identity) == []


def test_unsaturated_counts_gated_scores_alone(router: l2c.Router) -> None:
    scores = torch.full((6, 6), 0.5)
    scores[router.gated] = 0.99
    scores[1, :3] = 0.5
    changed = dataclasses.replace(router, scores=scores)
    assert changed.unsaturated == pytest.approx(3 / 18)
