"""Published formats: the authors' own files where they are there, and small files everywhere."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import l2c
from l2c.backbone import Backbone
from l2c.identity import Identity
from l2c.published import named, read, write
from tests.conftest import make_router, tiny_dit, tiny_uvit

SHARED = Path(__file__).parents[2] / "shared" / "data"
OFFICIAL = SHARED / "official-routers"
SCHEDULES = SHARED / "smoothcache-schedules"
official = pytest.mark.skipif(
    not OFFICIAL.is_dir() or not SCHEDULES.is_dir(), reason="the published files are not here"
)
Logits = dict[str, torch.Tensor]


def logits(count: int, sites: int = 6, seed: int = 0) -> Logits:
    g = torch.Generator().manual_seed(seed)
    return {f"{i}.prob": 3 * torch.randn(sites, generator=g) for i in range(count)}


def dit_file(path: Path, count: int = 6, **changes: object) -> Path:
    """A file as the published training code writes it, with two of its rows trained."""
    content = {
        "routers": logits(count),
        "opt": {
            "state": {0: {"step": torch.tensor(5.0)}, 2: {"step": torch.tensor(7.0)}},
            "param_groups": [{"lr": 1e-3, "params": list(range(count))}],
        },
        "args": argparse.Namespace(l1=5e-6, wandb=True, num_sampling_steps=count, paths=["a"]),
    }
    torch.save({**content, **changes}, path / "router.pt")
    return path / "router.pt"


def uvit_file(path: Path, count: int = 8) -> Path:
    torch.save(logits(count), path / "router.pth")
    return path / "router.pth"


def json_file(path: Path, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    (path / "schedule.json").write_text(text)
    return path / "schedule.json"


def table(router: l2c.Router) -> torch.Tensor:
    return torch.tensor(router.plan().compute)


# --- the authors' files ---


@official
@pytest.mark.parametrize(
    ("name", "reused", "gated", "percent"),
    [
        ("DDIM50_router.pt", 664, 1400, 47.43),
        ("DDIM20_router.pt", 248, 560, 44.29),
        ("dpm50_router.pth", 1304, 1392, 93.68),
        ("dpm20_router.pth", 333, 522, 63.79),
    ],
)
def test_published_routers_reuse_what_the_paper_says(
    name: str, reused: int, gated: int, percent: float
) -> None:
    router = read(OFFICIAL / name)  # table 4 of Ma et al. 2024
    assert router.plan().reused == reused
    assert int(router.gated.sum()) * len(router.sites) == gated
    assert round(100 * reused / gated, 2) == percent


@official
def test_published_dit_router_by_evaluation() -> None:
    router = read(OFFICIAL / "DDIM20_router.pt")
    computed = table(router).sum(dim=1).tolist()
    assert computed[::-1][::2] == [56, 55, 55, 55, 53, 26, 8, 4, 0, 0]
    assert set(computed[::2]) == {56}
    assert router.schedule == l2c.Schedule.ddim(20)
    assert router.identity == Identity("DiT", named("DiT-XL/2").config, None)
    assert int(router.updates[router.gated].min()) > 11_000
    assert router.provenance["arguments"]["l1"] == 5e-6


@official
def test_published_uvit_router_by_kind_and_evaluation() -> None:
    router = read(OFFICIAL / "dpm20_router.pth")
    compute = table(router)
    assert [row for row, full in enumerate(compute.all(dim=1)) if not full] == [*range(2, 20, 2)]
    kept = compute[2::2].double()
    assert round(100 * (1 - kept[:, 0::2].mean().item()), 2) == 60.54  # attention
    assert round(100 * (1 - kept[:, 1::2].mean().item()), 2) == 67.05  # MLP
    assert router.schedule == l2c.Schedule.dpm_solver_2(20)
    assert router.identity.config == named("U-ViT-H/2").config


@official
def test_smoothcache_s_authors_convert_the_same_router_alike(tmp_path: Path) -> None:
    """They ship Learning-to-Cache's router for 50 steps in their own format."""
    write(read(OFFICIAL / "DDIM50_router.pt"), tmp_path / "l2c.json")
    theirs = json.loads((SCHEDULES / "50-N-2-l2c.json").read_text())
    assert json.loads((tmp_path / "l2c.json").read_text()) == theirs


