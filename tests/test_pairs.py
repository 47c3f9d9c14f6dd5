"""The objective of pairs: which evaluations are gated, and the loss against one written here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import l2c
from tests.fitting import lively_dit
from train.pairs import PairLoss, Pairs
from train.seeding import generator

Batch = dict[str, Tensor]


@pytest.fixture
def dit() -> l2c.DiT:
    return lively_dit()


def batch(size: int = 5, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(size, 3, 8, 8, generator=g)
    return {"latents": latents, "labels": torch.arange(size) % 10}


def scores(seed: int = 0) -> Callable[[int], Tensor]:
    """Random weights in (0, 1) for each evaluation."""

    def of(row: int) -> Tensor:
        return torch.rand(6, generator=torch.Generator().manual_seed(100 * seed + row))

    return of


# --- which evaluations are gated ---


def counted_from_the_last(evaluations: int) -> list[bool]:
    """Algorithm 1: 2t + 1 computes everything, 2t reuses; 0 is the last evaluation."""
    rows = []
    for original in reversed(range(evaluations)):
        has_partner = original + 1 < evaluations
        rows.append(original % 2 == 0 and has_partner)
    return rows


@pytest.mark.parametrize("evaluations", [2, 3, 4, 5, 6, 7, 20, 21, 50])
def test_every_second_evaluation_is_gated_counted_from_the_last(evaluations: int) -> None:
    gated = Pairs().gated(l2c.Schedule.ddim(evaluations))
    assert gated.dtype == torch.bool
    assert gated.tolist() == counted_from_the_last(evaluations)


def test_with_an_even_number_the_odd_evaluations_are_gated() -> None:
    gated = Pairs().gated(l2c.Schedule.ddim(6))
    assert gated.nonzero().flatten().tolist() == [1, 3, 5]


def test_with_an_odd_number_the_first_two_evaluations_differ_in_role() -> None:
    gated = Pairs().gated(l2c.Schedule.ddim(7))
    assert gated.nonzero().flatten().tolist() == [2, 4, 6]


def test_a_single_evaluation_has_no_pair() -> None:
    with pytest.raises(ValueError, match="at least 2 evaluations"):
        Pairs().gated(l2c.Schedule.ddim(1))


def test_schedules_of_other_solvers_are_refused() -> None:
    with pytest.raises(ValueError, match="for ddim, got a schedule of euler"):
        Pairs().gated(l2c.Schedule("euler", (999, 500, 0)))


@pytest.mark.parametrize("settings", [{"penalty": -1.0}, {"label_dropout": 1.1}])
def test_settings_without_meaning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"penalty >= 0 and label_dropout in \[0, 1\]"):
        Pairs(**settings)


# --- the loss, written again ---


def forward(
    model: l2c.DiT,
    x: Tensor,
    t: int,
    labels: Tensor,
    stale: list[Tensor] | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """A DiT evaluated block by block; each sub-layer is mixed before its gate (L2C, eq. 6)."""
    used: list[Tensor] = []

    def mixed(fresh: Tensor) -> Tensor:
        if stale is not None and weights is not None:
            w = weights[len(used)]
            fresh = w * fresh + (1 - w) * stale[len(used)]
        used.append(fresh)
        return fresh

    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(torch.full((len(x),), t)) + model.y_embedder(labels)
    for i in range(len(model.blocks)):
        block = model.blocks[i]
        parts = [part[:, None] for part in block.adaLN_modulation(c).chunk(6, dim=1)]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        tokens = tokens + gate_a * mixed(block.attn(block.norm1(tokens) * (1 + scale_a) + shift_a))
        tokens = tokens + gate_m * mixed(block.mlp(block.norm2(tokens) * (1 + scale_m) + shift_m))
    return model.unpatchify(model.final_layer(tokens, c)), used


def acp(timestep: int) -> Tensor:
    """Products of 1 - beta for DiT's linear betas, in float64."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return (1 - beta).cumprod(0)[timestep]


def expected_loss(
    model: l2c.DiT,
    schedule: l2c.Schedule,
    weights: Tensor,
    given: Batch,
    row: int,
    noise: Tensor,
    labels: Tensor,
) -> Tensor:
    full, cached = schedule.timesteps[row - 1], schedule.timesteps[row]
    a, b = acp(full), acp(cached)
    with torch.no_grad():
        noisy = (a.sqrt() * given["latents"] + (1 - a).sqrt() * noise).float()
        predicted, outputs = forward(model, noisy, full, labels)
        eps = predicted[:, :3]
        clean = (noisy - (1 - a).sqrt() * eps) / a.sqrt()
        x = (b.sqrt() * clean + (1 - b).sqrt() * eps).float()
        target, _ = forward(model, x, cached, labels)
    student, _ = forward(model, x, cached, labels, outputs, weights)
    return ((student - target) ** 2).mean()


def draws(given: Batch, dropout: float, seed: int) -> tuple[int, Tensor, Tensor]:
    """The pair, noise and labels that a generator gives: in this order, on the CPU."""
    g = generator(seed)
    pair = int(torch.randint(3, (), generator=g))
    noise = torch.randn(given["latents"].shape, generator=g)
    dropped = torch.rand(len(given["labels"]), generator=g) < dropout
    return 1 + 2 * pair, noise, torch.where(dropped, 10, given["labels"])


