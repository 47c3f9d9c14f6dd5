"""Callbacks that write what was trained, whole or not at all."""

from __future__ import annotations

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

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write into a temporary folder, then move each file into its place."""
        if not trainer.is_global_zero or trainer.interrupted:
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
        self._validated: Router | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, so that a resumed run keeps the best router."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.best = state_dict["best"]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the router of the last validation."""
        self._validated = None

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Take the router that is being validated, averaged if weights are."""
        if self._validated is None and not trainer.sanity_checking:
            self._validated = _router(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it if it is the best so far."""
        if self._validated is None or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"no metric {self.monitor!r} to choose the best by; there are {known}")
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best:
            self.best = value
            if trainer.is_global_zero:
                self._validated.save(self.path.with_stem(self.path.stem + "-best"))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last router, unless training was interrupted."""
        if trainer.is_global_zero and not trainer.interrupted:
            _router(pl_module).save(self.path)


def _router(module: Any) -> Router:
    if not hasattr(module, "router"):
        raise ValueError(f"ExportRouter needs RouterTraining, got {type(module).__name__}")
    router: Router = module.router()
    return router
