"""Callbacks that write what was trained, whole or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import lightning as L

from l2c.router import Router


class ExportModel(L.Callback):
    """Writes `module.backbone` (config.json, model.safetensors) into a folder when `fit` ends.

    With weight averaging the averaged weights are written.

    Args:
        folder: Where to; the two files are replaced if they are there.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what has no model of its own before any work is done."""
        if not hasattr(pl_module, "backbone"):
            raise ValueError(
                f"ExportModel needs a module that trains a backbone, got {type(pl_module).__name__}"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write into a temporary folder, then move each file into its place."""
        if not trainer.is_global_zero:
            return
        model: Any = pl_module.backbone
        temporary = self.folder.with_name(self.folder.name + ".tmp")
        model.save_pretrained(temporary)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            (temporary / name).replace(self.folder / name)
        shutil.rmtree(temporary)


class ExportRouter(L.Callback):
    """Writes the router when `fit` ends, and at the best validation beside it as NAME-best.

    With weight averaging the averaged scores are written.

    Args:
        path: The router file, NAME.safetensors.
        monitor: The validation metric that decides which is best; lower is better.
    """

    def __init__(self, path: str, monitor: str = "val/loss") -> None:
        self.path = Path(path)
        self.monitor = monitor
        self.best = float("inf")

    @property
    def best_path(self) -> Path:
        """Where the best router is written."""
        return self.path.with_stem(self.path.stem + "-best")

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, so that a resumed run keeps the best router."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`; a router written after the checkpoint counts too."""
        self.best = state_dict["best"]
        if self.best_path.is_file():
            written = Router.load(self.best_path).provenance.get(self.monitor)
            self.best = min(self.best, written) if isinstance(written, float) else self.best

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what has no router before any work is done."""
        if not hasattr(pl_module, "router"):
            raise ValueError(f"ExportRouter needs RouterTraining, got {type(pl_module).__name__}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the validated router if it is the best so far."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"no metric {self.monitor!r} to choose the best by; there are {known}")
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best:
            self.best = value
            if trainer.is_global_zero:
                router: Router = pl_module.validated
                provenance = {**router.provenance, self.monitor: value}
                dataclasses.replace(router, provenance=provenance).save(self.best_path)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the last router."""
        if trainer.is_global_zero:
            pl_module.router().save(self.path)
