"""Batches: how examples become tensors, and which examples each process sees when."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from tests.fitting import configuration, run, write_latents
from train.data import Images, ResumableShuffle, collate
from train.seeding import generator
from train.sources import FashionMNIST, ImageFolder, Latents, Source
from train.teacher_samples import TeacherSamples

# --- collate ---


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def scaled(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float() / 127.5 - 1


def test_uint8_arrays_keep_their_channels_first() -> None:
    images = pixels(4, 3, 8, 8)
    batch = collate([{"image": image, "label": i} for i, image in enumerate(images)])
    assert batch["latents"].dtype == torch.float32
    assert torch.equal(batch["latents"], scaled(images))
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 1, 2, 3]


def test_grey_pictures_get_a_channel() -> None:
    images = pixels(4, 8, 8)
    batch = collate([{"image": Image.fromarray(image), "label": 0} for image in images])
    assert torch.equal(batch["latents"], scaled(images)[:, None])


def test_colour_pictures_get_their_channels_first() -> None:
    images = pixels(4, 8, 8, 3)
    batch = collate([{"image": Image.fromarray(image), "label": 0} for image in images])
    assert torch.equal(batch["latents"], scaled(images).permute(0, 3, 1, 2))


def test_images_fill_the_range_from_minus_one_to_one() -> None:
    ends = np.array([0, 255], np.uint8).reshape(1, 1, 2)
    batch = collate([{"image": ends, "label": 0}])
    assert batch["latents"].flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_latents_stay_as_they_are(dtype: type) -> None:
    latents = (100 * np.random.default_rng(0).standard_normal((4, 2, 3, 3))).astype(dtype)
    batch = collate([{"latent": latent, "label": np.int64(5)} for latent in latents])
    assert batch["latents"].dtype == torch.float32
    assert torch.equal(batch["latents"], torch.from_numpy(latents.astype(np.float32)))
    assert batch["labels"].tolist() == [5] * 4


def test_images_of_different_sizes_name_both_shapes() -> None:
    examples = [{"image": pixels(1, size, size), "label": 0} for size in (8, 9, 8)]
    with pytest.raises(ValueError, match=r"one size, found \(1, 8, 8\) and \(1, 9, 9\)"):
        collate(examples)


# --- order ---


class OfRank(L.Trainer):
    """A trainer that knows its rank without the other processes."""

    rank = 0

    @property
    def global_rank(self) -> int:
        return self.rank


def standing(batches: int = 0, rank: int = 0) -> L.Trainer:
    """A trainer that has finished so many batches."""
    trainer = OfRank(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.rank = rank
    trainer.fit_loop.epoch_loop.batch_progress.total.processed = batches
    return trainer


def order(length: int, size: int, done: int = 0, rank: int = 0, world: int = 1) -> list[int]:
    return list(ResumableShuffle(length, size, 0, standing(done, rank), world))


def test_a_pass_shows_every_image_once() -> None:
    assert sorted(order(24, 4)) == list(range(24))


def test_an_incomplete_last_batch_is_dropped() -> None:
    seen = order(26, 4)
    assert len(seen) == len(set(seen)) == 24
    assert len(ResumableShuffle(26, 4, 0, standing(), 1)) == 24


def test_each_pass_and_each_seed_has_its_own_order() -> None:
    passes = [tuple(order(24, 4, done=6 * i)) for i in range(4)]
    assert len(set(passes)) == 4
    assert tuple(ResumableShuffle(24, 4, 1, standing(), 1)) not in passes


def test_a_pass_entered_in_its_middle_goes_on_where_it_stood() -> None:
    first, second = order(24, 4), order(24, 4, done=6)
    assert order(24, 4, done=2) == first[8:] + second[:8]


def test_ranks_are_disjoint_and_together_complete() -> None:
    for done in (0, 3):
        parts = [order(24, 4, done=done, rank=rank, world=2) for rank in range(2)]
        assert [len(part) for part in parts] == [12, 12]
        assert sorted(parts[0] + parts[1]) == list(range(24))


def test_streams_of_randomness_do_not_overlap() -> None:
    # every kind of use: initial logits; order of a pass; training and validation of a batch
    uses = [(0,), (1,), (0, 0), (0, 1), (0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0)]
    drawn = [torch.randn(4, generator=generator(*counters)) for counters in uses]
    equal = [
        (uses[i], uses[j])
        for i in range(len(uses))
        for j in range(i)
        if torch.equal(drawn[i], drawn[j])
    ]
    assert equal == []


def test_a_stream_is_a_function_of_its_counters() -> None:
    assert torch.equal(
        torch.randn(4, generator=generator(3, 5)), torch.randn(4, generator=generator(3, 5))
    )


# --- the data module ---


class Numbered(Source):
    """Latents that tell their own number."""

    def __init__(self, count: int = 20, held_out: int = 6) -> None:
        self.counts = {"train": count, "validation": held_out}

    def load(self, split: str) -> Dataset:
        numbers = list(range(self.counts[split]))
        return Dataset.from_dict({"latent": [[[[float(n)]]] for n in numbers], "label": numbers})


class Watching(L.LightningModule):
    """Notes the labels of every batch and trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[list[int]] = []
        self.validated: list[list[int]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        assert torch.equal(batch["latents"].flatten(), batch["labels"].float())
        self.trained.append(batch["labels"].tolist())
        return self.weight * 1

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self.validated.append(batch["labels"].tolist())


def watched(data: Images, epochs: int = 3) -> Watching:
    module = Watching()
    L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    ).fit(module, datamodule=data)
    return module


def test_epochs_of_training_are_reshuffled_passes() -> None:
    module = watched(Images(Numbered(20), batch_size=4))
    assert [len(labels) for labels in module.trained] == [4] * 15
    passes = [sum(module.trained[5 * i : 5 * i + 5], []) for i in range(3)]
    assert all(sorted(labels) == list(range(20)) for labels in passes)
    assert all(one != other for one, other in pairwise(passes))


def test_validation_keeps_its_order_and_its_incomplete_last_batch() -> None:
    module = watched(Images(Numbered(20, held_out=6), batch_size=4))
    assert module.validated == [[0, 1, 2, 3], [4, 5]] * 3


def test_validation_uses_at_most_so_many_images() -> None:
    data = Images(Numbered(20, held_out=6), batch_size=4, validation_images=5)
    assert watched(data, epochs=1).validated == [[0, 1, 2, 3], [4]]


def test_loader_processes_give_the_same_batches() -> None:
    here = watched(Images(Numbered(20), batch_size=4), epochs=2)
    there = watched(Images(Numbered(20), batch_size=4, workers=1), epochs=2)
    assert there.trained == here.trained
    assert there.validated == here.validated


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="one batch of 21 training images.*found 20"):
        Images(Numbered(20), batch_size=21).setup("fit")
    Images(Numbered(20), batch_size=21).setup("validate")  # nothing is trained on here


def test_an_empty_validation_split_is_refused() -> None:
    with pytest.raises(ValueError, match="the validation split is empty"):
        Images(Numbered(20, held_out=0), batch_size=4).setup("fit")


def test_a_batch_too_large_is_refused_on_the_command_line(dit_folder: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "run", dit_folder, write_latents(tmp_path / "latents"))
    with pytest.raises(ValueError, match=r"one batch of 99 .*found 54; lower data\.batch_size"):
        run("fit", config, tmp_path / "run", "--data.init_args.batch_size", "99")


def test_all_sources_share_one_base() -> None:
    for source in (FashionMNIST, ImageFolder, Latents, TeacherSamples):
        assert issubclass(source, Source)
    with pytest.raises(NotImplementedError):
        Source().load("train")
