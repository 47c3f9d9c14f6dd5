"""Execution of a plan on a model: the only state is here, and it ends with the `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from l2c.attach import Call, attached, replaced, residual
from l2c.conditioning import ahead
from l2c.plan import NEVER, Plan
from l2c.reuse import Mixture
from l2c.runs import Runs
from l2c.site import sites
from l2c.sums import Sums


class Cache:
    """The kept outputs of one generation, and the evaluation that comes next.

    Args:
        plan: What each evaluation computes.
        streams: How many calls of the model make up an evaluation, each with outputs of its own:
            2 where the conditional and the unconditional prediction are separate calls.

    Attributes:
        sums: What the runs of reused sites add; None where sites are reused one by one.
    """

    def __init__(self, plan: Plan, streams: int | None = None) -> None:
        streams = plan.streams if streams is None else streams
        if streams < 1:
            raise ValueError(f"expected streams of at least 1, got {streams}")
        if plan.streams not in (1, streams):
            raise ValueError(
                f"this plan decides about {plan.streams} calls in an evaluation separately, got "
                f"streams={streams}; call the model {plan.streams} times, as guidance_calls=2 does"
            )
        self.plan = plan if plan.streams == streams else plan.repeated(streams)
        self.streams: tuple[dict[int, dict[int, Any]], ...] = tuple({} for _ in range(streams))
        self.lent: dict[int, Any] = {}
        self.sums: Sums | None = None
        self._mixtures: dict[tuple[int, int], Mixture] = {}
        self.calls = 0
        self._running = False
        self._shape: tuple[int, ...] | None = None

    @property
    def evaluation(self) -> int:
        """The evaluation that comes next, or of which calls are still to come."""
        return self.calls // self.plan.streams

    @property
    def outputs(self) -> dict[int, dict[int, Any]]:
        """The kept outputs that the next call may reuse, by site index and row of the plan."""
        return self.streams[self.calls % self.plan.streams]

    def reset(self) -> None:
        """Forget everything and start at evaluation 0: call it between generations."""
        self.clear()
        self.calls = 0
        self._running = False
        self._shape = None

    def clear(self) -> None:
        """Let go of the kept outputs."""
        for outputs in (*self.streams, self.lent):
            outputs.clear()
        if self.sums is not None:
            self.sums.clear()

    def find_runs(self, model: nn.Module) -> None:
        """Apply runs in one pass, if the model says how and its gates are known beforehand."""
        adding, known = residual(model), ahead(model)
        if adding is None or known is None or known.calls != len(self.plan.compute):
            return
        if len(set(known.sizes)) > 1:
            return  # an output weighs on calls to come, sample by sample
        runs = Runs.of(self.plan, adding.begins, bool(adding.gates))
        if runs.runs:
            self.sums = Sums(runs, adding, known.gates(adding), next(model.parameters()).device)

    def wrap_forward(self, forward: Call) -> Call:
        """Count the model's calls, and leave out blocks that compute nothing."""

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            self._begin(next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None))
            if self.sums is None:
                out = forward(*args, **kwargs)
            else:
                with replaced(*self.sums.blocks(self.calls)):
                    out = forward(*args, **kwargs)
            self._running = False
            self.calls += 1
            return out

        return evaluate

    def _begin(self, latents: Tensor | None) -> None:
        if self._running:
            raise ValueError(
                f"evaluation {self.evaluation} of this generation was interrupted by an error; "
                "call cache.reset() and start the generation again"
            )
        if self.evaluation >= len(self.plan):
            raise ValueError(
                f"the plan has {len(self.plan)} evaluations and the model was called once more; "
                "call cache.reset() between generations, or use a plan of the right length"
            )
        shape = None if latents is None else tuple(latents.shape)
        if self.calls and shape != self._shape:
            raise ValueError(
                f"expected inputs of shape {self._shape} as in evaluation 0, got {shape} in "
                f"evaluation {self.evaluation}; call cache.reset() to start another generation"
            )
        self._shape = shape
        self._running = True

    @property
    def _tables(self) -> Plan | Runs:
        return self.plan if self.sums is None else self.sums.runs

    def _mixture(self, row: int, index: int, like: Tensor) -> Mixture:
        # On the device of the first run for good: what was learned moves there once.
        if (row, index) not in self._mixtures:
            numbers = self._tables.mixtures[row][index]
            assert numbers is not None
            self._mixtures[row, index] = numbers.to(like)
        return self._mixtures[row, index]

    def wrap_site(self, index: int, call: Call) -> Call:
        """Compute the site or form its output from kept ones, as the plan says for this row."""

        def run(*args: Any, **kwargs: Any) -> Any:
            row, kept = self.calls, self.outputs.setdefault(index, {})
            plan = self._tables
            # What the other stream gave in this evaluation, if this one is kept relative to it.
            base = self.lent.pop(index, None)
            if self.plan.compute[row][index]:
                out = call(*args, **kwargs)
                if self.sums is not None:
                    self.sums.add(row, index, out)
                if plan.last_read[row][index] != NEVER:
                    kept[row] = out if base is None else out - base
            else:
                sources = plan.sources[row][index]
                # Of its own stream, but where runs are used and the rule is for differences.
                held = [self.streams[s % self.plan.streams][index] for s in sources]
                read = [outputs[s] for outputs, s in zip(held, sources, strict=True)]
                out = self._mixture(row, index, read[0]).apply(read)
                out = out if base is None else out + base
                for outputs, source in zip(held, sources, strict=True):
                    if plan.last_read[source][index] == row:  # nothing reads it again
                        del outputs[source]
            if plan.lent[row][index]:
                self.lent[index] = out
            return out

        return run

    def wrap_join(self, index: int, call: Call) -> Call:
        """Add a site's output to the tokens, or that of the whole run that begins with it."""
        sums = self.sums
        assert sums is not None

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if sums.runs.at[self.calls][index] is None:
                return call(x, *args, **kwargs)
            return sums.onto(x, self.calls, index)

        return run


@contextmanager
def cached(
    model: nn.Module, plan: Plan, streams: int | None = None, runs: bool = True
) -> Iterator[Cache]:
    """Run a model by a plan inside a `with` block; on exit, also by an error, it is as before.

    Every `streams` calls of the model are one evaluation of the plan. One generation runs at a
    time; call `reset()` on the yielded cache before the next one.

    Inside of `l2c.conditioning.prepared`, as in `sample`, consecutive reused sites are applied in
    one pass (see `l2c.runs`), which adds up in another order than one after the other. Elsewhere,
    or with `runs=False`, results are those of `train.gates` bit for bit.

    Args:
        model: A backbone whose sites are the plan's.
        plan: What each evaluation computes.
        streams: Calls per evaluation, which come in the same order every time and share no
            output: 2 for guidance in two calls, conditional and unconditional. By default the
            plan's own.
        runs: Apply consecutive reused sites in one pass, where that can be done and saves time.

    Raises:
        ValueError: If the plan is for other sites or streams, or the model is cached already.
    """
    here = sites(model)
    if here.names != plan.sites.names:
        raise ValueError(
            f"expected a plan for the {len(here)} sites {here[0].name} to "
            f"{here[len(here) - 1].name} of this {type(model).__name__}, got one for "
            f"{len(plan.sites)} sites {plan.sites[0].name} to "
            f"{plan.sites[len(plan.sites) - 1].name}"
        )
    cache = Cache(plan, streams)
    if runs:
        cache.find_runs(model)
    wrap_join = None if cache.sums is None else cache.wrap_join
    try:
        with attached(model, cache.wrap_site, cache.wrap_forward, wrap_join):
            yield cache
    finally:
        cache.clear()
