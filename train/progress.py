"""One progress bar over the whole training, with the time that is left."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm


class StepProgress(ProgressBar):
    """Counts optimizer steps of the whole run; Lightning's own bars start anew every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: Any = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar where the run stands."""
        total = trainer.estimated_stepping_batches
        self._bar = tqdm(
            total=None if math.isinf(total) else int(total),
            initial=trainer.global_step,
            desc="Training",
            unit="step",
            disable=not self._enabled,
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Advance by the optimizer's steps, with the metrics that are logged to the bar."""
        metrics = self.get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        self._bar.set_postfix(
            {k: v if isinstance(v, str) else f"{v:.3g}" for k, v in metrics.items()}, refresh=False
        )
        self._bar.update(trainer.global_step - self._bar.n)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so while it lasts."""
        if self._bar is not None:
            self._bar.set_description("Validating")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back to training."""
        if self._bar is not None:
            self._bar.set_description("Training")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the last state of the bar standing, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
