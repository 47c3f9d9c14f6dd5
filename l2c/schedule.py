"""Which solver runs, with which options, and the timesteps of its model evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from l2c.noise import Noise


@dataclass(frozen=True)
class Schedule:
    """The model evaluations of one sampling run, in calling order; it knows nothing of models.

    `len(schedule)` is the number of function evaluations (NFE), and
    `len(schedule.timesteps) == len(schedule)`. Two schedules are interchangeable for a router if
    and only if they are equal.

    Args:
        solver: Name of the solver, a key of `l2c.solvers.SOLVERS`.
        timesteps: The timestep of each evaluation, in calling order.
        options: Options of the solver.
        noise: The forward process that the model was trained with.

    Raises:
        ValueError: If there are no timesteps, or one lies outside the noise's range.
    """

    solver: str
    timesteps: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    noise: Noise = field(default_factory=Noise)

    def __post_init__(self) -> None:
        if not self.timesteps:
            raise ValueError("expected at least one evaluation, got no timesteps")
        last = self.noise.timesteps - 1
        outside = [t for t in self.timesteps if not 0 <= t <= last]
        if outside:
            raise ValueError(f"expected timesteps between 0 and {last}, got {outside[0]}")

    @classmethod
    def of(cls, solver: str, evaluations: int, **options: Any) -> Schedule:
        """The schedule of a solver by name, e.g. `Schedule.of("ddim", 20, spacing="trailing")`.

        Raises:
            ValueError: If the solver is unknown, or an option does not fit it.
        """
        makers = {"ddim": cls.ddim}
        if solver not in makers:
            raise ValueError(f"unknown solver {solver!r}; known are {', '.join(makers)}")
        try:
            return makers[solver](evaluations, **options)
        except TypeError as error:
            raise ValueError(
                f"options {options} do not fit the solver {solver}: {error}"
            ) from error

    @classmethod
    def ddim(
        cls, evaluations: int, spacing: str = "linspace", noise: Noise | None = None
    ) -> Schedule:
        """Deterministic DDIM (Song et al. 2021, eq. 12 with eta = 0).

        Args:
            evaluations: Number of steps, one model evaluation each.
            spacing: "linspace", the ids of the original DiT and guided-diffusion respacing, from
                the last timestep to 0; "leading" and "trailing" as in table 2 of Lin et al. 2024,
                without an offset; equal to diffusers' where the count divides the timesteps.
            noise: The model's forward process; DiT's by default.

        Raises:
            ValueError: If there are more evaluations than timesteps, or the spacing is unknown.
        """
        noise = noise or Noise()
        if not 1 <= evaluations <= noise.timesteps:
            raise ValueError(
                f"expected between 1 and {noise.timesteps} evaluations, got {evaluations}"
            )
        if spacing not in SPACINGS:
            raise ValueError(f"unknown spacing {spacing!r}; known are {', '.join(SPACINGS)}")
        ids = SPACINGS[spacing](evaluations, noise.timesteps)
        return cls("ddim", tuple(ids), {"spacing": spacing}, noise)

    def __len__(self) -> int:
        return len(self.timesteps)

    def __str__(self) -> str:
        options = "".join(f", {key} {value}" for key, value in self.options.items())
        return f"{self.solver} with {len(self)} evaluations{options}"

    def differences(self, other: Schedule) -> list[str]:
        """What differs, a line each: "solver: expected ddim, got euler"; empty if equal."""
        mine, theirs = self.to_dict(), other.to_dict()
        lines = []
        if len(self) != len(other):
            lines.append(f"number of evaluations: expected {len(self)}, got {len(other)}")
            mine.pop("timesteps"), theirs.pop("timesteps")
        for key in mine:
            if mine[key] != theirs[key]:
                lines.append(f"{key}: expected {mine[key]}, got {theirs[key]}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "solver": self.solver,
            "options": dict(self.options),
            "timesteps": list(self.timesteps),
            "noise": self.noise.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """The inverse of `to_dict`."""
        return cls(
            values["solver"],
            tuple(values["timesteps"]),
            dict(values["options"]),
            Noise(**values["noise"]),
        )


def _linspace(evaluations: int, timesteps: int) -> list[int]:
    # Summed, not multiplied: the original respacing rounds the running sum.
    stride = (timesteps - 1) / (evaluations - 1) if evaluations > 1 else 1.0
    ids, position = [], 0.0
    for _ in range(evaluations):
        ids.append(round(position))
        position += stride
    return ids[::-1]


def _leading(evaluations: int, timesteps: int) -> list[int]:
    stride = timesteps // evaluations
    return [i * stride for i in range(evaluations)][::-1]


def _trailing(evaluations: int, timesteps: int) -> list[int]:
    stride = timesteps / evaluations
    return [round(timesteps - i * stride) - 1 for i in range(evaluations)]


SPACINGS = {"linspace": _linspace, "leading": _leading, "trailing": _trailing}
