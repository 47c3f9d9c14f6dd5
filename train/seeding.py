"""Randomness as a function of the step, so that a resumed run draws what the first would have."""

from __future__ import annotations

import zlib

import lightning as L
import numpy as np
import torch


def batches_done(trainer: L.Trainer) -> int:
    """Training batches that this rank has finished since the run began, resumes included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def generator(*key: int | str) -> torch.Generator:
    """CPU generator for one use, e.g. `generator("train", seed, batch, rank)`.

    Different keys give different streams: the first word tells purposes apart.
    """
    numbers = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    # SeedSequence pads with zeros, so the length is part of the key.
    state = np.random.SeedSequence([len(key), *numbers]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
