"""What training changes: the order of the gates, and the numbers of predictions."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from l2c.reuse import Mixture, Reuse, mixture
from l2c.site import Sites

STEPS = (0.03, 1.0, 3.0, 3.0)  # of a term's correction, in units of the learning rate


class Predictions(nn.Module):
    """Corrections to an extrapolation and a shift, for each row, site and channel of a plan.

    A term's parameters are multiplied by `STEPS`, so that a step of an optimizer that makes all
    steps alike changes a prediction about as much whichever term it is: the first term is the last
    output itself, and the others are much smaller.

    Args:
        rule: The extrapolation.
        rows: Rows of the plan.
        sites: The sites.
        per: Numbers per "channel", per "site", or "none".
        shift: Have a shift per channel, unless `per` is "none".
        streams: Streams of the plan.

    Raises:
        ValueError: If `per` is unknown, or the sites' widths differ where it is "channel".
    """

    def __init__(
        self, rule: Reuse, rows: int, sites: Sites, per: str, shift: bool, streams: int
    ) -> None:
        super().__init__()
        if per not in ("channel", "site", "none"):
            raise ValueError(f'per must be "channel", "site" or "none", got {per!r}')
        widths = sorted({site.channels for site in sites})
        if per != "none" and len(widths) > 1 and (per == "channel" or shift):
            raise ValueError(f'sites differ in width ({widths}); take per="site" and shift=false')
        self.rule = rule
        self.per = per
        self.streams = streams
        width = widths[0] if per == "channel" else 1
        empty = torch.zeros(rows, len(sites), rule.order + 1, width)
        self.steps = torch.tensor(STEPS[: rule.order + 1])[:, None]  # [term, 1]
        self.corrections = nn.Parameter(empty, requires_grad=per != "none")
        flat = torch.zeros(rows, len(sites), widths[0] if len(widths) == 1 else 1)
        self.shift = nn.Parameter(flat, requires_grad=shift and per != "none")
        # Root mean square of each output, the unit of the shift. No buffer: weight averaging
        # would average it.
        self.scales = torch.ones(len(sites))

    def numbers(self, row: int, site: int, sources: list[int]) -> Mixture:
        """How a reused output of a row is formed of evaluations' outputs, differentiable."""
        correction = None
        if self.corrections.requires_grad:
            correction = self.corrections[row, site] * self.steps.to(self.corrections)
        shift = None
        if self.shift.requires_grad:
            shift = self.shift[row, site] * self.scales.to(self.shift)[site]
        return mixture(self.rule.kind, row // self.streams, sources, correction, shift)

    def reuse(self) -> Reuse:
        """The rule with what was learned so far."""
        corrections = None
        if self.corrections.requires_grad:
            corrections = (self.corrections * self.steps.to(self.corrections)).detach().cpu()
        shift = None
        if self.shift.requires_grad:
            shift = (self.shift * self.scales.to(self.shift)[:, None]).detach().cpu()
        return dataclasses.replace(self.rule, corrections=corrections, shift=shift)


class Gates(nn.Module):
    """Logits that order the gates of a plan; a budget makes a plan of their order.

    Args:
        start: Logits to start from, [row, site].
        sites: The sites.
        granularity: A logit for each "site", "block" or whole "evaluation". What is shared keeps
            the order of the start among itself.
        trained: Whether they are trained.

    Raises:
        ValueError: If the granularity is unknown.
    """

    def __init__(self, start: Tensor, sites: Sites, granularity: str, trained: bool) -> None:
        super().__init__()
        self.groups = torch.tensor(_groups(sites, granularity))
        grouped = self._grouped(start)
        self.logits = nn.Parameter(grouped, requires_grad=trained)
        self.offsets = start - grouped[:, self.groups]

    def forward(self) -> Tensor:
        """The logit of every gate, [row, site]."""
        return self.logits[:, self.groups] + self.offsets.to(self.logits)

    def scores(self) -> Tensor:
        """The order of the gates, [row, site] in [0, 1]."""
        return self().detach().float().cpu().sigmoid()

    def restart(self, start: Tensor) -> None:
        """Take another start."""
        grouped = self._grouped(start)
        self.offsets = start - grouped[:, self.groups]
        with torch.no_grad():
            self.logits.copy_(grouped)

    def threshold(self, compute: Tensor, streams: int) -> float:
        """Half way between the last gate that a plan opens and the first that it does not.

        Args:
            compute: The plan, [row, site].
            streams: Its streams, whose first rows always compute.
        """
        logits = self().detach()
        opened, closed = logits[streams:][compute[streams:]], logits[~compute]
        if not len(opened) or not len(closed):
            return 0.0
        return float(opened.min() + closed.max()) / 2

    def _grouped(self, values: Tensor) -> Tensor:
        groups = range(int(self.groups.max()) + 1)
        return torch.stack([values[:, self.groups == g].mean(1) for g in groups], 1)


def _groups(sites: Sites, granularity: str) -> list[int]:
    """Which logit each site has."""
    if granularity == "site":
        return list(range(len(sites)))
    if granularity == "evaluation":
        return [0] * len(sites)
    if granularity != "block":
        raise ValueError(
            f'granularity must be "site", "block" or "evaluation", got {granularity!r}'
        )
    blocks = [site.name.rpartition(".")[0] for site in sites]
    return [list(dict.fromkeys(blocks)).index(block) for block in blocks]
