"""What all backbones of l2c have in common."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from l2c.noise import Noise


class Backbone(nn.Module, PyTorchModelHubMixin):
    """A frozen model's common ground: `forward(x, t, y)`, its sizes and its configuration.

    `from_pretrained(dir_or_hub_id)`, `save_pretrained(dir)` and `push_to_hub(id)` read and write
    config.json and model.safetensors; `l2c.load` also reads official checkpoints.

    Attributes:
        config: The constructor's arguments, plain values.
        in_channels: Channels of the latent.
        input_size: Height and width of the latent, in elements.
        num_classes: Number of class labels; 0 for a model without.
        null_label: The label of the unconditional model; None if there is none.
        noise: The forward process that it was trained with; set another one where that differs.
        layout: Keys by which a state dict in the official layout is known, and their dimensions.
    """

    config: dict[str, Any]
    in_channels: int
    input_size: int
    num_classes: int
    null_label: int | None
    noise: Noise
    layout: ClassVar[Mapping[str, int]]

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor], **given: Any) -> dict[str, Any]:
        """The constructor's arguments from the shapes in an official state dict.

        Args:
            state: Has the keys of `layout`.
            given: Settings in place of inferred ones.

        Raises:
            ValueError: If a setting that the shapes do not tell is not given.
        """
        raise NotImplementedError

    def example_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `forward` for one sample, on the default device."""
        size = self.input_size
        x = torch.zeros(1, self.in_channels, size, size)
        return x, torch.zeros(1), torch.zeros(1, dtype=torch.long)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        described = {"_class_name": type(self).__name__, **self.config}
        (save_directory / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def depth_of(state: Mapping[str, Tensor], container: str) -> int:
    """Number of blocks in a module list of a state dict."""
    found = (re.match(rf"{container}\.(\d+)\.", key) for key in state)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def heads_of(sizes: Mapping[str, Mapping[str, int]], hidden_size: int, depth: int) -> int:
    """Attention heads of the published size, which no shape tells.

    Raises:
        ValueError: If no published model is of this size.
    """
    for size in sizes.values():
        if (size["hidden_size"], size["depth"]) == (hidden_size, depth):
            return size["num_heads"]
    raise ValueError(
        f"hidden size {hidden_size} and depth {depth} are those of no published model "
        f"({', '.join(sizes)}); give num_heads=..."
    )


def check_sizes(**sizes: int) -> None:
    """Raise a ValueError if a size is below 1."""
    if min(sizes.values()) < 1:
        got = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"expected sizes of at least 1, got {got}")


def sinusoidal(t: Tensor, features: int) -> Tensor:
    """Timestep features [B, features]: frequencies 10000^(-i/half), cosines before sines."""
    half = features // 2
    # Multiplied before it is divided, which rounds as the original does.
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
