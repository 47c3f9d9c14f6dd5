"""Training of the teacher: the hybrid loss against one written here, and runs of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import l2c
from tests.conftest import tiny_dit, tiny_uvit
from tests.fitting import checkpoints, configuration, lively_dit, run, write_latents
from train.diffusion import DiffusionTraining, discretized_log_likelihood

Batch = dict[str, Tensor]


def batch(size: int = 8, spread: float = 1.0) -> Batch:
    g = torch.Generator().manual_seed(0)
    latents = (spread * torch.randn(size, 3, 8, 8, generator=g)).clamp(-1, 1)
    return {"latents": latents, "labels": torch.arange(size) % 10}


class Spy(nn.Module):
    """A model that keeps what it was asked and answers with fixed noise.

    `answer` gives the output [B, 2 C, H, W].
    """

    null_label = 10
    noise = l2c.Noise()
    config = {"learn_sigma": True, "null_class": True}

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.asked = (x, t, y)
        return self.answer


# --- the loss, written again in float64 ---


BETA = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ACP = (1 - BETA).cumprod(0)


def true_transition(clean: Tensor, noisy: Tensor, t: int) -> Normal:
    """q(x_{t-1} | x_t, x_0) by Bayes' rule: precisions add, means are weighted by them."""
    if t == 0:
        raise ValueError("there is nothing before timestep 0")
    # x_{t-1} given x_0, and what x_t says of x_{t-1}: x_t = sqrt(1 - beta) x_{t-1} + noise
    prior_mean, prior_variance = ACP[t - 1].sqrt() * clean, 1 - ACP[t - 1]
    seen_mean, seen_variance = noisy / (1 - BETA[t]).sqrt(), BETA[t] / (1 - BETA[t])
    variance = 1 / (1 / prior_variance + 1 / seen_variance)
    mean = variance * (prior_mean / prior_variance + seen_mean / seen_variance)
    return Normal(mean, variance.sqrt().expand_as(mean))


