"""Router files of the published code of Learning-to-Cache (Ma et al. 2024), for DiT and U-ViT.

Both layouts hold one vector of logits per index, `0.prob`, `1.prob`, ..., attention and MLP of each
block in calling order; a layer is computed where sigmoid(logit) > threshold. DiT's .pt keeps them
under `routers`, beside the optimizer's state and the command line; U-ViT's .pth is the state dict
alone. As many indices as evaluations are stored, but at most half of them were ever trained:

- DiT: the index counts the steps of the respaced DDIM from the last one. Odd steps are computed in
  full, even ones are cached, the last denoising step among them (`dynamic_models.py`).
- U-ViT: the index counts the steps of the solver from the first one. The first evaluation of each
  step is cached, the step before having filled the cache with its second; the first step computes
  everything, and so do all second evaluations (`uvit_dynamic.py`).
"""

from __future__ import annotations

import argparse
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2c.files import replacing
from l2c.noise import Noise
from l2c.router import UNCOUNTED, Router
from l2c.schedule import Schedule
from l2c.site import Sites

LIMIT = 200.0  # a logit whose sigmoid is exactly 0 or 1 in float32


@dataclass(frozen=True)
class Layout:
    """Which model and schedule a published layout is for, and where its rows belong.

    Args:
        backbone: Name of the class of its models.
        suffix: How the names of its files end.
        schedule: `schedule(evaluations, noise=...)` makes the only schedule that it can mean.
        rows: `rows(evaluations)` maps each index that counts to its evaluation in calling order.
    """

    backbone: str
    suffix: str
    schedule: Callable[..., Schedule]
    rows: Callable[[int], dict[int, int]]


def _dit_rows(evaluations: int) -> dict[int, int]:
    # The first evaluation has an even index where their number is odd, but nothing to reuse.
    return {i: evaluations - 1 - i for i in range(0, evaluations - 1, 2)}


