"""The trajectory objective against sampling, hand-written loops and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import l2c
from l2c.identity import Identity
from l2c.reuse import Mixture, Reuse, mixture, terms
from l2c.sampling import initial_latents
from l2c.solvers import solve
from tests.conftest import blocks_of, tiny_dit, tiny_uvit
from tests.fitting import lively_dit
from train.trajectory import Trajectory

NOISE = tiny_dit().noise
SCHEDULES = {
    "ddim": l2c.Schedule.ddim(6),
    "dpm_solver_2": l2c.Schedule.dpm_solver_2(6, noise=NOISE),
    "dpm_solver_pp_2m": l2c.Schedule.dpm_solver_pp_2m(6),
}
Batch = dict[str, Tensor]


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> l2c.Schedule:
    return SCHEDULES[request.param]


@pytest.fixture(params=[1.0, 1.5], ids=["unguided", "guided"])
def scale(request: pytest.FixtureRequest) -> float:
    return request.param


def batch_of(model: Any, count: int = 3, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    noise = initial_latents(model, count, g)
    latents = torch.randn(noise.shape, generator=g)
    return {"noise": noise, "latents": latents, "labels": torch.arange(count)}


def learned(order: int = 2, rows: int = 6, streams: int = 1, size: float = 0.2) -> Reuse:
    """A rule with random corrections and shifts."""
    g = torch.Generator().manual_seed(11)
    corrections = torch.randn(rows * streams, 6, order + 1, 32, generator=g) * size
    shift = torch.randn(rows * streams, 6, 32, generator=g) * size
    kind = "newton" if order else "copy"
    return Reuse(kind, order, corrections, shift, relative=streams == 2)


def numbers_of(rule: Reuse, streams: int = 1) -> Callable[[int, int, list[int]], Mixture]:
    return lambda row, site, sources: rule.mixture(row, site, sources, row // streams)


def opened(row: int) -> Tensor | None:
    """Everything is computed, by weights of one."""
    return torch.ones(6) if row else None


def gates(rows: int = 6, streams: int = 1, seed: int = 1) -> Tensor:
    """A random table with the first evaluation open and both kinds in every later one."""
    g = torch.Generator().manual_seed(seed)
    compute = torch.rand(rows * streams, 6, generator=g) > 0.6
    compute[:streams] = True
    compute[streams:, 1], compute[streams:, 4] = True, False
    return compute


def weights_of(compute: Tensor, streams: int = 1) -> Callable[[int], Tensor | None]:
    return lambda row: compute[row].float() if row >= streams else None


def routed(model: Any, schedule: l2c.Schedule, compute: Tensor, rule: Reuse, **more: Any) -> Any:
    """A router of which a table of gates is the plan."""
    streams = more.get("streams", 1)
    decided = torch.arange(len(compute)) >= streams
    scores = torch.where(compute, 0.9, 0.1)
    fields = (scores, decided, decided.long(), l2c.sites(model), schedule, Identity.of(model))
    return l2c.Router(*fields, reuse=rule, **more)


# --- the student ---


def test_student_with_open_gates_is_the_plain_sample(schedule: l2c.Schedule, scale: float) -> None:
    dit = lively_dit()
    batch = batch_of(dit)
    with torch.no_grad():
        student = Trajectory(guidance_scale=scale).student(
            dit, schedule, batch, opened, numbers_of(Reuse()), history=1
        )
    plain = l2c.sample(dit, schedule, batch["labels"], scale, latents=batch["noise"])
    # Not bit-equal: `sample` computes the conditioning of all evaluations in one product ahead of
    # the loop, whose sums may be in another order; float32 errors grow over six evaluations.
    assert torch.allclose(student, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    assert float(plain.std()) > 0.1


def test_student_with_open_gates_is_the_plain_loop_bit_for_bit(
    schedule: l2c.Schedule, scale: float
) -> None:
    dit = lively_dit()
    batch = batch_of(dit)
    null = torch.full_like(batch["labels"], dit.null_label)

    def predict(x: Tensor, t: float) -> Tensor:
        if scale == 1.0:
            return dit(x, torch.full((3,), t), batch["labels"])[:, :3]
        both = torch.cat([batch["labels"], null])
        cond, uncond = dit(torch.cat([x, x]), torch.full((6,), t), both)[:, :3].chunk(2)
        return uncond + scale * (cond - uncond)

    with torch.no_grad():
        expected = solve(schedule, batch["noise"], predict)
        for lazy in (True, False):
            student = Trajectory(guidance_scale=scale).student(
                dit, schedule, batch, opened, numbers_of(Reuse()), 1, lazy
            )
            assert torch.equal(student, expected)


@pytest.mark.parametrize("order", [0, 2], ids=["copy", "newton-2"])
def test_student_with_hard_gates_samples_by_the_plan(
    order: int, schedule: l2c.Schedule, scale: float, tmp_path: Any
) -> None:
    dit, rule, compute = tiny_dit(), learned(order), gates()
    batch = batch_of(dit)
    objective = Trajectory(guidance_scale=scale)
    with torch.no_grad():
        student = objective.student(
            dit, schedule, batch, weights_of(compute), numbers_of(rule), order + 1
        )
    router = routed(dit, schedule, compute, rule, guidance_scale=scale)
    router.save(tmp_path / "router.safetensors")
    plan = l2c.Router.load(tmp_path / "router.safetensors", dit).plan()
    assert torch.equal(torch.tensor(plan.compute), compute)
    labels = objective.labels(dit, batch["labels"])
    with torch.no_grad(), l2c.cached(dit, plan):
        exact = solve(schedule, batch["noise"], lambda x, t: objective.predict(dit, x, t, labels))
    assert torch.equal(student, exact)
    given = {"latents": batch["noise"], "plan": plan}
    sampled = l2c.sample(dit, schedule, batch["labels"], scale, **given)
    # conditioning in one product ahead of the loop, as above, and sums in another order
    assert torch.allclose(student, sampled, rtol=1e-4, atol=1e-4 * float(sampled.abs().max()))
    plain = l2c.sample(dit, schedule, batch["labels"], scale, latents=batch["noise"])
    assert not torch.allclose(student, plain, rtol=1e-2, atol=1e-2)


def test_student_of_two_streams_samples_by_the_plan(schedule: l2c.Schedule) -> None:
    dit, rule, compute = tiny_dit(), learned(streams=2), gates(streams=2)
    batch = batch_of(dit)
    with torch.no_grad():
        student = Trajectory(streams=2).student(
            dit, schedule, batch, weights_of(compute, 2), numbers_of(rule, 2), 3
        )
    plan = routed(dit, schedule, compute, rule, guidance_scale=1.5, streams=2).plan()
    null = torch.full_like(batch["labels"], dit.null_label)

    def predict(x: Tensor, t: float) -> Tensor:
        times = torch.full((3,), t)
        cond, uncond = (dit(x, times, labels)[:, :3] for labels in (batch["labels"], null))
        return uncond + 1.5 * (cond - uncond)

    with torch.no_grad(), l2c.cached(dit, plan, 2):
        assert torch.equal(student, solve(schedule, batch["noise"], predict))
    given = {"latents": batch["noise"], "plan": plan, "guidance_calls": 2}
    sampled = l2c.sample(dit, schedule, batch["labels"], 1.5, **given)
    # conditioning in one product ahead of the loop, as above, and sums in another order
    assert torch.allclose(student, sampled, rtol=1e-4, atol=1e-4 * float(sampled.abs().max()))


def test_student_walks_a_uvit_too() -> None:
    uvit, rule, compute = tiny_uvit(), learned(), gates()
    schedule = l2c.Schedule.dpm_solver_2(6, noise=uvit.noise)
    batch, objective = batch_of(uvit), Trajectory()
    with torch.no_grad():
        student = objective.student(uvit, schedule, batch, weights_of(compute), numbers_of(rule), 3)
    plan = routed(uvit, schedule, compute, rule).plan()
    labels = objective.labels(uvit, batch["labels"])
    with torch.no_grad(), l2c.cached(uvit, plan):
        exact = solve(schedule, batch["noise"], lambda x, t: objective.predict(uvit, x, t, labels))
    assert torch.equal(student, exact)
    sampled = l2c.sample(uvit, schedule, batch["labels"], 1.5, latents=batch["noise"], plan=plan)
    # sampling may add up what is reused in another order
    assert torch.allclose(student, sampled, rtol=1e-4, atol=1e-4 * float(sampled.abs().max()))


def calls_of(model: Any, run: Callable[[], Any]) -> int:
    """How many sub-layers are computed."""
    count = 0

    def note(*_: object) -> None:
        nonlocal count
        count += 1

    layers = [layer for block in blocks_of(model) for layer in (block.attn, block.mlp)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return count


@pytest.mark.parametrize("streams", [1, 2])
def test_lazy_or_not_is_the_same_sample(schedule: l2c.Schedule, streams: int) -> None:
    dit, rule, compute = tiny_dit(), learned(streams=streams), gates(streams=streams)
    batch = batch_of(dit)
    samples = []

    def student(lazy: bool) -> None:
        objective = Trajectory(streams=streams)
        weights, numbers = weights_of(compute, streams), numbers_of(rule, streams)
        samples.append(objective.student(dit, schedule, batch, weights, numbers, 3, lazy))

    with torch.no_grad():
        assert calls_of(dit, lambda: student(True)) == int(compute.sum())
        assert calls_of(dit, lambda: student(False)) == compute.numel()
    assert torch.equal(*samples)


def test_the_guided_student_needs_a_null_class() -> None:
    dit = tiny_dit(null_class=False)
    batch = batch_of(dit)
    given = (dit, SCHEDULES["ddim"], batch, opened, numbers_of(Reuse()), 1)
    with pytest.raises(ValueError, match=r"guidance_scale 1\.5 needs a model with a null class"):
        Trajectory(guidance_scale=1.5).student(*given)
    with torch.no_grad():
        assert Trajectory(guidance_scale=1.0).student(*given).shape == (3, 3, 8, 8)


# --- gradients ---


class Leaves:
    """Corrections, shift and logits that a loss is differentiated by."""

    def __init__(self, streams: int = 1) -> None:
        rule = learned(streams=streams, size=0.05)
        g = torch.Generator().manual_seed(5)
        self.streams = streams
        self.corrections = rule.corrections.clone().requires_grad_()
        self.shift = rule.shift.clone().requires_grad_()
        self.logits = torch.randn(6 * streams, 6, generator=g).requires_grad_()
        self.rule = rule

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("corrections", "shift", "logits")
        return {name: getattr(self, name) for name in names}

    def numbers(self, row: int, site: int, sources: list[int]) -> Mixture:
        learned = (self.corrections[row, site], self.shift[row, site])
        return mixture(self.rule.kind, row // self.streams, sources, *learned)

    def weights(self, row: int) -> Tensor | None:
        return self.logits[row].sigmoid() if row >= self.streams else None


def loss_of(objective: Trajectory, leaves: Leaves, model: Any, schedule: Any) -> Tensor:
    batch = batch_of(model)
    dtype = next(model.parameters()).dtype
    batch |= {name: batch[name].to(dtype) for name in ("noise", "latents")}
    given = (model, schedule, batch, leaves.weights, leaves.numbers, 3)
    final = objective.student(*given, lazy=False)
    return (final - batch["latents"]).square().mean()


@pytest.mark.parametrize("streams", [1, 2])
def test_gradients_agree_with_finite_differences(streams: int, schedule: l2c.Schedule) -> None:
    dit = tiny_dit().double()
    objective = Trajectory(streams=streams)
    leaves = Leaves(streams)
    loss_of(objective, leaves, dit, schedule).backward()
    g = torch.Generator().manual_seed(9)
    for name, leaf in leaves.tensors.items():
        gradient = leaf.grad
        assert not bool(gradient[:streams].any())  # in the first evaluation nothing is reused
        rows = gradient[streams:].flatten(1).abs().max(1).values
        assert bool((rows > 0).all()), name
        # along the gradient, and along one that is turned from it by a random half of it
        mask = torch.rand(leaf.shape, generator=g) > 0.5
        for direction in (gradient, gradient * mask):
            unit = direction / direction.norm()
            step = 0.03
            with torch.no_grad():
                values = []
                for sign in (1, -1):
                    leaf.add_(unit, alpha=sign * step)
                    values.append(float(loss_of(objective, leaves, dit, schedule)))
                    leaf.sub_(unit, alpha=sign * step)
            numeric = (values[0] - values[1]) / (2 * step)
            expected = float((gradient * unit).sum())
            # The model is in float64, but what it predicts is rounded to float32, and so are the
            # leaves: 1e-7 of losses in the thousands. Differences also err by the third derivative.
            assert numeric == pytest.approx(expected, rel=0.02), name


def test_gradient_does_not_reach_the_backbone_or_the_data(schedule: l2c.Schedule) -> None:
    dit, leaves = tiny_dit(), Leaves()
    batch = batch_of(dit)
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    for loss in ("final", "steps"):
        given = (dit, schedule, batch, leaves.weights, leaves.numbers, 3)
        if loss == "final":
            Trajectory().student(*given, lazy=False).square().mean().backward()
        else:
            for part in Trajectory("steps").steps(*given, lazy=False):
                part.backward()
        assert all(leaf.grad is not None for leaf in leaves.tensors.values())
    assert all(parameter.grad is None for parameter in dit.parameters())
    assert all(value.grad is None for value in batch.values())
    assert all(torch.equal(before[name], value) for name, value in dit.state_dict().items())


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("lazy", [True, False])
def test_checkpointing_changes_neither_loss_nor_gradients(
    lazy: bool, streams: int, schedule: l2c.Schedule
) -> None:
    dit, compute = tiny_dit(), gates(streams=streams)
    batch = batch_of(dit)
    found, calls = [], []
    for checkpointing in (False, True):
        objective = Trajectory(checkpointing=checkpointing, streams=streams)
        leaves = Leaves(streams)
        weights = weights_of(compute, streams) if lazy else leaves.weights

        def step(
            objective: Trajectory = objective, leaves: Leaves = leaves, weights: Any = weights
        ) -> None:
            final = objective.student(dit, schedule, batch, weights, leaves.numbers, 3, lazy)
            loss = (final - batch["latents"]).square().mean()
            loss.backward()
            grads = {k: v.grad for k, v in leaves.tensors.items() if v.grad is not None}
            found.append({"loss": loss.detach(), **grads})

        calls.append(calls_of(dit, step))
    assert calls[0] < calls[1] <= 2 * calls[0]  # one more forward pass
    assert found[0].keys() == found[1].keys()
    assert found[0].keys() >= {"loss", "corrections", "shift"}
    assert ("logits" in found[0]) == (not lazy)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name  # the same arithmetic, done twice


# --- the error of each evaluation ---


def errors_by_hand(
    model: Any, schedule: l2c.Schedule, batch: Batch, leaves: Leaves, scale: float
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Errors and gradients of each evaluation, written out for DDIM and one stream."""
    labels = batch["labels"]
    both = torch.cat([labels, torch.full_like(labels, model.null_label)])
    layers = [(block, name) for block in blocks_of(model) for name in ("attention", "feedforward")]
    x, history, found = batch["noise"], [[] for _ in layers], []

    def guided(x: Tensor, t: float) -> Tensor:
        out = model(torch.cat([x, x]), torch.full((len(both),), t), both)[:, :3]
        cond, uncond = out.chunk(2)
        return uncond + scale * (cond - uncond)

    for row, t in enumerate(schedule.timesteps):
        target = guided(x, t).detach()

        def mixed(index: int, original: Any, row: int = row) -> Any:
            def run(*args: Any) -> Tensor:
                fresh = original(*args)
                if row:
                    w = leaves.logits[row, index].sigmoid()
                    kept = history[index]
                    table = terms("newton", row, [source for source, _ in kept])
                    reused = leaves.shift[row, index]
                    for i, term in enumerate(table):
                        predicted = sum(c * out for c, (_, out) in zip(term, kept, strict=True))
                        reused = reused + (1 + leaves.corrections[row, index, i]) * predicted
                    fresh = w * fresh + (1 - w) * reused
                history[index] = [(row, fresh.detach()), *history[index]][:3]
                return fresh

            return run

        for index, (block, name) in enumerate(layers):
            block.__dict__[name] = mixed(index, getattr(block, name))
        prediction = guided(x, t)
        for block, name in layers:
            del block.__dict__[name]
        if row:
            for leaf in leaves.tensors.values():
                leaf.grad = None
            error = (prediction - target).square().mean()
            (error / len(schedule)).backward()
            grads = {name: leaf.grad.clone() for name, leaf in leaves.tensors.items()}
            found.append((error.detach(), grads))
        x, eps = x.detach(), prediction.detach()
        acp = schedule.noise.acp(t)
        after = schedule.noise.acp(schedule.timesteps[row + 1]) if row < 5 else 1.0
        clean = (x - (1 - acp) ** 0.5 * eps) / acp**0.5
        x = after**0.5 * clean + (1 - after) ** 0.5 * eps
    return found


