"""Training of a diffusion transformer itself: how the shipped teachers were made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import l2c
from l2c.noise import Noise
from train.data import Batch
from train.seeding import batches_done, generator

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class DiffusionTraining(L.LightningModule):
    """Trains a noise-predicting transformer, with learned variances where the backbone has them.

    Loss: the error of the predicted noise (Ho et al. 2020, eq. 14), and for a backbone with
    `learn_sigma` the variational bound of a random timestep's transition as well, which only the
    predicted variance learns from (Nichol & Dhariwal 2021, section 3.1), as DiT was trained.

    Args:
        backbone: The model to train; its `noise` is the forward process.
        optimizer: Optimizer of the backbone's parameters; AdamW by default.
        warmup_steps: Optimizer steps of linear warm-up; the learning rate then falls to 0 in half
            a cosine over the rest of the training.
        label_dropout: Share of the labels replaced by the null label, for guidance.
        max_weight: Weight the noise error by 1 / acp_t, at most so much, and scale the weights to
            a mean of 1. 1 is the plain loss; without a limit it is the error of the velocity
            (Salimans & Ho 2022, appendix D), which lets noisy timesteps, where the contents of a
            sample are decided, count as much as clean ones.
        initial: A folder written by `save_pretrained` to take the initial weights from.
        seed: Seed of noise, timesteps and dropped labels.

    Raises:
        ValueError: If there are labels to drop and no null class, or no initial weights there.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimizer: OptimizerFactory | None = None,
        warmup_steps: int = 0,
        label_dropout: float = 0.1,
        max_weight: float = 1.0,
        initial: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        config = getattr(backbone, "config", {})
        if label_dropout and not config.get("null_class"):
            raise ValueError(
                "expected a backbone with null_class, or label_dropout 0, got "
                f"null_class={config.get('null_class')}, label_dropout {label_dropout}"
            )
        if max_weight < 1:
            raise ValueError(f"expected max_weight of at least 1, got {max_weight}")
        self.backbone: Any = backbone
        self._initial = initial
        self.optimizer_factory = optimizer or torch.optim.AdamW
        self.warmup_steps = warmup_steps
        self.label_dropout = label_dropout
        self.seed = seed
        self.noise: Noise = self.backbone.noise
        self.learn_sigma = bool(config.get("learn_sigma"))
        weights = (1 / self.noise.alphas_cumprod).clamp(max=max_weight)
        self.timestep_weights = (weights / weights.mean()).float()

    def configure_model(self) -> None:
        """Take the initial weights, before they are averaged or restored from a checkpoint."""
        if self._initial is not None:
            try:
                self.backbone.load_state_dict(l2c.load(self._initial).state_dict())
            except RuntimeError as error:
                raise ValueError(
                    f"the weights in {self._initial} do not fit "
                    f"{type(self.backbone).__name__}({self.backbone.config}): {error}"
                ) from error
            self._initial = None

    def configure_optimizers(self) -> Any:
        """The optimizer, its learning rate stepped after every batch."""
        parameters = (p for p in self.backbone.parameters() if p.requires_grad)
        optimizer = self.optimizer_factory(parameters)
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
            rest = max(1, total - self.warmup_steps)
            done = min(1.0, max(0, step - self.warmup_steps) / rest)
            return warm * 0.5 * (1 + math.cos(math.pi * done))

        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One batch at stratified random timesteps."""
        g = generator("train", self.seed, batches_done(self.trainer), self.global_rank)
        losses = self.losses(batch, g)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return torch.stack(list(losses.values())).sum()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """The same losses with noise that is the same in every validation."""
        losses = self.losses(batch, generator("validate", self.seed, batch_index))
        self.log_dict({f"val/{name}": value for name, value in losses.items()})
        self.log("val/loss", torch.stack(list(losses.values())).sum())

    def losses(self, batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
        """`mse` of the noise and, of a learned variance, `bound` (bits/dim * timesteps / 1000)."""
        clean, labels = batch["latents"], batch["labels"]
        size, device = len(clean), clean.device
        # One timestep from each of `size` equal strata: less variance than independent ones.
        strata = (torch.arange(size) + torch.rand(size, generator=g)) / size
        index = (strata * self.noise.timesteps).long()
        t = (index + self.noise.first).to(device)
        eps = torch.randn(clean.shape, generator=g).to(device)
        dropped = (torch.rand(size, generator=g) < self.label_dropout).to(device)
        if self.label_dropout:
            labels = labels.masked_fill(dropped, self.backbone.null_label)
        noisy = self.noise.add(clean, eps, t)
        output = self.backbone(noisy, t, labels).float()
        predicted = output[:, : clean.shape[1]]
        squares = (predicted - eps).square().mean(dim=(1, 2, 3))
        losses = {"mse": (squares * self.timestep_weights[index].to(device)).mean()}
        if self.learn_sigma:
            variance = output[:, clean.shape[1] :]
            bound = self.bound(clean, noisy, index, predicted.detach(), variance).mean()
            losses["bound"] = bound * self.noise.timesteps / 1000
        return losses

    def bound(self, clean: Tensor, noisy: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        """Bits per dimension of q(x_{t-1} | x_t, x_0) under the model's transition, shape [B].

        `t` counts from 0; `v` in [-1, 1] interpolates the log variance between its bounds
        (Improved DDPM, eq. 15).
        """
        acp = self.noise.alphas_cumprod
        beta = self.noise.beta
        before = torch.cat([acp.new_ones(1), acp[:-1]])
        posterior = beta * (1 - before) / (1 - acp)
        posterior[0] = posterior[1] if len(posterior) > 1 else beta[0]
        table = torch.stack(
            [
                beta.log(),
                posterior.log(),
                before.sqrt() * beta / (1 - acp),
                (1 - beta).sqrt() * (1 - before) / (1 - acp),
                (1 / acp).sqrt(),
                (1 / acp - 1).sqrt(),
            ]
        )
        at = table[:, t.cpu()].float().to(clean.device)[:, :, None, None, None]
        log_beta, log_posterior, from_clean, from_noisy, scale, sigma = at
        true_mean = from_clean * clean + from_noisy * noisy
        mean = from_clean * (scale * noisy - sigma * eps) + from_noisy * noisy
        fraction = (v + 1) / 2
        log_variance = fraction * log_beta + (1 - fraction) * log_posterior
        divergence = 0.5 * (
            log_variance
            - log_posterior
            - 1
            + (log_posterior - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        decoder = -discretized_log_likelihood(clean, mean, 0.5 * log_variance)
        nats = torch.where((t == 0)[:, None, None, None], decoder, divergence)
        return nats.mean(dim=(1, 2, 3)) / math.log(2)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of values on the grid of 8-bit images in [-1, 1] under a Gaussian."""
    normal = torch.distributions.Normal(0.0, 1.0)
    centred, inverse = x - mean, (-log_scale).exp()
    upper = normal.cdf((centred + 1 / 255) * inverse)
    lower = normal.cdf((centred - 1 / 255) * inverse)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log()
