"""TrajectoryTraining: budgets, what is learned, what is written down, and that it resumes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import l2c
from l2c.identity import Identity
from l2c.profile import Profile
from l2c.router import Router
from tests.conftest import blocks_of, make_router, tiny_dit, tiny_uvit
from tests.fitting import (
    checkpoints,
    configuration,
    exported,
    lively_dit,
    lively_uvit,
    logger,
    run,
    write_latents,
)
from train.budgeted import TrajectoryTraining
from train.trajectory import Trajectory

Configure = Callable[..., dict[str, Any]]
LR = {"lr": 1.0, "shift_lr": 0.3, "warmup_steps": 2}


class Watch(L.Callback):
    """Keeps gates and share of the plan from before training and after every batch.

    And the errors of validations, and how many multiply-accumulates the backbone came to by then.
    """

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.shares: list[float] = []
        self.evaluated: list[int] = []
        self.macs: list[int] = []
        self.errors: list[float] = []
        self._count = 0
        self._batch = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model, sites = pl_module.frozen.model, pl_module.sites

        def begin(_: object, inputs: tuple[Tensor, ...]) -> None:
            self._batch = len(inputs[0])
            self._count += self._batch * sites.rest

        model.register_forward_pre_hook(begin)
        layers = [layer for block in blocks_of(model) for layer in (block.attn, block.mlp)]
        for layer, site in zip(layers, sites, strict=True):
            layer.register_forward_hook(lambda *_, macs=site.macs: self._add(macs))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._note(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        self._note(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.errors.append(float(trainer.callback_metrics["val/loss"]))

    def _add(self, macs: int) -> None:
        self._count += self._batch * macs

    def _note(self, module: L.LightningModule) -> None:
        self.logits.append(module.gates.logits.detach().clone())
        self.shares.append(module.plan().share)
        self.evaluated.append(module.evaluated)
        self.macs.append(self._count)


class Spoil(L.Callback):
    """Makes what is learned useless before a batch.

    Args:
        batch: Number of batches done before it.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_index: int
    ) -> None:
        if trainer.global_step == self.batch:
            pl_module.predictions.corrections.data.fill_(1e30)


def watched(cli: Any) -> Watch:
    return next(c for c in cli.trainer.callbacks if type(c).__name__ == "Watch")


def callback(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"tests.test_budgeted.{name}", "init_args": settings}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a lively DiT, in which all runs keep their target samples."""
    folder = tmp_path_factory.mktemp("given")
    lively_dit().save_pretrained(folder / "dit")
    return folder


@pytest.fixture(scope="module")
def configure(given: Path) -> Configure:
    """`configure(folder, model, objective, data, **trainer)` describes 12 steps of 4 samples."""

    def of(
        folder: Path,
        model: dict[str, Any] | None = None,
        objective: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> dict[str, Any]:
        backbone = str((model or {}).get("backbone", given / "dit"))
        config = configuration(folder, given / "dit", given / "none")
        config["trainer"] |= {
            "limit_val_batches": 1.0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 4,
            "callbacks": [exported(folder), callback("Watch"), *trainer.pop("extra", [])],
            "enable_checkpointing": False,
            **trainer,
        }
        config["model"] = {
            "class_path": "TrajectoryTraining",
            "init_args": {
                "backbone": backbone,
                "evaluations": 6,
                "objective": {"class_path": "Trajectory", "init_args": objective or {}},
                **({} if model and "speedup" in model else {"budget": 0.5}),
                **LR,
                **(model or {}),
            },
        }
        config["data"] = {
            "class_path": "Trajectories",
            "init_args": {
                "backbone": backbone,
                "evaluations": 6,
                "count": 16,
                "validation": 8,
                "batch_size": 4,
                "shard": 8,
                "folder": str(given / "samples"),
                **(data or {}),
            },
        }
        return config

    return of


@pytest.fixture(scope="module")
def fitted(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of 12 steps, and its folder."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    config = configure(folder, logger=logger(folder), num_sanity_val_steps=-1)
    return run("fit", config, folder), folder


# --- budgets ---


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT with so many blocks that one site of 20 evaluations is below 1% of the compute."""
    folder = tmp_path_factory.mktemp("deep") / "dit"
    tiny_dit(depth=6).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("granularity", ["site", "block", "evaluation"])
