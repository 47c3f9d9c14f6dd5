"""The console script, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import l2c
from l2c.cli import main
from tests.conftest import make_router, tiny_dit


@pytest.fixture
def router_file(router: l2c.Router, tmp_path: Path) -> Path:
    router.save(tmp_path / "router.safetensors")
    return tmp_path / "router.safetensors"


@pytest.mark.parametrize("command", [[], ["show"], ["sample"], ["convert"]])
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
