"""A callback that draws the router at every validation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from l2c.picture import router_figure, write


class HeatMap(L.Callback):
    """Draws the scores as a heat map at every validation, into a folder and to TensorBoard.

    Args:
        folder: PNGs are written here, one per validation, named by the optimizer step.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw, once per validation, on the first process."""
        if trainer.sanity_checking or not trainer.is_global_zero or trainer.state.fn != "fit":
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # early on, some gates have not been trained yet
            figure = router_figure(pl_module.validated)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
        write(figure, self.folder / f"step-{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    "router", pixels, trainer.global_step, dataformats="HWC"
                )
