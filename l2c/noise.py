"""The forward process: how much signal and noise a latent holds at each training timestep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Variance-preserving noise: `x_t = sqrt(acp_t) x_0 + sqrt(1 - acp_t) eps`.

    The default is the process that DiT was trained with (DDPM, Ho et al. 2020, section 4). Between
    two training timesteps log acp is interpolated linearly, as in the discrete noise schedule of
    DPM-Solver (Lu et al. 2022, appendix D.3) with which U-ViT is sampled.

    Args:
        betas: How beta grows from `start` to `end`: "linear", or "scaled_linear" (linear in its
            square root, as Stable Diffusion and U-ViT use it).
        start: beta at the first timestep.
        end: beta at the last timestep.
        timesteps: Number of training timesteps.
        first: What the model is given as the first of them: 0 for DiT, 1 for U-ViT.

    Raises:
        ValueError: If `betas` is neither name, or the numbers describe no noise.
    """

    betas: str = "linear"
    start: float = 1e-4
    end: float = 0.02
    timesteps: int = 1000
    first: int = 0

    def __post_init__(self) -> None:
        if self.betas not in ("linear", "scaled_linear"):
            raise ValueError(f'betas must be "linear" or "scaled_linear", got {self.betas!r}')
        if not (0 < self.start <= self.end < 1 and self.timesteps >= 1):
            raise ValueError(
                "expected 0 < start <= end < 1 and timesteps >= 1, "
                f"got start={self.start}, end={self.end}, timesteps={self.timesteps}"
            )

    @classmethod
    def uvit(cls) -> Noise:
        """The process of the latent U-ViTs (Bao et al., CVPR 2023): Stable Diffusion's, from 1."""
        return cls("scaled_linear", 0.00085, 0.012, first=1)

    @property
    def last(self) -> int:
        """The last timestep, which is almost pure noise."""
        return self.first + self.timesteps - 1

    @cached_property
    def beta(self) -> Tensor:
        """beta_t as float64, shape [timesteps]."""
        if self.betas == "linear":
            return torch.linspace(self.start, self.end, self.timesteps, dtype=torch.float64)
        root = torch.linspace(self.start**0.5, self.end**0.5, self.timesteps, dtype=torch.float64)
        return root**2

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """acp_t = prod(1 - beta_s, s <= t) as float64, shape [timesteps]."""
        return torch.cumprod(1 - self.beta, dim=0)

    @cached_property
    def _log_alpha(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        logs: np.ndarray[Any, np.dtype[np.float64]] = 0.5 * np.log(self.alphas_cumprod.numpy())
        return logs

    def acp(self, t: float) -> float:
        """The product acp_t at a timestep, which may lie between two training timesteps."""
        if not self.first <= t <= self.last:
            raise ValueError(f"expected a timestep between {self.first} and {self.last}, got {t}")
        if t == int(t):
            return float(self.alphas_cumprod[int(t) - self.first])
        knots = np.arange(self.timesteps) + self.first
        return math.exp(2 * float(np.interp(t, knots, self._log_alpha)))

    def half_log_snr(self, t: float) -> float:
        """lambda_t = log(sqrt(acp_t) / sqrt(1 - acp_t)), which falls with t."""
        acp = self.acp(t)
        return 0.5 * math.log(acp / (1 - acp))

    def timestep(self, half_log_snr: float) -> float:
        """The timestep with a given lambda; the inverse of `half_log_snr`."""
        log_alpha = -0.5 * float(np.logaddexp(0.0, -2 * half_log_snr))
        knots = np.arange(self.timesteps) + self.first
        return float(np.interp(log_alpha, self._log_alpha[::-1], knots[::-1]))

    def add(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Sample q(x_t | x_0): `clean` and `noise` of shape [batch, ...], `timesteps` [batch]."""
        if timesteps.is_floating_point():
            values = torch.tensor([self.acp(t) for t in timesteps.tolist()], dtype=torch.float64)
        else:
            index = timesteps.cpu() - self.first
            if int(index.min()) < 0:  # which would count from the end
                raise ValueError(f"expected timesteps from {self.first} on, got {timesteps.min()}")
            values = self.alphas_cumprod[index]
        acp = values.view(-1, *[1] * (clean.ndim - 1))
        signal, sigma = (v.sqrt().to(clean.dtype).to(clean.device) for v in (acp, 1 - acp))
        return signal * clean + sigma * noise

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "betas": self.betas,
            "start": self.start,
            "end": self.end,
            "timesteps": self.timesteps,
            "first": self.first,
        }


@dataclass(frozen=True)
class Flow:
    """Rectified flow: `x_t = (1 - s) x_0 + s eps` with s = t / timesteps (Liu et al. 2023).

    Its models predict the velocity `eps - x_0`.

    Args:
        timesteps: The timestep at which a latent is pure noise.
    """

    timesteps: int = 1000

    first = 0

    def __post_init__(self) -> None:
        if self.timesteps < 1:
            raise ValueError(f"expected timesteps >= 1, got {self.timesteps}")

    @property
    def last(self) -> int:
        """The last timestep, which is pure noise."""
        return self.timesteps

    def add(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The latent at `timesteps` [batch]; `clean` and `noise` have shape [batch, ...]."""
        s = (timesteps / self.timesteps).to(clean).view(-1, *[1] * (clean.ndim - 1))
        return (1 - s) * clean + s * noise

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"betas": "flow", "timesteps": self.timesteps}


Process = Noise | Flow


def process(values: Mapping[str, Any]) -> Process:
    """The inverse of `to_dict`."""
    if values.get("betas") == "flow":
        return Flow(values["timesteps"])
    return Noise(**values)
