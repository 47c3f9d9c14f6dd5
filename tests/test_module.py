"""RouterTraining: what is trained, what is not, and what is written down."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import l2c
from l2c.router import Router
from tests.fitting import (
    assert_follows_sgd,
    configuration,
    history,
    lively_dit,
    noted,
    run,
    write_latents,
)
from train.module import RouterTraining

HISTORY = {"class_path": "tests.fitting.History"}


@pytest.fixture
def config(dit_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A run into `tmp_path`/run that keeps its history."""
    config = configuration(tmp_path / "run", dit_folder, write_latents(tmp_path / "latents"))
    config["trainer"]["callbacks"].append(HISTORY)
    config["model"]["init_args"]["objective"]["class_path"] = "tests.fitting.NotedPairs"
    return config


def optimizer(name: str, **settings: float) -> dict[str, Any]:
    return {"class_path": f"torch.optim.{name}", "init_args": settings}


# --- what is trained ---


def test_each_gated_evaluation_has_a_logit_per_site(dit_folder: Path) -> None:
    module = RouterTraining(str(dit_folder), evaluations=7)
    assert list(module.logits) == ["2", "4", "6"]
    assert all(logits.shape == (6,) for logits in module.logits.values())


def test_initial_logits_depend_on_the_seed_alone(dit_folder: Path) -> None:
    one, same, other = (
        torch.cat(list(RouterTraining(str(dit_folder), seed=seed).parameters()))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def assert_gates_alone(state: dict[str, Any]) -> None:
    """Six logits for each of three evaluations, and at most a count per evaluation."""
    logits = {name for name in state if name.startswith("logits.")}
    assert logits == {"logits.1", "logits.3", "logits.5"}
    numbers = [value.numel() for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(numbers) <= 3 * 6 + 6


def test_backbone_is_neither_parameter_nor_state(dit_folder: Path) -> None:
    module = RouterTraining(str(dit_folder), evaluations=6)
    assert_gates_alone(module.state_dict())
    assert len(list(module.parameters())) == 3
    assert sum(buffer.numel() for buffer in module.buffers()) <= 6
    groups = module.configure_optimizers().param_groups
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}
    backbone = module.frozen.model
    assert not backbone.training
    assert not any(p.requires_grad or id(p) in trained for p in backbone.parameters())


def test_train_mode_and_copies_leave_the_backbone_alone(dit_folder: Path) -> None:
    module = RouterTraining(str(dit_folder))
    module.train()
    assert not module.frozen.model.training
    assert copy.deepcopy(module).frozen is module.frozen


def test_checkpoint_holds_gates_and_nothing_of_the_backbone(
    config: dict[str, Any], dit_folder: Path, tmp_path: Path
) -> None:
    cli = run("fit", config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert_gates_alone(checkpoint["state_dict"])
    (state,) = checkpoint["optimizer_states"]
    assert sum(len(group["params"]) for group in state["param_groups"]) == 3
    assert path.stat().st_size < (dit_folder / "model.safetensors").stat().st_size / 4
    before = l2c.load(dit_folder).state_dict()
    for name, value in cli.model.frozen.model.state_dict().items():
        assert torch.equal(value, before[name])


# --- how it is trained ---


def test_rows_not_drawn_stay_as_they_are_in_spite_of_momentum(
    config: dict[str, Any], tmp_path: Path
) -> None:
    cli = run("fit", config, tmp_path / "run")
    rows, kept = [call["row"] for call in noted(cli)], history(cli)
    assert len(rows) == 12
    assert set(rows) == {1, 3, 5}
    for drawn, before, after in zip(rows, kept.logits, kept.logits[1:], strict=False):
        for row in (1, 3, 5):
            assert torch.equal(before[str(row)], after[str(row)]) == (row != drawn)


def test_updates_count_the_steps_of_each_evaluation(config: dict[str, Any], tmp_path: Path) -> None:
    cli = run("fit", config, tmp_path / "run")
    expected = torch.bincount(torch.tensor([call["row"] for call in noted(cli)]), minlength=6)
    assert torch.equal(cli.model.updates, expected)
    assert int(expected.sum()) == 12
    assert torch.equal(Router.load(tmp_path / "run" / "router.safetensors").updates, expected)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_of_sgd_follows_the_mean_gradient_of_its_batches(
    batches: int, config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"] |= {"max_steps": 3, "accumulate_grad_batches": batches}
    config["model"]["init_args"]["optimizer"] = optimizer("SGD", lr=50.0, weight_decay=0.0)
    cli = run("fit", config, tmp_path / "run")
    calls, kept = noted(cli), history(cli)
    assert len(calls) == 3 * batches
    for step in range(3):
        first, last = step * batches, (step + 1) * batches
        before, after = kept.logits[first], kept.logits[last]
        assert_follows_sgd(cli.model, before, after, calls[first:last], lr=50.0)


def test_accumulated_gradients_step_once_and_count_once(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"] |= {"max_steps": 6, "accumulate_grad_batches": 2}
    cli = run("fit", config, tmp_path / "run")
    rows, kept = [call["row"] for call in noted(cli)], history(cli)
    expected = torch.zeros(6, dtype=torch.long)
    for step in range(6):
        first, middle, last = kept.logits[2 * step : 2 * step + 3]
        drawn = set(rows[2 * step : 2 * step + 2])
        for row in (1, 3, 5):
            assert torch.equal(first[str(row)], middle[str(row)])
            assert torch.equal(middle[str(row)], last[str(row)]) == (row not in drawn)
        expected[list(drawn)] += 1
    assert torch.equal(cli.model.updates, expected)


def test_logits_stay_within_the_clamp(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["init_args"]["optimizer"] = optimizer("AdamW", lr=2.0)
    config["model"]["init_args"]["clamp"] = 1.5
    clamped = history(run("fit", config, tmp_path / "run")).logits[1:]
    assert max(float(v.abs().max()) for logits in clamped for v in logits.values()) == 1.5
    config["model"]["init_args"]["clamp"] = None
    free = history(run("fit", config, tmp_path / "run")).logits[1:]
    assert max(float(v.abs().max()) for logits in free for v in logits.values()) > 3


def test_bf16_mixed_precision_trains_nearly_the_same(
    config: dict[str, Any], tmp_path: Path
) -> None:
    full = history(run("fit", config, tmp_path / "run"))
    config["trainer"]["precision"] = "bf16-mixed"
    cli = run("fit", config, tmp_path / "mixed")
    mixed = history(cli)
    assert mixed.logits[-1]["1"].dtype == torch.float32
    assert torch.equal(mixed.updates[-1], full.updates[-1])
    assert any(not torch.equal(mixed.logits[-1][row], full.logits[-1][row]) for row in "135")
    router = Router.load(tmp_path / "run" / "router.safetensors")
    assert router.provenance["precision"] == "bf16-mixed"


def trained(config: dict[str, Any], folder: Path, **settings: Any) -> tuple[dict, dict]:
    """Validation metrics before and after 100 steps of Adam."""
    config["trainer"] |= {"limit_val_batches": 1.0, "max_steps": 100}
    config["trainer"] |= {"check_val_every_n_epoch": None, "val_check_interval": 1000}
    config["trainer"]["callbacks"] = []
    arguments = config["model"]["init_args"]
    lively_dit().save_pretrained(arguments["backbone"])
    arguments["objective"]["init_args"] = {"label_dropout": 0.0, **settings}
    arguments["optimizer"] = optimizer("Adam", lr=0.5, weight_decay=0.0)
    config["data"]["init_args"]["source"]["init_args"]["validation_share"] = 0.5  # many pairs
    cli = run("fit", config, folder)
    after = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)[0]
    before = run("validate", config, folder).trainer.callback_metrics
    return {k: float(v) for k, v in before.items()}, after


def test_a_high_price_closes_every_gate(config: dict[str, Any], tmp_path: Path) -> None:
    before, after = trained(config, tmp_path / "run", penalty=10.0)
    rest = l2c.sites(l2c.load(config["model"]["init_args"]["backbone"]))
    assert before["val/share"] > after["val/share"]
    # half of six evaluations compute nothing but the rest; logged as float32
    assert after["val/share"] == pytest.approx(0.5 + 0.5 * rest.rest / rest.macs, rel=1e-6)
    assert after["val/unsaturated"] == 0


def test_without_a_price_the_error_falls(config: dict[str, Any], tmp_path: Path) -> None:
    before, after = trained(config, tmp_path / "run", penalty=0.0)
    assert after["val/soft_error"] < 0.5 * before["val/soft_error"]
    assert after["val/share"] == 1


# --- validation and test ---


def test_validate_logs_the_thresholded_and_the_soft_error(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"]["limit_val_batches"] = 1.0
    metrics = run("validate", config, tmp_path / "run").trainer.callback_metrics
    assert {"val/loss", "val/error", "val/soft_error", "val/share"} <= set(metrics)
    assert float(metrics["val/error"]) != float(metrics["val/soft_error"])
    again = run("validate", config, tmp_path / "run").trainer.callback_metrics
    assert {k: float(v) for k, v in again.items()} == {k: float(v) for k, v in metrics.items()}


def test_validation_error_is_that_of_the_thresholded_gates(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"]["limit_val_batches"] = 1.0
    config["model"]["init_args"]["threshold"] = 0.0
    metrics = run("validate", config, tmp_path / "run").trainer.callback_metrics
    assert float(metrics["val/error"]) == 0  # everything is computed
    assert float(metrics["val/share"]) == 1
    assert float(metrics["val/soft_error"]) > 0
    # six open gates at 1e-3 each, summed in float32
    assert float(metrics["val/loss"]) == pytest.approx(6e-3, rel=1e-6)


def test_training_and_validation_draw_from_streams_of_their_own(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"] |= {"limit_val_batches": 1.0, "val_check_interval": 6}
    calls = run("fit", config, tmp_path / "run").model.objective._calls
    training = {call.seed for call in calls if not call.validation}
    validation = {call.seed for call in calls if call.validation}
    assert len(training) == 12
    assert validation
    assert not training & validation


def test_test_compares_samples_with_and_without_the_plan(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["model"]["init_args"]["threshold"] = 0.5  # about half of the initial gates are closed
    metrics = run("test", config, tmp_path / "run").trainer.callback_metrics
    mse, psnr = float(metrics["test/mse"]), float(metrics["test/psnr"])
    assert mse > 0
    # the decibels of the same error, as float32; values span 2, so the peak is 4
    assert psnr == pytest.approx(10 * math.log10(4 / mse), rel=1e-5)
    assert 0.5 < float(metrics["test/share"]) < 1
    config["model"]["init_args"]["threshold"] = 0.0
    metrics = run("test", config, tmp_path / "run").trainer.callback_metrics
    assert float(metrics["test/mse"]) == 0
    assert float(metrics["test/share"]) == 1


def test_test_takes_the_gates_from_a_checkpoint(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["init_args"]["objective"]["init_args"]["penalty"] = 10.0
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 5.0
    config["trainer"]["max_steps"] = 10  # the last checkpoint is one of the last step
    cli = run("fit", config, tmp_path / "run")
    share = cli.model.plan().share
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fresh = run("test", config, tmp_path / "run").trainer.callback_metrics
    loaded = run("test", config, tmp_path / "run", "--ckpt_path", str(last))
    # logged as float32
    assert float(loaded.trainer.callback_metrics["test/share"]) == pytest.approx(share, rel=1e-6)
    assert float(fresh["test/share"]) > share


# --- the router ---


def test_router_says_where_it_comes_from(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["init_args"] |= {"seed": 5, "clamp": 4.0, "threshold": 0.25}
    cli = run("fit", config, tmp_path / "run")
    router = Router.load(tmp_path / "run" / "router.safetensors")
    backbone = config["model"]["init_args"]["backbone"]
    router.check(l2c.load(backbone), l2c.Schedule.ddim(6))
    assert router.threshold == 0.25
    assert router.guidance_scale is None
    provenance = dict(router.provenance)
    assert provenance["objective"] == {
        "name": "l2c-pairs",
        "penalty": 1e-3,
        "label_dropout": 0.1,
        "reduction": "mean",
    }
    assert provenance["backbone"] == backbone
    assert provenance["seed"] == 5
    assert provenance["clamp"] == 4.0
    assert provenance["optimizer_steps"] == 12
    assert provenance["optimizer"]["name"] == "AdamW"
    assert provenance["optimizer"]["lr"] == 0.1
    assert provenance["optimizer"]["weight_decay"] == 0.01
    assert provenance["batch_size"] == 8
    assert provenance["processes"] == 1
    assert provenance["precision"] == "32-true"
    assert provenance["torch"] == str(torch.__version__)
    assert provenance["lightning"] == L.__version__
    assert provenance["l2c"] == l2c.__version__
    for row in (1, 3, 5):
        assert torch.equal(router.scores[row], cli.model.logits[str(row)].detach().sigmoid())
    assert router.gated.tolist() == [False, True] * 3
    assert bool((router.scores[::2] == 1).all())


def test_a_router_can_be_taken_before_any_training(dit_folder: Path, tmp_path: Path) -> None:
    router = RouterTraining(str(dit_folder), evaluations=6).router()
    assert router.updates.tolist() == [0] * 6
    router.save(tmp_path / "router.safetensors")
    assert torch.equal(Router.load(tmp_path / "router.safetensors").scores, router.scores)


def test_plan_thresholds_the_scores(dit_folder: Path) -> None:
    module = RouterTraining(str(dit_folder), evaluations=6, threshold=0.5)
    computed = torch.tensor(module.plan().compute)
    scores = module.router().scores
    assert torch.equal(computed, scores > 0.5)
    assert not bool(computed.all())


# --- data that does not fit ---


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_latents_of_another_shape_name_both(
    command: str, config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"]["limit_val_batches"] = 1.0
    write_latents(tmp_path / "latents", shape=(3, 4, 4))
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\) for .*dit, got \(3, 4, 4\)"):
        run(command, config, tmp_path / "run")


def test_labels_beyond_the_classes_are_refused(dit_folder: Path, tmp_path: Path) -> None:
    l2c.DiT(**{**l2c.load(dit_folder).config, "num_classes": 7}).save_pretrained(tmp_path / "few")
    latents = write_latents(tmp_path / "latents")
    config = configuration(tmp_path / "run", tmp_path / "few", latents)
    with pytest.raises(ValueError, match="labels below 7, the classes of .*few, got [789]"):
        run("fit", config, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "euler"}, "unknown solver 'euler'"),
        ({"solver_options": {"spacing": "odd"}}, "unknown spacing 'odd'"),
        ({"solver_options": {"order": 2}}, "do not fit the solver ddim"),
        ({"evaluations": 1}, "at least 2 evaluations"),
        ({"backbone": "/nowhere/at/all"}, "found nothing at /nowhere/at/all"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    settings: dict[str, Any], message: str, dit_folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        RouterTraining(**{"backbone": str(dit_folder), **settings})


def test_solver_options_reach_the_schedule(dit_folder: Path) -> None:
    module = RouterTraining(str(dit_folder), 6, solver_options={"spacing": "trailing"})
    assert module.router().schedule == l2c.Schedule.ddim(6, "trailing")
