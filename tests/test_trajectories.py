"""Trajectories: what the samples are, and that they are drawn once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import l2c
from tests.conftest import tiny_dit
from train.trajectories import Trajectories


@pytest.fixture
def settings(dit_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Ten training samples in three shards, and six for validation in two."""
    return {
        "backbone": str(dit_folder),
        "evaluations": 3,
        "count": 10,
        "validation": 6,
        "batch_size": 5,
        "shard": 4,
        "folder": str(tmp_path / "samples"),
    }


def opened(settings: dict[str, Any]) -> Trajectories:
    data = Trajectories(**settings)
    data.prepare_data()
    data.setup("fit")
    return data


def shards(settings: dict[str, Any]) -> dict[Path, tuple[int, bytes]]:
    """All files with what changes when one is written again, and their contents."""
    files = sorted(path for path in Path(settings["folder"]).rglob("*") if path.is_file())
    return {path: (path.stat().st_ino, path.read_bytes()) for path in files}


# --- what they are ---


@pytest.mark.parametrize(
    ("solver", "schedule"),
    [
        ("ddim", l2c.Schedule.ddim(3)),
        ("dpm_solver_pp_2m", l2c.Schedule.dpm_solver_pp_2m(3)),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_targets_are_samples_of_the_schedule(
    solver: str, schedule: l2c.Schedule, scale: float, settings: dict[str, Any]
) -> None:
    data = opened({**settings, "solver": solver, "guidance_scale": scale})
    dit = l2c.load(settings["backbone"])
    for split, count in (("train", 10), ("validation", 6)):
        noise, latents, labels = data.parts[split].tensors
        assert len(labels) == count
        given = {"latents": noise, "batch_size": 4}  # as they were drawn
        assert torch.equal(latents, l2c.sample(dit, schedule, labels, scale, **given))
        assert float(latents.std()) > 0.1


def test_solver_options_reach_the_schedule(settings: dict[str, Any]) -> None:
    data = opened({**settings, "solver_options": {"spacing": "trailing"}})
    dit = l2c.load(settings["backbone"])
    noise, latents, labels = data.parts["train"].tensors
    schedule = l2c.Schedule.ddim(3, "trailing")
    given = {"latents": noise, "batch_size": 4}
    assert torch.equal(latents, l2c.sample(dit, schedule, labels, 1.5, **given))


def test_noise_is_standard_normal_and_never_the_same(settings: dict[str, Any]) -> None:
    data = opened({**settings, "evaluations": 1, "count": 300, "validation": 100, "shard": 100})
    noise = torch.cat([part.tensors[0] for part in data.parts.values()]).flatten(1)
    assert noise.shape == (400, 3 * 8 * 8)
    # mean and variance of 76,800 draws, within four standard deviations
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert len(noise.unique(dim=0)) == 400
    # correlations of 79,800 pairs of 192 numbers each: 0.07 is one standard deviation
    correlations = (noise @ noise.T / noise.shape[1]).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 0.45


def test_labels_are_the_classes_in_turn(settings: dict[str, Any]) -> None:
    data = opened({**settings, "count": 23, "evaluations": 1})
    assert data.parts["train"].tensors[2].tolist() == [i % 10 for i in range(23)]


def test_loaders_give_batches_under_their_names(settings: dict[str, Any]) -> None:
    data = opened(settings)
    tensors = dict(
        zip(("noise", "latents", "labels"), data.parts["validation"].tensors, strict=True)
    )
    batches = list(data.val_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [5, 1]
    for name, whole in tensors.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), whole)
    assert batches[0]["noise"].dtype == batches[0]["latents"].dtype == torch.float32
    assert batches[0]["labels"].dtype == torch.int64
    again = list(data.test_dataloader())
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(batches, again, strict=True))


def test_first_gives_the_first_training_samples(settings: dict[str, Any]) -> None:
    data = opened(settings)
    noise, latents, labels = data.parts["train"].tensors
    batch = data.first(7)
    assert torch.equal(batch["noise"], noise[:7])
    assert torch.equal(batch["latents"], latents[:7])
    assert torch.equal(batch["labels"], labels[:7])
    assert len(data.first(99)["labels"]) == 10


