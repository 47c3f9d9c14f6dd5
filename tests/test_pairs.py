"""The objective of pairs: which evaluations are gated, and the loss against one written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import l2c
from l2c.backbone import Backbone, sinusoidal
from l2c.solvers import solver
from tests.conftest import blocks_of
from tests.fitting import configuration, lively_dit, lively_uvit, run, write_latents
from train.pairs import Pair, PairLoss, Pairs
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


def test_schedules_of_unknown_solvers_are_refused(dit: l2c.DiT) -> None:
    euler = l2c.Schedule("euler", (999, 500, 0))
    with pytest.raises(ValueError, match="unknown solver 'euler'; known are ddim"):
        Pairs().draw(dit, euler, batch(), generator(0))


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


# --- two evaluations per step ---

UVIT = l2c.Noise.uvit()
SECOND_ORDER = [
    l2c.Schedule.dpm_solver_2(10),
    l2c.Schedule.dpm_solver_2(10, "log_snr", "noise"),
]


@pytest.mark.parametrize("evaluations", [4, 6, 20, 50])
def test_the_first_evaluation_of_every_step_but_the_first_is_gated(evaluations: int) -> None:
    gated = Pairs().gated(l2c.Schedule.dpm_solver_2(evaluations))
    assert gated.nonzero().flatten().tolist() == list(range(2, evaluations, 2))
    # the published counts: 9 of 20 and 24 of 50
    assert int(gated.sum()) == evaluations // 2 - 1


def test_what_is_gated_is_what_the_shifted_plan_reuses() -> None:
    schedule, sites = l2c.Schedule.dpm_solver_2(20), l2c.sites(lively_uvit())
    reused = [not any(row) for row in l2c.Plan.every(2, schedule, sites).compute]
    assert Pairs().gated(schedule).tolist() == reused


def test_a_single_step_of_two_evaluations_has_no_pair() -> None:
    with pytest.raises(ValueError, match="at least 4 evaluations of dpm_solver_2.*got 2"):
        Pairs().gated(l2c.Schedule.dpm_solver_2(2))


class Watched:
    """What a backbone was asked while a pair was drawn, and what its sub-layers gave."""

    def __init__(self, model: Backbone, schedule: l2c.Schedule, row: int, **options: Any) -> None:
        self.asked: list[tuple[Tensor, ...]] = []
        self.outputs: list[list[Tensor]] = []
        hooks = [model.register_forward_pre_hook(self._ask)]
        hooks += [
            layer.register_forward_hook(lambda _, __, out: self.outputs[-1].append(out))
            for block in blocks_of(model)
            for layer in (block.attn, block.mlp)
        ]
        objective = Pairs(**{"label_dropout": 0.5, **options})
        self.pair: Pair = objective.draw(model, schedule, batch(), generator(0), row)
        for hook in hooks:
            hook.remove()

    def _ask(self, _: Any, given: tuple[Tensor, ...]) -> None:
        self.asked.append(given)
        self.outputs.append([])


def kept(pair: Pair) -> dict[int, Tensor]:
    """The outputs to reuse; a pair keeps one of each site."""
    assert all(len(entries) == 1 for entries in pair.outputs.values())
    return {index: output for index, ((_, output),) in pair.outputs.items()}


@pytest.mark.parametrize("schedule", SECOND_ORDER, ids=str)
@pytest.mark.parametrize("row", [2, 4, 8])
def test_a_whole_step_leads_to_the_gated_evaluation(schedule: l2c.Schedule, row: int) -> None:
    model = lively_uvit()
    watched = Watched(model, schedule, row)
    (noisy, start, labels), (_, middle, same_labels) = watched.asked
    expected = torch.tensor(schedule.timesteps[row - 2 : row + 1], dtype=torch.float32)
    assert torch.equal(torch.stack([start[0], middle[0], watched.pair.inputs[1][0]]), expected)
    assert torch.equal(labels, same_labels)
    assert torch.equal(labels, watched.pair.inputs[2])
    assert set(labels.tolist()) > {10}

    g = generator(0)
    torch.randint(4, (), generator=g)
    noise = torch.randn(5, 3, 8, 8, generator=g)
    acp = UVIT.acp(float(start[0]))
    by_formula = acp**0.5 * batch()["latents"] + (1 - acp) ** 0.5 * noise
    # float32, and roots taken before or after rounding to it
    torch.testing.assert_close(noisy, by_formula, rtol=1e-5, atol=1e-6)

    steps = solver(schedule, noisy, row - 2)
    x, t = next(steps)
    with torch.no_grad():
        for _ in range(2):
            x, t = steps.send(model(x, torch.full((5,), t), labels))
    assert t == schedule.timesteps[row]
    assert torch.equal(watched.pair.inputs[0], x)
    assert not torch.equal(x, noisy)


@pytest.mark.parametrize("row", [2, 8])
def test_the_outputs_to_reuse_are_those_of_the_step_s_middle(row: int) -> None:
    watched = Watched(lively_uvit(), SECOND_ORDER[0], row)
    first, middle = watched.outputs
    assert sorted(watched.pair.outputs) == list(range(6))
    for index, output in kept(watched.pair).items():
        assert torch.equal(output, middle[index])
        assert not torch.equal(output, first[index])
        assert not output.requires_grad


def uvit_forward(
    model: l2c.UViT, at: tuple[Tensor, ...], stale: dict[int, Tensor], weights: Tensor
) -> Tensor:
    """A U-ViT of depth 2 evaluated block by block, its sub-layers mixed (L2C, eq. 6)."""
    x, t, labels = at
    time = sinusoidal(t, 32)[:, None]
    h = torch.cat([model.label_emb(labels)[:, None], time, model.patch_embed(x)], dim=1)
    h = skip = h + model.pos_embed
    for i, block in enumerate([model.in_blocks[0], model.mid_block, model.out_blocks[0]]):
        if i == 2:
            h = block.skip_linear(torch.cat([h, skip], dim=-1))
        for k, (norm, layer) in enumerate(((block.norm1, block.attn), (block.norm2, block.mlp))):
            w = weights[2 * i + k]
            h = h + w * layer(norm(h)) + (1 - w) * stale[2 * i + k]
        if i == 0:
            skip = h
    return model.unpatchify(model.decoder_pred(model.norm(h))[:, 2:])


@pytest.mark.parametrize("schedule", SECOND_ORDER, ids=str)
@pytest.mark.parametrize("row", [2, 6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_of_a_uvit_equals_one_written_block_by_block(
    schedule: l2c.Schedule, row: int, reduction: str
) -> None:
    model, weights = lively_uvit(), scores()(row)
    objective = Pairs(0.01, 0.5, reduction)
    loss = objective.loss(model, schedule, scores(), batch(), generator(0), row)
    pair = Watched(model, schedule, row).pair
    with torch.no_grad():
        target = model(*pair.inputs)
        squares = (uvit_forward(model, pair.inputs, kept(pair), weights) - target) ** 2
    expected = squares.mean() if reduction == "mean" else squares.sum(dim=(1, 2, 3)).mean()
    assert float(squares.mean()) > 1e-6
    # float32: this file's arithmetic is written, and may be rounded, in another order
    torch.testing.assert_close(loss.error, expected, rtol=1e-3, atol=0)
    assert torch.equal(loss.penalty, 0.01 * weights.sum())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_open_gates_of_a_uvit_have_no_error_and_closed_ones_no_price(weight: float) -> None:
    model = lively_uvit()
    for row in (2, 4, 6, 8):
        loss = Pairs(penalty=0.5).loss(
            model, SECOND_ORDER[0], lambda _: torch.full((6,), weight), batch(), generator(0), row
        )
        assert (float(loss.error) == 0) == (weight == 1)
        assert float(loss.penalty) == 3 * weight


def test_a_sum_is_so_many_means_as_a_sample_has_elements() -> None:
    model = lively_uvit(in_channels=4)
    given = {"latents": torch.randn(4, 4, 8, 8), "labels": torch.arange(4)}
    errors = [
        Pairs(reduction=reduction).loss(model, SECOND_ORDER[0], scores(), given, generator(0)).error
        for reduction in ("sum", "mean")
    ]
    assert float(errors[0]) == 4 * 8 * 8 * float(errors[1])  # a power of two, so exactly
    with pytest.raises(ValueError, match='"mean" or "sum", got \'max\''):
        Pairs(reduction="max")


# --- other solvers with one evaluation per step ---


@pytest.mark.parametrize("row", [1, 3, 5])
def test_a_pair_of_the_multistep_solver_begins_without_history(row: int) -> None:
    """Its first step from a noised sample is then one of DDIM."""
    model = lively_uvit()
    schedule = l2c.Schedule.dpm_solver_pp_2m(6, noise=UVIT)
    watched = Watched(model, schedule, row)
    ((noisy, t, labels),) = watched.asked
    assert t.tolist() == [schedule.timesteps[row - 1]] * 5
    with torch.no_grad():
        eps = model(noisy, t, labels)
    a, b = (UVIT.acp(s) for s in schedule.timesteps[row - 1 : row + 1])
    clean = (noisy - math.sqrt(1 - a) * eps) / math.sqrt(a)
    expected = math.sqrt(b) * clean + math.sqrt(1 - b) * eps
    # float32, and a step written in log-SNR
    torch.testing.assert_close(watched.pair.inputs[0], expected, rtol=1e-4, atol=1e-5)
    for index, output in kept(watched.pair).items():
        assert torch.equal(output, watched.outputs[0][index])


def test_a_pair_of_a_flow_is_a_step_along_the_velocity() -> None:
    model = lively_uvit()
    model.noise = l2c.Flow()
    schedule = l2c.Schedule.flow_euler(6, 2.0)
    assert Pairs().gated(schedule).nonzero().flatten().tolist() == [1, 3, 5]
    watched = Watched(model, schedule, 3)
    ((noisy, t, labels),) = watched.asked
    g = generator(0)
    torch.randint(3, (), generator=g)
    noise = torch.randn(5, 3, 8, 8, generator=g)
    s, after = (x / 1000 for x in schedule.timesteps[2:4])
    # float32
    torch.testing.assert_close(noisy, (1 - s) * batch()["latents"] + s * noise)
    with torch.no_grad():
        expected = noisy + (after - s) * model(noisy, t, labels)
    torch.testing.assert_close(watched.pair.inputs[0], expected)


# --- the router that comes out ---


def test_a_router_for_a_uvit_is_trained_exported_and_sampled_with(tmp_path: Path) -> None:
    model = lively_uvit()
    model.save_pretrained(tmp_path / "uvit")
    latents = write_latents(tmp_path / "latents")
    config = configuration(tmp_path / "run", tmp_path / "uvit", latents)
    config["model"]["init_args"] |= {
        "solver": "dpm_solver_2",
        "evaluations": 8,
        "threshold": 0.9,
        "clamp": None,
        "objective": {
            "class_path": "Pairs",
            "init_args": {"penalty": 0.1, "reduction": "sum"},
        },
    }
    run("fit", config, tmp_path / "run")
    router = l2c.Router.load(tmp_path / "run" / "router.safetensors", model)
    assert router.schedule == l2c.Schedule.dpm_solver_2(8)
    assert router.gated.nonzero().flatten().tolist() == [2, 4, 6]
    assert int(router.updates.sum()) == 12
    assert router.updates[~router.gated].sum() == 0
    plan = router.plan()
    assert all(all(plan.compute[row]) for row in (0, 1, 3, 5, 7))
    samples = [
        l2c.sample(model, router.schedule, [1, 2], 1.4, guidance_calls=calls, router=router)
        for calls in (1, 2)
    ]
    assert all(bool(x.isfinite().all()) for x in samples)
