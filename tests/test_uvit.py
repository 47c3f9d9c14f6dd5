"""U-ViT, against its official layout and a forward pass written from the official code."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import l2c
from l2c.backbone import sinusoidal
from l2c.uvit import SIZES
from tests.conftest import tiny_dit, tiny_uvit

State = dict[str, Tensor]


# --- the official forward pass ---


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def block(state: State, name: str, x: Tensor, heads: int) -> Tensor:
    """Pre-norm attention, its softmax written out, and MLP with the exact GELU."""
    batch, length, width = x.shape
    qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x))
    q, k, v = qkv.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / (width // heads) ** 0.5).softmax(dim=-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + linear(state, f"{name}.attn.proj", mixed)
    hidden = linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x))
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return x + linear(state, f"{name}.mlp.fc2", hidden)


def official(model: l2c.UViT, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    state, config = model.state_dict(), model.config
    heads, half = config["num_heads"], config["depth"] // 2
    width, p, channels = config["hidden_size"], config["patch_size"], config["in_channels"]
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = t.double()[:, None] * frequencies
    time = torch.cat([angles.cos(), angles.sin()], dim=1)
    if config["mlp_time_embed"]:
        time = linear(state, "time_embed.2", F.silu(linear(state, "time_embed.0", time)))
    patches = F.conv2d(
        x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=p
    )
    tokens = [time[:, None], patches.flatten(2).transpose(1, 2)]
    if config["num_classes"]:
        tokens = [state["label_emb.weight"][y][:, None], *tokens]
    h = torch.cat(tokens, dim=1) + state["pos_embed"]
    kept = []
    for i in range(half):
        h = block(state, f"in_blocks.{i}", h, heads)
        kept.append(h)
    h = block(state, "mid_block", h, heads)
    for i in range(half):
        merged = torch.cat([h, kept[half - 1 - i]], dim=-1)
        h = block(
            state, f"out_blocks.{i}", linear(state, f"out_blocks.{i}.skip_linear", merged), heads
        )
    h = linear(state, "decoder_pred", norm(state, "norm", h))[:, len(tokens) - 1 :]
    side = config["input_size"] // p
    image = torch.empty(len(x), channels, side * p, side * p, dtype=x.dtype)
    for token in range(side * side):  # B (h w) (p1 p2 C) -> B C (h p1) (w p2)
        row, column = divmod(token, side)
        for p1 in range(p):
            for p2 in range(p):
                at = slice((p1 * p + p2) * channels, (p1 * p + p2 + 1) * channels)
                image[:, :, row * p + p1, column * p + p2] = h[:, token, at]
    if config["conv"]:
        image = F.conv2d(image, state["final_layer.weight"], state["final_layer.bias"], padding=1)
    return image


def moved(model: l2c.UViT) -> l2c.UViT:
    """The model with random positions: they are parameters, and zero would hide their order."""
    g = torch.Generator().manual_seed(1)
    model.pos_embed.data.copy_(0.5 * torch.randn(model.pos_embed.shape, generator=g))
    return model


OPTIONS = [
    {},
    {"conv": True},
    {"mlp_time_embed": True},
    {"num_classes": 0, "null_class": False},
    {"null_class": False},
    {"depth": 6, "in_channels": 4, "patch_size": 4, "num_heads": 2},
    {"continuous_time": True},
    {"mlp_ratio": 2.0, "hidden_size": 36, "input_size": 12},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_official_forward_pass(options: dict[str, int | bool]) -> None:
    model = moved(tiny_uvit(**options)).double()
    size, channels = model.input_size, model.in_channels
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(0)).double()
    t, y = torch.tensor([0.0, 17.25, 64.0]), torch.tensor([0, 7, 9])
    labels = y if model.num_classes else None
    with torch.no_grad():
        mine, theirs = model(x, t, labels), official(model, x, t, y)
    assert float(mine.std()) > 0.05
    # Frequencies are float32 in the model, as in the official code: 6e-8 of angles up to 64. The
    # tanh approximation of GELU or another epsilon in a norm would differ by more.
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_equals_the_official_forward_pass_to_the_last_digits_at_timestep_0(
    options: dict[str, int | bool],
) -> None:
    model = moved(tiny_uvit(**options)).double()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    t, y = torch.zeros(2), torch.tensor([3, 7])
    with torch.no_grad():
        mine, theirs = model(x, t, y), official(model, x, t, y)
    # float64, and no angle to round: sums in another order are all that differs
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("width", [512, 768, 1024, 1152])
def test_timestep_features_have_the_official_bits(width: int) -> None:
    t = torch.cat([torch.arange(1, 1001), torch.tensor([1.8566, 999.5])]).float()
    half = width // 2
    steps = torch.arange(start=0, end=half, dtype=torch.float32)
    angles = t[:, None] * torch.exp(-math.log(10000) * steps / half)[None]
    assert torch.equal(sinusoidal(t, width), torch.cat([angles.cos(), angles.sin()], dim=-1))


# --- names, shapes and sizes ---


def official_shapes(
    depth: int = 2, conv: bool = False, mlp_time_embed: bool = False, labels: int = 11
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the official class for width 32, patches of 2, 3 channels, 8 x 8."""
    width, hidden, patch = 32, 128, 12
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (2 if labels else 1) + 16, width),
        "patch_embed.proj.weight": (width, 3, 2, 2),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_pred.weight": (patch, width),
        "decoder_pred.bias": (patch,),
    }
    if labels:
        shapes["label_emb.weight"] = (labels, width)
    if conv:
        shapes |= {"final_layer.weight": (3, 3, 3, 3), "final_layer.bias": (3,)}
    if mlp_time_embed:
        shapes |= {"time_embed.0.weight": (4 * width, width), "time_embed.0.bias": (4 * width,)}
        shapes |= {"time_embed.2.weight": (width, 4 * width), "time_embed.2.bias": (width,)}
    names = [f"{side}_blocks.{i}" for side in ("in", "out") for i in range(depth // 2)]
    for name in [*names, "mid_block"]:
        shapes |= {
            f"{name}.norm1.weight": (width,),
            f"{name}.norm1.bias": (width,),
            f"{name}.attn.qkv.weight": (3 * width, width),  # without a bias
            f"{name}.attn.proj.weight": (width, width),
            f"{name}.attn.proj.bias": (width,),
            f"{name}.norm2.weight": (width,),
            f"{name}.norm2.bias": (width,),
            f"{name}.mlp.fc1.weight": (hidden, width),
            f"{name}.mlp.fc1.bias": (hidden,),
            f"{name}.mlp.fc2.weight": (width, hidden),
            f"{name}.mlp.fc2.bias": (width,),
        }
        if name.startswith("out"):
            shapes[f"{name}.skip_linear.weight"] = (width, 2 * width)
            shapes[f"{name}.skip_linear.bias"] = (width,)
    return shapes


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({}, {}),
        ({"depth": 4}, {"depth": 4}),
        ({"conv": True}, {"conv": True}),
        ({"mlp_time_embed": True}, {"mlp_time_embed": True}),
        ({"null_class": False}, {"labels": 10}),
        ({"num_classes": 0, "null_class": False}, {"labels": 0}),
    ],
)
def test_state_dict_has_the_official_names_and_shapes(
    mine: dict[str, int | bool], theirs: dict[str, int | bool]
) -> None:
    found = {name: tuple(value.shape) for name, value in tiny_uvit(**mine).state_dict().items()}
    assert found == official_shapes(**theirs)


