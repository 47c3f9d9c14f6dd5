"""The backbone, against diffusers' implementation and against the official layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

import l2c
from l2c.dit import SIZES
from tests.conftest import tiny_dit


def to_diffusers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Rename an official state dict to diffusers' names."""
    out = {}
    for part in ("weight", "bias"):
        out[f"pos_embed.proj.{part}"] = state[f"x_embedder.proj.{part}"]
        out[f"proj_out_1.{part}"] = state[f"final_layer.adaLN_modulation.1.{part}"]
        out[f"proj_out_2.{part}"] = state[f"final_layer.linear.{part}"]
        for i in range(depth):
            mine, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
            for k, linear in ((0, "linear_1"), (2, "linear_2")):
                name = f"{theirs}.norm1.emb.timestep_embedder.{linear}.{part}"
                out[name] = state[f"t_embedder.mlp.{k}.{part}"]
            qkv = state[f"{mine}.attn.qkv.{part}"].chunk(3)
            for name, value in zip(("to_q", "to_k", "to_v"), qkv, strict=True):
                out[f"{theirs}.attn1.{name}.{part}"] = value
            out[f"{theirs}.attn1.to_out.0.{part}"] = state[f"{mine}.attn.proj.{part}"]
            out[f"{theirs}.ff.net.0.proj.{part}"] = state[f"{mine}.mlp.fc1.{part}"]
            out[f"{theirs}.ff.net.2.{part}"] = state[f"{mine}.mlp.fc2.{part}"]
            out[f"{theirs}.norm1.linear.{part}"] = state[f"{mine}.adaLN_modulation.1.{part}"]
    table = state["y_embedder.embedding_table.weight"]
    for i in range(depth):
        prefix = f"transformer_blocks.{i}.norm1.emb.class_embedder"
        out[f"{prefix}.embedding_table.weight"] = table
    return out


def diffusers_twin(model: l2c.DiT) -> DiTTransformer2DModel:
    config = model.config
    twin = DiTTransformer2DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        in_channels=config["in_channels"],
        out_channels=model.out_channels,
        num_layers=config["depth"],
        sample_size=config["input_size"],
        patch_size=config["patch_size"],
        num_embeds_ada_norm=config["num_classes"],
        norm_eps=1e-6,
    )
    missing, unexpected = twin.load_state_dict(
        to_diffusers(model.state_dict(), config["depth"]), strict=False
    )
    assert not unexpected
    assert [name for name in missing if "pos_embed.pos_embed" not in name] == []
    for block in twin.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the original; diffusers has 1
    return twin.eval()


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_equals_the_implementation_in_diffusers(timestep: int) -> None:
    model = tiny_dit(input_size=12, patch_size=2, in_channels=4)
    twin = diffusers_twin(model)
    x = torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    t, y = torch.full((3,), timestep), torch.tensor([0, 7, 10])
    with torch.no_grad():
        mine, theirs = model(x, t, y), twin(x, t, class_labels=y).sample
    assert float(mine.std()) > 0.1
    # one fused qkv product against three: the same sums in another order
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_equals_diffusers_in_double_precision(timestep: int) -> None:
    model = tiny_dit(input_size=12, patch_size=2, in_channels=4)
    twin = diffusers_twin(model).double()
    model.double()
    x = torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(0)).double()
    t, y = torch.full((3,), timestep), torch.tensor([0, 7, 10])
    with torch.no_grad():
        mine, theirs = model(x, t, y), twin(x, t, class_labels=y).sample
    # One fused qkv product against three, 16 digits each: another GELU or another epsilon in a
    # norm, which float32 could hide, differs by 1e-6 or more.
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("DiT-S/2", 33), ("DiT-B/4", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675), ("DiT-XL/8", 676)],
)
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = l2c.DiT.named(name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trained / 1e6) == millions


def test_unknown_size_lists_the_known() -> None:
    with pytest.raises(ValueError, match=re.escape("known are DiT-S/2, DiT-S/4")):
        l2c.DiT.named("DiT-XL/3")


def test_state_dict_has_the_official_names() -> None:
    expected = {"pos_embed", "y_embedder.embedding_table.weight"}
    for layer in (
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "blocks.0.adaLN_modulation.1",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ):
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    assert set(tiny_dit(depth=1).state_dict()) == expected


def test_starts_at_zero_as_adaln_zero_does() -> None:
    model = l2c.DiT(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=4)
    assert not model(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])).any()


@pytest.mark.parametrize("option", [{}, {"learn_sigma": False}, {"null_class": False}])
def test_save_and_load_are_exact(option: dict[str, bool], tmp_path: Path) -> None:
    model = tiny_dit(**option)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["_class_name"] == "DiT"
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 9])
    for loaded in (l2c.load(tmp_path / "model"), l2c.DiT.from_pretrained(tmp_path / "model")):
        assert loaded.config == model.config
        assert torch.equal(loaded(x, t, y), model(x, t, y))
    assert model(x, t, y).shape[1] == (3 if option == {"learn_sigma": False} else 6)


def test_push_to_hub_reaches_the_hub_s_own_error() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    with pytest.raises(OfflineModeIsEnabled):
        tiny_dit().push_to_hub("someone/model")


def test_training_mode_changes_nothing() -> None:
    model = tiny_dit()
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([5, 900]), torch.tensor([1, 9])
    expected = model(x, t, y)
    assert torch.equal(model.train()(x, t, y), expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 8"),
        ({"num_heads": 5}, "num_heads 5 does not divide hidden_size 32"),
        ({"hidden_size": 30, "num_heads": 5}, "multiple of 4, got 30"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dit(**sizes)


def test_sizes_are_those_of_the_paper() -> None:
    assert {name: tuple(size.values()) for name, size in SIZES.items()} == {
        "DiT-S": (12, 384, 6),
        "DiT-B": (12, 768, 12),
        "DiT-L": (24, 1024, 16),
        "DiT-XL": (28, 1152, 16),
    }


@pytest.mark.parametrize("name", ["DiT-S/8", "DiT-B/4", "DiT-XL/2"])
def test_parameters_follow_the_formula(name: str) -> None:
    with torch.device("meta"):
        model = l2c.DiT.named(name)
    config = model.config
    width, patch = config["hidden_size"], config["patch_size"] ** 2
    attention = 4 * width * width + 4 * width
    mlp = 8 * width * width + 5 * width
    block = attention + mlp + 6 * width * width + 6 * width
    embedders = (4 * patch * width + width) + (256 * width + width + width * width + width)
    final = 2 * width * width + 2 * width + 8 * patch * width + 8 * patch
    expected = config["depth"] * block + embedders + 1001 * width + final
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_the_null_class_is_one_more_row() -> None:
    assert tiny_dit().y_embedder.embedding_table.num_embeddings == 11
    assert tiny_dit().null_label == 10
    assert tiny_dit(null_class=False).y_embedder.embedding_table.num_embeddings == 10
    assert tiny_dit(null_class=False).null_label is None
