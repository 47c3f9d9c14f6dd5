"""Relaxations of gates against the formulas of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from train.relaxation import Relaxation


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distances(count: int = 2000) -> Tensor:
    return torch.randn(count, generator=generator(3)) * 3


# --- straight-through ---


def test_straight_through_is_exactly_hard_forward() -> None:
    at = distances()
    hard = torch.rand(len(at), generator=generator(4)) > 0.5  # whatever the distance is
    weights = Relaxation().weights(at, hard, 0.3, generator())
    # bit for bit: 1 - weight multiplies what is reused, and 6e-8 of it would be another sample
    assert torch.equal(weights, hard.float())


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_straight_through_has_the_sigmoids_gradient(progress: float) -> None:
    at = distances().requires_grad_()
    upstream = torch.randn(len(at), generator=generator(5))
    Relaxation(temperature=2.0, final=0.5).weights(
        at, at.detach() > 0, progress, generator()
    ).backward(upstream)
    t = 2.0 * 0.25**progress
    s = 1 / (1 + torch.exp(-at.detach().double() / t))
    expected = upstream.double() * s * (1 - s) / t
    # float32: 1 - s is good to 6e-8, times an upstream gradient of up to 4 and 1 / t = 2
    assert torch.allclose(at.grad.double(), expected, rtol=1e-4, atol=1e-6)


# --- sigmoid ---


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_sigmoid_is_soft_and_anneals_geometrically(progress: float) -> None:
    at = distances()
    found = Relaxation("sigmoid", temperature=1.6, final=0.1).weights(
        at, at > 0, progress, generator()
    )
    t = {0.0: 1.6, 0.25: 0.8, 1.0: 0.1}[progress]  # sixteen times colder in four halvings
    expected = 1 / (1 + torch.exp(-at.double() / t))
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-7)  # float32
    assert bool((found - (at > 0).float()).abs().max() > 0.05)


def test_the_colder_the_nearer_to_hard() -> None:
    at = distances()
    relaxation = Relaxation("sigmoid")
    away = [
        float((relaxation.weights(at, at > 0, p, generator()) - (at > 0).float()).abs().mean())
        for p in (0.0, 0.5, 1.0)
    ]
    assert away[0] > 1.5 * away[1] > 2 * away[2]


# --- hard-concrete ---


@pytest.mark.parametrize("logit", [-1.0, 0.0, 1.5])
def test_hard_concrete_has_the_published_mass_at_both_ends(logit: float) -> None:
    count, t = 40_000, 2 / 3
    at = torch.full((count,), logit)
    weights = Relaxation("hard-concrete", t, t).weights(at, at > 0, 0.0, generator(1))
    assert bool(((weights >= 0) & (weights <= 1)).all())

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    # Louizos et al. 2018, eq. 12 with gamma = -0.1 and zeta = 1.1, and the same for the other end
    closed = sigmoid(t * math.log(0.1 / 1.1) - logit)
    opened = sigmoid(logit + t * math.log(0.1 / 1.1))
    for end, expected in ((0.0, closed), (1.0, opened)):
        found = float((weights == end).double().mean())
        # four standard deviations of a share of so many draws
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    between = weights[(weights > 0) & (weights < 1)]
    assert len(between) > 0.3 * count
    assert float(between.std()) > 0.1


def test_hard_concrete_is_the_stretched_concrete_of_its_noise() -> None:
    at = distances().double()
    found = Relaxation("hard-concrete", 0.5, 0.5).weights(at, at > 0, 0.0, generator(2))
    u = torch.rand(at.shape, generator=generator(2)).double()
    concrete = 1 / (1 + torch.exp(-(torch.log(u / (1 - u)) + at) / 0.5))
    # the noise is drawn in float32, whose logarithms near u = 1 are good to 1e-3
    assert torch.allclose(found, (1.2 * concrete - 0.1).clamp(0, 1), atol=1e-3)


def test_hard_concrete_is_reproducible_by_its_generator() -> None:
    at = distances()
    relaxation = Relaxation("hard-concrete")
    one, same, other = (relaxation.weights(at, at > 0, 0.5, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_hard_concrete_has_a_gradient_between_the_ends_alone() -> None:
    at = distances().requires_grad_()
    weights = Relaxation("hard-concrete").weights(at, at > 0, 0.0, generator())
    weights.sum().backward()
    inside = (weights > 0) & (weights < 1)
    assert bool((at.grad[inside] > 0).all())
    assert not bool(at.grad[~inside].any())


@pytest.mark.parametrize("kind", ["straight-through", "sigmoid"])
def test_the_others_draw_no_noise(kind: str) -> None:
    at = distances()
    one, other = (Relaxation(kind).weights(at, at > 0, 0.5, generator(seed)) for seed in (0, 1))
    assert torch.equal(one, other)


# --- wrong ones ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "gumbel"}, "unknown relaxation 'gumbel'; known are straight-through"),
        ({"temperature": 0.0}, "temperatures above 0, got 0.0 and 0.2"),
        ({"final": -1.0}, "temperatures above 0, got 1.0 and -1.0"),
        ({"final": math.nan}, "temperatures above 0, got 1.0 and nan"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Relaxation(**settings)