@pytest.mark.parametrize("reuse", ["copy", "newton-2"])
@pytest.mark.parametrize("budget", [0.12, 0.25, 0.5, 0.8, 1.0])
def test_a_budget_is_met_within_a_percent(
    budget: float, reuse: str, granularity: str, deep: Path
) -> None:
    settings = {"budget": budget, "reuse": reuse, "granularity": granularity, "gate_steps": 1}
    module = TrajectoryTraining(str(deep), 20, **settings)
    assert budget - 0.01 < module.plan().share <= budget
    g = torch.Generator().manual_seed(0)
    module.gates.logits.data.copy_(
        torch.randn(module.gates.logits.shape, generator=g)
    )  # any other gates
    assert budget - 0.01 < module.plan().share <= budget
    assert module.router().budget == budget


@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.0, 4.0])
def test_a_speedup_is_a_budget_of_its_inverse(speedup: float, deep: Path) -> None:
    module = TrajectoryTraining(str(deep), 20, speedup=speedup)
    assert 1 / speedup - 0.01 < module.plan().share <= 1 / speedup
    assert module.plan().speedup >= speedup


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.7])
def test_a_budget_of_two_streams_is_met(budget: float, deep: Path) -> None:
    module = TrajectoryTraining(str(deep), 20, budget=budget, objective=Trajectory(streams=2))
    assert budget - 0.01 < module.plan().share <= budget
    assert module.plan().streams == 2
    assert len(module.plan().compute) == 40