@official
@pytest.mark.parametrize("path", sorted(SCHEDULES.glob("*-N-*.json")), ids=lambda path: path.stem)
def test_smoothcache_s_own_schedules_come_back(path: Path, tmp_path: Path) -> None:
    content = json.loads(path.read_text())
    router = read(path, "DiT-XL/2")
    assert router.schedule == l2c.Schedule.ddim(len(next(iter(content.values()))))
    write(router, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content


@official
def test_smoothcache_s_schedule_for_diffusers() -> None:
    path = SCHEDULES / "diffuser_schedule.json"
    router = read(path, "DiT-XL/2", solver="dpm_solver_pp_2m", spacing="linspace")
    compute = table(router)
    assert compute[:, 0].int().tolist() == json.loads(path.read_text())["attn1"]
    assert bool(compute[:, 1::2].all())  # no list: always computed
    assert router.schedule == l2c.Schedule.dpm_solver_pp_2m(50, "linspace")


# --- Learning-to-Cache ---


def published_dit_loop(routers: Logits, threshold: float) -> list[list[bool]]:
    """What the published sampling loop computes: it counts down and empties its cache when odd."""
    computed, filled = [], False
    for index in reversed(range(len(routers))):
        filled = filled and index % 2 == 0
        scores = routers[f"{index}.prob"].sigmoid()
        computed.append([not filled or bool(score > threshold) for score in scores])
        filled = True
    return computed


def published_uvit_loop(routers: Logits, threshold: float) -> list[list[bool]]:
    """The same for U-ViT: two calls per evaluation, emptied before every fourth from call 2 on."""
    computed, filled = [], False
    for call in range(0, 2 * len(routers), 2):
        filled = filled and call % 4 != 2
        scores = routers[f"{call // 4}.prob"].sigmoid()
        computed.append([not filled or bool(score > threshold) for score in scores])
        filled = True
    return computed


@pytest.mark.parametrize("count", [2, 5, 6, 9])
def test_dit_router_is_what_the_published_loop_does(tmp_path: Path, count: int) -> None:
    path = dit_file(tmp_path, count, opt=None)
    for threshold in (0.1, 0.5, 0.9):
        router = read(path, tiny_dit(), threshold=threshold)
        assert table(router).tolist() == published_dit_loop(logits(count), threshold)
    assert read(path, tiny_dit()).threshold == 0.1
    assert router.schedule == l2c.Schedule.ddim(count)


@pytest.mark.parametrize("count", [2, 6, 8])
def test_uvit_router_is_what_the_published_loop_does(tmp_path: Path, count: int) -> None:
    path = uvit_file(tmp_path, count)
    for threshold in (0.1, 0.5, 0.9):
        router = read(path, tiny_uvit(), threshold=threshold)
        assert table(router).tolist() == published_uvit_loop(logits(count), threshold)
    assert read(path, tiny_uvit()).threshold == 0.9
    assert router.schedule == l2c.Schedule.dpm_solver_2(count)
    assert set(router.updates[router.gated].tolist()) <= {-1}


def test_512_has_a_threshold_of_its_own(tmp_path: Path) -> None:
    routers = {"routers": logits(4, 24)}
    torch.save(routers, tmp_path / "router.pt")
    assert read(tmp_path / "router.pt", "DiT-S/2").threshold == 0.1
    large = read(tmp_path / "router.pt", "DiT-S/2", input_size=64)
    assert large.threshold == 0.9
    assert large.identity.config["input_size"] == 64


def test_file_tells_its_model_arguments_and_updates(tmp_path: Path) -> None:
    told = argparse.Namespace(model="DiT-S/4", image_size=128, num_sampling_steps=4, seeds=[1, 2])
    torch.save({"routers": logits(4, 24), "args": told}, tmp_path / "told.pt")
    router = read(tmp_path / "told.pt")
    assert router.identity == Identity("DiT", named("DiT-S/4", input_size=16).config, None)
    assert router.provenance["arguments"] == {
        "model": "DiT-S/4",
        "image_size": 128,
        "num_sampling_steps": 4,
    }
    source = router.provenance["source"]
    assert source["sha256"] == hashlib.sha256((tmp_path / "told.pt").read_bytes()).hexdigest()
    assert source["file"] == "told.pt"

    counted = read(dit_file(tmp_path), tiny_dit())
    assert counted.updates.tolist() == [0, 0, 0, 7, 0, 5]
    with pytest.warns(UserWarning, match="evaluations 1 were never trained"):
        assert bool(table(counted)[1].all())


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        {"state": {0: {"step": 5}}, "param_groups": []},
        {"state": {0: {"step": torch.inf}}, "param_groups": [{"params": [0, 1, 2, 3]}]},
        {"state": {0: {"step": torch.ones(3)}}, "param_groups": [{"params": [0, 1, 2, 3]}]},
        {"state": {0: {"step": -5}}, "param_groups": [{"params": [0, 1, 2, 3]}]},
    ],
)
def test_updates_that_nobody_counted(tmp_path: Path, optimizer: object) -> None:
    router = read(dit_file(tmp_path, 4, opt=optimizer), tiny_dit())
    assert router.updates.tolist() == [0, -1, 0, -1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # given, not untrained
        router.plan()


EXTREMES = torch.tensor([0.0, 1.0, 1e-30, 1e-7, 1 - 6e-8, 0.5])


@pytest.mark.parametrize(
    ("make", "schedule", "gated", "name"),
    [
        (tiny_dit, l2c.Schedule.ddim(8), [1, 3, 5, 7], "router.pt"),
        (tiny_dit, l2c.Schedule.ddim(7), [2, 4, 6], "router.pt"),
        (tiny_uvit, l2c.Schedule.dpm_solver_2(8), [2, 4, 6], "router.pth"),
    ],
)
def test_written_routers_come_back_bit_for_bit(
    tmp_path: Path,
    make: Callable[[], Backbone],
    schedule: l2c.Schedule,
    gated: list[int],
    name: str,
) -> None:
    model = make()
    rows = torch.isin(torch.arange(len(schedule)), torch.tensor(gated))
    router = make_router(model, schedule, gated=rows, updates=rows * 7, threshold=0.3)
    router.scores[gated[0]] = EXTREMES
    lost = write(router, tmp_path / name)
    again = read(tmp_path / name, model, threshold=0.3)
    assert torch.equal(again.gated, router.gated)
    assert torch.equal(again.scores[rows], router.scores[rows])
    assert again.plan() == router.plan()
    assert again.identity == router.identity
    assert any("give 0.3 to the published code" in what for what in lost)
    assert any("scores of exactly 0 and 1" in what for what in lost)

    write(again, tmp_path / "again" / name)
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_published_logits_keep_their_type(tmp_path: Path) -> None:
    router = read(uvit_file(tmp_path), tiny_uvit())
    write(router, tmp_path / "again.pth")
    content = torch.load(tmp_path / "again.pth", weights_only=True)
    assert {value.dtype for value in content.values()} == {torch.float32}


class PublishedRouter(torch.nn.Module):
    """What the published code loads a row into."""

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.prob = torch.nn.Parameter(torch.randn(sites))


@pytest.mark.parametrize("backbone", ["DiT", "UViT"])
def test_what_is_written_loads_as_in_the_published_code(tmp_path: Path, backbone: str) -> None:
    modules = torch.nn.ModuleList(PublishedRouter(6) for _ in range(6))
    if backbone == "DiT":
        router = make_router(tiny_dit(), l2c.Schedule.ddim(6), threshold=0.1)
        write(router, tmp_path / "router.pt")
        content = torch.load(tmp_path / "router.pt", weights_only=True)
        modules.load_state_dict(content["routers"])
        loop = published_dit_loop
    else:
        rows = torch.tensor([0, 0, 1, 0, 1, 0])
        router = make_router(
            tiny_uvit(), l2c.Schedule.dpm_solver_2(6), gated=rows.bool(), updates=rows
        )
        write(router, tmp_path / "router.pth")
        modules.load_state_dict(torch.load(tmp_path / "router.pth", weights_only=True))
        loop = published_uvit_loop
    assert loop(modules.state_dict(), router.threshold) == table(router).tolist()


def test_untrained_gates_are_written_as_computed(tmp_path: Path) -> None:
    updates = torch.tensor([0, 0, 0, 7, 0, 7])
    router = make_router(tiny_dit(), l2c.Schedule.ddim(6), updates=updates)
    write(router, tmp_path / "router.pt")
    again = read(tmp_path / "router.pt", tiny_dit(), threshold=0.5)
    with pytest.warns(UserWarning, match="never trained"):
        plan = router.plan()
    assert again.plan() == plan


# --- SmoothCache ---


def test_schedules_by_kind_and_by_block(tmp_path: Path) -> None:
    by_kind = {"attn": [1, 0, 1, 0], "mlp": [1, 1, 1, 1]}
    router = read(json_file(tmp_path, by_kind), tiny_dit())
    assert table(router).T.int().tolist() == [by_kind["attn"], by_kind["mlp"]] * 3
    assert router.gated.tolist() == [False, True, False, True]
    assert router.schedule == l2c.Schedule.ddim(4)
    assert router.identity == Identity.of(tiny_dit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # given, not untrained
        lost = write(router, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == by_kind
    assert any("the plan at threshold 0.5" in what for what in lost)

    one_block = {**by_kind, "mlp-1": [1, 0, 0, 1]}  # goes before the kind's
    router = read(json_file(tmp_path, one_block), tiny_dit())
    assert table(router)[:, 3].int().tolist() == [1, 0, 0, 1]
    assert bool(table(router)[:, [1, 5]].all())
    write(router, tmp_path / "blocks.json")
    by_block = json.loads((tmp_path / "blocks.json").read_text())
    assert list(by_block) == ["attn-0", "mlp-0", "attn-1", "mlp-1", "attn-2", "mlp-2"]
    assert by_block["mlp-1"] == [1, 0, 0, 1]
    assert read(tmp_path / "blocks.json", tiny_dit()).plan() == router.plan()


def test_schedules_for_uvit(tmp_path: Path) -> None:
    schedule = {"attn": [1, 1, 0, 1], "mlp": [1, 1, 1, 1]}
    router = read(json_file(tmp_path, schedule), tiny_uvit(), solver="dpm_solver_2")
    assert router.schedule == l2c.Schedule.dpm_solver_2(4)
    of_its_noise = l2c.Schedule.ddim(4, noise=l2c.Noise.uvit())
    assert read(tmp_path / "schedule.json", tiny_uvit()).schedule == of_its_noise
    write(router, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == schedule
    # SmoothCache calls in_blocks.0.attn and out_blocks.0.attn attn-0 both.
    scores = router.scores.clone()
    scores[2, 0] = 1
    with pytest.raises(ValueError, match=r"out_blocks\.0\.attn unlike another .*'attn-0'"):
        write(dataclasses.replace(router, scores=scores), tmp_path / "unlike.json")
    scores[2, 4] = 1  # both, and the mid-block has a name of its own
    alike = dataclasses.replace(router, scores=scores)
    write(alike, tmp_path / "alike.json")
    assert read(tmp_path / "alike.json", tiny_uvit(), solver="dpm_solver_2").plan() == alike.plan()


def test_a_schedule_to_learning_to_cache_and_back(tmp_path: Path) -> None:
    router = read(json_file(tmp_path, {"attn": [1, 0, 1, 0, 1, 1]}), tiny_dit())
    lost = write(router, tmp_path / "router.pt")
    assert any("their logits are -200 and 200" in what for what in lost)
    assert read(tmp_path / "router.pt", tiny_dit()).plan() == router.plan()


# --- whose weights ---


def test_a_name_tells_no_weights_and_the_router_says_so(tmp_path: Path) -> None:
    torch.save({"routers": logits(4, 24)}, tmp_path / "router.pt")
    router = read(tmp_path / "router.pt", "DiT-S/2")
    write(router, tmp_path / "router.safetensors")
    loaded = l2c.Router.load(tmp_path / "router.safetensors")
    assert loaded.identity == router.identity
    assert loaded.identity.weights is None
    model = l2c.DiT.named("DiT-S/2")
    with pytest.warns(UserWarning, match="does not say for which weights it was made"):
        l2c.Router.load(tmp_path / "router.safetensors", model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        loaded.check(model)
        loaded.check(model, loaded.schedule)
    assert len(said) == 1  # though from two places
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.rebind(model).check(model)
    with pytest.raises(ValueError, match="backbone: expected DiT, got UViT"):
        loaded.check(tiny_uvit())


def test_a_model_binds_its_weights(tmp_path: Path, dit_folder: Path) -> None:
    router = read(dit_file(tmp_path, 4, opt=None), str(dit_folder))
    router.check(tiny_dit())
    with pytest.raises(ValueError, match="weights: expected"):
        router.check(tiny_dit(seed=1))
    write(dataclasses.replace(router, identity=unknown(router)), tmp_path / "unbound.safetensors")
    assert read(tmp_path / "unbound.safetensors").identity.weights is None
    bound = read(tmp_path / "unbound.safetensors", dit_folder)
    assert bound.identity == Identity.of(tiny_dit())
    with pytest.raises(ValueError, match="is for another model: depth: expected 3, got 4"):
        read(tmp_path / "unbound.safetensors", tiny_dit(depth=4))


def unknown(router: l2c.Router) -> Identity:
    return dataclasses.replace(router.identity, weights=None)


def test_a_name_leaves_known_weights_alone(tmp_path: Path) -> None:
    model = l2c.DiT.named("DiT-S/8")
    make_router(model, l2c.Schedule.ddim(4)).save(tmp_path / "router.safetensors")
    assert read(tmp_path / "router.safetensors", "DiT-S/8").identity == Identity.of(model)
    with pytest.raises(ValueError, match="patch_size: expected 8, got 4"):
        read(tmp_path / "router.safetensors", "DiT-S/4")


# --- what is refused ---


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy", "in arguments"])
def test_pickles_that_run_code_are_refused_unrun(tmp_path: Path, form: str) -> None:
    path, reached = tmp_path / "router.pt", tmp_path / "reached"
    attack = Attack(reached)
    hidden = argparse.Namespace(model=attack) if form == "in arguments" else attack
    content = {"args": hidden, "routers": logits(4)}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"routers": attack}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    before = set(torch.serialization.get_safe_globals())
    with pytest.raises(ValueError, match=r"router\.pt holds (posix|nt)\.system, which could"):
        read(path, tiny_dit())
    assert not reached.exists()
    assert set(torch.serialization.get_safe_globals()) == before


def test_harmless_classes_are_refused_too(tmp_path: Path) -> None:
    path = dit_file(tmp_path, args=Path("/data"))
    with pytest.raises(ValueError, match=r"holds pathlib\S*Path, which could run code"):
        read(path, tiny_dit())


def test_arguments_are_allowed_in_reading_alone(tmp_path: Path) -> None:
    path = dit_file(tmp_path)
    read(path, tiny_dit())
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_a_file_can_not_name_what_is_loaded(tmp_path: Path, dit_folder: Path) -> None:
    path = dit_file(tmp_path, args=argparse.Namespace(model=str(dit_folder)))
    with pytest.raises(ValueError, match="unknown DiT"):
        read(path)


def wide(rows: int) -> Logits:
    """A view of one number, as large as one likes."""
    return {f"{i}.prob": torch.ones(1).expand(10**12) for i in range(rows)}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"routers": logits(4, 8)}, "DiT of 6 sites: it has 8 gates in a row, .* has 6 sites"),
        (logits(4), "is a router for UViT, but DiT of 6 sites was to be its model"),
        ({"model": torch.ones(3)}, r"expected logits under 0\.prob .*found \['model'\]"),
        ({"routers": {}}, r"expected logits under 0\.prob"),
        ({"routers": {**logits(3), "5.prob": torch.ones(6)}}, r"0\.prob to 3\.prob"),
        ({"routers": {**logits(2), "1.prob": torch.ones(5)}}, r"6 gates, 1\.prob has 5"),
        ({"routers": {"0.prob": torch.full((6,), torch.nan)}}, r"in 0\.prob, found NaN"),
        ({"routers": {"0.prob": torch.ones(6, dtype=torch.long)}}, "torch.int64"),
        ({"routers": {"0.prob": torch.ones(2, 3)}}, r"found shape \(2, 3\)"),
        ({"routers": {"0.prob": torch.ones(6).to_sparse()}}, "dense tensor"),
        ({"routers": {"0.prob": torch.ones(6, device="meta")}}, "dense tensor"),
        ({"routers": {"0.prob": [1.0] * 6}}, "dense tensor"),
        ({"routers": wide(2)}, "dense tensor"),
        (
            {"routers": logits(4), "args": argparse.Namespace(num_sampling_steps=50)},
            "has 4 rows, but its arguments tell of 50 steps",
        ),
        (torch.ones(3), "found Tensor"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "router.pt")
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path / "router.pt", tiny_dit())
    assert "router.pt" in str(refused.value)


def test_damaged_files(tmp_path: Path) -> None:
    path = dit_file(tmp_path)
    content = path.read_bytes()
    for share in (0.0, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="no whole file of torch.save"):
            read(path, tiny_dit())


def test_weights_are_no_router(tmp_path: Path) -> None:
    torch.save(tiny_dit().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="pos_embed.*no router of Learning-to-Cache"):
        read(tmp_path / "model.pt", tiny_dit())


def test_uvit_files_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 evaluations per step; expected a multiple of .* got 7"):
        read(uvit_file(tmp_path, 7), tiny_uvit())
    with pytest.raises(ValueError, match="is a router for UViT, but DiT"):
        read(uvit_file(tmp_path), tiny_dit())
    with pytest.raises(ValueError, match="is for 8 evaluations, not 20"):
        read(uvit_file(tmp_path), tiny_uvit(), evaluations=20)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (24, "24 gates in a row, as DiT-S and DiT-B; name its model"),
        (26, "as U-ViT-S"),
        (7, "as no published"),
    ],
)
def test_a_number_of_sites_that_tells_no_model(tmp_path: Path, sites: int, message: str) -> None:
    torch.save({"routers": logits(4, sites)}, tmp_path / "router.pt")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "router.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"attn": [1, 0], "attn": [1, 1]}', "a key stands there twice"),
        ([], "expected a JSON object"),
        ({}, "expected a JSON object"),
        ({"attn": {"0": 1}}, "expected a list of 0 and 1 as 'attn'"),
        ({"attn": []}, "expected a list of 0 and 1 as 'attn'"),
        ({"attn": [1, 2]}, r"expected 0 \(reuse\) or 1 in 'attn', found 2"),
        ({"attn": [1, True]}, "found True"),
        ({"attn": [1, 0.0]}, r"found 0\.0"),
        ('{"attn": [1, NaN]}', "found nan"),
        ({"attn": [1, 0], "mlp": [1]}, "found 2 entries in 'attn' and 1 in 'mlp'"),
        ({"mlp": [1, 1], "attn": [0, 1]}, "'attn' reuses in evaluation 0"),
        ({"cross_attn": [1, 0]}, "lists for cross_attn; the model has attn, mlp"),
        ({"attn": [1, 0], "mlp-7": [1, 0]}, "lists for mlp-7; .*attn-0 to mlp-2"),
        ({"attn-0": [1, 0], "attn-1": [1, 0]}, "lists attn by block, but not attn-2"),
        ({"attn": [1, 0], "attn1": [1, 0]}, "'attn1' beside another list for 'attn'"),
    ],
)
def test_schedules_that_do_not_fit(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read(json_file(tmp_path, content), tiny_dit())
    assert "schedule.json" in str(refused.value)


def test_a_schedule_tells_no_model_and_takes_a_fitting_solver(tmp_path: Path) -> None:
    path = json_file(tmp_path, {"attn": [1, 0, 1]})
    with pytest.raises(ValueError, match="does not tell its model"):
        read(path)
    with pytest.raises(ValueError, match="unknown solver 'euler'"):
        read(path, tiny_dit(), solver="euler")
    with pytest.raises(ValueError, match="expected a multiple of that, got 3"):
        read(path, tiny_uvit(), solver="dpm_solver_2")
    with pytest.raises(ValueError, match="unknown spacing 'sideways'"):
        read(path, tiny_dit(), spacing="sideways")
    assert read(path, tiny_dit(), spacing="trailing").schedule == l2c.Schedule.ddim(3, "trailing")


def test_questions_that_make_no_sense(tmp_path: Path, dit_folder: Path) -> None:
    path = dit_file(tmp_path)
    with pytest.raises(ValueError, match="has its own schedule"):
        read(path, tiny_dit(), solver="ddim")
    with pytest.raises(ValueError, match="has its own input size"):
        read(path, dit_folder, input_size=32)
    with pytest.raises(ValueError, match="unknown DiT 'DiT-XL/3'; known are"):
        read(path, "DiT-XL/3")
    with pytest.raises(ValueError, match=r"expected a name that ends in .*'router\.bin'"):
        read(tmp_path / "router.bin")
    with pytest.raises(ValueError, match="expected a router at .*none.pt, found none"):
        read(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\], got 2"):
        read(path, tiny_dit(), threshold=2)


@pytest.mark.parametrize(
    ("router", "name", "message"),
    [
        (
            lambda: make_router(
                tiny_dit(),
                l2c.Schedule.ddim(6),
                gated=torch.arange(6) == 2,
                updates=torch.ones(6, dtype=torch.long),
            ),
            "router.pt",
            "caches evaluations 1, 3, 5 alone; this router decides about 2 too",
        ),
        (
            lambda: make_router(tiny_dit(), l2c.Schedule.ddim(6, "trailing")),
            "router.pt",
            "always means ddim with 6 evaluations, spacing linspace; .*another schedule: options",
        ),
        (
            lambda: make_router(tiny_dit(), l2c.Schedule.dpm_solver_pp_2m(6)),
            "router.pt",
            "can't mean the schedule dpm_solver_pp_2m",
        ),
        (
            lambda: make_router(tiny_dit(), l2c.Schedule.flow_euler(6)),
            "router.pt",
            "can't mean the schedule flow_euler",
        ),
        (
            lambda: make_router(tiny_dit(), l2c.Schedule.ddim(6)),
            "router.pth",
            "layout for UViT, this router is for DiT; write .pt",
        ),
        (
            lambda: make_router(tiny_uvit(), l2c.Schedule.dpm_solver_2(6)),
            "router.pth",
            "caches evaluations 2, 4 alone; this router decides about 1, 3, 5 too",
        ),
        (
            lambda: make_router(tiny_dit(), l2c.Schedule.ddim(6)),
            "router.yaml",
            "expected a name that ends in",
        ),
    ],
)
def test_what_a_format_can_not_express(
    tmp_path: Path, router: Callable[[], l2c.Router], name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(router(), tmp_path / name)
    assert not list(tmp_path.iterdir())
