"""Relaxations of hard gates, all of which keep to a budget at every step.

The logits only order the gates: a threshold is set anew at each step so that the hard plan costs
what the budget allows, and the relaxation is around that threshold. So there is no multiplier to
tune, and what is trained is what will run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("straight-through", "hard-concrete", "sigmoid")


@dataclass(frozen=True)
class Relaxation:
    """How gradients reach a gate.

    Args:
        kind: "straight-through": hard forward, the sigmoid's gradient backward (Bengio et al.
            2013); "hard-concrete": a stretched, clamped binary concrete variable (Louizos et al.
            2018, eq. 10 to 12); "sigmoid": soft in both directions, as in Learning-to-Cache.
        temperature: Of the sigmoid, at the first step.
        final: At the last step; annealed geometrically.

    Raises:
        ValueError: If the kind is unknown, or a temperature is not positive.
    """

    kind: str = "straight-through"
    temperature: float = 1.0
    final: float = 0.2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown relaxation {self.kind!r}; known are {', '.join(KINDS)}")
        if not (self.temperature > 0 and self.final > 0):
            raise ValueError(
                f"expected temperatures above 0, got {self.temperature} and {self.final}"
            )

    def weights(
        self, distance: Tensor, hard: Tensor, progress: float, g: torch.Generator
    ) -> Tensor:
        """Gate weights, of the shape of `distance`.

        Args:
            distance: Logits above the threshold.
            hard: Which gates are open.
            progress: Share of the training that is done.
            g: Draws the noise of "hard-concrete".
        """
        t = self.temperature * (self.final / self.temperature) ** progress
        if self.kind == "hard-concrete":
            u = torch.rand(distance.shape, generator=g).clamp(1e-6, 1 - 1e-6).to(distance)
            s = ((u.logit() + distance) / t).sigmoid()
            return (s * 1.2 - 0.1).clamp(0, 1)  # zeta = 1.1, gamma = -0.1
        soft = (distance / t).sigmoid()
        if self.kind == "sigmoid":
            return soft
        return hard.to(soft) + (soft - soft.detach())  # in this order exactly 0 or 1
