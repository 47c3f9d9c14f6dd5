"""The LightningDataModule: batches of latents and labels from any source, in a resumable order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from train.seeding import batches_done, generator
from train.sources import Source

Batch = dict[str, Tensor]


class Images(L.LightningDataModule):
    """Batches `{"latents": float32 [B, C, H, W], "labels": int64 [B]}`; images lie in [-1, 1].

    The training order is a fixed function of the seed and of how many batches are done, so a
    resumed run sees exactly the batches that the uninterrupted one would have seen.

    Args:
        source: Where the images come from.
        batch_size: Images per batch and process.
        workers: Loader processes; 0 loads in the main one.
        seed: Seed of the training order.
        validation_images: At most so many images are used for validation.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 64,
        workers: int = 0,
        seed: int = 0,
        validation_images: int = 1024,
    ) -> None:
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.validation_images = validation_images
        self.train: Dataset | None = None
        self.validation: Dataset | None = None

    def prepare_data(self) -> None:
        """Download or sample what is not there yet, on one process."""
        self.source.load("train")

    def setup(self, stage: str) -> None:
        """Open both splits.

        Raises:
            ValueError: If a split is empty, or smaller than one training batch.
        """
        self.train = self.train or self.source.load("train")
        self.validation = self.validation or self.source.load("validation")
        if stage == "fit" and len(self.train) < self.batch_size * self.world_size:
            raise ValueError(
                f"expected at least one batch of {self.batch_size} training images for each of "
                f"{self.world_size} processes, found {len(self.train)}; lower data.batch_size"
            )
        if not len(self.validation):
            raise ValueError("the validation split is empty")

    @property
    def world_size(self) -> int:
        """Number of training processes."""
        return self.trainer.world_size if self.trainer else 1

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of this process, from where the run stands."""
        assert self.train is not None and self.trainer is not None
        order = ResumableShuffle(
            len(self.train), self.batch_size, self.seed, self.trainer, self.world_size
        )
        return self._loader(self.train, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation images in their fixed order."""
        assert self.validation is not None
        count = min(len(self.validation), self.validation_images)
        return self._loader(self.validation.select(range(count)))

    def test_dataloader(self) -> DataLoader[Any]:
        """The same images as for validation."""
        return self.val_dataloader()

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset.with_format("numpy"),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=collate,
            **options,
        )


class ResumableShuffle(Sampler[int]):
    """Endless reshuffled passes over the data, entered at the batch where the trainer stands.

    Each rank takes every `world_size`-th batch-sized slice of a pass; an incomplete last slice is
    dropped.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, trainer: L.Trainer, world_size: int
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.trainer = trainer
        self.world_size = world_size

    @property
    def batches(self) -> int:
        """Batches per pass and rank."""
        return self.length // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = batches_done(self.trainer)
        drawn, order = -1, torch.empty(0)
        for batch in range(first, first + self.batches):
            epoch, index = divmod(batch, self.batches)
            if epoch != drawn:
                drawn = epoch
                order = torch.randperm(self.length, generator=generator("order", self.seed, epoch))
            start = (index * self.world_size + self.trainer.global_rank) * self.batch_size
            yield from order[start : start + self.batch_size].tolist()


def collate(examples: list[dict[str, Any]]) -> Batch:
    """Stack examples; uint8 images become float32 in [-1, 1], latents stay as they are.

    Images are arrays [C, H, W], or decoded files [H, W] (grey) and [H, W, 3] (colour).

    Raises:
        ValueError: If the images of a batch differ in size.
    """
    is_image = "image" in examples[0]
    arrays = [np.asarray(e["image" if is_image else "latent"]) for e in examples]
    if len({a.shape for a in arrays}) > 1:
        shapes = sorted({a.shape for a in arrays})
        raise ValueError(f"expected images of one size, found {shapes[0]} and {shapes[1]}")
    values = torch.from_numpy(np.stack(arrays))
    if is_image:
        if values.ndim == 3:
            values = values[:, None]
        elif values.shape[-1] == 3 and values.shape[1] != 3:
            values = values.permute(0, 3, 1, 2)
        values = values.float() / 127.5 - 1
    labels = torch.tensor([int(e["label"]) for e in examples])
    return {"latents": values.float(), "labels": labels}
