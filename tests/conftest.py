"""Small real models, and what every test may rely on."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network

import pytest
import torch

import l2c
from l2c.backbone import Backbone
from l2c.identity import Identity

torch.set_num_threads(2)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every weight a random value: adaLN-Zero's zeros would hide most errors."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            noise = torch.randn(parameter.shape, generator=g)
            parameter.data.copy_(noise * 0.5 / max(1, parameter.shape[-1]) ** 0.5)
    return model.eval().requires_grad_(False)


def tiny_dit(seed: int = 0, **overrides: int | bool) -> l2c.DiT:
    """A DiT of three blocks on 3 x 8 x 8 latents with ten classes."""
    config = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 32,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 10,
    }
    return randomised(l2c.DiT(**{**config, **overrides}), seed)


def tiny_uvit(seed: int = 0, **overrides: int | bool) -> l2c.UViT:
    """A U-ViT of three blocks for the same latents and classes."""
    config = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 3,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 10,
    }
    return randomised(l2c.UViT(**{**config, **overrides}), seed)


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of a backbone, in calling order."""
    return [module for module in model.modules() if hasattr(module, "attention")]


def make_router(
    model: l2c.DiT, schedule: l2c.Schedule, seed: int = 0, **changes: object
) -> l2c.Router:
    """A router with random scores in every second evaluation."""
    sites = l2c.sites(model)
    g = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(schedule))
    fields = {
        "scores": torch.rand(len(schedule), len(sites), generator=g),
        "gated": rows % 2 == 1,
        "updates": torch.where(rows % 2 == 1, 7, 0),
        "sites": sites,
        "schedule": schedule,
        "identity": Identity.of(model),
    }
    return l2c.Router(**{**fields, **changes})


@pytest.fixture
def dit() -> l2c.DiT:
    return tiny_dit()


@pytest.fixture
def uvit() -> l2c.UViT:
    return tiny_uvit()


@pytest.fixture(params=[tiny_dit, tiny_uvit], ids=["dit", "uvit"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """One of each kind, with six sites."""
    return request.param()


@pytest.fixture
def schedule() -> l2c.Schedule:
    return l2c.Schedule.ddim(6)


@pytest.fixture
def router(dit: l2c.DiT, schedule: l2c.Schedule) -> l2c.Router:
    return make_router(dit, schedule)


@pytest.fixture
def dit_folder(dit: l2c.DiT, tmp_path: Path) -> Path:
    dit.save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none is here"))
