"""What tests of the training need: small data, configurations, and the command line in process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import save_file
from torch import Tensor

import l2c
from l2c.router import Router
from l2c.schedule import Schedule
from tests.conftest import tiny_dit, tiny_uvit
from train.cli import main
from train.data import Batch
from train.pairs import PairLoss, Pairs
from train.seeding import batches_done

ROOT = Path(__file__).parents[1]


def lively_dit(**overrides: int | bool) -> l2c.DiT:
    """A small DiT with larger weights, so that its outputs change much from step to step."""
    return enlarged(tiny_dit(**overrides))


def lively_uvit(seed: int = 0, **overrides: int | bool) -> l2c.UViT:
    """The same for a U-ViT."""
    return enlarged(tiny_uvit(seed, **overrides))


def enlarged(model: Any) -> Any:
    """A model with its weights times 3."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.mul_(3)
    return model


def write_latents(folder: Path, count: int = 60, shape: tuple[int, ...] = (3, 8, 8)) -> Path:
    """A folder with one shard of random latents, labels in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(7)
    latents = torch.randn(count, *shape, generator=g)
    save_file({"latents": latents, "labels": torch.arange(count) % 10}, folder / "0.safetensors")
    return folder


def configuration(folder: Path, backbone: Path, latents: Path, **trainer: Any) -> dict[str, Any]:
    """A quiet configuration that trains a router for 12 steps; `trainer` adds or replaces keys.

    60 latents, 6 of them held out, make 6 batches of 8: an epoch ends after every sixth step.
    """
    return {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(folder),
            "accelerator": "cpu",
            "max_steps": 12,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [checkpoints(folder), exported(folder)],
            **trainer,
        },
        "model": {
            "class_path": "RouterTraining",
            "init_args": {
                "backbone": str(backbone),
                "evaluations": 6,
                "objective": {"class_path": "Pairs", "init_args": {"penalty": 1e-3}},
                "optimizer": {
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": 0.1, "weight_decay": 0.01},
                },
            },
        },
        "data": {
            "class_path": "Images",
            "init_args": {
                "batch_size": 8,
                "source": {
                    "class_path": "Latents",
                    "init_args": {"path": str(latents), "validation_share": 0.1},
                },
            },
        },
    }


def checkpoints(folder: Path, every: int = 5, **settings: Any) -> dict[str, Any]:
    """A ModelCheckpoint from which interrupted runs can be resumed."""
    settings = {
        "dirpath": str(folder / "checkpoints"),
        "every_n_train_steps": every,
        "save_last": True,
        "save_on_exception": True,
        **settings,
    }
    return {"class_path": "ModelCheckpoint", "init_args": settings}


def exported(folder: Path, **settings: Any) -> dict[str, Any]:
    """An ExportRouter into `folder`."""
    settings = {"path": str(folder / "router.safetensors"), **settings}
    return {"class_path": "ExportRouter", "init_args": settings}


def averaging(**settings: Any) -> dict[str, Any]:
    """An exponential moving average that differs visibly from the weights."""
    return {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.7, **settings}}


def logger(folder: Path) -> list[dict[str, Any]]:
    """A CSVLogger that writes `folder`/metrics.csv."""
    settings = {"save_dir": str(folder), "name": "", "version": ""}
    return [{"class_path": "CSVLogger", "init_args": settings}]


def write_config(config: dict[str, Any], path: Path) -> Path:
    """Write a configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def run(command: str, config: dict[str, Any], folder: Path, *options: str) -> LightningCLI:
    """Run the command line in this process."""
    path = write_config(config, folder.with_suffix(".yaml"))
    with only_these_arguments():
        return main([command, "--config", str(path), *options])


@contextmanager
def only_these_arguments() -> Iterator[None]:
    """Hide pytest's own arguments: LightningCLI warns if there are others than it was given."""
    before = sys.argv
    sys.argv = before[:1]
    try:
        yield
    finally:
        sys.argv = before


def assert_equal_routers(first: Path, second: Path) -> None:
    """Two router files hold the same training result, bit for bit."""
    one, other = Router.load(first), Router.load(second)
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.updates, other.updates)