@pytest.mark.parametrize(
    ("name", "settings", "millions"),
    [
        # CIFAR10, unconditional pixels; then ImageNet 256 and 512, latents
        (
            "U-ViT-S/2",
            {"in_channels": 3, "num_classes": 0, "null_class": False, "conv": True},
            44,
        ),
        ("U-ViT-L/2", {}, 287),
        ("U-ViT-H/2", {}, 501),
        ("U-ViT-H/4", {"input_size": 64}, 501),
    ],
)
def test_published_sizes(name: str, settings: dict[str, int | bool], millions: int) -> None:
    with torch.device("meta"):
        model = l2c.UViT.named(name, **settings)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", ["U-ViT-S/2", "U-ViT-H/2"])
def test_parameters_follow_the_formula(name: str) -> None:
    with torch.device("meta"):
        model = l2c.UViT.named(name)
    config = model.config
    width, patch = config["hidden_size"], config["patch_size"] ** 2 * 4
    block_of = (3 * width * width) + (width * width + width) + (8 * width * width + 5 * width)
    norms = 4 * width
    skip = 2 * width * width + width
    ends = (patch * width + width) + (patch * width + patch) + 2 * width
    tables = 1001 * width + (2 + 256) * width
    expected = (config["depth"] + 1) * (block_of + norms) + config["depth"] // 2 * skip
    assert sum(p.numel() for p in model.parameters()) == expected + ends + tables


