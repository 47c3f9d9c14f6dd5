"""Execution of runs: what is computed is added to the sums of the rows that will read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from l2c.attach import Call, Residual
from l2c.runs import Read, Run, Runs


class Sums:
    """The sums of one generation.

    Args:
        runs: The runs, and what each reads.
        residual: How the model adds outputs to its tokens.
        gates: The gates of all outputs, [site, row, B, channel]; None without.
        device: Where the outputs will be.
    """

    def __init__(
        self, runs: Runs, residual: Residual, gates: Tensor | None, device: torch.device
    ) -> None:
        self.runs = runs
        self.residual = residual
        self.gates = gates
        self.sums: dict[int, Tensor] = {}  # by run, [sum, B, ..., channel]
        # Moved before the loop, which then waits for no transfer.
        self._numbers = {
            (index, row): _Numbers(read, gates is not None, device)
            for index, run in enumerate(runs.runs)
            for row, read in run.reads.items()
        }
        self._adding: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}  # in the current row
        self._row = 0

    def clear(self) -> None:
        """Let go of everything."""
        self.sums.clear()
        self._adding.clear()

    def add(self, row: int, site: int, out: Tensor) -> None:
        """Add what was computed to the sums of the rows that read it."""
        if row != self._row:
            self._row = row
            self._adding.clear()
        for index in self.runs.readers[row][site]:
            if index not in self._adding:
                self._adding[index] = self._begun(row, index, out)
            sums, weights = self._adding[index]
            sums.addcmul_(out, weights[site - self.runs.runs[index].sites.start])

    def onto(self, x: Tensor, row: int, site: int) -> Tensor:
        """Add a run's sum to the tokens at the first of its sites, and nothing at the others."""
        index = self.runs.at[row][site]
        assert index is not None
        run = self.runs.runs[index]
        if site != run.sites.start:
            return x
        x = x + self.sums[index][run.number[row]]
        if row == run.last:
            del self.sums[index]
            self._adding.pop(index, None)
        return x

    def blocks(self, row: int) -> tuple[list[tuple[nn.Module, str]], list[list[Call]]]:
        """What stands in for chains of blocks: those that compute, and sums in place of others."""
        at, runs = self.runs.at[row], self.runs.runs
        chains = []
        for blocks in self.residual.chains.values():
            chain: list[Call] = []
            for block, sites in blocks:
                within = [at[site] for site in sites]
                if None in within:
                    chain.append(block)
                else:
                    chain += [
                        self._joining(row, site)
                        for site, index in zip(sites, within, strict=True)
                        if index is not None and runs[index].sites.start == site
                    ]
            chains.append(chain)
        return list(self.residual.chains), chains

    def _joining(self, row: int, site: int) -> Call:
        return lambda x, *_: self.onto(x, row, site)

    def _begun(self, row: int, index: int, out: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The sums of a run that a row's outputs are added to, and the weights of each site's."""
        run = self.runs.runs[index]
        read, numbers = run.reads[row], self._numbers[index, row]
        if index not in self.sums:
            self.sums[index] = out.new_empty(run.sums, *out.shape)
        sums = self.sums[index]
        if read.begun:
            first, count = run.number[read.begun[0]], len(read.begun)
            before = min(count, len(sums) - first)  # the others go on at number 0
            parts = (sums[first : first + before], sums[: count - before])
            if numbers.shift is None:
                for part in parts:
                    part.zero_()
            else:
                shift = self._weighed(run, numbers.begun, numbers.shift, out).sum(0)
                for part, values in zip(parts, (shift[:before], shift[before:]), strict=True):
                    part.copy_(values)
        weights = self._weighed(run, numbers.rows, numbers.coefficients, out)
        return sums[read.sums], weights.unbind(0)

    def _weighed(self, run: Run, rows: Tensor | None, numbers: Tensor, like: Tensor) -> Tensor:
        """Numbers [site, sum, channel or 1] times gates, [site, sum, B or 1, ..., channel or 1]."""
        numbers = numbers[:, :, None]
        if self.gates is not None and rows is not None:
            sites = self.gates[run.sites.start : run.sites.stop]
            numbers = sites.index_select(1, rows) * numbers
        shape = (*numbers.shape[:3], *(1,) * (like.ndim - 2), numbers.shape[-1])
        return numbers.to(like.dtype).view(shape)


class _Numbers:
    """What a run's read is weighed with, on a device; the rows only if there are gates."""

    def __init__(self, read: Read, gated: bool, device: torch.device) -> None:
        self.coefficients = read.coefficients.to(device)
        self.shift = None if read.shift is None else read.shift.to(device)
        self.rows = torch.tensor(read.rows, device=device) if gated else None
        self.begun = torch.tensor(read.begun, device=device) if gated and read.begun else None
