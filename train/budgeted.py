"""The LightningModule that learns gates and predictions together, to a budget."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm.auto import tqdm

from l2c.plan import Plan
from l2c.profile import Profile
from l2c.reuse import Reuse
from l2c.router import Router, within
from l2c.sampling import latent_shape, sample
from l2c.schedule import Schedule
from l2c.site import Sites, sites
from train.data import Batch
from train.frozen import Frozen
from train.gates import Outputs, gated
from train.learned import Gates, Predictions
from train.machine import versions
from train.relaxation import Relaxation
from train.seeding import batches_done, generator
from train.spread import fitting, logits, searched, spread
from train.trajectory import Trajectory, Weights


class TrajectoryTraining(L.LightningModule):
    """Freezes a backbone and learns, for a budget, what to reuse and how to predict it.

    The start is an extrapolation (`reuse`) over evenly spread whole evaluations, or another
    router's plan. Learned are corrections to the terms of the extrapolation and a shift, per
    evaluation, site and channel, and during the first `gate_steps` steps the gates. As corrections
    are relative to an extrapolation over distances, they hold for other plans of the router too.

    Args:
        backbone: The model: a folder, a hub id or an official checkpoint, as `l2c.load` takes it.
        evaluations: Number of model evaluations of the schedule.
        solver: Its solver.
        solver_options: Further options of the solver.
        budget: Share of the compute to keep to, in (0, 1].
        speedup: In place of a budget, 1 over it.
        family: Two shares; every second step is trained at a budget drawn between them, so that
            `Router.plan(budget=)` of this one router serves them all.
        measure: Budgets at which the error is measured when training ends, for the router's file.
        profile: File of `l2c profile`, to count the budget in this device's measured time; by
            default it is counted in multiply-accumulates.
        objective: What is minimised.
        reuse: The extrapolation to start from: "copy", "taylor-1" to "-3", "newton-1" to "-3".
        per: Learn numbers per "channel" or per "site"; with "none" the gates alone.
        shift: Learn a shift per channel too.
        start: "uniform", whole evaluations evenly spread; "search", moved as long as that lowers
            the error; or a router file, whose scores are the start.
        gate_steps: So many first steps train the gates as well, which computes every site in every
            evaluation; after them the gates are fixed and what is reused costs nothing.
        granularity: A gate for each "site", "block" or whole "evaluation".
        relaxation: How gradients reach the gates.
        lr: Learning rate of the corrections, of Adam, after a warm-up, falling to 0 in half a
            cosine; see `Predictions` for its unit.
        shift_lr: The same of the shift, in shares of an output's root mean square.
        gate_lr: The same of the gates' logits.
        warmup_steps: Steps of linear warm-up.
        seed: Seed of all noise.

    Raises:
        ValueError: If budget and speed-up are both given or neither, the budget is below what the
            first evaluation costs, or an option is unknown.
    """

    def __init__(
        self,
        backbone: str,
        evaluations: int = 20,
        solver: str = "ddim",
        solver_options: dict[str, Any] | None = None,
        budget: float | None = None,
        speedup: float | None = None,
        family: tuple[float, float] | None = None,
        measure: list[float] | None = None,
        profile: str | None = None,
        objective: Trajectory | None = None,
        reuse: str = "newton-2",
        per: str = "channel",
        shift: bool = True,
        start: str = "uniform",
        gate_steps: int = 0,
        granularity: str = "evaluation",
        relaxation: Relaxation | None = None,
        lr: float = 0.03,
        shift_lr: float = 0.001,
        gate_lr: float = 0.05,
        warmup_steps: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # "steps" takes a gradient per evaluation
        if (budget is None) == (speedup is None):
            raise ValueError(
                f"expected a budget or a speedup, got budget={budget} and speedup={speedup}"
            )
        if speedup is not None and not speedup >= 1:
            raise ValueError(f"expected a speedup of at least 1, got {speedup}")
        self.frozen = Frozen(backbone)
        self.sites = sites(self.frozen.model)
        options = {"noise": self.frozen.model.noise, **(solver_options or {})}
        self.schedule = Schedule.of(solver, evaluations, **options)
        self.budget = float(1 / speedup if speedup is not None else budget or 0)
        if family is not None and not 0 < family[0] <= family[1] <= 1:
            raise ValueError(f"expected a family 0 < low <= high <= 1, got {family}")
        self.family = family
        self.measure = measure or []
        self.costs: Sites = self.sites
        if profile is not None:
            self.costs = Profile.load(profile).sites(self.sites)
        self.objective = objective or Trajectory()
        self.streams = self.objective.streams
        rows = len(self.schedule) * self.streams
        rule = Reuse.named(reuse, relative=self.streams == 2)
        self.predictions = Predictions(rule, rows, self.sites, per, shift, self.streams)
        self.start, self.granularity, self.gate_steps = start, granularity, gate_steps
        self.gates = Gates(self._start(start), self.sites, granularity, gate_steps > 0)
        self.relaxation = relaxation or Relaxation()
        self.rates = {"corrections": lr, "shift": shift_lr, "logits": gate_lr}
        self.warmup_steps, self.seed = warmup_steps, seed
        self.updates = torch.zeros(rows, dtype=torch.long)
        self.evaluated = 0  # model evaluations of one sample each, forward
        self.seconds = 0.0
        self.measured: list[dict[str, float]] = []
        self.validated: Router | None = None
        self._importance: Tensor | None = None
        router = self.router()
        for share in (None, *(family or ()), *self.measure):
            router.plan(budget=share)  # a budget that is too small is refused here

    # --- what is learned ---

    @property
    def training_gates(self) -> bool:
        """Whether the gates are still being trained."""
        return self._trainer is not None and self.global_step < self.gate_steps

    def _start(self, start: str) -> Tensor:
        if start in ("uniform", "search"):
            found = logits(self._uniform(), self.rows, self.sites, self.streams)
        else:
            router = Router.load(start, self.frozen.model, self.schedule)
            if router.streams != self.streams:
                raise ValueError(
                    f"expected a start with {self.streams} streams, as the objective has, got "
                    f"{router.streams} in {start}"
                )
            decided = router.gated[:, None]
            found = router.scores.clamp(1e-6, 1 - 1e-6).logit().masked_fill(~decided, 14.0)
        return found

    @property
    def rows(self) -> int:
        """Rows of the plan."""
        return len(self.schedule) * self.streams

    def _uniform(self) -> list[int]:
        count = fitting(self.budget, self.rows, self.costs, self.streams)
        return spread(count, self.rows, self.streams)

    def plan(self) -> Plan:
        """The plan of the gates as they are."""
        return self.router().plan()

    def router(self) -> Router:
        """The router of what was learned so far."""
        decided = self._decided()
        # Untrained gates are those of the start, which is a plan like any other.
        updates = torch.where(decided, self.updates.clamp(min=1), 0)
        return Router(
            scores=self.gates.scores(),
            gated=decided,
            updates=updates,
            sites=self.sites,
            schedule=self.schedule,
            identity=self.frozen.identity,
            guidance_scale=self.objective.guidance_scale,
            provenance=self._provenance(),
            reuse=self.predictions.reuse(),
            budget=self._budget(),
            streams=self.streams,
        )

    def _decided(self) -> Tensor:
        return torch.arange(self.rows) >= self.streams

    def _budget(self) -> float:
        if self.costs is self.sites:
            return self.budget
        # The same gates, in the unit in which routers count.
        decided = self._decided()
        bare = Router(
            self.gates.scores(),
            decided,
            decided.long(),
            self.sites,
            self.schedule,
            self.frozen.identity,
            reuse=self.predictions.reuse(),
            streams=self.streams,
        )
        return min(1.0, within(bare, decided, self.budget, self.costs).share + 1e-9)

    # --- training ---

    def configure_optimizers(self) -> Any:
        """Adam with a rate for each kind of parameter, all warmed up and then lowered to 0."""
        found = {
            "corrections": self.predictions.corrections,
            "shift": self.predictions.shift,
            "logits": self.gates.logits,
        }
        groups = [
            {"params": [parameter], "lr": self.rates[name]}
            for name, parameter in found.items()
            if parameter.requires_grad
        ]
        if not groups:
            raise ValueError('nothing is trained: give gate_steps, or per "channel" or "site"')
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        total = self.trainer.estimated_stepping_batches
        if self.predictions.per == "none" and self.gate_steps < total:
            raise ValueError(
                f'nothing is trained after the gates, with per "none": expected gate_steps of at '
                f"least the {total} steps of the training, got {self.gate_steps}"
            )

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, factor)]

    def setup(self, stage: str) -> None:
        """Move the backbone to this process's device and make sure that it stays frozen."""
        model = self.frozen.model.to(self.trainer.strategy.root_device)
        own = {id(p) for p in self.parameters()}
        assert not model.training
        assert not any(p.requires_grad or id(p) in own for p in model.parameters())

    def on_fit_start(self) -> None:
        """Measure how large each output is, and search for a start, if that is wanted."""
        if self.updates.any():  # resumed
            return
        data = self.trainer.datamodule
        if not hasattr(data, "first"):
            raise ValueError(WRONG_DATA)
        if data.guidance_scale != self.objective.guidance_scale:
            raise ValueError(
                f"expected data of the objective's guidance scale {self.objective.guidance_scale}, "
                f"got {data.guidance_scale}; give both the same"
            )
        batch = self._moved(data.first(max(16, data.batch_size)))
        self._check(batch)
        model, schedule = self.frozen.model, self.schedule
        outputs: Outputs = {}
        labels = self.objective.labels(model, batch["labels"])
        with torch.no_grad(), gated(model, outputs, None):
            self.objective.predict(model, batch["latents"], schedule.timesteps[-1], labels)
        self.evaluated += self._calls(batch)
        rms = [outputs[i][0][1].float().square().mean().sqrt() for i in range(len(self.sites))]
        self.predictions.scales = torch.stack(rms).cpu()
        if self.start == "search":
            self._search(batch)

    @torch.no_grad()
    def _search(self, batch: Batch) -> None:
        tried = tqdm(desc="Searching for a start", unit="plan", leave=False)

        def error(chosen: list[int]) -> float:
            compute = torch.zeros(self.rows, len(self.sites))
            compute[chosen] = 1
            tried.update()
            return float(self._error(batch, compute))

        chosen = searched(self._uniform(), self.rows, error, self.streams, tried.set_postfix_str)
        tried.close()
        self.gates.restart(logits(chosen, self.rows, self.sites, self.streams))

    def _error(self, batch: Batch, compute: Tensor) -> Tensor:
        """Squared error of the student's final samples by a table of gates."""
        final = self.objective.student(
            self.frozen.model,
            self.schedule,
            batch,
            lambda row: compute[row] if row >= self.streams else None,
            self.predictions.numbers,
            self.predictions.rule.order + 1,
        )
        share = Plan.of(compute.bool(), self.sites, self.predictions.rule, self.streams).share
        self.evaluated += round(share * len(self.schedule) * self._calls(batch))
        return (final - batch["latents"]).square().mean()

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """One batch of trajectories."""
        begun = time.perf_counter()
        self._check(batch)
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        drawn = self._drawn()
        weights, lazy = self._weights(drawn)
        plan = (self.frozen.model, self.schedule, batch, weights, self.predictions.numbers)
        history, error = self.predictions.rule.order + 1, torch.zeros((), device=self.device)
        evaluations = len(self.schedule) * (drawn.share if lazy else 1.0)
        if self.objective.loss == "final":
            final = self.objective.student(*plan, history, lazy)
            error = (final - batch["latents"]).square().mean()
            self._finite(error)
            if error.requires_grad:  # not where everything is computed
                self.manual_backward(error)
        else:
            importance = self._weighting(plan, history)
            for part in self.objective.steps(*plan, history, importance, lazy):
                evaluations += 1  # the plain model's
                self._finite(part)
                self.manual_backward(part)
                error = error + part.detach()
        optimizer.step()
        scheduler.step()
        self.updates[self.streams :] += 1
        self.evaluated += round(evaluations * self._calls(batch))
        self.seconds += time.perf_counter() - begun
        self.log("train/error", error.detach(), prog_bar=True)

    def _weights(self, drawn: Plan) -> tuple[Weights, bool]:
        """The gates of each row of a plan, and whether what is reused need not be computed."""
        compute = torch.tensor(drawn.compute, device=self.device)
        if not self.training_gates or not self.gates.logits.requires_grad:
            hard = compute.float()
            return (lambda row: hard[row] if row >= self.streams else None), True
        threshold = self.gates.threshold(compute, self.streams)
        progress = self.global_step / max(1, self.gate_steps)
        key = ("gates", self.seed, batches_done(self.trainer), self.global_rank)

        def soft(row: int) -> Tensor | None:
            if row < self.streams:
                return None
            # A graph of its own for each row: "steps" takes their gradients one by one.
            distance = self.gates()[row] - threshold
            return self.relaxation.weights(distance, compute[row], progress, generator(*key, row))

        return soft, False

    def _drawn(self) -> Plan:
        """The plan of this step: at the budget, or every second time at one of the family."""
        done = batches_done(self.trainer)
        if self.family is None or done % 2 == 0:
            return self.plan()
        low, high = self.family
        share = float(torch.rand((), generator=generator("family", self.seed, done)))
        return self.router().plan(budget=low * (high / low) ** share)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Measure the error at other budgets."""
        if not self.measured:
            return
        router, data = self.router(), self.trainer.datamodule
        for budget in self.measure:
            plan = router.plan(budget=budget)
            compute = torch.tensor(plan.compute, device=self.device).float()
            errors, counts = [], []
            for batch in data.val_dataloader():
                errors.append(float(self._error(self._moved(batch), compute)))
                counts.append(len(batch["labels"]))
            mean = sum(e * n for e, n in zip(errors, counts, strict=True)) / sum(counts)
            self.measured.append({"budget": budget, "share": plan.share, "mse": mean})

    def _weighting(self, plan: tuple[Any, ...], history: int) -> Tensor | None:
        if not self.objective.error_proxy:
            return None
        if self._importance is None or self.global_step % self.objective.error_proxy == 0:
            self._importance = self.objective.importance(*plan, history)
            # The student's sample once as it is, and once for each evaluation but the first.
            evaluations = len(self.schedule) ** 2 * self.plan().share
            self.evaluated += round(evaluations * self._calls(plan[2]))
        return self._importance

    def _finite(self, error: Tensor) -> None:
        if not bool(error.isfinite()):
            raise ValueError(
                f"the error became {error.item()} in optimizer step {self.global_step}; the router "
                "of the best validation before it is kept. Lower lr, or use a lower order of reuse"
            )

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """The plan's final samples against the batch's."""
        self._check(batch)
        compute = torch.tensor(self.plan().compute, device=self.device).float()
        self.log("val/loss", self._error(batch, compute), batch_size=len(batch["labels"]))

    def on_validation_epoch_start(self) -> None:
        """Take the router that is validated."""
        self.validated = self.router()
        self.log("val/share", self.plan().share, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Remember the error for the router's file."""
        value = self.trainer.callback_metrics.get("val/loss")
        if value is not None and not self.trainer.sanity_checking:
            self._finite(value)
            share = self.plan().share
            self.measured = [{"budget": self.budget, "share": share, "mse": float(value)}]
            self.validated = self.router()
            self.log("val/psnr", 10 * torch.log10(4 / value.clamp(min=1e-12)), prog_bar=True)

    def test_step(self, batch: Batch, batch_index: int) -> None:
        """Samples by the exported plan against the batch's."""
        self._check(batch)
        fast = sample(
            self.frozen.model,
            self.schedule,
            batch["labels"],
            self.objective.guidance_scale,
            latents=batch["noise"],
            plan=self.plan(),
        )
        error = (fast - batch["latents"]).square().mean()
        self.log("test/mse", error, batch_size=len(batch["labels"]))
        self.log("test/psnr", 10 * torch.log10(4 / error), batch_size=len(batch["labels"]))
        self.log("test/share", self.plan().share, batch_size=len(batch["labels"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is in no parameter."""
        for name in STATE:
            checkpoint[name] = getattr(self, name)
        checkpoint["scales"] = self.predictions.scales
        checkpoint["offsets"] = self.gates.offsets

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The inverse."""
        for name in STATE:
            setattr(self, name, checkpoint[name])
        self.predictions.scales = checkpoint["scales"]
        self.gates.offsets = checkpoint["offsets"]

    def _calls(self, batch: Batch) -> int:
        return len(batch["labels"]) * (1 if self.objective.guidance_scale == 1.0 else 2)

    def _moved(self, batch: Batch) -> Batch:
        return {name: value.to(self.device) for name, value in batch.items()}

    def _check(self, batch: Batch) -> None:
        if "noise" not in batch:
            raise ValueError(WRONG_DATA)
        expected, got = latent_shape(self.frozen.model), tuple(batch["noise"].shape[1:])
        if got != expected:
            raise ValueError(
                f"expected noise of shape {expected} for {self.frozen.path}, got {got}"
            )

    def _provenance(self) -> dict[str, Any]:
        options = {k: v for k, v in vars(self.objective).items() if not k.startswith("_")}
        provenance: dict[str, Any] = {
            "objective": {"name": self.objective.name, **options},
            "backbone": self.frozen.path,
            "start": self.start,
            "granularity": self.granularity,
            "family": None if self.family is None else list(self.family),
            "gate_steps": self.gate_steps,
            "relaxation": vars(self.relaxation) if self.gate_steps else None,
            "rates": dict(self.rates),
            "learned": {"per": self.predictions.per, "shift": self.predictions.shift.requires_grad},
            "seed": self.seed,
            "training_seconds": round(self.seconds, 1),
            "model_evaluations": self.evaluated,
            **versions(),
        }
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if data is not None:
            provenance["optimizer_steps"] = self.trainer.global_step
            provenance["batch_size"] = data.batch_size
            target = getattr(data, "described", None)
            provenance["target"] = target() if target else None
        if self.measured:
            provenance["measured"] = self.measured
        return provenance


WRONG_DATA = (
    "the trajectory objective needs noise and the samples that it leads to; take Trajectories as "
    "data"
)
STATE = ("updates", "evaluated", "seconds", "measured", "_importance")
