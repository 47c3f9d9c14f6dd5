"""Randomness as a function of the step, so that a resumed run draws what the first would have."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch


def batches_done(trainer: L.Trainer) -> int:
    """Training batches that this rank has finished since the run began, resumes included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def generator(*counters: int) -> torch.Generator:
    """CPU generator for one use, e.g. `generator(seed, batch, rank)`; streams do not overlap."""
    state = np.random.SeedSequence(counters).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
