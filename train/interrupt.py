"""Ctrl-C between two batches instead of inside one, so that a run resumes exactly."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L


class Interrupt(L.Callback):
    """On SIGINT finishes the running batch, then stops; a second SIGINT stops at once.

    With `ModelCheckpoint(save_last=True, save_on_exception=True)` the run can be continued by
    `--ckpt_path .../last.ckpt` and ends as if it had not been interrupted.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over SIGINT, after Lightning has noted whose it was."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Stop here if any process was asked to: the batch before is done, this one not begun."""
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            raise KeyboardInterrupt

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give SIGINT back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
