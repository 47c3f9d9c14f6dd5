"""The shipped configurations, and what the command line says about wrong ones."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from tests.conftest import tiny_dit
from tests.fitting import ROOT, configuration, only_these_arguments, run, write_config
from train import encode
from train.budgeted import TrajectoryTraining
from train.cli import main
from train.diffusion import DiffusionTraining
from train.module import RouterTraining
from train.trajectories import Trajectories

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ENCODE = [path for path in CONFIGS if path.stem.startswith("encode_")]
FIT = [path for path in CONFIGS if path not in ENCODE]


def named(path: Path) -> str:
    return path.stem


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    tiny_dit().save_pretrained(tmp_path / "dit")
    return configuration(tmp_path / "run", tmp_path / "dit", tmp_path / "latents")


def built(config: dict[str, Any], folder: Path) -> LightningCLI:
    """All objects that a configuration describes; nothing is run."""
    path = write_config(config, folder / "config.yaml")
    with only_these_arguments():
        return main(["--config", str(path)], run=False)


# --- the shipped files ---


def test_there_are_configurations() -> None:
    assert {"quickstart", "dit_xl_2_256_ddim_20"} <= {path.stem for path in FIT}
    assert {"encode_imagenet_256", "encode_imagenet_512"} <= {path.stem for path in ENCODE}


@pytest.mark.parametrize("path", FIT, ids=named)
def test_shipped_configuration_fits_the_signatures(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_these_arguments(), pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(path), "--print_config"])
    assert end.value.code == 0
    understood = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    assert understood["model"]["class_path"].endswith(written["model"]["class_path"])
    for key, value in written["trainer"].items():
        if key not in ("logger", "callbacks"):
            assert understood["trainer"][key] == value


@pytest.mark.parametrize("path", FIT, ids=named)
def test_shipped_configuration_builds_what_it_says(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    config["trainer"] |= {"accelerator": "cpu", "default_root_dir": str(tmp_path)}
    settings = config["model"]["init_args"]
    if config["model"]["class_path"] in ("RouterTraining", "TrajectoryTraining"):
        tiny_dit(depth=12).save_pretrained(tmp_path / "dit")
        settings["backbone"] = str(tmp_path / "dit")  # in place of the one that is not here
    cli = built(config, tmp_path)
    if isinstance(cli.model, RouterTraining | TrajectoryTraining):
        promised = re.search(r"(?:ddim|dpm)_(\d+)", path.stem)
        assert len(cli.model.schedule) == settings["evaluations"]
        assert promised is None or int(promised.group(1)) == settings["evaluations"]
    if isinstance(cli.model, TrajectoryTraining):
        assert_a_trajectory(cli, config)
    if isinstance(cli.model, RouterTraining):
        assert cli.model.objective.penalty == settings["objective"]["init_args"]["penalty"]
    if isinstance(cli.model, RouterTraining | DiffusionTraining):
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        (group,) = cli.model.optimizer_factory(parameters).param_groups
        assert group["lr"] == settings["optimizer"]["init_args"]["lr"]
        assert group["weight_decay"] == settings["optimizer"]["init_args"]["weight_decay"]


def assert_a_trajectory(cli: LightningCLI, config: dict[str, Any]) -> None:
    """The model keeps to its budget, and has the target samples of the same guidance."""
    settings, data = config["model"]["init_args"], config["data"]["init_args"]
    budget = settings["budget"] if "budget" in settings else 1 / settings["speedup"]
    # one site of 24 in each of at least 10 evaluations, MLPs twice as large as attention
    assert budget - 0.01 < cli.model.plan().share <= budget
    for name, value in settings["objective"]["init_args"].items():
        assert getattr(cli.model.objective, name) == value
    for name in ("lr", "shift_lr", "gate_lr"):
        rate = {"lr": "corrections", "shift_lr": "shift", "gate_lr": "logits"}[name]
        assert name not in settings or cli.model.rates[rate] == settings[name]
    assert isinstance(cli.datamodule, Trajectories)
    for name, value in data.items():
        assert getattr(cli.datamodule, name) == value
    assert cli.datamodule.guidance_scale == cli.model.objective.guidance_scale


TRAJECTORIES = [path for path in FIT if "TrajectoryTraining" in path.read_text()]


@pytest.mark.parametrize("path", TRAJECTORIES, ids=named)
def test_target_samples_are_of_the_model_that_is_trained_for(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    model, data = written["model"]["init_args"], written["data"]["init_args"]
    assert written["model"]["class_path"] == "TrajectoryTraining"
    assert data["backbone"] == model["backbone"]
    assert (ROOT / model["backbone"] / "model.safetensors").is_file()


@pytest.mark.parametrize("path", ENCODE, ids=named)
def test_shipped_encoding_fits_the_signature(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        encode.main(["--config", str(path), "--print_config"])
    assert end.value.code == 0
    understood = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    source = written.pop("source")
    assert understood["source"]["class_path"] == f"train.sources.{source['class_path']}"
    assert source["init_args"].items() <= understood["source"]["init_args"].items()
    assert written.items() <= understood.items()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("dit_*.yaml")), ids=named)
def test_latents_are_read_where_they_are_written(path: Path) -> None:
    (size,) = re.findall(r"_(256|512)_", path.stem)
    encoding = f"configs/encode_imagenet_{size}.yaml"
    assert encoding in path.read_text()
    wanted = yaml.safe_load(path.read_text())["data"]["init_args"]["source"]["init_args"]["path"]
    written = yaml.safe_load((ROOT / encoding).read_text())
    assert (written["out"], written["size"]) == (wanted, int(size))


# --- wrong ones ---


def within(config: dict[str, Any], *keys: str | int) -> dict[str, Any]:
    for key in keys:
        config = config[key]
    return config


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("trainer",),
        ("trainer", "callbacks", 1, "init_args"),
        ("model", "init_args"),
        ("model", "init_args", "objective", "init_args"),
        ("model", "init_args", "optimizer", "init_args"),
        ("data", "init_args"),
        ("data", "init_args", "source", "init_args"),
    ],
    ids=lambda keys: ".".join(map(str, keys)) or "top",
)
def test_an_unknown_key_is_named(
    keys: tuple[str | int, ...],
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    within(config, *keys)["wrong_key"] = 1
    with pytest.raises(SystemExit) as end:
        run("fit", config, tmp_path / "run")
    assert end.value.code == 2
    assert "wrong_key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "init_args", "evaluations"), "many"),
        (("model", "init_args", "objective", "init_args", "penalty"), "high"),
        (("data", "init_args", "batch_size"), 1.5),
        (("data", "init_args", "source", "class_path"), "NoSuchSource"),
        (("model", "class_path"), "NoSuchTraining"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else str(value),
)
def test_an_unfit_value_is_named_with_its_key(
    keys: tuple[str, ...],
    value: object,
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    within(config, *keys[:-1])[keys[-1]] = value
    with pytest.raises(SystemExit) as end:
        run("fit", config, tmp_path / "run")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert str(value) in said
    assert keys[0] in said


# --- what YAML leaves out ---


def test_an_optimizer_keeps_its_own_defaults(config: dict[str, Any], tmp_path: Path) -> None:
    chosen = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    config["model"]["init_args"]["optimizer"] = chosen
    (group,) = built(config, tmp_path).model.configure_optimizers().param_groups
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0  # SGD's default; AdamW's is 0.01


def test_objective_and_optimizer_have_defaults(config: dict[str, Any], tmp_path: Path) -> None:
    del config["model"]["init_args"]["objective"], config["model"]["init_args"]["optimizer"]
    module = built(config, tmp_path).model
    assert module.objective.penalty == 1e-6
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


def test_every_run_can_be_interrupted(config: dict[str, Any], tmp_path: Path) -> None:
    callbacks = built(config, tmp_path).trainer.callbacks
    names = [type(callback).__name__ for callback in callbacks]
    assert names.count("Interrupt") == 1
    del config["trainer"]["callbacks"]
    callbacks = built(config, tmp_path).trainer.callbacks
    assert [type(callback).__name__ for callback in callbacks].count("Interrupt") == 1


def test_the_command_line_wins_over_yaml(config: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(copy.deepcopy(config), tmp_path / "config.yaml")
    options = ["--model.init_args.threshold", "0.7", "--trainer.max_steps", "3"]
    with only_these_arguments():
        cli = main(["--config", str(path), *options], run=False)
    assert cli.model.threshold == 0.7
    assert cli.trainer.max_steps == 3


# --- help ---


@pytest.mark.parametrize(
    ("options", "documented"),
    [
        (["--model.help", "RouterTraining"], ["evaluations", "threshold", "clamp", "A site is"]),
        (["--model.help", "DiffusionTraining"], ["warmup_steps", "linear warm-up"]),
        (["--model.help", "TrajectoryTraining"], ["budget", "gate_steps", "Share of the compute"]),
        (["--data.help", "Images"], ["validation_images", "Images per batch and process"]),
        (["--data.help", "Trajectories"], ["guidance_scale", "Samples per shard"]),
    ],
    ids=["RouterTraining", "DiffusionTraining", "TrajectoryTraining", "Images", "Trajectories"],
)
def test_help_documents_arguments(
    options: list[str], documented: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with only_these_arguments(), pytest.raises(SystemExit) as end:
        main(["fit", *options])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in documented:
        assert words in said


def test_help_from_the_shell_names_options_and_modules() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train", "fit", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for words in ("python -m train", "--ckpt_path", "--trainer.precision", "RouterTraining"):
        assert words in done.stdout


def test_help_names_the_command_that_is_not_lightnings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with only_these_arguments(), pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "fit,validate,test" in said
    assert "python -m train encode --help" in said
