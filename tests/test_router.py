"""Routers: thresholds, refusals, and the fingerprint of a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import l2c
from l2c.identity import Identity, fingerprint
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
