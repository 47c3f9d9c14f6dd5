"""Images to latents: `python -m train encode --config configs/encode_imagenet_256.yaml`.

The shards are those that `train.sources.Latents` reads. Beside them settings.json says what they
were made from and how, so that no folder ever mixes two kinds.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from jsonargparse import CLI
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from l2c.files import replacing
from train.crops import Crops, stacked
from train.encoder import Encoder
from train.seeding import generator
from train.sources import SETTINGS, Source


@torch.no_grad()
def encode(
    source: Source,
    vae: str,
    size: int,
    out: str,
    split: Literal["train", "validation", "all"] = "train",
    flip: bool = False,
    latents: Literal["sample", "mode"] = "sample",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    stored: Literal["float16", "float32"] = "float16",
    batch_size: int = 32,
    shard: int = 4096,
    workers: int = 0,
    device: str = "auto",
    seed: int = 0,
) -> list[Path]:
    """Encode the images of a source into shards of latents, scaled as the model expects them.

    Shards that are there already are kept: a run continues at the first missing one, and ends with
    the same bits as if it had never been interrupted.

    Args:
        source: Where the images come from; their sizes may differ.
        vae: Folder or hub id of a diffusers `AutoencoderKL`.
        size: Height and width of the encoded part of an image, in pixels.
        out: Folder for the shards.
        split: Which images; "all" is both splits, for a source that only holds images out of one.
        flip: Encode each image a second time, mirrored left to right, right after itself.
        latents: A sample of the VAE's posterior, or its mode.
        dtype: Type in which the VAE computes.
        stored: Type of the latents in the shards; they are read as float32.
        batch_size: Images per call of the VAE. It may change between runs, as may workers and
            device; that changes no more than the rounding of the shards made from then on.
        shard: Samples per shard, which is also what is kept in memory.
        workers: Processes that read and crop images; 0 for the main one.
        device: Where the VAE computes, e.g. cpu or cuda:1; auto for a GPU if there is one.
        seed: Seed of the posterior's noise.

    Returns:
        The files of all shards.

    Raises:
        ValueError: If there are no images or no VAE, they do not fit, a latent is not finite, or
            the folder holds latents made with other settings.
    """
    if min(size, batch_size, shard) < 1 or workers < 0:
        raise ValueError(
            "expected size, batch_size and shard of at least 1 and workers of at least 0, "
            f"got {size}, {batch_size}, {shard} and {workers}"
        )
    encoder = Encoder(vae, size)
    dataset = images_of(source, split)
    crops = Crops(dataset, size, encoder.channels, flip)
    settings = {
        "source": {"class": type(source).__name__, **public(source)},
        "split": split,
        **described(dataset),
        "samples": len(crops),
        "size": size,
        "flip": flip,
        "vae": encoder.described(),
        "latents": latents,
        "shape": encoder.shape,
        "dtype": dtype,
        "stored": stored,
        "shard": shard,
        "seed": seed,
    }
    folder = Path(out)
    claim(folder, settings)

    spans = [range(s, min(s + shard, len(crops))) for s in range(0, len(crops), shard)]
    paths = {span: folder / f"{span.start:08d}.safetensors" for span in spans}
    missing = [span for span in spans if not paths[span].is_file()]
    if not missing:
        return list(paths.values())
    encoder.to(device, dtype)
    # No batch crosses the end of a shard, so a shard's bits do not depend on where a run began.
    batches = [
        span[i : i + batch_size] for span in missing for i in range(0, len(span), batch_size)
    ]
    loaded = iter(
        DataLoader(crops, batch_sampler=batches, num_workers=workers, collate_fn=stacked)  # type: ignore[arg-type]
    )
    done = len(crops) - sum(map(len, missing))
    with tqdm(total=len(crops), initial=done, desc="Encoding images", unit="image") as bar:
        for span in missing:
            # Noise of the whole shard at once: it is the same for every batch_size.
            g = generator("encode", seed, span.start)
            noise = torch.randn(len(span), *encoder.shape, generator=g)
            encoded, labels = [], []
            for i in range(0, len(span), batch_size):
                pixels, named = next(loaded)
                drawn = noise[i : i + batch_size] if latents == "sample" else None
                encoded.append(encoder(pixels, drawn).to(getattr(torch, stored)).cpu())
                labels.append(named)
                bar.update(len(named))
            shard_latents = torch.cat(encoded).contiguous()
            if not shard_latents.isfinite().all():
                raise ValueError(
                    f"expected finite latents, got others among samples {span.start} to "
                    f"{span.stop - 1} with dtype {dtype} and stored {stored}; use float32"
                )
            with replacing(paths[span]) as temporary:
                save_file({"latents": shard_latents, "labels": torch.cat(labels)}, temporary)
    return list(paths.values())


def images_of(source: Source, split: Literal["train", "validation", "all"]) -> Dataset:
    """The images of one split or of both.

    Raises:
        ValueError: If there are none.
    """
    if split == "all":
        dataset = concatenate_datasets([source.load("train"), source.load("validation")])
    else:
        dataset = source.load(split)
    if not {"image", "label"} <= set(dataset.column_names):
        raise ValueError(
            "expected a source of images with the columns image and label, "
            f"{type(source).__name__} has {', '.join(dataset.column_names)}"
        )
    if not len(dataset):
        raise ValueError(f"{type(source).__name__} holds no images in split {split}")
    return dataset


def described(dataset: Dataset) -> dict[str, Any]:
    """Number of images, names of the classes, and a digest of all labels in their order."""
    labels = np.asarray(dataset.select_columns("label").with_format("numpy")[:]["label"])
    return {
        "images": len(dataset),
        "classes": getattr(dataset.features["label"], "names", None),
        "labels": hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
    }


def public(source: Source) -> dict[str, Any]:
    """The settings that a source keeps in its attributes."""
    return {name: value for name, value in vars(source).items() if not name.startswith("_")}


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a folder without shards, or compare them with those of its shards.

    Raises:
        ValueError: If they differ, or nothing says how the shards in it were made.
    """
    path = folder / SETTINGS
    text = json.dumps(settings, indent=2, default=str) + "\n"
    if not any(folder.glob("[!.]*.safetensors")):
        with replacing(path) as temporary:
            temporary.write_text(text)
        return
    if not path.is_file():
        raise ValueError(f"{folder} has shards and no {SETTINGS}; give another out")
    try:
        before, now = flat(json.loads(path.read_text())), flat(json.loads(text))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no file of settings: {error}") from error
    lines = [
        f"{key}: it has {short(before.get(key))}, now {short(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]
    if lines:
        raise ValueError(
            f"{folder} holds latents made with other settings ({'; '.join(lines)}); "
            "set them as they were, or give another out"
        )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    result = {}
    for key, value in settings.items():
        nested = (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        result.update(nested)
    return result


def short(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors in what the user gave are one line, with exit status 1."""
    # diffusers' own use of the hub's client.
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks.*")
    try:
        paths = CLI(
            encode,
            args=arguments,
            as_positional=False,
            prog="python -m train encode",
            description="Encode images into shards of latents.",
        )
    except ValueError as error:
        print(f"python -m train encode: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return 130
    print(f"written to {paths[0].parent}: {len(paths)} shards and {SETTINGS}")
    return 0