def model_transition(noisy: Tensor, eps: Tensor, v: Tensor, t: int) -> Normal:
    """The model's Gaussian: Bayes' rule with the clean image that eps implies, and its variance."""
    clean = (noisy - (1 - ACP[t]).sqrt() * eps) / ACP[t].sqrt()
    before = ACP[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
    lower = BETA[t] * (1 - before) / (1 - ACP[t])
    if t == 0:  # 0 there; Nichol & Dhariwal take that of timestep 1
        lower = BETA[1] * (1 - ACP[0]) / (1 - ACP[1])
    share = (v + 1) / 2
    variance = (share * BETA[t].log() + (1 - share) * lower.log()).exp()
    mean = true_transition(clean, noisy, t).mean if t else clean
    return Normal(mean, variance.sqrt())


def likelihood(x: Tensor, gaussian: Normal) -> Tensor:
    """Log probability of an 8-bit value: the mass of its bin; the outer bins have no end."""
    upper = torch.where(x > 0.999, torch.inf, x + 1 / 255)
    lower = torch.where(x < -0.999, -torch.inf, x - 1 / 255)
    inside = gaussian.cdf(upper.nan_to_num(posinf=1e9)) - gaussian.cdf(
        lower.nan_to_num(neginf=-1e9)
    )
    return inside.clamp_min(1e-12).log()


def expected_bound(clean: Tensor, noisy: Tensor, t: int, eps: Tensor, v: Tensor) -> Tensor:
    clean, noisy, eps, v = (x.double() for x in (clean, noisy, eps, v))
    model = model_transition(noisy, eps, v, t)
    if t == 0:
        nats = -likelihood(clean, model)
    else:
        nats = kl_divergence(true_transition(clean, noisy, t), model)
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def drawn(size: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = (size, 3, 8, 8)
    clean = torch.randint(0, 256, shape, generator=g) / 127.5 - 1
    noise = torch.randn(shape, generator=g)
    error = 0.1 * torch.randn(shape, generator=g)
    return clean, noise, noise + error, 2 * torch.rand(shape, generator=g) - 1


@pytest.mark.parametrize("t", [0, 1, 2, 10, 100, 500, 998, 999])
def test_bound_equals_one_written_with_distributions(t: int) -> None:
    clean, noise, eps, v = drawn()
    noisy = (ACP[t].sqrt() * clean + (1 - ACP[t]).sqrt() * noise).float()
    module = DiffusionTraining(tiny_dit())
    bound = module.bound(clean, noisy, torch.full((4,), t), eps, v)
    expected = expected_bound(clean, noisy, t, eps, v)
    assert bound.shape == (4,)
    # float32: at small t, means of nearly equal numbers are subtracted
    assert torch.allclose(bound.double(), expected, rtol=2e-3, atol=1e-6)


def test_bound_of_a_perfect_prediction_is_zero() -> None:
    clean, noise, _, v = drawn()
    t = torch.full((4,), 2)
    noisy = (ACP[2].sqrt() * clean + (1 - ACP[2]).sqrt() * noise).float()
    module = DiffusionTraining(tiny_dit())
    perfect = module.bound(clean, noisy, t, noise, torch.full_like(v, -1.0))
    # float32 leaves rounding errors of the means, divided by small variances
    assert torch.allclose(perfect, torch.zeros(4), atol=1e-5)
    assert bool((module.bound(clean, noisy, t, noise, v) > 1e-2).all())


def test_mixed_timesteps_are_told_apart() -> None:
    clean, noise, eps, v = drawn()
    t = torch.tensor([0, 1, 500, 999])
    noisy = torch.stack(
        [
            (ACP[s].sqrt() * c + (1 - ACP[s]).sqrt() * n).float()
            for s, c, n in zip(t, clean, noise, strict=True)
        ]
    )
    bound = DiffusionTraining(tiny_dit()).bound(clean, noisy, t, eps, v)
    for i in range(4):
        one = slice(i, i + 1)
        expected = expected_bound(clean[one], noisy[one], int(t[i]), eps[one], v[one])
        # float32: at small t, means of nearly equal numbers are subtracted
        assert torch.allclose(bound[one].double(), expected, rtol=2e-3, atol=1e-6)


def test_probabilities_of_all_values_sum_to_one() -> None:
    values = torch.arange(256) / 127.5 - 1
    for centre, scale in ((0.0, 0.1), (0.9, 0.3), (-2.0, 1.0)):
        mean, log_scale = torch.full((256,), centre), torch.full((256,), math.log(scale))
        total = discretized_log_likelihood(values, mean, log_scale).exp().sum()
        # float32, 256 summands
        assert float(total) == pytest.approx(1, abs=1e-4)


def losses(module: DiffusionTraining, given: Batch, seed: int = 0) -> tuple[Tensor, Tensor]:
    found = module.losses(given, torch.Generator().manual_seed(seed))
    assert list(found) == ["mse", "bound"]
    return found["mse"], found["bound"]


def test_losses_are_those_of_the_drawn_noise_and_timesteps() -> None:
    given = batch()
    g = torch.Generator().manual_seed(3)
    answer = torch.randn(8, 6, 8, 8, generator=g).clamp(-1, 1)
    spy = Spy(answer)
    simple, bound = losses(DiffusionTraining(spy), given)
    noisy, t, _ = spy.asked
    acp = ACP[t][:, None, None, None]
    noise = ((noisy - acp.sqrt() * given["latents"]) / (1 - acp).sqrt()).float()
    # float32: the noise is recovered by a subtraction, at small t of nearly equal numbers
    assert torch.allclose(simple, (answer[:, :3] - noise).square().mean(), rtol=1e-3)
    expected = [
        expected_bound(given["latents"][i, None], noisy[i, None], int(t[i]), *parts)
        for i, parts in enumerate(zip(answer[:, None, :3], answer[:, None, 3:], strict=True))
    ]
    # float32: at small t, means of nearly equal numbers are subtracted
    assert torch.allclose(bound.double(), torch.cat(expected).mean(), rtol=2e-3)


def test_only_the_variance_learns_from_the_bound() -> None:
    spy = Spy(torch.zeros(8, 6, 8, 8))
    simple, bound = losses(DiffusionTraining(spy), batch())
    (from_bound,) = torch.autograd.grad(bound, spy.answer, retain_graph=True)
    (from_simple,) = torch.autograd.grad(simple, spy.answer)
    assert not bool(from_bound[:, :3].any())
    assert bool((from_bound[:, 3:] != 0).all())
    assert bool((from_simple[:, :3] != 0).all())
    assert not bool(from_simple[:, 3:].any())


# --- timesteps and labels ---


@pytest.mark.parametrize("size", [1, 8, 50])
def test_every_stratum_of_timesteps_is_drawn_once(size: int) -> None:
    spy = Spy(torch.zeros(size, 6, 8, 8))
    seen = []
    for seed in range(20):
        losses(DiffusionTraining(spy), batch(size), seed)
        t = spy.asked[1]
        assert ((t * size) // 1000).tolist() == list(range(size))
        seen.append(t)
    assert len({tuple(t.tolist()) for t in seen}) == 20


def test_all_timesteps_can_be_drawn() -> None:
    spy = Spy(torch.zeros(500, 6, 8, 8))
    seen: set[int] = set()
    for seed in range(20):
        losses(DiffusionTraining(spy), batch(500), seed)
        seen |= set(spy.asked[1].tolist())
    assert seen == set(range(1000))


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.3, 90, 210), (1.0, 500, 500)])
def test_dropped_labels_become_the_null_label(share: float, least: int, most: int) -> None:
    spy = Spy(torch.zeros(500, 6, 8, 8))
    given = batch(500)
    losses(DiffusionTraining(spy, label_dropout=share), given)
    dropped = spy.asked[2] == 10
    assert least <= int(dropped.sum()) <= most
    assert torch.equal(spy.asked[2][~dropped], given["labels"][~dropped])
    assert int(given["labels"].max()) == 9  # the batch itself is as it was