def _uvit_rows(evaluations: int) -> dict[int, int]:
    return {step: 2 * step for step in range(1, evaluations // 2)}


LAYOUTS = {
    "DiT": Layout("DiT", ".pt", Schedule.ddim, _dit_rows),
    "UViT": Layout("UViT", ".pth", Schedule.dpm_solver_2, _uvit_rows),
}


@dataclass(frozen=True)
class Published:
    """What a published file holds.

    Args:
        layout: Its layout.
        logits: [index, site].
        steps: Optimizer steps that trained each index; None where the file does not tell.
        arguments: The command line of the training, plain values alone.
    """

    layout: Layout
    logits: Tensor
    steps: Mapping[int, int] | None
    arguments: Mapping[str, Any]

    def tensors(self, sites: Sites, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
        """The scores, gated and updates of a `Router`; scores are 1 where no index counts.

        Raises:
            ValueError: If the file is for another number of sites or evaluations.
        """
        indices, width = self.logits.shape
        if width != len(sites):
            raise ValueError(f"it has {width} gates in a row, the model has {len(sites)} sites")
        if indices != len(schedule):
            raise ValueError(f"it has {indices} rows, the schedule {len(schedule)} evaluations")
        scores = torch.ones(indices, width)
        gated = torch.zeros(indices, dtype=torch.bool)
        updates = torch.zeros(indices, dtype=torch.long)
        for index, row in self.layout.rows(indices).items():
            scores[row] = _scores(self.logits[index])
            gated[row] = True
            updates[row] = UNCOUNTED if self.steps is None else self.steps.get(index, 0)
        return scores, gated, updates


def read(path: Path) -> Published:
    """Read a published file of either layout, by its content, running nothing that is in it.

    Raises:
        ValueError: If it holds anything but tensors, plain values and an argparse.Namespace, or
            no logits in a published layout.
    """
    content = _unpickled(path)
    try:
        if isinstance(content, dict) and "routers" in content:
            logits = _logits(content["routers"])
            steps = _steps(content.get("opt"), len(logits))
            return Published(LAYOUTS["DiT"], logits, steps, _plain(content.get("args")))
        return Published(LAYOUTS["UViT"], _logits(content), None, {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write(router: Router, path: Path) -> list[str]:
    """Write a router in the layout of the path's suffix, for the published sampling code.

    Returns:
        What the file does not hold, or not as it was: a sentence each.

    Raises:
        ValueError: If the layout is for another backbone or schedule, or means other evaluations
            than those that the router decides about.
    """
    layout = next(known for known in LAYOUTS.values() if known.suffix == path.suffix.lower())
    rows = _fitting(router, layout)
    trained = router.gated & (router.updates != 0)
    scores = torch.where(trained[:, None], router.scores, 1).float().cpu()
    logits = torch.full_like(scores, LIMIT, dtype=torch.float64)
    for index, row in rows.items():
        logits[index] = scores[row].double().logit().clamp(-LIMIT, LIMIT)
    # float32 as published, unless that rounds a score.
    if torch.equal(_scores(logits.float()), _scores(logits)):
        logits = logits.float()
    state = OrderedDict((f"{index}.prob", row.clone()) for index, row in enumerate(logits))
    content = {"routers": state} if layout.backbone == "DiT" else state
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
    lost = [
        f"the threshold: give {router.threshold:g} to the published code",
        "the model, the timesteps, the provenance, and how often each gate was trained",
    ]
    if bool(((scores[trained] == 0) | (scores[trained] == 1)).any()):
        lost.append(f"scores of exactly 0 and 1: their logits are -{LIMIT:g} and {LIMIT:g}")
    return lost


def _fitting(router: Router, layout: Layout) -> dict[int, int]:
    """Index to evaluation, of a layout that a router fits."""
    backbone = router.identity.backbone
    if backbone != layout.backbone:
        fitting = LAYOUTS[backbone].suffix if backbone in LAYOUTS else "safetensors"
        raise ValueError(
            f"{layout.suffix} is the layout for {layout.backbone}, this router is for {backbone}; "
            f"write {fitting}"
        )
    noise = router.schedule.noise
    if not isinstance(noise, Noise) or router.schedule.solver not in ("ddim", "dpm_solver_2"):
        raise ValueError(f"the layout for {backbone} can't mean the schedule {router.schedule}")
    meant = layout.schedule(len(router.schedule), noise=noise)
    if meant != router.schedule:
        raise ValueError(
            f"the layout for {backbone} holds no timesteps and always means {meant}; "
            f"this router has another schedule: {'; '.join(meant.differences(router.schedule))}"
        )
    rows = layout.rows(len(meant))
    foreign = sorted(set(router.gated.nonzero().flatten().tolist()) - set(rows.values()))
    if foreign:
        raise ValueError(
            f"the layout for {backbone} caches evaluations {_listed(sorted(rows.values()))} alone; "
            f"this router decides about {_listed(foreign)} too; write .safetensors or .json"
        )
    return rows


def _listed(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:6]))
    return (shown or "none") + (", ..." if len(rows) > 6 else "")


def _scores(logits: Tensor) -> Tensor:
    # In float64: what float32 makes of large logits depends on the machine.
    return logits.double().sigmoid().float()


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no such file fails in the unpickler in any way
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(
                f"{path} holds {foreign[1]}, which could run code; expected tensors, plain values "
                "and an argparse.Namespace. Nothing in it was run"
            ) from error
        raise ValueError(
            f"{path} is no whole file of torch.save with tensors and plain values alone "
            f"({type(error).__name__}); copy it again"
        ) from error


def _logits(state: Any) -> Tensor:
    found = list(state)[:3] if isinstance(state, dict) else type(state).__name__
    if not isinstance(state, dict) or not state:
        raise ValueError(f"expected logits under 0.prob, 1.prob, ..., found {found}")
    if set(state) != {f"{i}.prob" for i in range(len(state))}:
        raise ValueError(
            f"expected logits under 0.prob to {len(state) - 1}.prob, found {found}: "
            "this is no router of Learning-to-Cache"
        )
    rows = [state[f"{i}.prob"] for i in range(len(state))]
    for index, row in enumerate(rows):
        # Dense, so that no more is made of a row than the file holds.
        plain = isinstance(row, Tensor) and row.layout is torch.strided and not row.is_meta
        if not plain or not row.is_contiguous():
            raise ValueError(f"expected {index}.prob as a dense tensor, found {str(row)[:60]}")
        if row.ndim != 1 or not row.is_floating_point():
            raise ValueError(
                f"expected {index}.prob as one float per layer, "
                f"found shape {tuple(row.shape)} of {row.dtype}"
            )
        if len(row) != len(rows[0]):
            raise ValueError(f"0.prob has {len(rows[0])} gates, {index}.prob has {len(row)}")
        if bool(row.isnan().any()):
            raise ValueError(f"expected numbers in {index}.prob, found NaN")
    return torch.stack([row.double() for row in rows])


def _steps(optimizer: Any, indices: int) -> dict[int, int] | None:
    """Steps per index from the state of an optimizer of all rows in order; None without one."""
    try:
        if optimizer["param_groups"][0]["params"] != list(range(indices)):
            return None
        steps = {index: int(state["step"]) for index, state in optimizer["state"].items()}
    except Exception:  # of any shape; only a count is lost
        return None
    return steps if all(0 <= count < 2**63 for count in steps.values()) else None


def _plain(arguments: Any) -> dict[str, Any]:
    if not isinstance(arguments, argparse.Namespace):
        return {}
    kinds = (str, bool, int, float, type(None))
    return {str(k): v for k, v in vars(arguments).items() if type(v) in kinds}
