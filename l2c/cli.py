"""The console script: `l2c show`, `l2c sample` and `l2c convert`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l2c.version import __version__

if TYPE_CHECKING:  # PyTorch takes seconds to import, --help must not wait for it
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

    sample = commands.add_parser("sample", help="draw samples with a router into a picture")
    sample.add_argument("router", help="router file")
    sample.add_argument("--model", required=True, help="model folder, hub id or official file")
    sample.add_argument("--out", required=True, metavar="FILE.png", help="the picture")
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


def _show(options: Any) -> None:
    from l2c.router import Router

    router = Router.load(options.router)
    plan = router.plan(options.threshold)
    if options.png:
        from l2c.picture import draw_router

        draw_router(router, options.png)
    if options.json:
        print(json.dumps(_described(router, options.threshold), indent=2))
    else:
        print(_text(router, options.threshold), plan, sep="\n\n", flush=True)


def _described(router: Router, threshold: float | None) -> dict[str, Any]:
    plan = router.plan(threshold)
    return {
        "backbone": {
            "class": router.identity.backbone,
            "config": dict(router.identity.config),
            "weights": router.identity.weights,
        },
        "schedule": router.schedule.to_dict(),
        "guidance_scale": router.guidance_scale,
        "threshold": router.threshold if threshold is None else threshold,
        "share": plan.share,
        "speedup": plan.speedup,
        "shares": list(plan.shares),
        "reused": plan.reused,
        "unsaturated": router.unsaturated,
        "sites": [{"name": site.name, "macs": site.macs} for site in router.sites],
        "rest_macs": router.sites.rest,
        "gated": router.gated.tolist(),
        "updates": router.updates.tolist(),
        "compute": [list(map(int, row)) for row in plan.compute],
        "scores": router.scores.tolist(),
        "provenance": dict(router.provenance),
    }


def _text(router: Router, threshold: float | None) -> str:
    plan = router.plan(threshold)
    gated = router.gated
    guidance = "any" if router.guidance_scale is None else f"{router.guidance_scale:g}"
    lines = {
        "model": f"{router.identity.backbone}, weights {router.identity.brief}",
        "schedule": str(router.schedule),
        "guidance scale": guidance,
        "threshold": f"{router.threshold if threshold is None else threshold:g}",
        "compute": f"{plan.share:.1%} of the MACs, {plan.speedup:.2f}x predicted speed-up",
        "reused": f"{plan.reused} of {int(gated.sum()) * len(router.sites)} gated outputs",
        "unsaturated": f"{router.unsaturated:.1%} of the gated scores lie in (0.05, 0.95)",
        "updates": _updates(router.updates[gated]),
    }
    for key, value in router.provenance.items():
        nested = isinstance(value, dict)
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if nested else str(value)
        lines[key.replace("_", " ")] = text
    width = max(map(len, lines))
    return "\n".join(f"{key:>{width}}  {value}" for key, value in lines.items())


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
    runs = {"cached": router} if not options.compare else {"uncached": None, "cached": router}
    rows = {}
    for name, chosen in runs.items():
        images = sample(
            model,
            router.schedule,
            labels,
            options.guidance_scale,
            options.guidance_channels,
            options.guidance_calls,
            router=chosen,
            generator=torch.Generator().manual_seed(options.seed),
            vae=vae,
            progress=True,
        )
        rows[name] = images if vae is not None else images / 2 + 0.5
    draw_samples(rows, options.out, list(map(str, labels)))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(main())
