"""One setting at work: model, noise, references drawn once, and the figures of a way."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

import l2c
from benchmarks.distances import Space
from benchmarks.ways import METHODS, Setting, Task, Way, cache_mib
from l2c.files import replacing
from l2c.identity import Identity
from l2c.sampling import initial_latents
from l2c.schedule import Schedule
from train.calibration import Changes, measure
from train.quality import Judge, psnr
from train.seeding import generator

CONVERGED = 200  # DDIM evaluations after which a sample hardly changes
LOOKAHEAD = 10  # evaluations over which changes are measured: enough for the least budget
LATENCY_BATCH = 8
KEEP_EVERY = 500  # samples after which a reference is written


@dataclass(frozen=True)
class Options:
    """How samples are drawn and measured.

    Args:
        samples: Images per row.
        batch_size: Images at a time; it does not change which noise an image has.
        seed: Seed of the noise.
        runs: Pairs of runs per latency.
        work: Folder of references and calibrations.
        device: Where the model runs.
        converged: DDIM evaluations of the converged reference.
    """

    samples: int = 5000
    batch_size: int = 100
    seed: int = 0
    runs: int = 7
    work: Path = Path("runs/frontier")
    device: str = "cpu"
    converged: int = CONVERGED


class Bench:
    """One setting at work: model, noise, labels, and references that are drawn once.

    Args:
        name: Name of the setting.
        setting: The setting.
        options: How samples are drawn.
    """

    def __init__(self, name: str, setting: Setting, options: Options) -> None:
        self.name = name
        self.setting = setting
        self.options = options
        self.model = l2c.load(setting.teacher).to(options.device)
        self.schedule = setting.schedule(self.model)
        self.labels = torch.arange(options.samples) % self.model.num_classes

    @cached_property
    def noise(self) -> Tensor:
        """The noise of every image, a function of the seed and its number alone."""
        seed = self.options.seed
        draws = [generator("frontier", seed, i) for i in range(self.options.samples)]
        return initial_latents(self.model, self.options.samples, draws).cpu()

    def draw(self, way: Way, start: int = 0, end: int | None = None) -> Tensor:
        """Samples [N, C, H, W] of the images from `start` to `end`, batch by batch."""
        end = self.options.samples if end is None else end
        parts = []
        with tqdm(total=end - start, desc=str(way.schedule), unit="image", leave=False) as bar:
            for first in range(start, end, self.options.batch_size):
                here = slice(first, min(first + self.options.batch_size, end))
                noise = self.noise[here].to(self.options.device)
                scale = self.setting.guidance_scale
                drawn = way.draw(self.model, self.labels[here], noise, scale)
                parts.append(drawn.cpu())
                bar.update(len(drawn))
        return torch.cat(parts)

    @cached_property
    def uncached(self) -> Tensor:
        """Samples of the schedule with everything computed."""
        return self._kept(self.name, self.schedule)

    @cached_property
    def converged(self) -> Tensor:
        """Samples of many DDIM steps, which settings of a model and guidance share."""
        name = f"{self.setting.teacher.name}_converged_g{self.setting.guidance_scale}"
        schedule = Schedule.ddim(self.options.converged, noise=self.model.noise)
        return self._kept(name, schedule)

    def _kept(self, name: str, schedule: Schedule) -> Tensor:
        path = self.options.work / f"{name}_seed{self.options.seed}.safetensors"
        about = self._about(schedule)
        done = _read(path, about, "samples")
        samples = self.noise[:0] if done is None else done
        while len(samples) < self.options.samples:
            end = min(len(samples) + KEEP_EVERY, self.options.samples)
            samples = torch.cat([samples, self.draw(Way("", schedule), len(samples), end)])
            with replacing(path) as temporary:
                save_file({"samples": samples}, temporary, about)
        return samples[: self.options.samples].clone()

    def calibrate(self) -> Changes:
        """The changes along this setting's trajectories, measured once."""
        return self._changes

    @cached_property
    def _changes(self) -> Changes:
        path = self.options.work / f"{self.name}_changes.safetensors"
        about = {**self._about(self.schedule), "lookahead": str(LOOKAHEAD)}
        sites = l2c.sites(self.model)
        if _read(path, about, "relative") is None:
            scale = self.setting.guidance_scale
            measure(self.model, self.schedule, scale, lookahead=LOOKAHEAD).save(path, **about)
        return Changes.load(path, sites)

    def _about(self, schedule: Schedule) -> dict[str, str]:
        return {
            "weights": str(Identity.of(self.model).weights),
            "schedule": json.dumps(schedule.to_dict()),
            "guidance_scale": str(self.setting.guidance_scale),
        }

    def way(self, method: str, budget: float) -> Way:
        """A method that needs no training, at a budget.

        Raises:
            ValueError: If it has no schedule or plan of this cost.
        """
        return METHODS[method](Task(self.model, self.schedule, budget, self.calibrate))

    def latency(self, way: Way) -> list[float]:
        """Times of a way over those of the uncached run, of neighbouring runs."""
        count = LATENCY_BATCH
        labels = torch.arange(count) % self.model.num_classes
        noise = initial_latents(self.model, count, generator("frontier latency"))

        def seconds(chosen: Way) -> float:
            start = time.perf_counter()
            chosen.draw(self.model, labels, noise, self.setting.guidance_scale)
            if next(self.model.parameters()).is_cuda:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        plain = Way("uncached", self.schedule)
        seconds(plain), seconds(way)  # warm up
        ratios = []
        for turn in range(self.options.runs):  # who goes first changes, as it may pay for the other
            if turn % 2:
                ratios.append(seconds(way) / seconds(plain))
            else:
                ratios.append(1 / (seconds(plain) / seconds(way)))
        return ratios

    def figures(self, way: Way, judge: Judge | None, distances: Sequence[Space]) -> dict[str, Any]:
        """Draw the samples of a way and measure everything."""
        plain = self.uncached
        drawn = plain if way.kind == "uncached" else self.draw(way)
        ratios = [1.0] if way.kind == "uncached" else self.latency(way)
        scale = self.setting.guidance_scale
        found: dict[str, Any] = {
            "schedule": str(way.schedule),
            "evaluations": len(way.schedule),
            "share": way.cost / len(self.schedule),
            "cost": way.cost,
            "latency": statistics.median(ratios),
            "latency_range": [min(ratios), max(ratios)],
            "cache_mib": cache_mib(way.plan, LATENCY_BATCH, scale),
            "mse": float((drawn - plain).square().mean()),
            "psnr": None if way.kind == "uncached" else psnr(drawn, plain),
            "mse_converged": float((drawn - self.converged).square().mean()),
            "psnr_converged": psnr(drawn, self.converged),
            "distances": {space.name: space(drawn) for space in distances},
        }
        if judge is not None:
            found["recognised"] = judge.recognised(drawn, self.labels)
            found["agreement"] = judge.recognised(drawn, self._taken_for(judge))
        return {**found, **way.about}

    @torch.no_grad()
    def _taken_for(self, judge: Judge) -> Tensor:
        parts = self.uncached.clamp(-1, 1).split(256)
        return torch.cat([judge.classifier(part).argmax(dim=1) for part in parts])


def _read(path: Path, about: Mapping[str, str], name: str) -> Tensor | None:
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor(name) if file.metadata() == about else None
