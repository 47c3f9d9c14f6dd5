"""The router file: one safetensors file that says all that is needed to refuse misuse.

Tensors: `scores` float32 [evaluation, site], `gated` uint8 [evaluation], `updates` int64
[evaluation], -1 where nobody counted; where something was learned about reuse, `corrections`
float32 [evaluation, site, term, channel] and `shift` float32 [evaluation, site, channel].
Metadata: `l2c`, a JSON object (format, version, identity, its weights null where nobody recorded
them, sites, schedule, guidance, threshold, budget, rule of reuse, provenance), and `sha256` over
that text and the tensors.
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
from l2c.reuse import Reuse
from l2c.router import Router
from l2c.schedule import Schedule
from l2c.site import Site, Sites
from l2c.version import __version__

FORMAT = 2
DTYPES = {"scores": torch.float32, "gated": torch.uint8, "updates": torch.int64}
LEARNED = {"corrections": torch.float32, "shift": torch.float32}


def save(router: Router, path: str | Path) -> None:
    """Write a router file, whole or not at all."""
    tensors = {
        "scores": router.scores,
        "gated": router.gated,
        "updates": router.updates,
    }
    for name in LEARNED:
        learned = getattr(router.reuse, name)
        if learned is not None:
            tensors[name] = learned
    dtypes = DTYPES | LEARNED
    tensors = {k: v.detach().cpu().to(dtypes[k]).contiguous() for k, v in tensors.items()}
    described = {
        "format": FORMAT,
        "version": __version__,
        "identity": {
            "backbone": router.identity.backbone,
            "config": dict(router.identity.config),
            "weights": router.identity.weights,
        },
        "sites": [[site.name, site.macs, list(site.shape)] for site in router.sites],
        "rest": router.sites.rest,
        "schedule": router.schedule.to_dict(),
        "threshold": router.threshold,
        "budget": router.budget,
        "reuse": {
            "kind": router.reuse.kind,
            "order": router.reuse.order,
            "relative": router.reuse.relative,
        },
        "streams": router.streams,
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
    path = Path(path)
    metadata, tensors = _read(path)
    described = _described(path, metadata["l2c"])
    if not set(DTYPES) <= set(tensors) <= set(DTYPES | LEARNED):
        raise ValueError(
            f"{path} is no whole router: expected the tensors {', '.join(DTYPES)}, and perhaps "
            f"{', '.join(LEARNED)}, found {', '.join(tensors)}"
        )
    for name, tensor in tensors.items():
        dtype = (DTYPES | LEARNED)[name]
        if tensor.dtype != dtype:
            raise ValueError(f"{path}: expected a tensor {name} of {dtype}, found {tensor.dtype}")
    if metadata.get("sha256") != _checksum(metadata["l2c"], tensors):
        raise ValueError(f"{path} is damaged: its checksum differs; copy or write it again")
    try:
        return _build(described, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is incomplete: {error!r}; write it again") from error
    except ValueError as error:
        raise ValueError(f"{path} is not a usable router: {error}") from error


def _described(path: Path, text: str) -> dict[str, Any]:
    try:
        described = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its description is no JSON ({error})") from error
    if not isinstance(described, dict):
        raise ValueError(f"{path} is damaged: its description is no JSON object")
    if described.get("format") != FORMAT:
        raise ValueError(
            f"{path} has router format {described.get('format')}, this version of l2c reads "
            f"format {FORMAT}; it was written by l2c {described.get('version')}, install that one"
        )
    return described


def _build(described: dict[str, Any], tensors: dict[str, Tensor]) -> Router:
    listed = tuple(
        Site(_typed(name, str), _typed(macs, int), tuple(_typed(size, int) for size in shape))
        for name, macs, shape in described["sites"]
    )
    rule = described["reuse"]
    reuse = Reuse(
        _typed(rule["kind"], str),
        _typed(rule["order"], int),
        tensors.get("corrections"),
        tensors.get("shift"),
        _typed(rule["relative"], bool),
    )
    budget = described["budget"]
    guidance = described["guidance_scale"]
    identity = Identity(
        _typed(described["identity"]["backbone"], str),
        _typed(described["identity"]["config"], dict),
        _typed(described["identity"]["weights"], str | None),
    )
    provenance = {**described["provenance"], "l2c_version": described["version"]}
    return Router(
        scores=tensors["scores"],
        gated=tensors["gated"].bool(),
        updates=tensors["updates"],
        sites=Sites(listed, _typed(described["rest"], int)),
        schedule=Schedule.from_dict(described["schedule"]),
        identity=identity,
        threshold=_typed(described["threshold"], float | int),
        guidance_scale=None if guidance is None else _typed(guidance, float | int),
        provenance=provenance,
        reuse=reuse,
        budget=None if budget is None else _typed(budget, float | int),
        streams=_typed(described["streams"], int),
    )


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind}, found {value!r}")
    return value


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"expected a router file at {path}, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        start = path.read_bytes()[:3]
        # The length of a safetensors header may begin with that byte too, but its third is 0,
        # which is no opcode of a pickle.
        if zipfile.is_zipfile(path) or (start[:1] == b"\x80" and start[2:] not in (b"", b"\0")):
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
    return metadata, tensors


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
