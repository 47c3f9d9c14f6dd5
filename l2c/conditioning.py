"""Conditioning ahead of the loop: what timesteps and labels decide alone is computed once.

Both are known before sampling starts, so the modulation of every block for every evaluation is one
product per block, which reads the block's weights once instead of at each evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from l2c.attach import Call, modulated, replaced

LIMIT = 2**28  # bytes of modulations; beyond it they are computed at each evaluation, as ever


@contextmanager
def prepared(
    model: Any, timesteps: Sequence[float], labels: Sequence[Tensor], limit: int = LIMIT
) -> Iterator[None]:
    """Evaluate a model at known timesteps and labels with its conditioning computed beforehand.

    Inside the block the model is called for each timestep in turn, once with each entry of
    `labels`. Results equal those without up to rounding: a product of more rows may add up in
    another order.

    Args:
        model: The backbone. One without modulation is left alone.
        timesteps: The timestep of each evaluation.
        labels: The labels [B] of each call of an evaluation.
        limit: Most bytes that the modulations may take; with more the model is left alone.
    """
    modules = modulated(model)
    calls = [(t, y) for t in timesteps for y in labels]
    rows = sum(len(y) for _, y in calls)
    weight = next(model.parameters())
    numbers = rows * sum(_width(module) for module in modules)
    if not modules or numbers * weight.element_size() > limit:
        yield
        return
    sizes = [len(y) for _, y in calls]
    times = torch.cat([torch.full((len(y),), t, device=y.device) for t, y in calls])
    condition = model.condition(times, torch.cat([y for _, y in calls]))
    blocks: list[Any] = list(modules)
    tables = [[part.split(sizes) for part in block.modulation(condition)] for block in blocks]
    conditions = condition.split(sizes)
    done = 0

    def forward_of(forward: Call) -> Call:
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            out = forward(*args, **kwargs)
            done += 1
            return out

        return evaluate

    def stored(parts: list[tuple[Tensor, ...]]) -> Call:
        return lambda _: [part[done] for part in parts]

    targets = [(model, "forward"), (model, "condition")]
    replacements = [forward_of(model.forward), lambda *_: conditions[done]]
    targets += [(module, "modulation") for module in modules]
    replacements += [stored(parts) for parts in tables]
    with replaced(targets, replacements):
        yield


def _width(module: Any) -> int:
    width: int = module.adaLN_modulation[-1].out_features
    return width
