"""Runs of consecutive reused sites, whose outputs enter the tokens as one sum.

What the sites of a run add to the tokens is linear in earlier outputs:

    sum over sites of gate * (sum_k c_k * history[k] + shift)

and all numbers in it are known before the loop. So an output is weighed as soon as it is computed,
and added to the sums of all rows to come that read it. Such a row adds one sum, whatever the number
of sites, and the outputs themselves need not be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from l2c.forms import Form, Number, alike, flattened
from l2c.plan import NEVER, Plan
from l2c.reuse import Mixture


@dataclass(frozen=True, eq=False)
class Read:
    """What a run does with the outputs that one row computes.

    Args:
        sites: Indices of the sites of which it reads the output.
        begun: A row of each sum that begins with them; their numbers follow each other.
        shift: What these begin with, [site, sum begun, channel]; None for 0.
        sums: Numbers of the sums that they are added to, from the first to the last.
        rows: A row that adds each of these.
        coefficients: [site, sum, channel or 1]; 0 where an output is not read.
    """

    sites: tuple[int, ...]
    begun: tuple[int, ...]
    shift: Tensor | None
    sums: slice
    rows: tuple[int, ...]
    coefficients: Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive sites that one stream reuses together, in rows that follow each other.

    Args:
        sites: Indices of the sites.
        rows: The rows of the plan, those together that add the same.
        sums: How many sums are kept at once; `rows[i]` add number `i % sums`.
        reads: By row that computes what is read.
    """

    sites: range
    rows: tuple[tuple[int, ...], ...]
    sums: int
    reads: Mapping[int, Read]

    @cached_property
    def number(self) -> Mapping[int, int]:
        """The sum that a row adds."""
        return {row: i % self.sums for i, rows in enumerate(self.rows) for row in rows}

    @property
    def last(self) -> int:
        """The last row."""
        return self.rows[-1][-1]


