"""Two processes train one router together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from l2c.router import Router
from tests.fitting import (
    assert_follows_sgd,
    configuration,
    finish,
    lively_dit,
    started,
    write_config,
    write_latents,
)
from train.module import RouterTraining
from train.pairs import Pairs

STEPS = 6  # 54 latents make 3 batches of 8 for each of 2 processes, so 2 epochs
LR = 50.0


def two_processes(config: dict[str, Any]) -> None:
    config["trainer"] |= {
        "strategy": "ddp_find_unused_parameters_true",
        "devices": 2,
        "max_steps": STEPS,
        "limit_val_batches": 1.0,
    }
    config["model"]["init_args"] |= {
        "objective": {"class_path": "tests.fitting.NotedPairs", "init_args": {"penalty": 1e-3}},
        "optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": LR, "weight_decay": 0.0},
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a router trained by two processes, and the history of each."""
    folder = tmp_path_factory.mktemp("distributed")
    lively_dit().save_pretrained(folder / "dit")
    config = configuration(folder / "run", folder / "dit", write_latents(folder / "latents"))
    two_processes(config)
    history = {"class_path": "tests.fitting.History", "init_args": {"folder": str(folder)}}
    config["trainer"]["callbacks"].append(history)
    path = write_config(config, folder / "run.yaml")
    with started("fit", path) as process:
        output = finish(process)
    assert process.returncode == 0, output
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def test_both_processes_hold_the_same_gates_after_every_step(ranks: list[dict[str, Any]]) -> None:
    one, other = ranks
    assert len(one["logits"]) == STEPS + 1
    for mine, theirs in zip(one["logits"], other["logits"], strict=True):
        assert all(torch.equal(mine[row], theirs[row]) for row in ("1", "3", "5"))
    for mine, theirs in zip(one["updates"], other["updates"], strict=True):
        assert torch.equal(mine, theirs)


def test_processes_draw_their_own_pairs_noise_and_images(ranks: list[dict[str, Any]]) -> None:
    calls = [[rank["calls"][step] for rank in ranks] for step in range(STEPS)]
    assert len({call["seed"] for pair in calls for call in pair}) == 2 * STEPS
    assert any(one["row"] != other["row"] for one, other in calls)
    for epoch in (calls[:3], calls[3:]):
        images = torch.cat([call["batch"]["latents"] for pair in epoch for call in pair])
        assert len(images.flatten(1).unique(dim=0)) == 48


def test_a_step_follows_the_mean_gradient_of_the_processes(
    folder: Path, ranks: list[dict[str, Any]]
) -> None:
    module = RouterTraining(str(folder / "dit"), evaluations=6, objective=Pairs(penalty=1e-3))
    for step in range(STEPS):
        before, after = ranks[0]["logits"][step : step + 2]
        calls = [rank["calls"][step] for rank in ranks]
        assert_follows_sgd(module, before, after, calls, LR)


def test_updates_count_the_steps_in_which_any_process_drew_a_row(
    ranks: list[dict[str, Any]],
) -> None:
    expected = torch.zeros(6, dtype=torch.long)
    for step in range(STEPS):
        expected[list({rank["calls"][step]["row"] for rank in ranks})] += 1
    assert torch.equal(ranks[0]["updates"][-1], expected)


def test_one_router_is_written(folder: Path, ranks: list[dict[str, Any]]) -> None:
    written = sorted(path.name for path in (folder / "run").glob("*.safetensors"))
    assert written == ["router-best.safetensors", "router.safetensors"]
    router = Router.load(folder / "run" / "router.safetensors")
    assert router.provenance["processes"] == 2
    assert torch.equal(router.updates, ranks[0]["updates"][-1])
    for row in (1, 3, 5):
        assert torch.equal(router.scores[row], ranks[0]["logits"][-1][str(row)].sigmoid())


def test_ctrl_c_stops_all_processes_after_the_same_batch(tmp_path: Path) -> None:
    lively_dit().save_pretrained(tmp_path / "dit")
    config = configuration(tmp_path / "run", tmp_path / "dit", write_latents(tmp_path / "latents"))
    two_processes(config)
    signal = {"class_path": "tests.fitting.Signal", "init_args": {"batches": [1], "rank": 0}}
    config["trainer"]["callbacks"].append(signal)
    path = write_config(config, tmp_path / "run.yaml")
    with started("fit", path) as process:
        output = finish(process, timeout=60)
    assert process.returncode != 0, output
    assert not (tmp_path / "run" / "router.safetensors").exists()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
