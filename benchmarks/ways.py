"""Ways of drawing samples at a budget: fewer steps, other people's caching, and learned routers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import l2c
from l2c.plan import Plan
from l2c.reuse import Reuse
from l2c.schedule import Schedule
from train.calibration import LOOKAHEAD, Changes, block_caching, per_step, smoothcache

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
KINDS = ("uncached", "fewer steps", "caching", "learned")


@dataclass(frozen=True)
class Setting:
    """What is to be made faster: a teacher, its schedule and the guidance.

    Args:
        teacher: Folder of the model.
        solver: Solver of the uncached run.
        evaluations: Its number of evaluations.
        guidance_scale: Guidance.
    """

    teacher: Path
    solver: str
    evaluations: int
    guidance_scale: float

    def schedule(self, model: Any) -> Schedule:
        """The schedule of the uncached run."""
        return Schedule.of(self.solver, self.evaluations, noise=model.noise)


def _settings() -> dict[str, Setting]:
    tags = {"ddim": "ddim", "dpm_solver_pp_2m": "dpm_pp", "dpm_solver_2": "dpm_2"}
    runs = {
        "dit": [("ddim", 20), ("ddim", 50), ("dpm_solver_pp_2m", 10), ("dpm_solver_pp_2m", 20)],
        "uvit": [("dpm_solver_2", 20), ("dpm_solver_2", 50)],
    }
    return {
        f"{teacher}_{tags[solver]}_{count}_g{scale}": Setting(
            CHECKPOINTS / f"fashion_mnist_{teacher}", solver, count, scale
        )
        for teacher, schedules in runs.items()
        for solver, count in schedules
        for scale in (1.0, 1.5)
    }


SETTINGS = _settings()


@dataclass(frozen=True)
class Way:
    """One way of drawing samples.

    Args:
        kind: One of `KINDS`.
        schedule: Solver and evaluations.
        plan: What each evaluation computes; None for everything.
        about: What else is to be recorded, plain values.
    """

    kind: str
    schedule: Schedule
    plan: Plan | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, model: Any, labels: Tensor, noise: Tensor, guidance_scale: float) -> Tensor:
        """Samples [B, C, H, W]."""
        return l2c.sample(
            model, self.schedule, labels, guidance_scale, plan=self.plan, latents=noise
        )

    @property
    def cost(self) -> float:
        """What it costs in plain evaluations of the model, by multiply-accumulates."""
        return len(self.schedule) * (1.0 if self.plan is None else self.plan.share)


@dataclass(frozen=True)
class Task:
    """A schedule to be sampled at a budget.

    Args:
        model: The model.
        schedule: The uncached run.
        budget: Nominal share of its compute.
        calibrate: Measures the changes along its trajectories; called where a method needs them.
    """

    model: Any
    schedule: Schedule
    budget: float
    calibrate: Callable[[], Changes]

    @property
    def count(self) -> int:
        """Whole evaluations within the budget: the nearest number, halves up."""
        return max(1, int(self.budget * len(self.schedule) + 0.5 + 1e-9))

    @cached_property
    def sites(self) -> l2c.Sites:
        """The model's sites."""
        return l2c.sites(self.model)

    @property
    def share(self) -> float:
        """What `count` whole evaluations and the parts outside of all sites cost."""
        return Plan.rows(range(self.count), len(self.schedule), self.sites).share


