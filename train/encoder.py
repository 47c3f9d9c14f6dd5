"""The encoder of a diffusers `AutoencoderKL`, as a function from pixels to scaled latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from l2c.identity import fingerprint
from train.crops import MODES


class Encoder:
    """An `AutoencoderKL` from pixels to latents: the inverse of `l2c.sampling.decode`.

    Args:
        path: Folder or hub id.
        size: Height and width of the images, in pixels.
    """

    def __init__(self, path: str, size: int) -> None:
        self.vae = load_vae(path)
        config = self.vae.config
        self.channels: int = config.in_channels
        if self.channels not in MODES:
            raise ValueError(f"expected a VAE of 1 or 3 channels, {path} has {self.channels}")
        if config.latents_mean is not None or config.latents_std is not None:
            raise ValueError(
                f"expected a VAE whose latents are scaled by one factor, {path} has latents_mean "
                "and latents_std, which l2c.sample does not undo"
            )
        factor = 2 ** (len(config.block_out_channels) - 1)
        if size % factor:
            raise ValueError(
                f"expected a size divisible by {factor}, the factor by which {path} reduces "
                f"images, got {size}; use {max(1, round(size / factor)) * factor}"
            )
        self.shape = [config.latent_channels, size // factor, size // factor]

    def described(self) -> dict[str, Any]:
        """Fingerprint and configuration."""
        config = {k: v for k, v in self.vae.config.items() if not k.startswith("_")}
        return {"weights": fingerprint(self.vae), "config": config}

    def to(self, device: str, dtype: str) -> None:
        """Compute there, and in that type."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            # Not diffusers' own `to`, which warns of modules to be kept in float32: there are none.
            torch.nn.Module.to(self.vae, device, getattr(torch, dtype))
        except (RuntimeError, AssertionError) as error:  # without CUDA, PyTorch asserts
            raise ValueError(f"device {device} cannot be used: {one_line(error)}") from error

    def __call__(self, pixels: Tensor, noise: Tensor | None) -> Tensor:
        """Scaled latents [B, c, h, w], float32, of uint8 pixels [B, C, H, W].

        With noise [B, c, h, w] they are samples of the posterior, without it is its mode.
        """
        values = pixels.to(self.vae.device).float() / 127.5 - 1
        posterior = self.vae.encode(values.to(self.vae.dtype)).latent_dist
        z = posterior.mode().float()
        if noise is not None:
            z = z + posterior.std.float() * noise.to(z.device)
        config = self.vae.config
        scaled: Tensor = (z - (config.shift_factor or 0)) * config.scaling_factor
        return scaled


def load_vae(path: str) -> Any:
    """Load an `AutoencoderKL`; a folder needs no network.

    Raises:
        ValueError: If there is none, or its weights are incomplete.
    """
    local = Path(path).is_dir()
    try:
        config = AutoencoderKL.load_config(path, local_files_only=local)
        name = config.get("_class_name")
        if name != "AutoencoderKL":
            raise ValueError(f"its config.json describes {name or 'no diffusers model'}")
        vae, report = AutoencoderKL.from_pretrained(
            path,
            local_files_only=local,
            use_safetensors=True,  # nothing is unpickled
            low_cpu_mem_usage=False,  # which would need another package
            output_loading_info=True,
        )
        if report["missing_keys"]:  # diffusers would leave them random
            raise ValueError(f"its weights lack {', '.join(report['missing_keys'][:3])}")
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        place = "" if local else ", which is no folder here and was not to be had from the hub"
        raise ValueError(
            "expected a folder or hub id of a diffusers AutoencoderKL (config.json and "
            "diffusion_pytorch_model.safetensors; of a pipeline, its folder vae), got "
            f"{path}{place}: {one_line(error)}"
        ) from error
    return vae.eval().requires_grad_(False)


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())