def test_sizes_are_those_of_the_paper() -> None:
    assert {name: tuple(size.values()) for name, size in SIZES.items()} == {
        "U-ViT-S": (512, 12, 8),
        "U-ViT-M": (768, 16, 12),
        "U-ViT-L": (1024, 20, 16),
        "U-ViT-H": (1152, 28, 16),
    }


@pytest.mark.parametrize("name", ["U-ViT-H/3", "U-ViT-XL/2", "U-ViT-H", "DiT-S/2"])
def test_unknown_size_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape("known are U-ViT-S/2, U-ViT-S/4, U-ViT-M/2")):
        l2c.UViT.named(name)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"patch_size": 3}, "patch_size 3 does not divide input_size 8"),
        ({"num_heads": 5}, "even hidden_size that num_heads divides, got 32 and 5"),
        ({"hidden_size": 33, "num_heads": 3}, "even hidden_size .* got 33 and 3"),
        ({"depth": 3}, "even depth of at least 2, got 3"),
        ({"depth": 0}, "even depth of at least 2, got 0"),
        ({"in_channels": 0}, "sizes of at least 1, got .*in_channels=0"),
        ({"num_classes": 0}, "null_class only with classes, got num_classes=0, null_class=True"),
        ({"num_classes": -1, "null_class": False}, "num_classes >= 0.*got num_classes=-1"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_uvit(**sizes)


def test_the_null_class_is_one_more_row() -> None:
    assert tiny_uvit().null_label == 10
    assert tiny_uvit(null_class=False).null_label is None
    without_labels = tiny_uvit(num_classes=0, null_class=False)
    assert without_labels.null_label is None
    assert not hasattr(without_labels, "label_emb")


def test_latent_models_count_from_1_and_those_of_pixels_from_0() -> None:
    assert tiny_uvit().noise == l2c.Noise("scaled_linear", 0.00085, 0.012, 1000, first=1)
    assert tiny_uvit(continuous_time=True).noise == l2c.Noise()


def test_a_fresh_model_has_the_official_distribution() -> None:
    torch.manual_seed(0)
    model = l2c.UViT(input_size=8, hidden_size=256, depth=2, num_heads=4)
    for weight in (model.mid_block.attn.qkv.weight, model.mid_block.mlp.fc1.weight):
        # 2e5 draws of a normal of width 0.02
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.01)
    assert float(model.label_emb.weight.detach().std()) == pytest.approx(1, rel=0.01)
    assert float(model.pos_embed.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not model.mid_block.mlp.fc1.bias.any()
    assert bool((model.mid_block.norm1.weight == 1).all())


# --- files ---

NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GIVEN = (NOISE, torch.tensor([5, 900]), torch.tensor([1, 9]))


@pytest.mark.parametrize("options", OPTIONS[:5], ids=str)
def test_save_and_load_are_exact(options: dict[str, int | bool], tmp_path: Path) -> None:
    model = moved(tiny_uvit(**options))
    model.save_pretrained(tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    assert described == {"_class_name": "UViT", **model.config}
    for loaded in (l2c.load(tmp_path / "model"), l2c.UViT.from_pretrained(tmp_path / "model")):
        assert isinstance(loaded, l2c.UViT)
        assert loaded.config == model.config
        assert loaded.noise == model.noise
        assert torch.equal(loaded(*GIVEN), model(*GIVEN))


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_files(options: dict[str, int | bool], suffix: str, tmp_path: Path) -> None:
    model = moved(tiny_uvit(in_channels=4, **options))
    path = tmp_path / f"uvit{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save_file(model.state_dict(), path)
    loaded = l2c.load(path, num_heads=4)
    assert isinstance(loaded, l2c.UViT)
    assert loaded.config == model.config
    assert loaded.noise == l2c.Noise.uvit()
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(loaded(x, *GIVEN[1:]), model(x, *GIVEN[1:]))


def test_published_sizes_need_no_settings(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = l2c.UViT.named("U-ViT-S/4", input_size=8, num_classes=2)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    torch.save(model.half().state_dict(), tmp_path / "uvit.pth")
    loaded = l2c.load(tmp_path / "uvit.pth")
    assert loaded.config == model.config
    assert loaded.config["num_heads"] == 8


def test_three_channels_are_pixels(tmp_path: Path) -> None:
    model = tiny_uvit(continuous_time=True)
    torch.save(model.state_dict(), tmp_path / "uvit.pth")
    assert l2c.load(tmp_path / "uvit.pth", num_heads=4).config == model.config
    latent = l2c.load(tmp_path / "uvit.pth", num_heads=4, continuous_time=False)
    assert latent.noise == l2c.Noise.uvit()


def test_without_a_null_class_the_last_label_is_one_like_the_others(tmp_path: Path) -> None:
    model = tiny_uvit(in_channels=4, null_class=False)
    torch.save(model.state_dict(), tmp_path / "uvit.pth")
    loaded = l2c.load(tmp_path / "uvit.pth", num_heads=4, null_class=False)
    assert loaded.config == model.config
    assert (loaded.num_classes, loaded.null_label) == (10, None)
    guessed = l2c.load(tmp_path / "uvit.pth", num_heads=4)
    assert (guessed.num_classes, guessed.null_label) == (9, 9)


def test_other_sizes_need_the_number_of_heads(tmp_path: Path) -> None:
    torch.save(tiny_uvit().state_dict(), tmp_path / "uvit.pth")
    message = r"uvit\.pth.*hidden size 32 and depth 2 .*U-ViT-S.*give num_heads="
    with pytest.raises(ValueError, match=message):
        l2c.load(tmp_path / "uvit.pth")


def test_files_are_told_apart(tmp_path: Path) -> None:
    torch.save(tiny_dit().state_dict(), tmp_path / "dit.pt")
    torch.save(tiny_uvit().state_dict(), tmp_path / "uvit.pt")
    assert type(l2c.load(tmp_path / "dit.pt", num_heads=4)) is l2c.DiT
    assert type(l2c.load(tmp_path / "uvit.pt", num_heads=4)) is l2c.UViT


def test_files_of_something_else_name_both(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(torch.nn.TransformerEncoderLayer(8, 2).state_dict(), path)
    message = r"other\.pth: for DiT it lacks .*pos_embed.*; for UViT it lacks .*mid_block\.attn"
    with pytest.raises(ValueError, match=message):
        l2c.load(path)
    state = tiny_uvit().state_dict()
    torch.save({k: v for k, v in state.items() if k != "mid_block.attn.qkv.weight"}, path)
    with pytest.raises(ValueError, match=r"for UViT it lacks mid_block\.attn\.qkv\.weight$"):
        l2c.load(path, num_heads=4)
    torch.save({k: v for k, v in state.items() if k != "mid_block.mlp.fc1.bias"}, path)
    with pytest.raises(ValueError, match=r"(?s)do not fit UViT.*mid_block\.mlp\.fc1\.bias"):
        l2c.load(path, num_heads=4)
    torch.save({**state, "out_blocks.0.norm1.bias": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"size mismatch for out_blocks\.0\.norm1\.bias"):
        l2c.load(path, num_heads=4)
    torch.save({**state, "decoder_pred.weight": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"decoder_pred\.weight of 2 dimensions .*got \(5,\)"):
        l2c.load(path, num_heads=4)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"uvit{suffix}"
    if suffix == ".pth":
        torch.save(tiny_uvit().state_dict(), path)
    else:
        save_file(tiny_uvit().state_dict(), path)
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.99):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="no whole checkpoint"):
            l2c.load(path, num_heads=4)


def test_a_configuration_of_the_other_class_is_refused(tmp_path: Path) -> None:
    tiny_uvit().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    described = json.loads(config.read_text())
    config.write_text(json.dumps({**described, "_class_name": "DiT"}))
    with pytest.raises(ValueError, match="does not describe a DiT"):
        l2c.load(tmp_path / "model")
    config.write_text(json.dumps({**described, "depth": 4}))
    with pytest.raises(ValueError, match=r"(?s)do not fit UViT\(.*'depth': 4.*in_blocks\.1"):
        l2c.load(tmp_path / "model")


def test_a_model_without_labels_samples(tmp_path: Path) -> None:
    model = tiny_uvit(num_classes=0, null_class=False)
    schedule = l2c.Schedule.dpm_solver_2(4)
    assert l2c.sample(model, schedule, [0, 0]).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="labels between 0 and 0, got 1"):
        l2c.sample(model, schedule, [1])
    with pytest.raises(ValueError, match="needs a model with a null class"):
        l2c.sample(model, schedule, [0], 1.5)


def test_the_model_is_the_same_in_another_precision() -> None:
    model = tiny_uvit()
    expected = model(*GIVEN)
    out = model.bfloat16()(GIVEN[0].bfloat16(), *GIVEN[1:])
    assert out.dtype == torch.bfloat16
    # bfloat16 has 8 bits of mantissa, and errors add up over three blocks
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
