"""Runs of reused sites in one pass: the numbers of the per-site path, less work, less memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import l2c
from benchmarks import executor, results
from l2c import attach
from l2c.attach import Call, replaced, residual
from l2c.backbone import Backbone
from l2c.cache import Cache
from l2c.conditioning import prepared
from l2c.forms import flattened
from l2c.reuse import Reuse
from l2c.runs import Runs
from l2c.sampling import initial_latents
from tests.conftest import blocks_of, tiny_dit, tiny_uvit

ROWS = 12
SITES = 10  # of five blocks
RULES = ["copy", "taylor-1", "newton-2"]
MAKE = {"dit": lambda: tiny_dit(depth=5), "uvit": lambda: tiny_uvit(depth=4)}


@pytest.fixture(params=MAKE)
def model(request: pytest.FixtureRequest) -> Backbone:
    """One of each kind, with ten sites."""
    return MAKE[request.param]()


def rule(name: str, learned: str = "", streams: int = 1, relative: bool = False) -> Reuse:
    """A rule, with random parts per "channel" or "site" if learned."""
    g = torch.Generator().manual_seed(7)
    plain, rows = Reuse.named(name), ROWS * streams
    channels = 32 if learned == "channel" else 1
    corrections = 0.2 * torch.randn(rows, SITES, plain.order + 1, channels, generator=g)
    shift = 0.1 * torch.randn(rows, SITES, 32, generator=g)
    parts = (corrections, shift) if learned else (None, None)
    return Reuse(plain.kind, plain.order, *parts, relative)


def table(kind: str, streams: int, seed: int) -> Tensor:
    """What is computed: whole evaluations, all but a range of sites, or sites at random."""
    g = torch.Generator().manual_seed(seed)
    rows = ROWS * streams
    whole = (torch.rand(rows, 1, generator=g) < 0.35).expand(-1, SITES).clone()
    if kind == "sites":
        whole = torch.rand(rows, SITES, generator=g) < 0.3
    elif kind == "ranges":
        for row in range(0, rows, 3 * streams):  # other sites in every third evaluation
            first, last = sorted(torch.randperm(SITES + 1, generator=g)[:2].tolist())
            whole[row : row + 3 * streams, :first] = True
            whole[row : row + 3 * streams, last:] = True
    whole[:streams] = True
    return whole


def labels_of(streams: int) -> list[Tensor]:
    return [torch.tensor([1, 4]), torch.tensor([10, 10])][:streams]


TIMES = [930 - 70 * row for row in range(ROWS)]


@contextmanager
def both(model: Backbone, plan: l2c.Plan, runs: bool = True, streams: int = 1) -> Iterator[Cache]:
    with (
        torch.no_grad(),
        prepared(model, TIMES, labels_of(streams)),
        l2c.cached(model, plan, streams, runs) as cache,
    ):
        yield cache


def looped(model: Backbone, streams: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    results = []
    for t in TIMES:
        x, times = torch.randn(2, 3, 8, 8, generator=g).to(dtype), torch.full((2,), t)
        results += [model(x, times, y) for y in labels_of(streams)]
    return results


def run(model: Backbone, plan: l2c.Plan, runs: bool, streams: int = 1) -> list[Tensor]:
    with both(model, plan, runs, streams) as cache:
        results = looped(model, streams)
        assert (cache.sums is not None) <= runs
    return results


def runs_of(model: Backbone, plan: l2c.Plan) -> Runs:
    found = residual(model)
    assert found is not None
    return Runs.of(plan, found.begins, bool(found.gates))


def every(model: Backbone, interval: int = 4, reuse: Reuse | None = None) -> l2c.Plan:
    return l2c.Plan.every(interval, ROWS, l2c.sites(model), reuse or Reuse("newton", 2))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest deviation over the largest value."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


# --- the same numbers ---


def long(model: Backbone, kind: str) -> bool:
    """Whether runs are of more than a block, so that they pay."""
    return isinstance(model, l2c.DiT) and kind == "rows"


@pytest.mark.parametrize("kind", ["rows", "ranges", "sites"])
@pytest.mark.parametrize("learned", ["", "site", "channel"])
@pytest.mark.parametrize("name", RULES)
def test_runs_give_what_the_sites_give_one_by_one(
    model: Backbone, name: str, learned: str, kind: str
) -> None:
    for seed in range(2):
        plan = l2c.Plan.of(table(kind, 1, seed), l2c.sites(model), rule(name, learned))
        assert runs_of(model, plan).runs or not long(model, kind)
        # float32: outputs are weighed first and added in the order in which they are computed
        assert error(run(model, plan, True), run(model, plan, False)) < 5e-6


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", ["rows", "ranges", "sites"])
@pytest.mark.parametrize("learned", ["", "channel"])
@pytest.mark.parametrize("name", RULES)
def test_in_two_streams_too(
    model: Backbone, name: str, learned: str, kind: str, relative: bool
) -> None:
    """A second stream that is relative to the first reads the outputs of both."""
    reuse = rule(name, learned, 2, relative)
    for seed in range(2):
        plan = l2c.Plan.of(table(kind, 2, seed), l2c.sites(model), reuse, 2)
        assert runs_of(model, plan).runs or not long(model, kind)
        # as above; what differences cancel is added and taken away again
        found, expected = (run(model, plan, runs, 2) for runs in (True, False))
        assert error(found, expected) < 5e-6


def test_a_plan_of_one_stream_in_two_calls(model: Backbone) -> None:
    plan = every(model, 3)
    found, expected = (run(model, plan, runs, 2) for runs in (True, False))
    assert error(found, expected) < 5e-6  # as above


def test_bfloat16_loses_no_more_than_one_by_one(model: Backbone) -> None:
    plan = every(model, 3, rule("newton-2", "channel"))
    exact = run(model, plan, False)
    errors = []
    for runs in (True, False):
        low = type(model)(**model.config)
        low.load_state_dict(model.state_dict())
        with both(low.eval().bfloat16(), plan, runs) as cache:
            found = looped(low, dtype=torch.bfloat16)
            assert (cache.sums is not None) == runs
        assert all(out.dtype == torch.bfloat16 for out in found)
        errors.append(error([out.float() for out in found], exact))
    # both round each of some hundred additions to 8 bits
    assert errors[0] < 2 * errors[1]


def test_computing_everything_is_bit_identical(model: Backbone) -> None:
    full = l2c.Plan.full(ROWS, l2c.sites(model))
    with torch.no_grad(), prepared(model, TIMES, labels_of(1)):
        plain = looped(model)
    assert equal(run(model, full, True), plain)


def test_sampling_uses_runs(model: Backbone) -> None:
    schedule = l2c.Schedule.ddim(ROWS, noise=model.noise)
    noise = initial_latents(model, 3, torch.Generator().manual_seed(0))
    plan = every(model, 3)
    assert runs_of(model, plan).runs
    norms: list[int] = []
    adding: list[int] = []
    handles = [
        norm.register_forward_hook(lambda *_: norms.append(1))
        for block in blocks_of(model)
        for norm in (block.norm1, block.norm2)
    ]
    handles += [
        block.register_forward_hook(lambda *_: adding.append(1)) for block in blocks_of(model)
    ]
    found = l2c.sample(model, schedule, [1, 2, 3], 1.5, plan=plan, latents=noise)
    for handle in handles:
        handle.remove()
    assert len(norms) == 4 * SITES
    # Of a DiT's reused blocks nothing is called; a U-ViT's merge what comes from others.
    assert len(adding) == (4 if isinstance(model, l2c.DiT) else ROWS) * 5
    assert bool(found.isfinite().all())


# --- what is decided ---


def test_every_fourth_evaluation_in_numbers() -> None:
    """Computed in 0, 4 and 8: three outputs are read, so 3 sums begin in 4 and 3 go on."""
    model = tiny_dit(depth=5)
    (found,) = runs_of(model, every(model)).runs
    assert found.sites == range(SITES)
    assert found.rows == tuple((row,) for row in (1, 2, 3, 5, 6, 7, 9, 10, 11))
    assert found.sums == 9  # evaluation 0 is read by all
    assert {row: read.begun for row, read in found.reads.items()} == {
        0: (1, 2, 3, 5, 6, 7, 9, 10, 11),
        4: (),
        8: (),
    }
    assert [len(read.rows) for read in found.reads.values()] == [9, 6, 3]
    assert found.reads[8].coefficients[3, :, 0].tolist() == pytest.approx(
        [1.40625, 1.875, 2.40625]  # Lagrange at 1/4, 2/4 and 3/4 of a distance
    )


def test_a_copy_without_gates_is_one_sum() -> None:
    uvit, dit = tiny_uvit(depth=4), tiny_dit(depth=5)
    for found in runs_of(uvit, every(uvit, 4, Reuse())).runs:
        assert len(found.sites) == 2
        assert (found.sums, len(found.rows[0])) == (1, 3)
    for found in runs_of(dit, every(dit, 4, Reuse())).runs:
        assert (found.sums, len(found.rows[0])) == (3, 1)


def test_runs_of_a_uvit_end_with_its_blocks(model: Backbone) -> None:
    lengths = {len(run.sites) for run in runs_of(model, every(model, 3)).runs}
    assert lengths == ({SITES} if isinstance(model, l2c.DiT) else {2})


def test_differences_of_streams_are_taken_apart() -> None:
    """Computed: both in evaluation 0, the first stream in 1: u1 = c1 + (u0 - c0)."""
    sites = l2c.sites(tiny_dit(depth=5))
    rows = torch.ones(4, SITES, dtype=torch.bool)
    rows[3] = False
    plan = l2c.Plan.of(rows, sites, Reuse(relative=True), 2)
    assert flattened(plan)[3][0] == ({2: 1.0, 1: 1.0, 0: -1.0}, None)
    rows[2] = False  # c1 is a copy of c0: what is added and taken away is not read at all
    plan = l2c.Plan.of(rows, sites, Reuse(relative=True), 2)
    assert flattened(plan)[3][0] == ({1: 1.0}, None)


# --- memory ---


@pytest.mark.parametrize("kind", ["rows", "ranges", "sites"])
@pytest.mark.parametrize("reuse", [rule("copy"), rule("newton-2"), rule("newton-2", "channel")])
@pytest.mark.parametrize("seed", range(2))
def test_cache_bytes_are_those_that_are_held(
    model: Backbone, reuse: Reuse, kind: str, seed: int
) -> None:
    """Measured after every sub-layer, as for the sites one by one."""
    plan = l2c.Plan.of(table(kind, 1, seed), l2c.sites(model), reuse)
    measured: list[int] = []

    def held(cache: Cache) -> int:
        kept = [t for outputs in cache.outputs.values() for t in outputs.values()]
        kept += [] if cache.sums is None else cache.sums.sums.values()
        return sum(t.untyped_storage().nbytes() for t in kept)

    with both(model, plan) as cache:

        def measuring(call: Call) -> Call:
            def run(*args: Any) -> Tensor:
                out: Tensor = call(*args)
                measured.append(held(cache))
                return out

            return run

        targets = [
            (block, name)
            for block in blocks_of(model)
            for name in ("add_attention", "add_feedforward")
        ]
        with replaced(targets, [measuring(getattr(*target)) for target in targets]):
            looped(model)
        assert held(cache) == 0
    found = runs_of(model, plan)
    assert found.cache_bytes(2) == max(measured)
    assert found.cache_bytes() <= plan.cache_bytes()
    assert found.cache_bytes(3, torch.bfloat16) * 4 == found.cache_bytes(2) * 3


def test_a_whole_evaluation_s_outputs_are_not_kept() -> None:
    model = tiny_dit(depth=5)
    for interval, sums in ((2, 3), (3, 6), (4, 9)):
        plan = every(model, interval)
        assert plan.cache_bytes() == 3 * SITES * 16 * 32 * 4
        assert runs_of(model, plan).cache_bytes() == sums * 16 * 32 * 4


# --- where there are none, and afterwards ---


def test_without_known_gates_sites_are_reused_one_by_one(model: Backbone) -> None:
    plan = every(model, 3)
    assert runs_of(model, plan).runs
    with l2c.cached(model, plan) as cache:
        assert cache.sums is None
    with prepared(model, TIMES[1:], labels_of(1)), l2c.cached(model, plan) as cache:
        assert cache.sums is None  # another number of calls
    with prepared(model, TIMES, labels_of(1)), l2c.cached(model, plan, runs=False) as cache:
        assert cache.sums is None
    apart = [torch.tensor([1, 4]), torch.tensor([10])]  # calls of other sizes
    with prepared(model, TIMES, apart), l2c.cached(model, plan, 2) as cache:
        assert cache.sums is None
    with prepared(model, TIMES, labels_of(1), limit=0), l2c.cached(model, plan) as cache:
        assert (cache.sums is None) == isinstance(model, l2c.DiT)


def test_a_model_that_does_not_declare_how_is_run_site_by_site(
    model: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = every(model, 3)
    expected = run(model, plan, False)
    name = type(model).__name__
    bare = dataclasses.replace(attach.FAMILIES[name], joins={})
    monkeypatch.setitem(attach.FAMILIES, name, bare)
    assert residual(model) is None
    with both(model, plan) as cache:
        assert cache.sums is None
        assert equal(looped(model), expected)


def attributes(model: Backbone) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("row", [0, 1, 5])
def test_the_model_is_as_before_also_after_an_error(model: Backbone, row: int) -> None:
    before, modules = attributes(model), list(model.modules())
    with torch.no_grad():
        plain = looped(model)

    def stop(*_: Any) -> None:
        if cache.calls == row:
            raise RuntimeError("stop")

    last = model.final_layer if isinstance(model, l2c.DiT) else model.decoder_pred
    handle = last.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"), both(model, every(model, 3)) as cache:
        looped(model)
    handle.remove()
    assert cache.sums is not None
    assert not cache.sums.sums
    assert attributes(model) == before
    assert list(model.modules()) == modules
    with torch.no_grad():
        assert equal(looped(model), plain)


def test_between_evaluations_all_blocks_are_there(model: Backbone) -> None:
    container = "blocks" if isinstance(model, l2c.DiT) else "in_blocks"
    blocks = getattr(model, container)
    with both(model, every(model, 3)):
        for t in TIMES[:3]:
            model(torch.zeros(2, 3, 8, 8), torch.full((2,), t), labels_of(1)[0])
            assert getattr(model, container) is blocks
            assert len(l2c.sites(model)) == SITES


def test_a_reset_begins_with_empty_sums(uvit: l2c.UViT) -> None:
    """A U-ViT, as `prepared` counts a DiT's calls."""
    plan = l2c.Plan.every(3, ROWS, l2c.sites(uvit), Reuse("newton", 2))
    with both(uvit, plan) as cache:
        assert cache.sums is not None
        looped(uvit)
        cache.reset()
        expected = looped(uvit)
        cache.reset()
        for t in TIMES[:5]:
            uvit(torch.ones(2, 3, 8, 8), torch.full((2,), t), labels_of(1)[0])
        assert cache.sums.sums
        cache.reset()
        assert not cache.sums.sums
        assert equal(looped(uvit), expected)


# --- the benchmark ---


def test_the_benchmark_in_small(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    executor.main(["--quick"])
    figures = json.loads((tmp_path / "executor.json").read_text())
    assert {(row["model"], row["rule"]) for row in figures["reused"]} == {
        (model, rule) for model in executor.SHIPPED for rule in ("copy", "newton-2", "learned")
    }
    assert all(row["share"] > 0 and row["reused_over_full"] > 0 for row in figures["reused"])
    assert len(figures["sampled"]) == 2 * 5
    for row in figures["sampled"]:
        assert row["efficiency"] == pytest.approx(row["share"] / row["measured"])
    assert "| fashion_mnist_uvit | 1 | scattered, learned |" in capsys.readouterr().out
