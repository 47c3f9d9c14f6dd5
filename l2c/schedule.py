"""Which solver runs, with which options, and the timesteps of its model evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from l2c.noise import Flow, Noise, Process, process

Spacing = Callable[[int, int], list[int]]


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
    timesteps: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    noise: Process = field(default_factory=Noise)

    def __post_init__(self) -> None:
        if not self.timesteps:
            raise ValueError("expected at least one evaluation, got no timesteps")
        first, last = self.noise.first, self.noise.last
        outside = [t for t in self.timesteps if not first <= t <= last]
        if outside:
            raise ValueError(f"expected timesteps between {first} and {last}, got {outside[0]}")
        if len(self) % self.evaluations_per_step:
            raise ValueError(
                f"{self.solver} takes {self.evaluations_per_step} evaluations per step; expected a "
                f"multiple of that, got {len(self)}"
            )

    @property
    def evaluations_per_step(self) -> int:
        """Model evaluations in one step of the solver; no two of a step should share a cache."""
        return 2 if self.solver == "dpm_solver_2" else 1

    @classmethod
    def of(cls, solver: str, evaluations: int, **options: Any) -> Schedule:
        """The schedule of a solver by name, e.g. `Schedule.of("ddim", 20, spacing="trailing")`.

        Raises:
            ValueError: If the solver is unknown, or an option does not fit it.
        """
        makers: dict[str, Callable[..., Schedule]] = {
            "ddim": cls.ddim,
            "dpm_solver_2": cls.dpm_solver_2,
            "dpm_solver_pp_2m": cls.dpm_solver_pp_2m,
            "unipc": cls.unipc,
            "flow_euler": cls.flow_euler,
        }
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
        _check_count(evaluations, noise)
        ids = _spaced(SPACINGS, spacing)(evaluations, noise.timesteps)
        return cls("ddim", tuple(i + noise.first for i in ids), {"spacing": spacing}, noise)

    @classmethod
    def dpm_solver_2(
        cls,
        evaluations: int,
        spacing: str = "time",
        prediction: str = "data",
        noise: Noise | None = None,
    ) -> Schedule:
        """DPM-Solver-2, singlestep: each step evaluates at its start and at its middle in log-SNR.

        Runs from the noise's last timestep to its first, as U-ViT's own sampler does.

        Args:
            evaluations: Number of model evaluations, two per step.
            spacing: "time" for steps of equal time, or "log_snr" of equal log-SNR.
            prediction: What is expanded: "data" as in the code of U-ViT and Learning-to-Cache
                (DPM-Solver++ 2S, Lu et al. 2022b, algorithm 1), or "noise" (DPM-Solver-2, Lu et
                al. 2022a, algorithm 1).
            noise: The model's forward process; U-ViT's by default.

        Raises:
            ValueError: If the number of evaluations is odd, or an option is unknown.
        """
        noise = noise or Noise.uvit()
        _check_count(evaluations, noise)
        if prediction not in ("data", "noise"):
            raise ValueError(f'prediction must be "data" or "noise", got {prediction!r}')
        options = {"spacing": spacing, "prediction": prediction}
        grid = _grid(spacing, (evaluations + 1) // 2, noise)  # an odd number is refused below
        timesteps = []
        for start, end in pairwise(grid):
            middle = (noise.half_log_snr(start) + noise.half_log_snr(end)) / 2
            timesteps += [_rounded(start), _rounded(noise.timestep(middle))]
        return cls("dpm_solver_2", tuple(timesteps[:evaluations]), options, noise)

    @classmethod
    def dpm_solver_pp_2m(
        cls, evaluations: int, spacing: str = "log_snr", noise: Noise | None = None
    ) -> Schedule:
        """DPM-Solver++ 2M, multistep (Lu et al. 2022b, algorithm 2), down to the clean sample.

        Args:
            evaluations: Number of steps, one model evaluation each.
            spacing: "log_snr", evenly in log-SNR from the last timestep to the first; or
                "linspace", "leading" or "trailing", the ids of diffusers' scheduler of this name.
            noise: The model's forward process; DiT's by default.

        Raises:
            ValueError: If there are more evaluations than timesteps, or the spacing is unknown.
        """
        return cls._multistep("dpm_solver_pp_2m", evaluations, spacing, noise)

    @classmethod
    def unipc(
        cls, evaluations: int, spacing: str = "log_snr", noise: Noise | None = None
    ) -> Schedule:
        """UniPC of order 2, multistep (Zhao et al. 2023, B_2(h)), down to the clean sample.

        Args:
            evaluations: Number of steps, one model evaluation each.
            spacing: As for `dpm_solver_pp_2m`.
            noise: The model's forward process; DiT's by default.

        Raises:
            ValueError: If there are more evaluations than timesteps, or the spacing is unknown.
        """
        return cls._multistep("unipc", evaluations, spacing, noise)

    @classmethod
    def _multistep(
        cls, solver: str, evaluations: int, spacing: str, noise: Noise | None
    ) -> Schedule:
        noise = noise or Noise()
        _check_count(evaluations, noise)
        if spacing == "log_snr":
            # To whole timesteps: the models were trained on no others.
            ids = [round(t) for t in _grid(spacing, max(1, evaluations - 1), noise)][:evaluations]
        else:
            found = _spaced(MULTISTEP_SPACINGS, spacing)(evaluations, noise.timesteps)
            ids = [i + noise.first for i in found]
        if len(set(ids)) < evaluations:
            raise ValueError(
                f"{evaluations} evaluations are too many for spacing {spacing}: timesteps of low "
                "noise would coincide; take fewer, or spacing trailing"
            )
        return cls(solver, tuple(ids), {"spacing": spacing}, noise)

    @classmethod
    def flow_euler(
        cls, evaluations: int, shift: float = 1.0, noise: Flow | None = None
    ) -> Schedule:
        """Euler's method on a rectified flow, in equal steps of s from 1 to 0 before the shift.

        Args:
            evaluations: Number of steps, one model evaluation each.
            shift: Moves the steps to the noisy end, s -> shift s / (1 + (shift - 1) s) (Esser et
                al. 2024, eq. 23).
            noise: The model's forward process.

        Raises:
            ValueError: If there is no evaluation, or the shift is not positive.
        """
        noise = noise or Flow()
        if not isinstance(noise, Flow):
            raise ValueError(f"flow_euler is for rectified flows, got the noise {noise}")
        if evaluations < 1 or not shift > 0:
            raise ValueError(
                f"expected evaluations >= 1 and shift > 0, got {evaluations} and {shift}"
            )
        levels = [1 - i / evaluations for i in range(evaluations)]
        shifted = (shift * s / (1 + (shift - 1) * s) for s in levels)
        timesteps = tuple(_rounded(s * noise.timesteps) for s in shifted)
        return cls("flow_euler", timesteps, {"shift": shift}, noise)

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
            process(values["noise"]),
        )


def _check_count(evaluations: int, noise: Noise) -> None:
    if not isinstance(noise, Noise):
        raise ValueError(
            f"expected noise of a model that predicts it, got {noise}; take flow_euler"
        )
    if not 1 <= evaluations <= noise.timesteps:
        raise ValueError(f"expected between 1 and {noise.timesteps} evaluations, got {evaluations}")


def _spaced(spacings: Mapping[str, Spacing], name: str) -> Spacing:
    if name not in spacings:
        raise ValueError(f"unknown spacing {name!r}; known are {', '.join(spacings)}")
    return spacings[name]


def _rounded(t: float) -> float:
    # Schedules are compared exactly, and the last bits of a logarithm differ between machines.
    return round(t, 4)


def _grid(spacing: str, steps: int, noise: Noise) -> list[float]:
    """The `steps + 1` ends of equal steps from the last timestep to the first."""
    if spacing not in ("time", "log_snr"):
        raise ValueError(f"unknown spacing {spacing!r}; known are time, log_snr")
    shares = [i / steps for i in range(steps + 1)]
    if spacing == "time":
        return [noise.last - (noise.last - noise.first) * share for share in shares]
    low, high = noise.half_log_snr(noise.last), noise.half_log_snr(noise.first)
    inner = [noise.timestep(low + (high - low) * share) for share in shares[1:-1]]
    return [noise.last, *inner, noise.first]


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


def _linspace_multistep(evaluations: int, timesteps: int) -> list[int]:
    stride = (timesteps - 1) / evaluations  # first, as NumPy does: it decides where halves go
    return [round(i * stride) for i in range(evaluations, 0, -1)]


def _leading_multistep(evaluations: int, timesteps: int) -> list[int]:
    stride = timesteps // (evaluations + 1)
    return [i * stride for i in range(evaluations, 0, -1)]


SPACINGS: Mapping[str, Spacing] = {
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
}
MULTISTEP_SPACINGS: Mapping[str, Spacing] = {
    "linspace": _linspace_multistep,
    "leading": _leading_multistep,
    "trailing": _trailing,
}
