"""A source that needs no download: samples drawn from the frozen model itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import save_file
from tqdm.auto import tqdm

from l2c.files import replacing
from l2c.sampling import sample
from l2c.schedule import Schedule
from train.frozen import Frozen
from train.seeding import generator
from train.sources import Source, Split, choose, read_shards


class TeacherSamples(Source):
    """Clean samples of a model, labels in turn, drawn once and kept on disk in shards.

    An interrupted run continues at the first missing shard; another model or setting has another
    folder.

    Args:
        backbone: The model, as `l2c.load` takes it.
        count: Number of samples.
        evaluations: DDIM evaluations per sample.
        guidance_scale: Guidance of the samples.
        folder: Where the shards are kept.
        shard: Samples per shard, which is also the batch size.
        seed: Seed of the noise.
        validation_share: Share of the samples held out for validation.
    """

    def __init__(
        self,
        backbone: str,
        count: int = 1024,
        evaluations: int = 20,
        guidance_scale: float = 1.5,
        folder: str = "runs/teacher_samples",
        shard: int = 128,
        seed: int = 0,
        validation_share: float = 0.125,
    ) -> None:
        if min(count, evaluations, shard) < 1:
            raise ValueError(
                "expected count, evaluations and shard of at least 1, "
                f"got {count}, {evaluations} and {shard}"
            )
        self.backbone = backbone
        self.count = count
        self.evaluations = evaluations
        self.guidance_scale = guidance_scale
        self.folder = folder
        self.shard = shard
        self.seed = seed
        self.validation_share = validation_share
        self._paths: list[Path] = []

    def load(self, split: Split) -> Dataset:
        """Return a split, after drawing what is missing."""
        self._paths = self._paths or self._draw()
        dataset = DatasetDict(train=read_shards(self._paths))
        return choose(dataset, split, self.validation_share, self.folder)

    def _draw(self) -> list[Path]:
        frozen = Frozen(self.backbone)
        model = frozen.model
        schedule = Schedule.ddim(self.evaluations, noise=model.noise)
        settings = {
            "weights": frozen.identity.weights,
            "schedule": schedule.to_dict(),
            "guidance_scale": self.guidance_scale,
            "count": self.count,
            "shard": self.shard,
            "seed": self.seed,
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(self.folder) / key
        starts = range(0, self.count, self.shard)
        paths = [folder / f"{start:06d}.safetensors" for start in starts]
        missing = [s for s, path in zip(starts, paths, strict=True) if not path.is_file()]
        if not missing:
            return paths
        if torch.cuda.is_available():
            model.cuda()
        with tqdm(total=len(missing) * len(schedule), desc="Drawing teacher samples") as bar:
            for start in missing:
                size = min(self.shard, self.count - start)
                labels = (torch.arange(start, start + size) % model.num_classes).long()
                latents = sample(
                    model,
                    schedule,
                    labels,
                    self.guidance_scale,
                    generator=generator("teacher", self.seed, start),
                    callback=lambda *_: bar.update(),
                )
                with replacing(folder / f"{start:06d}.safetensors") as temporary:
                    save_file({"latents": latents.cpu(), "labels": labels}, temporary)
        return paths
