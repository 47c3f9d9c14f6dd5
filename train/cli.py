"""The command line: Lightning's, with this project's modules, data and callbacks at hand."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningCLI

# Imported so that YAML can give these classes by their bare names as class_path.
from train.budgeted import TrajectoryTraining
from train.classifier import Classifier, ClassifierTraining
from train.data import Images
from train.diffusion import DiffusionTraining
from train.export import ExportModel, ExportRouter
from train.heatmap import HeatMap
from train.interrupt import Interrupt
from train.module import RouterTraining
from train.pairs import Pairs
from train.progress import StepProgress
from train.relaxation import Relaxation
from train.teacher_samples import TeacherSamples
from train.trajectories import Trajectories
from train.trajectory import Trajectory

__all__ = [
    "Classifier",
    "ClassifierTraining",
    "DiffusionTraining",
    "ExportModel",
    "ExportRouter",
    "HeatMap",
    "Images",
    "Interrupt",
    "Pairs",
    "Relaxation",
    "RouterTraining",
    "StepProgress",
    "TeacherSamples",
    "Trajectories",
    "Trajectory",
    "TrajectoryTraining",
]


class CLI(LightningCLI):
    """LightningCLI in which a checkpoint never overrides the configuration."""

    def _parse_ckpt_path(self) -> None:
        # Lightning would take hyper-parameters out of --ckpt_path in preference to the YAML.
        pass


def main(args: ArgsType = None, run: bool = True) -> LightningCLI:
    """Run the command line, or with `run=False` only build what the configuration describes."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage().lower()
    )
    # Small images are loaded faster than worker processes start; data.workers is there for others.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Lightning's own use of a PyTorch internal.
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    # Lightning knows only stateful loaders as resumable; the order of Images is a function of where
    # the trainer stands.
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    # TrajectoryTraining steps its optimizer once per batch, so counting steps is right.
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization")
    trainer_defaults: dict[str, Any] = {
        "use_distributed_sampler": False,  # Images deals the data out to the processes itself
        "callbacks": [Interrupt()],
    }
    return CLI(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults=trainer_defaults,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "python -m train",
            "epilog": "`python -m train encode --help` tells how to make latents of images.",
        },
        auto_configure_optimizers=False,
        args=args,
        run=run,
    )