def test_the_description_names_the_target(settings: dict[str, Any]) -> None:
    options = {"spacing": "trailing"}
    data = Trajectories(**settings, solver_options=options, guidance_scale=2.0)
    assert data.described() == {
        "solver": "ddim",
        "evaluations": 3,
        "spacing": "trailing",
        "guidance_scale": 2.0,
        "samples": 10,
    }


# --- that they are drawn once ---


def test_samples_are_drawn_once(settings: dict[str, Any]) -> None:
    opened(settings)
    before = shards(settings)
    assert len(before) == 3 + 2
    sizes = {path.name: len(load_file(path)["labels"]) for path in before}
    assert sorted(sizes.values()) == [2, 2, 4, 4, 4]
    opened(settings)
    assert shards(settings) == before


@pytest.mark.parametrize("index", range(5))
def test_a_missing_shard_alone_is_drawn_again_with_the_same_bits(
    index: int, settings: dict[str, Any]
) -> None:
    opened(settings)
    before = shards(settings)
    lost = list(before)[index]
    lost.rename(lost.with_name("aside"))  # so that its inode is not used again
    data = opened(settings)
    lost.with_name("aside").unlink()
    after = shards(settings)
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} == {lost}
    assert after[lost][1] == before[lost][1]
    assert len(data.parts["train"]) == 10


def test_more_samples_continue_those_that_are_there(settings: dict[str, Any]) -> None:
    few = opened({**settings, "count": 8})
    before = shards(settings)
    many = opened({**settings, "count": 16})
    after = shards(settings)
    assert before.items() < after.items()
    assert len(after) == len(before) + 2
    for one, other in zip(few.parts["train"].tensors, many.parts["train"].tensors, strict=True):
        assert torch.equal(one, other[:8])


def test_the_noise_of_a_cut_shard_is_that_of_a_whole_one(settings: dict[str, Any]) -> None:
    few, many = (opened({**settings, "count": count}) for count in (10, 12))
    noises = [data.parts["train"].tensors[0] for data in (few, many)]
    assert torch.equal(noises[0], noises[1][:10])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"guidance_scale": 2.0},
        {"evaluations": 4},
        {"solver": "dpm_solver_pp_2m"},
        {"solver_options": {"spacing": "trailing"}},
        {"shard": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_have_another_folder(
    change: dict[str, Any], settings: dict[str, Any]
) -> None:
    one = opened(settings)
    before = shards(settings)
    other = opened({**settings, **change})
    after = shards(settings)
    assert before.items() < after.items()
    assert len({path.parent for path in after}) == 2
    tensors = [data.parts["train"].tensors[1] for data in (one, other)]
    assert not torch.equal(*tensors)


def test_other_weights_have_another_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    opened(settings)
    tiny_dit(seed=1).save_pretrained(tmp_path / "other")
    other = opened({**settings, "backbone": str(tmp_path / "other")})
    assert len({path.parent for path in shards(settings)}) == 2
    noise, latents, labels = other.parts["train"].tensors
    dit = l2c.load(tmp_path / "other")
    given = {"latents": noise, "batch_size": 4}
    assert torch.equal(latents, l2c.sample(dit, l2c.Schedule.ddim(3), labels, 1.5, **given))


def test_the_same_model_elsewhere_shares_its_samples(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    opened(settings)
    before = shards(settings)
    tiny_dit().save_pretrained(tmp_path / "copy")
    opened({**settings, "backbone": str(tmp_path / "copy")})
    assert shards(settings) == before


# --- wrong ones ---


@pytest.mark.parametrize("name", ["count", "validation", "evaluations", "shard", "batch_size"])
def test_sizes_below_one_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of at least 1, got"):
        Trajectories(**{**settings, name: 0})


def test_fewer_samples_than_a_batch_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one batch of 11 samples .* found 10; raise data.count"):
        opened({**settings, "batch_size": 11})
