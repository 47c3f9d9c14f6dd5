"""The differentiable twin of `l2c.cached`: computed and reused outputs are mixed by weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from l2c.attach import Call, attached
from l2c.reuse import Mixture

Outputs = dict[int, list[tuple[int, Tensor]]]
"""Kept outputs by site index, newest first, each with the evaluation that computed it."""


@contextmanager
def gated(
    model: nn.Module,
    outputs: Outputs,
    weights: Tensor | None,
    mixture: Callable[[int, list[int]], Mixture] | None = None,
    row: int = 0,
    history: int = 1,
    lazy: bool = False,
    base: dict[int, Tensor] | None = None,
    given: dict[int, Tensor] | None = None,
) -> Iterator[None]:
    """Evaluate a model with every site computed and its output mixed with a reused one.

    Inside the block each site gives `w * fresh + (1 - w) * reused` (Learning-to-Cache, eq. 6),
    where what is reused is formed from `outputs[site]`. The mixture is kept as the newest output,
    but where the weight is 0 nothing was computed and nothing is kept. With weights of 0 and 1
    this is `l2c.cached` bit for bit, over any number of evaluations.

    Args:
        model: The backbone.
        outputs: What was kept in the evaluations before; updated in place.
        weights: Weight of the fresh output, [site]; None to compute everything, which only
            records the outputs.
        mixture: `mixture(site, sources)` gives the numbers of a reused output; a copy of the
            newest by default.
        row: The evaluation.
        history: How many outputs of a site are kept.
        lazy: Do not compute what has weight 0; its weight then gets no gradient.
        base: Outputs to which those of this call are kept and predicted relatively.
        given: Filled with this call's outputs, to be another call's `base`.
    """
    hard = None if weights is None else weights.detach().tolist()

    def wrap_site(index: int, call: Call) -> Call:
        def mixed(kept: list[tuple[int, Tensor]]) -> Tensor:
            if not kept:
                raise KeyError(f"site {index} has no output to reuse")
            sources = [source for source, _ in kept]
            numbers = mixture(index, sources) if mixture else Mixture((1.0,))
            reused = numbers.to(kept[0][1]).apply([output for _, output in kept])
            return reused if base is None else reused + base[index]

        def run(*args: Any, **kwargs: Any) -> Tensor:
            kept = outputs.setdefault(index, [])
            weight = 1 if hard is None else hard[index]
            if lazy and weight == 0:
                out = mixed(kept)
            else:
                out = call(*args, **kwargs)
                if weights is not None and not (lazy and weight == 1):
                    soft = weights[index].to(out.dtype)
                    out = soft * out + (1 - soft) * mixed(kept)
            if weight > 0:
                new = out if base is None else out - base[index]
                outputs[index] = [(row, new), *kept][:history]
            if given is not None:
                given[index] = out
            return out

        return run

    with attached(model, wrap_site):
        yield