@pytest.mark.parametrize("granularity", ["site", "block", "evaluation"])
def test_gates_are_shared_as_the_granularity_says(granularity: str, deep: Path) -> None:
    module = TrajectoryTraining(str(deep), 20, budget=0.5, granularity=granularity)
    groups = {"site": 12, "block": 6, "evaluation": 1}[granularity]
    assert module.gates.logits.shape == (20, groups)
    before = module.gates.scores()
    module.gates.logits.data[7, -1] += 1.0
    moved = (module.gates.scores() != before).nonzero().tolist()
    assert moved == [[7, site] for site in range(12 - 12 // groups, 12)]


def test_the_start_is_evenly_spread_whole_evaluations(deep: Path) -> None:
    full = l2c.Plan.every(4, 20, l2c.sites(l2c.load(deep)))
    settings = {"reuse": "copy", "per": "none", "gate_steps": 1}
    for granularity in ("site", "block", "evaluation"):
        module = TrajectoryTraining(
            str(deep), 20, budget=full.share + 1e-6, granularity=granularity, **settings
        )
        assert module.plan().compute == full.compute


@pytest.fixture
def profile(deep: Path, tmp_path: Path) -> Path:
    """Times in which the attention of the first blocks is by far the slowest."""
    model = l2c.load(deep)
    sites = l2c.sites(model)
    seconds = tuple(1e-3 * (30 - 2 * i if i % 2 == 0 else 3) for i in range(12))
    profile = Profile(Identity.of(model), sites, seconds, 5e-3, 8, {"device": "made up"})
    profile.save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


@pytest.mark.parametrize("granularity", ["site", "evaluation"])
@pytest.mark.parametrize("budget", [0.2, 0.41, 0.5, 0.87])
def test_a_budget_is_counted_in_the_time_of_a_profile(
    budget: float, granularity: str, profile: Path, deep: Path, tmp_path: Path
) -> None:
    settings = {"budget": budget, "granularity": granularity, "profile": str(profile)}
    module = TrajectoryTraining(str(deep), 20, gate_steps=1, **settings)
    measured = Profile.load(profile)
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        compute = torch.tensor(module.plan().compute)
        times = torch.tensor(measured.seconds, dtype=torch.float64)
        spent = float((compute * times).sum()) + 20 * measured.rest
        longest = max(measured.seconds) / (20 * measured.total)
        share = spent / (20 * measured.total)
        assert budget - max(0.01, longest) < share <= budget + 1e-9
        module.router().save(tmp_path / "router.safetensors")
        again = Router.load(tmp_path / "router.safetensors").plan()
        assert torch.equal(torch.tensor(again.compute), compute)
        module.gates.logits.data.copy_(torch.randn(module.gates.logits.shape, generator=g))


def test_one_router_serves_a_family_of_budgets(deep: Path) -> None:
    router = TrajectoryTraining(str(deep), 20, budget=0.4, family=(0.2, 0.6)).router()
    plans = [router.plan(budget=budget) for budget in (0.2, 0.4, 0.6)]
    for plan, budget in zip(plans, (0.2, 0.4, 0.6), strict=True):
        assert budget - 0.01 < plan.share <= budget
    tables = [torch.tensor(plan.compute) for plan in plans]
    assert bool((tables[0] <= tables[1]).all())
    assert bool((tables[1] <= tables[2]).all())


# --- the start ---


@pytest.mark.parametrize("granularity", ["site", "block", "evaluation"])
def test_a_start_from_a_router_keeps_its_plan(
    granularity: str, dit_folder: Path, tmp_path: Path
) -> None:
    first = TrajectoryTraining(str(dit_folder), 8, budget=0.45, granularity="site", gate_steps=1)
    g = torch.Generator().manual_seed(2)
    first.gates.logits.data.copy_(torch.randn(first.gates.logits.shape, generator=g) * 3)
    path = tmp_path / "start.safetensors"
    first.router().save(path)
    settings = {"start": str(path), "granularity": granularity}
    second = TrajectoryTraining(str(dit_folder), 8, budget=0.45, **settings)
    assert second.plan().compute == first.plan().compute
    uniform = TrajectoryTraining(str(dit_folder), 8, budget=0.45)
    assert second.plan().compute != uniform.plan().compute


@pytest.mark.parametrize("granularity", ["site", "block", "evaluation"])
def test_a_start_from_a_router_with_a_threshold_keeps_its_plan(
    granularity: str, dit: l2c.DiT, dit_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "start.safetensors"
    router = make_router(dit, l2c.Schedule.ddim(6))
    router.save(path)
    plan = router.plan()
    settings = {"start": str(path), "granularity": granularity, "reuse": "copy", "per": "none"}
    module = TrajectoryTraining(
        str(dit_folder), 6, budget=plan.share + 1e-6, gate_steps=1, **settings
    )
    assert module.plan().compute == plan.compute


def test_a_start_of_another_kind_is_refused(dit: l2c.DiT, dit_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    make_router(dit, l2c.Schedule.ddim(6)).save(path)
    given = {"budget": 0.6, "start": str(path)}
    with pytest.raises(ValueError, match="another schedule"):
        TrajectoryTraining(str(dit_folder), 8, **given)
    with pytest.raises(ValueError, match="a start with 2 streams, .* got 1"):
        TrajectoryTraining(str(dit_folder), 6, objective=Trajectory(streams=2), **given)
    tiny_dit(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained for another model"):
        TrajectoryTraining(str(tmp_path / "other"), 6, **given)


def errors(module: Any, data: Any, plan: l2c.Plan) -> float:
    """The error of a plan's samples on the first training samples."""
    batch = data.first(16)
    sampled = l2c.sample(
        module.frozen.model, module.schedule, batch["labels"], 1.5,
        latents=batch["noise"], plan=plan, guidance_calls=module.streams,
    )  # fmt: skip
    return float((sampled - batch["latents"]).square().mean())


@pytest.mark.parametrize("streams", [1, 2])
def test_a_search_begins_with_a_better_plan(
    streams: int, configure: Configure, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    model = {"start": "search", "lr": 0.0, "shift_lr": 0.0}  # nothing else changes
    arguments = (model, {"streams": streams})
    cli = run("fit", configure(folder, *arguments, max_steps=1, limit_val_batches=0), folder)
    module = cli.model
    objective = Trajectory(streams=streams)
    uniform = TrajectoryTraining(module.frozen.path, 6, budget=0.5, objective=objective)
    found, even = module.plan(), uniform.plan()
    assert found.share <= 0.5
    better, worse = (errors(module, cli.datamodule, plan) for plan in (found, even))
    assert better < 0.9 * worse
    assert Router.load(folder / "router.safetensors").plan().compute == found.compute


# --- what is learned ---


@pytest.mark.parametrize(
    ("per", "shift", "corrections", "shifts"),
    [
        ("channel", True, (6, 6, 3, 32), (6, 6, 32)),
        ("channel", False, (6, 6, 3, 32), None),
        ("site", True, (6, 6, 3, 1), (6, 6, 32)),
        ("site", False, (6, 6, 3, 1), None),
        ("none", True, None, None),
    ],
)
def test_numbers_are_learned_per_channel_or_site(
    per: str,
    shift: bool,
    corrections: tuple[int, ...] | None,
    shifts: tuple[int, ...] | None,
    configure: Configure,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    model = {"per": per, "shift": shift, "gate_steps": 4 * (per == "none")}
    run("fit", configure(folder, model, max_steps=4, limit_val_batches=0), folder)
    router = Router.load(folder / "router.safetensors")
    for learned, shape in ((router.reuse.corrections, corrections), (router.reuse.shift, shifts)):
        assert (None if learned is None else tuple(learned.shape)) == shape
        if learned is None:
            continue
        compute = torch.tensor(router.plan().compute)
        moved = learned.flatten(2).abs().sum(2) > 0
        assert bool(moved.any())
        assert not bool((moved & compute).any())  # where it is computed, nothing is learned
    assert router.reuse.name == "newton-2"


def test_training_lowers_the_error(fitted: tuple[Any, Path]) -> None:
    first, *_, last = watched(fitted[0]).errors  # from before training on
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ({}, {"loss": "steps"}),
        ({}, {"streams": 2}),
        ({"gate_steps": 8, "granularity": "site", "gate_lr": 0.3}, {}),
        ({"per": "site", "reuse": "taylor-1"}, {"guidance_scale": 1.0}),
    ],
    ids=["steps", "streams", "gates", "unguided"],
)
def test_training_lowers_the_error_in_other_ways(
    model: dict[str, Any], objective: dict[str, Any], configure: Configure, tmp_path: Path
) -> None:
    data = {"guidance_scale": objective.get("guidance_scale", 1.5)}
    trainer = {"val_check_interval": 12, "num_sanity_val_steps": -1}
    config = configure(tmp_path / "run", model, objective, data, **trainer)
    first, last = watched(run("fit", config, tmp_path / "run")).errors
    assert last < 0.8 * first


def test_the_output_scale_of_shifts_is_the_last_evaluations(fitted: tuple[Any, Path]) -> None:
    cli, _ = fitted
    model, batch = cli.model.frozen.model, cli.datamodule.first(16)
    seen: list[Tensor] = []
    layers = [layer for block in blocks_of(model) for layer in (block.attn, block.mlp)]
    hooks = [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in layers]
    labels = torch.cat([batch["labels"], torch.full_like(batch["labels"], model.null_label)])
    x = torch.cat([batch["latents"]] * 2)
    with torch.no_grad():
        model(x, torch.full((32,), cli.model.schedule.timesteps[-1]), labels)
    for hook in hooks:
        hook.remove()
    expected = torch.stack([out.square().mean().sqrt() for out in seen])
    assert torch.equal(cli.model.predictions.scales, expected)
    shift = cli.model.predictions.shift.detach() * expected[:, None]
    assert torch.equal(cli.model.router().reuse.shift, shift)


def test_the_backbone_stays_as_it_is(fitted: tuple[Any, Path], given: Path) -> None:
    cli, _ = fitted
    model, before = cli.model.frozen.model, l2c.load(given / "dit").state_dict()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, _ in cli.model.named_parameters()} == {
        "predictions.corrections",
        "predictions.shift",
        "gates.logits",
    }


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        ("final", "straight-through"),
        ("final", "hard-concrete"),
        ("final", "sigmoid"),
        ("steps", "straight-through"),
        ("steps", "hard-concrete"),
    ],
)
def test_gates_move_while_they_are_trained_and_are_fixed_afterwards(
    loss: str, kind: str, configure: Configure, tmp_path: Path
) -> None:
    model = {
        "gate_steps": 4,
        "granularity": "site",
        "gate_lr": 0.5,
        "relaxation": {"class_path": "Relaxation", "init_args": {"kind": kind}},
    }
    trainer = {"max_steps": 7, "limit_val_batches": 0}
    cli = run("fit", configure(tmp_path / "run", model, {"loss": loss}, **trainer), tmp_path)
    seen = watched(cli)
    assert len(seen.logits) == 8
    for step, (before, after) in enumerate(zip(seen.logits, seen.logits[1:], strict=False)):
        moved = (before != after).any(1)
        assert not bool(moved[0])  # the first evaluation has no gates
        # With "steps" and hard gates, evaluations without an error have no gradient.
        assert bool(moved.any()) == (step < 4)
        if (loss, kind) != ("steps", "straight-through"):
            assert bool(moved[1:].all()) == (step < 4)
    largest = max(site.macs for site in cli.model.sites) / (6 * cli.model.sites.macs)
    assert all(0.5 - largest < share <= 0.5 for share in seen.shares)
    first = TrajectoryTraining(cli.model.frozen.path, 6, budget=0.5, granularity="site")
    assert cli.model.plan().compute != first.plan().compute


@pytest.mark.parametrize("granularity", ["block", "evaluation"])
def test_shared_gates_are_trained_together(
    granularity: str, configure: Configure, tmp_path: Path
) -> None:
    model = {"gate_steps": 4, "granularity": granularity, "gate_lr": 0.5}
    config = configure(tmp_path / "run", model, max_steps=6, limit_val_batches=0)
    cli = run("fit", config, tmp_path)
    seen = watched(cli)
    assert not torch.equal(seen.logits[0], seen.logits[4])
    assert torch.equal(seen.logits[4], seen.logits[6])
    scores = cli.model.gates.scores().logit().reshape(6, -1, 2 if granularity == "block" else 6)
    assert float((scores.max(2).values - scores.min(2).values).max()) < 2e-3  # the start's order
    largest = max(site.macs for site in cli.model.sites) / (6 * cli.model.sites.macs)
    assert all(0.5 - largest < share <= 0.5 for share in seen.shares)


def test_a_family_is_trained_at_several_budgets(configure: Configure, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model = {"family": [0.3, 0.9], "measure": [0.35, 0.8], "reuse": "copy"}
    cli = run("fit", configure(folder, model, max_steps=8), folder)
    alone = run("fit", configure(folder, {"reuse": "copy"}, max_steps=8), folder)
    moved = [
        cli_.model.predictions.corrections.detach().flatten(2).abs().sum(2) > 0
        for cli_ in (cli, alone)
    ]
    compute = torch.tensor(cli.model.plan().compute)
    assert not bool((moved[1] & compute).any())
    assert bool((moved[0] & compute).any())  # what a lower budget reuses is learned too
    entries = cli.model.router().provenance["measured"]
    assert [entry["budget"] for entry in entries] == [0.5, 0.35, 0.8]
    noise, latents, labels = cli.datamodule.parts["validation"].tensors
    router = cli.model.router()
    for entry in entries:
        plan = router.plan(budget=entry["budget"])
        assert entry["share"] == plan.share
        sampled = l2c.sample(
            cli.model.frozen.model, router.schedule, labels, 1.5, latents=noise, plan=plan
        )
        mse = float((sampled - latents).square().mean())
        # conditioning in one product ahead of the loop, in float32, and means of batches
        assert entry["mse"] == pytest.approx(mse, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        ({"family": [0.3, 0.9]}, {"loss": "steps", "error_proxy": 5}),
        ({"start": "search", "gate_steps": 4, "granularity": "site"}, {}),
    ],
    ids=["steps", "gates"],
)
def test_model_evaluations_are_what_was_computed(
    model: dict[str, Any], objective: dict[str, Any], configure: Configure, tmp_path: Path
) -> None:
    cli = run("fit", configure(tmp_path / "run", model, objective), tmp_path)
    seen = watched(cli)
    counted = [macs / cli.model.sites.macs for macs in seen.macs]
    # Importance is counted as that of one
    # average plan, and numbers are rounded: a few percent.
    assert seen.evaluated[0] == pytest.approx(counted[0], rel=0.05)
    assert seen.evaluated[-1] == pytest.approx(counted[-1], rel=0.05)
    assert counted[-1] > counted[0] > 0


# --- the router's file ---


def assert_equal_numbers(module: TrajectoryTraining, plan: l2c.Plan) -> None:
    """A plan forms every reused output from the numbers that the module trains, bit for bit."""
    reused = 0
    for row, table in enumerate(plan.mixtures):
        for site, numbers in enumerate(table):
            if numbers is None:
                continue
            reused += 1
            sources = [source // plan.streams for source in plan.sources[row][site]]
            mine = module.predictions.numbers(row, site, sources)
            assert torch.equal(mine.shift, numbers.shift)
            for one, other in zip(mine.coefficients, numbers.coefficients, strict=True):
                assert torch.equal(one, other)
    assert reused == plan.reused > 0


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("reuse", ["copy", "taylor-2", "newton-3"])
def test_the_exported_plan_has_the_numbers_of_the_module(
    reuse: str, streams: int, dit_folder: Path
) -> None:
    objective = Trajectory(streams=streams)
    module = TrajectoryTraining(str(dit_folder), 8, budget=0.5, reuse=reuse, objective=objective)
    g = torch.Generator().manual_seed(0)
    module.predictions.scales = torch.rand(6, generator=g)
    for parameter in (module.predictions.corrections, module.predictions.shift):
        parameter.data.copy_(torch.randn(parameter.shape, generator=g))
    assert_equal_numbers(module, module.plan())


def test_the_exported_router_samples_as_the_module(fitted: tuple[Any, Path]) -> None:
    cli, folder = fitted
    module, data = cli.model, cli.datamodule
    router = Router.load(folder / "router.safetensors", module.frozen.model, module.schedule)
    plan = router.plan()
    assert plan.compute == module.plan().compute
    assert_equal_numbers(module, plan)
    noise, latents, labels = data.parts["validation"].tensors
    sampled = l2c.sample(
        module.frozen.model, module.schedule, labels, 1.5, latents=noise, router=router
    )
    batch = {"noise": noise, "latents": latents, "labels": labels}
    compute = torch.tensor(plan.compute).float()
    with torch.no_grad():
        student = module.objective.student(
            module.frozen.model, module.schedule, batch,
            lambda row: compute[row] if row else None, module.predictions.numbers, 3,
        )  # fmt: skip
    # `sample` computes the conditioning in one product ahead of the loop, in float32
    assert torch.allclose(student, sampled, rtol=1e-3, atol=1e-3 * float(sampled.abs().max()))
    assert router.provenance["measured"][0]["mse"] == pytest.approx(
        float((sampled - latents).square().mean()), rel=1e-3
    )


def test_the_router_says_where_it_comes_from(fitted: tuple[Any, Path]) -> None:
    cli, folder = fitted
    router = Router.load(folder / "router.safetensors")
    assert router.budget == 0.5
    assert router.guidance_scale == 1.5
    assert router.gated.tolist() == [False] + [True] * 5
    assert router.updates.tolist() == [0] + [12] * 5
    provenance = router.provenance
    assert provenance["objective"]["name"] == "trajectory"
    assert provenance["objective"]["loss"] == "final"
    assert provenance["optimizer_steps"] == 12
    assert provenance["batch_size"] == 4
    assert provenance["rates"]["corrections"] == 1.0
    assert provenance["learned"] == {"per": "channel", "shift": True}
    assert provenance["l2c"] == l2c.__version__
    assert provenance["target"] == cli.datamodule.described()
    assert provenance["target"]["samples"] == 16
    assert provenance["model_evaluations"] == cli.model.evaluated > 0
    (measured,) = provenance["measured"]
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(losses) == 3
    assert measured["budget"] == 0.5
    assert measured["share"] == router.plan().share
    assert measured["mse"] == pytest.approx(losses[-1], rel=1e-6)  # logged as float32
    best = Router.load(folder / "router-best.safetensors")
    assert best.provenance["val/loss"] == pytest.approx(min(losses), rel=1e-6)
    assert best.provenance["measured"][0]["mse"] == pytest.approx(min(losses), rel=1e-6)


def test_testing_samples_by_the_exported_plan(
    fitted: tuple[Any, Path], configure: Configure, tmp_path: Path
) -> None:
    config = configure(tmp_path / "run")
    metrics = run("test", config, tmp_path / "run").trainer.callback_metrics
    module = TrajectoryTraining(config["model"]["init_args"]["backbone"], 6, budget=0.5)
    noise, latents, labels = fitted[0].datamodule.parts["validation"].tensors
    sampled = l2c.sample(
        module.frozen.model, module.schedule, labels, 1.5, latents=noise, plan=module.plan()
    )
    # batches of four there, one of eight here: float32
    mse = float((sampled - latents).square().mean())
    assert float(metrics["test/mse"]) == pytest.approx(mse, rel=1e-3)
    assert float(metrics["test/share"]) == pytest.approx(module.plan().share, rel=1e-6)


def test_a_router_can_be_taken_before_any_training(dit_folder: Path, tmp_path: Path) -> None:
    router = TrajectoryTraining(str(dit_folder), 6, budget=0.5).router()
    router.save(tmp_path / "router.safetensors")
    again = Router.load(tmp_path / "router.safetensors")
    assert again.plan().compute == router.plan().compute
    assert "measured" not in again.provenance


@pytest.mark.parametrize("solver", ["dpm_solver_2", "dpm_solver_pp_2m"])
def test_a_uvit_is_trained_too(solver: str, configure: Configure, tmp_path: Path) -> None:
    lively_uvit().save_pretrained(tmp_path / "uvit")
    model = {"backbone": str(tmp_path / "uvit"), "solver": solver, "lr": 0.01, "shift_lr": 0.003}
    folder = tmp_path / "run"
    data = {"solver": solver, "folder": str(tmp_path / "samples")}
    trainer = {"max_steps": 8, "val_check_interval": 8, "num_sanity_val_steps": -1}
    cli = run("fit", configure(folder, model, {}, data, **trainer), folder)
    before, after = watched(cli).errors
    assert after < before
    router = Router.load(folder / "router.safetensors", l2c.load(tmp_path / "uvit"))
    noise, latents, labels = cli.datamodule.parts["validation"].tensors
    uvit = cli.model.frozen.model
    sampled = l2c.sample(uvit, router.schedule, labels, 1.5, latents=noise, router=router)
    mse = float((sampled - latents).square().mean())
    assert mse == pytest.approx(after, rel=1e-3)  # batches of four there, one of eight here


# --- resumed runs ---


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        (
            {
                "start": "search",
                "gate_steps": 4,
                "granularity": "site",
                "relaxation": {"class_path": "Relaxation", "init_args": {"kind": "hard-concrete"}},
            },
            {"checkpointing": True},
        ),
        (
            {"gate_steps": 4, "granularity": "block", "family": [0.3, 0.7], "measure": [0.6]},
            {"loss": "steps", "error_proxy": 2, "streams": 2},
        ),
    ],
    ids=["final", "steps"],
)
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_equals_an_uninterrupted_one(
    model: dict[str, Any], objective: dict[str, Any], configure: Configure, tmp_path: Path
) -> None:
    def configured(folder: Path) -> dict[str, Any]:
        kept = checkpoints(folder, every=1, save_top_k=-1, filename="{step}")
        more = {"extra": [kept], "enable_checkpointing": True, "max_steps": 6}
        return configure(folder, model, objective, **more)

    whole = tmp_path / "whole"
    run("fit", configured(whole), whole)
    expected = Router.load(whole / "router.safetensors")
    for step in (3, 5):  # while gates are trained, and afterwards
        folder = tmp_path / f"from-{step}"
        start = whole / "checkpoints" / f"step={step}.ckpt"
        cli = run("fit", configured(folder), folder, "--ckpt_path", str(start))
        assert cli.trainer.global_step == 6
        assert len(watched(cli).logits) == 1 + 6 - step
        found = Router.load(folder / "router.safetensors")
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.updates, expected.updates)
        assert found.reuse == expected.reuse  # bit for bit
        assert found.reuse.learned
        for key in ("measured", "model_evaluations", "optimizer_steps", "target"):
            assert found.provenance[key] == expected.provenance[key]


