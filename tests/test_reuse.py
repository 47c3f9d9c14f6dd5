"""Rules of reuse: against TaylorSeer's recursion, numpy's polynomials, and hooks in the model."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import l2c
from l2c.attach import Call, replaced
from l2c.backbone import Backbone
from l2c.cache import Cache
from l2c.reuse import Mixture, Reuse, mixture, terms
from tests.conftest import blocks_of
from train.gates import Outputs, gated

ROWS = 8
RULES = ["copy", "taylor-1", "taylor-2", "taylor-3", "newton-1", "newton-2", "newton-3"]
Inputs = tuple[Tensor, Tensor, Tensor]


class TaylorSeer:
    """The recursion of Liu et al. 2025, as they publish it: derivatives of the last computed one.

    A derivative is the difference of the two last ones of the order below, divided by the distance
    of the two last computed evaluations.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.factors: list[Any] = []
        self.row = 0

    def computed(self, row: int, value: Any) -> None:
        """Update all derivatives."""
        factors = [value]
        for i in range(min(self.order, len(self.factors))):
            factors.append((factors[i] - self.factors[i]) / (row - self.row))
        self.factors, self.row = factors, row

    def terms(self, row: int) -> list[Any]:
        """f^(i) / i! * distance^i; their sum is the prediction."""
        distance = row - self.row
        return [f * distance**i / math.factorial(i) for i, f in enumerate(self.factors)]


def polynomial_terms(row: int, sources: list[int], values: list[Tensor]) -> list[Tensor]:
    """What each further point, the newest first, adds to the polynomial's value, by numpy."""
    flat = torch.stack(values).double().flatten(1).numpy()
    found, before = [], 0.0
    for count in range(1, len(sources) + 1):
        # centred, so that the fit is exact up to rounding
        at = np.array(sources[:count], dtype=float) - row
        value = np.polynomial.polynomial.polyfit(at, flat[:count], count - 1)[0]
        found.append(torch.from_numpy(value - before).reshape(values[0].shape))
        before = value
    return found


def terms_by_hand(kind: str, row: int, sources: list[int], values: list[Tensor]) -> list[Tensor]:
    """The terms of a rule in float64; sources and values are those read, newest first."""
    if kind == "copy":
        return [values[0].double()]
    if kind == "newton":
        return polynomial_terms(row, sources, values)
    seer = TaylorSeer(len(sources) - 1)
    for source, value in zip(reversed(sources), reversed(values), strict=True):
        seer.computed(source, value.double())
    return seer.terms(row)


def rule(
    name: str, per: str | None = None, shifted: bool = False, rows: int = ROWS, width: int = 32
) -> Reuse:
    """A rule with random learned parts, per "channel" or per "site"."""
    g = torch.Generator().manual_seed(7)
    plain = Reuse.named(name)
    channels = width if per == "channel" else 1
    corrections = 0.2 * torch.randn(rows, 6, plain.order + 1, channels, generator=g)
    shift = 0.1 * torch.randn(rows, 6, width, generator=g)
    return Reuse(plain.kind, plain.order, corrections if per else None, shift if shifted else None)


LEARNED = [
    rule("copy", "channel", True),
    rule("taylor-2", "channel", True),
    rule("taylor-1", "site"),
    rule("newton-2", "site", True),
    rule("newton-3", "channel"),
    rule("taylor-2", None, True),
]
ALL = [*map(Reuse.named, RULES), *LEARNED]


def told(reuse: Reuse) -> str:
    parts = (("corrections", reuse.corrections), ("shift", reuse.shift))
    return " ".join(
        [reuse.name, *(f"{name}{tuple(t.shape[2:])}" for name, t in parts if t is not None)]
    )