@pytest.mark.parametrize("weighted", [False, True])
def test_steps_are_the_errors_of_a_hand_written_loop(weighted: bool) -> None:
    dit, schedule = tiny_dit(), SCHEDULES["ddim"]
    batch = batch_of(dit)
    by_hand = errors_by_hand(dit, schedule, batch, Leaves(), 1.5)
    importance = torch.tensor([9.0, 0.5, 2.0, 1.0, 0.25, 3.0]) if weighted else None
    leaves = Leaves()
    given = (dit, schedule, batch, leaves.weights, leaves.numbers, 3, importance)
    parts = 0
    for (error, expected), part in zip(
        by_hand, Trajectory("steps").steps(*given, lazy=False), strict=True
    ):
        parts += 1
        scale = float(importance[parts]) if weighted else 1.0
        # the same operations but for the order of the corrections' products, in float32
        assert part.item() == pytest.approx(scale * float(error) / 6, rel=1e-4)
        for leaf in leaves.tensors.values():
            leaf.grad = None
        part.backward()
        for name, leaf in leaves.tensors.items():
            largest = float(expected[name].abs().max())
            assert largest > 0
            assert torch.allclose(
                leaf.grad, scale * expected[name], rtol=1e-3, atol=1e-4 * scale * largest
            )
            others = [row for row in range(6) if row != parts]
            assert not bool(leaf.grad[others].any())  # it stops between evaluations
    assert parts == 5  # in the first evaluation nothing is reused