# --- backbones without a learned variance, and weights of timesteps ---


class PlainSpy(Spy):
    """The same without a variance; timesteps count from 1."""

    config = {"null_class": True}
    noise = l2c.Noise.uvit()


def noise_levels(noise: l2c.Noise) -> Tensor:
    """Products of 1 - beta, written again."""
    ends = (noise.start, noise.end)
    if noise.betas == "scaled_linear":
        beta = torch.linspace(ends[0] ** 0.5, ends[1] ** 0.5, 1000, dtype=torch.float64) ** 2
    else:
        beta = torch.linspace(*ends, 1000, dtype=torch.float64)
    return (1 - beta).cumprod(0)


def test_without_a_learned_variance_there_is_no_bound() -> None:
    module = DiffusionTraining(tiny_uvit())
    found = module.losses(batch(), torch.Generator().manual_seed(0))
    assert list(found) == ["mse"]
    assert list(
        DiffusionTraining(tiny_dit(learn_sigma=False)).losses(batch(), torch.Generator())
    ) == ["mse"]


def test_timesteps_are_counted_from_the_noise_s_first() -> None:
    spy = PlainSpy(torch.zeros(500, 3, 8, 8))
    seen: set[int] = set()
    given = batch(500)
    for seed in range(20):
        DiffusionTraining(spy).losses(given, torch.Generator().manual_seed(seed))
        noisy, t, _ = spy.asked
        seen |= set(t.tolist())
        acp = noise_levels(spy.noise)[t - 1][:, None, None, None]
        eps = (noisy - acp.sqrt() * given["latents"]) / (1 - acp).sqrt()
        # 192 draws each: what is left after the signal is standard normal noise
        assert bool(((eps.std(dim=(1, 2, 3)) - 1).abs() < 0.25).all())
    assert seen == set(range(1, 1001))