# --- extrapolations ---


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_is_numpy_s_polynomial_through_the_last_outputs(order: int) -> None:
    for chosen in combinations(range(6), order + 1):
        sources = list(reversed(chosen))
        for row in (sources[0] + 1, sources[0] + 4):
            found = mixture("newton", row, sources).coefficients
            basis = np.eye(order + 1)
            at = np.array(sources, dtype=float)
            fitted = np.polynomial.Polynomial
            expected = [fitted.fit(at, unit, order)(row) for unit in basis]
            # numpy solves a linear system in float64
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_continues_a_polynomial_of_its_degree(order: int) -> None:
    sources = [11, 8, 7, 2][: order + 1]
    rising = np.polynomial.Polynomial([3.0, -1.0, 0.5, 0.25][: order + 1])
    history = [torch.tensor([rising(s)]) for s in sources]
    found = mixture("newton", 14, sources).apply(history)
    # float64, values of some hundreds
    torch.testing.assert_close(found, torch.tensor([rising(14)]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_taylor_is_the_published_recursion_also_while_the_history_is_short(
    order: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    compute = torch.rand(16, generator=g) < 0.5
    compute[0] = True
    seer, computed = TaylorSeer(order), []
    for row in range(16):
        if compute[row]:
            value = torch.randn(3, 4, generator=g, dtype=torch.float64)
            computed.insert(0, (row, value))
            seer.computed(row, value)
            continue
        read = computed[: order + 1]
        numbers = mixture("taylor", row, [source for source, _ in read])
        assert len(numbers.coefficients) == min(order + 1, len(computed))
        # float64: the two sum in another order
        torch.testing.assert_close(
            numbers.apply([value for _, value in read]),
            torch.stack(seer.terms(row)).sum(0),
            rtol=1e-10,
            atol=1e-10,
        )


def test_taylor_in_numbers() -> None:
    """Computed at 0, 2 and 3: f' = b - a, f'' = (b - a) - (a - z) / 2, all at 5."""
    z, a, b = 1.0, 4.0, 6.0
    first, second = b - a, (b - a) - (a - z) / 2
    found = mixture("taylor", 5, [3, 2, 0]).coefficients
    assert found == pytest.approx([1 + 2 + 2, -2 - 2 * 1.5, 2 * 0.5])
    assert sum(c * v for c, v in zip(found, (b, a, z), strict=True)) == b + first * 2 + second * 2
    # of the second order both divide alike only where distances are 1: taylor's 2! is no product
    assert mixture("newton", 3, [2, 1, 0]).coefficients == pytest.approx([3, -3, 1])
    assert mixture("taylor", 3, [2, 1, 0]).coefficients == pytest.approx([2.5, -2, 0.5])


@pytest.mark.parametrize("kind", ["copy", "taylor", "newton"])
def test_one_output_is_copied(kind: str) -> None:
    numbers = mixture(kind, 9, [4])
    output = torch.randn(2, 3)
    assert numbers.is_copy
    assert numbers.apply([output]) is output


@pytest.mark.parametrize("kind", ["taylor", "newton"])
def test_what_does_not_change_is_predicted_not_to(kind: str) -> None:
    for sources in ([5, 3], [5, 3, 2], [6, 5, 2, 0]):
        assert sum(mixture(kind, 9, sources).coefficients) == pytest.approx(1)
        for term in terms(kind, 9, sources)[1:]:
            assert sum(term) == pytest.approx(0)


# --- what is learned ---


@pytest.mark.parametrize("name", RULES)
def test_corrections_and_shift_of_zero_are_the_plain_extrapolation(name: str) -> None:
    plain = Reuse.named(name)
    zero = Reuse(
        plain.kind,
        plain.order,
        torch.zeros(10, 2, plain.order + 1, 5),
        torch.zeros(10, 2, 5),
    )
    sources = [6, 4, 3, 0][: plain.order + 1]
    history = [torch.randn(3, 5) for _ in sources]
    found = zero.mixture(9, 1, sources).apply(history)
    expected = plain.mixture(9, 1, sources).apply(history)
    if name == "copy":
        assert torch.equal(found, expected)
    # coefficients up to 30, in float32 here and in float64 there
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reuse", LEARNED, ids=told)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_corrections_scale_the_terms_and_the_shift_is_added(reuse: Reuse, length: int) -> None:
    sources = [5, 4, 2, 1][:length][: reuse.order + 1]
    g = torch.Generator().manual_seed(length)
    history = [torch.randn(2, 4, 32, generator=g) for _ in sources]
    expected = torch.zeros(2, 4, 32, dtype=torch.float64)
    for i, term in enumerate(terms_by_hand(reuse.kind, 7, sources, history)):
        factor = 1 if reuse.corrections is None else 1 + reuse.corrections[7, 3, i].double()
        expected += factor * term
    if reuse.shift is not None:
        expected += reuse.shift[7, 3].double()
    found = reuse.mixture(7, 3, sources).apply(history)
    # float32 against float64, with coefficients up to 20
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_each_number_changes_its_own_evaluation_site_term_and_channel() -> None:
    history = [torch.randn(2, 5, dtype=torch.float64) for _ in range(3)]
    sources, parts = [6, 4, 3], terms_by_hand("taylor", 8, [6, 4, 3], history)
    plain = Reuse("taylor", 2).mixture(8, 1, sources).apply(history)
    for term in range(3):
        corrections = torch.zeros(10, 2, 3, 5)
        corrections[8, 1, term, 3] = 0.5
        reuse = Reuse("taylor", 2, corrections)
        changed = reuse.mixture(8, 1, sources).to(history[0]).apply(history) - plain
        assert not bool(changed[:, [0, 1, 2, 4]].any())
        torch.testing.assert_close(changed[:, 3], 0.5 * parts[term][:, 3])
        for row, site in ((7, 1), (9, 1)), ((8, 0), (8, 0)):
            other = reuse.mixture(*row, sources), reuse.mixture(*site, sources)
            without = Reuse("taylor", 2).mixture(row[0], row[1], sources)
            assert torch.allclose(
                torch.stack(other[0].coefficients), torch.tensor(without.coefficients)[:, None]
            )
    shift = torch.zeros(10, 2, 5)
    shift[8, 1, 3] = 0.5
    moved = Reuse("taylor", 2, shift=shift).mixture(8, 1, sources).apply(history) - plain
    expected = torch.tensor([0, 0, 0, 0.5, 0], dtype=torch.float64).expand(2, 5)
    torch.testing.assert_close(moved, expected)


# --- names and refusals ---


@pytest.mark.parametrize("name", RULES)
def test_names(name: str) -> None:
    reuse = Reuse.named(name)
    assert reuse.name == str(reuse) == name
    assert not reuse.learned
    shifted = Reuse(reuse.kind, reuse.order, shift=torch.zeros(2, 3, 4))
    assert str(shifted) == f"{name}, corrected"
    assert shifted.learned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "spline"}, "unknown rule 'spline'; known are copy, taylor, newton"),
        ({"kind": "copy", "order": 1}, "an order from 0 to 0 for copy, got 1"),
        ({"kind": "taylor"}, "an order from 1 to 3 for taylor, got 0"),
        ({"kind": "newton", "order": 4}, "an order from 1 to 3 for newton, got 4"),
        (
            {"kind": "taylor", "order": 2, "corrections": torch.zeros(2, 3, 2, 4)},
            r"3 terms for taylor-2, got shape \(2, 3, 2, 4\)",
        ),
        ({"corrections": torch.zeros(2, 3, 1)}, r"1 terms for copy, got shape \(2, 3, 1\)"),
        ({"shift": torch.zeros(2, 3)}, r"a shift \[evaluation, site, channel\], got \(2, 3\)"),
        ({"corrections": torch.full((2, 3, 1, 4), torch.nan)}, "finite corrections, got NaN"),
        ({"shift": torch.full((2, 3, 4), -torch.inf)}, "finite shift, got NaN or infinity"),
    ],
)
def test_what_makes_no_rule(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reuse(**options)


@pytest.mark.parametrize("name", ["spline", "taylor", "taylor-x", "newton-4", "copy-1", "", "-2"])
def test_names_of_no_rule(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown rule|expected a"):
        Reuse.named(name)


def test_equal_rules_are_equal() -> None:
    assert Reuse.named("taylor-2") == Reuse("taylor", 2)
    assert len({Reuse(), Reuse("taylor", 2), Reuse("newton", 2), Reuse("copy")}) == 3
    for make in (lambda: rule("taylor-2", "site", True), lambda: rule("copy", "channel")):
        assert make() == make()
        assert hash(make()) == hash(make())
    assert rule("taylor-2", "site") != rule("taylor-2", "channel")
    assert rule("taylor-2", "site") != rule("taylor-2", "site", True)
    assert rule("taylor-2") != rule("newton-2")
    shift = torch.zeros(2, 3, 4)
    assert Reuse(shift=shift) != Reuse(shift=shift + 1)
    assert Reuse() != "copy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 5}, r"expected corrections for 8 evaluations and 6 sites, got \(5, 6\)"),
        ({"width": 16}, r"corrections of 1 channel or of the outputs' \[32\], got 16"),
        ({"per": None, "rows": 9}, r"expected shift for 8 evaluations and 6 sites, got \(9, 6\)"),
        ({"per": None, "width": 7}, r"expected shift of 1 channel or of .*\[32\], got 7"),
    ],
)
def test_a_plan_refuses_what_was_learned_for_another(
    dit: l2c.DiT, changes: dict[str, Any], message: str
) -> None:
    reuse = rule("taylor-1", **{"per": "channel", "shifted": True, **changes})
    with pytest.raises(ValueError, match=message):
        l2c.Plan.every(2, ROWS, l2c.sites(dit), reuse)