@dataclass(frozen=True, eq=False)
class Runs:
    """How a plan is executed with runs; what is in none of them is reused site by site.

    Args:
        plan: The plan, with a row for each call of the model.
        sources: As in a plan, but of outputs as they were computed: where a rule is for the
            difference of two streams, from those of both.
        mixtures: The numbers of these.
        runs: The runs.
    """

    plan: Plan
    sources: tuple[tuple[tuple[int, ...], ...], ...]
    mixtures: tuple[tuple[Mixture | None, ...], ...]
    runs: tuple[Run, ...]

    @staticmethod
    @lru_cache(maxsize=16)
    def of(plan: Plan, begins: frozenset[int], gated: bool) -> Runs:
        """Find the runs of a plan that save time, and hold no more than the outputs would.

        Args:
            plan: The plan, with a row for each call of the model.
            begins: Sites before which a run ends, whatever comes.
            gated: Whether outputs are multiplied by gates, of which each row has others.
        """
        forms = flattened(plan)
        sources = tuple(tuple(tuple(found) for found, _ in row) for row in forms)
        mixtures = tuple(
            tuple(Mixture(tuple(found.values()), shift) if found else None for found, shift in row)
            for row in forms
        )
        found = [
            run
            for sites, rows in _spans(plan, begins)
            for run in _runs(forms, sites, rows, gated)
            if _pays(run, mixtures, gated)
        ]
        while True:
            runs = Runs(plan, sources, mixtures, tuple(found))
            if not found or runs.cache_bytes() <= plan.cache_bytes():
                return runs
            worst = max(run.sums / len(run.sites) for run in found)
            found = [run for run in found if run.sums / len(run.sites) < worst]

    @cached_property
    def at(self) -> tuple[tuple[int | None, ...], ...]:
        """Index of the run that a site is in, by row and site."""
        table: list[list[int | None]] = [[None] * len(self.plan.sites) for _ in self.plan.compute]
        for index, run in enumerate(self.runs):
            for row in run.number:
                table[row][run.sites.start : run.sites.stop] = [index] * len(run.sites)
        return tuple(map(tuple, table))

    @cached_property
    def readers(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Indices of the runs that read an output, by the row that computes it and site."""
        table: list[list[list[int]]] = [[[] for _ in self.plan.sites] for _ in self.plan.compute]
        for index, run in enumerate(self.runs):
            for source, read in run.reads.items():
                for site in read.sites:
                    table[source][site].append(index)
        return tuple(tuple(map(tuple, row)) for row in table)

    @cached_property
    def last_read(self) -> tuple[tuple[int, ...], ...]:
        """As in a plan, of the outputs that are reused site by site."""
        table = [[NEVER] * len(self.plan.sites) for _ in self.plan.compute]
        for row, (found, within) in enumerate(zip(self.sources, self.at, strict=True)):
            for site, sources in enumerate(found):
                for source in sources if within[site] is None else ():
                    table[source][site] = row
        return tuple(map(tuple, table))

    @cached_property
    def lent(self) -> tuple[tuple[bool, ...], ...]:
        """As in a plan: nothing, as outputs are kept as they were computed."""
        return ((False,) * len(self.plan.sites),) * len(self.plan.compute)

    def cache_bytes(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """Most bytes that sums and kept outputs take at once.

        Never more than `Plan.cache_bytes`, which is for execution without runs, and far less where
        runs are long.
        """
        now = most = 0
        begun: set[int] = set()
        for row, computed in enumerate(self.plan.compute):
            for site, c in enumerate(computed):
                elements, index = self.plan.sites[site].elements, self.at[row][site]
                if c:
                    now += elements * (self.last_read[row][site] != NEVER)
                    for reader in self.readers[row][site]:
                        now += elements * self.runs[reader].sums * (reader not in begun)
                        begun.add(reader)
                    most = max(most, now)
                elif index is None:
                    read = self.sources[row][site]
                    now -= elements * sum(self.last_read[s][site] == row for s in read)
                elif (row, site) == (self.runs[index].last, self.runs[index].sites.start):
                    now -= elements * self.runs[index].sums
        return most * batch * dtype.itemsize


def _spans(plan: Plan, begins: frozenset[int]) -> Iterator[tuple[range, list[int]]]:
    """Sites that are reused together, of each stream, and in which rows."""
    for stream in range(plan.streams):
        found: dict[range, list[int]] = {}
        for row in range(stream, len(plan.compute), plan.streams):
            first, computed = 0, plan.compute[row]
            for site in range(1, len(computed) + 1):
                if site == len(computed) or site in begins or computed[site] != computed[first]:
                    if not computed[first]:
                        found.setdefault(range(first, site), []).append(row)
                    first = site
        yield from found.items()


def _runs(forms: list[list[Form]], sites: range, rows: Sequence[int], gated: bool) -> Iterator[Run]:
    """The runs of sites that are reused together: a new one where no sum is left of the last."""
    groups: list[tuple[int, ...]] = []
    for row in rows:
        if not gated and groups and _same(forms, groups[-1][0], row, sites):
            groups[-1] = (*groups[-1], row)
        else:
            groups.append((row,))
    begin = [min(min(forms[g[0]][site][0]) for site in sites) for g in groups]
    # No sum begins after a later one: differences may cancel what those before would read.
    begin = [min(begin[i:]) for i in range(len(begin))]
    ends = [i for i in range(1, len(groups)) if begin[i] > groups[i - 1][-1]]
    for first, end in pairwise([0, *ends, len(groups)]):
        part, begun = groups[first:end], begin[first:end]
        sums = max(sum(g[-1] >= at for g in part[: i + 1]) for i, at in enumerate(begun))
        cells = [[forms[g[0]][site] for g in part] for site in sites]
        sources = sorted({s for line in cells for found, _ in line for s in found})
        reads = {s: _read(sites, cells, [g[0] for g in part], sums, begun, s) for s in sources}
        yield Run(sites, tuple(part), sums, reads)


def _same(forms: list[list[Form]], one: int, other: int, sites: range) -> bool:
    return all(alike(forms[one][site], forms[other][site]) for site in sites)


def _read(
    sites: range,
    cells: list[list[Form]],
    rows: list[int],
    sums: int,
    begin: list[int],
    source: int,
) -> Read:
    """What is done with the outputs of row `source`, of cells [site][sum]."""
    begun = [i for i in range(len(rows)) if begin[i] == source]
    reading = [i for i in range(len(rows)) if any(source in line[i][0] for line in cells)]
    of = {i % sums: i for i in (*begun, *reading)}
    among = slice(min(of), max(of) + 1)
    every = [of.get(number) for number in range(sums)[among]]
    numbers = [[0.0 if i is None else line[i][0].get(source, 0.0) for i in every] for line in cells]
    shifts = [[line[i][1] for i in begun] for line in cells]
    shifted = any(shift is not None for line in shifts for shift in line)
    return Read(
        tuple(s for s, line in zip(sites, cells, strict=True) if any(source in f for f, _ in line)),
        tuple(rows[i] for i in begun),
        _table([[0.0 if s is None else s for s in line] for line in shifts]) if shifted else None,
        among,
        tuple(rows[reading[0] if i is None else i] for i in every),
        _table(numbers),
    )


def _table(numbers: list[list[Number]]) -> Tensor:
    """Numbers as [site, sum, channel or 1]."""
    if not any(isinstance(number, Tensor) for line in numbers for number in line):
        return torch.tensor(numbers, dtype=torch.float32)[..., None]
    tensors = [torch.as_tensor(n, dtype=torch.float32) for line in numbers for n in line]
    width = max(tensor.numel() for tensor in tensors)
    wide = torch.stack([tensor.reshape(-1).expand(width) for tensor in tensors])
    return wide.view(len(numbers), -1, width)


def _pays(run: Run, mixtures: Sequence[Sequence[Mixture | None]], gated: bool) -> bool:
    """Whether a run takes fewer calls of an operation than reusing its sites one by one.

    What each amounts to was measured on a CPU with a small model: there calls decide, not numbers.
    """
    alone = 0
    for row in run.number:
        for numbers in mixtures[row][run.sites.start : run.sites.stop]:
            assert numbers is not None
            terms = 0 if numbers.is_copy else len(numbers.coefficients)
            alone += 3 + terms + (numbers.shift is not None)
    added = sum(len(read.sites) for read in run.reads.values())
    together = len(run.number) + len(run.rows) + 2 * added + (12 if gated else 8) * len(run.reads)
    return together < alone
