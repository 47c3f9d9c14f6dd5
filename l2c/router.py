"""What was learnt: a score per evaluation and site, and what it was learnt for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2c.identity import Identity
from l2c.plan import Plan
from l2c.schedule import Schedule
from l2c.site import Sites, sites

UNCOUNTED = -1  # updates of scores that came from elsewhere, without a count


@dataclass(frozen=True, eq=False)
class Router:
    """Scores of one model on one schedule; it knows nothing of execution.

    Args:
        scores: How much each site is worth computing, [evaluation, site] in [0, 1].
        gated: Which evaluations the router decides about, [evaluation]; the others always
            compute everything.
        updates: How many optimizer steps trained each evaluation's gates, [evaluation]; -1 where
            the scores were given and nobody counted, as in what others published.
        sites: The sites and their costs.
        schedule: The schedule that it was trained on.
        identity: The model that it was trained for.
        threshold: A site is computed where its score is above this.
        guidance_scale: The guidance that it was trained at; None if it was trained on conditional
            and unconditional predictions alike, for any guidance.
        provenance: Objective, training settings, versions: plain values for people to read.

    Raises:
        ValueError: If shapes do not fit, or scores are not probabilities.
    """

    scores: Tensor
    gated: Tensor
    updates: Tensor
    sites: Sites
    schedule: Schedule
    identity: Identity
    threshold: float = 0.5
    guidance_scale: float | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.schedule)
        for name, tensor, shape in (
            ("scores", self.scores, (rows, len(self.sites))),
            ("gated", self.gated, (rows,)),
            ("updates", self.updates, (rows,)),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"expected {name} of shape {shape} (evaluations and sites), "
                    f"got {tuple(tensor.shape)}"
                )
        if self.gated.dtype != torch.bool:
            raise ValueError(f"expected gated as torch.bool, got {self.gated.dtype}")
        if not bool(((self.scores >= 0) & (self.scores <= 1)).all()):  # also false for NaN
            raise ValueError("expected scores in [0, 1], got values outside, or NaN")
        if bool((self.updates < UNCOUNTED).any()):
            raise ValueError(
                f"expected updates from {UNCOUNTED} (not counted) on, got {int(self.updates.min())}"
            )
        if bool(self.gated[0]):
            raise ValueError("evaluation 0 has nothing to reuse, so it can't be gated")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"expected a threshold in [0, 1], got {self.threshold}")

    def plan(self, threshold: float | None = None) -> Plan:
        """Threshold the scores: what is above is computed.

        A gated evaluation that was never trained is computed in full, with a warning.

        Args:
            threshold: In place of the router's own.

        Raises:
            ValueError: If the threshold is not in [0, 1].
        """
        threshold = self.threshold if threshold is None else threshold
        if not 0 <= threshold <= 1:
            raise ValueError(f"expected a threshold in [0, 1], got {threshold}")
        untrained = self.gated & (self.updates == 0)
        if bool(untrained.any()):
            rows = ", ".join(map(str, untrained.nonzero().flatten().tolist()))
            warnings.warn(
                f"the gates of evaluations {rows} were never trained, so these are computed in "
                "full; train longer",
                stacklevel=2,
            )
        decided = (self.gated & ~untrained)[:, None]
        return Plan.of(~decided | (self.scores > threshold), self.sites)

    def check(
        self,
        model: nn.Module | None = None,
        schedule: Schedule | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        """Refuse what the router was not trained for; None skips a check.

        Warns:
            UserWarning: If the weights that it was made for, or the model's, are not recorded, so
                that they can't be compared; once in a program.

        Raises:
            ValueError: Naming each difference, what was expected, and what to do.
        """
        if model is not None:
            self._check_model(model)
        if schedule is not None and self.schedule != schedule:
            differences = "; ".join(self.schedule.differences(schedule))
            raise ValueError(
                f"this router was trained on another schedule: {differences}. Sample with "
                "schedule=router.schedule, or train a router on yours"
            )
        trained_at = self.guidance_scale
        if guidance_scale is not None and trained_at not in (None, guidance_scale):
            raise ValueError(
                f"this router was trained at guidance scale {trained_at}, got {guidance_scale}. "
                f"Sample with guidance_scale={trained_at}, or train a router at yours"
            )

    def _check_model(self, model: nn.Module) -> None:
        identity = Identity.of(model)
        different = self.identity.differences(identity)
        if different:
            advice = (
                "If the model was only fine-tuned, router.rebind(model) accepts its new weights"
                if different[0].startswith("weights")
                else "Load the model that it was trained for, or train a router for yours"
            )
            raise ValueError(
                f"this router was trained for another model: {'; '.join(different)}. {advice}"
            )
        here = sites(model)
        if self.sites.names != here.names:
            missing = sorted(set(self.sites.names) ^ set(here.names))
            raise ValueError(
                f"this router lists {len(self.sites)} sites and this model has {len(here)}; "
                f"only one has {', '.join(missing[:4]) or 'this order'}. Train a router for it"
            )
        if self.sites != here:
            raise ValueError(
                "this router lists other costs for its sites than this model has; it was edited, "
                "or made by another version. Train a router with this version"
            )
        if self.identity.weights is None or identity.weights is None:
            # At one place whoever calls, so that Python's filter says it once.
            warnings.warn(
                "this router does not say for which weights it was made, or the model has none, so "
                "they were not checked; router.rebind(model) binds it to a model's",
                stacklevel=1,
            )

    def rebind(self, model: nn.Module) -> Router:
        """The same router for a model of the same class and configuration with other weights.

        Nothing that was measured with the old weights holds for the new ones.

        Raises:
            ValueError: If class or configuration differ.
        """
        identity = Identity.of(model)
        different = self.identity.differences(identity)
        if different and not different[0].startswith("weights"):
            raise ValueError(f"this router is for another model: {'; '.join(different)}")
        return dataclasses.replace(self, identity=identity)

    def save(self, path: str | Path) -> None:
        """Write the router file, whole or not at all; see `l2c.router_file`."""
        from l2c.router_file import save

        save(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module | None = None,
        schedule: Schedule | None = None,
        guidance_scale: float | None = None,
    ) -> Router:
        """Read a router file, and check it against what it is to be used with (see `check`).

        Raises:
            ValueError: If the file is damaged, foreign or of another format, or does not fit.
        """
        from l2c.router_file import load

        router = load(path)
        router.check(model, schedule, guidance_scale)
        return router

    @property
    def unsaturated(self) -> float:
        """Share of the gated scores in (0.05, 0.95): what thresholding changes most."""
        scores = self.scores[self.gated]
        if not scores.numel():
            return 0.0
        return float(torch.logical_and(scores > 0.05, scores < 0.95).float().mean())
