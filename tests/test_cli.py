"""The console script, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import l2c
from l2c.cli import main
from l2c.profile import Profile
from l2c.reuse import Reuse
from tests.conftest import make_router, tiny_dit

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


@pytest.fixture
def router_file(router: l2c.Router, tmp_path: Path) -> Path:
    router.save(tmp_path / "router.safetensors")
    return tmp_path / "router.safetensors"


@pytest.mark.parametrize(
    "command", [[], ["show"], ["sample"], ["convert"], ["profile"], ["retarget"]]
)
def test_help_does_not_wait_for_pytorch(command: list[str]) -> None:
    code = f"""
import sys
from l2c.cli import main
try:
    main({[*command, "--help"]})
except SystemExit as stopped:
    assert stopped.code == 0
    assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "usage: l2c" in shown.stdout


def test_show_prints_where_it_comes_from_and_the_plan(
    router: l2c.Router, router_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(router_file)]) == 0
    text = capsys.readouterr().out
    assert str(router.plan()) in text
    assert "ddim with 6 evaluations" in text
    assert f"{router.plan().share:.1%} of the MACs" in text


def test_show_as_json_holds_the_whole_router(
    router: l2c.Router, router_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(router_file), "--json", "--threshold", "0.25"]) == 0
    shown = json.loads(capsys.readouterr().out)
    plan = router.plan(0.25)
    assert shown["share"] == plan.share
    assert shown["threshold"] == 0.25
    assert shown["compute"] == [[int(c) for c in row] for row in plan.compute]
    assert shown["schedule"] == router.schedule.to_dict()
    assert shown["scores"] == router.scores.tolist()


def test_show_draws_a_heat_map(router_file: Path, tmp_path: Path) -> None:
    assert main(["show", str(router_file), "--png", str(tmp_path / "a" / "map.png")]) == 0
    with Image.open(tmp_path / "a" / "map.png") as picture:
        assert min(picture.size) > 200


