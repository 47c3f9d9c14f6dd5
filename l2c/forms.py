"""Reused outputs as combinations of computed ones, whatever the rule is relative to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from l2c.plan import Plan

Number = float | Tensor  # one for all channels, or [channel]
Form = tuple[dict[int, Number], Tensor | None]
"""Coefficients of the computed outputs of a site by row, newest first, and a shift."""


def flattened(plan: Plan) -> list[list[Form]]:
    """Each reused output as a combination of computed ones, by row and site; empty if computed."""
    table: list[list[Form]] = []
    for row, mixtures in enumerate(plan.mixtures):
        table.append([])
        for site, numbers in enumerate(mixtures):
            if numbers is None:
                table[row].append(({}, None))
                continue
            sources = plan.sources[row][site]
            form: Form = (dict(zip(sources, numbers.coefficients, strict=True)), numbers.shift)
            if plan.reuse.relative and row % 2:  # what was kept are differences to the row before
                lent: list[tuple[Number, Form]] = [(1.0, _output(table, row - 1, site))]
                for source, number in zip(sources, numbers.coefficients, strict=True):
                    lent.append((-1.0 * number, _output(table, source - 1, site)))
                form = _combined([(1.0, form), *lent])
            table[row].append(form)
    return table


def _output(table: list[list[Form]], row: int, site: int) -> Form:
    found = table[row][site]
    return found if found[0] else ({row: 1.0}, None)


def _combined(parts: Sequence[tuple[Number, Form]]) -> Form:
    numbers: dict[int, Number] = {}
    shift: Tensor | None = None
    for factor, (found, moved) in parts:
        for row, number in found.items():
            numbers[row] = numbers.get(row, 0.0) + factor * number
        if moved is not None:
            shift = factor * moved if shift is None else shift + factor * moved
    left = ((row, n) for row, n in numbers.items() if isinstance(n, Tensor) or n)
    return dict(sorted(left, reverse=True)), shift


def alike(one: Form, other: Form) -> bool:
    """Whether two forms are the same."""

    def same(a: Number | None, b: Number | None) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.equal(b)
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b

    return (
        one[0].keys() == other[0].keys()
        and all(same(number, other[0][row]) for row, number in one[0].items())
        and same(one[1], other[1])
    )
