"""Timesteps, against the original respacing and diffusers; what differs between schedules."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import l2c

# diffusers' use of NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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


# --- other solvers ---

UVIT = l2c.Noise.uvit()
EVERY_KIND = [
    l2c.Schedule.ddim(7, "leading", UVIT),
    l2c.Schedule.dpm_solver_2(10),
    l2c.Schedule.dpm_solver_2(10, "log_snr", "noise", l2c.Noise()),
    l2c.Schedule.dpm_solver_pp_2m(7),
    l2c.Schedule.dpm_solver_pp_2m(7, "trailing", UVIT),
    l2c.Schedule.flow_euler(7, 3.0),
    l2c.Schedule.flow_euler(7, noise=l2c.Flow(500)),
]


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=str)
def test_every_kind_survives_json(schedule: l2c.Schedule) -> None:
    again = l2c.Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule
    assert again.differences(schedule) == []
    assert again.timesteps == schedule.timesteps  # to the last bit, also between whole ones
    assert again.noise == schedule.noise
    assert type(again.noise) is type(schedule.noise)
    assert str(again) == str(schedule)


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=str)
def test_every_kind_is_made_by_name(schedule: l2c.Schedule) -> None:
    made = l2c.Schedule.of(schedule.solver, len(schedule), noise=schedule.noise, **schedule.options)
    assert made == schedule


def test_kinds_differ_where_they_do() -> None:
    assert l2c.Schedule.dpm_solver_2(4).differences(l2c.Schedule.dpm_solver_2(4, "time", "noise"))
    lines = l2c.Schedule.ddim(4).differences(l2c.Schedule.ddim(4, noise=UVIT))
    assert [line.partition(":")[0] for line in lines] == ["timesteps", "noise"]
    lines = l2c.Schedule.ddim(4, noise=UVIT).differences(l2c.Schedule.flow_euler(4))
    assert lines[-1].endswith("got {'betas': 'flow', 'timesteps': 1000}")


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=str)
def test_timesteps_fall_from_the_noisy_to_the_clean_end(schedule: l2c.Schedule) -> None:
    assert all(a > b for a, b in pairwise(schedule.timesteps))
    assert schedule.noise.first <= schedule.timesteps[-1]
    assert schedule.timesteps[0] <= schedule.noise.last


@pytest.mark.parametrize("evaluations", [2, 4, 10, 50, 200, 1000])
@pytest.mark.parametrize("spacing", ["time", "log_snr"])
@pytest.mark.parametrize("noise", [l2c.Noise(), UVIT], ids=["dit", "uvit"])
def test_dpm_solver_2_has_two_evaluations_per_step(
    evaluations: int, spacing: str, noise: l2c.Noise
) -> None:
    schedule = l2c.Schedule.dpm_solver_2(evaluations, spacing, noise=noise)
    assert len(schedule) == evaluations
    assert schedule.evaluations_per_step == 2
    assert schedule.timesteps[0] == noise.last
    assert all(a > b for a, b in pairwise((*schedule.timesteps, noise.first)))
    ends = [*schedule.timesteps[::2], noise.first]
    if spacing == "time":
        lengths = [a - b for a, b in pairwise(ends)]
    else:
        lengths = [noise.half_log_snr(b) - noise.half_log_snr(a) for a, b in pairwise(ends)]
    # timesteps are rounded to four places, at the clean end 5e-5 of log-SNR or less
    assert max(lengths) - min(lengths) < 2e-4


@pytest.mark.parametrize("evaluations", [1, 3, 21, 999])
def test_odd_numbers_of_evaluations_are_refused(evaluations: int) -> None:
    message = f"takes 2 evaluations per step; .*multiple of that, got {evaluations}"
    for spacing in ("time", "log_snr"):
        with pytest.raises(ValueError, match=message):
            l2c.Schedule.dpm_solver_2(evaluations, spacing)
    with pytest.raises(ValueError, match=message):
        l2c.Schedule.of("dpm_solver_2", evaluations)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_every_count_of_the_multistep_solver_equals_diffusers(spacing: str) -> None:
    scheduler = DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=0)
    compared = 0
    for count in (*range(1, 101), 125, 200, 250, 333, 500, 998):
        if spacing == "trailing" and has_ties(count):
            continue
        scheduler.set_timesteps(count)
        if len(scheduler.timesteps) == count:  # for a few counts diffusers gives one id more
            schedule = l2c.Schedule.dpm_solver_pp_2m(count, spacing)
            assert list(schedule.timesteps) == scheduler.timesteps.tolist()
            compared += 1
    assert compared > 90


@pytest.mark.parametrize(("noise", "most"), [(l2c.Noise(), 37), (UVIT, 27)], ids=["dit", "uvit"])
def test_log_snr_takes_whole_timesteps_as_long_as_they_differ(noise: l2c.Noise, most: int) -> None:
    for count in range(2, most + 1):
        schedule = l2c.Schedule.dpm_solver_pp_2m(count, noise=noise)
        assert (schedule.timesteps[0], schedule.timesteps[-1]) == (noise.last, noise.first)
        assert all(isinstance(t, int) for t in schedule.timesteps)
        ends = noise.half_log_snr(noise.last), noise.half_log_snr(noise.first)
        step = (ends[1] - ends[0]) / (count - 1)
        for i, t in enumerate(schedule.timesteps):
            # to the next whole timestep, whose neighbours lie on both sides of it
            low, high = max(t - 0.5, noise.first), min(t + 0.5, noise.last)
            wanted = ends[0] + i * step
            assert noise.half_log_snr(high) - 1e-9 <= wanted <= noise.half_log_snr(low) + 1e-9
    with pytest.raises(ValueError, match=f"{most + 1} evaluations are too many for spacing log_"):
        l2c.Schedule.dpm_solver_pp_2m(most + 1, noise=noise)
    assert len(l2c.Schedule.dpm_solver_pp_2m(most + 1, "trailing", noise)) == most + 1


def test_a_flow_runs_down_evenly_before_its_shift() -> None:
    assert l2c.Schedule.flow_euler(4).timesteps == (1000, 750, 500, 250)
    assert l2c.Schedule.flow_euler(4, 3.0).timesteps == (1000, 900, 750, 500)
    assert l2c.Schedule.flow_euler(4, noise=l2c.Flow(1)).timesteps == (1, 0.75, 0.5, 0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: l2c.Schedule.flow_euler(0), "evaluations >= 1 and shift > 0, got 0 and 1"),
        (lambda: l2c.Schedule.flow_euler(4, 0.0), "shift > 0, got 4 and 0"),
        (lambda: l2c.Schedule.flow_euler(4, float("nan")), "shift > 0, got 4 and nan"),
        (lambda: l2c.Schedule.dpm_solver_2(4, "trailing"), "known are time, log_snr"),
        (lambda: l2c.Schedule.dpm_solver_2(4, prediction="v"), '"data" or "noise", got \'v\''),
        (lambda: l2c.Schedule.dpm_solver_2(1002), "between 1 and 1000 evaluations, got 1002"),
        (lambda: l2c.Schedule.dpm_solver_pp_2m(0), "between 1 and 1000 evaluations, got 0"),
        (lambda: l2c.Schedule.dpm_solver_pp_2m(1000, "leading"), "too many for spacing leading"),
        (lambda: l2c.Schedule.dpm_solver_pp_2m(1000, "linspace"), "too many for spacing linspace"),
        (lambda: l2c.Schedule.dpm_solver_pp_2m(4, "time"), "known are linspace, leading, trail"),
        (lambda: l2c.Schedule("dpm_solver_2", (900, 500, 100)), "multiple of that, got 3"),
        (lambda: l2c.Schedule("ddim", (500, 0), noise=UVIT), "between 1 and 1000, got 0"),
        (lambda: l2c.Schedule.of("dpm_solver_2", 4, shift=2.0), "do not fit the solver dpm_solver"),
        (lambda: l2c.Schedule.ddim(4, noise=l2c.Flow()), "noise of a model that predicts it"),
        (lambda: l2c.Schedule.dpm_solver_2(4, noise=l2c.Flow()), "noise of a model that predicts"),
        (lambda: l2c.Schedule.dpm_solver_pp_2m(4, noise=l2c.Flow()), "take flow_euler"),
        (lambda: l2c.Schedule.flow_euler(4, noise=l2c.Noise()), "flow_euler is for rectified flow"),
    ],
)
def test_schedules_that_cannot_be(make: Callable[[], l2c.Schedule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