def test_steps_of_open_gates_have_no_error(schedule: l2c.Schedule) -> None:
    dit, leaves = tiny_dit(), Leaves()

    def weights(row: int) -> Tensor | None:
        return (leaves.logits[row] * 0 + 1) if row else None

    given = (dit, schedule, batch_of(dit), weights, leaves.numbers, 3)
    assert [part.item() for part in Trajectory("steps").steps(*given, lazy=False)] == [0.0] * 5


def test_steps_of_two_streams_compare_with_the_plain_guided_prediction() -> None:
    dit, schedule = tiny_dit(), SCHEDULES["ddim"]
    batch, leaves, objective = batch_of(dit), Leaves(2), Trajectory("steps", streams=2)
    compute = torch.ones(12, 6)
    compute[2:4] = 0  # evaluation 1 reuses everything
    given = (dit, schedule, batch, weights_of(compute, 2), leaves.numbers, 3)
    (part,) = objective.steps(*given)

    labels = batch["labels"]
    null = torch.full_like(labels, dit.null_label)

    def guided(x: Tensor, t: float) -> Tensor:
        times = torch.full((3,), t)
        cond, uncond = (dit(x, times, part)[:, :3] for part in (labels, null))
        return uncond + 1.5 * (cond - uncond)

    plan = l2c.Plan.of(compute, l2c.sites(dit), leaves.rule, 2)
    first, second = schedule.timesteps[:2]
    with torch.no_grad():
        with l2c.cached(dit, plan, 2):
            eps = guided(batch["noise"], first)
            a, b = (schedule.noise.acp(t) for t in (first, second))
            clean = (batch["noise"] - (1 - a) ** 0.5 * eps) / a**0.5
            x = b**0.5 * clean + (1 - b) ** 0.5 * eps
            student = guided(x, second)
        expected = float((student - guided(x, second)).square().mean()) / 6
    assert expected > 0
    # float32: the plain prediction is made in one batch there and in two calls here
    assert part.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("streams", [1, 2])
