"""The differentiable twin of `l2c.cached`: computed and reused outputs are mixed by weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from l2c.attach import Call, attached


@contextmanager
def gated(model: nn.Module, outputs: dict[int, Tensor], weights: Tensor | None) -> Iterator[None]:
    """Evaluate a model with every site computed and its output mixed with the one before.

    Inside the block each site gives `w * fresh + (1 - w) * outputs[site]` (Learning-to-Cache,
    eq. 6), and `outputs[site]` becomes that mixture. With weights of 0 and 1 this is `l2c.cached`
    bit for bit, over any number of evaluations.

    Args:
        model: The backbone.
        outputs: The outputs of the evaluation before, by site index; updated in place.
        weights: Weight of the fresh output, [site]; None to compute everything, which only
            records the outputs.
    """

    def wrap_site(index: int, call: Call) -> Call:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            fresh: Tensor = call(*args, **kwargs)
            if weights is not None:
                weight = weights[index].to(fresh.dtype)
                fresh = weight * fresh + (1 - weight) * outputs[index]
            outputs[index] = fresh
            return fresh

        return run

    with attached(model, wrap_site):
        yield
