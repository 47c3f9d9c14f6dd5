"""The router file: one safetensors file that says all that is needed to refuse misuse.

Tensors: `scores` float32 [evaluation, site], `gated` uint8 [evaluation], `updates` int64
[evaluation]. Metadata: `l2c`, a JSON object (format, version, identity, sites, schedule, guidance,
threshold, provenance), and `sha256` over that text and the tensors.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from l2c.files import replacing
from l2c.identity import Identity
from l2c.router import Router
from l2c.schedule import Schedule
from l2c.site import Site, Sites
from l2c.version import __version__

FORMAT = 1
DTYPES = {"scores": torch.float32, "gated": torch.uint8, "updates": torch.int64}


def save(router: Router, path: str | Path) -> None:
    """Write a router file, whole or not at all."""
    tensors = {
        "scores": router.scores,
        "gated": router.gated,
        "updates": router.updates,
    }
    tensors = {k: v.detach().cpu().to(DTYPES[k]).contiguous() for k, v in tensors.items()}
    described = {
        "format": FORMAT,
        "version": __version__,
        "identity": {
            "backbone": router.identity.backbone,
            "config": dict(router.identity.config),
            "weights": router.identity.weights,
        },
        "sites": [[site.name, site.macs] for site in router.sites],
        "rest": router.sites.rest,
        "schedule": router.schedule.to_dict(),
        "threshold": router.threshold,
        "guidance_scale": router.guidance_scale,
        "provenance": dict(router.provenance),
    }
    text = json.dumps(described)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"l2c": text, "sha256": _checksum(text, tensors)})


def load(path: str | Path) -> Router:
    """Read a router file.

    Raises:
        ValueError: If it does not exist, or is damaged, foreign, or of another format.
    """
    text, tensors = _read(Path(path))
    try:
        described = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its description is no JSON ({error})") from error
    if described.get("format") != FORMAT:
        raise ValueError(
            f"{path} has router format {described.get('format')}, this version of l2c reads "
            f"format {FORMAT}; it was written by l2c {described.get('version')}, install that one"
        )
    try:
        return _build(described, tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is incomplete: {error!r}; write it again") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a usable router: {error}") from error


def _build(described: dict[str, Any], tensors: dict[str, Tensor]) -> Router:
    listed = tuple(Site(name, macs) for name, macs in described["sites"])
    return Router(
        scores=tensors["scores"],
        gated=tensors["gated"].bool(),
        updates=tensors["updates"],
        sites=Sites(listed, described["rest"]),
        schedule=Schedule.from_dict(described["schedule"]),
        identity=Identity(**described["identity"]),
        threshold=described["threshold"],
        guidance_scale=described["guidance_scale"],
        provenance={**described["provenance"], "l2c_version": described["version"]},
    )


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"expected a router file at {path}, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80":
            raise ValueError(
                f"{path} is a pickle, which can run any code when it is opened; "
                "expected a router file in safetensors, as written by Router.save"
            ) from error
        raise ValueError(
            f"{path} is no whole safetensors file ({error}); copy or write it again"
        ) from error
    if "l2c" not in metadata:
        raise ValueError(
            f"{path} is a safetensors file but no router: it lacks the metadata `l2c`. Expected "
            "a file written by Router.save"
        )
    for name, dtype in DTYPES.items():
        if name not in tensors or tensors[name].dtype != dtype:
            raise ValueError(f"{path} is incomplete: expected a tensor {name} of {dtype}")
    if metadata.get("sha256") != _checksum(metadata["l2c"], tensors):
        raise ValueError(f"{path} is damaged: its checksum differs; copy or write it again")
    return metadata["l2c"], tensors


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
