"""The costs of sites, against closed formulas and the published totals."""

from __future__ import annotations

import pytest
import torch

import l2c
from l2c.backbone import Backbone
from tests.conftest import blocks_of, tiny_dit, tiny_uvit


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
        assert (site.shape, site.elements, site.channels) == ((tokens, width), 512, width)
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


@pytest.mark.parametrize(("labels", "extras"), [(10, 2), (0, 1)])
@pytest.mark.parametrize("depth", [2, 6])
def test_costs_of_a_uvit_follow_the_formula(depth: int, labels: int, extras: int) -> None:
    width, tokens, patch = 32, 16 + extras, 2 * 2 * 3
    found = l2c.sites(tiny_uvit(depth=depth, num_classes=labels, null_class=labels > 0))
    sides = [[f"{side}_blocks.{i}" for i in range(depth // 2)] for side in ("in", "out")]
    blocks = [*sides[0], "mid_block", *sides[1]]
    assert found.names == tuple(f"{block}.{kind}" for block in blocks for kind in ("attn", "mlp"))
    assert len(found) == 2 * (depth + 1)
    products = 2 * tokens * tokens * width  # queries with keys, weights with values
    attention, mlp = 4 * width * width * tokens + products, 8 * width * width * tokens
    assert [site.macs for site in found] == [attention, mlp] * (depth + 1)
    skips = depth // 2 * 2 * width * width * tokens
    assert {site.shape for site in found} == {(tokens, width)}  # the extra tokens among them
    # The output is projected before the first tokens are left out.
    assert found.rest == skips + patch * width * 16 + width * patch * tokens


@pytest.mark.parametrize(
    ("options", "macs"),
    [
        ({"conv": True}, 3 * 3 * 3 * 3 * 64),
        ({"mlp_time_embed": True}, 2 * 32 * 4 * 32),
        ({"null_class": False}, 0),
    ],
)
def test_options_of_a_uvit_cost_what_they_add(options: dict[str, bool], macs: int) -> None:
    plain, found = l2c.sites(tiny_uvit()), l2c.sites(tiny_uvit(**options))
    assert found.sites == plain.sites
    assert found.rest == plain.rest + macs


def test_totals_of_the_uvit_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = l2c.UViT.named("U-ViT-H/2")
    found = l2c.sites(model)
    assert len(found) == 58
    width, tokens = 1152, 2 + 16 * 16
    # The published counter leaves the attention products out, l2c counts them. The tolerance is
    # one of the last printed digit.
    total = found.macs - 2 * tokens * tokens * width * 29
    assert 50 * total / 1e12 == pytest.approx(6.44, abs=0.01)
    assert 20 * total / 1e12 == pytest.approx(2.58, abs=0.01)
    # What merges the skips is most of what no plan can save.
    skips = 14 * 2 * width * width * tokens
    assert round(100 * skips / found.macs, 1) == round(100 * found.rest / found.macs, 1) == 7.2
    # All reused in 24 of 50 evaluations, and in 9 of 20.
    for evaluations, bound in ((50, 1.80), (20, 1.72)):
        plan = l2c.Plan.every(2, l2c.Schedule.dpm_solver_2(evaluations), found)
        assert round(plan.speedup, 2) == bound


def test_counting_touches_neither_weights_nor_model(dit: l2c.DiT) -> None:
    before = {name: value.clone() for name, value in dit.state_dict().items()}
    l2c.sites(dit)
    assert all(torch.equal(value, before[name]) for name, value in dit.state_dict().items())
    assert "_l2c_attached" not in vars(dit)


def test_shapes_are_those_of_the_outputs_of_one_sample(backbone: Backbone) -> None:
    shapes = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
        for block in blocks_of(backbone)
        for layer in (block.attn, block.mlp)
    ]
    backbone(torch.zeros(5, 3, 8, 8), torch.zeros(5), torch.zeros(5, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    assert [(5, *site.shape) for site in l2c.sites(backbone)] == shapes


def test_a_site_without_a_shape_has_no_numbers_to_keep() -> None:
    unknown = l2c.Site("blocks.0.attn", 5)
    assert (unknown.elements, unknown.channels) == (0, 0)


def test_unknown_models_are_refused_with_the_known() -> None:
    with pytest.raises(ValueError, match="no sites are declared for Linear; known .* DiT"):
        l2c.sites(torch.nn.Linear(2, 2))


def test_a_model_without_blocks_has_no_sites() -> None:
    with pytest.raises(ValueError, match="no site matched"):
        l2c.sites(tiny_dit(depth=0))
