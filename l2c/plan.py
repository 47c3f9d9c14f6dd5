"""The static graph: what every evaluation computes and what it reuses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from l2c.reuse import Mixture, Reuse
from l2c.schedule import Schedule
from l2c.site import Sites

NEVER = -1  # no evaluation reads this output


@dataclass(frozen=True)
class Plan:
    """For each evaluation (row, in calling order) and site: compute it, or reuse earlier outputs.

    A reused output is formed from what the site gave when it was last computed, taken before the
    residual gate, so that the gate is always the current one.

    With two streams an evaluation is two calls of the model, the conditional and the unconditional
    prediction of guidance, and each call has a row: 2 e and 2 e + 1. Each stream reuses its own
    outputs.

    Args:
        compute: `compute[row][site]`, a row for each evaluation, or for each call of the model.
        sites: The sites and their costs.
        reuse: How a reused output is formed; a copy of the last one by default.
        streams: Calls of the model in an evaluation that have rows of their own.

    Raises:
        ValueError: If a row has another length than `sites`, a site is reused before it was
            computed, the rows do not make whole evaluations, or the learned parts of `reuse` are of
            another shape.
    """

    compute: tuple[tuple[bool, ...], ...]
    sites: Sites
    reuse: Reuse = field(default_factory=Reuse)
    streams: int = 1

    def __post_init__(self) -> None:
        if not self.compute:
            raise ValueError("expected at least one evaluation, got none")
        if self.streams < 1 or len(self.compute) % self.streams:
            raise ValueError(
                f"expected a multiple of {self.streams} streams' rows, got {len(self.compute)}"
            )
        if self.reuse.relative and self.streams != 2:
            raise ValueError(
                f"a rule for the difference of two streams needs a plan of 2, got {self.streams}"
            )
        for row, computed in enumerate(self.compute):
            if len(computed) != len(self.sites):
                raise ValueError(
                    f"expected {len(self.sites)} sites in each evaluation, "
                    f"got {len(computed)} in evaluation {row}"
                )
        for first in self.compute[: self.streams]:
            for site, computed_first in zip(self.sites, first, strict=True):
                if not computed_first:
                    raise ValueError(
                        f"site {site.name} is reused in evaluation 0, before it was ever computed; "
                        "the first evaluation must compute every site"
                    )
        self._check_reuse()

    def _check_reuse(self) -> None:
        here = (len(self.compute), len(self.sites))
        widths = {site.channels for site in self.sites}
        for name, tensor in (
            ("corrections", self.reuse.corrections),
            ("shift", self.reuse.shift),
        ):
            if tensor is None:
                continue
            if tuple(tensor.shape[:2]) != here:
                raise ValueError(
                    f"expected {name} for {here[0]} evaluations and {here[1]} sites, "
                    f"got {tuple(tensor.shape[:2])}"
                )
            if tensor.shape[-1] != 1 and {tensor.shape[-1]} != widths:
                raise ValueError(
                    f"expected {name} of 1 channel or of the outputs' {sorted(widths)}, "
                    f"got {tensor.shape[-1]}"
                )

    @classmethod
    def of(
        cls,
        compute: Tensor | Sequence[Sequence[bool]],
        sites: Sites,
        reuse: Reuse | None = None,
        streams: int = 1,
    ) -> Plan:
        """Make a plan from a boolean table [row, site]."""
        table = torch.as_tensor(compute)
        if table.ndim != 2:
            raise ValueError(f"expected a table [evaluation, site], got shape {tuple(table.shape)}")
        rows = tuple(tuple(map(bool, row)) for row in table.tolist())
        return cls(rows, sites, reuse or Reuse(), streams)

    @classmethod
    def rows(
        cls,
        chosen: Collection[int],
        count: int,
        sites: Sites,
        reuse: Reuse | None = None,
        streams: int = 1,
    ) -> Plan:
        """Compute everything in the chosen rows and nothing in the others."""
        table = tuple((row in chosen,) * len(sites) for row in range(count))
        return cls(table, sites, reuse or Reuse(), streams)

    def repeated(self, streams: int) -> Plan:
        """The same for every one of so many calls in an evaluation, each with its own outputs."""
        if self.streams != 1:
            raise ValueError(f"this plan has {self.streams} streams already")
        rows = tuple(row for row in self.compute for _ in range(streams))
        return Plan(rows, self.sites, self.reuse.repeated(streams), streams)

    @classmethod
    def full(cls, evaluations: int, sites: Sites) -> Plan:
        """Compute everything."""
        return cls.every(1, evaluations, sites)

    @classmethod
    def every(
        cls,
        interval: int,
        evaluations: int | Schedule,
        sites: Sites,
        reuse: Reuse | None = None,
    ) -> Plan:
        """Compute everything in every `interval`-th evaluation and nothing in between (FORA).

        Args:
            interval: Distance of the evaluations that compute.
            evaluations: Their number, or the schedule. A solver with two evaluations per step
                takes their difference, so they must not share a cache: with its schedule both of
                the first step compute, and counting starts at the second (Learning-to-Cache,
                appendix B.1: with an interval of 2, evaluations 2, 4, 6, ... reuse).
            sites: The sites.
            reuse: How reused outputs are formed.

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
        chosen = [row for row in range(count) if row < shift or (row - shift) % interval == 0]
        return cls.rows(chosen, count, sites, reuse)

    def __len__(self) -> int:
        """Number of evaluations."""
        return len(self.compute) // self.streams

    @cached_property
    def sources(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The evaluations whose outputs a reused one is formed from, newest first, by site.

        Empty where the site is computed.
        """
        streams: list[list[tuple[int, ...]]] = [[()] * len(self.sites) for _ in range(self.streams)]
        table = []
        for row, computed in enumerate(self.compute):
            done, history = streams[row % self.streams], self.reuse.history(row % self.streams)
            table.append(tuple(() if c else done[i] for i, c in enumerate(computed)))
            for i, c in enumerate(computed):
                if c:
                    done[i] = (row, *done[i])[:history]
        return tuple(table)

    @cached_property
    def lent(self) -> tuple[tuple[bool, ...], ...]:
        """Whether the next call needs what a site gives in this one, by row and site.

        With a rule for differences, where the second stream computes what is read later, or reuses.
        """
        if not self.reuse.relative:
            return ((False,) * len(self.sites),) * len(self.compute)
        nothing = (False,) * len(self.sites)
        table = []
        for row in range(0, len(self.compute), 2):
            wanted = zip(self.compute[row + 1], self.last_read[row + 1], strict=True)
            table += [tuple(not c or last != NEVER for c, last in wanted), nothing]
        return tuple(table)

    @cached_property
    def last_read(self) -> tuple[tuple[int, ...], ...]:
        """The last evaluation that reads what a site computed, by evaluation and site.

        `NEVER` where nothing is computed or nothing reads it: such an output is not kept.
        """
        table = [[NEVER] * len(self.sites) for _ in self.compute]
        for row, sources in enumerate(self.sources):
            for site, computed_in in enumerate(sources):
                for source in computed_in:
                    table[source][site] = row
        return tuple(map(tuple, table))

    @cached_property
    def mixtures(self) -> tuple[tuple[Mixture | None, ...], ...]:
        """The numbers of each reused output, by evaluation and site; None where it is computed."""
        known: dict[tuple[int, tuple[int, ...]], Mixture] = {}
        n = self.streams

        def numbers(row: int, site: int, sources: tuple[int, ...]) -> Mixture | None:
            if not sources:
                return None
            found = None if self.reuse.learned else known.get((row, sources))
            if found is None:
                found = self.reuse.mixture(row, site, [s // n for s in sources], row // n)
                known[row, sources] = found  # without learned parts the same for every site
            return found

        return tuple(
            tuple(numbers(row, site, found) for site, found in enumerate(sources))
            for row, sources in enumerate(self.sources)
        )

    @cached_property
    def macs(self) -> tuple[int, ...]:
        """Multiply-accumulates per sample, of each evaluation.

        A copy costs none, another reused output one per number and output that it is formed from.
        """
        free = 0 if self.reuse.learned else 1  # from one output and nothing learned: a copy
        return tuple(
            self.sites.rest
            + sum(
                site.macs if c else site.elements * len(found) if len(found) > free else 0
                for site, c, found in zip(self.sites, row, sources, strict=True)
            )
            for row, sources in zip(self.compute, self.sources, strict=True)
        )

    @cached_property
    def ages(self) -> tuple[tuple[int, ...], ...]:
        """Evaluations since the newest output that a reused one is formed from; 0 if computed."""
        return tuple(
            tuple((row - found[0]) // self.streams if found else 0 for found in sources)
            for row, sources in enumerate(self.sources)
        )

    def cache_bytes(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Most bytes that kept outputs take at once, between two calls of the model or within one.

        Args:
            batch: Samples in a call of the model: with guidance in one batch, twice the images.
            dtype: Precision of the outputs.
        """
        now = most = 0
        for row, computed in enumerate(self.compute):
            for site, c in enumerate(computed):
                elements = self.sites[site].elements
                now += elements * self.lent[row][site]
                most = max(most, now)
                if row and self.lent[row - 1][site]:
                    now -= elements
                if c:
                    now += elements * (self.last_read[row][site] != NEVER)
                    most = max(most, now)
                else:
                    read = self.sources[row][site]
                    now -= elements * sum(self.last_read[s][site] == row for s in read)
        return most * batch * dtype.itemsize

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of a full evaluation's multiply-accumulates, of each evaluation."""
        return tuple(macs / self.sites.macs for macs in self.macs)

    @property
    def share(self) -> float:
        """Share of the multiply-accumulates of the whole run."""
        return sum(self.macs) / (self.sites.macs * len(self.compute))

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

        plain = self.reuse == Reuse()
        how = "" if plain else f" ({self.reuse})"
        first, last = self.sites[0].name, self.sites[len(self.sites) - 1].name
        head = (
            f"{len(self)} evaluations x {len(self.sites)} sites ({first} to {last}), "
            f"{self.share:.1%} of the compute; █ computed, · reused{how}"
        )
        width = len(str(len(self) - 1)) + (self.streams > 1)
        rows = [
            f"{self._label(i):>{width}} {line(row)} {share:4.0%}"
            for i, (row, share) in enumerate(zip(self.compute, self.shares, strict=True))
        ]
        return "\n".join([head, *rows])

    def _label(self, row: int) -> str:
        """The evaluation, of two streams with c (conditional) or u (unconditional)."""
        evaluation, stream = divmod(row, self.streams)
        return str(evaluation) if self.streams == 1 else f"{evaluation}{'cu'[stream]}"
