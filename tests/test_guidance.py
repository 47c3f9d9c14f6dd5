"""Guidance in two calls: the samples of one batch, and two caches that share nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import l2c
from l2c.backbone import Backbone
from l2c.conditioning import prepared
from l2c.sampling import initial_latents
from l2c.solvers import solve
from tests.conftest import blocks_of

LABELS = [1, 2, 3]
NULL = [10, 10, 10]
ROWS = 6
SCALE = 1.7


def schedule_of(model: Backbone) -> l2c.Schedule:
    """Each kind with the solver that it is published with."""
    if isinstance(model, l2c.UViT):
        return l2c.Schedule.dpm_solver_2(ROWS)
    return l2c.Schedule.ddim(ROWS)


def random_plan(model: Backbone, seed: int = 0) -> l2c.Plan:
    """Half of everything reused, at random: reuse spans several evaluations."""
    sites = l2c.sites(model)
    table = torch.rand(ROWS, len(sites), generator=torch.Generator().manual_seed(seed)) < 0.5
    table[0] = True
    return l2c.Plan.of(table, sites)


def noise_of(model: Backbone) -> Tensor:
    return initial_latents(model, len(LABELS), torch.Generator().manual_seed(0))


def sampled(model: Backbone, calls: int, **options: Any) -> Tensor:
    given = {"latents": noise_of(model), "guidance_scale": SCALE, **options}
    return l2c.sample(model, schedule_of(model), LABELS, guidance_calls=calls, **given)


def own_loop(model: Backbone, plan: l2c.Plan | None, labels: list[list[int]]) -> list[list[Tensor]]:
    """Predictions of a loop that calls the model once for each of the labels, as [call][row].

    The latents are the same whatever the labels are.
    """
    g = torch.Generator().manual_seed(5)
    latents = [torch.randn(3, 3, 8, 8, generator=g) for _ in range(ROWS)]
    predictions: list[list[Tensor]] = [[] for _ in labels]

    def loop() -> None:
        for x, t in zip(latents, schedule_of(model).timesteps, strict=True):
            for results, y in zip(predictions, labels, strict=True):
                results.append(model(x, torch.full((3,), t), torch.tensor(y)))

    if plan is None:
        loop()
    else:
        with l2c.cached(model, plan, streams=len(labels)):
            loop()
    return predictions


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- the same samples ---


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("channels", [None, 2])
def test_two_calls_give_the_samples_of_one_batch(
    backbone: Backbone, planned: bool, channels: int | None
) -> None:
    options = {"plan": random_plan(backbone) if planned else None, "guidance_channels": channels}
    together, apart = (sampled(backbone, calls, **options) for calls in (1, 2))
    # Matrix products of another size may sum in another order. The data's scale is that of the
    # first step, which divides by a signal of 0.005 or 0.07.
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)
    if planned:
        plain = sampled(backbone, 2, guidance_channels=channels)
        assert float((plain - apart).abs().max()) > 10 * float((together - apart).abs().max())


def test_two_calls_are_the_loop_written_by_hand(backbone: Backbone) -> None:
    labels, null = torch.tensor(LABELS), torch.tensor(NULL)

    def predict(x: Tensor, t: float) -> Tensor:
        times = torch.full((3,), t)
        with torch.no_grad():
            cond, uncond = (backbone(x, times, y)[:, :3] for y in (labels, null))
        return uncond + SCALE * (cond - uncond)

    labels_of_calls = [labels, null]
    # sample() computes the conditioning ahead: with it the loop has the same bits
    with prepared(backbone, schedule_of(backbone).timesteps, labels_of_calls):
        expected = solve(schedule_of(backbone), noise_of(backbone), predict)
    assert torch.equal(sampled(backbone, 2), expected)


def test_computing_everything_is_bit_identical(backbone: Backbone) -> None:
    full = l2c.Plan.full(ROWS, l2c.sites(backbone))
    assert torch.equal(sampled(backbone, 2, plan=full), sampled(backbone, 2))
    plain, cached = (own_loop(backbone, plan, [LABELS, NULL]) for plan in (None, full))
    assert equal(plain[0], cached[0])
    assert equal(plain[1], cached[1])


@pytest.mark.parametrize("planned", [False, True])
def test_without_guidance_there_is_one_call(backbone: Backbone, planned: bool) -> None:
    plan = random_plan(backbone) if planned else None
    seen = []
    handle = backbone.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    apart = sampled(backbone, 2, guidance_scale=1.0, plan=plan)
    handle.remove()
    assert seen == [3] * ROWS
    assert torch.equal(apart, sampled(backbone, 1, guidance_scale=1.0, plan=plan))


def test_batches_do_not_matter(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    whole, split = (sampled(backbone, 2, plan=plan, batch_size=size) for size in (None, 2))
    # matrix products of another size may sum in another order
    torch.testing.assert_close(whole, split, rtol=1e-3, atol=1e-3)


# --- the order of calls ---


def test_the_conditional_call_comes_first_and_the_callback_before_both(backbone: Backbone) -> None:
    events: list[Any] = []
    handle = backbone.register_forward_pre_hook(lambda _, given: events.append(given[2].tolist()))
    sampled(backbone, 2, callback=lambda row, t, x: events.append((row, t, len(x))))
    handle.remove()
    timesteps = schedule_of(backbone).timesteps
    expected = [[(row, t, 3), LABELS, NULL] for row, t in enumerate(timesteps)]
    assert events == [event for of_row in expected for event in of_row]


@pytest.mark.parametrize("calls", [0, 3])
def test_other_numbers_of_calls_are_refused(backbone: Backbone, calls: int) -> None:
    with pytest.raises(ValueError, match=f"guidance_calls of 1 or 2, got {calls}"):
        sampled(backbone, calls)


# --- two caches ---


def test_each_call_computes_and_reuses_what_is_planned(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    computed: list[list[int]] = []
    handles = [backbone.register_forward_pre_hook(lambda *_: computed.append([]))]
    for i, block in enumerate(blocks_of(backbone)):
        for k, layer in enumerate((block.attn, block.mlp)):

            def note(*_: Any, site: int = 2 * i + k) -> None:
                computed[-1].append(site)

            handles.append(layer.register_forward_hook(note))
    sampled(backbone, 2, plan=plan)
    for handle in handles:
        handle.remove()
    assert len(computed) == 2 * ROWS
    for row, wanted in enumerate(plan.compute):
        sites = [site for site, compute in enumerate(wanted) if compute]
        assert computed[2 * row] == computed[2 * row + 1] == sites


def test_neither_call_sees_the_other_s_outputs(backbone: Backbone) -> None:
    """Other labels in one call change no bit of the other, and each is a cached run of its own."""
    plan = random_plan(backbone)
    first = own_loop(backbone, plan, [LABELS, NULL])
    second = own_loop(backbone, plan, [LABELS, [7, 8, 9]])
    third = own_loop(backbone, plan, [[4, 5, 6], NULL])
    assert equal(first[0], second[0])
    assert equal(first[1], third[1])
    assert not any(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[0], third[0], strict=True))
    for labels, results in zip([LABELS, NULL], first, strict=True):
        assert equal(own_loop(backbone, plan, [labels])[0], results)
        assert not equal(own_loop(backbone, None, [labels])[0], results)


def test_one_cache_for_both_calls_would_mix_them(backbone: Backbone) -> None:
    """What two streams are for: with one, rows are counted twice and outputs change hands."""
    plan = l2c.Plan.every(2, 2 * ROWS, l2c.sites(backbone))
    x, times = noise_of(backbone), torch.full((3,), 500)
    with l2c.cached(backbone, plan):
        backbone(x, times, torch.tensor(LABELS))
        mixed = backbone(x, times, torch.tensor(NULL))
    assert not torch.equal(mixed, backbone(x, times, torch.tensor(NULL)))


def test_any_number_of_streams(backbone: Backbone) -> None:
    plan, labels = random_plan(backbone), [LABELS, NULL, [7, 8, 9]]
    for given, results in zip(labels, own_loop(backbone, plan, labels), strict=True):
        assert equal(own_loop(backbone, plan, [given])[0], results)
    with pytest.raises(ValueError, match="streams of at least 1, got 0"):
        l2c.cached(backbone, plan, streams=0).__enter__()
    assert "_l2c_attached" not in vars(backbone)


def test_each_cache_holds_what_its_next_call_reads(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    x, y = noise_of(backbone), torch.tensor(LABELS)
    with l2c.cached(backbone, plan, streams=2) as cache:
        for call in range(2 * ROWS):
            assert cache.evaluation == call // 2
            backbone(x, torch.full((3,), 500), y)
            following = plan.compute[call // 2 + 1] if call // 2 + 1 < ROWS else (True,) * 6
            row = call // 2
            newest = [max(r for r in range(row + 1) if plan.compute[r][i]) for i in range(6)]
            expected = {i: newest[i] for i, compute in enumerate(following) if not compute}
            stream = cache.streams[call % 2]
            held = {i: list(kept) for i, kept in stream.items() if kept}  # the cache counts calls
            assert held == {i: [2 * newest + call % 2] for i, newest in expected.items()}
        with pytest.raises(ValueError, match="plan has 6 evaluations and the model was called"):
            backbone(x, torch.full((3,), 500), y)
    assert not any(cache.streams)


# --- interruptions ---


def stop(*_: Any) -> None:
    raise RuntimeError("stop")


def test_a_generation_left_between_its_calls_can_be_started_again(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    expected = own_loop(backbone, plan, [LABELS, NULL])
    g = torch.Generator().manual_seed(5)
    latents = [torch.randn(3, 3, 8, 8, generator=g) for _ in range(ROWS)]
    timesteps = schedule_of(backbone).timesteps
    with l2c.cached(backbone, plan, streams=2) as cache:
        for labels in (LABELS, NULL, LABELS):  # the second call of evaluation 1 never comes
            backbone(latents[0], torch.full((3,), timesteps[0]), torch.tensor(labels))
        assert cache.evaluation == 1
        cache.reset()
        assert cache.evaluation == 0
        assert not any(cache.streams)
        for row, (x, t) in enumerate(zip(latents, timesteps, strict=True)):
            for stream, labels in enumerate((LABELS, NULL)):
                out = backbone(x, torch.full((3,), t), torch.tensor(labels))
                assert torch.equal(out, expected[stream][row])


@pytest.mark.parametrize("calls", [2, 3])
def test_an_interrupted_call_needs_a_reset(backbone: Backbone, calls: int) -> None:
    plan = random_plan(backbone)
    x, times, y = noise_of(backbone), torch.full((3,), 500), torch.tensor(LABELS)
    with l2c.cached(backbone, plan, streams=2) as cache:
        for _ in range(calls):
            backbone(x, times, y)
        handle = backbone.final_layer.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            backbone(x, times, y)
        handle.remove()
        with pytest.raises(ValueError, match=r"evaluation 1 .* interrupted.*reset"):
            backbone(x, times, y)
        cache.reset()
        backbone(x, times, y)


def test_an_aborted_sampling_leaves_nothing_to_the_next(backbone: Backbone) -> None:
    plan = random_plan(backbone)
    expected = sampled(backbone, 2, plan=plan)
    calls = []

    def abort(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 2 * 3 + 2:  # the unconditional call of evaluation 3
            raise RuntimeError("aborted")

    handle = backbone.register_forward_pre_hook(abort)
    with pytest.raises(RuntimeError, match="aborted"):
        sampled(backbone, 2, plan=plan)
    handle.remove()
    assert "_l2c_attached" not in vars(backbone)
    assert torch.equal(sampled(backbone, 2, plan=plan), expected)


def test_both_calls_take_inputs_of_one_shape(backbone: Backbone) -> None:
    x, y = noise_of(backbone), torch.tensor(LABELS)
    with l2c.cached(backbone, random_plan(backbone), streams=2):
        backbone(x, torch.full((3,), 500), y)
        with pytest.raises(ValueError, match=r"inputs of shape \(3, 3, 8, 8\).*got \(2, 3, 8, 8\)"):
            backbone(x[:2], torch.full((2,), 500), y[:2])