# --- execution ---


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.float32, seed: int = 3) -> list[Inputs]:
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(2, 3, 8, 8, generator=g).to(dtype),
            torch.full((2,), 900 - 100 * row),
            torch.arange(2),
        )
        for row in range(rows)
    ]


def random_plan(model: Backbone, reuse: Reuse, seed: int = 0) -> l2c.Plan:
    """Half of everything reused, at random: histories of every length, unevenly spaced."""
    sites = l2c.sites(model)
    table = torch.rand(ROWS, len(sites), generator=torch.Generator().manual_seed(seed)) < 0.5
    table[0] = True
    return l2c.Plan.of(table, sites, reuse)


def executed(model: Backbone, plan: l2c.Plan, given: list[Inputs] | None = None) -> list[Tensor]:
    with torch.no_grad(), l2c.cached(model, plan):
        return [model(*at) for at in given or inputs()]


def sublayers(model: Backbone) -> list[nn.Module]:
    return [layer for block in blocks_of(model) for layer in (block.attn, block.mlp)]


def substituted(model: Backbone, plan: l2c.Plan, formula: Any) -> list[Tensor]:
    """The plain model, its sub-layers' results replaced by a formula in PyTorch's own hooks.

    `formula(row, site, sources, values)` gives what stands for a reused output.
    """
    history: list[list[tuple[int, Tensor]]] = [[] for _ in range(6)]
    row = 0

    def replace(site: int, fresh: Tensor) -> Tensor:
        if plan.compute[row][site]:
            history[site].insert(0, (row, fresh))
            return fresh
        read = history[site][: plan.reuse.order + 1]
        return formula(row, site, [source for source, _ in read], [value for _, value in read])

    hooks = [
        layer.register_forward_hook(lambda _, __, out, site=site: replace(site, out))
        for site, layer in enumerate(sublayers(model))
    ]
    results = []
    with torch.no_grad():
        for at in inputs():
            results.append(model(*at))
            row += 1
    for hook in hooks:
        hook.remove()
    return results


