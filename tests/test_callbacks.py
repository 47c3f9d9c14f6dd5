"""Callbacks: routers and models written whole or not at all, heat maps, the progress bar."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from l2c.router import Router
from tests.fitting import (
    averaging,
    checkpoints,
    configuration,
    exported,
    history,
    lively_dit,
    logger,
    run,
    write_latents,
)
from train.classifier import Classifier
from train.export import ExportRouter

HISTORY = {"class_path": "tests.fitting.History"}
VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 3}  # after steps 3, 6, 9, 12


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run of 12 steps into `tmp_path`/run, validated in all evaluations after every third."""
    lively_dit().save_pretrained(tmp_path / "dit")
    folder = tmp_path / "run"
    latents = write_latents(tmp_path / "latents", 78)  # 54 and 24: 6 batches and 3 of validation
    trainer = {"callbacks": [HISTORY, exported(folder)], "logger": logger(folder), **VALIDATED}
    config = configuration(folder, tmp_path / "dit", latents, **trainer)
    config["data"]["init_args"]["source"]["init_args"]["validation_share"] = 0.3
    return config


def router(folder: Path, name: str = "router") -> Router:
    return Router.load(folder / "run" / f"{name}.safetensors")


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "run").glob("*.safetensors"))


def scores_of(logits: dict[str, Tensor]) -> Tensor:
    scores = torch.ones(6, 6)
    for row, values in logits.items():
        scores[int(row)] = values.sigmoid()
    return scores


def best_step(folder: Path, metric: str = "val/loss") -> int:
    """The optimizer step after which a logged metric was lowest for the first time."""
    with (folder / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(metric)]
    assert len(rows) == 4
    best = min(rows, key=lambda row: float(row[metric]))
    return int(best["step"]) + 1  # loggers count from 0


def upwards(config: dict[str, Any]) -> None:
    """Let the loss rise from step to step, so that the first validation is the best."""
    config["model"]["init_args"]["objective"]["init_args"]["penalty"] = 10.0
    config["model"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.SGD",
        "init_args": {"lr": 1.0, "maximize": True, "weight_decay": 0.0},
    }


# --- ExportRouter ---


def test_the_last_router_is_written_at_the_end(config: dict[str, Any], tmp_path: Path) -> None:
    cli = run("fit", config, tmp_path / "run")
    assert torch.equal(router(tmp_path).scores, scores_of(history(cli).logits[-1]))


def test_the_best_router_is_that_of_the_first_validation_if_the_loss_grows(
    config: dict[str, Any], tmp_path: Path
) -> None:
    upwards(config)
    cli = run("fit", config, tmp_path / "run")
    best = router(tmp_path, "router-best")
    assert best.provenance["optimizer_steps"] == best_step(tmp_path) == 3
    assert torch.equal(best.scores, scores_of(history(cli).logits[3]))
    assert not torch.equal(best.scores, router(tmp_path).scores)


def test_the_best_router_is_replaced_by_a_better_one(
    config: dict[str, Any], tmp_path: Path
) -> None:
    upwards(config)
    config["model"]["init_args"]["optimizer"]["init_args"]["maximize"] = False
    cli = run("fit", config, tmp_path / "run")
    best = router(tmp_path, "router-best")
    assert best.provenance["optimizer_steps"] == best_step(tmp_path) > 3
    assert torch.equal(best.scores, scores_of(history(cli).logits[best_step(tmp_path)]))


def test_another_metric_can_choose_the_best(config: dict[str, Any], tmp_path: Path) -> None:
    upwards(config)  # this opens gates, so the error falls although the loss grows
    config["trainer"]["callbacks"] = [exported(tmp_path / "run", monitor="val/soft_error")]
    run("fit", config, tmp_path / "run")
    steps = router(tmp_path, "router-best").provenance["optimizer_steps"]
    assert steps == best_step(tmp_path, "val/soft_error") > 3


