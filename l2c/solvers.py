"""Solvers as generators: each yields where the model is to be evaluated and gets the result.

A solver receives a schedule and the initial latents, yields `(latents, timestep)` once per
evaluation of the schedule, is sent the predicted noise, and returns the final latents. It calls
no model, so the same code samples, trains along a trajectory and is tested against a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from l2c.noise import Noise
from l2c.schedule import Schedule

Solver = Generator[tuple[Tensor, int], Tensor, Tensor]
Callback = Callable[[int, int, Tensor], Any]


def ddim_step(noise: Noise, x: Tensor, eps: Tensor, t: int, after: int | None) -> Tensor:
    """One deterministic DDIM step from timestep `t` to `after` (None: to the clean sample)."""
    acp = float(noise.alphas_cumprod[t])
    acp_after = 1.0 if after is None else float(noise.alphas_cumprod[after])
    clean = (x - (1 - acp) ** 0.5 * eps) / acp**0.5
    result: Tensor = acp_after**0.5 * clean + (1 - acp_after) ** 0.5 * eps
    return result


def ddim(schedule: Schedule, x: Tensor) -> Solver:
    """Deterministic DDIM (Song et al. 2021) over the ids of the schedule."""
    ids = schedule.timesteps
    for row, t in enumerate(ids):
        eps = yield x, t
        x = ddim_step(schedule.noise, x, eps, t, ids[row + 1] if row + 1 < len(ids) else None)
    return x


SOLVERS: dict[str, Callable[[Schedule, Tensor], Solver]] = {"ddim": ddim}


def solve(
    schedule: Schedule,
    latents: Tensor,
    predict: Callable[[Tensor, int], Tensor],
    callback: Callback | None = None,
) -> Tensor:
    """Run the schedule's solver from `latents` to the clean sample.

    Args:
        schedule: The solver and its evaluations.
        latents: Initial noise, [B, C, H, W].
        predict: `predict(latents, timestep)` returns the predicted noise, [B, C, H, W].
        callback: Called as `callback(evaluation, timestep, latents)` before each evaluation.

    Raises:
        ValueError: If the solver is unknown.
    """
    if schedule.solver not in SOLVERS:
        raise ValueError(f"unknown solver {schedule.solver!r}; known are {', '.join(SOLVERS)}")
    solver = SOLVERS[schedule.solver](schedule, latents)
    x, t = next(solver)
    row = 0
    while True:
        if callback is not None:
            callback(row, t, x)
        eps = predict(x, t)
        try:
            x, t = solver.send(eps)
        except StopIteration as finished:
            result: Tensor = finished.value
            return result
        row += 1