@pytest.mark.parametrize("name", ["copy", "taylor-1", "taylor-2", "newton-2", "newton-3"])
def test_execution_is_the_model_with_substituted_outputs_bit_by_bit(
    backbone: Backbone, name: str
) -> None:
    """The same weighted sum, its weights by a formula of unit vectors."""
    plan = random_plan(backbone, Reuse.named(name))

    def formula(row: int, _: int, sources: list[int], values: list[Tensor]) -> Tensor:
        if len(sources) == 1:
            return values[0]
        units = [torch.eye(len(sources), dtype=torch.float64)[i] for i in range(len(sources))]
        parts = terms_by_hand(plan.reuse.kind, row, sources, units)
        # rounded once, as numpy's solution and the sums of the project differ in the last digits
        weights = torch.stack(parts).sum(0).mul(3600).round().div(3600).tolist()
        out = weights[0] * values[0]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            out = out.add(value, alpha=weight)
        return out

    found, expected = executed(backbone, plan), substituted(backbone, plan, formula)
    assert all(map(torch.equal, found, expected))
    copied = executed(backbone, random_plan(backbone, Reuse()))
    assert all(map(torch.equal, found, copied)) == (name == "copy")


@pytest.mark.parametrize("reuse", ALL, ids=told)
def test_execution_is_the_model_with_outputs_by_the_formula(
    backbone: Backbone, reuse: Reuse
) -> None:
    plan = random_plan(backbone, reuse, seed=1)

    def formula(row: int, site: int, sources: list[int], values: list[Tensor]) -> Tensor:
        parts = terms_by_hand(reuse.kind, row, sources, values)
        if reuse.corrections is not None:
            factors = 1 + reuse.corrections[row, site].double()
            parts = [factor * part for factor, part in zip(factors, parts, strict=False)]
        out = torch.stack(parts).sum(0)
        return (out if reuse.shift is None else out + reuse.shift[row, site]).float()

    expected = substituted(backbone, plan, formula)
    # float32 against float64, through six sub-layers
    torch.testing.assert_close(executed(backbone, plan), expected, rtol=1e-4, atol=2e-5)
    copied = executed(backbone, random_plan(backbone, Reuse(), seed=1))
    if reuse != Reuse():
        assert (
            max(float((a - b).abs().max()) for a, b in zip(copied, expected, strict=True)) > 0.005
        )


