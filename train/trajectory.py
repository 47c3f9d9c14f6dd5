"""The trajectory objective: the student's own way from noise, with gates and predictions learned.

No images are needed. The student starts from noise and walks the schedule with reused outputs and
guidance, as it will when it samples; the error is that of the final sample, or of each prediction
against the plain model's at the same latents (HarmoniCa's SDT, Huang et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from l2c.reuse import Mixture
from l2c.sampling import guide
from l2c.schedule import Schedule
from l2c.solvers import solver
from train.data import Batch
from train.gates import Outputs, gated

Weights = Callable[[int], Tensor | None]
Numbers = Callable[[int, int, list[int]], Mixture]


class Trajectory:
    """What is minimised along the student's trajectory.

    Memory: "final" keeps the graph of the computed evaluations, or with `checkpointing` only what
    passes between evaluations (latents and kept outputs) and the graph of one, for one more
    forward pass; "steps" never keeps more than the graph of one evaluation.

    Args:
        loss: "final", the squared error of the final sample to the batch's; "steps", the mean over
            evaluations of the squared error of the guided prediction to the plain model's at the
            student's latents, whose gradient stops between evaluations.
        guidance_scale: Guidance of student and teacher.
        error_proxy: With "steps": weight each evaluation by how much the final sample changes
            if it alone is computed in full (HarmoniCa's IEPO), measured anew every so many steps;
            0 for equal weights.
        checkpointing: Recompute evaluations in the backward pass.
        streams: 2 for gates of the conditional and the unconditional prediction separately, in two
            calls of the model; the second is predicted by its difference to the first, which
            changes slowly, so most of the compute can go to the first.

    Raises:
        ValueError: If an option is unknown or does not go with the loss.
    """

    name = "trajectory"

    def __init__(
        self,
        loss: str = "final",
        guidance_scale: float = 1.5,
        error_proxy: int = 0,
        checkpointing: bool = False,
        streams: int = 1,
    ) -> None:
        if loss not in ("final", "steps"):
            raise ValueError(f'loss must be "final" or "steps", got {loss!r}')
        if error_proxy < 0 or (error_proxy and loss != "steps"):
            raise ValueError(
                f'expected error_proxy >= 0, and 0 with loss "final", got {error_proxy}'
            )
        if streams not in (1, 2) or (streams == 2 and guidance_scale == 1.0):
            raise ValueError(
                "expected streams 1, or 2 with a guidance_scale other than 1, got "
                f"{streams} and {guidance_scale}"
            )
        self.loss = loss
        self.streams = streams
        self.guidance_scale = guidance_scale
        self.error_proxy = error_proxy
        self.checkpointing = checkpointing

    def student(
        self,
        model: Any,
        schedule: Schedule,
        batch: Batch,
        weights: Weights,
        numbers: Numbers,
        history: int,
        lazy: bool = True,
    ) -> Tensor:
        """The student's final sample.

        Args:
            model: The frozen backbone.
            schedule: The schedule to train for.
            batch: Noise and labels.
            weights: `weights(row)` gives the gates of a row of the plan, [site]; None to compute
                all.
            numbers: `numbers(row, site, sources)` tells how a reused output is formed, where the
                sources are evaluations.
            history: How many outputs of a site are kept.
            lazy: Do not compute what has weight 0; then the gates get no gradient.
        """
        labels = self.labels(model, batch["labels"])
        outputs: list[Outputs] = [{} for _ in range(self.streams)]
        walk = solver(schedule, batch["noise"])
        x, t = next(walk)
        for row in range(len(schedule)):

            def evaluate(
                x: Tensor, kept: list[Outputs], t: float = t, row: int = row
            ) -> tuple[Tensor, list[Outputs]]:
                kept = [{site: list(entries) for site, entries in part.items()} for part in kept]
                out = self.evaluation(
                    model, x, t, labels, kept, weights, numbers, row, history, lazy
                )
                return out, kept

            if self.checkpointing and torch.is_grad_enabled():
                prediction, outputs = checkpoint(evaluate, x, outputs, use_reentrant=False)
            else:
                prediction, outputs = evaluate(x, outputs)
            try:
                x, t = walk.send(prediction)
            except StopIteration as finished:
                x = finished.value
        return x

    def steps(
        self,
        model: Any,
        schedule: Schedule,
        batch: Batch,
        weights: Weights,
        numbers: Numbers,
        history: int,
        importance: Tensor | None = None,
        lazy: bool = True,
    ) -> Iterator[Tensor]:
        """The weighted error of each evaluation; take the gradient of each before the next.

        Args:
            model: The frozen backbone.
            schedule: The schedule to train for.
            batch: Noise and labels.
            weights: As for `student`.
            numbers: As for `student`.
            history: As for `student`.
            importance: Weight of each evaluation, [evaluation].
            lazy: As for `student`.
        """
        labels = self.labels(model, batch["labels"])
        outputs: list[Outputs] = [{} for _ in range(self.streams)]
        walk = solver(schedule, batch["noise"])
        x, t = next(walk)
        for row in range(len(schedule)):
            prediction = self.evaluation(
                model, x, t, labels, outputs, weights, numbers, row, history, lazy
            )
            if prediction.requires_grad:
                with torch.no_grad():
                    target = self.predict(model, x, t, labels)
                scale = 1.0 if importance is None else float(importance[row])
                yield scale * (prediction - target).square().mean() / len(schedule)
            for part in outputs:
                for site, entries in part.items():
                    part[site] = [(source, output.detach()) for source, output in entries]
            try:
                x, t = walk.send(prediction.detach())
            except StopIteration:
                return

    def evaluation(
        self,
        model: Any,
        x: Tensor,
        t: float,
        labels: Tensor,
        outputs: list[Outputs],
        weights: Weights,
        numbers: Numbers,
        row: int,
        history: int,
        lazy: bool,
    ) -> Tensor:
        """The guided prediction of one evaluation with its gates; `outputs` are updated in place.

        With two streams the conditional prediction comes first, in a call of its own, and the
        unconditional one is kept and predicted relative to it.
        """
        calls = labels.chunk(self.streams)
        inputs = torch.cat([x, x]) if len(calls[0]) > len(x) else x
        parts: list[Tensor] = []
        given: dict[int, Tensor] = {}
        for stream, part in enumerate(calls):
            number = row * self.streams + stream

            def mixture(site: int, sources: list[int], number: int = number) -> Mixture:
                return numbers(number, site, sources)

            base, wanted = (given, None) if stream else (None, given)
            now = weights(number)
            kept = outputs[stream]
            longest = max(1, history - 1) if stream else history  # as Reuse.history says
            with gated(model, kept, now, mixture, row, longest, lazy, base, wanted):
                parts.append(self._call(model, inputs, t, part))
        out = torch.cat(parts)
        return guide(out, self.guidance_scale) if len(out) > len(x) else out

    def _call(self, model: Any, x: Tensor, t: float, labels: Tensor) -> Tensor:
        dtype = next(model.parameters()).dtype
        times = torch.full((len(x),), t, device=x.device)
        out: Tensor = model(x.to(dtype), times, labels)[:, : x.shape[1]].float()
        return out

    def labels(self, model: Any, labels: Tensor) -> Tensor:
        """Labels of the model's calls: with guidance, the null labels after them."""
        if self.guidance_scale == 1.0:
            return labels
        if model.null_label is None:
            raise ValueError(
                f"guidance_scale {self.guidance_scale} needs a model with a null class; this one "
                "has none"
            )
        return torch.cat([labels, torch.full_like(labels, model.null_label)])

    def predict(self, model: Any, x: Tensor, t: float, labels: Tensor) -> Tensor:
        """The guided prediction, [B, C, H, W], both parts in one batch."""
        guided = len(labels) > len(x)
        out = self._call(model, torch.cat([x, x]) if guided else x, t, labels)
        return guide(out, self.guidance_scale) if guided else out

    @torch.no_grad()
    def importance(
        self,
        model: Any,
        schedule: Schedule,
        batch: Batch,
        weights: Weights,
        numbers: Numbers,
        history: int,
    ) -> Tensor:
        """How much the final sample changes if one evaluation is computed in full; mean 1.

        HarmoniCa's lambda^(t) = ||x_0 - x_0^(t)||^2, for every evaluation.
        """
        plain = self.student(model, schedule, batch, weights, numbers, history)
        found = []
        for row in range(len(schedule)):

            def with_full(other: int, row: int = row) -> Tensor | None:
                return None if other // self.streams == row else weights(other)

            if all(weights(row * self.streams + i) is None for i in range(self.streams)):
                found.append(0.0)
                continue
            other = self.student(model, schedule, batch, with_full, numbers, history)
            found.append(float((other - plain).square().mean()))
        result = torch.tensor(found)
        return result / result[result > 0].mean() if bool((result > 0).any()) else result
