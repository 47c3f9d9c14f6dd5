"""The console script: `l2c show`, `sample`, `profile`, `retarget` and `convert`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l2c.version import __version__

if TYPE_CHECKING:  # PyTorch takes seconds to import, --help must not wait for it
    from l2c.plan import Plan
    from l2c.profile import Profile
    from l2c.router import Router


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors in what the user gave are one line, with exit status 1."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:  # as in `l2c show FILE | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"l2c {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("l2c", description="Look into routers and sample with them.")
    parser.add_argument("--version", action="version", version=f"l2c {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    show = commands.add_parser("show", help="print a router: where it comes from, its plan, shares")
    show.add_argument("router", help="router file")
    show.add_argument("--threshold", type=float, help="in place of the router's own, in [0, 1]")
    _add_budget(show)
    show.add_argument("--json", action="store_true", help="print JSON instead of text")
    show.add_argument("--png", metavar="FILE", help="also draw the scores as a heat map")
    show.set_defaults(run=_show)

    convert = commands.add_parser(
        "convert",
        help="read and write published formats",
        description="Routers of Learning-to-Cache (.pt of DiT, .pth of U-ViT) and schedules of "
        "SmoothCache (.json) to router files (.safetensors), and back. Nothing in a file is run.",
    )
    convert.add_argument("source", metavar="IN", help=".pt, .pth, .json or .safetensors")
    convert.add_argument("out", metavar="OUT", help="the same; its suffix decides the format")
    convert.add_argument(
        "--model",
        help="the model: a published name such as DiT-XL/2, or a folder or checkpoint, to whose "
        "weights the router is then bound (default: what a Learning-to-Cache file tells)",
    )
    convert.add_argument("--evaluations", type=int, help="refuse a file for another number")
    convert.add_argument(
        "--threshold",
        type=float,
        help="compute above this score, in [0, 1] (default: the router file's, or the published "
        "one: 0.1 for DiT, 0.9 for its 512 x 512 model and for U-ViT)",
    )
    convert.add_argument(
        "--input-size", type=int, help="side of a published model's latent (default 32)"
    )
    convert.add_argument("--solver", help="of a SmoothCache schedule (default ddim)")
    convert.add_argument("--spacing", help="of its timesteps (default: the solver's)")
    convert.set_defaults(run=_convert)

    retarget = commands.add_parser(
        "retarget",
        help="make a router for another number of evaluations or another solver",
        description="Nothing is trained: scores and corrections are interpolated by the place in "
        "the run, and the share of the compute is kept.",
    )
    retarget.add_argument("source", metavar="IN", help="router file")
    retarget.add_argument("out", metavar="OUT", help="the new router file")
    retarget.add_argument("--evaluations", type=int, help="default: as many as before")
    retarget.add_argument("--solver", help="default: the same")
    retarget.add_argument(
        "--spacing", help="of the timesteps (default: the same, or another solver's usual one)"
    )
    retarget.set_defaults(run=_retarget)

    profile = commands.add_parser(
        "profile", help="measure the time of every site, to count budgets in"
    )
    profile.add_argument("model", help="model folder, hub id or official file")
    profile.add_argument("--out", required=True, metavar="FILE.json", help="the profile")
    profile.add_argument(
        "--batch",
        type=int,
        default=1,
        help="samples in a call of the model: with guidance in one batch, twice the images "
        "(default 1)",
    )
    profile.add_argument("--device", default="cpu", help="cpu, cuda, ... (default cpu)")
    profile.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the model (default float32)",
    )
    profile.add_argument("--runs", type=int, default=15, help="evaluations (default 15)")
    profile.set_defaults(run=_profile)

    sample = commands.add_parser("sample", help="draw samples with a router into a picture")
    sample.add_argument("router", help="router file")
    sample.add_argument("--model", required=True, help="model folder, hub id or official file")
    sample.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
    _add_budget(sample)
    sample.add_argument("--labels", help="class labels, e.g. 0,3,3 (default: the first ten)")
    sample.add_argument("--guidance-scale", type=float, default=1.5, help="default 1.5; 1: none")
    sample.add_argument("--guidance-channels", type=int, help="guide the first so many channels")
    sample.add_argument(
        "--guidance-calls",
        type=int,
        default=1,
        help="1: both predictions in one batch of twice the size (default), 2: one after another",
    )
    sample.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    sample.add_argument("--vae", help="diffusers AutoencoderKL for latent models: folder or hub id")
    sample.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there)")
    sample.add_argument(
        "--compare", action="store_true", help="draw uncached samples of the same noise above"
    )
    sample.set_defaults(run=_sample)
    return parser


def _add_budget(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget", type=float, help="share of the compute to keep to, in (0, 1], by the scores"
    )
    command.add_argument(
        "--profile", metavar="FILE", help="count the budget in the times of `l2c profile`"
    )


def _chosen(
    router: Router, threshold: float | None, budget: float | None, profile: str | None
) -> tuple[Plan, Profile | None]:
    """The plan that is asked for, and the profile."""
    from l2c.profile import Profile

    measured = Profile.load(profile) if profile else None
    costs = measured.sites(router.sites) if measured else None
    return router.plan(threshold, budget=budget, costs=costs), measured


def _show(options: Any) -> None:
    from l2c.router import Router

    router = Router.load(options.router)
    plan, profile = _chosen(router, options.threshold, options.budget, options.profile)
    if options.png:
        from l2c.picture import draw_router

        draw_router(router, options.png)
    by = _decided_by(router, options.threshold, options.budget)
    if options.json:
        print(json.dumps(_described(router, plan, profile, by), indent=2))
    else:
        print(_text(router, plan, profile, by), plan, sep="\n\n", flush=True)


def _decided_by(
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
    from l2c.plan import Plan

    return Plan(plan.compute, profile.sites(plan.sites), streams=plan.streams).share


def _described(
    router: Router, plan: Plan, profile: Profile | None, by: dict[str, float | None]
) -> dict[str, Any]:
    described = {
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
        described["time"] = {
            "share": share,
            "speedup": 1 / share,
            "seconds_full_evaluation": profile.total,
            "batch": profile.batch,
            "machine": dict(profile.machine),
        }
    return described


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


def _text(router: Router, plan: Plan, profile: Profile | None, by: dict[str, float | None]) -> str:
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
        "unsaturated": f"{router.unsaturated:.1%} of the gated scores lie in (0.05, 0.95)",
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
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if nested else str(value)
        lines[key.replace("_", " ")] = text
    width = max(map(len, lines))
    text = "\n".join(f"{key:>{width}}  {value}" for key, value in lines.items())
    return f"{text}\n\n{table}" if table else text


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


def _convert(options: Any) -> None:
    from l2c.published import read, write

    router = read(
        options.source,
        options.model,
        evaluations=options.evaluations,
        threshold=options.threshold,
        input_size=options.input_size,
        solver=options.solver,
        spacing=options.spacing,
    )
    lost = write(router, options.out)
    plan = router.plan()
    gated = int(router.gated.sum()) * len(router.sites)
    print(
        f"{router.identity.backbone}, weights {router.identity.brief}, {router.schedule}: "
        f"{plan.reused} of {gated} gated outputs reused ({plan.reused / max(1, gated):.2%}), "
        f"{plan.share:.1%} of the MACs"
    )
    print(f"wrote {options.out}", *(f"not in it: {what}" for what in lost), sep="\n")


def _retarget(options: Any) -> None:
    from l2c.router import Router
    from l2c.schedule import Schedule

    router = Router.load(options.source)
    old = router.schedule
    solver = options.solver or old.solver
    chosen = dict(old.options) if solver == old.solver else {}
    if options.spacing:
        chosen["spacing"] = options.spacing
    count = len(old) if options.evaluations is None else options.evaluations
    made = router.retarget(Schedule.of(solver, count, noise=old.noise, **chosen))
    made.save(options.out)
    plan = made.plan()
    print(
        f"{made.schedule}, from {old}: {plan.share:.1%} of the MACs, before "
        f"{router.plan().share:.1%}; nothing was trained or measured for it",
        f"wrote {options.out}",
        sep="\n",
    )


def _profile(options: Any) -> None:
    import torch

    from l2c.loading import load
    from l2c.profile import measure

    model = load(options.model).to(options.device, getattr(torch, options.dtype))
    profile = measure(model, options.batch, options.runs, progress=True)
    profile.save(options.out)
    print(profile, f"wrote {options.out}", sep="\n")


def _sample(options: Any) -> None:
    import torch

    from l2c.loading import load
    from l2c.picture import draw_samples
    from l2c.router import Router
    from l2c.sampling import sample

    router = Router.load(options.router)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(options.model).to(device)
    labels = list(range(min(10, model.num_classes)))
    if options.labels:
        try:
            labels = [int(label) for label in options.labels.split(",")]
        except ValueError as error:
            raise ValueError(f"expected labels like 0,3,3, got {options.labels!r}") from error
    vae = None
    if options.vae:
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(options.vae).to(device)
    elif model.in_channels not in (1, 3):
        raise ValueError(
            f"this model makes latents of {model.in_channels} channels; name the decoder by --vae"
        )
    if options.profile and options.budget is None and router.budget is None:
        raise ValueError("a profile is to count a budget in, and there is none; give --budget")
    router.check(model, router.schedule, options.guidance_scale)
    plan, _ = _chosen(router, None, options.budget, options.profile)
    runs = {"cached": plan} if not options.compare else {"uncached": None, "cached": plan}
    rows = {}
    for name, chosen in runs.items():
        images = sample(
            model,
            router.schedule,
            labels,
            options.guidance_scale,
            options.guidance_channels,
            options.guidance_calls,
            plan=chosen,
            generator=torch.Generator().manual_seed(options.seed),
            vae=vae,
            progress=True,
        )
        rows[name] = images if vae is not None else images / 2 + 0.5
    draw_samples(rows, options.out, list(map(str, labels)))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
