"""DDIM against the original respaced diffusion and against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import l2c
from l2c.solvers import solve


def predict(x: Tensor, t: float) -> Tensor:
    """Stands in for a model: a smooth function of latents and timestep."""
    return torch.sin(1.3 * x + t / 300) * 0.7


def original_ddim(noise: l2c.Noise, steps: list[int], x: np.ndarray) -> np.ndarray:
    """The original's respacing: new betas from the kept timesteps, then DDIM with eta 0.

    In float64, independent of l2c: the cumulative product is taken anew over the new betas.
    """
    betas = np.linspace(noise.start, noise.end, noise.timesteps, dtype=np.float64)
    cumulative = np.cumprod(1 - betas)
    new_betas, last = [], 1.0
    for t in sorted(steps):
        new_betas.append(1 - cumulative[t] / last)
        last = cumulative[t]
    acp = np.cumprod(1 - np.array(new_betas))
    before = np.append(1.0, acp[:-1])
    for i in reversed(range(len(steps))):
        eps = predict(torch.from_numpy(x), sorted(steps)[i]).numpy()
        clean = np.sqrt(1 / acp[i]) * x - np.sqrt(1 / acp[i] - 1) * eps
        eps = (np.sqrt(1 / acp[i]) * x - clean) / np.sqrt(1 / acp[i] - 1)
        x = clean * np.sqrt(before[i]) + np.sqrt(1 - before[i]) * eps
    return x


@pytest.mark.parametrize("evaluations", [2, 7, 10, 20, 50])
def test_ddim_equals_the_original_respacing(evaluations: int) -> None:
    schedule = l2c.Schedule.ddim(evaluations)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    mine = solve(schedule, x, predict)
    expected = original_ddim(schedule.noise, list(schedule.timesteps), x.numpy())
    # both in float64; only the order of a few products differs
    np.testing.assert_allclose(mine.numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("evaluations", [4, 10, 20, 50])
def test_ddim_equals_diffusers(spacing: str, evaluations: int) -> None:
    schedule = l2c.Schedule.ddim(evaluations, spacing=spacing)
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing=spacing, clip_sample=False
    )
    scheduler.set_timesteps(evaluations)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(predict(theirs, int(t)), t, theirs).prev_sample
    # diffusers' cumulative products are float32, ours float64
    torch.testing.assert_close(solve(schedule, x, predict), theirs, rtol=1e-4, atol=1e-4)


def test_evaluates_once_per_row_in_order() -> None:
    schedule = l2c.Schedule.ddim(5)
    asked, called = [], []

    def record(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return predict(x, t)

    solve(schedule, torch.randn(1, 1, 2, 2), record, lambda row, t, x: called.append((row, t)))
    assert tuple(asked) == schedule.timesteps
    assert called == list(enumerate(schedule.timesteps))


def test_unknown_solver_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown solver 'euler'; known are ddim"):
        solve(l2c.Schedule("euler", (999, 0)), torch.zeros(1, 1, 2, 2), predict)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_noise_equals_diffusers(betas: str) -> None:
    noise = l2c.Noise(betas, 0.00085, 0.012)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=betas)
    # float32 in diffusers
    torch.testing.assert_close(
        noise.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6
    )
    clean, eps = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    t = torch.tensor([10, 990])
    torch.testing.assert_close(noise.add(clean, eps, t), scheduler.add_noise(clean, eps, t))


@pytest.mark.parametrize(
    "values", [{"betas": "cosine"}, {"start": 0.0}, {"end": 1.0}, {"timesteps": 0}]
)
def test_noise_that_is_none(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected|must be"):
        l2c.Noise(**values)