def spread(count: int, schedule: Schedule) -> tuple[int, ...]:
    """So many evaluations that compute, evenly spread over a schedule, the first among them (FORA).

    Of a solver with two evaluations per step the middle ones are preferred: they alone carry the
    step, and so no two of a step share a cache while that can be avoided (Learning-to-Cache,
    appendix B.1).

    Raises:
        ValueError: If there are not so many evaluations.
    """
    total = len(schedule)
    if not 1 <= count <= total:
        raise ValueError(f"expected from 1 to {total} evaluations to compute, got {count}")
    if schedule.evaluations_per_step == 1:
        return tuple(i * total // count for i in range(count))
    half = total // 2
    if count <= half:
        return (0, *(2 * (i * half // count) + 1 for i in range(1, count)))
    starts = count - half
    return tuple(sorted([*range(1, total, 2), *(2 * (i * half // starts) for i in range(starts))]))


def _fewer(solver: str, **options: Any) -> Callable[[Task], Way]:
    def make(task: Task) -> Way:
        count = task.count
        if solver == "dpm_solver_2":
            count = max(2, count - count % 2)
        made = Schedule.of(solver, count, noise=task.model.noise, **options)
        return Way("fewer steps", made)

    return make


def _uniform(rule: str) -> Callable[[Task], Way]:
    def make(task: Task) -> Way:
        rows = spread(task.count, task.schedule)
        plan = Plan.rows(rows, len(task.schedule), task.sites, Reuse.named(rule))
        return Way("caching", task.schedule, plan)

    return make


def _per_step(rule: str) -> Callable[[Task], Way]:
    def make(task: Task) -> Way:
        plan = per_step(task.calibrate(), task.count, Reuse.named(rule))
        return Way("caching", task.schedule, plan)

    return make


def _smoothcache(task: Task) -> Way:
    changes = task.calibrate()
    for lookahead in range(LOOKAHEAD, changes.lookahead + 1):
        try:
            plan = smoothcache(changes, task.share, lookahead)
        except ValueError:  # too few evaluations in a row reuse; the paper stops at its lookahead
            if lookahead == changes.lookahead:
                raise
            continue
        return Way("caching", task.schedule, plan, {"lookahead": lookahead})
    raise ValueError(
        f"expected changes over {LOOKAHEAD} evaluations at least, got {changes.lookahead}"
    )


def _block_caching(task: Task) -> Way:
    return Way("caching", task.schedule, block_caching(task.calibrate(), task.share))


METHODS: dict[str, Callable[[Task], Way]] = {
    "ddim": _fewer("ddim"),
    "dpm_pp_log_snr": _fewer("dpm_solver_pp_2m", spacing="log_snr"),
    "dpm_pp_trailing": _fewer("dpm_solver_pp_2m", spacing="trailing"),
    "unipc_log_snr": _fewer("unipc", spacing="log_snr"),
    "unipc_trailing": _fewer("unipc", spacing="trailing"),
    "dpm_2": _fewer("dpm_solver_2"),
    "fora": _uniform("copy"),
    "taylorseer_1": _uniform("taylor-1"),
    "taylorseer_2": _uniform("taylor-2"),
    "taylorseer_3": _uniform("taylor-3"),
    "newton_1": _uniform("newton-1"),
    "newton_2": _uniform("newton-2"),
    "per_step_copy": _per_step("copy"),
    "per_step_taylor_2": _per_step("taylor-2"),
    "smoothcache": _smoothcache,
    "block_caching": _block_caching,
}


@dataclass(frozen=True)
class Trained:
    """A router file METHOD__SETTING__BUDGET__seedN.safetensors.

    Args:
        path: The file.
        method: How it was trained.
        setting: What for.
        budget: The nominal share of the compute.
        seed: Seed of its training.
    """

    path: Path
    method: str
    setting: str
    budget: float
    seed: int

    @cached_property
    def digest(self) -> str:
        """Of the file, to know it again."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def way(self, model: Any, schedule: Schedule, guidance_scale: float) -> Way:
        """The router's own plan.

        Raises:
            ValueError: If the file does not fit its setting.
        """
        try:
            router = l2c.Router.load(self.path, model, schedule, guidance_scale)
        except ValueError as error:
            raise ValueError(f"{self.path} is not for {self.setting}: {error}") from error
        about = {"router": self.digest, "training_seconds": training_seconds(router.provenance)}
        return Way("learned", schedule, router.plan(), about)


NAME = re.compile(r"(?P<method>.+?)__(?P<setting>.+?)__(?P<budget>\d*\.?\d+)__seed(?P<seed>\d+)")


def trained(folder: Path, settings: Collection[str] = SETTINGS.keys()) -> list[Trained]:
    """The router files in a folder; what is not named as they are is left alone.

    Raises:
        ValueError: If there is no folder, or a file names an unknown setting.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder of router files, found none at {folder}")
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        match = NAME.fullmatch(path.stem)
        if match is None:
            continue
        known([match["setting"]], settings, f"setting in the name of {path}")
        budget, seed = float(match["budget"]), int(match["seed"])
        found.append(Trained(path, match["method"], match["setting"], budget, seed))
    return found


def known(names: Iterable[str], table: Collection[str], what: str) -> None:
    """Raise a ValueError that lists the known names if one is not among them."""
    for name in names:
        if name not in table:
            raise ValueError(f"unknown {what}: {name!r}; known are {', '.join(table)}")


def training_seconds(provenance: Mapping[str, Any]) -> float | None:
    """How long a router's training took, by what its file says; None if it does not."""
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            nested = training_seconds(value)
            if nested is not None:
                return nested
        elif key in ("seconds", "training_seconds") and isinstance(value, (int, float)):
            return float(value)
    return None


def cache_mib(plan: Plan | None, images: int, guidance_scale: float) -> float:
    """MiB of kept outputs for so many images, in float32.

    Guidance takes one call of twice the images, or of a plan with two streams two calls.
    """
    if plan is None:
        return 0.0
    twice = guidance_scale != 1.0 and plan.streams == 1
    return plan.cache_bytes(images * (2 if twice else 1), torch.float32) / 2**20
