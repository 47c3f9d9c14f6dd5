"""Where images come from: each source turns a place into a `datasets.Dataset`.

A dataset has a column `label` (int) and either `image` (PIL image, or uint8 array [C, H, W]) or
`latent` (float array [C, H, W], already scaled as the model expects it).
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import (
    Array3D,
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    Value,
    load_dataset,
)
from datasets.features.features import Array3DExtensionType
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Split = Literal["train", "validation"]

SETTINGS = "settings.json"  # beside the shards of `train.encode`: what they were made from and how

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class Source:
    """Base of all sources; a subclass of your own may be named in YAML by its import path."""

    def load(self, split: Split) -> Dataset:
        """Return the images of a split.

        Raises:
            ValueError: If the place holds no images.
        """
        raise NotImplementedError


class FashionMNIST(Source):
    """Fashion-MNIST: 60,000 training and 10,000 test images, grey, 28 x 28, ten classes.

    Args:
        path: A hub id, or a folder with the four idx files (Debian's dataset-fashion-mnist puts
            them into /usr/share/datasets/fashion-mnist).
    """

    def __init__(self, path: str = "zalando-datasets/fashion_mnist") -> None:
        self.path = path

    def load(self, split: Split) -> Dataset:
        """Return the training set, or for "validation" the test set."""
        folder = Path(self.path)
        if not folder.is_dir():
            return load_dataset(self.path, split="train" if split == "train" else "test")
        prefix = "train" if split == "train" else "t10k"
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        features = Features(
            {
                "image": Array3D((1, *images.shape[1:]), "uint8"),
                "label": ClassLabel(names=list(FASHION_MNIST_CLASSES)),
            }
        )
        columns = {"image": images[:, None], "label": labels.astype(np.int64)}
        return Dataset.from_dict(columns, features=features)


class ImageFolder(Source):
    """A folder with one sub-folder of images per class, under train/ and validation/ or alone.

    Args:
        path: The folder.
        size: Height and width that every image must have, in pixels; None for any, as `encode`
            takes them.
        channels: 1 for grey, 3 for colour; images are converted.
        validation_share: Share of the images held out where there is no validation/ folder.
    """

    def __init__(
        self,
        path: str,
        size: int | None = None,
        channels: Literal[1, 3] = 3,
        validation_share: float = 0.05,
    ) -> None:
        self.path = path
        self.size = size
        self.channels = channels
        self.validation_share = validation_share

    def load(self, split: Split) -> Dataset:
        """Return the images of a split, decoded when they are read."""
        if not Path(self.path).is_dir():
            raise ValueError(f"expected a folder of images, found nothing at {self.path}")
        try:
            found = load_dataset("imagefolder", data_dir=self.path)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"no images found in {self.path}: {error}") from error
        part = choose(found, split, self.validation_share, self.path)
        if "label" not in part.column_names:
            raise ValueError(f"{self.path} has no class folders, so its images have no labels")
        first = part[0]["image"]
        if self.size is not None and first.size != (self.size, self.size):
            raise ValueError(
                f"expected images of {self.size} x {self.size} pixels in {self.path}, found "
                f"{first.size[0]} x {first.size[1]}; resize them, or set size"
            )
        return part.cast_column("image", Image(mode="L" if self.channels == 1 else "RGB"))


class Latents(Source):
    """Precomputed latents: a folder of *.parquet or *.safetensors shards.

    A parquet shard has the columns `latent` [C, H, W] and `label`; a safetensors shard the tensors
    `latents` [N, C, H, W] and `labels` [N]. Latents are scaled as the model expects them.

    Args:
        path: The folder.
        validation_share: Share of the latents held out for validation.
    """

    def __init__(self, path: str, validation_share: float = 0.05) -> None:
        self.path = path
        self.validation_share = validation_share

    def load(self, split: Split) -> Dataset:
        """Return the latents of a split."""
        folder = Path(self.path)
        # Files that are being written have names that begin with a dot.
        parquet = sorted(map(str, folder.glob("[!.]*.parquet")))
        shards = sorted(folder.glob("[!.]*.safetensors"))
        if bool(parquet) == bool(shards):
            raise ValueError(
                f"expected shards of one kind, *.parquet or *.safetensors, in {self.path}; "
                f"found {len(parquet)} and {len(shards)}"
            )
        dataset = read_parquet(parquet) if parquet else read_shards(shards)
        check_complete(folder, len(dataset))
        return choose(DatasetDict(train=dataset), split, self.validation_share, self.path)


def choose(found: DatasetDict, split: Split, share: float, path: str) -> Dataset:
    """The wanted split, held out of the training images by a fixed shuffle where there is none."""
    if "train" not in found:
        raise ValueError(f"expected a folder train in {path}, found {', '.join(found)} alone")
    if not len(found["train"]):
        raise ValueError(f"no images found in {path}")
    if "validation" in found:
        return found[split]
    if len(found["train"]) < 2:
        raise ValueError(f"expected at least 2 images in {path}, one for validation, found 1")
    held_out = min(max(1, math.ceil(len(found["train"]) * share)), len(found["train"]) - 1)
    parts = found["train"].train_test_split(test_size=held_out, seed=0)
    return parts["train" if split == "train" else "test"]


def check_complete(folder: Path, found: int) -> None:
    """Raise a ValueError if a folder's settings promise another number of latents than found."""
    path = folder / SETTINGS
    promised = json.loads(path.read_text()).get("samples", found) if path.is_file() else found
    if promised != found:
        raise ValueError(
            f"expected {promised} latents in {folder}, as its {SETTINGS} says, found {found}; "
            "the same `python -m train encode` as before makes the missing ones"
        )


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes.

    Raises:
        ValueError: If the file is missing, or is no such file.
    """
    if not path.is_file():
        raise ValueError(f"expected the idx file {path}, which does not exist")
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if values.size != shape.prod():
        raise ValueError(f"{path} promises {shape.prod()} values and holds {values.size}")
    return values.reshape(shape)


def read_parquet(paths: list[str]) -> Dataset:
    """Concatenate parquet shards of latents.

    Raises:
        ValueError: If a shard is unreadable, or lacks a column.
    """
    for path in paths:
        try:
            columns = set(pq.read_schema(path).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a whole parquet file: {error}") from error
        if not {"latent", "label"} <= columns:
            raise ValueError(f"expected columns latent and label in {path}, found {columns}")
    return load_dataset("parquet", data_files=paths, split="train")


def read_shards(paths: list[Path]) -> Dataset:
    """Concatenate safetensors shards of latents, which stay on disk until they are used.

    Raises:
        ValueError: If a shard is unreadable, or lacks its tensors.
    """
    shards: list[dict[str, Tensor]] = []
    for path in paths:
        try:
            shard = load_file(path)  # mapped into memory, not copied
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        if not {"latents", "labels"} <= shard.keys():
            raise ValueError(f"expected tensors latents and labels in {path}, found {list(shard)}")
        if len(shard["latents"]) != len(shard["labels"]):
            raise ValueError(
                f"{path} has {len(shard['latents'])} latents and {len(shard['labels'])} labels"
            )
        shape, first = shard["latents"].shape[1:], (shards or [shard])[0]["latents"]
        if len(shape) != 3 or shape != first.shape[1:]:
            raise ValueError(
                f"expected latents [N, C, H, W], of one shape [C, H, W] in all shards, got "
                f"{list(first.shape)} in {paths[0]} and {list(shard['latents'].shape)} in {path}"
            )
        shards.append(shard)
    # One type for all: what is stored if it is the same everywhere and Arrow has it.
    kinds = {shard["latents"].dtype for shard in shards}
    kind = kinds.pop() if kinds in ({torch.float16}, {torch.float32}) else torch.float32
    tables = [table_of(shard["latents"].to(kind), shard["labels"].long()) for shard in shards]
    latent = Array3D(tuple(shards[0]["latents"].shape[1:]), str(kind).removeprefix("torch."))
    return Dataset(
        InMemoryTable(pa.concat_tables(tables)),
        info=DatasetInfo(features=Features({"latent": latent, "label": Value("int64")})),
        fingerprint=generate_random_fingerprint(),  # by default all latents are read for one
    )


def table_of(latents: Tensor, labels: Tensor) -> pa.Table:
    """A table of latents [N, C, H, W] and labels [N] that shares their memory."""
    kind = Array3DExtensionType(tuple(latents.shape[1:]), str(latents.dtype).removeprefix("torch."))
    columns = []
    for part in latents.split(4096):  # Arrow counts values in 32 bits
        storage = pa.array(part.numpy().reshape(-1))
        for length in reversed(part.shape[1:]):
            offsets = np.arange(0, len(storage) + 1, length, dtype=np.int32)
            storage = pa.ListArray.from_arrays(offsets, storage)
        columns.append(pa.ExtensionArray.from_storage(kind, storage))
    return pa.table({"latent": pa.chunked_array(columns, kind), "label": labels.numpy()})