def test_an_unknown_metric_is_refused_with_those_there_are(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"]["callbacks"] = [exported(tmp_path / "run", monitor="val/nothing")]
    with pytest.raises(ValueError, match="no metric 'val/nothing'.*val/error.*val/loss"):
        run("fit", config, tmp_path / "run")
    assert files(tmp_path) == []


@pytest.mark.parametrize("every", [2, 3], ids=["between validations", "at a validation"])
def test_the_best_router_survives_a_resume(
    every: int, config: dict[str, Any], tmp_path: Path
) -> None:
    upwards(config)
    config["trainer"]["callbacks"].append(checkpoints(tmp_path / "run", every))
    run("fit", {**config, "trainer": {**config["trainer"], "max_steps": 4}}, tmp_path / "run")
    assert router(tmp_path, "router-best").provenance["optimizer_steps"] == 3
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    run("fit", config, tmp_path / "run", "--ckpt_path", str(last))
    assert router(tmp_path).provenance["optimizer_steps"] == 12
    assert router(tmp_path, "router-best").provenance["optimizer_steps"] == 3


def test_failed_training_leaves_no_final_router(config: dict[str, Any], tmp_path: Path) -> None:
    fail = {"class_path": "tests.fitting.Fail", "init_args": {"batch": 5}}
    config["trainer"]["callbacks"].append(fail)
    with pytest.raises(ArithmeticError, match="failed here"):
        run("fit", config, tmp_path / "run")
    assert files(tmp_path) == ["router-best.safetensors"]


def test_failed_training_leaves_an_older_router_alone(
    config: dict[str, Any], tmp_path: Path
) -> None:
    run("fit", config, tmp_path / "run")
    before = (tmp_path / "run" / "router.safetensors").read_bytes()
    fail = {"class_path": "tests.fitting.Fail", "init_args": {"batch": 2}}
    config["trainer"]["callbacks"].append(fail)
    with pytest.raises(ArithmeticError):
        run("fit", config, tmp_path / "run")
    assert (tmp_path / "run" / "router.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["validate", "test"])
def test_routers_are_written_by_fit_alone(
    command: str, config: dict[str, Any], tmp_path: Path
) -> None:
    run(command, config, tmp_path / "run")
    assert files(tmp_path) == []


def test_the_sanity_check_writes_nothing(config: dict[str, Any], tmp_path: Path) -> None:
    config["trainer"] |= {"num_sanity_val_steps": 1, "val_check_interval": 6, "max_steps": 3}
    run("fit", config, tmp_path / "run")
    assert files(tmp_path) == ["router.safetensors"]


def test_only_a_router_training_exports_routers(tmp_path: Path) -> None:
    callback = ExportRouter(str(tmp_path / "router.safetensors"))
    with pytest.raises(ValueError, match="needs RouterTraining, got Linear"):
        callback.setup(L.Trainer(accelerator="cpu", logger=False), torch.nn.Linear(1, 1), "fit")


# --- with weight averaging ---


def averaged(cli: LightningCLI, steps: int, decay: float) -> dict[str, Tensor]:
    """The moving average of the logits after so many steps; it starts as a copy of the first."""
    kept = history(cli).logits
    average = {row: value.clone() for row, value in kept[1].items()}
    for logits in kept[2 : steps + 1]:
        for row, value in logits.items():
            average[row] = decay * average[row] + (1 - decay) * value
    return average


@pytest.fixture
def averaged_run(config: dict[str, Any], tmp_path: Path) -> LightningCLI:
    upwards(config)
    config["trainer"]["callbacks"].insert(0, averaging(decay=0.7))
    return run("fit", config, tmp_path / "run")


def test_averaged_scores_are_exported(averaged_run: LightningCLI, tmp_path: Path) -> None:
    expected = scores_of(averaged(averaged_run, 12, 0.7))
    assert torch.equal(router(tmp_path).scores, expected)
    assert not torch.equal(expected, scores_of(history(averaged_run).logits[-1]))


def test_the_best_router_has_averaged_scores(averaged_run: LightningCLI, tmp_path: Path) -> None:
    assert torch.equal(
        router(tmp_path, "router-best").scores, scores_of(averaged(averaged_run, 3, 0.7))
    )


def test_averaging_does_not_change_the_count_of_updates(
    averaged_run: LightningCLI, tmp_path: Path
) -> None:
    assert torch.equal(router(tmp_path).updates, history(averaged_run).updates[-1])
    assert int(router(tmp_path).updates.sum()) == 12
    assert torch.equal(router(tmp_path, "router-best").updates, history(averaged_run).updates[3])


def test_the_logged_share_is_that_of_the_validated_average(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["trainer"] |= {"callbacks": [HISTORY, exported(tmp_path / "run")], "max_steps": 12}
    config["trainer"]["callbacks"].insert(0, averaging(decay=0.9))
    config["trainer"]["val_check_interval"] = 6
    settings = config["model"]["init_args"]
    settings["objective"]["init_args"]["penalty"] = 10.0
    settings["optimizer"]["init_args"]["lr"] = 5.0  # closes gates at once; the average follows
    cli = run("fit", config, tmp_path / "run")
    logged = float(cli.trainer.callback_metrics["val/share"])
    # at the end the module holds the average, which was validated last; logged as float32
    assert logged == pytest.approx(cli.model.plan().share, rel=1e-6)


# --- HeatMap ---


def test_heat_maps_are_drawn_at_every_validation(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"save_dir": str(folder), "name": "", "version": "board"}
    config["trainer"]["logger"] = [
        {"class_path": "TensorBoardLogger", "init_args": settings},
    ]
    heat = {"class_path": "HeatMap", "init_args": {"folder": str(folder / "heat")}}
    config["trainer"]["callbacks"] = [heat]
    config["trainer"]["num_sanity_val_steps"] = 1
    run("fit", config, folder)
    drawn = sorted((folder / "heat").iterdir())
    assert [path.name for path in drawn] == [f"step-{step:06d}.png" for step in (3, 6, 9, 12)]
    for path in drawn:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(100_000)) > 20
    events = EventAccumulator(str(folder / "board"), size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("router")] == [3, 6, 9, 12]
    shown = events.Images("router")[0]
    assert min(shown.width, shown.height) > 100


def test_no_heat_map_is_drawn_without_training(config: dict[str, Any], tmp_path: Path) -> None:
    heat = {"class_path": "HeatMap", "init_args": {"folder": str(tmp_path / "heat")}}
    config["trainer"]["callbacks"] = [heat]
    run("validate", config, tmp_path / "run")
    assert not (tmp_path / "heat").exists()


# --- ExportModel ---


def classifier(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Turn a configuration into one that trains a small classifier and exports it."""
    backbone = {"class_path": "Classifier", "init_args": {"channels": 3, "width": 4}}
    export = {"class_path": "ExportModel", "init_args": {"folder": str(folder)}}
    trainer = {**config["trainer"], "max_steps": 3, "callbacks": [export]}
    model = {"class_path": "ClassifierTraining", "init_args": {"backbone": backbone}}
    return {**config, "trainer": trainer, "model": model}


def test_an_exported_model_loads(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    cli = run("fit", classifier(config, folder), tmp_path / "run")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.glob("exported?*"))
    loaded = Classifier.from_pretrained(folder).state_dict()
    expected = cli.model.backbone.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_an_exported_model_replaces_an_older_one_and_nothing_else(
    config: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    run("fit", classifier(config, folder), tmp_path / "run")
    (folder / "notes.txt").write_text("kept")
    before = (folder / "model.safetensors").read_bytes()
    again = classifier(config, folder)
    again["trainer"]["max_steps"] = 4
    run("fit", again, tmp_path / "run")
    assert (folder / "notes.txt").read_text() == "kept"
    assert (folder / "model.safetensors").read_bytes() != before


def test_failed_training_exports_no_model(config: dict[str, Any], tmp_path: Path) -> None:
    failing = classifier(config, tmp_path / "exported")
    fail = {"class_path": "tests.fitting.Fail", "init_args": {"batch": 2}}
    failing["trainer"]["callbacks"].append(fail)
    with pytest.raises(ArithmeticError):
        run("fit", failing, tmp_path / "run")
    assert not (tmp_path / "exported").exists()


def test_averaged_weights_are_exported(config: dict[str, Any], tmp_path: Path) -> None:
    trained = classifier(config, tmp_path / "exported")
    trained["trainer"]["callbacks"].append(averaging())
    cli = run("fit", trained, tmp_path / "run")
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, WeightAveraging))
    average = callback._average_model.module.backbone.state_dict()
    loaded = Classifier.from_pretrained(tmp_path / "exported").state_dict()
    assert all(torch.equal(loaded[name], average[name]) for name in average)


def test_a_module_without_a_model_to_export_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    export = {"class_path": "ExportModel", "init_args": {"folder": str(tmp_path / "exported")}}
    config["trainer"]["callbacks"] = [export]
    with pytest.raises(ValueError, match="ExportModel"):
        run("fit", config, tmp_path / "run")


# --- StepProgress ---


def test_the_progress_bar_counts_optimizer_steps_of_the_whole_run(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"] |= {"enable_progress_bar": True, "accumulate_grad_batches": 2}
    config["trainer"]["callbacks"] = [{"class_path": "StepProgress"}]
    config["trainer"]["max_steps"] = 5
    run("fit", config, tmp_path / "run")
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "train/error" in shown
    assert shown.count("100%") >= 1


def test_the_progress_bar_of_a_resumed_run_starts_where_it_stood(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["trainer"] |= {"enable_progress_bar": True, "max_steps": 3}
    config["trainer"]["callbacks"] = [
        {"class_path": "StepProgress"},
        checkpoints(tmp_path / "run", every=3),
    ]
    run("fit", config, tmp_path / "run")
    config["trainer"]["max_steps"] = 6
    capsys.readouterr()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    run("fit", config, tmp_path / "run", "--ckpt_path", str(last))
    shown = capsys.readouterr().err
    assert "3/6" in shown
    assert "6/6" in shown
    assert "1/6" not in shown
