"""How good the shipped teachers are: `python -m benchmarks.teacher`.

Samples at several numbers of steps, recognised by the shipped classifier and compared with the
real test images in its features.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import l2c
from benchmarks import results
from train.quality import Judge
from train.seeding import generator

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
TEACHERS = {"fashion_mnist_dit": "ddim", "fashion_mnist_uvit": "dpm_solver_2"}


def main() -> None:
    """Measure the teacher."""
    parser = argparse.ArgumentParser("python -m benchmarks.teacher", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="model evaluations")
    parser.add_argument("--guidance-scale", type=float, default=1.5)
    options = parser.parse_args()
    judge = Judge(CHECKPOINTS / "fashion_mnist_classifier")
    rows = []
    for teacher, solver in TEACHERS.items():
        model = l2c.load(CHECKPOINTS / teacher).to(options.device)
        labels = torch.arange(options.samples) % model.num_classes
        for steps in options.steps:
            images = l2c.sample(
                model,
                l2c.Schedule.of(solver, steps, noise=model.noise),
                labels,
                options.guidance_scale,
                generator=generator("teacher benchmark"),
                batch_size=100,
                progress=True,
            ).cpu()
            row = {
                "teacher": teacher,
                "solver": solver,
                "evaluations": steps,
                "samples": options.samples,
                "guidance_scale": options.guidance_scale,
                "recognised": judge.recognised(images, labels),
                "frechet": judge.frechet(images),
            }
            rows.append(row)
            print(
                f"{teacher}, {solver} with {steps} evaluations: {row['recognised']:.1%} of "
                f"{options.samples} samples recognised, Frechet distance {row['frechet']:.2f}"
            )
    results.write("teacher", options.device, 0, rows=rows)


if __name__ == "__main__":
    main()
