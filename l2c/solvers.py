"""Solvers as generators: each yields where the model is to be evaluated and gets the result.

A solver receives a schedule and latents, yields `(latents, timestep)` once per evaluation of the
schedule, is sent the model's prediction, and returns the final latents. It calls no model, so the
same code samples, trains along a trajectory and is tested against a formula. `start` is the
evaluation to begin with, the first of a step: the latents are then those of that timestep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from l2c.noise import Flow, Noise
from l2c.schedule import Schedule

Solver = Generator[tuple[Tensor, float], Tensor, Tensor]
Callback = Callable[[int, float, Tensor], Any]


def ddim(schedule: Schedule, x: Tensor, start: int = 0) -> Solver:
    """Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0) over the ids of the schedule."""
    noise = _variance_preserving(schedule)
    ids = schedule.timesteps
    for row in range(start, len(ids)):
        eps = yield x, ids[row]
        acp = noise.acp(ids[row])
        acp_after = noise.acp(ids[row + 1]) if row + 1 < len(ids) else 1.0
        clean = (x - (1 - acp) ** 0.5 * eps) / acp**0.5
        x = acp_after**0.5 * clean + (1 - acp_after) ** 0.5 * eps
    return x


def dpm_solver_2(schedule: Schedule, x: Tensor, start: int = 0) -> Solver:
    """Singlestep DPM-Solver of order 2, to the first timestep (Lu et al. 2022a and b).

    A step from s to t evaluates at s and at the timestep between them with the mean log-SNR.
    """
    noise = _variance_preserving(schedule)
    data = schedule.options["prediction"] == "data"
    ids = (*schedule.timesteps, float(noise.first))
    for row in range(start, len(schedule), 2):
        s, middle, t = ids[row : row + 3]
        eps_s = yield x, s
        between = _first_order(noise, x, eps_s, s, middle, data)
        eps_m = yield between, middle
        # One first-order step with the prediction at the middle, which is what the published
        # formula comes to at r1 = 1/2: D_s + (D_m - D_s) / (2 r1) = D_m.
        if data:
            clean = _clean(noise, between, eps_m, middle)
            x = _data_step(noise, x, clean, s, t)
        else:
            x = _noise_step(noise, x, eps_m, s, t)
    return x


def dpm_solver_pp_2m(schedule: Schedule, x: Tensor, start: int = 0) -> Solver:
    """Multistep DPM-Solver++ of order 2 (Lu et al. 2022b, algorithm 2), to the clean sample.

    The first step from `start` has no history and is of order 1; so is the last, which ends
    without noise.
    """
    noise = _variance_preserving(schedule)
    ids = schedule.timesteps
    before: Tensor | None = None
    for row in range(start, len(ids)):
        now = ids[row]
        eps = yield x, now
        clean = _clean(noise, x, eps, now)
        if row + 1 == len(ids):
            return clean
        slope = clean
        if before is not None:
            h = noise.half_log_snr(ids[row + 1]) - noise.half_log_snr(now)
            h_before = noise.half_log_snr(now) - noise.half_log_snr(ids[row - 1])
            slope = clean + h / (2 * h_before) * (clean - before)
        x = _data_step(noise, x, slope, now, ids[row + 1])
        before = clean
    return x


def unipc(schedule: Schedule, x: Tensor, start: int = 0) -> Solver:
    """Multistep UniPC of order 2 with B_2(h) on clean predictions (Zhao et al. 2023), to the clean.

    Each evaluation also corrects the latents that led to it (UniC), without another one, and the
    next step (UniP) starts from there. The first step from `start` and the last are of order 1.
    """
    noise = _variance_preserving(schedule)
    ids = schedule.timesteps
    levels = [noise.half_log_snr(t) for t in ids]
    origin = x  # the corrected latents of the evaluation before
    history: list[Tensor] = []  # clean predictions, newest first
    for row in range(start, len(ids)):
        eps = yield x, ids[row]
        clean = _clean(noise, x, eps, ids[row])
        if row + 1 == len(ids):
            return clean
        slope = clean
        if history:
            mean = _corrected(levels[max(start, row - 2) : row + 1], clean, history)
            x = _data_step(noise, origin, mean, ids[row - 1], ids[row])
            # The paper's simplification for order 2: half of the difference per step.
            ratio = (levels[row] - levels[row - 1]) / (levels[row + 1] - levels[row])
            slope = clean + (clean - history[0]) / (2 * ratio)
        origin = x
        x = _data_step(noise, x, slope, ids[row], ids[row + 1])
        history = [clean, *history][:2]
    return x


def _corrected(levels: list[float], clean: Tensor, history: list[Tensor]) -> Tensor:
    """The clean prediction that UniC takes a step with, from `levels[-2]` to `levels[-1]`.

    `D_0 + sum_k rho_k (D_k - D_0) / r_k` over the prediction before the step (r < 0, where there
    is one) and that at its end (r = 1), with rho from eq. 5 at B = e^-h - 1.
    """
    now, *earlier = history
    if not earlier:
        return now + (clean - now) / 2
    h = levels[-1] - levels[-2]
    r, growth = (levels[-3] - levels[-2]) / h, math.expm1(-h)
    first = -1 / h - 1 / growth
    second = -2 * first / h - 1 / growth
    rho = (first - second) / (1 - r)
    return now + rho / r * (earlier[0] - now) + (first - rho) * (clean - now)


def flow_euler(schedule: Schedule, x: Tensor, start: int = 0) -> Solver:
    """Euler's method on a rectified flow, to the clean sample."""
    if not isinstance(schedule.noise, Flow):
        raise ValueError("flow_euler is for rectified flows, got a schedule of diffusion noise")
    total = schedule.noise.timesteps
    ids = (*schedule.timesteps, 0.0)
    for row in range(start, len(schedule)):
        velocity = yield x, ids[row]
        x = x + (ids[row + 1] - ids[row]) / total * velocity
    return x


SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddim": ddim,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "unipc": unipc,
    "flow_euler": flow_euler,
}


def solver(schedule: Schedule, latents: Tensor, start: int = 0) -> Solver:
    """The schedule's solver, from latents at the timestep of evaluation `start`.

    Raises:
        ValueError: If the solver is unknown, or `start` lies within a step.
    """
    if schedule.solver not in SOLVERS:
        raise ValueError(f"unknown solver {schedule.solver!r}; known are {', '.join(SOLVERS)}")
    if start % schedule.evaluations_per_step:
        raise ValueError(f"evaluation {start} is not the first of a step of {schedule.solver}")
    return SOLVERS[schedule.solver](schedule, latents, start)


def solve(
    schedule: Schedule,
    latents: Tensor,
    predict: Callable[[Tensor, float], Tensor],
    callback: Callback | None = None,
) -> Tensor:
    """Run the schedule's solver from `latents` to the clean sample.

    Args:
        schedule: The solver and its evaluations.
        latents: Initial noise, [B, C, H, W].
        predict: `predict(latents, timestep)` returns the predicted noise (of a rectified flow: the
            velocity), [B, C, H, W].
        callback: Called as `callback(evaluation, timestep, latents)` before each evaluation.

    Raises:
        ValueError: If the solver is unknown.
    """
    steps = solver(schedule, latents)
    x, t = next(steps)
    row = 0
    while True:
        if callback is not None:
            callback(row, t, x)
        prediction = predict(x, t)
        try:
            x, t = steps.send(prediction)
        except StopIteration as finished:
            result: Tensor = finished.value
            return result
        row += 1


def _variance_preserving(schedule: Schedule) -> Noise:
    if not isinstance(schedule.noise, Noise):
        raise ValueError(
            f"{schedule.solver} is for models that predict noise, got a schedule of a rectified "
            "flow; take flow_euler"
        )
    return schedule.noise


def _clean(noise: Noise, x: Tensor, eps: Tensor, t: float) -> Tensor:
    acp = noise.acp(t)
    result: Tensor = (x - (1 - acp) ** 0.5 * eps) / acp**0.5
    return result


def _data_step(noise: Noise, x: Tensor, clean: Tensor, s: float, t: float) -> Tensor:
    """Exact from `s` to `t` for a constant prediction of the clean latents (2022b, eq. 4.1)."""
    h = noise.half_log_snr(t) - noise.half_log_snr(s)
    acp_s, acp_t = noise.acp(s), noise.acp(t)
    result: Tensor = ((1 - acp_t) / (1 - acp_s)) ** 0.5 * x - acp_t**0.5 * math.expm1(-h) * clean
    return result


def _noise_step(noise: Noise, x: Tensor, eps: Tensor, s: float, t: float) -> Tensor:
    """Exact from `s` to `t` for a constant prediction of the noise (2022a, eq. 3.7)."""
    h = noise.half_log_snr(t) - noise.half_log_snr(s)
    acp_s, acp_t = noise.acp(s), noise.acp(t)
    result: Tensor = (acp_t / acp_s) ** 0.5 * x - (1 - acp_t) ** 0.5 * math.expm1(h) * eps
    return result


def _first_order(noise: Noise, x: Tensor, eps: Tensor, s: float, t: float, data: bool) -> Tensor:
    if data:
        return _data_step(noise, x, _clean(noise, x, eps, s), s, t)
    return _noise_step(noise, x, eps, s, t)
