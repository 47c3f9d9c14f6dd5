"""Routers as others publish them: reading them for a model, and writing them for other code.

| suffix | format |
| --- | --- |
| .safetensors | this project's router file, `l2c.router_file` |
| .pt, .pth | Learning-to-Cache for DiT and for U-ViT, `l2c.learning_to_cache` |
| .json | SmoothCache, `l2c.smoothcache` |
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from l2c import dit, learning_to_cache, smoothcache, uvit
from l2c.backbone import Backbone
from l2c.identity import Identity
from l2c.loading import load
from l2c.router import UNCOUNTED, Router
from l2c.schedule import Schedule
from l2c.site import sites

SUFFIXES = (".safetensors", ".pt", ".pth", ".json")
PUBLISHED = {56: "DiT-XL/2", 48: "DiT-L/2", 58: "U-ViT-H/2"}  # by number of sites
LATENT = 8  # pixels to a latent's element, on a side


def read(
    path: str | Path,
    model: str | Path | Backbone | None = None,
    *,
    evaluations: int | None = None,
    threshold: float | None = None,
    input_size: int | None = None,
    solver: str | None = None,
    spacing: str | None = None,
) -> Router:
    """Read a router in any of the known formats; nothing in the file is run.

    Args:
        path: The file.
        model: Whom it is for: a published name as "DiT-XL/2", whose weights stay unknown, or a
            folder, an official file or a model, whose weights the router is bound to. By default
            what a Learning-to-Cache file tells; SmoothCache's tell nothing.
        evaluations: Refuse the file if it is for another number.
        threshold: Compute above this score. By default the published one of Learning-to-Cache: 0.1
            for DiT, but 0.9 for 512 x 512 images, and 0.9 for U-ViT (Ma et al. 2024, table 8).
        input_size: Side of the latent, in elements, for a published name; by default that of the
            file, or 32.
        solver: Solver of a SmoothCache schedule, which tells none; "ddim" by default.
        spacing: Its timesteps, an option of the solver.

    Raises:
        ValueError: If the file is damaged, of no known format, or for another model or schedule.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not path.is_file():
        raise ValueError(f"expected a router at {path}, found none")
    if suffix != ".json" and (solver or spacing):
        raise ValueError(f"{path} has its own schedule; solver and spacing are for SmoothCache")
    if suffix == ".json":
        router = _smoothcache(path, model, input_size, solver or "ddim", spacing)
    elif suffix == ".safetensors":
        router = _own(path, model, input_size)
    else:
        router = _learning_to_cache(path, model, input_size)
    if evaluations not in (None, len(router.schedule)):
        raise ValueError(f"{path} is for {len(router.schedule)} evaluations, not {evaluations}")
    return router if threshold is None else dataclasses.replace(router, threshold=threshold)


