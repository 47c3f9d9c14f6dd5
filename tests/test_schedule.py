"""Timesteps, against the original respacing and diffusers; what differs between schedules."""

from __future__ import annotations

import json

import pytest
from diffusers import DDIMScheduler

import l2c


def original_ids(count: int, timesteps: int = 1000) -> list[int]:
    """guided-diffusion's respacing of one section, written from its description."""
    stride = 1 if count <= 1 else (timesteps - 1) / (count - 1)
    kept, position = set(), 0.0
    for _ in range(count):
        kept.add(round(position))
        position += stride
    return sorted(kept, reverse=True)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 5, 10, 17, 20, 50, 100, 250, 999, 1000])
def test_default_ids_are_the_original_ones(evaluations: int) -> None:
    schedule = l2c.Schedule.ddim(evaluations)
    assert list(schedule.timesteps) == original_ids(evaluations)
    assert len(schedule) == evaluations


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("evaluations", [2, 4, 10, 20, 50, 100])
def test_ids_equal_diffusers(spacing: str, evaluations: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(evaluations)
    schedule = l2c.Schedule.ddim(evaluations, spacing=spacing)
    assert list(schedule.timesteps) == scheduler.timesteps.tolist()


def test_json_and_back() -> None:
    schedule = l2c.Schedule.ddim(7, "trailing", l2c.Noise("scaled_linear", 0.00085, 0.012, 500))
    assert l2c.Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


def test_by_name() -> None:
    assert l2c.Schedule.of("ddim", 5, spacing="leading") == l2c.Schedule.ddim(5, "leading")
    with pytest.raises(ValueError, match="unknown solver 'plms'; known are ddim"):
        l2c.Schedule.of("plms", 5)
    with pytest.raises(ValueError, match=r"options .*'order': 2.* do not fit the solver ddim"):
        l2c.Schedule.of("ddim", 5, order=2)


def test_differences_name_both_sides() -> None:
    schedule = l2c.Schedule.ddim(5)
    assert schedule.differences(schedule) == []
    assert schedule.differences(l2c.Schedule.ddim(6)) == [
        "number of evaluations: expected 5, got 6"
    ]
    other = l2c.Schedule.ddim(5, noise=l2c.Noise(end=0.03))
    (line,) = schedule.differences(other)
    assert line.startswith("noise: expected {'betas': 'linear', 'start': 0.0001, 'end': 0.02")
    lines = schedule.differences(l2c.Schedule.ddim(5, "trailing"))
    assert lines[0] == "options: expected {'spacing': 'linspace'}, got {'spacing': 'trailing'}"
    assert lines[1].startswith("timesteps: expected [999, 749, 500, 250, 0], got [999, 799")


@pytest.mark.parametrize(("evaluations", "spacing"), [(0, "linspace"), (1001, "leading")])
def test_impossible_counts(evaluations: int, spacing: str) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 1000 evaluations, got {evaluations}"):
        l2c.Schedule.ddim(evaluations, spacing)


def test_unknown_spacing_lists_the_known() -> None:
    with pytest.raises(ValueError, match="known are linspace, leading, trailing"):
        l2c.Schedule.ddim(5, "karras")


def test_timesteps_outside_the_noise() -> None:
    with pytest.raises(ValueError, match="between 0 and 999, got 1000"):
        l2c.Schedule("ddim", (1000, 0))
    with pytest.raises(ValueError, match="at least one evaluation"):
        l2c.Schedule("ddim", ())


def test_prints_as_a_phrase() -> None:
    assert str(l2c.Schedule.ddim(20)) == "ddim with 20 evaluations, spacing linspace"


def test_every_count_has_the_original_ids() -> None:
    wrong = [n for n in range(1, 1001) if list(l2c.Schedule.ddim(n).timesteps) != original_ids(n)]
    assert wrong == []


def has_ties(count: int) -> bool:
    """Whether a trailing id falls on exactly a half, which diffusers' float sum may miss."""
    return any(2000 * i % count == 0 and 1000 * i % count for i in range(count))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_count_equals_diffusers(spacing: str) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    compared = 0
    for count in (n for n in range(1, 1001) if not has_ties(n)):
        scheduler.set_timesteps(count)
        if len(scheduler.timesteps) == count:  # for a few counts diffusers gives one id more
            schedule = l2c.Schedule.ddim(count, spacing=spacing)
            assert list(schedule.timesteps) == scheduler.timesteps.tolist()
            compared += 1
    assert compared > 850
