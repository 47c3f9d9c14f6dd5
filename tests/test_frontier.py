"""The frontier on a tiny model: every method, resumed, and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_router, tiny_dit
from torch import Tensor, nn

import l2c
from benchmarks import curves, frontier
from benchmarks.bench import LOOKAHEAD, Bench, Options
from benchmarks.distances import Distances, Space, extracted
from benchmarks.rows import Rows, choice_table, table
from benchmarks.ways import METHODS, SETTINGS, Setting, Task, spread, trained, training_seconds
from l2c.reuse import Reuse
from train.calibration import Changes, measure

METHOD_NAMES = [name for name in METHODS if name != "dpm_2"]


class Pooled(nn.Module):
    """Sixteen numbers of an image."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)


def space(shape: tuple[int, ...] = (3, 8, 8)) -> Space:
    real = torch.randn(20, *shape, generator=torch.Generator().manual_seed(0))
    return Space("classifier", Pooled(), Distances(extracted(Pooled(), real)))


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    tiny_dit().save_pretrained(tmp_path / "teacher")
    return Setting(tmp_path / "teacher", "ddim", 6, 1.5)


def options(tmp_path: Path, **changes: Any) -> Options:
    fields = {"samples": 8, "batch_size": 4, "runs": 1, "work": tmp_path / "work", "converged": 12}
    return Options(**{**fields, **changes})


