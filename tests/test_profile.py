"""Profiles: what is measured, what is refused, and budgets that are counted in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import l2c
from l2c.backbone import Backbone
from l2c.identity import Identity
from l2c.profile import Profile, measure
from tests.conftest import make_router, tiny_dit


@pytest.fixture
def profile(dit: l2c.DiT) -> Profile:
    """A profile in which MLPs take 9 times as long as attentions, and the rest as long as one."""
    found = l2c.sites(dit)
    seconds = tuple(9e-3 if site.name.endswith("mlp") else 1e-3 for site in found)
    machine = {"device": "abacus", "dtype": "float32", "threads": 1}
    return Profile(Identity.of(dit), found, seconds, 1e-3, 2, machine)


def test_measures_every_site_and_the_rest_of_either_backbone(backbone: Backbone) -> None:
    before = dict(backbone.__dict__)
    profile = measure(backbone, batch=3, runs=2)
    found = l2c.sites(backbone)
    assert profile.model_sites == found
    assert len(profile.seconds) == len(found)
    assert all(seconds > 0 for seconds in (*profile.seconds, profile.rest))
    assert profile.total == pytest.approx(sum(profile.seconds) + profile.rest)
    assert profile.identity == Identity.of(backbone)
    assert profile.batch == 3
    assert profile.machine["dtype"] == "float32"
    assert profile.machine["threads"] == torch.get_num_threads()
    assert profile.machine["runs"] == 2
    assert backbone.__dict__ == before  # as it was
    costs = profile.sites(found)
    assert costs.names == found.names
    assert [site.shape for site in costs] == [site.shape for site in found]
    assert costs.macs == pytest.approx(profile.total * 1e9, abs=len(found) + 1)  # each rounded


def test_measures_in_the_model_s_precision(dit: l2c.DiT) -> None:
    assert measure(dit.bfloat16(), runs=1).machine["dtype"] == "bfloat16"


@pytest.mark.gpu
def test_measures_on_a_gpu(dit: l2c.DiT) -> None:
    profile = measure(dit.cuda(), runs=3)
    assert profile.machine["device"] == torch.cuda.get_device_name()


def test_a_file_holds_all_of_it(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "deep" / "profile.json")
    assert Profile.load(tmp_path / "deep" / "profile.json") == profile
    assert "abacus, batch 2, float32: 31.000 ms per evaluation, 3.2% outside" in str(profile)


def test_a_budget_of_time_differs_from_one_of_macs(dit: l2c.DiT, profile: Profile) -> None:
    """All score alike but attention higher: time affords more of it than MACs do."""
    schedule = l2c.Schedule.ddim(6)
    attention = torch.tensor([site.name.endswith("attn") for site in l2c.sites(dit)])
    scores = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) / 2 + attention / 2
    gated = torch.arange(6) > 0
    router = make_router(dit, schedule, scores=scores, gated=gated, updates=gated * 1)
    costs = profile.sites(router.sites)
    by_time = router.plan(budget=0.5, costs=costs)
    by_macs = router.plan(budget=0.5)
    assert by_time != by_macs
    # 6 x 31 ms, of which 6 for the rest, 30 for the first evaluation; 15 attentions fit and 4 MLPs.
    assert sum(map(sum, by_time.compute)) == 6 + 15 + (93 - 6 - 30 - 15) // 9
    spent = [
        sum(9 - 8 * a for a, c in zip(attention.tolist(), row, strict=True) if c) + 1
        for row in by_time.compute
    ]
    assert sum(spent) <= 0.5 * 6 * 31
    assert by_macs.share <= 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 4}, r"expected 8 sites and \d+ MACs outside of them, got 6"),
        ({"depth": 2}, r"site blocks\.2\.attn with .* expected one of the 4 sites"),
        ({"hidden_size": 64}, r"site blocks\.0\.attn with \d+ MACs and outputs of .*\(16, 32\)"),
        ({"mlp_ratio": 2}, r"site blocks\.0\.mlp with"),
    ],
)
def test_sites_of_another_model_are_refused(
    profile: Profile, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"profile is of another model: .*{message}.*l2c profile"):
        profile.sites(l2c.sites(tiny_dit(**change)))
    profile.sites(l2c.sites(tiny_dit(seed=1)))  # other weights take as long


def test_damaged_and_foreign_files_are_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ValueError, match=r"expected a profile at .*found none"):
        Profile.load(path)
    profile.save(path)
    whole = path.read_text()
    content = json.loads(whole)

    def refused(text: str, message: str) -> None:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Profile.load(path)

    refused(whole[:-20], "no JSON file of a profile")
    refused("[1, 2]", "is no profile; expected a file written by `l2c profile`")
    refused('{"attn": [1, 0]}', "is no profile")
    refused(json.dumps({**content, "profile": 9}), "profile format 9, .* reads format 1")
    for key in ("identity", "machine", "batch", "sites", "rest"):
        refused(json.dumps({k: v for k, v in content.items() if k != key}), f"incomplete.*{key}")
    refused(json.dumps({**content, "batch": "2"}), "incomplete: .*expected .*int.*found '2'")
    sites = [{**content["sites"][0], "seconds": -1.0}, *content["sites"][1:]]
    refused(json.dumps({**content, "sites": sites}), r"positive time of blocks\.0\.attn, got -1")
    sites[0]["seconds"] = None
    refused(json.dumps({**content, "sites": sites}), "incomplete: .*found None")
    sites[0]["seconds"] = float("nan")
    refused(json.dumps({**content, "sites": sites}), r"positive time of blocks\.0\.attn, got nan")


def test_profiles_and_measurements_that_make_no_sense(dit: l2c.DiT, profile: Profile) -> None:
    with pytest.raises(ValueError, match="times of 6 sites, got 2"):
        dataclasses.replace(profile, seconds=(1.0, 2.0))
    with pytest.raises(ValueError, match="positive time of the rest, got 0"):
        dataclasses.replace(profile, rest=0.0)
    with pytest.raises(ValueError, match="batch of at least 1, got 0"):
        dataclasses.replace(profile, batch=0)
    with pytest.raises(ValueError, match="batch and runs of at least 1, got 1 and 0"):
        measure(dit, runs=0)
    with torch.device("meta"):
        empty = l2c.DiT(**dit.config)
    with pytest.raises(ValueError, match="a model on cpu or cuda, got meta"):
        measure(empty)
    with pytest.raises(ValueError, match="no sites are declared for Linear"):
        measure(torch.nn.Linear(2, 2))