class History(L.Callback):
    """Keeps a copy of logits and counts from before training and after every batch.

    Args:
        folder: Where each process writes its history at the end, as rank-N.pt; None for nowhere.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.logits: list[dict[str, Tensor]] = []
        self.updates: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        self._note(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            calls = [vars(call) for call in pl_module.objective._calls if not call.validation]
            state = {"logits": self.logits, "updates": self.updates, "calls": calls}
            torch.save(state, Path(self.folder) / f"rank-{trainer.global_rank}.pt")

    def _note(self, module: L.LightningModule) -> None:
        self.logits.append({row: v.detach().clone() for row, v in module.logits.items()})
        self.updates.append(module.updates.clone())


class Signal(L.Callback):
    """Presses Ctrl-C within batches, each given by the number of batches done before it.

    Args:
        batches: In which batches.
        times: How often in each of them.
        rank: On which process.
    """

    def __init__(self, batches: list[int], times: int = 1, rank: int = 0) -> None:
        self.batches = batches
        self.times = times
        self.rank = rank

    def on_before_backward(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_rank == self.rank and batches_done(trainer) in self.batches:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


class Slow(L.Callback):
    """Gives a test time to interrupt a training."""

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(0.05)


class Fail(L.Callback):
    """Raises an error before a batch.

    Args:
        batch: Number of batches done before it.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if batches_done(trainer) == self.batch:
            raise ArithmeticError("the training failed here")


@dataclass
class Call:
    """One evaluation of an objective: what it was given, and the row that it took."""

    seed: int
    batch: Batch
    validation: bool
    row: int


class NotedPairs(Pairs):
    """Pairs that keeps its calls."""

    def __init__(self, penalty: float = 1e-6, label_dropout: float = 0.1) -> None:
        super().__init__(penalty, label_dropout)
        self._calls: list[Call] = []

    def loss(
        self,
        model: Any,
        schedule: Schedule,
        weights: Callable[[int], Tensor],
        batch: Batch,
        g: torch.Generator,
        row: int | None = None,
    ) -> PairLoss:
        seed = g.initial_seed()
        loss = super().loss(model, schedule, weights, batch, g, row)
        self._calls.append(Call(seed, batch, row is not None, loss.row))
        return loss


def noted(cli: LightningCLI) -> list[dict[str, Any]]:
    """The training calls of a run with NotedPairs."""
    return [vars(call) for call in cli.model.objective._calls if not call.validation]


def history(cli: LightningCLI) -> History:
    """The History among the callbacks of a run."""
    return next(c for c in cli.trainer.callbacks if isinstance(c, History))


def gradients(
    module: L.LightningModule, calls: list[dict[str, Any]], at: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Mean over calls of the gradient of their loss at given logits, of the rows they took."""
    leaves = {row: value.clone().requires_grad_() for row, value in at.items()}
    objective = Pairs(module.objective.penalty, module.objective.label_dropout)
    for call in calls:
        g = torch.Generator().manual_seed(call["seed"])
        loss = objective.loss(
            module.frozen.model,
            module.schedule,
            lambda row: leaves[str(row)].sigmoid(),
            call["batch"],
            g,
        )
        (loss.total / len(calls)).backward()
    return {row: leaf.grad for row, leaf in leaves.items() if leaf.grad is not None}


def assert_follows_sgd(
    module: L.LightningModule,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    calls: list[dict[str, Any]],
    lr: float,
) -> None:
    """Logits moved as a step of plain SGD on the mean loss of `calls` moves them, or not at all."""
    expected = gradients(module, calls, before)
    assert {str(call["row"]) for call in calls} == set(expected)
    for row, value in before.items():
        if row in expected:
            moved = value - lr * expected[row]
            # float32: gradients of several batches or processes are summed in another order
            assert torch.allclose(after[row], moved, rtol=1e-5, atol=1e-6)
            assert not torch.equal(after[row], value)
        else:
            assert torch.equal(after[row], value)


@contextmanager
def started(command: str, config: Path) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own; it and its children are gone at the end."""
    threads = str(torch.get_num_threads())  # the same arithmetic as in this process
    process = subprocess.Popen(
        [sys.executable, "-m", "train", command, "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # the whole group has ended already
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen[str], timeout: float = 120) -> str:
    """Wait for a process and give its output."""
    output, _ = process.communicate(timeout=timeout)
    return output
