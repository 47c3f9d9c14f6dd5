"""Data for the trajectory objective: noise, labels, and the sample that they should lead to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from l2c.files import replacing
from l2c.sampling import initial_latents, sample
from l2c.schedule import Schedule
from train.data import Batch, ResumableShuffle
from train.frozen import Frozen
from train.seeding import generator


class Trajectories(L.LightningDataModule):
    """Batches `{"noise", "latents": float32 [B, C, H, W], "labels": int64 [B]}` without images.

    The latents are the model's own samples from the noise: uncached ones of the schedule that the
    router is for, or converged ones of many evaluations, so that the router also makes up for the
    solver's error. They are drawn once, with a progress bar, and kept on disk in shards; an
    interrupted run continues at the first missing one.

    Args:
        backbone: The model, as `l2c.load` takes it.
        solver: Solver of the target samples.
        evaluations: Its model evaluations per sample.
        solver_options: Further options of it.
        guidance_scale: Guidance of the target samples, which the router is trained at.
        count: Number of training samples.
        validation: Number of held-out samples.
        batch_size: Samples per batch and process.
        folder: Where the shards are kept.
        shard: Samples per shard, which is also the batch size of drawing.
        seed: Seed of noise and order.
    """

    def __init__(
        self,
        backbone: str,
        solver: str = "ddim",
        evaluations: int = 20,
        solver_options: dict[str, Any] | None = None,
        guidance_scale: float = 1.5,
        count: int = 512,
        validation: int = 64,
        batch_size: int = 16,
        folder: str = "runs/trajectories",
        shard: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(count, evaluations, shard, validation, batch_size) < 1:
            raise ValueError(
                "expected count, validation, evaluations, shard and batch_size of at least 1, got "
                f"{count}, {validation}, {evaluations}, {shard} and {batch_size}"
            )
        self.backbone = backbone
        self.solver = solver
        self.evaluations = evaluations
        self.solver_options = solver_options or {}
        self.guidance_scale = guidance_scale
        self.count = count
        self.validation = validation
        self.batch_size = batch_size
        self.folder = folder
        self.shard = shard
        self.seed = seed
        self.parts: dict[str, TensorDataset] = {}

    def prepare_data(self) -> None:
        """Draw what is not there yet, on one process."""
        self._draw()

    def setup(self, stage: str) -> None:
        """Open both splits.

        Raises:
            ValueError: If there are fewer samples than one batch for every process.
        """
        world = self.trainer.world_size if self.trainer else 1
        if self.count < self.batch_size * world:
            raise ValueError(
                f"expected at least one batch of {self.batch_size} samples for each of {world} "
                f"processes, found {self.count}; raise data.count"
            )
        for split, paths in self._draw().items():
            shards = [load_file(path) for path in paths]
            tensors = (torch.cat([s[key] for s in shards]) for key in KEYS)
            self.parts[split] = TensorDataset(*tensors)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of this process, from where the run stands."""
        assert self.trainer is not None
        order = ResumableShuffle(
            self.count, self.batch_size, self.seed, self.trainer, self.trainer.world_size
        )
        return self._loader("train", sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out samples in their fixed order."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The same."""
        return self.val_dataloader()

    def first(self, count: int) -> Batch:
        """The first training samples."""
        return dict(zip(KEYS, self.parts["train"][:count], strict=True))

    def described(self) -> dict[str, Any]:
        """What the samples are, for the router's file."""
        return {
            "solver": self.solver,
            "evaluations": self.evaluations,
            **self.solver_options,
            "guidance_scale": self.guidance_scale,
            "samples": self.count,
        }

    def _loader(self, split: str, **options: Any) -> DataLoader[Any]:
        part = self.parts[split]
        return DataLoader(part, self.batch_size, collate_fn=collate, **options)

    def _draw(self) -> dict[str, list[Path]]:
        frozen = Frozen(self.backbone)
        model = frozen.model
        options = {"noise": model.noise, **self.solver_options}
        schedule = Schedule.of(self.solver, self.evaluations, **options)
        settings = {
            "weights": frozen.identity.weights,
            "schedule": schedule.to_dict(),
            "guidance_scale": self.guidance_scale,
            "shard": self.shard,
            "seed": self.seed,
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        wanted: dict[str, list[Path]] = {}
        missing = []
        for split, count in (("train", self.count), ("validation", self.validation)):
            wanted[split] = []
            for start in range(0, count, self.shard):
                size = min(self.shard, count - start)
                name = f"{split}-{start:06d}-{size}.safetensors"
                path = Path(self.folder) / key / name
                wanted[split].append(path)
                if not path.is_file():
                    missing.append((split, start, size, path))
        if not missing:
            return wanted
        if torch.cuda.is_available():
            model.cuda()
        total = len(missing) * len(schedule)
        with tqdm(total=total, desc="Drawing target samples", unit="evaluation") as bar:
            for split, start, size, path in missing:
                labels = torch.arange(start, start + size) % max(1, model.num_classes)
                g = generator("trajectories", split, self.seed, start)
                noise = initial_latents(model, size, g)
                latents = sample(
                    model,
                    schedule,
                    labels,
                    self.guidance_scale,
                    latents=noise,
                    callback=lambda *_: bar.update(),
                )
                tensors = {"noise": noise.cpu(), "latents": latents.cpu(), "labels": labels}
                with replacing(path) as temporary:
                    save_file(tensors, temporary)
        return wanted


KEYS = ("noise", "latents", "labels")


def collate(examples: list[tuple[torch.Tensor, ...]]) -> Batch:
    """Stack examples under their names."""
    return dict(zip(KEYS, map(torch.stack, zip(*examples, strict=True)), strict=True))
