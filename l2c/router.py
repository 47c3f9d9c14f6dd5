"""What was learnt: a score per evaluation and site, and what it was learnt for."""

from __future__ import annotations

import dataclasses
import warnings
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2c.identity import Identity
from l2c.plan import Plan
from l2c.reuse import Reuse
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
        reuse: How a reused output is formed, with what was learned about it.
        budget: The share of the compute that it was trained to; None if it was trained with a
            threshold. Then `plan()` keeps to it, in place of the threshold.
        streams: 2 if it decides about the conditional and the unconditional prediction of guidance
            separately; tensors then have a row for each of them in turn, in place of one for each
            evaluation.

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
    reuse: Reuse = field(default_factory=Reuse)
    budget: float | None = None
    streams: int = 1

    def __post_init__(self) -> None:
        if self.streams not in (1, 2):
            raise ValueError(f"expected 1 or 2 streams, got {self.streams}")
        rows = len(self.schedule) * self.streams
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
        if bool(self.gated[: self.streams].any()):
            raise ValueError("evaluation 0 has nothing to reuse, so it can't be gated")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"expected a threshold in [0, 1], got {self.threshold}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"expected a budget in (0, 1], got {self.budget}")
        # Refuses learned parts that don't fit.
        Plan.rows(range(rows), rows, self.sites, self.reuse, self.streams)

    def plan(
        self,
        threshold: float | None = None,
        *,
        budget: float | None = None,
        costs: Sites | None = None,
    ) -> Plan:
        """The plan of a budget, or of a threshold: what scores above it is computed.

        A gated evaluation that was never trained is computed in full, with a warning.

        Args:
            threshold: In place of the router's own.
            budget: Share of the compute to keep to, in place of the router's own: the outputs of
                the highest scores are computed, as many as fit; equal scores together or not at
                all.
            costs: What the budget is counted in, e.g. `Profile.sites` with measured times;
                multiply-accumulates by default.

        Raises:
            ValueError: If threshold or budget are not in [0, 1], both are given, or the budget is
                below what the evaluations cost that always compute.
        """
        if threshold is not None and budget is not None:
            raise ValueError("expected a threshold or a budget, got both")
        if threshold is None and (budget is not None or self.budget is not None):
            chosen = budget if budget is not None else self.budget
            assert chosen is not None
            return within(self, self._decided("budget"), chosen, costs or self.sites)
        threshold = self.threshold if threshold is None else threshold
        if not 0 <= threshold <= 1:
            raise ValueError(f"expected a threshold in [0, 1], got {threshold}")
        decided = self._decided("threshold")[:, None]
        compute = ~decided | (self.scores > threshold)
        return Plan.of(compute, self.sites, self.reuse, self.streams)

    def _decided(self, what: str) -> Tensor:
        """The evaluations whose scores count, [evaluation]."""
        untrained = self.gated & (self.updates == 0)
        if bool(untrained.any()):
            rows = ", ".join(map(str, untrained.nonzero().flatten().tolist()))
            warnings.warn(
                f"the gates of evaluations {rows} were never trained, so these are computed in "
                f"full whatever the {what}; train longer",
                stacklevel=3,
            )
        return self.gated & ~untrained

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

    def retarget(self, schedule: Schedule) -> Router:
        """The router for another schedule of the same noise, untrained; see `l2c.retarget`.

        Raises:
            ValueError: If the schedule is for another noise, or has fewer than 2 evaluations.
        """
        from l2c.retarget import retarget

        return retarget(self, schedule)


def within(router: Router, decided: Tensor, budget: float, costs: Sites) -> Plan:
    """The plan that computes what scores highest, as much as a budget allows.

    Args:
        router: Its scores and rule.
        decided: The evaluations whose scores count, [evaluation].
        budget: Share of the compute of the whole run, in (0, 1].
        costs: What it is counted in.

    Raises:
        ValueError: If the budget is not in (0, 1], or too small.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"expected a budget in (0, 1], got {budget}")
    if costs.names != router.sites.names:
        raise ValueError(
            f"expected costs of the router's {len(router.sites)} sites, got {len(costs)} others"
        )
    compute = (~decided)[:, None].expand(-1, len(router.sites))
    scores = sorted(set(router.scores[decided].flatten().tolist()), reverse=True)
    # What a combination costs is known in multiply-accumulates alone.
    rule = router.reuse if costs == router.sites else Reuse(relative=router.reuse.relative)

    def table(count: int) -> Tensor:
        return compute | (router.scores >= scores[count - 1]) if count else compute

    def share(count: int) -> float:
        return Plan.of(table(count), costs, rule, router.streams).share

    if share(0) > budget:
        raise ValueError(
            f"a budget of {budget:.3f} is below {share(0):.3f} of the compute, which the "
            "evaluations that always compute and the parts outside of all sites take; give more"
        )
    count = bisect_right(range(len(scores) + 1), budget, key=share) - 1
    return Plan.of(table(count), router.sites, router.reuse, router.streams)
