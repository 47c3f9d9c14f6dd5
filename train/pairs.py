"""Learning-to-Cache's objective: pairs of a full and a cached evaluation of noised data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2c.schedule import Schedule
from l2c.solvers import solver
from train.data import Batch
from train.gates import Outputs, gated


@dataclass(frozen=True)
class Pair:
    """A gated evaluation: its row, the model's inputs there, and the outputs to reuse."""

    row: int
    inputs: tuple[Tensor, Tensor, Tensor]
    outputs: Outputs


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
    """The objective of Learning-to-Cache (Ma et al., NeurIPS 2024, eq. 9 and algorithm 1).

    An evaluation is gated, the step before it computes everything. A pair is drawn; the data is
    noised to the timestep of that step, which is walked with unguided predictions and leads to the
    gated evaluation. There the model with mixed outputs is compared with the plain model on all
    output channels, learned variance included.

    With one evaluation per step (DDIM) every second evaluation is gated, the last one among them.
    With two (DPM-Solver-2) it is the first one of every step but the first, so that the two of a
    step never share a cache: the published rule for U-ViT. Its code rounds timesteps to whole ones
    here and not when sampling; these are the schedule's own in both. A multistep solver
    (DPM-Solver++ 2M) has no history at the start of a pair: its full step is of first order.

    Args:
        penalty: lambda, the price of one open gate.
        label_dropout: Share of the labels replaced by the null label, the same ones in all
            evaluations of a pair.
        reduction: "mean" of the squared error over all elements, as published for DiT, or "sum"
            over the elements of a sample and mean over samples, as published for U-ViT.
    """

    name = "l2c-pairs"
    guidance_scale = None  # conditional and unconditional predictions are both trained on

    def __init__(
        self, penalty: float = 1e-6, label_dropout: float = 0.1, reduction: str = "mean"
    ) -> None:
        if penalty < 0 or not 0 <= label_dropout <= 1:
            raise ValueError(
                "expected penalty >= 0 and label_dropout in [0, 1], "
                f"got {penalty} and {label_dropout}"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
        self.penalty = penalty
        self.label_dropout = label_dropout
        self.reduction = reduction

    def gated(self, schedule: Schedule) -> Tensor:
        """Which evaluations are gated, [evaluation].

        Raises:
            ValueError: If the schedule has too few evaluations to gate one.
        """
        rows = torch.arange(len(schedule))
        if schedule.evaluations_per_step == 2:
            chosen = (rows % 2 == 0) & (rows > 0)
        else:
            chosen = ((len(schedule) - 1 - rows) % 2 == 0) & (rows > 0)
        if not chosen.any():
            raise ValueError(
                f"expected at least {2 * schedule.evaluations_per_step} evaluations of "
                f"{schedule.solver}, so that one can be gated, got {len(schedule)}"
            )
        return chosen

    def draw(
        self,
        model: Any,
        schedule: Schedule,
        batch: Batch,
        g: torch.Generator,
        row: int | None = None,
    ) -> Pair:
        """Walk the full step of a pair, up to the gated evaluation.

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
        start = row - schedule.evaluations_per_step
        noise = torch.randn(clean.shape, generator=g).to(clean.device)
        dropped = torch.rand(len(labels), generator=g) < self.label_dropout
        if model.null_label is not None:
            labels = labels.masked_fill(dropped.to(labels.device), model.null_label)

        def times(t: float) -> Tensor:
            return torch.full((len(clean),), t, device=clean.device)

        outputs: Outputs = {}
        with torch.no_grad():
            noisy = schedule.noise.add(clean, noise, times(schedule.timesteps[start]))
            walk = solver(schedule, noisy, start)
            x, t = next(walk)
            for _ in range(start, row):
                with gated(model, outputs, None):  # the later evaluation's outputs stay
                    prediction = model(x, times(t), labels)[:, : clean.shape[1]].float()
                x, t = walk.send(prediction)
        return Pair(row, (x, times(t), labels), outputs)

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
        squares = (student - target).square()
        error = squares.mean() if self.reduction == "mean" else squares.sum() / len(squares)
        return PairLoss(error, self.penalty * scores.sum(), pair.row)
