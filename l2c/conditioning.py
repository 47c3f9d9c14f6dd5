"""Conditioning ahead of the loop: what timesteps and labels decide alone is computed once.

Both are known before sampling starts, so the modulation of every block for every evaluation is one
product per block, which reads the block's weights once instead of at each evaluation. So are the
gates of all outputs, with which `l2c.cached` can weigh what it reuses as soon as that is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l2c.attach import Call, Residual, modulated, replaced

LIMIT = 2**28  # bytes of modulations; beyond it they are computed at each evaluation, as ever


@dataclass(frozen=True)
class Ahead:
    """What is known before the loop of the calls that it will make of a model.

    Args:
        sizes: Samples in each call, in order.
        parts: What each modulated module's `modulation` gives, with a row for each sample of each
            call, in order.
    """

    sizes: tuple[int, ...]
    parts: Mapping[nn.Module, tuple[Tensor, ...]]

    @property
    def calls(self) -> int:
        """How many calls there will be."""
        return len(self.sizes)

    def gates(self, residual: Residual) -> Tensor | None:
        """The gates of all sites in all calls, [site, call, B, D]; None for a model without."""
        if not residual.gates:
            return None
        found = torch.stack([self.parts[module][part] for module, part in residual.gates])
        return found.view(len(found), self.calls, -1, found.shape[-1])


def ahead(model: nn.Module) -> Ahead | None:
    """What is known of the calls to come, inside of `prepared`; None outside."""
    found: Ahead | None = model.__dict__.get("_l2c_ahead")
    return found


@contextmanager
def prepared(
    model: Any, timesteps: Sequence[float], labels: Sequence[Tensor], limit: int = LIMIT
) -> Iterator[None]:
    """Evaluate a model at known timesteps and labels with its conditioning computed beforehand.

    Inside the block the model is called for each timestep in turn, once with each entry of
    `labels`. Results equal those without up to rounding: a product of more rows may add up in
    another order. `l2c.cached`, entered after this, then applies runs of reused outputs in one
    pass.

    Args:
        model: The backbone. Of one without modulation nothing is computed.
        timesteps: The timestep of each evaluation.
        labels: The labels [B] of each call of an evaluation.
        limit: Most bytes that the modulations may take; with more the model is left alone.
    """
    modules = modulated(model)
    sizes = tuple(len(y) for _ in timesteps for y in labels)
    if not modules:
        with told(model, Ahead(sizes, {})):
            yield
        return
    calls = [(t, y) for t in timesteps for y in labels]
    rows = sum(len(y) for _, y in calls)
    weight = next(model.parameters())
    numbers = rows * sum(_width(module) for module in modules)
    if numbers * weight.element_size() > limit:
        yield
        return
    times = torch.cat([torch.full((len(y),), t, device=y.device) for t, y in calls])
    condition = model.condition(times, torch.cat([y for _, y in calls]))
    blocks: list[Any] = list(modules)
    parts = {block: tuple(block.modulation(condition)) for block in blocks}
    tables = [[part.split(sizes) for part in parts[block]] for block in blocks]
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
    with replaced(targets, replacements), told(model, Ahead(sizes, parts)):
        yield


@contextmanager
def told(model: nn.Module, known: Ahead) -> Iterator[None]:
    """Let `ahead` give this inside of the block."""
    with replaced([(model, "_l2c_ahead")], [known]):
        yield


def _width(module: Any) -> int:
    width: int = module.adaLN_modulation[-1].out_features
    return width
