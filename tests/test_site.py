"""The costs of sites, against closed formulas and the published totals."""

from __future__ import annotations

import pytest
import torch

import l2c
from tests.conftest import tiny_dit


def test_costs_follow_the_formula(dit: l2c.DiT) -> None:
    width, tokens, patch = 32, 16, 2 * 2 * 3
    found = l2c.sites(dit)
    assert found.names == tuple(f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn", "mlp"))
    for site in found:
        products = 2 * tokens * tokens * width  # queries with keys, weights with values
        expected = {
            "attn": 4 * width * width * tokens + products,
            "mlp": 8 * width * width * tokens,
        }
        assert site.macs == expected[site.name.rpartition(".")[2]]
    conditioning = 256 * width + width * width + 3 * 6 * width * width + 2 * width * width
    ends = patch * width * tokens + width * 2 * patch * tokens
    assert found.rest == conditioning + ends
    assert found.macs == found.rest + sum(site.macs for site in found)


@pytest.mark.parametrize(
    ("name", "size", "steps", "total"),
    [("DiT-XL/2", 32, 50, 5.72), ("DiT-XL/2", 64, 50, 22.85), ("DiT-L/2", 32, 50, 3.88)],
)
def test_totals_are_the_published_ones(name: str, size: int, steps: int, total: float) -> None:
    with torch.device("meta"):
        model = l2c.DiT.named(name, input_size=size)
    config = model.config
    tokens = (size // 2) ** 2
    # The published counter leaves the attention products out, l2c counts them. The tolerance is
    # one of the last printed digit.
    products = 2 * tokens * tokens * config["hidden_size"] * config["depth"]
    assert steps * (l2c.sites(model).macs - products) / 1e12 == pytest.approx(total, abs=0.011)


def test_counting_touches_neither_weights_nor_model(dit: l2c.DiT) -> None:
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    l2c.sites(dit)
    assert all(torch.equal(value, before[name]) for name, value in dit.state_dict().items())
    assert "_l2c_attached" not in vars(dit)


def test_unknown_models_are_refused_with_the_known() -> None:
    with pytest.raises(ValueError, match="no sites are declared for Linear; known .* DiT"):
        l2c.sites(torch.nn.Linear(2, 2))


def test_a_model_without_blocks_has_no_sites() -> None:
    with pytest.raises(ValueError, match="no site matched"):
        l2c.sites(tiny_dit(depth=0))
