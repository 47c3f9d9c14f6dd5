"""Where measurements are written, and with what beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l2c.files import replacing
from train import machine

FOLDER = Path(__file__).parent / "results"


def path_of(name: str, device: str) -> Path:
    """Where a measurement on a device is written."""
    kind = "" if device == "cpu" else f"-{device.partition(':')[0]}"
    return FOLDER / f"{name}{kind}.json"


def write(name: str, device: str, seed: int, **figures: Any) -> Path:
    """Write a measurement as JSON, with the machine, versions, seed and command."""
    path = path_of(name, device)
    content = {**figures, "seed": seed, "machine": machine.described(device)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}")
    return path
