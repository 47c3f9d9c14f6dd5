"""The LightningModule that trains a router for a frozen backbone."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from l2c.plan import Plan
from l2c.router import Router
from l2c.sampling import initial_latents, latent_shape, sample
from l2c.schedule import Schedule
from l2c.site import sites
from train.data import Batch
from train.diffusion import OptimizerFactory
from train.frozen import Frozen
from train.machine import versions
from train.pairs import Pairs
from train.seeding import batches_done, generator


class RouterTraining(L.LightningModule):
    """Freezes a backbone, attaches a gate per evaluation and site, and trains the gates.

    Args:
        backbone: The model: a folder, a hub id or an official checkpoint, as `l2c.load` takes it.
        evaluations: Number of model evaluations of the schedule.
        solver: Its solver.
        solver_options: Further options of the solver, e.g. `{spacing: trailing}` for ddim.
        objective: What is minimised.
        optimizer: Optimizer of the gates' logits; AdamW by default.
        threshold: A site is computed where its score is above this; written into the router.
        clamp: Keep logits in [-clamp, clamp] after every step; None for no limit.
        test_guidance_scale: Guidance of the samples that `test` compares.
        seed: Seed of initial logits, pairs, noise and dropped labels.

    Raises:
        ValueError: If the backbone cannot be loaded, or the objective does not fit the schedule.
    """

    def __init__(
        self,
        backbone: str,
        evaluations: int = 20,
        solver: str = "ddim",
        solver_options: dict[str, Any] | None = None,
        objective: Pairs | None = None,
        optimizer: OptimizerFactory | None = None,
        threshold: float = 0.1,
        clamp: float | None = 5.0,
        test_guidance_scale: float = 1.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.frozen = Frozen(backbone)
        self.sites = sites(self.frozen.model)
        options = {"noise": self.frozen.model.noise, **(solver_options or {})}
        self.schedule = Schedule.of(solver, evaluations, **options)
        self.objective = objective or Pairs()
        self.optimizer_factory = optimizer or torch.optim.AdamW
        self.threshold = threshold
        self.clamp = clamp
        self.test_guidance_scale = test_guidance_scale
        self.seed = seed
        self.gated = self.objective.gated(self.schedule)
        # A parameter per evaluation: one that got no gradient in a step is left alone by the
        # optimizer, momentum included.
        g = generator("logits", seed)
        self.logits = nn.ParameterDict(
            {
                str(row): nn.Parameter(torch.randn(len(self.sites), generator=g))
                for row in self.gated.nonzero().flatten().tolist()
            }
        )
        # No buffer: weight averaging would average it.
        self.updates = torch.zeros(len(self.schedule), dtype=torch.long)
        self.validated: Router | None = None
        self._pending: dict[str, Tensor] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of the logits, and of nothing else."""
        return self.optimizer_factory(self.parameters())

    def setup(self, stage: str) -> None:
        """Move the backbone to this process's device and make sure that it stays frozen."""
        # Lightning moves what is registered, which the backbone is not, and only after this hook.
        model = self.frozen.model.to(self.trainer.strategy.root_device)
        own = {id(p) for p in self.parameters()}
        assert not model.training
        assert not any(p.requires_grad or id(p) in own for p in model.parameters())

    def weights(self, row: int) -> Tensor:
        """Soft gate weights of an evaluation, [site] in (0, 1)."""
        return self.logits[str(row)].sigmoid()

    def hard_weights(self, row: int) -> Tensor:
        """The same after thresholding: 1 to compute, 0 to reuse."""
        return (self.weights(row) > self.threshold).float()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One pair."""
        self._check(batch)
        g = generator("train", self.seed, batches_done(self.trainer), self.global_rank)
        loss = self.objective.loss(self.frozen.model, self.schedule, self.weights, batch, g)
        self.log("train/error", loss.error, prog_bar=True)
        self.log("train/penalty", loss.penalty, prog_bar=True)
        return loss.total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, count what was trained, and clamp."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for row, logits in self.logits.items():
                if logits.grad is not None:
                    self.updates[int(row)] += 1
                if self.clamp is not None:
                    logits.clamp_(-self.clamp, self.clamp)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is in no parameter: the counts, and gradients that are being accumulated."""
        checkpoint["updates"] = self.updates.clone()
        checkpoint["gradients"] = {
            row: logits.grad.clone()
            for row, logits in self.logits.items()
            if logits.grad is not None
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse; the optimizer's settings are the configuration's, not the checkpoint's."""
        self.updates = checkpoint["updates"].clone()
        self._pending = checkpoint["gradients"]
        fresh = self.optimizer_factory(self.parameters())
        for state in checkpoint.get("optimizer_states", []):
            for stored, group in zip(state["param_groups"], fresh.param_groups, strict=True):
                stored.update({k: v for k, v in group.items() if k != "params"})

    def on_train_start(self) -> None:
        """Go on with the gradients that a resumed run had accumulated."""
        for row, gradient in self._pending.items():
            self.logits[row].grad = gradient.to(self.device)
        self._pending = {}

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Each batch at the next gated evaluation, with the same noise every time."""
        self._check(batch)
        rows = self.gated.nonzero().flatten()
        row = int(rows[batch_index % len(rows)])
        losses = {}
        for name, weights in (("hard", self.hard_weights), ("soft", self.weights)):
            g = generator("validate", self.seed, batch_index)
            losses[name] = self.objective.loss(
                self.frozen.model, self.schedule, weights, batch, g, row
            )
        size = len(batch["labels"])
        self.log("val/loss", losses["hard"].total, batch_size=size)
        self.log("val/error", losses["hard"].error, batch_size=size)
        self.log("val/soft_error", losses["soft"].error, batch_size=size)

    def on_validation_epoch_start(self) -> None:
        """Take the router that is validated: the averaged one, if weights are averaged."""
        self.validated = self.router()
        self.log("val/share", self.plan().share, prog_bar=True)
        self.log("val/unsaturated", self.validated.unsaturated)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Samples by the plan against samples without it, from the same noise."""
        model, labels = self.frozen.model, batch["labels"]
        noise = initial_latents(model, len(labels), generator("test", self.seed, batch_index))
        full, fast = (
            sample(model, self.schedule, labels, self.test_guidance_scale, latents=noise, plan=plan)
            for plan in (None, self.plan())
        )
        error = (full - fast).square().mean()
        self.log("test/mse", error, batch_size=len(labels))
        self.log("test/psnr", 10 * torch.log10(4 / error), batch_size=len(labels))
        self.log("test/share", self.plan().share, batch_size=len(labels))

    def plan(self) -> Plan:
        """The plan of the gates as they are."""
        compute = torch.ones(len(self.schedule), len(self.sites), dtype=torch.bool)
        for row in self.logits:
            compute[int(row)] = self.hard_weights(int(row)).bool().cpu()
        return Plan.of(compute, self.sites)

    @torch.no_grad()
    def router(self) -> Router:
        """The router of the gates as they are."""
        scores = torch.ones(len(self.schedule), len(self.sites))
        for row in self.logits:
            scores[int(row)] = self.weights(int(row)).float().cpu()
        return Router(
            scores=scores,
            gated=self.gated.clone(),
            updates=self.updates.clone(),
            sites=self.sites,
            schedule=self.schedule,
            identity=self.frozen.identity,
            threshold=self.threshold,
            guidance_scale=self.objective.guidance_scale,
            provenance=self._provenance(),
        )

    def _provenance(self) -> dict[str, Any]:
        settings = {k: v for k, v in vars(self.objective).items() if not k.startswith("_")}
        provenance = {
            "objective": {"name": self.objective.name, **settings},
            "backbone": self.frozen.path,
            "clamp": self.clamp,
            "seed": self.seed,
            **versions(),
        }
        if self._trainer is not None:
            optimizer = self.optimizers()
            provenance["optimizer_steps"] = self.trainer.global_step
            if hasattr(optimizer, "defaults"):
                plain = (int, float, bool, str, type(None))
                defaults = {k: v for k, v in optimizer.defaults.items() if isinstance(v, plain)}
                provenance["optimizer"] = {"name": type(optimizer.optimizer).__name__, **defaults}
            batch = getattr(self.trainer.datamodule, "batch_size", None)
            provenance["batch_size"] = batch
            provenance["processes"] = self.trainer.world_size
            provenance["precision"] = str(self.trainer.precision)
        return provenance

    def _check(self, batch: Batch) -> None:
        expected, got = latent_shape(self.frozen.model), tuple(batch["latents"].shape[1:])
        if got != expected:
            raise ValueError(
                f"expected images or latents of shape {expected} for {self.frozen.path}, "
                f"got {got}; choose other data, or resize it"
            )
        highest = int(batch["labels"].max())
        if highest >= self.frozen.model.num_classes:
            raise ValueError(
                f"expected labels below {self.frozen.model.num_classes}, the classes of "
                f"{self.frozen.path}, got {highest}"
            )
