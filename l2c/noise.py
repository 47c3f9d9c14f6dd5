"""The forward process: how much signal and noise a latent holds at each training timestep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Variance-preserving noise in discrete time: `x_t = sqrt(acp_t) x_0 + sqrt(1 - acp_t) eps`.

    The default is the schedule that DiT was trained with (DDPM, Ho et al. 2020, section 4).

    Args:
        betas: How beta grows from `start` to `end`: "linear", or "scaled_linear" (linear in its
            square root, as Stable Diffusion and U-ViT use it).
        start: beta at timestep 0.
        end: beta at the last timestep.
        timesteps: Number of training timesteps.

    Raises:
        ValueError: If `betas` is neither name, or the numbers describe no noise.
    """

    betas: str = "linear"
    start: float = 1e-4
    end: float = 0.02
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.betas not in ("linear", "scaled_linear"):
            raise ValueError(f'betas must be "linear" or "scaled_linear", got {self.betas!r}')
        if not (0 < self.start <= self.end < 1 and self.timesteps >= 1):
            raise ValueError(
                "expected 0 < start <= end < 1 and timesteps >= 1, "
                f"got start={self.start}, end={self.end}, timesteps={self.timesteps}"
            )

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

    def add(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Sample q(x_t | x_0): `clean` and `noise` of shape [batch, ...], `timesteps` [batch]."""
        acp = self.alphas_cumprod[timesteps.cpu()].view(-1, *[1] * (clean.ndim - 1))
        signal, sigma = (v.sqrt().to(clean.dtype).to(clean.device) for v in (acp, 1 - acp))
        return signal * clean + sigma * noise

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "betas": self.betas,
            "start": self.start,
            "end": self.end,
            "timesteps": self.timesteps,
        }
