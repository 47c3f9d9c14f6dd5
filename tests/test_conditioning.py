"""Conditioning ahead of the loop: the same numbers, computed once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import l2c
from l2c.conditioning import prepared
from tests.conftest import tiny_dit, tiny_uvit

TIMES = (999, 640, 320, 0)
LABELS = [torch.tensor([3, 1, 4]), torch.tensor([10, 10, 10])]


def outputs(model: l2c.DiT) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return [
            model(torch.randn(3, 3, 8, 8, generator=g), torch.full((3,), t), y)
            for t in TIMES
            for y in LABELS
        ]


def counted(model: l2c.DiT) -> list[int]:
    """Rows that each product of a block's modulation takes."""
    rows: list[int] = []
    for block in model.blocks:
        block.adaLN_modulation[1].register_forward_hook(
            lambda _, given, __: rows.append(len(given[0]))
        )
    return rows


def test_same_numbers() -> None:
    model = tiny_dit()
    plain = outputs(model)
    with torch.no_grad(), prepared(model, TIMES, LABELS):
        ahead = outputs(model)
    for a, b in zip(ahead, plain, strict=True):
        # a product of 24 rows may add up in another order than one of 3
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), plain, strict=True))


def test_one_product_per_block() -> None:
    model = tiny_dit()
    rows = counted(model)
    with torch.no_grad(), prepared(model, TIMES, LABELS):
        outputs(model)
    assert rows == [24, 24, 24]


def test_sampling_uses_it_for_every_batch() -> None:
    model = tiny_dit()
    rows = counted(model)
    l2c.sample(model, l2c.Schedule.ddim(5), [1, 2, 3], 1.5, batch_size=2)
    assert rows == [5 * 4] * 3 + [5 * 2] * 3


def test_too_much_for_the_memory_is_computed_each_time() -> None:
    model = tiny_dit()
    numbers = 24 * (3 * 6 + 2) * 32
    for limit, expected in ((4 * numbers, [24] * 3), (4 * numbers - 1, [3] * 24)):
        rows = counted(model)
        with torch.no_grad(), prepared(model, TIMES, LABELS, limit):
            outputs(model)
        assert rows == expected


def test_model_is_left_as_it_was_after_an_error() -> None:
    model = tiny_dit()
    plain = outputs(model)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), prepared(model, TIMES, LABELS):
        model(torch.zeros(3, 3, 8, 8), torch.full((3,), 999), LABELS[0])
        raise ZeroDivisionError
    for module in model.modules():
        assert not {"forward", "condition", "modulation"} & module.__dict__.keys()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), plain, strict=True))


def test_a_model_without_modulation_is_left_alone() -> None:
    model = tiny_uvit()
    with prepared(model, TIMES, LABELS):
        assert "forward" not in model.__dict__
