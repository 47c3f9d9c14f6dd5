"""Which model a router belongs to: class, configuration and a fingerprint of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_known: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Identity:
    """A backbone's class, configuration and weights.

    Args:
        backbone: Name of the class.
        config: Its constructor's arguments.
        weights: Fingerprint of the state dict, see `fingerprint`; None if nobody recorded it, as
            for routers that others published.
    """

    backbone: str
    config: Mapping[str, Any]
    weights: str | None

    @classmethod
    def of(cls, model: nn.Module) -> Identity:
        """Identify a model; one on the meta device has no weights to record."""
        config: Any = getattr(model, "config", {})
        empty = any(parameter.is_meta for parameter in model.parameters())
        return cls(type(model).__name__, dict(config), None if empty else fingerprint(model))

    def differences(self, other: Identity) -> list[str]:
        """What differs, a line each; empty if equal. Weights that were not recorded fit any."""
        if self.backbone != other.backbone:
            return [f"backbone: expected {self.backbone}, got {other.backbone}"]
        lines = [
            f"{key}: expected {self.config.get(key)!r}, got {other.config.get(key)!r}"
            for key in sorted({*self.config, *other.config})
            if self.config.get(key) != other.config.get(key)
        ]
        recorded = self.weights is not None and other.weights is not None
        if not lines and recorded and self.weights != other.weights:
            lines = [f"weights: expected {self.brief}, got {other.brief}"]
        return lines

    @property
    def brief(self) -> str:
        """The fingerprint's first digits, or "unknown"."""
        return "unknown" if self.weights is None else self.weights[:12]


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bfloat16 values of a state dict.

    Rounding to bfloat16 makes a model loaded in float32 and the same in bfloat16 equal. The
    result is remembered while place, version and two weighted sums of every tensor stay the same,
    which is quick to see on the model's own device.
    """
    state = model.state_dict()
    stamp = _stamp(state)
    if model in _known and _known[model][0] == stamp:
        return _known[model][1]
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.is_floating_point():
            value = value.to(torch.bfloat16).view(torch.int16)
        digest.update(value.cpu().contiguous().numpy().tobytes())
    _known[model] = (stamp, digest.hexdigest())
    return digest.hexdigest()


def _stamp(state: Mapping[str, Tensor]) -> tuple[Any, ...]:
    # The version tells of ordinary changes in place; the sums, one of them weighted by position,
    # of those through `.data`, which tell nobody. One transfer brings all sums from the device.
    places = [
        (v.data_ptr(), None if v.is_inference() else v._version, v.dtype) for v in state.values()
    ]
    sums = []
    for value in state.values():
        flat = value.flatten().float()
        weights = torch.linspace(-1, 1, flat.numel(), device=flat.device)
        sums += [flat.sum(), flat @ weights]
    return (*places, *(torch.stack(sums).tolist() if sums else ()))
