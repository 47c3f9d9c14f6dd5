"""Execution of plans: exact, counted, restored, and sealed between generations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import l2c
from l2c.dit import modulate
from l2c.sampling import initial_latents
from tests.conftest import tiny_dit
from train.gates import gated

ROWS = 6


def random_plan(model: l2c.DiT, seed: int = 0, rows: int = ROWS) -> l2c.Plan:
    """Half of everything reused, at random: reuse spans several evaluations."""
    sites = l2c.sites(model)
    table = torch.rand(rows, len(sites), generator=torch.Generator().manual_seed(seed)) < 0.5
    table[0] = True
    return l2c.Plan.of(table, sites)


def inputs(batch: int = 2, rows: int = ROWS) -> list[tuple[Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(batch, 3, 8, 8, generator=g),
            torch.full((batch,), 900 - 100 * row),
            torch.arange(batch),
        )
        for row in range(rows)
    ]


def run(model: l2c.DiT, plan: l2c.Plan | None, batch: int = 2) -> list[Tensor]:
    if plan is None:
        return [model(*given) for given in inputs(batch)]
    with l2c.cached(model, plan):
        return [model(*given) for given in inputs(batch)]


def attributes(model: torch.nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_hand(model: l2c.DiT, plan: l2c.Plan) -> list[Tensor]:
    """The DiT written out, with a cache of its own."""
    kept: dict[tuple[int, str], Tensor] = {}
    results = []
    for row, (x, t, y) in enumerate(inputs()):
        h = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)
        for i, block in enumerate(model.blocks):
            s1, k1, g1, s2, k2, g2 = block.adaLN_modulation(c).chunk(6, dim=1)
            if plan.compute[row][2 * i]:
                kept[i, "attn"] = block.attn(modulate(block.norm1(h), s1, k1))
            h = h + g1[:, None] * kept[i, "attn"]
            if plan.compute[row][2 * i + 1]:
                kept[i, "mlp"] = block.mlp(modulate(block.norm2(h), s2, k2))
            h = h + g2[:, None] * kept[i, "mlp"]
        results.append(model.unpatchify(model.final_layer(h, c)))
    return results


@contextmanager
def counting(model: l2c.DiT) -> Iterator[list[int]]:
    """Count the calls of every attention and MLP module."""
    calls = [0] * 6
    handles = []
    for i, block in enumerate(model.blocks):
        for k, module in ((0, block.attn), (1, block.mlp)):

            def count(*_: Any, site: int = 2 * i + k) -> None:
                calls[site] += 1

            handles.append(module.register_forward_hook(count))
    yield calls
    for handle in handles:
        handle.remove()


def test_computing_everything_is_bit_identical(dit: l2c.DiT) -> None:
    assert equal(run(dit, l2c.Plan.full(ROWS, l2c.sites(dit))), run(dit, None))


@pytest.mark.parametrize("seed", range(3))
def test_reuse_equals_a_loop_written_by_hand(dit: l2c.DiT, seed: int) -> None:
    plan = random_plan(dit, seed)
    cached = run(dit, plan)
    assert equal(cached, by_hand(dit, plan))
    assert not equal(cached, run(dit, None))


@pytest.mark.parametrize("seed", range(3))
def test_training_gate_at_0_and_1_is_bit_identical_to_the_executor(dit: l2c.DiT, seed: int) -> None:
    plan = random_plan(dit, seed)
    outputs: dict[int, Tensor] = {}
    results = []
    for row, given in enumerate(inputs()):
        weights = torch.tensor(plan.compute[row], dtype=torch.float32) if row else None
        with gated(dit, outputs, weights):
            results.append(dit(*given))
    assert equal(results, run(dit, plan))


def test_runs_exactly_what_is_planned(dit: l2c.DiT) -> None:
    plan = random_plan(dit)
    with counting(dit) as calls:
        run(dit, plan)
    assert calls == [sum(row[site] for row in plan.compute) for site in range(6)]


def test_a_reused_site_runs_nothing_of_its_own(dit: l2c.DiT) -> None:
    norms = []
    handles = [
        norm.register_forward_hook(lambda *_: norms.append(1))
        for block in dit.blocks
        for norm in (block.norm1, block.norm2)
    ]
    run(dit, l2c.Plan.every(2, ROWS, l2c.sites(dit)))
    for handle in handles:
        handle.remove()
    assert len(norms) == ROWS // 2 * 6


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_afterwards(dit: l2c.DiT, fails: bool) -> None:
    before, plain = attributes(dit), run(dit, None)
    with pytest.raises(RuntimeError, match="stop"), l2c.cached(dit, random_plan(dit)) as cache:
        for row, given in enumerate(inputs()):
            if fails and row == 3:
                handle = dit.final_layer.register_forward_pre_hook(stop)
                try:
                    dit(*given)
                finally:
                    handle.remove()
            dit(*given)
        raise RuntimeError("stop")
    assert not cache.outputs
    assert attributes(dit) == before
    assert equal(run(dit, None), plain)


def stop(*_: Any) -> None:
    raise RuntimeError("stop")


def test_an_interrupted_evaluation_needs_a_reset(dit: l2c.DiT) -> None:
    plan = l2c.Plan.every(2, ROWS, l2c.sites(dit))
    fresh = run(dit, plan)
    with l2c.cached(dit, plan) as cache:
        dit(*inputs()[0])
        dit(*inputs()[1])
        handle = dit.blocks[1].attn.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            dit(*inputs()[2])
        handle.remove()
        with pytest.raises(ValueError, match=r"evaluation 2 .* interrupted.*reset"):
            dit(*inputs()[3])
        cache.reset()
        assert equal([dit(*given) for given in inputs()], fresh)


def test_a_call_too_many_is_refused(dit: l2c.DiT) -> None:
    with l2c.cached(dit, random_plan(dit)) as cache:
        results = [dit(*given) for given in inputs()]
        with pytest.raises(ValueError, match=r"plan has 6 evaluations.*reset"):
            dit(*inputs()[0])
        cache.reset()
        assert equal([dit(*given) for given in inputs()], results)


def test_another_batch_size_is_another_generation(dit: l2c.DiT) -> None:
    plan = random_plan(dit)
    with l2c.cached(dit, plan) as cache:
        dit(*inputs(2)[0])
        with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*got \(3, 3, 8, 8\)"):
            dit(*inputs(3)[1])
        cache.reset()
        three = [dit(*given) for given in inputs(3)]
    assert equal(three, run(dit, plan, 3))
    assert equal(run(dit, plan, 2), run(dit, plan, 2))


def test_an_aborted_generation_leaves_nothing_to_the_next(dit: l2c.DiT) -> None:
    schedule, plan = l2c.Schedule.ddim(ROWS), random_plan(dit)
    noise = initial_latents(dit, 2, torch.Generator().manual_seed(0))
    expected = l2c.sample(dit, schedule, [1, 2], 1.5, plan=plan, latents=noise)

    def abort(row: int, *_: Any) -> None:
        if row == 3:
            raise RuntimeError("aborted")

    with pytest.raises(RuntimeError, match="aborted"):
        l2c.sample(dit, schedule, [3, 4], 1.5, plan=plan, latents=noise * 2, callback=abort)
    assert torch.equal(l2c.sample(dit, schedule, [1, 2], 1.5, plan=plan, latents=noise), expected)


def test_two_models_side_by_side_do_not_mix(dit: l2c.DiT) -> None:
    other = tiny_dit(seed=5)
    plan, other_plan = random_plan(dit, 1), random_plan(other, 2)
    expected, other_expected = run(dit, plan), run(other, other_plan)
    results, other_results = [], []
    with l2c.cached(dit, plan), l2c.cached(other, other_plan):
        for given in inputs():
            results.append(dit(*given))
            other_results.append(other(*given))
    assert equal(results, expected)
    assert equal(other_results, other_expected)


def test_nesting_is_refused_and_the_outer_goes_on(dit: l2c.DiT) -> None:
    plan = random_plan(dit)
    with l2c.cached(dit, plan):
        first = dit(*inputs()[0])
        with pytest.raises(ValueError, match="cached or recorded already"):
            l2c.cached(dit, plan).__enter__()
        rest = [dit(*given) for given in inputs()[1:]]
    assert equal([first, *rest], run(dit, plan))


def test_a_plan_of_another_model_is_refused(dit: l2c.DiT) -> None:
    deeper = tiny_dit(depth=4)
    with pytest.raises(ValueError, match=r"6 sites .*blocks\.2\.mlp.*8 sites.*blocks\.3\.mlp"):
        l2c.cached(dit, random_plan(deeper)).__enter__()
    assert "_l2c_attached" not in vars(dit)


def test_outputs_are_dropped_when_nothing_reads_them_again(dit: l2c.DiT) -> None:
    plan = random_plan(dit)
    with l2c.cached(dit, plan) as cache:
        for row, given in enumerate(inputs()):
            dit(*given)
            following = plan.compute[row + 1] if row + 1 < ROWS else (True,) * 6
            assert sorted(cache.outputs) == [i for i, c in enumerate(following) if not c]


def test_somebody_else_s_wrapper_survives(dit: l2c.DiT) -> None:
    original = dit.blocks[0].attention
    calls = []

    def theirs(*args: Tensor) -> Tensor:
        calls.append(1)
        return original(*args)

    dit.blocks[0].attention = theirs
    run(dit, l2c.Plan.every(2, ROWS, l2c.sites(dit)))
    assert len(calls) == ROWS // 2
    assert vars(dit.blocks[0])["attention"] is theirs


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_sampling_with_a_full_plan_is_bit_identical(dit: l2c.DiT, scale: float) -> None:
    schedule, full = l2c.Schedule.ddim(ROWS), l2c.Plan.full(ROWS, l2c.sites(dit))
    noise = initial_latents(dit, 3, torch.Generator().manual_seed(0))
    plain = l2c.sample(dit, schedule, [1, 2, 3], scale, latents=noise)
    assert torch.equal(l2c.sample(dit, schedule, [1, 2, 3], scale, plan=full, latents=noise), plain)


@pytest.mark.parametrize("rows", [0, 1, 3, ROWS])
def test_leaving_at_any_time_restores_the_model(dit: l2c.DiT, rows: int) -> None:
    before, plain = attributes(dit), run(dit, None)
    with l2c.cached(dit, l2c.Plan.every(ROWS, ROWS, l2c.sites(dit))) as cache:
        for given in inputs()[:rows]:
            dit(*given)
        assert len(cache.outputs) == (6 if 0 < rows < ROWS else 0)
    assert not cache.outputs
    assert attributes(dit) == before
    assert equal(run(dit, None), plain)


def test_a_refused_input_does_not_disturb_the_generation(dit: l2c.DiT) -> None:
    plan = random_plan(dit)
    with l2c.cached(dit, plan):
        first = dit(*inputs()[0])
        with pytest.raises(ValueError, match="inputs of shape"):
            dit(*inputs(3)[1])
        rest = [dit(*given) for given in inputs()[1:]]
    assert equal([first, *rest], run(dit, plan))
