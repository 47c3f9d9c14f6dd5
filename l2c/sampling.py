"""The sampling API: noise, labels and a schedule, and optionally a router, to samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from l2c.cache import cached
from l2c.conditioning import prepared
from l2c.plan import Plan
from l2c.router import Router
from l2c.schedule import Schedule
from l2c.solvers import Callback, solve

Generators = torch.Generator | Sequence[torch.Generator] | None


@torch.no_grad()
def sample(
    model: Any,
    schedule: Schedule,
    # conditions
    labels: Tensor | Sequence[int],
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    guidance_calls: int = 1,
    *,
    # caching
    router: Router | str | Path | None = None,
    plan: Plan | None = None,
    # randomness
    generator: Generators = None,
    latents: Tensor | None = None,
    # execution
    batch_size: int | None = None,
    vae: Any = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw one sample per label.

    The same seed gives the same noise however the labels are split into batches: noise is drawn
    sample by sample. The model is left as it was, also after an error.

    Args:
        model: A backbone of l2c, e.g. from `l2c.load`.
        schedule: Solver and evaluations, for noise like the model's.
        labels: Class labels, [B].
        guidance_scale: Classifier-free guidance, `uncond + scale * (cond - uncond)`; 1 for none.
            U-ViT's scales are one less: its published 0.4 is 1.4 here.
        guidance_channels: Guide only the first so many channels, as the original DiT does with
            3 of 4; None for all.
        guidance_calls: 1 to put both predictions of guidance into one batch of twice the size, 2
            to call the model twice, each with a cache of its own, which needs half the memory. A
            plan that decides about the two separately has them in two calls anyway.
        router: A router or its file; refused where it does not fit model, schedule or guidance.
        plan: A plan in place of a router.
        generator: A CPU or device generator for the noise, or one per sample.
        latents: Initial noise [B, C, H, W] in place of a generator's.
        batch_size: Run in batches of at most so many samples; None for one batch.
        vae: A diffusers `AutoencoderKL`; if given, images are returned.
        callback: Called as `callback(evaluation, timestep, latents)` before each evaluation.
        progress: Show a progress bar over all evaluations.

    Returns:
        Clean latents [B, C, H, W] in float32; with `vae`, images in [0, 1].

    Raises:
        ValueError: If an argument does not fit the model, or the router does not fit the run.
    """
    labels = _check_labels(model, labels, guidance_scale)
    check_noise(model, schedule)
    if guidance_calls not in (1, 2):
        raise ValueError(f"expected guidance_calls of 1 or 2, got {guidance_calls}")
    if router is not None and plan is not None:
        raise ValueError("expected a router or a plan, got both; router.plan() gives its plan")
    if isinstance(router, (str, Path)):
        router = Router.load(router)
    if router is not None:
        router.check(model, schedule, guidance_scale)
        plan = router.plan()
    if plan is not None and len(plan) != len(schedule):
        raise ValueError(
            f"expected a plan of {len(schedule)} evaluations for {schedule}, got {len(plan)}"
        )
    if plan is not None and plan.streams == 2:
        if guidance_scale == 1.0:
            raise ValueError(
                "this plan decides about the two predictions of guidance separately; give a "
                "guidance_scale other than 1"
            )
        guidance_calls = 2
    if guidance_channels is not None and not 1 <= guidance_channels <= model.in_channels:
        raise ValueError(
            f"expected guidance_channels between 1 and {model.in_channels}, got {guidance_channels}"
        )
    x = initial_latents(model, len(labels), generator) if latents is None else latents.float()
    expected = (len(labels), *latent_shape(model))
    if tuple(x.shape) != expected:
        raise ValueError(f"expected latents of shape {expected}, got {tuple(x.shape)}")

    weight = next(model.parameters())
    size = len(labels) if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"expected a batch_size of at least 1, got {batch_size}")
    batches = -(-len(labels) // size)
    done = []
    with tqdm(total=batches * len(schedule), disable=not progress, unit="evaluation") as bar:

        def step(row: int, t: float, now: Tensor) -> None:
            if callback is not None:
                callback(row, t, now)
            bar.update()

        for start in range(0, len(labels), size):
            part = labels[start : start + size].to(weight.device)
            predict = _Predict(model, part, guidance_scale, guidance_channels, guidance_calls)
            noise = x[start : start + size].to(weight.device)
            caching = nullcontext() if plan is None else cached(model, plan, predict.calls)
            with prepared(model, schedule.timesteps, predict.labels), caching:
                result = solve(schedule, noise, predict, step)
            done.append(result if vae is None else decode(vae, result))
    return torch.cat(done)


class _Predict:
    """The guided prediction of a model for fixed labels."""

    def __init__(
        self,
        model: Any,
        labels: Tensor,
        guidance_scale: float,
        guidance_channels: int | None,
        calls: int,
    ) -> None:
        self.model = model
        self.scale = guidance_scale
        self.channels = guidance_channels
        self.guided = guidance_scale != 1.0
        self.calls = calls if self.guided else 1
        self.dtype = next(model.parameters()).dtype
        self.labels = [labels]
        if self.guided:
            self.labels.append(torch.full_like(labels, model.null_label))
        if self.calls == 1:
            self.labels = [torch.cat(self.labels)]

    def __call__(self, x: Tensor, t: float) -> Tensor:
        inputs = torch.cat([x, x]) if self.guided and self.calls == 1 else x
        times = torch.full((len(inputs),), t, device=x.device)
        out = torch.cat(
            [self.model(inputs.to(self.dtype), times, labels) for labels in self.labels]
        )
        out = out[:, : x.shape[1]].float()
        return guide(out, self.scale, self.channels) if self.guided else out


def check_noise(model: Any, schedule: Schedule) -> None:
    """Raise a ValueError if a schedule is for another forward process than the model's."""
    if model.noise != schedule.noise:
        raise ValueError(
            f"expected a schedule of this {type(model).__name__}'s noise {model.noise}, got one of "
            f"{schedule.noise}; give noise=model.noise where the schedule is made, or set "
            "model.noise if the model was trained otherwise"
        )


def guide(out: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Combine stacked predictions [cond; uncond] of shape [2 B, C, H, W] by guidance.

    Channels beyond the first `channels` keep the conditional prediction, as in the original DiT.
    """
    cond, uncond = out.chunk(2)
    guided = uncond + scale * (cond - uncond)
    if channels is None:
        return guided
    return torch.cat([guided[:, :channels], cond[:, channels:]], dim=1)


def latent_shape(model: Any) -> tuple[int, int, int]:
    """Shape [C, H, W] of one latent of a model."""
    return model.in_channels, model.input_size, model.input_size


def initial_latents(model: Any, count: int, generator: Generators = None) -> Tensor:
    """Standard normal noise [count, C, H, W], drawn one sample after the other."""
    shape = latent_shape(model)
    if isinstance(generator, Sequence):
        if len(generator) != count:
            raise ValueError(f"expected one generator per sample, {count}, got {len(generator)}")
        generators: list[torch.Generator | None] = list(generator)
    else:
        generators = [generator] * count
    device = next(model.parameters()).device
    return torch.stack(
        [
            torch.randn(shape, generator=g, device=g.device if g else None).to(device)
            for g in generators
        ]
    )


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images in [0, 1] from clean latents, by a diffusers `AutoencoderKL`."""
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    image: Tensor = vae.decode(scaled).sample
    return (image.float() / 2 + 0.5).clamp(0, 1)


def _check_labels(model: Any, labels: Tensor | Sequence[int], guidance_scale: float) -> Tensor:
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() and labels.numel():
        raise ValueError(f"expected whole numbers as labels, got {labels.dtype}")
    labels = labels.long()
    if not math.isfinite(guidance_scale):
        raise ValueError(f"expected a finite guidance_scale, got {guidance_scale}")
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"expected labels of shape [B], B > 0, got {tuple(labels.shape)}")
    highest = model.null_label or max(0, model.num_classes - 1)
    if int(labels.min()) < 0 or int(labels.max()) > highest:
        raise ValueError(
            f"expected labels between 0 and {highest}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    if guidance_scale != 1.0 and model.null_label is None:
        raise ValueError(
            f"guidance_scale {guidance_scale} needs a model with a null class; this one has none"
        )
    return labels
