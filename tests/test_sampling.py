"""The sampling API: noise, guidance, batches, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import l2c
from l2c.conditioning import prepared
from l2c.sampling import decode, initial_latents
from l2c.solvers import solve
from tests.conftest import make_router, tiny_dit, tiny_uvit

LABELS = [1, 2, 3, 4, 5]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_seed_decides_everything(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    first = l2c.sample(dit, schedule, LABELS, 1.5, generator=seeded())
    assert first.shape == (5, 3, 8, 8)
    assert first.dtype == torch.float32
    assert torch.equal(first, l2c.sample(dit, schedule, LABELS, 1.5, generator=seeded()))
    assert not torch.equal(first, l2c.sample(dit, schedule, LABELS, 1.5, generator=seeded(1)))


def test_noise_does_not_depend_on_batches(dit: l2c.DiT) -> None:
    whole = initial_latents(dit, 5, seeded())
    g = seeded()
    assert torch.equal(whole, torch.cat([initial_latents(dit, n, g) for n in (2, 1, 2)]))
    each = [seeded(seed) for seed in range(3)]
    singly = torch.cat([initial_latents(dit, 1, seeded(seed)) for seed in range(3)])
    assert torch.equal(initial_latents(dit, 3, each), singly)


@pytest.mark.parametrize("cached", [False, True])
def test_samples_do_not_depend_on_batches(dit: l2c.DiT, router: l2c.Router, cached: bool) -> None:
    schedule, chosen = router.schedule, router if cached else None
    whole = l2c.sample(dit, schedule, LABELS, 1.5, router=chosen, generator=seeded())
    split = l2c.sample(dit, schedule, LABELS, 1.5, router=chosen, generator=seeded(), batch_size=2)
    # matrix products of another size may sum in another order
    torch.testing.assert_close(whole, split, rtol=1e-3, atol=1e-3)


def test_guidance_in_one_batch_equals_two_calls(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    labels, null = torch.tensor(LABELS), torch.full((5,), 10)

    def predict(x: Tensor, t: float) -> Tensor:
        times = torch.full((5,), t)
        cond, uncond = dit(x, times, labels)[:, :3], dit(x, times, null)[:, :3]
        return uncond + 2.5 * (cond - uncond)

    noise = initial_latents(dit, 5, seeded())
    expected = solve(schedule, noise, predict)
    # matrix products of another size may sum in another order
    torch.testing.assert_close(
        l2c.sample(dit, schedule, LABELS, 2.5, latents=noise), expected, rtol=1e-3, atol=1e-3
    )


def test_guidance_of_three_channels_is_the_original_s(schedule: l2c.Schedule) -> None:
    """The original samples a doubled state, guides 3 of 4 channels and keeps the first half."""
    model = tiny_dit(in_channels=4)
    labels = torch.tensor([*LABELS, *[10] * 5])

    def predict(x: Tensor, t: float) -> Tensor:
        half = x[: len(x) // 2]
        out = model(torch.cat([half, half]), torch.full((10,), t), labels)
        eps, rest = out[:, :3], out[:, 3:4]
        cond, uncond = eps.chunk(2)
        guided = uncond + 4.0 * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    noise = initial_latents(model, 5, seeded())
    with torch.no_grad(), prepared(model, schedule.timesteps, [labels]):
        expected = solve(schedule, torch.cat([noise, noise]), predict)[:5]
    mine = l2c.sample(model, schedule, LABELS, 4.0, guidance_channels=3, latents=noise)
    assert torch.equal(mine, expected)
    assert not torch.equal(mine, l2c.sample(model, schedule, LABELS, 4.0, latents=noise))


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 5), (1.5, 10)])
def test_no_guidance_costs_nothing(
    dit: l2c.DiT, schedule: l2c.Schedule, scale: float, rows: int
) -> None:
    seen = []
    handle = dit.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    l2c.sample(dit, schedule, LABELS, scale)
    handle.remove()
    assert seen == [rows] * len(schedule)


def test_callback_sees_every_evaluation(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    noise = initial_latents(dit, 5, seeded())
    seen: list[tuple[int, float, Tensor]] = []
    l2c.sample(dit, schedule, LABELS, latents=noise, callback=lambda *given: seen.append(given))
    assert [row for row, _, _ in seen] == list(range(6))
    assert tuple(t for _, t, _ in seen) == schedule.timesteps
    assert torch.equal(seen[0][2], noise)


def test_a_router_may_be_a_file(dit: l2c.DiT, router: l2c.Router, tmp_path: Path) -> None:
    router.save(tmp_path / "router.safetensors")
    by_plan = l2c.sample(dit, router.schedule, LABELS, 1.5, plan=router.plan(), generator=seeded())
    for given in (router, tmp_path / "router.safetensors", str(tmp_path / "router.safetensors")):
        fast = l2c.sample(dit, router.schedule, LABELS, 1.5, router=given, generator=seeded())
        assert torch.equal(fast, by_plan)
    assert not torch.equal(
        by_plan, l2c.sample(dit, router.schedule, LABELS, 1.5, generator=seeded())
    )


def test_half_precision_models(dit: l2c.DiT, router: l2c.Router) -> None:
    noise = initial_latents(dit, 5, seeded())
    exact = l2c.sample(dit, router.schedule, LABELS, 1.5, router=router, latents=noise)
    fast = l2c.sample(dit.bfloat16(), router.schedule, LABELS, 1.5, router=router, latents=noise)
    assert fast.dtype == torch.float32
    # bfloat16 rounds to 3 digits, six evaluations at the scale of the samples
    assert (fast - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_mode_and_gradients_of_the_model_stay(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    dit.train().requires_grad_(True)
    out = l2c.sample(dit, schedule, LABELS)
    assert not out.requires_grad
    assert dit.training
    assert all(p.requires_grad and p.grad is None for p in dit.parameters())


def test_images_by_an_autoencoder(schedule: l2c.Schedule) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        sample_size=8,
        scaling_factor=0.2,
    ).eval()
    model = tiny_dit(in_channels=4)
    noise = initial_latents(model, 5, seeded())
    latents = l2c.sample(model, schedule, LABELS, 1.5, latents=noise)
    images = l2c.sample(model, schedule, LABELS, 1.5, latents=noise, vae=vae)
    with torch.no_grad():
        expected = (vae.decode(latents / 0.2).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(images, expected)
    assert images.shape == (5, 3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [0, 11]}, "labels between 0 and 10, got 0 to 11"),
        ({"labels": [-1]}, "labels between 0 and 10, got -1"),
        ({"labels": []}, r"labels of shape \[B\]"),
        ({"labels": [[1, 2]]}, r"labels of shape \[B\].*got \(1, 2\)"),
        ({"latents": torch.zeros(5, 3, 4, 4)}, r"latents of shape \(5, 3, 8, 8\), got \(5, 3, 4"),
        ({"guidance_channels": 4}, "guidance_channels between 1 and 3, got 4"),
        ({"generator": [torch.Generator()]}, "one generator per sample, 5, got 1"),
        ({"batch_size": -1}, "batch_size of at least 1, got -1"),
        ({"schedule": l2c.Schedule.ddim(7), "router": True}, "expected 6, got 7"),
        ({"schedule": l2c.Schedule.ddim(7), "plan": True}, "plan of 7 evaluations .*got 6"),
        ({"router": True, "plan": True}, "a router or a plan, got both"),
    ],
)
def test_arguments_that_do_not_fit(
    dit: l2c.DiT, router: l2c.Router, changes: dict[str, Any], message: str
) -> None:
    given = {"schedule": router.schedule, "labels": LABELS, **changes}
    if "router" in given:
        given["router"] = router
    if "plan" in given:
        given["plan"] = router.plan()
    with pytest.raises(ValueError, match=message):
        l2c.sample(dit, **given)
    assert "_l2c_attached" not in vars(dit)


def test_guidance_needs_a_null_class(schedule: l2c.Schedule) -> None:
    model = tiny_dit(null_class=False)
    assert l2c.sample(model, schedule, [9]).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="needs a model with a null class"):
        l2c.sample(model, schedule, [9], 1.5)
    with pytest.raises(ValueError, match="labels between 0 and 9, got 10"):
        l2c.sample(model, schedule, [10])


def test_a_batch_size_of_zero_is_refused(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    with pytest.raises(ValueError, match="batch_size of at least 1, got 0"):
        l2c.sample(dit, schedule, LABELS, batch_size=0)


def test_callback_runs_again_for_each_batch(dit: l2c.DiT, schedule: l2c.Schedule) -> None:
    seen: list[tuple[int, int]] = []
    l2c.sample(
        dit,
        schedule,
        LABELS,
        1.5,
        batch_size=2,
        callback=lambda row, t, x: seen.append((row, len(x))),
    )
    assert seen == [(row, count) for count in (2, 2, 1) for row in range(6)]


def test_images_are_shifted_and_clamped() -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        sample_size=8,
        scaling_factor=0.2,
        shift_factor=0.7,
    ).eval()
    vae.decoder.conv_out.weight.data *= 20  # far out of range
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        image = vae.decode(latents / 0.2 + 0.7).sample / 2 + 0.5
        images = decode(vae, latents)
    assert float(image.min()) < 0
    assert float(image.max()) > 1
    assert torch.equal(images, image.clamp(0, 1))


def test_routers_of_another_model_or_guidance_are_refused(
    dit: l2c.DiT, schedule: l2c.Schedule
) -> None:
    router = make_router(dit, schedule, guidance_scale=1.5)
    l2c.sample(dit, schedule, [1], 1.5, router=router)
    with pytest.raises(ValueError, match=r"trained at guidance scale 1\.5, got 4\.0"):
        l2c.sample(dit, schedule, [1], 4.0, router=router)
    with pytest.raises(ValueError, match=r"weights: expected \w+, got \w+"):
        l2c.sample(tiny_dit(seed=1), schedule, [1], 1.5, router=router)


# --- noise and solvers ---


@pytest.mark.parametrize(
    "schedule",
    [l2c.Schedule.ddim(4), l2c.Schedule.dpm_solver_pp_2m(4), l2c.Schedule.flow_euler(4)],
    ids=str,
)
def test_schedules_of_another_noise_are_refused(schedule: l2c.Schedule) -> None:
    model = tiny_uvit()
    with pytest.raises(
        ValueError, match="this UViT's noise Noise.*first=1.*give noise=model.noise"
    ):
        l2c.sample(model, schedule, [1])
    with pytest.raises(ValueError, match="this DiT's noise"):
        l2c.sample(tiny_dit(), l2c.Schedule.dpm_solver_2(4), [1])
    assert l2c.sample(model, l2c.Schedule.ddim(4, noise=model.noise), [1]).shape == (1, 3, 8, 8)


def test_a_model_trained_on_another_noise_says_so_by_its_attribute() -> None:
    model, schedule = tiny_uvit(), l2c.Schedule.flow_euler(4, 2.0)
    model.noise = l2c.Flow()
    noise = initial_latents(model, 2, seeded())
    labels = torch.tensor([1, 2])
    expected = solve(schedule, noise, lambda x, t: model(x, torch.full((2,), t), labels).detach())
    assert torch.equal(l2c.sample(model, schedule, labels, latents=noise), expected)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_2", "dpm_solver_pp_2m"])
def test_a_uvit_is_given_the_schedule_s_timesteps(name: str) -> None:
    model = tiny_uvit()
    schedule = l2c.Schedule.of(name, 6, noise=model.noise)
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    l2c.sample(model, schedule, [1, 2], 1.4)
    handle.remove()
    for t, given in zip(schedule.timesteps, seen, strict=True):
        assert given.shape == (4,)
        assert float(given[0]) == float(torch.tensor(float(t)))  # float32 between whole ones