def loss_of(
    model: l2c.DiT, objective: Pairs, seed: int = 0, row: int | None = None, weights: int = 0
) -> PairLoss:
    schedule = l2c.Schedule.ddim(6)
    return objective.loss(model, schedule, scores(weights), batch(), generator(seed), row)


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_equals_one_written_block_by_block(
    dit: l2c.DiT, schedule: l2c.Schedule, dropout: float, seed: int
) -> None:
    loss = loss_of(dit, Pairs(penalty=0.01, label_dropout=dropout), seed)
    row, noise, labels = draws(batch(), dropout, seed)
    weights = scores()(row)
    expected = expected_loss(dit, schedule, weights, batch(), row, noise, labels)
    assert loss.row == row
    assert float(expected) > 0.01
    # float32: this file's arithmetic is written, and may be rounded, in another order
    assert torch.allclose(loss.error, expected, rtol=1e-4, atol=0)
    assert torch.equal(loss.penalty, 0.01 * weights.sum())
    assert torch.equal(loss.total, loss.error + loss.penalty)


def test_all_pairs_are_drawn(dit: l2c.DiT) -> None:
    rows = [loss_of(dit, Pairs(), seed).row for seed in range(12)]
    assert set(rows) == {1, 3, 5}


def test_a_given_row_keeps_noise_and_labels(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    objective = Pairs(label_dropout=0.5)
    _, noise, labels = draws(batch(), 0.5, seed=0)
    for row in (1, 3, 5):
        loss = loss_of(dit, objective, row=row)
        expected = expected_loss(dit, schedule, scores()(row), batch(), row, noise, labels)
        assert loss.row == row
        # float32: this file's arithmetic is written, and may be rounded, in another order
        assert torch.allclose(loss.error, expected, rtol=1e-4, atol=0)


def test_the_predicted_variance_counts(dit: l2c.DiT) -> None:
    changed = lively_dit()
    with torch.no_grad():
        # the rows of the projection to a patch: channel last, the variance's are 3, 4, 5
        rows = torch.arange(24) % 6 >= 3
        changed.final_layer.linear.weight[rows] *= 2
        changed.final_layer.linear.bias[rows] *= 2
    assert float(loss_of(changed, Pairs()).error) > 1.5 * float(loss_of(dit, Pairs()).error)


def test_open_gates_have_no_error_at_all(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    for row in (1, 3, 5):
        loss = Pairs(penalty=0.5).loss(
            dit, schedule, lambda _: torch.ones(6), batch(), generator(0), row
        )
        assert float(loss.error) == 0
        assert float(loss.penalty) == 3


def test_closed_gates_have_an_error_and_no_price(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    loss = Pairs(penalty=0.5).loss(dit, schedule, lambda _: torch.zeros(6), batch(), generator(0))
    assert float(loss.error) > 0
    assert float(loss.penalty) == 0


def test_without_a_null_class_no_label_is_dropped(schedule: l2c.Schedule) -> None:
    model = lively_dit(null_class=False)
    always = Pairs(label_dropout=1.0).loss(model, schedule, scores(), batch(), generator(0))
    never = Pairs(label_dropout=0.0).loss(model, schedule, scores(), batch(), generator(0))
    assert torch.equal(always.error, never.error)


def test_a_model_without_learned_variance_is_trained_too(schedule: l2c.Schedule) -> None:
    model = lively_dit(learn_sigma=False)
    loss = Pairs(label_dropout=0.0).loss(model, schedule, scores(), batch(), generator(0))
    row, noise, labels = draws(batch(), 0.0, 0)
    expected = expected_loss(model, schedule, scores()(row), batch(), row, noise, labels)
    # float32: this file's arithmetic is written, and may be rounded, in another order
    assert torch.allclose(loss.error, expected, rtol=1e-4, atol=0)


# --- gradients ---


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradient_reaches_every_logit_of_the_drawn_row_and_no_other(
    dit: l2c.DiT, schedule: l2c.Schedule, seed: int
) -> None:
    logits = {row: torch.zeros(6, requires_grad=True) for row in (1, 3, 5)}
    loss = Pairs(penalty=0.0).loss(
        dit, schedule, lambda row: logits[row].sigmoid(), batch(), generator(seed)
    )
    loss.total.backward()
    for row, values in logits.items():
        if row == loss.row:
            assert bool((values.grad != 0).all())
        else:
            assert values.grad is None
    assert all(parameter.grad is None for parameter in dit.parameters())


def test_gradient_equals_that_of_the_loss_written_here(
    dit: l2c.DiT, schedule: l2c.Schedule
) -> None:
    row, noise, labels = draws(batch(), 0.1, 0)
    mine, theirs = (torch.full((6,), 0.4, requires_grad=True) for _ in range(2))
    expected_loss(dit, schedule, mine, batch(), row, noise, labels).backward()
    Pairs(penalty=0.0).loss(dit, schedule, lambda _: theirs, batch(), generator(0)).total.backward()
    # float32: this file's arithmetic is written, and may be rounded, in another order
    assert torch.allclose(theirs.grad, mine.grad, rtol=1e-4, atol=1e-6)


def test_the_penalty_pushes_every_gate_equally(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    weights = torch.full((6,), 0.4, requires_grad=True)
    loss = Pairs(penalty=0.25).loss(dit, schedule, lambda _: weights, batch(), generator(0))
    (gradient,) = torch.autograd.grad(loss.penalty, weights)
    assert torch.equal(gradient, torch.full((6,), 0.25))
