"""Router training against the same loop with the backbone's gradients on.

`python -m benchmarks.training [--device cuda]`. The published code of Learning-to-Cache never
freezes the backbone and runs the target evaluation with gradients: its parameters' gradients are
computed and thrown away. Both loops take the same steps here, in turn; their peak memory is that
of two further processes which run one loop each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import l2c
from benchmarks import results
from l2c.schedule import Schedule
from train.gates import gated
from train.pairs import Pairs
from train.seeding import generator

MODEL = Path(__file__).parents[1] / "checkpoints" / "fashion_mnist_dit"
LOOPS = ("frozen", "published")


class Loop:
    """One training loop over the same drawn data.

    Args:
        kind: "frozen", this project's, or "published".
        batch: Images per step.
        device: Where it runs.
    """

    def __init__(self, kind: str, batch: int, device: str) -> None:
        self.kind = kind
        self.device = device
        self.model: Any = l2c.load(MODEL).to(device).requires_grad_(kind == "published")
        self.schedule = Schedule.ddim(20)
        self.objective = Pairs(penalty=1e-5)
        rows = self.objective.gated(self.schedule).nonzero().flatten().tolist()
        count = len(l2c.sites(self.model))
        self.logits = {row: torch.zeros(count, device=device, requires_grad=True) for row in rows}
        self.optimizer = torch.optim.AdamW(self.logits.values(), lr=1e-3, weight_decay=0.0)
        g = generator("training benchmark")
        shape = (batch, self.model.in_channels, self.model.input_size, self.model.input_size)
        self.batch = {
            "latents": torch.randn(shape, generator=g).to(device),
            "labels": (torch.arange(batch) % self.model.num_classes).to(device),
        }

    def weights(self, row: int) -> torch.Tensor:
        """Soft gate weights of an evaluation."""
        return self.logits[row].sigmoid()

    def step(self, index: int) -> float:
        """One optimizer step; returns the loss."""
        g = generator("training benchmark", index)
        self.optimizer.zero_grad()
        self.model.zero_grad()
        if self.kind == "frozen":
            loss = self.objective.loss(self.model, self.schedule, self.weights, self.batch, g).total
        else:
            loss = self._published(g)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _published(self, g: torch.Generator) -> torch.Tensor:
        pair = self.objective.draw(self.model, self.schedule, self.batch, g)
        target = self.model(*pair.inputs)
        scores = self.weights(pair.row)
        with gated(self.model, pair.outputs, scores):
            student = self.model(*pair.inputs)
        return (target - student).square().mean() + self.objective.penalty * scores.sum()


def timed(loop: Loop, index: int) -> tuple[float, float]:
    """Loss and seconds of one step."""
    start = time.perf_counter()
    loss = loop.step(index)  # reads the loss, so the device is done
    return loss, time.perf_counter() - start


def resident(field: str) -> int:
    """Memory of this process in bytes, from Linux: VmRSS now, VmHWM at its highest."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def peak(kind: str, batch: int, device: str, steps: int = 3) -> int:
    """Peak memory in bytes beyond what model, data and libraries take, in this process."""
    loop = Loop(kind, batch, device)
    if device == "cpu":
        before = resident("VmRSS")
        for index in range(steps):
            loop.step(index)
        return resident("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for index in range(steps):
        loop.step(index)
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Measure both loops."""
    parser = argparse.ArgumentParser("python -m benchmarks.training", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15, help="pairs of steps")
    parser.add_argument("--peak", choices=LOOPS, help="print one loop's peak memory and stop")
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.peak, options.batch_size, options.device)))
        return
    frozen, published = (Loop(kind, options.batch_size, options.device) for kind in LOOPS)
    ratios, same = [], []
    for index in tqdm(range(-2, options.steps), desc="pairs of steps"):
        loss, slow = timed(published, index + 2)
        other, fast = timed(frozen, index + 2)
        same.append(abs(loss - other) / loss)
        if index >= 0:  # the first two warm up
            ratios.append(slow / fast)
    command = [sys.executable, "-m", "benchmarks.training", "--device", options.device]
    command += ["--batch-size", str(options.batch_size), "--peak"]
    memory = {
        kind: int(subprocess.run([*command, kind], check=True, capture_output=True).stdout)
        for kind in LOOPS
    }
    figures = {
        "steps_per_second_ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "peak_bytes": memory,
        "peak_ratio": memory["frozen"] / memory["published"],
        "largest_relative_difference_of_losses": max(same),
        "batch": options.batch_size,
        "steps": options.steps,
    }
    print(
        f"{figures['steps_per_second_ratio']:.2f}x the steps per second "
        f"({min(ratios):.2f} to {max(ratios):.2f}), peak memory of a step "
        f"{memory['frozen'] / 2**20:.0f} MiB against {memory['published'] / 2**20:.0f} MiB"
    )
    results.write("training", options.device, 0, **figures)


if __name__ == "__main__":
    main()
