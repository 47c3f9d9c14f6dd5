"""l2c: run diffusion transformers by learned, static cache plans.

Names load on first use, so that the command line can answer before PyTorch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from l2c.version import __version__ as __version__

if TYPE_CHECKING:
    from l2c.cache import cached as cached
    from l2c.dit import DiT as DiT
    from l2c.loading import load as load
    from l2c.noise import Flow as Flow
    from l2c.noise import Noise as Noise
    from l2c.plan import Plan as Plan
    from l2c.profile import Profile as Profile
    from l2c.reuse import Reuse as Reuse
    from l2c.router import Router as Router
    from l2c.sampling import sample as sample
    from l2c.schedule import Schedule as Schedule
    from l2c.site import Site as Site
    from l2c.site import Sites as Sites
    from l2c.site import sites as sites
    from l2c.uvit import UViT as UViT

_HOMES = {
    "cached": "cache",
    "DiT": "dit",
    "Flow": "noise",
    "load": "loading",
    "Noise": "noise",
    "Plan": "plan",
    "Profile": "profile",
    "Reuse": "reuse",
    "Router": "router",
    "sample": "sampling",
    "Schedule": "schedule",
    "Site": "site",
    "Sites": "site",
    "sites": "site",
    "UViT": "uvit",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'l2c' has no attribute {name!r}")
    value = getattr(import_module(f"l2c.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