def test_importance_is_how_much_a_full_evaluation_changes_the_sample(
    streams: int, schedule: l2c.Schedule
) -> None:
    dit, rule, compute = tiny_dit(), learned(streams=streams), gates(streams=streams)
    compute[3 * streams : 4 * streams] = True  # this one is full already
    batch = batch_of(dit)
    objective = Trajectory("steps", streams=streams, error_proxy=1)
    given = (dit, schedule, batch)
    found = objective.importance(*given, weights_of(compute, streams), numbers_of(rule, streams), 3)

    def sampled(table: Tensor) -> Tensor:
        plan = l2c.Plan.of(table, l2c.sites(dit), rule, streams)
        return l2c.sample(
            dit, schedule, batch["labels"], 1.5, latents=batch["noise"], plan=plan,
            guidance_calls=streams,
        )  # fmt: skip

    plain, changes = sampled(compute), []
    for row in range(6):
        table = compute.clone()
        table[row * streams : (row + 1) * streams] = True
        changes.append((sampled(table) - plain).square().mean())
    expected = torch.stack(changes)
    assert expected[0] == expected[3] == 0
    expected = expected / expected[expected > 0].mean()
    assert found[0] == found[3] == 0
    # samples are equal up to rounding, as above, and these are their differences
    assert torch.allclose(found, expected, rtol=1e-2, atol=1e-4)
    assert float(found[found > 0].mean()) == pytest.approx(1, rel=1e-5)  # float32
    assert float(found.max()) > 2 * float(found[found > 0].min())


def test_importance_of_a_plan_that_computes_everything_is_zero() -> None:
    dit = tiny_dit()
    given = (dit, SCHEDULES["ddim"], batch_of(dit), opened, numbers_of(Reuse()), 1)
    assert Trajectory("steps").importance(*given).tolist() == [0.0] * 6


# --- wrong ones ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "last"}, 'loss must be "final" or "steps", got \'last\''),
        ({"error_proxy": 5}, 'error_proxy >= 0, and 0 with loss "final", got 5'),
        ({"loss": "steps", "error_proxy": -1}, "error_proxy >= 0"),
        ({"streams": 3}, "expected streams 1, or 2"),
        ({"streams": 2, "guidance_scale": 1.0}, "2 with a guidance_scale other than 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectory(**settings)
