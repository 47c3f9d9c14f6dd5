"""What `l2c show` says of a router and a plan of it."""

from __future__ import annotations

from typing import Any

from l2c.plan import Plan
from l2c.profile import Profile
from l2c.router import Router


def decided_by(
    router: Router, threshold: float | None, budget: float | None
) -> dict[str, float | None]:
    """The threshold or the budget that a plan was made by; the other is None."""
    if threshold is None and budget is None:
        budget = router.budget
    if threshold is None and budget is None:
        threshold = router.threshold
    return {"threshold": threshold, "budget": budget}


def _time_share(plan: Plan, profile: Profile) -> float:
    """Share of the measured time of the whole run, in which reusing costs nothing."""
    return Plan(plan.compute, profile.sites(plan.sites), streams=plan.streams).share


def described(
    router: Router, plan: Plan, profile: Profile | None, by: dict[str, float | None]
) -> dict[str, Any]:
    """Everything about a router and a plan of it, as plain values for JSON."""
    found: dict[str, Any] = {
        "backbone": {
            "class": router.identity.backbone,
            "config": dict(router.identity.config),
            "weights": router.identity.weights,
        },
        "schedule": router.schedule.to_dict(),
        "guidance_scale": router.guidance_scale,
        **by,
        "share": plan.share,
        "speedup": plan.speedup,
        "shares": list(plan.shares),
        "reused": plan.reused,
        "streams": plan.streams,
        "reuse": {
            "kind": plan.reuse.kind,
            "order": plan.reuse.order,
            "corrected": plan.reuse.corrections is not None,
            "shifted": plan.reuse.shift is not None,
            "relative": plan.reuse.relative,
        },
        "cache_bytes": plan.cache_bytes(),
        "ages": _ages(plan),
        "unsaturated": router.unsaturated,
        "sites": [
            {"name": site.name, "macs": site.macs, "largest_age": max(ages)}
            for site, ages in zip(router.sites, zip(*plan.ages, strict=True), strict=True)
        ],
        "rest_macs": router.sites.rest,
        "gated": router.gated.tolist(),
        "updates": router.updates.tolist(),
        "never_trained": _never_trained(router),
        "compute": [list(map(int, row)) for row in plan.compute],
        "scores": router.scores.tolist(),
        "provenance": dict(router.provenance),
    }
    if profile is not None:
        share = _time_share(plan, profile)
        found["time"] = {
            "share": share,
            "speedup": 1 / share,
            "seconds_full_evaluation": profile.total,
            "batch": profile.batch,
            "machine": dict(profile.machine),
        }
    return found


def _ages(plan: Plan) -> dict[str, dict[str, float]]:
    """How old reused outputs are, in evaluations, by kind of site."""
    ages: dict[str, list[int]] = {}
    for site, column in zip(plan.sites, zip(*plan.ages, strict=True), strict=True):
        ages.setdefault(site.name.rpartition(".")[2], []).extend(age for age in column if age)
    return {
        kind: {"mean": sum(found) / max(1, len(found)), "largest": max(found, default=0)}
        for kind, found in ages.items()
    }


def _never_trained(router: Router) -> list[int]:
    untrained: list[int] = (router.gated & (router.updates == 0)).nonzero().flatten().tolist()
    return untrained


def text(router: Router, plan: Plan, profile: Profile | None, by: dict[str, float | None]) -> str:
    """The same for people to read, a line for each fact."""
    gated = router.gated
    guidance = "any" if router.guidance_scale is None else f"{router.guidance_scale:g}"
    name, value = next((name, value) for name, value in by.items() if value is not None)
    counted = "" if name == "threshold" else " of the MACs" if profile is None else " of the time"
    ages = (
        f"{kind} {age['mean']:.1f} on average, {age['largest']} at most"
        for kind, age in _ages(plan).items()
    )
    lines = {
        "model": f"{router.identity.backbone}, weights {router.identity.brief}",
        "schedule": str(router.schedule),
        "guidance scale": guidance,
        name: f"{value:g}{counted}",
        "compute": f"{plan.share:.1%} of the MACs, {plan.speedup:.2f}x predicted speed-up",
    }
    if profile is not None:
        share = _time_share(plan, profile)
        lines["time"] = f"{share:.1%}, {1 / share:.2f}x predicted speed-up"
        lines["profile"] = str(profile)
    lines |= {
        "reused": f"{plan.reused} of {int(gated.sum()) * len(router.sites)} gated outputs",
        "rule": str(plan.reuse),
        "cache": f"{plan.cache_bytes() / 2**20:.2f} MiB per sample in float32",
        "cache age": "; ".join(ages),
    }
    if router.budget is None:  # with one, scores are only an order
        lines["unsaturated"] = f"{router.unsaturated:.1%} of the gated scores lie in (0.05, 0.95)"
    lines |= {
        "updates": _updates(router.updates[gated]),
    }
    if untrained := _never_trained(router):
        rows = sorted({row // router.streams for row in untrained})
        lines["never trained"] = f"evaluations {', '.join(map(str, rows))}"
    provenance = dict(router.provenance)
    lines |= _compared(provenance)
    table = _table(provenance.pop("measured", None))
    for key, value in provenance.items():
        nested = isinstance(value, dict)
        flat = ", ".join(f"{k} {v}" for k, v in value.items()) if nested else str(value)
        lines[key.replace("_", " ")] = flat
    width = max(map(len, lines))
    shown = "\n".join(f"{key:>{width}}  {value}" for key, value in lines.items())
    return f"{shown}\n\n{table}" if table else shown


def _compared(provenance: dict[str, Any]) -> dict[str, str]:
    """Errors that belong together, each pair in a line, taken out of provenance."""
    lines = {}
    for first, second in (("soft", "hard"), ("predicted", "measured")):
        pair = [provenance.get(f"{name}_error") for name in (first, second)]
        if all(isinstance(value, int | float) for value in pair):
            before, after = (float(provenance.pop(f"{name}_error")) for name in (first, second))
            ratio = f", {after / before:.2f} times as much" if before else ""
            lines[f"{first} and {second}"] = f"error {before:.4g}, then {after:.4g}{ratio}"
    origin = provenance.get("retargeted")
    if isinstance(origin, dict) and isinstance(origin.get("from"), dict):
        before = origin["from"]
        options = "".join(f", {key} {value}" for key, value in before.get("options", {}).items())
        count = len(before.get("timesteps", ()))
        provenance["retargeted"] = f"from {before.get('solver')} with {count} evaluations{options}"
    return lines


def _table(rows: Any) -> str:
    """Measurements of a router as a table, a line for each budget."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return "" if rows is None else f"measured: {rows}"
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(column: str, value: Any) -> str:
        if not isinstance(value, int | float):
            return "-" if value is None else str(value)
        return f"{value:.1%}" if column in ("budget", "share") else f"{value:.4g}"

    lines = [columns, *([cell(column, row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = (
        "  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True))
        for line in lines
    )
    return "\n".join(["measured", *texts])


def _updates(trained: Any) -> str:
    if not len(trained):
        return "no evaluation is gated"
    if int(trained.min()) < 0:
        return "not recorded: the scores were given"
    return f"{int(trained.min())} to {int(trained.max())} per gated evaluation"
