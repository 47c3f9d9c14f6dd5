"""The differentiable gates: values, gradients, and that they leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import l2c
from l2c.backbone import Backbone
from tests.conftest import blocks_of
from train.gates import Outputs, gated

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=g).to(dtype)
    return x, torch.full((count,), 500 + seed), torch.arange(count)


def recorded(model: Backbone, at: Inputs) -> Outputs:
    outputs: Outputs = {}
    with torch.no_grad(), gated(model, outputs, None):
        model(*at)
    return outputs


def only(outputs: Outputs) -> dict[int, Tensor]:
    """What is kept, where one output of each site is."""
    assert all(len(kept) == 1 for kept in outputs.values())
    return {index: output for index, ((_, output),) in outputs.items()}


def sublayers(model: Backbone) -> list[nn.Module]:
    return [layer for block in blocks_of(model) for layer in (block.attn, block.mlp)]


def hooked(model: Backbone, at: Inputs) -> list[Tensor]:
    """Outputs of all sub-layers, seen by PyTorch's own hooks."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
        for layer in sublayers(model)
    ]
    with torch.no_grad():
        model(*at)
    for hook in hooks:
        hook.remove()
    return seen


def assert_untouched(model: Backbone, at: Inputs, expected: Tensor) -> None:
    assert "forward" not in model.__dict__
    for block in blocks_of(model):
        assert not {"attention", "feedforward"} & block.__dict__.keys()
    assert torch.equal(model(*at), expected)


# --- values ---


def test_without_weights_every_output_is_recorded_and_nothing_changes(backbone: Backbone) -> None:
    at = inputs()
    outputs: Outputs = {}
    with torch.no_grad(), gated(backbone, outputs, None, row=3):
        result = backbone(*at)
    assert torch.equal(result, backbone(*at))
    expected = hooked(backbone, at)
    assert sorted(outputs) == list(range(len(expected))) == list(range(6))
    for index, output in enumerate(expected):
        assert torch.equal(only(outputs)[index], output)
        assert outputs[index][0][0] == 3


def test_weights_of_one_compute_everything(backbone: Backbone) -> None:
    outputs = recorded(backbone, inputs(seed=1))
    with torch.no_grad(), gated(backbone, outputs, torch.ones(6)):
        result = backbone(*inputs())
    assert torch.equal(result, backbone(*inputs()))
    for index, output in enumerate(hooked(backbone, inputs())):
        assert torch.equal(only(outputs)[index], output)


def test_weights_of_zero_reuse_everything(backbone: Backbone) -> None:
    before = recorded(backbone, inputs(seed=1))
    outputs = dict(before)
    with torch.no_grad(), gated(backbone, outputs, torch.zeros(6)):
        result = backbone(*inputs())
    assert not torch.equal(result, backbone(*inputs()))
    for index in range(6):
        assert torch.equal(only(outputs)[index], only(before)[index])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_of_zero_and_one_are_the_cached_model_over_many_evaluations(
    backbone: Backbone, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    compute = torch.rand(5, 6, generator=g) > 0.5
    compute[0] = True
    plan = l2c.Plan.of(compute, l2c.sites(backbone))
    outputs: Outputs = {}
    with torch.no_grad(), l2c.cached(backbone, plan):
        expected = [backbone(*inputs(seed=row)) for row in range(5)]
    with torch.no_grad():
        for row in range(5):
            with gated(backbone, outputs, compute[row].float() if row else None):
                assert torch.equal(backbone(*inputs(seed=row)), expected[row])


def test_a_weight_mixes_fresh_and_reused_output(backbone: Backbone) -> None:
    stale = recorded(backbone, inputs(seed=1))
    outputs = dict(stale)
    weights = torch.tensor([0.25, 1.0, 1.0, 1.0, 1.0, 1.0])
    with torch.no_grad(), gated(backbone, outputs, weights):
        backbone(*inputs())
    fresh = hooked(backbone, inputs())[0]  # nothing before it is mixed
    assert torch.equal(only(outputs)[0], 0.25 * fresh + 0.75 * only(stale)[0])


def test_the_newest_outputs_are_kept_as_many_as_asked_for(backbone: Backbone) -> None:
    outputs: Outputs = {}
    with torch.no_grad():
        for row in range(5):
            open_gates = torch.ones(6)
            open_gates[0] = float(row != 3)  # a reused output is none of them
            with gated(backbone, outputs, open_gates if row else None, row=row, history=3):
                backbone(*inputs(seed=row))
    assert [source for source, _ in outputs[0]] == [4, 2, 1]
    for index in range(1, 6):
        assert [source for source, _ in outputs[index]] == [4, 3, 2]


def test_lazy_gates_compute_only_what_is_open(backbone: Backbone) -> None:
    outputs = recorded(backbone, inputs(seed=1))
    calls: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(sublayers(backbone))
    ]
    weights = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.0])
    results = []
    for lazy in (True, False):
        calls.clear()
        with torch.no_grad(), gated(backbone, dict(outputs), weights, lazy=lazy):
            results.append(backbone(*inputs()))
        assert calls == ([1, 2, 4] if lazy else list(range(6)))
    for hook in hooks:
        hook.remove()
    assert torch.equal(*results)


