"""Pictures are written whole, and show what they are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import l2c
from l2c.picture import draw_router, draw_samples, router_figure
from tests.conftest import make_router, tiny_dit, tiny_uvit


def test_heat_map_shows_scores_grouped_by_kind(router: l2c.Router) -> None:
    heat, bars = router_figure(router).axes[:2]
    shown = np.ma.filled(heat.images[0].get_array().astype(float), np.nan)
    attention_first = router.scores[:, [0, 2, 4, 1, 3, 5]]
    expected = attention_first.masked_fill(~router.gated[:, None], torch.nan)
    np.testing.assert_array_equal(shown, expected.numpy().astype(float))
    widths = [bar.get_width() for bar in bars.patches]
    assert widths == [100 * share for share in router.plan().shares]


@pytest.mark.parametrize("depth", [2, 6])
def test_heat_map_of_a_uvit_numbers_blocks_in_calling_order(depth: int, tmp_path: Path) -> None:
    """Its middle block has no number of its own."""
    router = make_router(tiny_uvit(depth=depth), l2c.Schedule.dpm_solver_2(8))
    figure = router_figure(router)
    heat = figure.axes[0]
    blocks = depth + 1
    assert [label.get_text() for label in heat.get_xticklabels()] == [
        str(block) for _ in ("attn", "mlp") for block in range(blocks)
    ]
    assert heat.get_xticks().tolist() == list(range(2 * blocks))
    assert [text.get_text() for text in heat.texts] == ["attn", "mlp"]
    shown = np.ma.filled(heat.images[0].get_array().astype(float), np.nan)
    order = [*range(0, 2 * blocks, 2), *range(1, 2 * blocks, 2)]
    expected = router.scores[:, order].masked_fill(~router.gated[:, None], torch.nan)
    np.testing.assert_array_equal(shown, expected.numpy().astype(float))
    draw_router(router, tmp_path / "uvit.png")
    with Image.open(tmp_path / "uvit.png") as picture:
        assert min(picture.size) > 200


def test_heat_map_of_many_sites_leaves_out_ticks_and_counts_on() -> None:
    router = make_router(tiny_dit(depth=28), l2c.Schedule.ddim(4))
    labels = [label.get_text() for label in router_figure(router).axes[0].get_xticklabels()]
    assert labels == [str(block) for block in range(0, 28, 2)] * 2


def test_samples_are_drawn_row_by_row(tmp_path: Path) -> None:
    black, white = torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)
    draw_samples({"above": black, "below": white}, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    column = pixels[:, pixels.shape[1] * 3 // 4]
    darkest, brightest = (np.flatnonzero(column == value).mean() for value in (0, 255))
    assert darkest < brightest


def test_a_failing_picture_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="2 and 3"):
        draw_samples({"a": torch.zeros(2, 1, 4, 4), "b": torch.zeros(3, 1, 4, 4)}, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
