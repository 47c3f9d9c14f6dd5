"""Execution of plans: exact, counted, restored, and sealed between generations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import l2c
from l2c.backbone import Backbone, sinusoidal
from l2c.cache import Cache
from l2c.dit import modulate
from l2c.sampling import initial_latents
from tests.conftest import blocks_of, tiny_dit
from train.gates import Outputs, gated

ROWS = 6


def random_plan(model: Backbone, seed: int = 0, rows: int = ROWS) -> l2c.Plan:
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


def run(model: Backbone, plan: l2c.Plan | None, batch: int = 2) -> list[Tensor]:
    if plan is None:
        return [model(*given) for given in inputs(batch)]
    with l2c.cached(model, plan):
        return [model(*given) for given in inputs(batch)]


def attributes(model: torch.nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_hand(model: Backbone, plan: l2c.Plan) -> list[Tensor]:
    """The model written out, with a cache of its own."""
    return dit_by_hand(model, plan) if isinstance(model, l2c.DiT) else uvit_by_hand(model, plan)


def uvit_by_hand(model: l2c.UViT, plan: l2c.Plan) -> list[Tensor]:
    kept: dict[tuple[int, str], Tensor] = {}
    results = []
    for row, (x, t, y) in enumerate(inputs()):
        time = sinusoidal(t, 32)[:, None]
        h = torch.cat([model.label_emb(y)[:, None], time, model.patch_embed(x)], dim=1)
        h = skip = h + model.pos_embed
        for i, block in enumerate([model.in_blocks[0], model.mid_block, model.out_blocks[0]]):
            if i == 2:
                h = block.skip_linear(torch.cat([h, skip], dim=-1))
            if plan.compute[row][2 * i]:
                kept[i, "attn"] = block.attn(block.norm1(h))
            h = h + kept[i, "attn"]
            if plan.compute[row][2 * i + 1]:
                kept[i, "mlp"] = block.mlp(block.norm2(h))
            h = h + kept[i, "mlp"]
            if i == 0:
                skip = h
        results.append(model.unpatchify(model.decoder_pred(model.norm(h))[:, 2:]))
    return results


def dit_by_hand(model: l2c.DiT, plan: l2c.Plan) -> list[Tensor]:
    kept: dict[tuple[int, str], Tensor] = {}
    results = []
    for row, (x, t, y) in enumerate(inputs()):
        h = model.x_embedder(x) + model.pos_embed
        c = model.t_embedder(t) + model.y_embedder(y)
        for i, block in enumerate(model.blocks):
            s1, k1, g1, s2, k2, g2 = block.adaLN_modulation(c).chunk(6, dim=1)
            if plan.compute[row][2 * i]:
                kept[i, "attn"] = block.attn(modulate(block.norm1(h), s1, k1))
            h = torch.addcmul(h, g1[:, None], kept[i, "attn"])
            if plan.compute[row][2 * i + 1]:
                kept[i, "mlp"] = block.mlp(modulate(block.norm2(h), s2, k2))
            h = torch.addcmul(h, g2[:, None], kept[i, "mlp"])
        results.append(model.unpatchify(model.final_layer(h, c)))
    return results


def held(cache: Cache) -> dict[int, list[int]]:
    """The evaluations whose outputs are kept for the next call, by site."""
    return {site: sorted(kept) for site, kept in sorted(cache.outputs.items()) if kept}


@contextmanager
def counting(model: Backbone) -> Iterator[list[int]]:
    """Count the calls of every attention and MLP module."""
    calls = [0] * 6
    handles = []
    for i, block in enumerate(blocks_of(model)):
        for k, module in ((0, block.attn), (1, block.mlp)):

            def count(*_: Any, site: int = 2 * i + k) -> None:
                calls[site] += 1

            handles.append(module.register_forward_hook(count))
    yield calls
    for handle in handles:
        handle.remove()


def test_computing_everything_is_bit_identical(backbone: Backbone) -> None:
    assert equal(run(backbone, l2c.Plan.full(ROWS, l2c.sites(backbone))), run(backbone, None))


@pytest.mark.parametrize("seed", range(3))
def test_reuse_equals_a_loop_written_by_hand(backbone: Backbone, seed: int) -> None:
    plan = random_plan(backbone, seed)
    cached = run(backbone, plan)
    assert equal(cached, by_hand(backbone, plan))
    assert not equal(cached, run(backbone, None))


@pytest.mark.parametrize("seed", range(3))
def test_training_gate_at_0_and_1_is_bit_identical_to_the_executor(
    backbone: Backbone, seed: int
) -> None:
    plan = random_plan(backbone, seed)
    outputs: Outputs = {}
    results = []
    for row, given in enumerate(inputs()):
        weights = torch.tensor(plan.compute[row], dtype=torch.float32) if row else None
        with gated(backbone, outputs, weights):
            results.append(backbone(*given))
    assert equal(results, run(backbone, plan))


def test_runs_exactly_what_is_planned(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    with counting(backbone) as calls:
        run(backbone, plan)
    assert calls == [sum(row[site] for row in plan.compute) for site in range(6)]


def test_skips_are_merged_in_every_evaluation(uvit: l2c.UViT) -> None:
    calls = []
    handle = uvit.out_blocks[0].skip_linear.register_forward_hook(lambda *_: calls.append(1))
    results = run(uvit, l2c.Plan.every(ROWS, ROWS, l2c.sites(uvit)))
    handle.remove()
    assert len(calls) == ROWS
    assert not any(torch.equal(a, b) for a, b in pairwise(results))


def test_a_reused_site_runs_nothing_of_its_own(backbone: Backbone) -> None:
    norms = []
    handles = [
        norm.register_forward_hook(lambda *_: norms.append(1))
        for block in blocks_of(backbone)
        for norm in (block.norm1, block.norm2)
    ]
    run(backbone, l2c.Plan.every(2, ROWS, l2c.sites(backbone)))
    for handle in handles:
        handle.remove()
    assert len(norms) == ROWS // 2 * 6


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_afterwards(backbone: Backbone, fails: bool) -> None:
    before, plain = attributes(backbone), run(backbone, None)
    with (
        pytest.raises(RuntimeError, match="stop"),
        l2c.cached(backbone, random_plan(backbone)) as cache,
    ):
        for row, given in enumerate(inputs()):
            if fails and row == 3:
                handle = backbone.final_layer.register_forward_pre_hook(stop)
                try:
                    backbone(*given)
                finally:
                    handle.remove()
            backbone(*given)
        raise RuntimeError("stop")
    assert not cache.outputs
    assert attributes(backbone) == before
    assert equal(run(backbone, None), plain)


def stop(*_: Any) -> None:
    raise RuntimeError("stop")


def test_an_interrupted_evaluation_needs_a_reset(backbone: Backbone) -> None:
    plan = l2c.Plan.every(2, ROWS, l2c.sites(backbone))
    fresh = run(backbone, plan)
    with l2c.cached(backbone, plan) as cache:
        backbone(*inputs()[0])
        backbone(*inputs()[1])
        handle = blocks_of(backbone)[1].attn.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            backbone(*inputs()[2])
        handle.remove()
        with pytest.raises(ValueError, match=r"evaluation 2 .* interrupted.*reset"):
            backbone(*inputs()[3])
        cache.reset()
        assert equal([backbone(*given) for given in inputs()], fresh)


def test_a_call_too_many_is_refused(backbone: Backbone) -> None:
    with l2c.cached(backbone, random_plan(backbone)) as cache:
        results = [backbone(*given) for given in inputs()]
        with pytest.raises(ValueError, match=r"plan has 6 evaluations.*reset"):
            backbone(*inputs()[0])
        cache.reset()
        assert equal([backbone(*given) for given in inputs()], results)


def test_another_batch_size_is_another_generation(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    with l2c.cached(backbone, plan) as cache:
        backbone(*inputs(2)[0])
        with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*got \(3, 3, 8, 8\)"):
            backbone(*inputs(3)[1])
        cache.reset()
        three = [backbone(*given) for given in inputs(3)]
    assert equal(three, run(backbone, plan, 3))
    assert equal(run(backbone, plan, 2), run(backbone, plan, 2))


def test_an_aborted_generation_leaves_nothing_to_the_next(backbone: Backbone) -> None:
    schedule, plan = l2c.Schedule.ddim(ROWS, noise=backbone.noise), random_plan(backbone)
    noise = initial_latents(backbone, 2, torch.Generator().manual_seed(0))
    expected = l2c.sample(backbone, schedule, [1, 2], 1.5, plan=plan, latents=noise)

    def abort(row: int, *_: Any) -> None:
        if row == 3:
            raise RuntimeError("aborted")

    with pytest.raises(RuntimeError, match="aborted"):
        l2c.sample(backbone, schedule, [3, 4], 1.5, plan=plan, latents=noise * 2, callback=abort)
    assert torch.equal(
        l2c.sample(backbone, schedule, [1, 2], 1.5, plan=plan, latents=noise), expected
    )


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


def test_nesting_is_refused_and_the_outer_goes_on(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    with l2c.cached(backbone, plan):
        first = backbone(*inputs()[0])
        with pytest.raises(ValueError, match="cached or recorded already"):
            l2c.cached(backbone, plan).__enter__()
        rest = [backbone(*given) for given in inputs()[1:]]
    assert equal([first, *rest], run(backbone, plan))


def test_a_plan_of_another_model_is_refused(dit: l2c.DiT) -> None:
    deeper = tiny_dit(depth=4)
    with pytest.raises(ValueError, match=r"6 sites .*blocks\.2\.mlp.*8 sites.*blocks\.3\.mlp"):
        l2c.cached(dit, random_plan(deeper)).__enter__()
    assert "_l2c_attached" not in vars(dit)


def test_outputs_are_dropped_when_nothing_reads_them_again(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    with l2c.cached(backbone, plan) as cache:
        for row, given in enumerate(inputs()):
            backbone(*given)
            following = plan.compute[row + 1] if row + 1 < ROWS else (True,) * 6
            newest = [max(r for r in range(row + 1) if plan.compute[r][i]) for i in range(6)]
            assert held(cache) == {i: [newest[i]] for i, c in enumerate(following) if not c}


def test_somebody_else_s_wrapper_survives(backbone: Backbone) -> None:
    original = blocks_of(backbone)[0].attention
    calls = []

    def theirs(*args: Tensor) -> Tensor:
        calls.append(1)
        return original(*args)

    blocks_of(backbone)[0].attention = theirs
    run(backbone, l2c.Plan.every(2, ROWS, l2c.sites(backbone)))
    assert len(calls) == ROWS // 2
    assert vars(blocks_of(backbone)[0])["attention"] is theirs


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_sampling_with_a_full_plan_is_bit_identical(backbone: Backbone, scale: float) -> None:
    schedule, full = (
        l2c.Schedule.ddim(ROWS, noise=backbone.noise),
        l2c.Plan.full(ROWS, l2c.sites(backbone)),
    )
    noise = initial_latents(backbone, 3, torch.Generator().manual_seed(0))
    plain = l2c.sample(backbone, schedule, [1, 2, 3], scale, latents=noise)
    assert torch.equal(
        l2c.sample(backbone, schedule, [1, 2, 3], scale, plan=full, latents=noise), plain
    )


@pytest.mark.parametrize("rows", [0, 1, 3, ROWS])
def test_leaving_at_any_time_restores_the_model(backbone: Backbone, rows: int) -> None:
    before, plain = attributes(backbone), run(backbone, None)
    with l2c.cached(backbone, l2c.Plan.every(ROWS, ROWS, l2c.sites(backbone))) as cache:
        for given in inputs()[:rows]:
            backbone(*given)
        assert held(cache) == (dict.fromkeys(range(6), [0]) if 0 < rows < ROWS else {})
    assert not cache.outputs
    assert attributes(backbone) == before
    assert equal(run(backbone, None), plain)


def test_a_refused_input_does_not_disturb_the_generation(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    with l2c.cached(backbone, plan):
        first = backbone(*inputs()[0])
        with pytest.raises(ValueError, match="inputs of shape"):
            backbone(*inputs(3)[1])
        rest = [backbone(*given) for given in inputs()[1:]]
    assert equal([first, *rest], run(backbone, plan))
