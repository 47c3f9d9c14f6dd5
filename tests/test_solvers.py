"""Solvers against the original code's formulas, diffusers, and exact solutions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

import l2c
from l2c.solvers import solve, solver

# diffusers' use of NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DIT, UVIT = l2c.Noise(), l2c.Noise.uvit()


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


# --- DPM-Solver-2 against the formulas of the published code ---


class OriginalNoise:
    """The published code's discrete noise, in float64: log alpha is linear between its knots.

    Continuous time runs from 1/N to 1, and the model is given time * N.
    """

    def __init__(self, noise: l2c.Noise) -> None:
        root = np.linspace(noise.start**0.5, noise.end**0.5, noise.timesteps)
        straight = np.linspace(noise.start, noise.end, noise.timesteps)
        betas = root**2 if noise.betas == "scaled_linear" else straight
        self.log_alphas = 0.5 * np.log(1 - betas).cumsum()
        self.times = np.linspace(1 / noise.timesteps, 1, noise.timesteps)

    def log_alpha(self, t: float) -> float:
        right = min(max(int(np.searchsorted(self.times, t)), 1), len(self.times) - 1)
        (a, b), (u, v) = self.times[right - 1 : right + 1], self.log_alphas[right - 1 : right + 1]
        return float(u + (t - a) / (b - a) * (v - u))

    def sigma(self, t: float) -> float:
        return math.sqrt(1 - math.exp(2 * self.log_alpha(t)))

    def half_log_snr(self, t: float) -> float:
        return self.log_alpha(t) - math.log(self.sigma(t))

    def time(self, half_log_snr: float) -> float:
        """Found by bisection: the half log-SNR falls with time."""
        low, high = float(self.times[0]), float(self.times[-1])
        for _ in range(100):
            middle = (low + high) / 2
            above = self.half_log_snr(middle) > half_log_snr
            low, high = (middle, high) if above else (low, middle)
        return low


def original_second_update(
    noise: OriginalNoise, eps: Callable[[Tensor, float], Tensor], x: Tensor, s: float, t: float
) -> dict[str, Tensor]:
    """`dpm_solver_second_update` with r1 = 1/2, for predictions of the data and of the noise."""
    r1 = 0.5
    h = noise.half_log_snr(t) - noise.half_log_snr(s)
    s1 = noise.time(noise.half_log_snr(s) + r1 * h)
    alpha_s, alpha_s1, alpha_t = (math.exp(noise.log_alpha(u)) for u in (s, s1, t))
    sigma_s, sigma_s1, sigma_t = (noise.sigma(u) for u in (s, s1, t))

    def data(x: Tensor, t: float) -> Tensor:
        return (x - noise.sigma(t) * eps(x, t)) / math.exp(noise.log_alpha(t))

    phi_11, phi_1 = math.expm1(-r1 * h), math.expm1(-h)
    first = data(x, s)
    x_s1 = sigma_s1 / sigma_s * x - alpha_s1 * phi_11 * first
    second = data(x_s1, s1)
    of_data = (
        sigma_t / sigma_s * x
        - alpha_t * phi_1 * first
        - 0.5 / r1 * alpha_t * phi_1 * (second - first)
    )
    phi_11, phi_1 = math.expm1(r1 * h), math.expm1(h)
    first = eps(x, s)
    x_s1 = alpha_s1 / alpha_s * x - sigma_s1 * phi_11 * first
    second = eps(x_s1, s1)
    of_noise = (
        alpha_t / alpha_s * x
        - sigma_t * phi_1 * first
        - 0.5 / r1 * sigma_t * phi_1 * (second - first)
    )
    return {"data": of_data, "noise": of_noise, "middle": torch.tensor(s1, dtype=torch.float64)}


def original_singlestep(
    noise: l2c.Noise, evaluations: int, spacing: str, prediction: str, x: Tensor
) -> tuple[Tensor, list[float]]:
    """The samples, and the timesteps at which the model was asked."""
    original, n = OriginalNoise(noise), noise.timesteps
    if spacing == "time":
        grid = np.linspace(1, 1 / n, evaluations // 2 + 1).tolist()
    else:
        ends = original.half_log_snr(1), original.half_log_snr(1 / n)
        steps = np.linspace(*ends, evaluations // 2 + 1)
        grid = [1.0, *(original.time(step) for step in steps[1:-1]), 1 / n]
    asked = []
    for s, t in zip(grid, grid[1:], strict=False):
        update = original_second_update(
            original, lambda x, t: predict(x, t * n - 1 + noise.first), x, s, t
        )
        asked += [s * n - 1 + noise.first, float(update["middle"]) * n - 1 + noise.first]
        x = update[prediction]
    return x, asked


@pytest.mark.parametrize("noise", [DIT, UVIT], ids=["dit", "uvit"])
@pytest.mark.parametrize("prediction", ["data", "noise"])
@pytest.mark.parametrize("spacing", ["time", "log_snr"])
@pytest.mark.parametrize("evaluations", [2, 10, 20, 50])
def test_dpm_solver_2_equals_the_published_formulas(
    evaluations: int, spacing: str, prediction: str, noise: l2c.Noise
) -> None:
    schedule = l2c.Schedule.dpm_solver_2(evaluations, spacing, prediction, noise)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    expected, asked = original_singlestep(noise, evaluations, spacing, prediction, x)
    # A schedule rounds its timesteps to four places.
    np.testing.assert_allclose(schedule.timesteps, asked, rtol=0, atol=5.1e-5)
    whole = l2c.Schedule(schedule.solver, tuple(asked), schedule.options, noise)
    # Both in float64: the formula is the same at r1 = 1/2, but differences of nearly equal numbers
    # come in another order.
    torch.testing.assert_close(solve(whole, x, predict), expected, rtol=1e-9, atol=1e-9)
    # The rounding moves a middle by 5e-5 of a timestep, at the clean end by 2e-5 in log-SNR.
    deviation = (solve(schedule, x, predict) - expected).abs().max()
    assert float(deviation) < 2e-5 * float(expected.abs().max())


def test_dpm_solver_2_runs_at_the_published_times() -> None:
    schedule = l2c.Schedule.dpm_solver_2(10)
    assert schedule.timesteps[::2] == (1000, 800.2, 600.4, 400.6, 200.8)
    for start, middle, end in zip(
        schedule.timesteps[::2],
        schedule.timesteps[1::2],
        (*schedule.timesteps[2::2], 1),
        strict=True,
    ):
        mean = (UVIT.half_log_snr(start) + UVIT.half_log_snr(end)) / 2
        # timesteps are rounded to four places
        assert UVIT.half_log_snr(middle) == pytest.approx(mean, abs=2e-5)


# --- order of convergence, on Gaussian data whose exact noise is known ---

MEAN, WIDTH = 0.7, 0.4


def gaussian(noise: l2c.Noise) -> Callable[[Tensor, float], Tensor]:
    """The noise that a perfect model predicts for data of N(MEAN, WIDTH^2)."""

    def eps(x: Tensor, t: float) -> Tensor:
        acp = noise.acp(t)
        return (1 - acp) ** 0.5 * (x - acp**0.5 * MEAN) / (acp * WIDTH**2 + 1 - acp)

    return eps


def transported(noise: l2c.Noise, x: Tensor, s: float, t: float) -> Tensor:
    """The exact path: the distance from the mean, in standard deviations, stays."""
    (mean_s, deviation_s), (mean_t, deviation_t) = (
        (noise.acp(u) ** 0.5 * MEAN, (noise.acp(u) * WIDTH**2 + 1 - noise.acp(u)) ** 0.5)
        for u in (s, t)
    )
    return mean_t + (x - mean_s) / deviation_s * deviation_t


def distance(schedule: l2c.Schedule) -> float:
    """Largest error of a solver on Gaussian data, against the exact solution."""
    noise = schedule.noise
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    expected = transported(noise, x, schedule.timesteps[0], noise.first)
    if schedule.solver != "dpm_solver_2":  # these end with the clean sample that the model sees
        acp = noise.acp(noise.first)
        eps = gaussian(noise)(expected, noise.first)
        expected = (expected - (1 - acp) ** 0.5 * eps) / acp**0.5
    return float((solve(schedule, x, gaussian(noise)) - expected).abs().max())


def in_log_snr(name: str, evaluations: int, noise: l2c.Noise) -> l2c.Schedule:
    """Equal steps in log-SNR without rounding: the steps of which the order is a statement."""
    if name.startswith("dpm_solver_2"):
        prediction = name.rpartition(" ")[2]
        return l2c.Schedule.dpm_solver_2(evaluations, "log_snr", prediction, noise)
    ends = noise.half_log_snr(noise.last), noise.half_log_snr(noise.first)
    inner = np.linspace(*ends, evaluations + 1)[1:-1]
    ids = (noise.last, *(noise.timestep(value) for value in inner), noise.first)
    return l2c.Schedule(name, ids, noise=noise)


@pytest.mark.parametrize("noise", [DIT, UVIT], ids=["dit", "uvit"])
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        # halved steps: half the error at order 1, a quarter at order 2
        ("ddim", 1.9, 2.1),
        ("dpm_solver_2 data", 3.5, 4.5),
        ("dpm_solver_2 noise", 3.5, 4.5),
        ("dpm_solver_pp_2m", 3.5, 4.5),
        ("unipc", 4.5, 9.5),  # the corrector raises the order by one
    ],
)
def test_order_of_convergence(name: str, least: float, most: float, noise: l2c.Noise) -> None:
    errors = [distance(in_log_snr(name, evaluations, noise)) for evaluations in (40, 80, 160)]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert least < coarse / fine < most


@pytest.mark.parametrize("noise", [DIT, UVIT], ids=["dit", "uvit"])
@pytest.mark.parametrize("evaluations", [10, 20, 50])
def test_second_order_is_closer_than_ddim_at_equal_cost(evaluations: int, noise: l2c.Noise) -> None:
    ddim = distance(l2c.Schedule.ddim(evaluations, noise=noise))
    assert distance(l2c.Schedule.dpm_solver_2(evaluations, "log_snr", noise=noise)) < 0.6 * ddim
    evenly = distance(in_log_snr("ddim", evaluations, noise))
    assert distance(in_log_snr("dpm_solver_pp_2m", evaluations, noise)) < 0.25 * evenly


# --- against diffusers ---


def multistep_scheduler(noise: l2c.Noise, spacing: str = "linspace") -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_start=noise.start,
        beta_end=noise.end,
        beta_schedule=noise.betas,
        solver_order=2,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
        timestep_spacing=spacing,
        steps_offset=0,
    )


def by_diffusers(scheduler: Any, x: Tensor, first: int) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, int(t) + first), t, x).prev_sample
    return x


@pytest.mark.parametrize("noise", [DIT, UVIT], ids=["dit", "uvit"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("evaluations", [1, 2, 5, 10, 20, 50])
def test_dpm_solver_pp_2m_equals_diffusers(
    evaluations: int, spacing: str, noise: l2c.Noise
) -> None:
    schedule = l2c.Schedule.dpm_solver_pp_2m(evaluations, spacing, noise)
    scheduler = multistep_scheduler(noise, spacing)
    scheduler.set_timesteps(evaluations)
    assert [t - noise.first for t in schedule.timesteps] == scheduler.timesteps.tolist()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    # diffusers' noise levels are float32, ours float64
    torch.testing.assert_close(
        solve(schedule, x, predict), by_diffusers(scheduler, x, noise.first), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("noise", [DIT, UVIT], ids=["dit", "uvit"])
@pytest.mark.parametrize("evaluations", [2, 10, 20])
def test_dpm_solver_pp_2m_in_log_snr_equals_diffusers_at_these_timesteps(
    evaluations: int, noise: l2c.Noise
) -> None:
    schedule = l2c.Schedule.dpm_solver_pp_2m(evaluations, noise=noise)
    scheduler = multistep_scheduler(noise)
    scheduler.set_timesteps(timesteps=[int(t) - noise.first for t in schedule.timesteps])
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    # diffusers' noise levels are float32, ours float64
    torch.testing.assert_close(
        solve(schedule, x, predict), by_diffusers(scheduler, x, noise.first), rtol=1e-3, atol=1e-3
    )


def unipc_scheduler(noise: l2c.Noise, spacing: str = "linspace") -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        beta_start=noise.start,
        beta_end=noise.end,
        beta_schedule=noise.betas,
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
        final_sigmas_type="zero",
        timestep_spacing=spacing,
        steps_offset=0,
    )


@pytest.mark.parametrize("noise", [DIT, UVIT], ids=["dit", "uvit"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 10, 20, 50])
def test_unipc_equals_diffusers(evaluations: int, spacing: str, noise: l2c.Noise) -> None:
    schedule = l2c.Schedule.unipc(evaluations, spacing, noise)
    scheduler = unipc_scheduler(noise, spacing)
    scheduler.set_timesteps(evaluations)
    assert [t - noise.first for t in schedule.timesteps] == scheduler.timesteps.tolist()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    # diffusers' noise levels are float32, ours float64
    torch.testing.assert_close(
        solve(schedule, x, predict), by_diffusers(scheduler, x, noise.first), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("noise", [DIT, UVIT], ids=["dit", "uvit"])
@pytest.mark.parametrize("evaluations", [2, 3, 10, 20])
def test_unipc_in_log_snr_equals_diffusers_at_these_timesteps(
    evaluations: int, noise: l2c.Noise
) -> None:
    schedule = l2c.Schedule.unipc(evaluations, noise=noise)
    ids = [int(t) - noise.first for t in schedule.timesteps]
    scheduler = unipc_scheduler(noise)
    scheduler.set_timesteps(evaluations)
    # It takes no list of timesteps; a step reads nothing but these two.
    scheduler.timesteps = torch.tensor(ids)
    sigmas = ((1 - noise.alphas_cumprod) / noise.alphas_cumprod)[ids].sqrt()
    scheduler.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)]).float()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    # diffusers' noise levels are float32, ours float64
    torch.testing.assert_close(
        solve(schedule, x, predict), by_diffusers(scheduler, x, noise.first), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("evaluations", [1, 2, 7, 28])
def test_flow_euler_equals_diffusers(evaluations: int, shift: float) -> None:
    schedule = l2c.Schedule.flow_euler(evaluations, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / evaluations, evaluations))
    # A schedule rounds its timesteps to four places, diffusers' are float32.
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.numpy(), atol=1.1e-4)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(predict(theirs, float(t)), t, theirs).prev_sample
    torch.testing.assert_close(solve(schedule, x, predict), theirs, rtol=1e-5, atol=1e-5)


def test_flow_of_straight_paths_is_exact_at_any_count() -> None:
    noise, clean = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    for evaluations, shift in ((1, 1.0), (5, 1.0), (9, 4.0)):
        schedule = l2c.Schedule.flow_euler(evaluations, shift)
        mine = solve(schedule, noise, lambda x, t: noise - clean)
        # float64, at most nine sums
        torch.testing.assert_close(mine, clean, rtol=1e-12, atol=1e-12)


# --- starting within a schedule ---

SCHEDULES = [
    l2c.Schedule.ddim(6),
    l2c.Schedule.ddim(6, noise=UVIT),
    l2c.Schedule.dpm_solver_2(6),
    l2c.Schedule.dpm_solver_2(6, "log_snr", "noise"),
    l2c.Schedule.flow_euler(6, 2.0),
    l2c.Schedule.dpm_solver_pp_2m(6),
    l2c.Schedule.unipc(6),
]


def run_from(schedule: l2c.Schedule, x: Tensor, start: int = 0) -> tuple[list[Tensor], Tensor]:
    """The latents of each evaluation from `start` on, and the result."""
    seen = []
    steps = solver(schedule, x, start)
    x, t = next(steps)
    while True:
        seen.append(x)
        assert t == schedule.timesteps[start + len(seen) - 1]
        try:
            x, t = steps.send(predict(x, t))
        except StopIteration as finished:
            return seen, finished.value


@pytest.mark.parametrize("schedule", SCHEDULES[:5], ids=str)
def test_one_step_solvers_go_on_from_the_middle(schedule: l2c.Schedule) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen, result = run_from(schedule, x)
    assert len(seen) == len(schedule)
    for start in range(0, len(schedule), schedule.evaluations_per_step):
        later, again = run_from(schedule, seen[start], start)
        assert torch.equal(again, result)
        assert all(torch.equal(a, b) for a, b in zip(later, seen[start:], strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES[5:], ids=str)
@pytest.mark.parametrize("start", [1, 3, 5])
def test_multistep_solvers_start_anew_without_history(start: int, schedule: l2c.Schedule) -> None:
    rest = l2c.Schedule(schedule.solver, schedule.timesteps[start:], schedule.options)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run_from(schedule, x, start)[1], run_from(rest, x)[1])


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_step_is_not_begun_in_its_middle(start: int) -> None:
    with pytest.raises(ValueError, match=f"evaluation {start} is not the first of a step of dpm_"):
        solver(SCHEDULES[2], torch.zeros(1, 1, 2, 2), start)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_solver_evaluates_once_per_row(schedule: l2c.Schedule) -> None:
    asked = []

    def record(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return predict(x, t)

    solve(schedule, torch.randn(1, 1, 2, 2), record)
    assert tuple(asked) == schedule.timesteps


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_2", "dpm_solver_pp_2m", "unipc"])
def test_solvers_of_noise_refuse_a_flow(name: str) -> None:
    schedule = l2c.Schedule(name, (900, 500), {"prediction": "data"}, l2c.Flow())
    with pytest.raises(ValueError, match=f"{name} is for models that predict noise.*flow_euler"):
        solve(schedule, torch.zeros(1, 1, 2, 2), predict)


def test_the_solver_of_flows_refuses_noise() -> None:
    with pytest.raises(ValueError, match="flow_euler is for rectified flows, got"):
        solve(l2c.Schedule("flow_euler", (900, 500)), torch.zeros(1, 1, 2, 2), predict)