def test_lazy_gates_have_a_gradient_where_they_are_mixed(backbone: Backbone) -> None:
    outputs = recorded(backbone, inputs(seed=1))
    gradients = []
    for lazy in (True, False):
        weights = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.0], requires_grad=True)
        with gated(backbone, dict(outputs), weights, lazy=lazy):
            backbone(*inputs()).square().sum().backward()
        gradients.append(weights.grad)
    assert torch.equal(gradients[0][2], gradients[1][2])
    assert bool((gradients[1] != 0).all())
    assert gradients[0].nonzero().flatten().tolist() == [2]


# --- gradients ---


def direction_and_weights(model: Backbone) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(2, model.out_channels, 8, 8, generator=g, dtype=torch.float64)
    return direction, torch.rand(6, generator=g, dtype=torch.float64).requires_grad_()


def mixed_loss(
    model: Backbone, weights: Tensor, stale: Outputs, at: Inputs, direction: Tensor
) -> Tensor:
    with gated(model, dict(stale), weights):
        return (model(*at) * direction).sum()


def test_gradient_of_a_weight_is_upstream_gradient_times_fresh_minus_stale(
    backbone: Backbone,
) -> None:
    model = backbone.double()
    at = inputs(dtype=torch.float64)
    stale = recorded(model, inputs(seed=1, dtype=torch.float64))
    direction, weights = direction_and_weights(model)

    mixed = dict(stale)
    fresh: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: fresh.append(output))
        for layer in sublayers(model)
    ]
    with gated(model, mixed, weights):
        loss = (model(*at) * direction).sum()
    for hook in hooks:
        hook.remove()
    upstream = torch.autograd.grad(loss, [only(mixed)[i] for i in range(6)], retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, weights)
    before = only(stale)
    by_hand = torch.stack([(upstream[i] * (fresh[i] - before[i])).sum() for i in range(6)])
    # float64: the two sum the same products in another order
    assert torch.allclose(gradient, by_hand, rtol=1e-10, atol=1e-12)
    assert bool((gradient.abs() > 1e-6).all())


def test_gradient_of_the_weights_agrees_with_finite_differences(
    backbone: Backbone,
) -> None:
    model = backbone.double()
    at = inputs(dtype=torch.float64)
    stale = recorded(model, inputs(seed=1, dtype=torch.float64))
    direction, weights = direction_and_weights(model)
    (gradient,) = torch.autograd.grad(mixed_loss(model, weights, stale, at, direction), weights)
    step = 1e-5
    for index in range(6):
        shift = torch.zeros(6, dtype=torch.float64)
        shift[index] = step
        with torch.no_grad():
            above, below = (
                mixed_loss(model, weights + sign * shift, stale, at, direction) for sign in (1, -1)
            )
        numeric = float(above - below) / (2 * step)
        # central differences err by step^2 = 1e-10 and by rounding, 1e-16 / step, times the loss
        assert float(gradient[index]) == pytest.approx(numeric, rel=1e-6, abs=1e-6)


def test_backbone_gets_no_gradient_and_stale_outputs_are_constants(backbone: Backbone) -> None:
    stale = recorded(backbone, inputs(seed=1))
    assert not any(output.requires_grad for output in only(stale).values())
    weights = torch.full((6,), 0.5, requires_grad=True)
    with gated(backbone, dict(stale), weights):
        backbone(*inputs()).sum().backward()
    assert weights.grad is not None
    assert all(parameter.grad is None for parameter in backbone.parameters())


# --- the model afterwards ---


def test_model_is_restored_at_the_end(backbone: Backbone) -> None:
    expected = backbone(*inputs())
    recorded(backbone, inputs(seed=1))
    assert_untouched(backbone, inputs(), expected)


def test_model_is_restored_after_an_error(backbone: Backbone) -> None:
    expected = backbone(*inputs())
    for weight, lazy in ((0.5, False), (0.5, True), (0.0, True)):
        weights = torch.full((6,), weight)
        with pytest.raises(KeyError), gated(backbone, {}, weights, lazy=lazy):
            backbone(*inputs())  # nothing was recorded that could be mixed
        assert_untouched(backbone, inputs(), expected)
    with pytest.raises(ZeroDivisionError), gated(backbone, {}, None):
        raise ZeroDivisionError
    assert_untouched(backbone, inputs(), expected)
    recorded(backbone, inputs())  # and it can be used again


def test_a_gated_model_cannot_be_gated_again(backbone: Backbone) -> None:
    with (
        gated(backbone, {}, None),
        pytest.raises(ValueError, match="leave the other `with` block first"),
        gated(backbone, {}, None),
    ):
        pass
