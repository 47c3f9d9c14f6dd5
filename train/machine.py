"""What a measurement was made with."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import l2c
from l2c.profile import processor


def described(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions and command of this process, for the JSON of a measurement."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": version("lightning"),
        "timm": version("timm"),
        "l2c": l2c.__version__,
        "command": "python -m " + " ".join([module(), *sys.argv[1:]]),
    }


def versions() -> dict[str, str]:
    """What a router was trained with, for its file."""
    return {
        "torch": str(torch.__version__),
        "lightning": version("lightning"),
        "l2c": l2c.__version__,
        "python": platform.python_version(),
    }


def module() -> str:
    """Name of the running module, as given to `python -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name