def test_measures_every_method_resumes_and_draws(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, chosen = tmp_path / "frontier.json", options(tmp_path)
    routers = tmp_path / "routers"
    model = l2c.load(setting.teacher)
    make_router(model, setting.schedule(model), provenance={"seconds": 12.5}).save(
        routers / "l2c__tiny__0.5__seed3.safetensors"
    )
    (routers / "notes-best.safetensors").write_bytes(b"not a router of the frontier")

    def run() -> list[dict[str, Any]]:
        return frontier.run(
            {"tiny": setting},
            out,
            chosen,
            budgets=[0.5],
            routers=trained(routers, ["tiny"]),
            distances=[space()],
        )

    rows = run()
    assert [row["method"] for row in rows] == ["uncached", *METHOD_NAMES, "l2c"]
    assert not [row for row in rows if "unfit" in row]
    figures = {row["method"]: row for row in rows}
    assert figures["uncached"]["mse"] == 0 and figures["uncached"]["psnr"] is None
    assert figures["l2c"]["training_seconds"] == 12.5 and figures["l2c"]["training_seed"] == 3
    assert figures["ddim"]["evaluations"] == 3 and figures["ddim"]["share"] == 0.5
    assert figures["ddim"]["cache_mib"] == 0 < figures["fora"]["cache_mib"]
    for row in rows:
        assert set(row["distances"]["classifier"]) == {"frechet", "kernel", "precision", "recall"}
        assert row["latency"] > 0
        if row["kind"] == "caching":
            # extrapolations cost a little of their own
            assert 0.4 < row["share"] <= figures["fora"]["share"] + 0.02

    # Nothing is drawn again, whatever it would take.
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was computed again")

    written = out.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(l2c, "sample", refuse)
        assert run() == rows
    assert out.read_bytes() == written

    # A lost row alone is measured again, from references that are kept: no other schedule is run.
    content = json.loads(written)
    content["rows"] = [row for row in content["rows"] if row["method"] != "fora"]
    out.write_text(json.dumps(content))
    again = {row["method"]: row for row in run()}["fora"]
    timed = ("latency", "latency_range")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in figures["fora"].items() if k not in timed
    }

    paths = curves.draw(rows, out)
    assert [path.name for path in paths] == [
        "frontier_error.png",
        "frontier_frechet.png",
        "frontier_choice.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    text = table(rows)
    assert "TaylorSeer 2" in text and "l2c, seed 3" in text
    assert "MSE to the converged sample" in choice_table(rows)
    assert "evaluations' time" in choice_table(rows, "latency")


def test_fewer_samples_are_the_first_of_more(setting: Setting, tmp_path: Path) -> None:
    many = Bench("tiny", setting, options(tmp_path / "a", samples=8, batch_size=4))
    few = Bench("tiny", setting, options(tmp_path / "b", samples=4, batch_size=4))
    assert torch.equal(many.noise[:4], few.noise)
    assert torch.equal(many.uncached[:4], few.uncached)
    # References grow: the first half is read, the second drawn.
    kept = Bench("tiny", setting, options(tmp_path / "b", samples=8, batch_size=4))
    assert torch.equal(kept.uncached, many.uncached)
    other = Bench("tiny", setting, options(tmp_path / "c", seed=1))
    assert not torch.equal(other.noise[:4], few.noise)


def test_references_of_other_weights_are_not_used(setting: Setting, tmp_path: Path) -> None:
    first = Bench("tiny", setting, options(tmp_path)).uncached
    tiny_dit(seed=1).save_pretrained(setting.teacher)
    assert not torch.equal(Bench("tiny", setting, options(tmp_path)).uncached, first)


def test_figures_are_those_of_the_samples(setting: Setting, tmp_path: Path) -> None:
    bench = Bench("tiny", setting, options(tmp_path))
    way = bench.way("taylorseer_1", 0.5)
    found = bench.figures(way, None, [])
    noise, labels = bench.noise, torch.arange(8) % 10
    plain = l2c.sample(bench.model, bench.schedule, labels, 1.5, latents=noise)
    plan = l2c.Plan.rows((0, 2, 4), 6, l2c.sites(bench.model), Reuse.named("taylor-1"))
    drawn = l2c.sample(bench.model, bench.schedule, labels, 1.5, plan=plan, latents=noise)
    # batches of 4 and of 8 round differently
    assert found["mse"] == pytest.approx(float((drawn - plain).square().mean()), rel=1e-3)
    assert found["share"] == pytest.approx(plan.share)
    assert found["cost"] == pytest.approx(6 * plan.share)
    assert found["cache_mib"] == plan.cache_bytes(16) / 2**20


def test_what_a_method_cannot_do_is_a_row_too(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path / "teacher")
    setting = Setting(tmp_path / "teacher", "ddim", 100, 1.0)
    rows = frontier.run(
        {"long": setting},
        tmp_path / "out.json",
        options(tmp_path, samples=1, converged=2),
        budgets=[0.9],
        methods=["dpm_pp_log_snr"],
    )
    assert "90 evaluations are too many for spacing log_snr" in rows[1]["unfit"]
    assert "-" in table(rows)


def test_a_router_for_another_setting_is_refused(setting: Setting, tmp_path: Path) -> None:
    model = l2c.load(setting.teacher)
    path = tmp_path / "l2c__tiny__0.5__seed0.safetensors"
    make_router(model, l2c.Schedule.ddim(7)).save(path)
    routers = trained(tmp_path, ["tiny"])
    with pytest.raises(ValueError, match="is not for tiny: .*number of evaluations: expected 7"):
        frontier.run(
            {"tiny": setting},
            tmp_path / "out.json",
            options(tmp_path),
            budgets=[0.5],
            methods=["l2c"],
            routers=routers,
        )


def test_names_of_routers(tmp_path: Path) -> None:
    name = "block_caching_scale_shift__dit_ddim_20_g1.5__0.25__seed1.safetensors"
    (tmp_path / name).write_bytes(b"")
    (router,) = trained(tmp_path)
    assert (router.method, router.setting) == ("block_caching_scale_shift", "dit_ddim_20_g1.5")
    assert (router.budget, router.seed) == (0.25, 1)
    (tmp_path / "l2c__dit_ddim_21__0.25__seed1.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown setting in the name of .*known are dit_ddim_20"):
        trained(tmp_path)
    with pytest.raises(ValueError, match="expected a folder of router files, found none at"):
        trained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "dit_ddim_21"], "unknown setting: 'dit_ddim_21'; known are dit_ddim_20_g1"),
        (["--methods", "magic"], "unknown method: 'magic'; known are ddim, dpm_pp_log_snr"),
        (["--plot", "--out", "nowhere.json"], "expected rows in nowhere.json, found none"),
    ],
)
def test_wrong_options_say_what_is_known(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        frontier.main(arguments)
    assert message in capsys.readouterr().err


def test_no_frontier_is_overwritten_by_mistake(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected the results of a frontier in .*--out"):
        Rows(path)


# --- ways ---


@pytest.mark.parametrize("count", range(1, 21))
def test_spread_computes_so_many(count: int) -> None:
    one = spread(count, l2c.Schedule.ddim(20))
    assert len(set(one)) == count and one[0] == 0
    gaps = [b - a for a, b in zip(one, (*one[1:], 20), strict=True)]
    assert max(gaps) - min(gaps) <= 1
    two = spread(count, l2c.Schedule.dpm_solver_2(20))
    assert len(set(two)) == count and two[0] == 0 and max(two) < 20


def test_spread_shares_no_cache_within_a_step_if_it_can() -> None:
    schedule = l2c.Schedule.dpm_solver_2(20)
    assert spread(11, schedule) == (0, *range(1, 20, 2))  # Learning-to-Cache, appendix B.1
    for count in range(11, 20):
        middles = set(range(1, 20, 2))
        assert middles <= set(spread(count, schedule))
    assert spread(5, schedule) == (0, 5, 9, 13, 17)
    with pytest.raises(ValueError, match="expected from 1 to 20 evaluations to compute, got 21"):
        spread(21, schedule)


def test_whole_evaluations_of_a_budget() -> None:
    model = tiny_dit()

    def count(budget: float, evaluations: int) -> int:
        schedule = l2c.Schedule.ddim(evaluations)
        return Task(model, schedule, budget, lambda: measure(model, schedule)).count

    assert [count(b, 20) for b in frontier.BUDGETS] == [10, 7, 5, 3]
    assert [count(b, 50) for b in frontier.BUDGETS] == [25, 18, 13, 8]
    assert [count(b, 10) for b in frontier.BUDGETS] == [5, 4, 3, 2]


def test_settings_fit_their_schedules() -> None:
    assert len(SETTINGS) == 12
    for setting in SETTINGS.values():
        assert (setting.teacher / "config.json").is_file()
        noise = l2c.load(setting.teacher).noise
        made = l2c.Schedule.of(setting.solver, setting.evaluations, noise=noise)
        assert len(made) == setting.evaluations


def test_every_method_fits_every_setting() -> None:
    models = {s.teacher: l2c.load(s.teacher) for s in SETTINGS.values()}
    for setting in SETTINGS.values():
        if setting.guidance_scale != 1.0:
            continue
        model = models[setting.teacher]
        schedule = setting.schedule(model)
        shape = (LOOKAHEAD, len(schedule), len(l2c.sites(model)))
        g = torch.Generator().manual_seed(0)
        random = torch.rand(shape, generator=g) + torch.arange(shape[0])[:, None, None]
        changes = Changes(random, l2c.sites(model))
        for budget in frontier.BUDGETS:
            task = Task(model, schedule, budget, lambda changes=changes: changes)
            for name, method in METHODS.items():
                way = method(task)
                nominal = max(2.0 if name == "dpm_2" else 0.0, task.share * len(schedule))
                # extrapolations cost a little of their own
                assert 0 < way.cost <= 1.02 * nominal, name


def test_training_seconds_are_found_in_provenance() -> None:
    assert training_seconds({"a": 1, "training": {"seconds": 3}}) == 3.0
    assert training_seconds({"training_seconds": 4.5}) == 4.5
    assert training_seconds({"steps": 3}) is None
