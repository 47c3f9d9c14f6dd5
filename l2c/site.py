"""The cacheable units of a backbone and what they cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from l2c.attach import Call, anchors, attached


@dataclass(frozen=True)
class Site:
    """One cacheable unit, e.g. `blocks.3.attn`; it knows nothing of steps.

    Args:
        name: Its name in the backbone.
        macs: Multiply-accumulates per sample and evaluation, attention products included.
        shape: Shape of its output for one sample, channels last.
    """

    name: str
    macs: int
    shape: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Numbers in its output for one sample."""
        return math.prod(self.shape) if self.shape else 0

    @property
    def channels(self) -> int:
        """Width of its output."""
        return self.shape[-1] if self.shape else 0


@dataclass(frozen=True)
class Sites:
    """The sites of one backbone in calling order.

    Args:
        sites: The sites.
        rest: Multiply-accumulates per sample and evaluation outside of them, which always run.
    """

    sites: tuple[Site, ...]
    rest: int

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __getitem__(self, index: int) -> Site:
        return self.sites[index]

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in calling order."""
        return tuple(site.name for site in self.sites)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample of an evaluation that computes everything."""
        return self.rest + sum(site.macs for site in self.sites)


def sites(model: nn.Module) -> Sites:
    """List the cacheable units of a backbone, each with its cost.

    Costs are counted by PyTorch's FLOP counter on a copy without storage, so this is cheap at any
    size, moves no weights and runs no arithmetic.

    Raises:
        ValueError: If the backbone's class is not known, or nothing in it can be cached.
    """
    anchors(model)  # an unknown class is refused before anything is built
    backbone: Any = type(model)
    return _sites_of(backbone, json.dumps(getattr(model, "config"), sort_keys=True))  # noqa: B009


@lru_cache(maxsize=32)
def _sites_of(backbone: Any, config: str) -> Sites:
    with torch.device("meta"):
        twin = backbone(**json.loads(config))
        inputs = twin.example_inputs()
    counts = [0] * len(anchors(twin))
    shapes: list[tuple[int, ...]] = [()] * len(anchors(twin))
    with FlopCounterMode(display=False) as counter:

        def counted(index: int, call: Call) -> Call:
            def run(*args: Any, **kwargs: Any) -> Any:
                before = counter.get_total_flops()
                out = call(*args, **kwargs)
                counts[index] += (counter.get_total_flops() - before) // 2
                shapes[index] = tuple(out.shape[1:])
                return out

            return run

        with torch.no_grad(), attached(twin, counted):
            twin(*inputs)
        total = counter.get_total_flops() // 2
    found = [
        Site(a.name, macs, shape)
        for a, macs, shape in zip(anchors(twin), counts, shapes, strict=True)
    ]
    return Sites(tuple(found), total - sum(counts))
