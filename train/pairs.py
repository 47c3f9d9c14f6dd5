"""Learning-to-Cache's objective: pairs of a full and a cached evaluation of noised data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2c.schedule import Schedule
from l2c.solvers import ddim_step
from train.data import Batch
from train.gates import gated


@dataclass(frozen=True)
class Pair:
    """A gated evaluation: its row, the model's inputs there, and the outputs to reuse."""

    row: int
    inputs: tuple[Tensor, Tensor, Tensor]
    outputs: dict[int, Tensor]


@dataclass(frozen=True)
class PairLoss:
    """The two terms of the objective for one pair."""

    error: Tensor
    penalty: Tensor
    row: int

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.error + self.penalty


class Pairs:
    """The objective of Learning-to-Cache (Ma et al., NeurIPS 2024, eq. 9 and algorithm 1) for DDIM.

    Counted from the last denoising step, 0, odd evaluations compute everything and even ones are
    gated. A pair is drawn; the data is noised to the timestep of its full evaluation; one DDIM
    step with that evaluation's unguided prediction leads to the gated one. There the model with
    mixed outputs is compared with the plain model on all output channels, learned variance
    included.

    Args:
        penalty: lambda, the price of one open gate.
        label_dropout: Share of the labels replaced by the null label, the same ones in the three
            evaluations of a pair.
    """

    name = "l2c-pairs"
    guidance_scale = None  # conditional and unconditional predictions are both trained on

    def __init__(self, penalty: float = 1e-6, label_dropout: float = 0.1) -> None:
        if penalty < 0 or not 0 <= label_dropout <= 1:
            raise ValueError(
                "expected penalty >= 0 and label_dropout in [0, 1], "
                f"got {penalty} and {label_dropout}"
            )
        self.penalty = penalty
        self.label_dropout = label_dropout

    def gated(self, schedule: Schedule) -> Tensor:
        """Which evaluations are gated, [evaluation].

        Raises:
            ValueError: If the schedule is not of a solver that this objective is made for.
        """
        if schedule.solver != "ddim":
            raise ValueError(f"Pairs trains for ddim, got a schedule of {schedule.solver}")
        if len(schedule) < 2:
            raise ValueError("expected at least 2 evaluations, so that one can be gated")
        rows = torch.arange(len(schedule))
        return ((len(schedule) - 1 - rows) % 2 == 0) & (rows > 0)

    def draw(
        self,
        model: Any,
        schedule: Schedule,
        batch: Batch,
        g: torch.Generator,
        row: int | None = None,
    ) -> Pair:
        """Run the full evaluation of a pair and the DDIM step to the gated one.

        Args:
            model: The frozen backbone.
            schedule: The schedule to train for.
            batch: Clean latents and labels.
            g: Draws pair, noise and dropped labels.
            row: The gated evaluation, in place of a random one.
        """
        clean, labels = batch["latents"], batch["labels"]
        rows = self.gated(schedule).nonzero().flatten()
        drawn = int(rows[torch.randint(len(rows), (), generator=g)])
        row = drawn if row is None else row
        before, now = schedule.timesteps[row - 1], schedule.timesteps[row]
        noise = torch.randn(clean.shape, generator=g).to(clean.device)
        dropped = torch.rand(len(labels), generator=g) < self.label_dropout
        if model.null_label is not None:
            labels = labels.masked_fill(dropped.to(labels.device), model.null_label)
        times = torch.full((len(clean),), before, device=clean.device)
        outputs: dict[int, Tensor] = {}
        with torch.no_grad():
            noisy = schedule.noise.add(clean, noise, times)
            with gated(model, outputs, None):
                eps = model(noisy, times, labels)[:, : clean.shape[1]].float()
            x = ddim_step(schedule.noise, noisy, eps, before, now)
        return Pair(row, (x, torch.full_like(times, now), labels), outputs)

    def loss(
        self,
        model: Any,
        schedule: Schedule,
        weights: Callable[[int], Tensor],
        batch: Batch,
        g: torch.Generator,
        row: int | None = None,
    ) -> PairLoss:
        """Error and penalty of one pair.

        Args:
            model: The frozen backbone.
            schedule: The schedule to train for.
            weights: `weights(row)` gives the weights of a gated evaluation, [site].
            batch: Clean latents and labels.
            g: Draws pair, noise and dropped labels.
            row: The gated evaluation, in place of a random one.
        """
        pair = self.draw(model, schedule, batch, g, row)
        with torch.no_grad():
            target = model(*pair.inputs).float()
        scores = weights(pair.row)
        with gated(model, pair.outputs, scores):
            student = model(*pair.inputs).float()
        error = (student - target).square().mean()
        return PairLoss(error, self.penalty * scores.sum(), pair.row)