def test_sample_draws_cached_and_uncached_rows(
    router_file: Path, dit_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "samples.png"
    arguments = ["sample", str(router_file), "--model", str(dit_folder), "--out", str(out)]
    assert main([*arguments, "--labels", "1,2,3"]) == 0
    with Image.open(out) as picture:
        one_row = picture.size
    assert main([*arguments, "--labels", "1,2,3", "--compare"]) == 0
    with Image.open(out) as picture:
        assert picture.size[0] == one_row[0]
        assert picture.size[1] > one_row[1]


def test_sample_guides_in_one_call_or_two(
    router_file: Path, dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "samples.png"
    arguments = ["sample", str(router_file), "--model", str(dit_folder), "--out", str(out)]
    pictures = []
    for calls in ("1", "2"):
        assert main([*arguments, "--labels", "1,2", "--guidance-calls", calls]) == 0
        with Image.open(out) as picture:
            pictures.append(np.asarray(picture.convert("L"), dtype=int))
    # the two differ in rounding, which may cross into the next grey level
    assert abs(pictures[0] - pictures[1]).max() <= 1
    assert main([*arguments, "--guidance-calls", "3"]) == 1
    assert "guidance_calls of 1 or 2, got 3" in capsys.readouterr().err


def test_errors_are_one_line_and_status_1(
    dit_folder: Path, router_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "samples.png")
    assert main(["show", str(tmp_path / "none.safetensors")]) == 1
    assert main(["sample", str(router_file), "--model", str(tmp_path), "--out", out]) == 1
    arguments = ["sample", str(router_file), "--model", str(dit_folder), "--out", out]
    assert main([*arguments, "--labels", "1,b"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "found none" in lines[0]
    assert "config.json" in lines[1]
    assert "expected labels like 0,3,3, got '1,b'" in lines[2]
    assert not Path(out).exists()


def test_convert_and_show_what_came_of_it(
    dit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "schedule.json", tmp_path / "router.safetensors"
    source.write_text('{"attn": [1, 0, 1, 0], "mlp": [1, 1, 1, 1]}')
    assert main(["convert", str(source), str(out), "--model", "DiT-S/8"]) == 0
    printed = capsys.readouterr().out
    assert "weights unknown, ddim with 4 evaluations" in printed
    assert "24 of 48 gated outputs reused (50.00%)" in printed
    assert printed.endswith(f"wrote {out}\n")
    assert main(["show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "DiT, weights unknown" in shown
    assert "not recorded: the scores were given" in shown
    assert "format SmoothCache, file schedule.json" in shown
    assert main(["show", str(out), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["backbone"]["weights"] is None
    assert described["updates"] == [0, -1, 0, -1]

    arguments = ["convert", str(source), str(out), "--model", str(dit_folder)]
    assert main([*arguments, "--spacing", "trailing", "--evaluations", "4"]) == 0
    router = l2c.Router.load(out, l2c.load(dit_folder))
    assert router.schedule == l2c.Schedule.ddim(4, "trailing")
    capsys.readouterr()
    assert main(["convert", str(out), str(tmp_path / "again.json")]) == 0
    assert "not in it: the scores" in capsys.readouterr().out
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(source.read_text())


def test_convert_refuses_in_one_line(
    router_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder.json"
    folder.mkdir()
    for arguments in (
        [str(tmp_path / "none.pt"), str(tmp_path / "out.safetensors")],
        [str(router_file), str(tmp_path / "out.pth")],
        [str(router_file), str(tmp_path / "out.txt")],
        [str(router_file), str(tmp_path / "out.json"), "--evaluations", "20"],
        [str(router_file), str(tmp_path / "out.json"), "--solver", "ddim"],
        [str(router_file), str(folder)],
    ):
        assert main(["convert", *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("l2c convert: ") for line in lines)
    assert "found none" in lines[0]
    assert "write .pt" in lines[1]
    assert "ends in .safetensors, .pt, .pth, .json, got 'out.txt'" in lines[2]
    assert "is for 6 evaluations, not 20" in lines[3]
    assert "has its own schedule" in lines[4]
    assert "directory" in lines[5]
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name, router_file.name]


def test_sample_refuses_a_router_of_other_weights(
    dit_folder: Path,
    schedule: l2c.Schedule,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_router(tiny_dit(seed=1), schedule).save(tmp_path / "other.safetensors")
    arguments = ["sample", str(tmp_path / "other.safetensors"), "--model", str(dit_folder)]
    assert main([*arguments, "--out", str(tmp_path / "samples.png")]) == 1
    assert "weights: expected" in capsys.readouterr().err


def measured_provenance() -> dict[str, object]:
    return {
        "seed": 3,
        "measured": [
            {"budget": 0.5, "share": 0.491, "mse": 0.00123456},
            {"budget": 0.75, "share": 0.7499, "mse": 0.0001, "predicted": 0.00011},
        ],
        "soft_error": 0.02,
        "hard_error": 0.03,
        "predicted_error": 0.04,
        "measured_error": 0.02,
    }


def test_show_diagnoses_a_router(
    dit: l2c.DiT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six evaluations: attention is computed in the first and the fifth, MLPs in every second."""
    schedule = l2c.Schedule.ddim(6)
    sites = l2c.sites(dit)
    kinds = [site.name.endswith("attn") for site in sites]
    scores = torch.tensor(
        [[row == 4 if attention else row % 2 == 0 for attention in kinds] for row in range(6)]
    ).float()
    gated = torch.arange(6) > 0
    router = make_router(
        dit,
        schedule,
        scores=scores,
        gated=gated,
        updates=gated * 2,
        reuse=Reuse("taylor", 1),
        provenance=measured_provenance(),
    )
    path = tmp_path / "router.safetensors"
    router.save(path)
    assert main(["show", str(path)]) == 0
    text = capsys.readouterr().out
    lines = dict(line.strip().split("  ", 1) for line in text.splitlines() if "  " in line.strip())
    assert lines["rule"] == "taylor-1"
    # Ages 1, 2, 3 and 1 of attention, three times 1 of MLPs.
    assert lines["cache age"] == "attn 1.8 on average, 3 at most; mlp 1.0 on average, 1 at most"
    # Two outputs of [16 tokens, 32 channels] in float32 for each of six sites.
    assert lines["cache"] == f"{12 * 16 * 32 * 4 / 2**20:.2f} MiB per sample in float32"
    assert lines["soft and hard"] == "error 0.02, then 0.03, 1.50 times as much"
    assert lines["predicted and measured"] == "error 0.04, then 0.02, 0.50 times as much"
    assert "never trained" not in lines
    assert (
        "measured\n"
        "budget  share       mse  predicted\n"
        " 50.0%  49.1%  0.001235          -\n"
        " 75.0%  75.0%    0.0001    0.00011\n"
    ) in text

    assert main(["show", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["reuse"] == {
        "kind": "taylor",
        "order": 1,
        "corrected": False,
        "shifted": False,
        "relative": False,
    }
    assert shown["cache_bytes"] == router.plan().cache_bytes() == 12 * 16 * 32 * 4
    assert shown["ages"]["attn"] == {"mean": 7 / 4, "largest": 3}
    assert [site["largest_age"] for site in shown["sites"]] == [3, 1] * 3
    assert shown["never_trained"] == []
    assert shown["threshold"] == 0.5 and shown["budget"] is None
    assert shown["provenance"]["measured"] == measured_provenance()["measured"]


def test_show_names_evaluations_that_were_never_trained(
    dit: l2c.DiT, schedule: l2c.Schedule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "router.safetensors"
    make_router(dit, schedule, updates=torch.tensor([0, 7, 0, 0, 0, 0])).save(path)
    with pytest.warns(UserWarning, match="evaluations 3, 5 were never trained"):
        assert main(["show", str(path)]) == 0
    assert "never trained  evaluations 3, 5\n" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*.safetensors")), ids=lambda p: p.stem)
def test_show_reads_what_is_shipped(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(path)]) == 0
    text = capsys.readouterr().out
    assert "MiB per sample" in text and "on average" in text


def test_show_and_sample_keep_to_a_budget_of_macs_or_time(
    router: l2c.Router,
    router_file: Path,
    dit_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "profile.json"
    assert main(["profile", str(dit_folder), "--out", str(out), "--batch", "2", "--runs", "1"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    profile = Profile.load(out)
    assert profile.batch == 2
    costs = profile.sites(router.sites)
    # So much for all sites outside of all gates, with half of the rest.
    budget = (1 + within_gates(router, costs)) / 2
    show = ["show", str(router_file), "--budget", str(budget), "--json"]
    assert main([*show, "--profile", str(out)]) == 0
    shown = json.loads(capsys.readouterr().out)
    plan = router.plan(budget=budget, costs=costs)
    assert shown["compute"] == [[int(c) for c in row] for row in plan.compute]
    assert shown["budget"] == budget and shown["threshold"] is None
    assert shown["time"]["share"] <= budget
    assert shown["time"]["speedup"] == pytest.approx(1 / shown["time"]["share"])
    assert main(["show", str(router_file), "--profile", str(out)]) == 0
    assert "x predicted speed-up" in capsys.readouterr().out

    picture = tmp_path / "samples.png"
    sample = ["sample", str(router_file), "--model", str(dit_folder), "--out", str(picture)]
    assert main([*sample, "--labels", "1", "--budget", str(budget), "--profile", str(out)]) == 0
    assert picture.exists()
    capsys.readouterr()
    assert main([*sample, "--profile", str(out)]) == 1
    assert main(["show", str(router_file), "--budget", "0.1"]) == 1
    assert main(["show", str(router_file), "--budget", "0.8", "--threshold", "0.5"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "give --budget" in lines[0]
    assert "a budget of 0.100 is below" in lines[1]
    assert "a threshold or a budget, got both" in lines[2]


def within_gates(router: l2c.Router, costs: l2c.Sites) -> float:
    """Share of the cost that is left when all gates are closed."""
    open_rows = int((~router.gated).sum())
    return (len(router.gated) * costs.rest + open_rows * (costs.macs - costs.rest)) / (
        len(router.gated) * costs.macs
    )


def test_retarget_writes_a_router_for_another_schedule(
    router: l2c.Router, router_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new.safetensors"
    arguments = ["retarget", str(router_file), str(out)]
    assert main([*arguments, "--evaluations", "12"]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    made = l2c.Router.load(out)
    assert made.schedule == l2c.Schedule.ddim(12)
    assert made.plan() == router.retarget(l2c.Schedule.ddim(12)).plan()
    assert main(["show", str(out)]) == 0
    text = capsys.readouterr().out
    assert "retargeted  from ddim with 6 evaluations, spacing linspace\n" in text
    assert f"budget  {router.plan().share:g} of the MACs\n" in text
    assert main([*arguments, "--solver", "dpm_solver_pp_2m", "--spacing", "trailing"]) == 0
    assert l2c.Router.load(out).schedule == l2c.Schedule.dpm_solver_pp_2m(6, "trailing")
    capsys.readouterr()
    for wrong in (["--solver", "flow_euler"], ["--solver", "euler"], ["--evaluations", "1"]):
        assert main([*arguments, *wrong]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "flow_euler is for rectified flows" in lines[0]
    assert "unknown solver 'euler'" in lines[1]
    assert "at least 2 evaluations" in lines[2]
