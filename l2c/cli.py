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
    from l2c.show import decided_by, described, text

    router = Router.load(options.router)
    plan, profile = _chosen(router, options.threshold, options.budget, options.profile)
    if options.png:
        from l2c.picture import draw_router

        draw_router(router, options.png)
    by = decided_by(router, options.threshold, options.budget)
    if options.json:
        print(json.dumps(described(router, plan, profile, by), indent=2))
    else:
        print(text(router, plan, profile, by), plan, sep="\n\n", flush=True)


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