# --- the differentiable twin ---


def mixed(
    model: Backbone,
    plan: l2c.Plan,
    given: list[Inputs],
    lazy: bool,
    reuse: Reuse | None = None,
) -> list[Tensor]:
    """The plan's evaluations by gates of 0 and 1."""
    outputs: Outputs = {}
    rule_of = reuse or plan.reuse
    results = []
    for row, at in enumerate(given):
        weights = torch.tensor(plan.compute[row], dtype=torch.float32) if row else None

        def numbers(site: int, sources: list[int], row: int = row) -> Mixture:
            return rule_of.mixture(row, site, sources)

        with gated(model, outputs, weights, numbers, row, rule_of.order + 1, lazy):
            results.append(model(*at))
    return results


@pytest.mark.parametrize("reuse", ALL, ids=told)
def test_gates_of_0_and_1_are_the_executor_bit_by_bit(backbone: Backbone, reuse: Reuse) -> None:
    for seed in range(2):
        plan = random_plan(backbone, reuse, seed)
        expected = executed(backbone, plan)
        for lazy in (False, True):
            with torch.no_grad():
                found = mixed(backbone, plan, inputs(), lazy)
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("reuse", [Reuse("newton", 2), *LEARNED], ids=told)
def test_in_bfloat16_too(backbone: Backbone, reuse: Reuse, lazy: bool) -> None:
    model, given = backbone.bfloat16(), inputs(dtype=torch.bfloat16)
    plan = random_plan(model, reuse)
    expected = executed(model, plan, given)
    with torch.no_grad():
        found = mixed(model, plan, given, lazy)
    assert all(out.dtype == torch.bfloat16 for out in expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("reuse", [Reuse(), Reuse("taylor", 2), LEARNED[1]], ids=told)
def test_two_streams_are_two_runs(backbone: Backbone, reuse: Reuse) -> None:
    plan = random_plan(backbone, reuse)
    pairs = list(zip(inputs(), inputs(seed=4), strict=True))
    with torch.no_grad(), l2c.cached(backbone, plan, streams=2):
        results = [[backbone(*at) for at in pair] for pair in pairs]
    for stream in range(2):
        found = [result[stream] for result in results]
        given = [pair[stream] for pair in pairs]
        with torch.no_grad():
            assert all(map(torch.equal, found, mixed(backbone, plan, given, lazy=True)))
        assert all(map(torch.equal, found, executed(backbone, plan, given)))


def test_a_reset_begins_with_an_empty_history(backbone: Backbone) -> None:
    plan = random_plan(backbone, LEARNED[1])
    expected = executed(backbone, plan)
    with torch.no_grad(), l2c.cached(backbone, plan) as cache:
        for at in inputs(seed=9)[:5]:
            backbone(*at)
        cache.reset()
        assert all(map(torch.equal, [backbone(*at) for at in inputs()], expected))


# --- gradients ---


def binary(shape: tuple[int, ...], seed: int) -> Tensor:
    """Multiples of 2^-12 in (-0.25, 0.25)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1000, 1000, shape, generator=g, dtype=torch.float64) * 2**-12


@pytest.mark.parametrize(
    ("kind", "width", "soft"),
    [("taylor", 32, False), ("newton", 1, False), ("taylor", 1, True), ("newton", 32, True)],
)
def test_gradients_of_what_is_learned_agree_with_finite_differences(
    backbone: Backbone, kind: str, width: int, soft: bool
) -> None:
    """Over several evaluations, where a prediction changes what later ones keep."""
    model = backbone.double()
    given = inputs(rows=6, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    targets = [torch.randn(model(*at).shape, generator=g, dtype=torch.float64) for at in given]
    # Gates of sites and not of evaluations, so that what is kept depends on what was predicted.
    compute = torch.tensor([[1] * 6, [1] * 6, [0] * 6, [1, 0] * 3, [0, 1] * 3, [0] * 6])
    weights = 0.25 + 0.5 * compute.double() if soft else compute.double()

    def loss(corrections: Tensor, shift: Tensor) -> Tensor:
        reuse = Reuse(kind, 2, corrections, shift)
        outputs: Outputs = {}
        total = torch.zeros((), dtype=torch.float64)
        for row, (at, target) in enumerate(zip(given, targets, strict=True)):

            def numbers(site: int, sources: list[int], row: int = row) -> Mixture:
                return reuse.mixture(row, site, sources)

            now = weights[row] if row > 1 else None
            with gated(model, outputs, now, numbers, row, 3, lazy=not soft):
                total = total + (model(*at) * target).sum()
        return total

    learned = [binary((6, 6, 3, width), 2), binary((6, 6, 32), 3)]
    for tensor in learned:
        tensor.requires_grad_()
    gradients = torch.autograd.grad(loss(*learned), learned)
    reused = torch.ones(6, 6, dtype=torch.bool) if soft else compute == 0
    reused[:2] = False
    for gradient in gradients:
        assert bool((gradient[reused] != 0).flatten(1).any(1).all())
        assert not bool(gradient[~reused].any())
    # The coefficients are formed in float32; these numbers and steps are exact in it.
    step = 2**-12
    for which, gradient in enumerate(gradients):
        for density in (1.0, 0.1):
            signs = torch.randint(0, 2, gradient.shape, generator=g).double() * 2 - 1
            signs *= torch.rand(gradient.shape, generator=g) < density
            with torch.no_grad():
                ends = []
                for sign in (1, -1):
                    moved = [*learned]
                    moved[which] = moved[which] + sign * step * signs
                    ends.append(float(loss(*moved)))
            numeric = (ends[0] - ends[1]) / (2 * step)
            # central differences err by step^2 = 6e-8 times third derivatives along many numbers
            assert float((gradient * signs).sum()) == pytest.approx(numeric, rel=1e-4, abs=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lazily_and_not_the_gradients_are_the_same(backbone: Backbone) -> None:
    plan = random_plan(backbone, rule("newton-2", "channel", True))
    gradients = []
    for lazy in (True, False):
        corrections = plan.reuse.corrections.clone().requires_grad_()
        shift = plan.reuse.shift.clone().requires_grad_()
        learned = Reuse("newton", 2, corrections, shift)
        results = mixed(backbone, plan, inputs(), lazy, reuse=learned)
        total = sum(out.square().sum() for out in results)
        gradients.append(torch.autograd.grad(total, [corrections, shift]))
    for one, other in zip(*gradients, strict=True):
        assert bool(one.any())
        # float32: gradients that arrive over more branches are summed in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# --- what is kept ---


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("streams", [1, 2])
def test_only_outputs_that_are_read_again_are_kept(
    backbone: Backbone, name: str, seed: int, streams: int
) -> None:
    plan = random_plan(backbone, Reuse.named(name), seed)
    order = plan.reuse.order

    def read_after(row: int, site: int) -> set[int]:
        """The outputs, computed up to `row`, that later evaluations read."""
        found: set[int] = set()
        for later in range(row + 1, ROWS):
            if not plan.compute[later][site]:
                computed = [r for r in range(later) if plan.compute[r][site]]
                found.update(r for r in computed[::-1][: order + 1] if r <= row)
        return found

    with torch.no_grad(), l2c.cached(backbone, plan, streams) as cache:
        for row, at in enumerate(inputs()):
            for stream in range(streams):
                backbone(*at)
                kept = cache.streams[stream]
                for site in range(6):
                    # The cache counts calls.
                    assert all(call % streams == stream for call in kept.get(site, {}))
                    held = {call // streams for call in kept.get(site, {})}
                    assert held == read_after(row, site)
                    assert held == {r for r in range(row + 1) if plan.last_read[r][site] > row}
        assert not any(kept for outputs in cache.streams for kept in outputs.values())


@pytest.mark.parametrize(
    ("streams", "dtype"), [(1, torch.float32), (2, torch.float32), (1, torch.bfloat16)]
)
@pytest.mark.parametrize("reuse", [Reuse(), *ALL[2:4], *LEARNED[:2]], ids=told)
def test_cache_bytes_are_those_that_are_held(
    backbone: Backbone, reuse: Reuse, streams: int, dtype: torch.dtype
) -> None:
    """Measured after every sub-layer: the memory that the cache's tensors keep alive."""
    model = backbone.to(dtype)
    for seed in range(2):
        plan = random_plan(model, reuse, seed)
        measured = []
        with torch.no_grad(), l2c.cached(model, plan, streams) as cache:

            def measuring(call: Call, cache: Cache = cache, found: list[int] = measured) -> Call:
                def run(*args: Any) -> Tensor:
                    out: Tensor = call(*args)
                    kept = [t for stream in cache.streams for t in stream.values()]
                    storages = [t.untyped_storage() for outputs in kept for t in outputs.values()]
                    assert len({storage.data_ptr() for storage in storages}) == len(storages)
                    found.append(sum(storage.nbytes() for storage in storages))
                    return out

                return run

            targets = [
                (block, name) for block in blocks_of(model) for name in ("attention", "feedforward")
            ]
            with replaced(targets, [measuring(getattr(*target)) for target in targets]):
                for at in inputs(dtype=dtype):
                    for _ in range(streams):
                        model(*at)
        assert len(measured) == 6 * ROWS * streams
        assert cache.plan.cache_bytes(2, dtype) == max(measured)
        if streams == 1:
            assert plan.cache_bytes(3, dtype) == max(measured) * 3 // 2