@pytest.mark.parametrize("spy", [Spy, PlainSpy])
@pytest.mark.parametrize("most", [1.0, 5.0, 1e9])
def test_timesteps_are_weighted_by_the_inverse_signal_up_to_a_limit(
    spy: type[Spy], most: float
) -> None:
    model = spy(torch.zeros(8, 6 if spy is Spy else 3, 8, 8))
    module = DiffusionTraining(model, max_weight=most)
    expected = torch.tensor([min(1 / float(a), most) for a in noise_levels(model.noise)])
    expected = expected / expected.mean()
    assert float(module.timestep_weights.mean()) == pytest.approx(1, abs=1e-5)  # float32
    # float32, weights of up to 2e4
    torch.testing.assert_close(module.timestep_weights, expected, rtol=1e-4, atol=1e-6)
    given = batch()
    loss = module.losses(given, torch.Generator().manual_seed(0))["mse"]
    noisy, t, _ = model.asked
    index = t - model.noise.first
    acp = noise_levels(model.noise)[index][:, None, None, None]
    eps = (noisy - acp.sqrt() * given["latents"]) / (1 - acp).sqrt()
    by_hand = (expected[index] * eps.square().mean(dim=(1, 2, 3))).mean()
    # float32: the noise is recovered by a subtraction, at small t of nearly equal numbers
    torch.testing.assert_close(loss, by_hand.float(), rtol=1e-3, atol=0)


def test_weights_of_1_are_the_plain_loss() -> None:
    module = DiffusionTraining(tiny_uvit(), max_weight=1.0)
    assert bool((module.timestep_weights == 1).all())


def test_without_a_limit_it_is_the_error_of_the_velocity() -> None:
    """v = sqrt(acp) eps - sqrt(1 - acp) x_0, of which the model knows x_t."""
    given, answer = batch(), torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    spy = PlainSpy(answer)
    loss = DiffusionTraining(spy, max_weight=1e9).losses(given, torch.Generator().manual_seed(0))
    noisy, t, _ = spy.asked
    acp = noise_levels(spy.noise)[t - 1][:, None, None, None]
    signal, sigma, clean = acp.sqrt(), (1 - acp).sqrt(), given["latents"].double()
    eps = (noisy - signal * clean) / sigma
    guessed = (noisy - sigma * answer) / signal
    velocities = signal * eps - sigma * clean, signal * answer - sigma * guessed
    mean = (1 / noise_levels(spy.noise)).mean()
    expected = (velocities[0] - velocities[1]).square().mean() / mean
    # float32: the noise is recovered by a subtraction
    torch.testing.assert_close(loss["mse"].double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("most", [0.0, 0.99, -1.0])
def test_limits_below_1_are_refused(most: float) -> None:
    with pytest.raises(ValueError, match=f"max_weight of at least 1, got {most}"):
        DiffusionTraining(tiny_uvit(), max_weight=most)


def test_training_can_begin_with_the_weights_of_a_folder(tmp_path: Path) -> None:
    trained = tiny_uvit(seed=1)
    trained.save_pretrained(tmp_path / "trained")
    fresh = l2c.UViT(**trained.config)
    module = DiffusionTraining(fresh, initial=str(tmp_path / "trained"))
    module.configure_model()
    state = module.backbone.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trained.state_dict().items())
    assert all(p.requires_grad for p in module.backbone.parameters())
    assert module.backbone.training
    with torch.no_grad():
        module.backbone.norm.bias.fill_(3.0)
    module.configure_model()  # as a second run of the trainer does
    assert bool((module.backbone.norm.bias == 3).all())
    with pytest.raises(ValueError, match="expected a model folder"):
        DiffusionTraining(tiny_uvit(), initial=str(tmp_path / "none")).configure_model()
    deeper = DiffusionTraining(tiny_uvit(depth=4), initial=str(tmp_path / "trained"))
    with pytest.raises(ValueError, match=r"(?s)do not fit UViT.*in_blocks\.1"):
        deeper.configure_model()


@pytest.mark.parametrize("labels", [{}, {"num_classes": 0, "null_class": False}])
def test_a_few_steps_lower_the_loss_of_a_uvit(labels: dict[str, int | bool]) -> None:
    torch.manual_seed(0)
    config = {**tiny_uvit().config, **labels}
    module = DiffusionTraining(l2c.UViT(**config), label_dropout=0.1 if not labels else 0.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    given = {"latents": torch.full((16, 3, 8, 8), 0.5), "labels": torch.arange(16) % 10}

    def step(seed: int) -> float:
        (loss,) = module.losses(given, torch.Generator().manual_seed(seed)).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses = [step(seed) for seed in range(30)]
    # it begins near 1, the error of a model that predicts no noise at all
    assert losses[0] > 0.9
    assert sum(losses[-5:]) / 5 < 0.6


# --- runs ---


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    latents = write_latents(tmp_path / "latents")
    export = {"class_path": "ExportModel", "init_args": {"folder": str(tmp_path / "exported")}}
    config = configuration(tmp_path / "run", tmp_path, latents, callbacks=[export], max_steps=2)
    settings = {k: v for k, v in lively_dit().config.items() if k != "mlp_ratio"}
    config["model"] = {
        "class_path": "DiffusionTraining",
        "init_args": {
            "backbone": {"class_path": "l2c.dit.DiT", "init_args": settings},
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": 0.01, "weight_decay": 0.0},
            },
        },
    }
    return config