def write(router: Router, path: str | Path) -> list[str]:
    """Write a router in the format of the path's suffix, whole or not at all.

    Returns:
        What the file does not hold, a sentence each.

    Raises:
        ValueError: If the suffix is unknown, or the format can't express the router.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix == ".safetensors":
        router.save(path)
        return []
    if suffix == ".json":
        smoothcache.write(router.plan(), path)
        return [
            f"the scores: it is the plan at threshold {router.threshold:g}",
            f"the model, the provenance and the schedule ({router.schedule})",
        ]
    return learning_to_cache.write(router, path)


def named(name: str, input_size: int | None = None) -> Backbone:
    """A published model without its weights, on the meta device.

    Args:
        name: As in "DiT-XL/2" or "U-ViT-H/2".
        input_size: Side of the latent, in elements; 32 by default.

    Raises:
        ValueError: If nothing is published under that name.
    """
    settings = {} if input_size is None else {"input_size": input_size}
    family = uvit.UViT if name.startswith("U-ViT") else dit.DiT
    with torch.device("meta"):
        return family.named(name, **settings).eval().requires_grad_(False)


def _suffix(path: Path) -> str:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"expected a name that ends in {', '.join(SUFFIXES)}, got {path.name!r}: the suffix "
            "tells the format"
        )
    return path.suffix.lower()


def _model(model: str | Path | Backbone, input_size: int | None) -> Any:
    known = isinstance(model, str) and model.partition("/")[0] in {*dit.SIZES, *uvit.SIZES}
    if known and not Path(str(model)).exists():
        return named(str(model), input_size)
    if input_size is not None:
        raise ValueError(f"{model} has its own input size; give one with a published name alone")
    return model if isinstance(model, Backbone) else load(model)


def _own(path: Path, model: str | Path | Backbone | None, input_size: int | None) -> Router:
    router = Router.load(path)
    if model is None:
        if input_size is not None:
            raise ValueError(f"{path} has its own input size; give one with a published name alone")
        return router
    found = _model(model, input_size)
    bound = router.rebind(found)
    if router.sites != sites(found):
        raise ValueError(f"{path} lists other sites, or other costs, than {_title(found)} has")
    return router if bound.identity.weights is None else bound


def _smoothcache(
    path: Path,
    model: str | Path | Backbone | None,
    input_size: int | None,
    solver: str,
    spacing: str | None,
) -> Router:
    lists = smoothcache.read(path)
    if model is None:
        raise ValueError(f"{path} does not tell its model; name one, as in DiT-XL/2, or a folder")
    found = _model(model, input_size)
    count = len(next(iter(lists.values())))
    options = {} if spacing is None else {"spacing": spacing}
    schedule = Schedule.of(solver, count, noise=found.noise, **options)
    try:
        compute = smoothcache.table(lists, sites(found))
    except ValueError as error:
        raise ValueError(f"{path} does not fit {_title(found)}: {error}") from error
    gated = ~compute.all(dim=1)
    return Router(
        scores=compute.float(),
        gated=gated,
        updates=torch.where(gated, UNCOUNTED, 0),
        sites=sites(found),
        schedule=schedule,
        identity=Identity.of(found),
        provenance={"source": _source(path, "SmoothCache")},
    )


def _learning_to_cache(
    path: Path, model: str | Path | Backbone | None, input_size: int | None
) -> Router:
    published = learning_to_cache.read(path)
    arguments = published.arguments
    if model is None:
        found: Any = named(_told(path, published), input_size or _told_size(path, arguments))
    else:
        found = _model(model, input_size)
    layout, indices = published.layout, len(published.logits)
    if type(found).__name__ != layout.backbone:
        raise ValueError(
            f"{path} is a router for {layout.backbone}, but {_title(found)} was to be its model"
        )
    told = arguments.get("num_sampling_steps", indices)
    if told != indices:
        raise ValueError(f"{path} has {indices} rows, but its arguments tell of {told} steps")
    try:
        schedule = layout.schedule(indices, noise=found.noise)
        scores, gated, updates = published.tensors(sites(found), schedule)
    except ValueError as error:
        raise ValueError(f"{path} does not fit {_title(found)}: {error}") from error
    low = layout.backbone == "DiT" and found.input_size * LATENT != 512
    source = _source(path, f"Learning-to-Cache for {layout.backbone}")
    return Router(
        scores=scores,
        gated=gated,
        updates=updates,
        sites=sites(found),
        schedule=schedule,
        identity=Identity.of(found),
        threshold=0.1 if low else 0.9,
        provenance={"source": source, **({"arguments": arguments} if arguments else {})},
    )


def _told(path: Path, published: learning_to_cache.Published) -> str:
    """The name of the model that a file is for."""
    name = published.arguments.get("model")
    if isinstance(name, str):
        return name
    width = published.logits.shape[1]
    guess = PUBLISHED.get(width)
    if guess is None:
        counts = {size: 2 * values["depth"] for size, values in dit.SIZES.items()}
        counts |= {size: 2 * (values["depth"] + 1) for size, values in uvit.SIZES.items()}
        alike = " and ".join(size for size, count in counts.items() if count == width)
        raise ValueError(
            f"{path} has {width} gates in a row, as {alike or 'no published model'}; name its "
            "model, as in DiT-XL/2, or a folder"
        )
    return guess


def _told_size(path: Path, arguments: Mapping[str, Any]) -> int | None:
    """The side of the latents that a file is for."""
    pixels = arguments.get("image_size")
    if pixels is None:
        return None
    if type(pixels) is not int or not LATENT <= pixels <= 4096:
        raise ValueError(f"{path} tells of images of {pixels!r:.20} pixels; name its model")
    return pixels // LATENT


def _title(model: Any) -> str:
    return f"{type(model).__name__} of {len(sites(model))} sites"


def _source(path: Path, form: str) -> dict[str, str]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"format": form, "file": path.name, "sha256": digest}
