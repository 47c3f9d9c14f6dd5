"""How a reused output is formed from those that were computed: copies, extrapolations, learned.

A prediction is linear in the last computed outputs of its site, newest first:

    prediction = sum_k c_k * history[k] + shift

The numbers depend on the evaluation, the site and where the history was computed, never on the
input, so they are part of the static graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("copy", "taylor", "newton")
MAX_ORDER = 3


@dataclass(frozen=True, eq=False)
class Reuse:
    """A rule for all reused outputs of a plan.

    Args:
        kind: "copy", the last output (Learning-to-Cache, FORA, SmoothCache); "taylor", TaylorSeer
            (Liu et al. 2025): `sum_i f^(i) / i! * distance^i` with derivatives by repeated
            backward differences; "newton", the polynomial through the last outputs.
        order: Degree of the extrapolation, 1 to 3; 0 for a copy. Where fewer outputs have been
            computed the degree is lower, as in TaylorSeer.
        corrections: Learned, relative to the terms of the extrapolation: term i is multiplied by
            `1 + corrections[evaluation, site, i, channel]`, the last size 1 or all channels.
        shift: Learned, added to the prediction, [evaluation, site, channel].
        relative: In plans of two streams, extrapolate in the second one its difference to the
            first, which changes less than either, by one degree less; what the first gives is
            added.

    Raises:
        ValueError: If kind and order do not fit, or the tensors' shapes.
    """

    kind: str = "copy"
    order: int = 0
    corrections: Tensor | None = None
    shift: Tensor | None = None
    relative: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown rule {self.kind!r}; known are {', '.join(KINDS)}")
        low = 0 if self.kind == "copy" else 1
        high = 0 if self.kind == "copy" else MAX_ORDER
        if not low <= self.order <= high:
            raise ValueError(
                f"expected an order from {low} to {high} for {self.kind}, got {self.order}"
            )
        if self.corrections is not None:
            shape = tuple(self.corrections.shape)
            if len(shape) != 4 or shape[2] != self.order + 1:
                raise ValueError(
                    "expected corrections [evaluation, site, term, channel] with "
                    f"{self.order + 1} terms for {self.name}, got shape {shape}"
                )
        if self.shift is not None and self.shift.ndim != 3:
            raise ValueError(
                f"expected a shift [evaluation, site, channel], got {tuple(self.shift.shape)}"
            )
        for name, tensor in (("corrections", self.corrections), ("shift", self.shift)):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise ValueError(f"expected finite {name}, got NaN or infinity")

    @classmethod
    def named(cls, name: str, relative: bool = False) -> Reuse:
        """A rule without learned parts by its name: "copy", "taylor-2", "newton-1", ...

        Raises:
            ValueError: If there is no such rule.
        """
        kind, _, order = name.partition("-")
        if order and not order.isdigit():
            raise ValueError(f'expected a rule such as "copy" or "taylor-2", got {name!r}')
        return cls(kind, int(order or 0), relative=relative)

    @property
    def name(self) -> str:
        """The name of the extrapolation, without what was learned."""
        return self.kind if self.kind == "copy" else f"{self.kind}-{self.order}"

    def history(self, stream: int = 0) -> int:
        """How many outputs of a stream an output is formed from at most."""
        return max(1, self.order) if self.relative and stream else self.order + 1

    @property
    def learned(self) -> bool:
        """Whether it has learned parts."""
        return self.corrections is not None or self.shift is not None

    def __str__(self) -> str:
        return f"{self.name}, corrected" if self.learned else self.name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reuse):
            return NotImplemented
        if (self.kind, self.order, self.relative) != (other.kind, other.order, other.relative):
            return False
        pairs = ((self.corrections, other.corrections), (self.shift, other.shift))
        return all(
            mine is theirs or (mine is not None and theirs is not None and mine.equal(theirs))
            for mine, theirs in pairs
        )

    def __hash__(self) -> int:
        return hash((self.kind, self.order, self.relative))

    def repeated(self, streams: int) -> Reuse:
        """The same for a plan whose rows are repeated so many times."""
        corrections, shift = (
            None if learned is None else learned.repeat_interleave(streams, dim=0)
            for learned in (self.corrections, self.shift)
        )
        return Reuse(self.kind, self.order, corrections, shift, self.relative)

    def mixture(
        self, row: int, site: int, sources: Sequence[int], evaluation: int | None = None
    ) -> Mixture:
        """What to form the output of a reused site from.

        Args:
            row: The row of the plan.
            site: Index of the site.
            sources: The evaluations that computed the history, newest first.
            evaluation: The evaluation of the row, if that is another number.
        """
        correction = None if self.corrections is None else self.corrections[row, site]
        shift = None if self.shift is None else self.shift[row, site]
        now = row if evaluation is None else evaluation
        return mixture(self.kind, now, sources, correction, shift)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The numbers of one reused output.

    Args:
        coefficients: `[k]` numbers, or tensors [channel], newest first.
        shift: [channel], or None.
    """

    coefficients: tuple[float | Tensor, ...]
    shift: Tensor | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the output is the last one as it is."""
        first = self.coefficients[0]
        plain = len(self.coefficients) == 1 and self.shift is None
        return plain and not isinstance(first, Tensor) and first == 1

    def to(self, like: Tensor) -> Mixture:
        """The same with its tensors on the device and in the precision of an output."""
        coefficients: Any = tuple(
            c.to(like) if isinstance(c, Tensor) else c for c in self.coefficients
        )
        return Mixture(coefficients, None if self.shift is None else self.shift.to(like))

    def apply(self, history: Sequence[Tensor]) -> Tensor:
        """Form the output from outputs [..., channel], newest first."""
        if self.is_copy:
            return history[0]
        out = history[0] * self.coefficients[0]
        for coefficient, output in zip(self.coefficients[1:], history[1:], strict=True):
            if isinstance(coefficient, Tensor):
                out = torch.addcmul(out, output, coefficient)
            else:
                out = out.add(output, alpha=coefficient)
        return out if self.shift is None else out + self.shift


def mixture(
    kind: str,
    row: int,
    sources: Sequence[int],
    correction: Tensor | None = None,
    shift: Tensor | None = None,
) -> Mixture:
    """The numbers of one reused output; differentiable in what is learned.

    Args:
        kind: Kind of the rule.
        row: The evaluation.
        sources: The evaluations that computed the history, newest first; their number is the
            number of terms.
        correction: [term, channel or 1]; terms beyond the history's length are not used.
        shift: [channel].
    """
    table = terms(kind, row, sources)
    if correction is None:
        numbers = tuple(sum(column) for column in zip(*table, strict=True))
        return Mixture(numbers, shift)
    matrix = torch.tensor(table, dtype=torch.float32, device=correction.device)  # [term, k]
    weights = matrix.T @ (1 + correction[: len(sources)].float())  # [k, channel]
    return Mixture(tuple(weights.unbind(0)), shift)


def terms(kind: str, row: int, sources: Sequence[int]) -> list[list[float]]:
    """The terms of an extrapolation as combinations of the history, [term][k].

    Their sum over terms is the prediction at `row`. Distances are counted in evaluations.
    """
    count = len(sources)
    # differences[k]: the current order's difference whose newest entry is history[k].
    differences = [[float(i == k) for i in range(count)] for k in range(count)]
    table, factor = [differences[0]], 1.0
    for order in range(1, count if kind != "copy" else 1):
        divided = []
        for k in range(count - order):
            # TaylorSeer divides each order by the distance of the last two; a polynomial's
            # divided difference by that of its ends.
            end = k + 1 if kind == "taylor" else k + order
            distance = sources[k] - sources[end]
            divided.append(
                [
                    (a - b) / distance
                    for a, b in zip(differences[k], differences[k + 1], strict=True)
                ]
            )
        differences = divided
        factor *= (row - sources[0]) / order if kind == "taylor" else row - sources[order - 1]
        table.append([factor * value for value in differences[0]])
    return table