# --- what goes wrong ---


def test_an_error_that_is_not_finite_stops_and_keeps_the_best_router(
    configure: Configure, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    config = configure(folder, extra=[callback("Spoil", batch=6)])
    with pytest.raises(ValueError, match=r"the error became nan in optimizer step 6; .*Lower lr"):
        run("fit", config, folder)
    assert not (folder / "router.safetensors").exists()
    best = Router.load(folder / "router-best.safetensors")
    assert best.provenance["optimizer_steps"] == 4
    assert float(best.reuse.corrections.abs().max()) < 10


@pytest.mark.parametrize("loss", ["final", "steps"])
def test_a_learning_rate_that_is_too_high_names_the_step(
    loss: str, configure: Configure, tmp_path: Path
) -> None:
    config = configure(tmp_path / "run", {"lr": 1e30, "shift_lr": 1e30}, {"loss": loss})
    with pytest.raises(ValueError, match="the error became nan in optimizer step 1;"):
        run("fit", config, tmp_path / "run")


def test_a_validation_error_that_is_not_finite_stops_too(
    configure: Configure, tmp_path: Path
) -> None:
    model = {"lr": 1e30, "shift_lr": 1e30}
    config = configure(tmp_path / "run", model, max_steps=1, val_check_interval=1)
    with pytest.raises(ValueError, match="the error became nan in optimizer step 1;"):
        run("fit", config, tmp_path / "run")
    assert not list(tmp_path.glob("**/router*.safetensors"))


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_images_are_no_trajectories(command: str, configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path / "run")
    latents = write_latents(tmp_path / "latents")
    config["data"] = configuration(tmp_path, tmp_path, latents)["data"]
    with pytest.raises(ValueError, match="take Trajectories as data"):
        run(command, config, tmp_path / "run")


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_noise_of_another_shape_names_both(
    command: str, configure: Configure, tmp_path: Path
) -> None:
    tiny_uvit(input_size=4).save_pretrained(tmp_path / "small")
    data = {"backbone": str(tmp_path / "small"), "folder": str(tmp_path / "samples")}
    config = configure(tmp_path / "run", {}, {}, data)
    with pytest.raises(ValueError, match=r"noise of shape \(3, 8, 8\) for .*dit, got \(3, 4, 4\)"):
        run(command, config, tmp_path / "run")


def test_nothing_to_train_is_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is trained: give gate_steps"):
        run("fit", configure(tmp_path / "run", {"per": "none"}), tmp_path / "run")
    config = configure(tmp_path / "run", {"per": "none", "gate_steps": 11})
    with pytest.raises(ValueError, match="expected gate_steps of at least the 12 steps .* got 11"):
        run("fit", config, tmp_path / "run")


@pytest.mark.parametrize("loss", ["final", "steps"])
def test_with_everything_computed_there_is_nothing_to_learn(
    loss: str, configure: Configure, tmp_path: Path
) -> None:
    config = configure(tmp_path / "run", {"budget": 1.0}, {"loss": loss}, max_steps=4)
    cli = run("fit", config, tmp_path / "run")
    assert not bool(cli.model.predictions.corrections.any())
    assert cli.model.plan().reused == 0
    # the target was drawn with its conditioning in one product ahead of the loop, in float32
    latents = cli.datamodule.first(16)["latents"]
    assert watched(cli).errors[0] < 1e-8 * float(latents.square().mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a budget or a speedup, got budget=None and speedup=None"),
        ({"budget": 0.5, "speedup": 2.0}, r"got budget=0\.5 and speedup=2\.0"),
        ({"speedup": 0.5}, r"a speedup of at least 1, got 0\.5"),
        ({"budget": 0.1}, r"a budget of 0\.100 is below 0\.225 of the compute"),
        ({"budget": 0.0}, r"a budget of 0\.000 is below"),
        ({"budget": 1.5}, r"a budget in \(0, 1\], got 1\.5"),
        ({"budget": 0.5, "family": (0.1, 0.9)}, r"a budget of 0\.100 is below"),
        ({"budget": 0.5, "family": (0.9, 0.3)}, "a family 0 < low <= high <= 1"),
        ({"budget": 0.5, "measure": [0.6, 0.1]}, r"a budget of 0\.100 is below"),
        ({"budget": 0.5, "per": "token"}, 'per must be "channel", "site" or "none", got \'token\''),
        ({"budget": 0.5, "granularity": "head"}, "granularity must be .* got 'head'"),
        ({"budget": 0.5, "reuse": "newton-4"}, "an order from 1 to 3 for newton, got 4"),
        ({"budget": 0.5, "reuse": "spline-2"}, "unknown rule 'spline'"),
        ({"budget": 0.5, "start": "nowhere.safetensors"}, "a router file at nowhere.safetensors"),
        ({"budget": 0.5, "profile": "nowhere.json"}, "a profile at nowhere.json"),
        ({"budget": 0.5, "solver": "euler"}, "unknown solver 'euler'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], message: str, dit_folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectoryTraining(str(dit_folder), 6, **settings)


def test_data_of_another_guidance_are_refused(configure: Configure, tmp_path: Path) -> None:
    config = configure(tmp_path / "run", {}, {"guidance_scale": 2.0}, {"guidance_scale": 1.5})
    with pytest.raises(ValueError, match=r"guidance scale 2\.0, got 1\.5"):
        run("fit", config, tmp_path / "run")
