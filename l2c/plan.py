"""The static graph: what every evaluation computes and what it reuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from l2c.schedule import Schedule
from l2c.site import Sites


@dataclass(frozen=True)
class Plan:
    """For each evaluation (row, in calling order) and site: compute it, or reuse the last output.

    Reuse is a copy of the output that the site gave when it was last computed, taken before the
    residual gate, so that the gate is always the current one.

    Args:
        compute: `compute[evaluation][site]`.
        sites: The sites and their costs.

    Raises:
        ValueError: If a row has another length than `sites`, or a site is reused before it was
            computed.
    """

    compute: tuple[tuple[bool, ...], ...]
    sites: Sites

    def __post_init__(self) -> None:
        if not self.compute:
            raise ValueError("expected at least one evaluation, got none")
        for row, computed in enumerate(self.compute):
            if len(computed) != len(self.sites):
                raise ValueError(
                    f"expected {len(self.sites)} sites in each evaluation, "
                    f"got {len(computed)} in evaluation {row}"
                )
        for site, computed_first in zip(self.sites, self.compute[0], strict=True):
            if not computed_first:
                raise ValueError(
                    f"site {site.name} is reused in evaluation 0, before it was ever computed; "
                    "the first evaluation must compute every site"
                )

    @classmethod
    def of(cls, compute: Tensor | Sequence[Sequence[bool]], sites: Sites) -> Plan:
        """Make a plan from a boolean table [evaluation, site]."""
        table = torch.as_tensor(compute)
        if table.ndim != 2:
            raise ValueError(f"expected a table [evaluation, site], got shape {tuple(table.shape)}")
        return cls(tuple(tuple(map(bool, row)) for row in table.tolist()), sites)

    @classmethod
    def full(cls, evaluations: int, sites: Sites) -> Plan:
        """Compute everything."""
        return cls.every(1, evaluations, sites)

    @classmethod
    def every(cls, interval: int, evaluations: int | Schedule, sites: Sites) -> Plan:
        """Compute everything in every `interval`-th evaluation and nothing in between (FORA).

        Args:
            interval: Distance of the evaluations that compute.
            evaluations: Their number, or the schedule. A solver with two evaluations per step
                takes their difference, so they must not share a cache: with its schedule both of
                the first step compute, and counting starts at the second (Learning-to-Cache,
                appendix B.1: with an interval of 2, evaluations 2, 4, 6, ... reuse).
            sites: The sites.

        Raises:
            ValueError: If a number is below 1, or both evaluations of a step would share a cache.
        """
        shift = 0 if isinstance(evaluations, int) else evaluations.evaluations_per_step - 1
        count = evaluations if isinstance(evaluations, int) else len(evaluations)
        if interval < 1 or count < 1:
            raise ValueError(
                f"expected interval and evaluations of at least 1, got {interval} and {count}"
            )
        if shift and interval > 2:
            raise ValueError(
                f"with {shift + 1} evaluations per step an interval of {interval} makes the two of "
                "a step share a cache; take interval 2, or give the number of evaluations in place "
                "of the schedule to space them all alike"
            )
        rows = (row < shift or (row - shift) % interval == 0 for row in range(count))
        return cls(tuple((full,) * len(sites) for full in rows), sites)

    def __len__(self) -> int:
        return len(self.compute)

    @cached_property
    def held(self) -> tuple[tuple[bool, ...], ...]:
        """Whether a site's output must be kept after an evaluation: the next one reuses it."""
        nothing = (True,) * len(self.sites)
        following = (*self.compute[1:], nothing)
        return tuple(tuple(not c for c in row) for row in following)

    @cached_property
    def macs(self) -> tuple[int, ...]:
        """Multiply-accumulates per sample, of each evaluation."""
        return tuple(
            self.sites.rest + sum(s.macs for s, c in zip(self.sites, row, strict=True) if c)
            for row in self.compute
        )

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of a full evaluation's multiply-accumulates, of each evaluation."""
        return tuple(macs / self.sites.macs for macs in self.macs)

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates of the whole run."""
        return sum(self.macs) / (self.sites.macs * len(self))

    @property
    def speedup(self) -> float:
        """Speed-up that the multiply-accumulates predict: 1 / share."""
        return 1 / self.share

    @property
    def reused(self) -> int:
        """Number of site outputs that are reused."""
        return sum(not c for row in self.compute for c in row)

    def __str__(self) -> str:
        blocks = [site.name.rpartition(".")[0] for site in self.sites]
        breaks = {i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1]}
        narrow = len(self.sites) > 40  # no gaps between blocks where they would not fit

        def line(row: tuple[bool, ...]) -> str:
            cells = ("█" if c else "·" for c in row)
            return "".join(
                " " + cell if i in breaks and not narrow else cell for i, cell in enumerate(cells)
            )

        first, last = self.sites[0].name, self.sites[len(self.sites) - 1].name
        head = (
            f"{len(self)} evaluations x {len(self.sites)} sites ({first} to {last}), "
            f"{self.share:.1%} of the compute; █ computed, · reused"
        )
        width = len(str(len(self) - 1))
        rows = [
            f"{i:>{width}} {line(row)} {share:4.0%}"
            for i, (row, share) in enumerate(zip(self.compute, self.shares, strict=True))
        ]
        return "\n".join([head, *rows])
