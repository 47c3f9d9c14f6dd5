"""Loading backbones: folders and hub ids in the hub's layout, and official checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file
from torch import Tensor

from l2c.backbone import Backbone
from l2c.dit import DiT
from l2c.uvit import UViT

BACKBONES: dict[str, type[Backbone]] = {"DiT": DiT, "UViT": UViT}


def load(path: str | Path, **config: Any) -> Any:
    """Load a backbone, in eval mode and with gradients off.

    Args:
        path: A folder or hub id with config.json and model.safetensors, or a file (.pt, .pth,
            .safetensors) holding a state dict in the official layout of DiT or U-ViT.
        config: Settings that an official file does not tell, e.g. `num_heads` of a model of no
            published size, or `null_class=False` of a U-ViT trained without label dropout.

    Raises:
        ValueError: If nothing is there, or the weights do not fit.
    """
    if Path(path).is_file():
        model = _load_official(Path(path), config)
    else:
        model = _load_folder(str(path), config)
    return model.eval().requires_grad_(False)


def _load_folder(path: str, config: dict[str, Any]) -> Any:
    if config:
        raise ValueError(f"{path} has its own config.json; it takes no {', '.join(config)}")
    local = Path(path).is_dir()
    if not local and (Path(path).is_absolute() or path.count("/") != 1 or path.startswith(".")):
        raise ValueError(f"expected a model folder, a file or a hub id, found nothing at {path}")
    files = {}
    for name in ("config.json", "model.safetensors"):
        files[name] = Path(path) / name if local else _download(path, name)
        if not files[name].is_file():
            raise ValueError(f"expected config.json and model.safetensors in {path}, no {name}")
    try:
        settings = dict(json.loads(files["config.json"].read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{files['config.json']} is no JSON object: {error}") from error
    name = settings.pop("_class_name", None)
    if name not in BACKBONES:
        raise ValueError(
            f"config.json in {path} holds a backbone {name!r}; known are {', '.join(BACKBONES)}"
        )
    model = _empty(BACKBONES[name], settings, str(files["config.json"]))
    return _fill(model, _read_state(files["model.safetensors"]), path)


def _download(repository: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"there is no folder {repository}, and no {name} of a hub model of that name: {error}"
        ) from error


def _load_official(path: Path, config: dict[str, Any]) -> Any:
    state = _read_state(path)
    backbone = _recognised(state, path)
    for key, rank in backbone.layout.items():
        if state[key].ndim != rank:
            raise ValueError(
                f"expected {key} of {rank} dimensions in {path}, got {tuple(state[key].shape)}"
            )
    try:
        settings = backbone.infer_config(state, **config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    filled = _fill(_empty(backbone, settings, str(path)), state, str(path))
    filled.pos_embed.requires_grad_(False)
    return filled


def _recognised(state: dict[str, Tensor], path: Path) -> type[Backbone]:
    lacking = {
        name: sorted(backbone.layout.keys() - state.keys()) for name, backbone in BACKBONES.items()
    }
    for name, keys in lacking.items():
        if not keys:
            return BACKBONES[name]
    missing = "; ".join(f"for {name} it lacks {', '.join(keys)}" for name, keys in lacking.items())
    raise ValueError(f"expected a state dict in an official layout in {path}: {missing}")


def _empty(backbone: Any, settings: dict[str, Any], path: str) -> Any:
    try:
        with torch.device("meta"):
            return backbone(**settings)
    except TypeError as error:
        raise ValueError(f"{path} does not describe a {backbone.__name__}: {error}") from error


def _fill(model: Any, state: dict[str, Tensor], path: str) -> Any:
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit {type(model).__name__}({model.config}): {error}"
        ) from error
    return model


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint fails in the unpickler in any way
        raise ValueError(
            f"{path} is no whole checkpoint of tensors alone ({type(error).__name__}); copy it "
            "again, or save its state dict in safetensors"
        ) from error
    state = state.get("ema", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"expected a state dict of tensors in {path}, or one under `ema`")
    return state
