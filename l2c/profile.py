"""What an evaluation costs on a device: the measured time of every site, and of the rest."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from l2c.attach import Call, attached
from l2c.conditioning import prepared
from l2c.files import replacing
from l2c.identity import Identity
from l2c.site import Site, Sites, sites
from l2c.version import __version__

FORMAT = 1
WARM_UP = 3  # evaluations


@dataclass(frozen=True)
class Profile:
    """Times of one evaluation of a model on one device, medians of several.

    Args:
        identity: The model. Its weights make no difference to times.
        model_sites: Its sites, as `l2c.sites` lists them.
        seconds: Time of each site.
        rest: Seconds outside of all sites, conditioning that is computed ahead of the loop left
            out as in `sample`.
        batch: Samples in a call of the model: with guidance in one batch, twice the images.
        machine: Device, threads, precision and versions: plain values for people to read.

    Raises:
        ValueError: If there is not a time for each site, or a time is not positive.
    """

    identity: Identity
    model_sites: Sites
    seconds: tuple[float, ...]
    rest: float
    batch: int
    machine: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(self.seconds) != len(self.model_sites):
            raise ValueError(
                f"expected times of {len(self.model_sites)} sites, got {len(self.seconds)}"
            )
        for name, value in zip((*self.model_sites.names, "the rest"), self._times, strict=True):
            if not 0 < value < float("inf"):
                raise ValueError(f"expected a positive time of {name}, got {value}; measure again")
        if self.batch < 1:
            raise ValueError(f"expected a batch of at least 1, got {self.batch}")

    @property
    def _times(self) -> tuple[float, ...]:
        return (*self.seconds, self.rest)

    @property
    def total(self) -> float:
        """Seconds of an evaluation that computes everything."""
        return sum(self._times)

    def sites(self, model_sites: Sites) -> Sites:
        """The sites with nanoseconds in the place of multiply-accumulates.

        As in `router.plan(budget=0.5, costs=profile.sites(router.sites))`: half of the time.

        Args:
            model_sites: Sites of the model that is to be run: they must be those measured.

        Raises:
            ValueError: If the profile is of another model, naming what differs.
        """
        theirs = {(site.name, site.macs, site.shape) for site in model_sites}
        for site in self.model_sites:
            if (site.name, site.macs, site.shape) not in theirs:
                raise ValueError(
                    f"this profile is of another model: it has the site {site.name} with "
                    f"{site.macs} MACs and outputs of shape {site.shape}, expected one of the "
                    f"{len(model_sites)} sites {model_sites[0].name} to "
                    f"{model_sites[len(model_sites) - 1].name}; measure yours by `l2c profile`"
                )
        if self.model_sites != model_sites:
            raise ValueError(
                f"this profile is of another model: expected {len(model_sites)} sites and "
                f"{model_sites.rest} MACs outside of them, got {len(self.model_sites)} and "
                f"{self.model_sites.rest}; measure yours by `l2c profile`"
            )
        costs = (max(1, round(seconds * 1e9)) for seconds in self.seconds)
        priced = [
            Site(site.name, cost, site.shape) for site, cost in zip(model_sites, costs, strict=True)
        ]
        return Sites(tuple(priced), max(1, round(self.rest * 1e9)))

    def __str__(self) -> str:
        return (
            f"{self.identity.backbone} on {self.machine.get('device', 'an unknown device')}, "
            f"batch {self.batch}, {self.machine.get('dtype', 'unknown precision')}: "
            f"{self.total * 1e3:.3f} ms per evaluation, {self.rest / self.total:.1%} outside of "
            "all sites"
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        content = {
            "profile": FORMAT,
            "version": __version__,
            "identity": {
                "backbone": self.identity.backbone,
                "config": dict(self.identity.config),
                "weights": self.identity.weights,
            },
            "machine": dict(self.machine),
            "batch": self.batch,
            "sites": [
                {"name": s.name, "macs": s.macs, "shape": list(s.shape), "seconds": seconds}
                for s, seconds in zip(self.model_sites, self.seconds, strict=True)
            ],
            "rest": {"macs": self.model_sites.rest, "seconds": self.rest},
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a file of `save`.

        Raises:
            ValueError: If it does not exist, or is damaged, foreign or of another format.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"expected a profile at {path}, found none; `l2c profile` writes one")
        try:
            content = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON file of a profile: {error}") from error
        if not isinstance(content, dict) or "profile" not in content:
            raise ValueError(f"{path} is no profile; expected a file written by `l2c profile`")
        if content["profile"] != FORMAT:
            raise ValueError(
                f"{path} has profile format {content['profile']!r:.60}, this version of l2c reads "
                f"format {FORMAT}; measure again by `l2c profile`"
            )
        try:
            return cls._of(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is incomplete: {error!r}; measure again") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a usable profile: {error}") from error

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Profile:
        identity, rest = content["identity"], content["rest"]
        listed = [
            Site(
                _typed(site["name"], str),
                _typed(site["macs"], int),
                tuple(_typed(size, int) for size in site["shape"]),
            )
            for site in content["sites"]
        ]
        return cls(
            Identity(
                _typed(identity["backbone"], str),
                _typed(identity["config"], dict),
                _typed(identity["weights"], str | None),
            ),
            Sites(tuple(listed), _typed(rest["macs"], int)),
            tuple(_typed(site["seconds"], float | int) for site in content["sites"]),
            _typed(rest["seconds"], float | int),
            _typed(content["batch"], int),
            _typed(content["machine"], dict),
        )


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind}, found {value!r}")
    return value


@torch.no_grad()
def measure(model: Any, batch: int = 1, runs: int = 15, progress: bool = False) -> Profile:
    """Measure a model where and in the precision that it is in.

    Every run is a whole evaluation in which each site is timed in its turn, so that whatever else
    the machine does meanwhile meets all of them alike.

    Args:
        model: The backbone.
        batch: Samples in a call of the model.
        runs: Evaluations that medians are taken of, after a warm-up.
        progress: Show a progress bar.

    Raises:
        ValueError: If batch or runs are below 1, the model is neither on a CPU nor on a CUDA
            device, or its class is not known.
    """
    if batch < 1 or runs < 1:
        raise ValueError(f"expected batch and runs of at least 1, got {batch} and {runs}")
    found = sites(model)
    weight = next(model.parameters())
    if weight.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"expected a model on cpu or cuda, got {weight.device}; other clocks are not read"
        )
    clock = _Clock(weight.device)
    inputs = [value.to(weight.device) for value in model.example_inputs()]
    latents, _, labels = (value.expand(batch, *value.shape[1:]) for value in inputs)
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(latents.shape, generator=g).to(weight)
    times = torch.full((batch,), float(model.noise.last), device=weight.device)
    evaluations = WARM_UP + runs
    rows: list[list[float]] = []
    with (
        prepared(model, [model.noise.last] * evaluations, [labels]),
        attached(model, clock.wrap_site, clock.wrap_forward),
    ):
        for _ in tqdm(range(evaluations), disable=not progress, unit="evaluation"):
            model(latents, times, labels)
            rows.append(clock.read())
    measured = [[total - sum(parts), *parts] for *parts, total in rows[WARM_UP:]]
    rest, *seconds = (statistics.median(column) for column in zip(*measured, strict=True))
    return Profile(Identity.of(model), found, tuple(seconds), rest, batch, _described(weight, runs))


class _Clock:
    """Times of the calls within one evaluation, by the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        self.marks: list[tuple[Any, Any]] = []

    def wrap_site(self, _: int, call: Call) -> Call:
        """Time a site."""
        return self._timed(call)

    def wrap_forward(self, forward: Call) -> Call:
        """Time the whole evaluation, which ends after its sites."""
        return self._timed(forward)

    def read(self) -> list[float]:
        """Seconds of each site and of the whole evaluation; and forget them."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
            seconds = [start.elapsed_time(end) / 1e3 for start, end in self.marks]
        else:
            seconds = [end - start for start, end in self.marks]
        self.marks.clear()
        return seconds

    def _timed(self, call: Call) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            out = call(*args, **kwargs)
            self.marks.append((start, self._now()))
            return out

        return run

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        # An event waits for no one: synchronising at every site would time the launches.
        events: Any = torch.cuda.Event
        event = events(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _described(weight: torch.Tensor, runs: int) -> dict[str, Any]:
    cuda = weight.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(weight.device) if cuda else processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "runs": runs,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "l2c": __version__,
    }


def processor() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