def test_two_steps_of_training_export_a_model_that_loads(
    config: dict[str, Any], tmp_path: Path
) -> None:
    cli = run("fit", config, tmp_path / "run")
    model = l2c.load(tmp_path / "exported")
    trained = cli.model.backbone.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert bool(model.final_layer.linear.weight.any())  # it began at zero
    images = l2c.sample(model, l2c.Schedule.ddim(2), [0, 1], 1.5)
    assert bool(images.isfinite().all())


def test_a_run_begins_with_the_initial_weights(config: dict[str, Any], tmp_path: Path) -> None:
    begun = lively_dit(mlp_ratio=4.0)
    begun.save_pretrained(tmp_path / "begun")
    config["model"]["init_args"]["initial"] = str(tmp_path / "begun")
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.0
    run("fit", config, tmp_path / "run")
    exported = l2c.load(tmp_path / "exported").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in begun.state_dict().items())


def test_learning_rate_warms_up_and_falls_to_zero(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"max_steps": 10, "callbacks": []}
    config["model"]["init_args"]["warmup_steps"] = 4
    cli = run("fit", config, tmp_path / "run")
    schedule = cli.trainer.lr_scheduler_configs[0].scheduler
    factors = [schedule.lr_lambdas[0](step) for step in range(11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 11):
        # cosine in double precision
        assert factors[step] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * (step - 4) / 6))
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_validation_is_the_same_every_time(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"]["limit_val_batches"] = 1.0
    metrics = [
        {
            k: float(v)
            for k, v in run("validate", config, tmp_path / "run").trainer.callback_metrics.items()
        }
        for _ in range(2)
    ]
    assert metrics[0] == metrics[1]
    # a model that starts at zero predicts no noise at all, and misses all of it
    assert metrics[0]["val/mse"] == pytest.approx(1, abs=0.2)
    assert metrics[0]["val/loss"] == pytest.approx(
        metrics[0]["val/mse"] + metrics[0]["val/bound"],
        rel=1e-6,  # float32
    )


def test_training_lowers_the_validation_loss(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"max_steps": 100, "limit_val_batches": 1.0, "val_check_interval": 6}
    cli = run("fit", config, tmp_path / "run")
    assert float(cli.trainer.callback_metrics["val/mse"]) < 0.8  # it began at 1, see above


def test_a_resumed_teacher_equals_an_uninterrupted_one(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"]["max_steps"] = 8
    config["model"]["init_args"]["warmup_steps"] = 2
    export = config["trainer"]["callbacks"][0]
    run("fit", config, tmp_path / "whole")
    expected = l2c.load(tmp_path / "exported").state_dict()
    config["trainer"]["callbacks"] = [
        checkpoints(tmp_path / "run"),
        {"class_path": "tests.fitting.Fail", "init_args": {"batch": 5}},
    ]
    with pytest.raises(ArithmeticError):
        run("fit", config, tmp_path / "run")
    config["trainer"]["callbacks"] = [checkpoints(tmp_path / "run"), export]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    run("fit", config, tmp_path / "run", "--ckpt_path", str(last))
    resumed = l2c.load(tmp_path / "exported").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_labels_cannot_be_dropped_without_a_null_class() -> None:
    with pytest.raises(ValueError, match="null_class, or label_dropout 0, got null_class=False"):
        DiffusionTraining(tiny_dit(null_class=False))
    module = DiffusionTraining(tiny_dit(null_class=False), label_dropout=0.0)
    assert bool(torch.stack(losses(module, batch())).isfinite().all())
