"""What importing l2c loads, and what it offers."""

from __future__ import annotations

import subprocess
import sys

import l2c


def loaded_by(code: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter after some code."""
    code += "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(out.stdout.split())


def test_running_routers_needs_no_training_packages() -> None:
    names = ", ".join(name for name in l2c.__all__ if name != "__version__")
    loaded = loaded_by(f"from l2c import {names}")
    assert {"torch", "timm", "safetensors"} <= loaded
    assert not {"lightning", "datasets", "torchmetrics", "diffusers", "train"} & loaded


def test_importing_alone_is_light() -> None:
    assert "torch" not in loaded_by("import l2c; l2c.__version__")


def test_every_public_name_is_there() -> None:
    for name in l2c.__all__:
        assert getattr(l2c, name) is not None
    assert not hasattr(l2c, "nothing")
